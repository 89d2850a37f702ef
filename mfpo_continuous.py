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
"""Mean Flow Policy Optimization (MFPO): maximum-entropy RL with a two-step MeanFlow policy.

Paper: https://arxiv.org/abs/2604.14698. MeanFlow itself: https://arxiv.org/abs/2505.13447.

    python mfpo_continuous.py --env-id Hopper-v4 --seed 1
    python mfpo_continuous.py --env-id HalfCheetah-v4 --no-clipped-double-q --save-model
    python mfpo_continuous.py --evaluate runs/<run>/model.pt --eval-episodes 20

Flow time runs from t = 0 (action) to t = 1 (noise): x_t = (1 - t) a_0 + t eps with velocity v = (x_t - a_0) / t.
    policy      a_{t-1/T} = a_t - (1/T) u(s, a_t, t - 1/T, t) from a_1 ~ N(0, I); u is the average velocity on [r, t]
    likelihood  log pi(a_0|s) = log N(a_1; 0, I) + (1/T) sum_t delta(s, a_t, t - 1/T, t), over the same T steps
    identity    u(x_t, r, t) = v(x_t, t) - (t - r) d/dt u(x_t, r, t);  delta obeys it with div v in the place of v
    target      v = the marginal velocity of exp(Q / alpha) / Z, by self-normalised importance sampling (SNIS) from the
                policy and from a Gaussian, the two estimates weighted by their effective sample sizes (ESS)

In TensorBoard: eval/episodic_return is the score (best of 10 candidates); diagnostics/ess_* falling to 1 means that the
temperature is too low for the proposals; diagnostics/entropy should approach -rho d when the temperature is learned;
diagnostics/edge_mass should stay under 0.01, or the critics' support is too narrow for the task. diagnostics/q_std, the
spread of the returns that the critics predict, starts at 900 and falls by a factor e in 1 / (tau (1 - gamma)) = 20,000
updates, sooner where episodes terminate; until then rewards far below the atoms' distance, 32, teach little. Critics
that start with a narrow distribution (--critic-init-std 32) or a support of the task's scale (--v-min, --v-max) take
off sooner.
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
from typing import Literal

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
    learning_starts: int = 10_000
    """uniformly random steps before the first update (paper)"""
    learning_rate: float = 3e-4
    """Adam's learning rate for every network and the temperature (paper)"""
    sampling_steps: int = 2
    """T, the sampler's steps from noise to action (paper)"""
    meanflow: bool = True
    """learn average velocities; otherwise plain flow matching: r = t (`data_proportion` 1) in training and sampler"""
    likelihood: Literal["adn", "exact", "none"] = "adn"
    """log pi by the average divergence network (paper), by the sampler's exact change of variables (d forward-mode
    products), or left out everywhere, which needs --no-autotune (paper's ablation)"""
    proposals: Literal["both", "policy", "gaussian"] = "both"
    """which proposals estimate the velocity (paper: both, the others are its ablations); all are drawn in any case"""
    policy_proposals: int = 16
    """K1, actions of the policy per state in the velocity estimate (paper)"""
    gaussian_proposals: int = 32
    """K2, actions of the truncated Gaussian per state in the velocity estimate (paper)"""
    divergence_probes: int = 2
    """N, normal probes of the Skilling-Hutchinson divergence estimate (paper)"""
    data_proportion: float = 0.75
    """share of the batch trained at r = t, that is on the instantaneous velocity (paper)"""
    time_distribution: Literal["logit_normal", "uniform"] = "logit_normal"
    """of t and r: logit-normal(-0.4, 1) (paper), or uniform, which trains the ends of [0, 1] more often"""
    clipped_double_q: bool = True
    """use the critic with the smaller mean; otherwise average the two (paper: off on HalfCheetah)"""
    num_atoms: int = 101
    """atoms of the critics' categorical distributions (paper)"""
    v_min: float = -1600.0
    """smallest atom (paper)"""
    v_max: float = 1600.0
    """largest atom (paper)"""
    critic_init_std: float | None = None
    """standard deviation about 0 of the return that new critics predict, from the atoms' distance to a tenth of the
    support's width (outside, it comes out smaller); if not given, all atoms are about as likely (paper); one atom's
    width takes off sooner, measured on two tasks"""
    policy_frequency: int = 1
    """updates of the critics per update of the policy, the divergence network and the temperature"""
    autotune: bool = True
    """learn the temperature; otherwise it stays at `alpha`"""
    alpha: float = 0.01
    """the temperature, or its first value when it is learned (paper)"""
    rho: float = 0.5
    """the target entropy is -rho d for d action dimensions (paper)"""
    eval_candidates: int = 10
    """evaluation plays the best of this many sampled actions, by the target critics; 1 plays a plain sample (paper)"""
    compile: bool = False
    """compile the update by torch.compile, which needs a C++ compiler and a minute or two; on a CPU it then takes about
    a quarter less time, on a GPU that is unmeasured"""


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
    counts = "sampling_steps policy_proposals gaussian_proposals divergence_probes eval_candidates"
    require(args, counts, lambda x: x >= 1, "at least 1")
    require(args, "num_atoms", lambda x: x >= 2, "at least 2")
    require(args, "learning_rate", lambda x: 0 < x < math.inf, "positive and finite")
    require(args, "data_proportion", lambda x: 0 <= x < 1, "in [0, 1); for plain flow matching: --no-meanflow")
    require(args, "rho v_min v_max", math.isfinite, "finite")
    require(args, "critic_init_std", lambda x: x is None or 1e-6 <= x < math.inf, "at least 1e-6 and finite")
    if args.v_min >= args.v_max:
        fail(f"--v-min {args.v_min} must be below --v-max {args.v_max}")
    if args.likelihood == "none" and args.autotune:
        fail("--likelihood none has no entropy to tune the temperature by; add --no-autotune and choose --alpha")
    if args.compile:
        try:
            torch.compile(torch.sin, fullgraph=True)(torch.zeros(8))
        except Exception as error:  # no compiler, or one that does not work
            fail(
                f"--compile: PyTorch finds no working C++ compiler ({first_line(error)}); install one, or leave it out"
            )


