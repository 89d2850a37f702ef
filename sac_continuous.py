# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium[mujoco]==1.4.0",
#     "mujoco==3.17.0",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
#     "numpy==2.4.6",
#     "tqdm==4.70.1",
# ]
# ///
"""Soft Actor-Critic with a squashed Gaussian policy, the baseline beside MFPO and SMFP.

Papers: https://arxiv.org/abs/1801.01290 and https://arxiv.org/abs/1812.05905 (learned temperature).
Defaults are those of CleanRL's sac_continuous_action.py, with one critic and one actor update per step.

    python sac_continuous.py --env-id Hopper-v4 --seed 1
    python sac_continuous.py --env-id Hopper-v4 --seed 1 --save-model
    python sac_continuous.py --evaluate runs/<run>/model.pt --eval-episodes 20

Maximise sum_t E[r_t + alpha H(pi(.|s_t))] by alternating
    critics      Q(s, a)  <-  r + gamma (1 - terminated) (min_i Q'_i(s', a') - alpha log pi(a'|s')),  a' ~ pi
    actor        minimise  E[alpha log pi(a|s) - min_i Q_i(s, a)],  a = tanh(mu(s) + sigma(s) eps)
    temperature  minimise  alpha (H - H_target),  H = -E[log pi],  H_target = -d

In TensorBoard: eval/episodic_return is the score; diagnostics/entropy should settle at -d.
"""

import copy
import ctypes
import difflib
import math
import os
import random
import signal
import sys
import threading
import time
import warnings
import zipfile
from collections import deque
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

warnings.filterwarnings("ignore", ".*precision lowered by casting to float32")  # which make_env asks for


@dataclass
class Args:
    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the run's folder name"""
    seed: int = 1
    """seed of the networks, the noise, the replay sampling and the environments"""
    torch_deterministic: bool = True
    """ask PyTorch for deterministic kernels"""
    cuda: bool = True
    """train on the GPU when there is one"""
    cuda_graph: bool = True
    """on a GPU, launch each update and each action as one CUDA graph instead of kernel by kernel"""
    track: bool = False
    """also log to Weights and Biases (needs `pip install wandb`)"""
    wandb_project_name: str = "meanflow-rl"
    """the Weights and Biases project"""
    wandb_entity: str | None = None
    """the Weights and Biases team"""
    capture_video: bool = False
    """record an episode of each evaluated policy as MP4 in the run's folder (even numbers: eval, odd: eval_exploring;
    written when the next one begins; needs `pip install moviepy`)"""
    save_model: bool = False
    """write the trained weights to runs/<run>/model.pt at the end"""
    evaluate: str | None = None
    """load this model.pt or checkpoint.pt, print the return of `eval_episodes` episodes and stop; of the other flags
    only --seed, --capture-video and --cuda count, the rest is as saved in it"""
    checkpoint_frequency: int = 10_000
    """steps of each environment between two checkpoints, which hold the replay buffer too; one begins new episodes, so
    choose more than an episode's length; 0: only when the run stops"""
    resume: str | None = None
    """go on with the run in this folder, under its own arguments; only `total_timesteps` may change"""
    log_frequency: int = 100
    """environment steps between two rows of losses and diagnostics"""
    diagnostics_frequency: int = 1_000
    """environment steps between two rows of the costlier diagnostics; 0 turns them off"""

    env_id: str = "Hopper-v4"
    """a Gymnasium id, or `module:id` to import the module that registers it"""
    total_timesteps: int = 1_000_000
    """environment steps, summed over the parallel environments"""
    num_envs: int = 1
    """environments stepped in turn, on one batch of actions"""
    buffer_size: int = 1_000_000
    """transitions that the replay buffer holds (each episode's end takes the room of `num_envs` more)"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """step of the target critics' moving average"""
    batch_size: int = 256
    """transitions per update"""
    utd_ratio: float = 1.0
    """updates per environment step"""
    eval_frequency: int = 10_000
    """environment steps between two evaluations; 0 turns them off"""
    eval_episodes: int = 10
    """episodes per evaluation, run as one batch"""

    # Algorithm specific arguments
    learning_starts: int = 5_000
    """uniformly random steps before the first update (CleanRL)"""
    policy_lr: float = 3e-4
    """learning rate of the actor (CleanRL)"""
    q_lr: float = 1e-3
    """learning rate of the critics and of the temperature (CleanRL)"""
    policy_frequency: int = 1
    """updates of the critics per update of the policy and the temperature"""
    autotune: bool = True
    """learn the temperature; otherwise it stays at `alpha`"""
    alpha: float = 1.0
    """the temperature, or its first value when it is learned (CleanRL: log alpha starts at 0)"""