class ConcatLinear(nn.Linear):
    """nn.Linear on the concatenation of inputs that broadcast against each other, without forming it.

    What all candidates of a state share is multiplied once, not for each: a fifth of an update's time at 376
    observations, none at 11. The largest input comes last: then only one sum is of its size.
    """

    def __init__(self, in_features: tuple[int, ...], out_features: int):
        super().__init__(sum(in_features), out_features)
        self.sizes = in_features

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        products = [F.linear(x, w) for x, w in zip(inputs, self.weight.split(self.sizes, dim=1), strict=True)]
        return sum(products[1:], products[0] + self.bias)


class Linear(nn.Linear):
    """nn.Linear; compiled, the bias is added by what comes next, and not copied into every row of the product first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return F.linear(x, self.weight) + self.bias
        return super().forward(x)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm; compiled, in a form that fuses well, and whose forward-mode derivative PyTorch 2.13 can compile.

    Eagerly that form is slower.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            x = x - x.mean(-1, keepdim=True)
            return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight + self.bias
        return super().forward(x)


class MLP(nn.Module):
    """Three hidden layers of 256 with LayerNorm and GELU on the concatenation of its inputs (paper, appendix)."""

    def __init__(self, in_features: tuple[int, ...], out_features: int):
        super().__init__()
        self.first = ConcatLinear(in_features, 256)
        layers = [LayerNorm(256, eps=1e-6), nn.GELU()]
        for _ in range(2):
            layers += [Linear(256, 256), LayerNorm(256, eps=1e-6), nn.GELU()]
        self.rest = nn.Sequential(*layers, Linear(256, out_features))

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.rest(self.first(*inputs))


class TimeEmbedding(nn.Module):
    """Learnable Fourier features of a time in [0, 1] and a small MLP: (..., 1) to (..., 64)."""

    def __init__(self):
        super().__init__()
        self.frequencies = nn.Parameter(0.2 * torch.randn(64))
        self.mlp = nn.Sequential(Linear(128, 64), nn.GELU(), Linear(64, 64))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        phase = 2 * math.pi * t * self.frequencies
        return self.mlp(torch.cat([phase.cos(), phase.sin()], dim=-1))


class MeanFlowNetwork(nn.Module):
    """An average over the flow interval [r, t]: the policy's velocity u (out_dim = d) or its divergence delta (1).

    obs (..., obs_dim), x (..., d), r and t (..., 1) broadcast against each other; at r = t the average is the
    instantaneous value.
    """

    def __init__(self, obs_dim: int, action_dim: int, out_dim: int):
        super().__init__()
        self.embed_t, self.embed_interval = TimeEmbedding(), TimeEmbedding()
        self.mlp = MLP((obs_dim, 64, action_dim), out_dim)

    def forward(self, obs: torch.Tensor, x: torch.Tensor, r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.mlp(obs, self.embed_t(t) + self.embed_interval(t - r), x)


def xavier_uniform(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every linear layer (paper)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def sample_flow(actor, obs: torch.Tensor, noise: torch.Tensor, steps: int, meanflow: bool = True):
    """The T-step MeanFlow sampler: a_{t-1/T} = a_t - (1/T) u(s, a_t, t - 1/T, t) from a_1 = noise.

    Without `meanflow`, Euler's method on the instantaneous velocity u(s, a_t, t, t). obs (..., obs_dim) broadcasts
    against noise (..., d). Returns the action a_0 before clipping (..., d) and the trajectory, a list of the
    (a_t, r, t) that `actor` was asked at.
    """
    x, trajectory = noise, []
    for i in range(steps, 0, -1):
        t, r = (torch.full((1,), j / steps, device=noise.device) for j in (i, i - 1 if meanflow else i))
        trajectory.append((x, r, t))
        x = x - actor(obs, x, r, t) / steps
    return x, trajectory


def standard_normal_log_prob(x: torch.Tensor) -> torch.Tensor:
    """log N(x; 0, I) of x (..., d)."""
    return -0.5 * (x**2 + math.log(2 * math.pi)).sum(-1)


def flow_log_prob(divergence, obs: torch.Tensor, trajectory) -> torch.Tensor:
    """log pi(a_0|s) = log N(a_1; 0, I) + (1/T) sum_t delta(s, a_t, t - 1/T, t) over the sampler's T steps; (...)."""
    log_prob = standard_normal_log_prob(trajectory[0][0])
    return log_prob + sum(divergence(obs, x, r, t).squeeze(-1) for x, r, t in trajectory) / len(trajectory)


def exact_log_prob(sampler, noise: torch.Tensor) -> torch.Tensor:
    """log pi(a_0|s) = log N(a_1; 0, I) - log |det d a_0 / d a_1| of the map `sampler` from noise (..., d) to actions.

    The change of variables of the T-step map itself: d forward-mode products and a determinant per row; shape (...).
    A lower bound where the map folds, so that other noises reach the same action.
    """
    basis = torch.eye(noise.shape[-1], dtype=noise.dtype, device=noise.device)
    columns = [torch.func.jvp(sampler, (noise,), (e.expand_as(noise).clone(),))[1] for e in basis]
    return standard_normal_log_prob(noise) - torch.linalg.slogdet(torch.stack(columns, -1)).logabsdet


def sample_times(batch_size: int, data_proportion: float, distribution: str, device: torch.device):
    """Interval ends t >= r, each (B, 1); the first `data_proportion` of the batch has r = t."""
    if distribution == "logit_normal":
        times = torch.sigmoid(torch.randn(2, batch_size, 1, device=device) - 0.4)
    else:
        times = torch.rand(2, batch_size, 1, device=device).clamp(1e-3, 1 - 1e-3)  # the proposals divide by t and 1 - t
    t, r = times.amax(0), times.amin(0)
    n = int(batch_size * data_proportion)
    return t, torch.cat([t[:n], r[n:]])


def meanflow_loss(average, x_t, r, t, velocity, instantaneous) -> torch.Tensor:
    """Squared error, summed over d, of a network against its MeanFlow target (MeanFlow, equations 6 and 9); (B,).

    The target is instantaneous - (t - r) d/dt average(x_t, r, t), with no gradient. `average(x, r, t)` is the network;
    the total derivative runs along dx/dt = `velocity` (B, d), r held fixed. `instantaneous` is what `average` averages:
    the velocity itself for u, its divergence (B, 1) for delta.
    """
    with torch.no_grad():
        tangents = (velocity, torch.zeros_like(r), torch.ones_like(t))
        _, derivative = torch.func.jvp(average, (x_t, r, t), tangents)
        target = instantaneous - (t - r) * derivative
    return ((average(x_t, r, t) - target) ** 2).sum(-1)