def fail(message: str) -> None:
    """Report a mistake of the user's in one line and exit with code 2, before anything is written."""
    print(f"{Path(__file__).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def first_line(error: Exception) -> str:
    """An exception's type and the first line of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


class EnvError(Exception):
    """An environment raised, or returned what cannot be trained on."""


def require(args: Args, names: str, valid, expected: str) -> None:
    """Fail at the first of the arguments `names` whose value is not `valid`; `expected` says what it must be."""
    for name in names.split():
        if not valid(getattr(args, name)):
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be {expected}")


def check_args(args: Args) -> None:
    """Reject numbers that contradict each other or make no sense."""
    counts = "total_timesteps num_envs buffer_size batch_size policy_frequency log_frequency eval_episodes"
    require(args, counts, lambda x: x >= 1, "at least 1")
    frequencies = "eval_frequency checkpoint_frequency diagnostics_frequency"
    require(args, f"seed learning_starts {frequencies}", lambda x: x >= 0, "at least 0")
    require(args, "exp_name", lambda x: "/" not in x, "without a /")
    require(args, "gamma", lambda x: 0 <= x < 1, "in [0, 1)")
    require(args, "tau", lambda x: 0 < x <= 1, "in (0, 1]")
    require(args, "utd_ratio", lambda x: 0 < x < math.inf, "positive and finite")
    require(args, "alpha", lambda x: 1e-30 <= x <= 1e30, "in [1e-30, 1e30]")  # float32's range, with room
    check_algorithm(args)
    for small, large in (
        ("batch_size", "buffer_size"),
        ("batch_size", "learning_starts"),
        ("num_envs", "learning_starts"),
        ("num_envs", "total_timesteps"),
    ):
        if getattr(args, small) > getattr(args, large):
            lower, higher = (f"--{name.replace('_', '-')} {getattr(args, name)}" for name in (large, small))
            fail(f"{lower} is below {higher}; raise it")
    if args.buffer_size < 4 * args.num_envs:  # an episode's end and a checkpoint together skip three rows
        fail(f"--buffer-size {args.buffer_size} is too small for --num-envs {args.num_envs}; raise it")
    for flag, package in (("capture_video", "moviepy"), ("track", "wandb")):
        if getattr(args, flag) and not find_spec(package):
            fail(f"--{flag.replace('_', '-')} needs the package {package}: pip install {package}")


class CheckedEnv(gym.Wrapper):
    """Turns an exception, a wrong shape or dtype, or a non-finite number from the environment into an EnvError."""

    def reset(self, **options):
        return self.checked("reset", self.env.reset, **options)

    def step(self, action):
        return self.checked("step", self.env.step, action)

    def checked(self, name, function, *arguments, **options):
        try:
            obs, *rest = function(*arguments, **options)
            reward = 0.0
            if name == "step":
                reward, _, _, _ = rest
            obs, reward = np.asarray(obs), float(reward)
        except Exception as error:
            raise EnvError(f"{name} raised {first_line(error)}") from error
        shape = self.observation_space.shape
        if obs.shape != shape or not np.can_cast(obs.dtype, np.float32, "same_kind"):
            raise EnvError(f"{name} returned an observation {obs.dtype} {obs.shape} instead of float32 {shape}")
        largest = np.finfo(np.float32).max
        if not ((np.abs(obs) <= largest).all() and abs(reward) <= largest):  # false for nan too
            raise EnvError(f"{name} returned the observation {obs.tolist()} and the reward {reward}")
        return obs, *rest


def make_env(env_id: str, video_folder: str | None = None) -> gym.Env:
    """Make one environment with flat float32 observations and actions in [-1, 1].

    With `video_folder` every episode is recorded there. Exits with code 2 when the id is unknown or when the spaces
    are not what a continuous-control algorithm on vectors can use.
    """
    try:
        env = gym.make(env_id, render_mode="rgb_array") if video_folder else gym.make(env_id)
    except Exception as error:  # an unknown id, a missing package, or a fault in the environment's own code
        near = difflib.get_close_matches(env_id, gym.registry.keys() - {env_id}, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "see gymnasium.pprint_registry()"
        fail(f"--env-id {env_id} cannot be made ({first_line(error)}); {hint}")
    actions, observations = env.action_space, env.observation_space
    if not isinstance(actions, gym.spaces.Box) or len(actions.shape) != 1:
        fail(f"--env-id {env_id} has the action space {actions}; only a one-dimensional Box is supported")
    if not actions.is_bounded():
        fail(f"--env-id {env_id} has unbounded actions {actions}; wrap it so that they are bounded")
    if isinstance(observations, gym.spaces.Box) and len(observations.shape) == 3:
        fail(f"--env-id {env_id} has image observations {observations.shape}; only vectors are supported")
    if not isinstance(observations, gym.spaces.Box) or len(observations.shape) != 1:
        if not observations.is_np_flattenable:
            fail(f"--env-id {env_id} has the observation space {observations}, which cannot be flattened to a vector")
        env = gym.wrappers.FlattenObservation(env)
    if video_folder:
        env = gym.wrappers.RecordVideo(env, video_folder, episode_trigger=lambda episode: True)
    env = CheckedEnv(gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1)))
    env = gym.wrappers.DtypeObservation(env, np.float32)
    return gym.wrappers.RecordEpisodeStatistics(env)


def check_video(env_id: str) -> None:
    """Render one frame, so that a missing package or driver shows before the run."""
    if not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a display; read when mujoco first renders
    try:
        env = gym.make(env_id, render_mode="rgb_array")
        env.reset(seed=0)
        env.render()
        env.close()
    except Exception as error:  # a missing package, driver or render mode, each with an exception of its own
        fail(f"--capture-video cannot render {env_id} ({first_line(error)})")


class ReplayBuffer:
    """Ring of transitions of `num_envs` environments on `device`, each observation stored once.

    A transition that starts at row p has its observations, actions, rewards and terminations there and its next
    observations in row p + 1. Where the episode of any environment ends, row p + 1 holds the final observations and
    row p + 2 those to go on from, so no transition starts at row p + 1. `starts` lists the rows where one does.
    """

    RINGS = ("observations", "actions", "rewards", "terminations", "starts")

    def __init__(self, size: int, num_envs: int, obs_dim: int, action_dim: int, device: torch.device):
        self.rows = size // num_envs + 1
        self.observations = torch.zeros(self.rows, num_envs, obs_dim, device=device)
        self.actions = torch.zeros(self.rows, num_envs, action_dim, device=device)
        self.rewards = torch.zeros(self.rows, num_envs, device=device)
        self.terminations = torch.zeros(self.rows, num_envs, device=device)
        self.starts = torch.zeros(self.rows, dtype=torch.long, device=device)  # itself a ring, oldest first
        # Counters on the host never wrap: row % rows and start % rows are the places in the two rings.
        self.row = self.num_starts = 0
        self.start_rows = deque()  # the rows in `starts` that are still whole
        # Which of them, from and up to, on the device: sampling takes nothing from the host, as a CUDA graph must not.
        self.span = torch.zeros(2, dtype=torch.long, device=device)

    def add(self, obs, actions, rewards, terminations, next_obs, dones) -> None:
        """Append one transition per environment; arrays have `num_envs` rows, `next_obs` is final where `dones`."""
        here, there = self.row % self.rows, (self.row + 1) % self.rows
        self.observations[here] = torch.from_numpy(obs)
        self.observations[there] = torch.from_numpy(next_obs)
        self.actions[here] = torch.from_numpy(actions)
        self.rewards[here] = torch.from_numpy(rewards)
        self.terminations[here] = torch.from_numpy(terminations)
        self.starts[self.num_starts % self.rows].fill_(here)
        self.start_rows.append(self.row)
        self.num_starts += 1
        self.skip(2 if dones.any() else 1)

    def skip(self, rows: int) -> None:
        """Move on by some rows: 1 after a step, 2 where an episode ends, so that no transition leads out of it."""
        self.row += rows
        # Row `self.row - self.rows` and older ones are, or will be at the next step, overwritten.
        while self.start_rows and self.start_rows[0] <= self.row - self.rows:
            self.start_rows.popleft()
        self.span[0].fill_(self.num_starts - len(self.start_rows))
        self.span[1].fill_(self.num_starts)

    def state_dict(self) -> dict:
        """The filled part of the rings, and the counters."""
        filled = min(self.row + 1, self.rows)
        # To the host, where there is room for it; and copied, for a view would be saved whole.
        rings = {name: getattr(self, name)[:filled].to("cpu", copy=True) for name in self.RINGS}
        counters = {"row": self.row, "num_starts": self.num_starts, "start_rows": torch.tensor(list(self.start_rows))}
        return rings | counters

    def load_state_dict(self, state: dict) -> None:
        """Take back what `state_dict` of a buffer of the same size returned."""
        for name in self.RINGS:
            getattr(self, name)[: len(state[name])] = state[name]
        self.row, self.num_starts = state["row"], state["num_starts"]
        self.start_rows = deque(state["start_rows"].tolist())
        self.skip(0)

    def sample(self, batch_size: int, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Draw transitions uniformly with replacement.

        Returns obs (B, obs_dim), actions (B, d), rewards (B,), terminations (B,) in {0, 1}, next_obs (B, obs_dim).
        """
        uniform = torch.rand(2, batch_size, dtype=torch.float64, device=self.span.device)
        start = self.span[0] + (uniform[0] * (self.span[1] - self.span[0])).long()
        row = self.starts[start % self.rows]
        env = (uniform[1] * self.observations.shape[1]).long()
        batch = (
            self.observations[row, env],
            self.actions[row, env],
            self.rewards[row, env],
            self.terminations[row, env],
            self.observations[(row + 1) % self.rows, env],
        )
        return tuple(x.to(device) for x in batch)


def make_buffer(args: Args, obs_dim: int, action_dim: int, device: torch.device) -> ReplayBuffer:
    """A replay buffer on `device` if it has room, otherwise on the host; fails where that has none either."""
    size = args.buffer_size * (4 * (obs_dim + action_dim + 2) + 8)  # bytes: float32, and one int64 in `starts`
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        fits = int(args.buffer_size * memory / size)
        fail(f"--buffer-size {args.buffer_size} needs {size / 2**30:.1f} GiB of {memory / 2**30:.1f}; {fits} would fit")
    has_room = device.type == "cpu" or size < 0.8 * torch.cuda.mem_get_info()[0]
    place = device if has_room else torch.device("cpu")
    print(f"Training on {device}; the replay buffer takes {size / 2**30:.2f} GiB on {place}")
    return ReplayBuffer(args.buffer_size, args.num_envs, obs_dim, action_dim, place)


class CudaGraph:
    """Calls `function`; on a GPU, if `enabled`, by replaying a CUDA graph of it: one launch instead of hundreds.

    The inputs' shapes must be the same in every call. A replay draws fresh random numbers, and overwrites what the
    one before returned: use or copy that first.
    """

    warmup = 3  # calls that are not recorded: libraries allocate, optimisers make their state

    def __init__(self, function, enabled: bool):
        self.function, self.enabled = function, enabled
        self.calls, self.graph = 0, None
        self.stream = torch.cuda.Stream() if enabled else None

    def __call__(self, *inputs: torch.Tensor):
        if not self.enabled:
            return self.function(*inputs)
        self.calls += 1
        if self.calls <= self.warmup:  # on a side stream, as recording will be
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if self.graph is None:
            self.graph, self.inputs = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.outputs = self.function(*self.inputs)
        for recorded, given in zip(self.inputs, inputs, strict=True):
            recorded.copy_(given)
        self.graph.replay()
        return self.outputs


def check_algorithm(args: Args) -> None:
    """The part of `check_args` that belongs to this algorithm."""
    require(args, "policy_lr q_lr", lambda x: 0 < x < math.inf, "positive and finite")


class SoftQNetwork(nn.Module):
    """Q(s, a) for obs (B, obs_dim) and actions (B, d) in [-1, 1]; returns (B,)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(obs_dim + action_dim, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1)
        )

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat([obs, actions], dim=-1)).squeeze(-1)


LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0


class Actor(nn.Module):
    """Mean and log standard deviation, each (B, d), of the Gaussian before the tanh."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(obs_dim, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        self.mean = nn.Linear(256, action_dim)
        self.log_std = nn.Linear(256, action_dim)

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.net(obs)
        log_std = torch.tanh(self.log_std(h))
        return self.mean(h), LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (log_std + 1)


def squashed_gaussian(mean: torch.Tensor, log_std: torch.Tensor, noise: torch.Tensor):
    """Reparameterised sample of tanh(N(mean, std^2)) and its log-density (SAC, appendix C); shapes (B, d) and (B,).

    log(1 - tanh(y)^2) is written 2 (log 2 - y - softplus(-2 y)), which is exact where 1 - tanh(y)^2 rounds to 0.
    """
    y = mean + log_std.exp() * noise
    log_prob = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
    log_prob = log_prob - 2 * (math.log(2) - y - F.softplus(-2 * y))
    return torch.tanh(y), log_prob.sum(-1)


def soft_td_target(rewards, terminations, next_q, next_log_prob, alpha, gamma) -> torch.Tensor:
    """r + gamma (1 - terminated) (Q'(s', a') - alpha log pi(a'|s')), all of shape (B,) (SAC 2018b, equation 6)."""
    return rewards + gamma * (1 - terminations) * (next_q - alpha * next_log_prob)


class Agent(nn.Module):
    """Networks, optimisers and one update of everything."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args, device: torch.device):
        super().__init__()
        self.args = args
        self.actor = Actor(obs_dim, action_dim)
        self.qf1, self.qf2 = SoftQNetwork(obs_dim, action_dim), SoftQNetwork(obs_dim, action_dim)
        self.qf1_target, self.qf2_target = copy.deepcopy(self.qf1), copy.deepcopy(self.qf2)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha)), requires_grad=args.autotune)
        self.target_entropy = -float(action_dim)
        self.to(device)
        self.q_parameters = [*self.qf1.parameters(), *self.qf2.parameters()]
        self.q_target_parameters = [*self.qf1_target.parameters(), *self.qf2_target.parameters()]
        adam = partial(torch.optim.Adam, fused=True, capturable=True)
        self.q_optimizer = adam(self.q_parameters, lr=args.q_lr)
        self.actor_optimizer = adam(self.actor.parameters(), lr=args.policy_lr)
        self.alpha_optimizer = adam([self.log_alpha], lr=args.q_lr)

    @torch.no_grad()
    def sample_actions(self, obs: torch.Tensor) -> torch.Tensor:
        """Actions (B, d) for training."""
        mean, log_std = self.actor(obs)
        return torch.tanh(mean + log_std.exp() * torch.randn_like(mean))

    @torch.no_grad()
    def eval_actions(self, obs: torch.Tensor) -> torch.Tensor:
        """Actions (B, d) for evaluation: the squashed mean."""
        return torch.tanh(self.actor(obs)[0])

    def update(self, obs, actions, rewards, terminations, next_obs, with_policy=True) -> dict[str, torch.Tensor]:
        """One step on the critics and, `with_policy`, on the policy; returns scalars for the log."""
        alpha = self.log_alpha.detach().exp()
        metrics = self.update_critics(obs, actions, rewards, terminations, next_obs, alpha)
        if with_policy:
            metrics |= self.update_policy(obs, alpha)
        # Detached: a loss that keeps its autograd graph alive ties the parameters to a stream and prevents CUDA graphs.
        return {name: value.detach() for name, value in metrics.items()}

    def update_critics(self, obs, actions, rewards, terminations, next_obs, alpha) -> dict[str, torch.Tensor]:
        """One step on the critics and their targets."""
        with torch.no_grad():
            mean, log_std = self.actor(next_obs)
            next_actions, next_log_prob = squashed_gaussian(mean, log_std, torch.randn_like(mean))
            next_q = torch.minimum(self.qf1_target(next_obs, next_actions), self.qf2_target(next_obs, next_actions))
            target = soft_td_target(rewards, terminations, next_q, next_log_prob, alpha, self.args.gamma)
        q1, q2 = self.qf1(obs, actions), self.qf2(obs, actions)
        qf1_loss, qf2_loss = F.mse_loss(q1, target), F.mse_loss(q2, target)
        self.q_optimizer.zero_grad()
        (qf1_loss + qf2_loss).backward()
        self.q_optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.q_target_parameters, self.q_parameters, self.args.tau)
        return {
            "losses/qf1_values": q1.mean(),
            "losses/qf2_values": q2.mean(),
            "losses/qf1_loss": qf1_loss,
            "losses/qf2_loss": qf2_loss,
            "losses/qf_loss": (qf1_loss + qf2_loss) / 2,
        }

    def update_policy(self, obs: torch.Tensor, alpha: torch.Tensor) -> dict[str, torch.Tensor]:
        """One step on the actor and on the temperature."""
        mean, log_std = self.actor(obs)
        pi, log_prob = squashed_gaussian(mean, log_std, torch.randn_like(mean))
        actor_loss = (alpha * log_prob - torch.minimum(self.qf1(obs, pi), self.qf2(obs, pi))).mean()
        self.actor_optimizer.zero_grad()
        actor_loss.backward(inputs=[*self.actor.parameters()])  # the critics only pass the gradient on
        self.actor_optimizer.step()

        entropy = -log_prob.detach().mean()
        metrics = {"losses/actor_loss": actor_loss, "losses/alpha": alpha, "diagnostics/entropy": entropy}
        if self.args.autotune:
            alpha_loss = self.log_alpha.exp() * (entropy - self.target_entropy)
            self.alpha_optimizer.zero_grad()
            alpha_loss.backward()
            self.alpha_optimizer.step()
            metrics["losses/alpha_loss"] = alpha_loss
        return metrics

    @torch.no_grad()
    def diagnostics(self, obs: torch.Tensor) -> dict[str, float]:
        """What is too costly for every update, at states (B, obs_dim): the policy's spread before the tanh."""
        return {"diagnostics/policy_std": self.actor(obs)[1].exp().mean().item()}

    def warnings(self, scalars: dict[str, float], num_updates: int) -> list[str]:
        """What the user should know of the last logged scalars; SAC has nothing to warn of."""
        return []


def evaluate(act, envs: list[gym.Env], seed: int, device: torch.device) -> np.ndarray:
    """Play one episode in each environment, all as one batch; returns the undiscounted returns (len(envs),).

    `act` maps observations (B, obs_dim) to actions (B, d), as `agent.eval_actions` and `agent.sample_actions` do. The
    result depends on the weights and `seed` alone; torch's random state, which training draws from, is left as it was.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        obs = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)])
        returns, running = np.zeros(len(envs)), set(range(len(envs)))
        while running:
            # All environments, finished ones too: a CUDA graph needs one shape.
            actions = act(torch.from_numpy(obs).to(device)).cpu().numpy()
            for i in tuple(running):
                obs[i], reward, terminated, truncated, _ = envs[i].step(actions[i])
                returns[i] += reward
                if terminated or truncated:
                    running.remove(i)
    return returns


def due(step: int, every: int, stride: int) -> bool:
    """Whether a multiple of `every` lies in (step - stride, step]; never when `every` is 0."""
    return every > 0 and step // every > (step - stride) // every


def load_file(path: str | Path, flag: str, **options) -> dict:
    """Read what this script saved, to the CPU; no code in it is run. Anything else ends the program with one line."""
    try:
        damaged = zipfile.ZipFile(path).testzip()  # torch.load does not look at the checksums
        if damaged:
            raise ValueError(f"{damaged} is damaged")
        saved = torch.load(path, map_location="cpu", weights_only=True, **options)
        if saved["script"] != Path(__file__).stem:
            raise ValueError(f"it was written by {saved['script']}.py")
        unknown = saved["args"].keys() ^ vars(Args()).keys()
        if unknown:
            raise ValueError(f"it was written by another version, which differs in {', '.join(sorted(unknown))}")
    except Exception as error:  # whatever is wrong with the file, the user must replace it
        fail(f"{flag}: {path} is not a file that {Path(__file__).name} saved ({first_line(error)})")
    return saved


def save_file(content: dict, path: Path) -> bool:
    """Write `content` so that a crash at any instant leaves either the old file or the new one; False if it failed."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # a full disk, mostly; torch reports some of it as RuntimeError
        temporary.unlink(missing_ok=True)
        tqdm.write(f"warning: {path} was not written ({first_line(error)}); an earlier one is as it was")
        return False
    return True


def evaluate_saved(args: Args, device: torch.device) -> None:
    """`--evaluate PATH`: load the weights in model.pt or checkpoint.pt and print the return that they reach."""
    saved = load_file(args.evaluate, "--evaluate")
    trained = Args(**saved["args"])
    if args.capture_video:
        check_video(trained.env_id)
    video_folder = f"{Path(args.evaluate).parent}/videos_evaluate" if args.capture_video else None
    envs = [make_env(trained.env_id, video_folder if i == 0 else None) for i in range(args.eval_episodes)]
    agent = Agent(envs[0].observation_space.shape[0], envs[0].action_space.shape[0], trained, device)
    agent.load_state_dict(saved["agent"])
    for name, act in (("evaluation", agent.eval_actions), ("exploring policy", agent.sample_actions)):
        returns = evaluate(act, envs, args.seed, device)
        print(f"{trained.env_id}: {name} return {returns.mean():.1f} +- {returns.std():.1f} ({len(returns)} episodes)")
    for env in envs:
        env.close()


def optimizers(agent: Agent) -> dict[str, torch.optim.Optimizer]:
    """The agent's optimisers by name."""
    return {name: value for name, value in vars(agent).items() if isinstance(value, torch.optim.Optimizer)}


def derive_seed(*key: int) -> int:
    """A seed below 2^31 for one purpose at one step, so that nothing depends on how many numbers were drawn before."""
    return int(np.random.SeedSequence(key).generate_state(1)[0]) >> 1


def restart(seed: int, envs: gym.vector.VectorEnv) -> np.ndarray:
    """Seed every random generator and begin new episodes; returns their first observations.

    Called at the start and at each checkpoint, by the run that goes on and by one resumed from it: so the two are the
    same, on a CPU bit for bit, whatever generators an environment keeps.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    envs.action_space.seed(seed)
    return envs.reset(seed=seed)[0]


def parse_args(line: list[str] | None = None) -> Args:
    """Parse the command line; with `--resume`, the defaults are the arguments of the run that goes on."""
    args = tyro.cli(Args, args=line)
    if args.resume is None:
        return args
    saved = load_file(Path(args.resume, "checkpoint.pt"), "--resume", mmap=True)
    args = tyro.cli(Args, args=line, default=Args(**saved["args"]))
    for name, before in saved["args"].items():
        now = getattr(args, name)
        if now != before and name not in ("resume", "total_timesteps"):
            fail(f"--{name.replace('_', '-')} {now} contradicts the run's {before}; leave it out or start a new run")
    if args.total_timesteps < saved["global_step"] + args.num_envs:
        fail(f"--total-timesteps {args.total_timesteps}: the run already has {saved['global_step']} steps; raise it")
    return args


def keep_freed_memory() -> None:
    """Make glibc keep freed memory, which it otherwise returns: the system zeroes each page that comes back.

    An update of MFPO then takes about a fifth less time, one of SMFP a tenth or more, one of SAC no less.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # None on other C libraries
    if mallopt:
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_mmap_threshold, 32 * 2**20)  # the largest value: beyond are the replay buffer's rings
        mallopt(m_trim_threshold, 2**31 - 1)