def hutchinson_divergence(field, x: torch.Tensor, probes: torch.Tensor):
    """Value of a vector field at x (B, d) and the Skilling-Hutchinson estimate (B, 1) of its divergence.

    That is the mean over the probes e (N, B, d), of zero mean and unit covariance, of e . (J e). One forward-mode
    product serves all of them, so `field` takes (N, B, d).
    """
    values, products = torch.func.jvp(field, (x.expand_as(probes).clone(),), (probes,))
    return values[0], (probes * products).sum(-1, keepdim=True).mean(0)


def truncated_normal(mean: torch.Tensor, std: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """N(mean, std^2) truncated to [-1, 1], by inverting its distribution function at `uniform` in (0, 1).

    In float64, and reflected so that the mean is not negative: a box far from it then lies in the lower tail, where
    the distribution function keeps its relative precision. Returns float32.
    """
    mean, std = mean.double(), std.double()
    sign = torch.where(mean < 0, -1.0, 1.0)
    low, high = (0.5 * torch.erfc((mean.abs() - bound) / (std * math.sqrt(2))) for bound in (-1.0, 1.0))
    cdf = (low + uniform * (high - low)).clamp(min=1e-300)  # farther out than 37 std all mass is at the near face
    return (sign * (mean.abs() + std * torch.special.ndtri(cdf)).clamp(-1, 1)).float()


def policy_log_weights(q, log_prob, x_t, actions, t, alpha) -> torch.Tensor:
    """log of exp(Q / alpha) N(x_t; (1 - t) a_k, t^2 I) / pi(a_k|s), up to a constant, for a_k ~ pi; shape (B, K).

    q and log_prob (B, K), x_t (B, d), actions (B, K, d), t (B, 1).
    """
    squared_distance = ((x_t[:, None] - (1 - t[:, None]) * actions) ** 2).sum(-1)
    return q / alpha - squared_distance / (2 * t**2) - log_prob


def snis_velocity(log_weights: torch.Tensor, x_t: torch.Tensor, actions: torch.Tensor, t: torch.Tensor):
    """Self-normalised importance sampling of the marginal velocity E[(x_t - a_0) / t | x_t].

    log_weights (B, K), x_t (B, d), actions (B, K, d), t (B, 1). Returns the velocity (B, d) and the effective sample
    size 1 / sum_k w_k^2 (B, 1), between 1 and K.
    """
    weights = log_weights.softmax(-1)
    velocity = (x_t - (weights[..., None] * actions).sum(1)) / t
    return velocity, 1 / (weights**2).sum(-1, keepdim=True)


def project_categorical(probs: torch.Tensor, atoms: torch.Tensor, v_min: float, v_max: float) -> torch.Tensor:
    """C51's projection of the masses `probs` at `atoms`, both (B, N), onto N evenly spaced atoms in [v_min, v_max].

    Each mass is clipped to the support and split between its two neighbours, which keeps the total and, where nothing
    is clipped, the mean.
    """
    last = probs.shape[-1] - 1
    place = ((atoms - v_min) / (v_max - v_min) * last).clamp(0, last)
    below = place.nan_to_num(0).floor()  # nan is no index; it stays in `share`, and so in the loss
    share = place - below
    projected = torch.zeros_like(probs).scatter_add_(-1, below.long(), probs * (1 - share))
    return projected.scatter_add_(-1, (below.long() + 1).clamp(max=last), probs * share)


class Agent(nn.Module):
    """Networks, optimisers and one update of everything."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args, device: torch.device):
        super().__init__()
        self.args, self.action_dim = args, action_dim
        self.data_proportion = args.data_proportion if args.meanflow else 1.0
        self.actor = MeanFlowNetwork(obs_dim, action_dim, action_dim)
        self.divergence = MeanFlowNetwork(obs_dim, action_dim, 1)
        self.qf1, self.qf2 = (MLP((obs_dim, action_dim), args.num_atoms) for _ in range(2))
        self.apply(xavier_uniform)
        self.register_buffer("atoms", torch.linspace(args.v_min, args.v_max, args.num_atoms))
        if args.critic_init_std is not None:
            for output in (self.qf1.rest[-1], self.qf2.rest[-1]):
                nn.init.zeros_(output.weight)
                output.bias.data = -2 * torch.log1p((self.atoms / args.critic_init_std) ** 2)  # Student's t, 3 d.o.f.
        self.qf1_target, self.qf2_target = copy.deepcopy(self.qf1), copy.deepcopy(self.qf2)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha)), requires_grad=args.autotune)
        self.target_entropy = -args.rho * action_dim
        self.to(device)
        if args.likelihood == "exact" and action_dim > 16 and device.type == "cuda":
            # For determinants of this size PyTorch prefers MAGMA, which waits for the GPU: no CUDA graph records that.
            torch.backends.cuda.preferred_linalg_library("cusolver")
        self.q_parameters = [*self.qf1.parameters(), *self.qf2.parameters()]
        self.q_target_parameters = [*self.qf1_target.parameters(), *self.qf2_target.parameters()]
        adam = partial(torch.optim.Adam, lr=args.learning_rate, fused=True, capturable=True)
        self.q_optimizer, self.actor_optimizer = adam(self.q_parameters), adam(self.actor.parameters())
        self.divergence_optimizer, self.alpha_optimizer = adam(self.divergence.parameters()), adam([self.log_alpha])
        if args.compile:  # for these shapes alone, and with the random numbers of the eager update
            self.update = torch.compile(self.update, dynamic=False, options={"fallback_random": True})

    def q_value(self, qf1: MLP, qf2: MLP, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Mean of the critics' distributions: their minimum, or their average without clipped double Q."""
        q1, q2 = (qf(obs, actions).softmax(-1) @ self.atoms for qf in (qf1, qf2))
        return torch.minimum(q1, q2) if self.args.clipped_double_q else (q1 + q2) / 2

    def sampler(self, obs: torch.Tensor, noise: torch.Tensor):
        """`sample_flow` of the policy."""
        return sample_flow(self.actor, obs, noise, self.args.sampling_steps, self.args.meanflow)

    def sample_with_log_prob(self, obs: torch.Tensor, noise: torch.Tensor):
        """Actions before clipping (..., d) and log pi (...), by the likelihood in use; 0 where that is none."""
        actions, trajectory = self.sampler(obs, noise)
        if self.args.likelihood == "adn":
            return actions, flow_log_prob(self.divergence, obs, trajectory)
        if self.args.likelihood == "exact":
            return actions, exact_log_prob(lambda noise: self.sampler(obs, noise)[0], noise)
        return actions, torch.zeros_like(actions[..., 0])

    @torch.no_grad()
    def sample_actions(self, obs: torch.Tensor, candidates: int = 1) -> torch.Tensor:
        """The actions (B, d) for training, or the best of some candidates by the target critics."""
        noise = torch.randn(len(obs), candidates, self.action_dim, device=obs.device)
        obs = obs[:, None]  # (B, 1, obs_dim)
        actions = self.sampler(obs, noise)[0].clamp(-1, 1)  # (B, candidates, d)
        if candidates == 1:
            return actions[:, 0]
        best = self.q_value(self.qf1_target, self.qf2_target, obs, actions).argmax(1)
        return actions[torch.arange(len(actions), device=obs.device), best]

    def eval_actions(self, obs: torch.Tensor) -> torch.Tensor:
        """Actions (B, d) for evaluation."""
        return self.sample_actions(obs, self.args.eval_candidates)

    def update(self, obs, actions, rewards, terminations, next_obs, with_policy=True) -> dict[str, torch.Tensor]:
        """One step on the critics and, `with_policy`, on policy, average divergence and temperature; scalars to log."""
        alpha = self.log_alpha.detach().exp()
        metrics = self.update_critics(obs, actions, rewards, terminations, next_obs, alpha)
        if with_policy:
            metrics |= self.update_policy(obs, alpha)
        # Detached: a loss that keeps its autograd graph alive ties the parameters to a stream and prevents CUDA graphs.
        return {name: value.detach() for name, value in metrics.items()}

    def update_critics(self, obs, actions, rewards, terminations, next_obs, alpha) -> dict[str, torch.Tensor]:
        """One step on the critics, with a' from the current policy (there is no target actor), and on their targets."""
        args = self.args
        with torch.no_grad():
            noise = torch.randn(len(obs), self.action_dim, device=obs.device)
            a_next, next_log_prob = self.sample_with_log_prob(next_obs, noise)
            a_next = a_next.clamp(-1, 1)
            soft_atoms = self.atoms - (alpha * next_log_prob)[:, None]  # (B, N)
            atoms = rewards[:, None] + args.gamma * (1 - terminations)[:, None] * soft_atoms
            probs1, probs2 = (
                project_categorical(qf(next_obs, a_next).softmax(-1), atoms, args.v_min, args.v_max)
                for qf in (self.qf1_target, self.qf2_target)
            )
            if args.clipped_double_q:
                target_probs = torch.where((probs1 @ self.atoms < probs2 @ self.atoms)[:, None], probs1, probs2)
            else:
                target_probs = (probs1 + probs2) / 2
        logits1, logits2 = self.qf1(obs, actions), self.qf2(obs, actions)
        qf1_loss, qf2_loss = F.cross_entropy(logits1, target_probs), F.cross_entropy(logits2, target_probs)
        self.q_optimizer.zero_grad()
        (qf1_loss + qf2_loss).backward()
        self.q_optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.q_target_parameters, self.q_parameters, args.tau)
            q_probs = torch.stack([logits1, logits2]).softmax(-1)
            q_values = q_probs @ self.atoms  # (2, B)
            q_variance = (q_probs * (self.atoms - q_values[..., None]) ** 2).sum(-1)
        return {
            "losses/qf1_values": q_values[0].mean(),
            "losses/qf2_values": q_values[1].mean(),
            "losses/qf1_loss": qf1_loss,
            "losses/qf2_loss": qf2_loss,
            "losses/qf_loss": (qf1_loss + qf2_loss) / 2,
            "diagnostics/q_std": q_variance.sqrt().mean(),
            "diagnostics/edge_mass": (q_probs[..., 0] + q_probs[..., -1]).mean(),
        }

    def update_policy(self, obs: torch.Tensor, alpha: torch.Tensor) -> dict[str, torch.Tensor]:
        """One step on the policy, regressed on the Boltzmann policy's velocity; then on divergence and temperature."""
        t, r = sample_times(len(obs), self.data_proportion, self.args.time_distribution, obs.device)
        x_t, velocity, a_0, log_prob, ess_policy, ess_gaussian, policy_weight = self.estimate_velocity(obs, t, alpha)
        actor_loss = meanflow_loss(partial(self.actor, obs), x_t, r, t, velocity, velocity).mean()
        self.actor_optimizer.zero_grad()
        actor_loss.backward()
        self.actor_optimizer.step()

        metrics = {
            "losses/actor_loss": actor_loss,
            "losses/alpha": alpha,
            "diagnostics/ess_policy": ess_policy.mean(),
            "diagnostics/ess_gaussian": ess_gaussian.mean(),
            "diagnostics/policy_proposal_weight": policy_weight.mean(),
            "diagnostics/clipped_fraction": (a_0.abs() == 1).float().mean(),
        }
        entropy = -log_prob.mean()
        if self.args.likelihood != "none":
            metrics["diagnostics/entropy"] = entropy
        if self.args.likelihood == "adn":
            metrics["losses/divergence_loss"] = self.update_divergence(obs, a_0)
        if self.args.autotune:
            alpha_loss = self.log_alpha.exp() * (entropy - self.target_entropy)
            self.alpha_optimizer.zero_grad()
            alpha_loss.backward()
            self.alpha_optimizer.step()
            metrics["losses/alpha_loss"] = alpha_loss
        return metrics

    @torch.no_grad()
    def estimate_velocity(self, obs: torch.Tensor, t: torch.Tensor, alpha: torch.Tensor):
        """The Boltzmann policy's marginal velocity at a noised policy sample, from both proposals (paper, section 4).

        Returns x_t (B, d), the velocity (B, d), the first policy proposal a_0 (B, d), log pi (B, K1) for the
        temperature and, for the log, the two ESS and the weight of the policy proposal (B, 1).
        """
        batch_size, d, args = len(obs), self.action_dim, self.args
        obs = obs[:, None]  # (B, 1, obs_dim)
        noise = torch.randn(batch_size, args.policy_proposals, d, device=obs.device)
        from_policy, log_prob = self.sample_with_log_prob(obs, noise)  # (B, K1, d) and (B, K1)
        from_policy = from_policy.clamp(-1, 1)
        a_0 = from_policy[:, 0]
        x_t = (1 - t) * a_0 + t * torch.randn_like(a_0)
        uniform = torch.rand(batch_size, args.gaussian_proposals, d, dtype=torch.float64, device=obs.device)
        # N(x_t; (1 - t) a, t^2 I) as a density of a, within the box: what is left for the weights is exp(Q / alpha).
        from_gaussian = truncated_normal((x_t / (1 - t))[:, None], (t / (1 - t))[:, None], uniform)  # (B, K2, d)

        q = self.q_value(self.qf1, self.qf2, obs, torch.cat([from_policy, from_gaussian], 1))
        q_policy, q_gaussian = q.split([args.policy_proposals, args.gaussian_proposals], 1)
        log_weights = policy_log_weights(q_policy, log_prob, x_t, from_policy, t, alpha)
        v_policy, ess_policy = snis_velocity(log_weights, x_t, from_policy, t)
        v_gaussian, ess_gaussian = snis_velocity(q_gaussian / alpha, x_t, from_gaussian, t)
        policy_weight = ess_policy / (ess_policy + ess_gaussian)  # (B, 1)
        if args.proposals != "both":
            policy_weight = torch.full_like(policy_weight, float(args.proposals == "policy"))
        velocity = policy_weight * v_policy + (1 - policy_weight) * v_gaussian
        return x_t, velocity, a_0, log_prob, ess_policy, ess_gaussian, policy_weight

    def update_divergence(self, obs: torch.Tensor, a_0: torch.Tensor) -> torch.Tensor:
        """One step on the average divergence network, towards the policy as it is now; returns the loss."""
        t, r = sample_times(len(obs), self.data_proportion, self.args.time_distribution, obs.device)
        with torch.no_grad():
            x_t = (1 - t) * a_0 + t * torch.randn_like(a_0)
            probes = torch.randn(self.args.divergence_probes, *a_0.shape, device=obs.device)
            velocity, divergence = hutchinson_divergence(lambda x: self.actor(obs, x, t, t), x_t, probes)
        loss = meanflow_loss(partial(self.divergence, obs), x_t, r, t, velocity, divergence).mean()
        self.divergence_optimizer.zero_grad()
        loss.backward()
        self.divergence_optimizer.step()
        return loss

    @torch.no_grad()
    def diagnostics(self, obs: torch.Tensor) -> dict[str, float]:
        """What is too costly for every update, at states (B, obs_dim).

        The error of the network's log pi against the exact one, in nats; how far the sampler's actions are from those
        of the instantaneous field that it averages (64 Euler steps from the same noise); and how much Q tells random
        actions of a state apart, which against alpha says how peaked the Boltzmann policy is.
        """
        noise = torch.randn(len(obs), self.action_dim, device=obs.device)
        actions, trajectory = self.sampler(obs, noise)
        gap = actions - sample_flow(self.actor, obs, noise, 64, meanflow=False)[0]
        random_actions = 2 * torch.rand(len(obs), 64, self.action_dim, device=obs.device) - 1
        q = self.q_value(self.qf1, self.qf2, obs[:, None], random_actions)  # (B, 64)
        scalars = {
            "diagnostics/flow_gap": gap.norm(dim=-1).mean().item(),
            "diagnostics/q_action_std": q.std(1).mean().item(),
        }
        if self.args.likelihood == "adn":
            exact = exact_log_prob(lambda noise: self.sampler(obs, noise)[0], noise)
            error = flow_log_prob(self.divergence, obs, trajectory) - exact
            scalars["diagnostics/adn_log_prob_error"] = error.abs().mean().item()
            scalars["diagnostics/adn_log_prob_bias"] = error.mean().item()
        return scalars

    def warnings(self, scalars: dict[str, float], num_updates: int) -> list[str]:
        """What the user should know of the last logged scalars."""
        # New critics are uniform over the atoms, edges included, so the first updates say nothing.
        if num_updates >= 1000 and scalars["diagnostics/edge_mass"] > 0.01:
            return [
                f"the critics put more than 1 % of their mass on the edges of [{self.args.v_min}, {self.args.v_max}]; "
                "widen --v-min/--v-max (see diagnostics/edge_mass)"
            ]
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