def choose_kernels(deterministic: bool) -> None:
    """Set PyTorch up for training, before it first computes."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS is not deterministic
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs a kernel per tensor; nothing here reads it
    torch.set_flush_denormal(True)  # Adam's averages for dead ReLUs end as denormals, which are slow on many a CPU
    warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")  # Adam's, outside a graph


def train(args: Args) -> None:
    """Train from scratch or from a checkpoint; everything that the run writes goes to one folder under runs/."""
    check_args(args)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if args.evaluate:
        return evaluate_saved(args, device)
    if args.capture_video:
        check_video(args.env_id)

    choose_kernels(args.torch_deterministic)
    envs = gym.vector.SyncVectorEnv([partial(make_env, args.env_id)] * args.num_envs, autoreset_mode="SameStep")
    obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    obs = restart(args.seed, envs)
    agent = Agent(obs_dim, action_dim, args, device)
    buffer = make_buffer(args, obs_dim, action_dim, device)

    start_step, num_updates, metrics = 0, 0, {}
    if args.resume:
        run = Path(args.resume)
        saved = load_file(run / "checkpoint.pt", "--resume")
        try:
            agent.load_state_dict(saved["agent"])
            for name, optimizer in optimizers(agent).items():
                optimizer.load_state_dict(saved["optimizers"][name])
            buffer.load_state_dict(saved["buffer"])
            start_step, num_updates = saved["global_step"], saved["num_updates"]
            metrics = {name: value.to(device) for name, value in saved["metrics"].items()}
        except (KeyError, RuntimeError, ValueError) as error:
            fail(f"--resume: {run}/checkpoint.pt is not of this task and network ({first_line(error)})")
        del saved  # the replay buffer is in it
        obs = restart(derive_seed(args.seed, start_step, 1), envs)
    else:
        env_name = args.env_id.replace("/", "-").replace(":", "-")
        run = Path("runs", f"{env_name}__{args.exp_name}__{args.seed}__{int(time.time())}")
        while True:  # another run of the same second has the name already
            try:
                run.mkdir(parents=True)
                break
            except FileExistsError:
                run = run.with_name(run.name + "x")

    video_folder = f"{run}/videos_from_{start_step}" if args.capture_video else None
    num_eval_envs = args.eval_episodes if args.eval_frequency else 0
    eval_envs = [make_env(args.env_id, video_folder if i == 0 else None) for i in range(num_eval_envs)]
    if args.track:
        import wandb

        wandb.init(
            project=args.wandb_project_name,
            entity=args.wandb_entity,
            sync_tensorboard=True,
            config=vars(args),
            name=run.name,
            id=run.name,
            resume="allow",
            save_code=True,
        )
    writer = SummaryWriter(str(run), purge_step=start_step + 1 if args.resume else None)
    if not args.resume:
        table = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
        writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
    # When TensorBoard's thread dies of a full disk, our next call to it says so.
    threading.excepthook = lambda hook: hook.exc_type is OSError or threading.__excepthook__(hook)

    @cache  # says it once
    def warn(message: str) -> None:
        tqdm.write(f"warning: {message}")

    def log(scalars: dict[str, float], step: int) -> None:
        try:
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)
            writer.flush()
        except OSError as error:  # a full disk, mostly; it costs the curves and not the run
            warn(f"TensorBoard cannot write ({error}); its rows are missing until the run is resumed")

    signals = []  # Ctrl-C and SIGTERM end the loop after the step at hand, with a checkpoint

    def on_signal(number, frame):
        signals.append(number)
        for each in handlers:
            signal.signal(each, signal.SIG_DFL)  # the second one stops at once
        tqdm.write("stopping with a checkpoint; once more to stop at once")

    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}

    graphed = args.cuda_graph and device.type == "cuda"
    # From a buffer on the host, sampling copies, which no graph can record: it is then left out.
    with_sampling = graphed and buffer.observations.is_cuda
    learn = {x: CudaGraph(partial(agent.update, with_policy=x), graphed and not with_sampling) for x in (False, True)}

    def update(with_policy: bool):
        batch = buffer.sample(args.batch_size, device)
        return batch, learn[with_policy](*batch)

    updates = {x: CudaGraph(partial(update, x), with_sampling) for x in (False, True)}
    act = CudaGraph(agent.sample_actions, graphed)
    policies = {"eval": agent.eval_actions, "eval_exploring": agent.sample_actions}
    players = {tag: CudaGraph(policy, graphed) for tag, policy in policies.items()}  # of `eval_episodes` rows

    restart_step = start_step  # when all environments began new episodes together
    safe_step = start_step if args.resume else None  # of the checkpoint on the disk
    batch = ending = None
    start_time, last_return = time.time(), math.nan
    progress = tqdm(total=args.total_timesteps, initial=start_step, unit="step", mininterval=1.0, disable=None)
    last_step = args.total_timesteps - args.total_timesteps % args.num_envs
    try:
        for global_step in range(start_step + args.num_envs, last_step + 1, args.num_envs):
            if global_step <= args.learning_starts:
                actions = envs.action_space.sample()
            else:
                actions = act(torch.from_numpy(obs).to(device)).cpu().numpy()

            # The update is launched before the environment steps: on a GPU the two then overlap.
            while num_updates < int((global_step - args.learning_starts) * args.utd_ratio):
                num_updates += 1
                with_policy = num_updates % args.policy_frequency == 0
                batch, losses = updates[with_policy]()
                metrics |= losses

            next_obs, rewards, terminations, truncations, infos = envs.step(actions)
            dones = terminations | truncations
            final_obs = next_obs.copy()  # next_obs is already the next episode's first one where an episode ended
            for i in np.flatnonzero(dones):
                final_obs[i] = infos["final_obs"][i]
                episode = infos["final_info"]["episode"]
                last_return = episode["r"][i]
                log({"charts/episodic_return": last_return, "charts/episodic_length": episode["l"][i]}, global_step)
            buffer.add(obs, actions, rewards, terminations, final_obs, dones)
            progress.update(args.num_envs)

            if metrics:  # looked at in every step, to stop where a fault arises; the next action waits for them anyway
                scalars = dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))
                for name, value in scalars.items():
                    if not math.isfinite(value):
                        raise FloatingPointError(f"{name} is {value}")
                if due(global_step, args.log_frequency, args.num_envs):
                    sps = (global_step - start_step) / (time.time() - start_time)
                    log(scalars | {"charts/SPS": sps}, global_step)
                    progress.set_postfix_str(f"return {last_return:.1f}", refresh=False)
                    for message in agent.warnings(scalars, num_updates):
                        warn(message)
                if due(global_step, args.diagnostics_frequency, args.num_envs):
                    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # training's stays as it is
                        torch.manual_seed(derive_seed(args.seed, global_step, 2))
                        log(agent.diagnostics(buffer.sample(64, device)[0]), global_step)
            if due(global_step, args.eval_frequency, args.num_envs):
                for tag, play in players.items():
                    returns = evaluate(play, eval_envs, derive_seed(args.seed, global_step, 0), device)
                    mean, std = returns.mean(), returns.std()
                    log({f"{tag}/episodic_return": mean, f"{tag}/episodic_return_std": std}, global_step)
                    tqdm.write(f"step {global_step}: {tag} return {mean:.1f} +- {std:.1f}")
            obs = next_obs

            # A checkpoint begins new episodes, so it waits for the running ones to end, but at most as long again.
            since, every = (global_step - restart_step) // args.num_envs, args.checkpoint_frequency
            checkpoint_due = 0 < every <= since and (dones.all() or since >= 2 * every)
            if checkpoint_due or signals or global_step == last_step:
                if not all(x.isfinite().all() for x in agent.state_dict().values()):
                    raise FloatingPointError("a network's weight is not finite")
                buffer.skip(1)  # the next row begins an episode
                saved = {
                    "script": Path(__file__).stem,
                    "args": vars(args) | {"resume": None},
                    "global_step": global_step,
                    "num_updates": num_updates,
                    "metrics": metrics,
                    "agent": agent.state_dict(),
                    "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers(agent).items()},
                    "buffer": buffer.state_dict(),
                }
                if save_file(saved, run / "checkpoint.pt"):
                    safe_step = global_step
                del saved["buffer"]  # a copy of all that is in it
                restart_step = global_step
                obs = restart(derive_seed(args.seed, global_step, 1), envs)
                if signals and global_step < last_step:
                    ending, exit_code = f"stopped at step {global_step}", 128 + signals[0]
                    break
    except (EnvError, FloatingPointError) as error:
        evidence = {"error": str(error), "global_step": global_step, "obs": torch.from_numpy(obs), "batch": batch}
        save_file(evidence | {"actions": torch.from_numpy(actions)}, run / "fault.pt")
        ending = f"error: {error}, at step {global_step} (seed {args.seed}); what led there is in {run}/fault.pt"
        exit_code = 1
    progress.close()
    threading.excepthook = threading.__excepthook__
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for env in (envs, *eval_envs):
        env.close()
    if ending:
        again = f"python {Path(__file__).name} --resume {run}"
        print(f"{ending}; " + ("there is no checkpoint" if safe_step is None else f"from step {safe_step}: {again}"))
        sys.exit(exit_code)
    if args.save_model:
        save_file({name: saved[name] for name in ("script", "args", "agent")}, run / "model.pt")
    print(f"The run's files are in {run}")


if __name__ == "__main__":
    keep_freed_memory()
    try:
        train(parse_args())
    except EnvError as error:  # before the run, or with --evaluate
        fail(f"the environment cannot be used: {error}")
