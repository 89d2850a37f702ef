# /// script
# requires-python = ">=3.10"
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

import dataclasses
import difflib
import math
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


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
    track: bool = False
    """also log to Weights and Biases (needs `pip install wandb`)"""
    wandb_project_name: str = "meanflow-rl"
    """the Weights and Biases project"""
    wandb_entity: str | None = None
    """the Weights and Biases team"""
    capture_video: bool = False
    """record the first episode of every evaluation as MP4 in the run's folder (needs `pip install moviepy`)"""
    save_model: bool = False
    """write the trained weights to runs/<run>/model.pt at the end"""
    evaluate: str | None = None
    """load this model.pt, print the return of `eval_episodes` episodes and stop"""
    log_frequency: int = 100
    """environment steps between two rows of losses and diagnostics"""

    env_id: str = "Hopper-v4"
    """a Gymnasium id, or `module:id` to import the module that registers it"""
    total_timesteps: int = 1_000_000
    """environment steps, summed over the parallel environments"""
    num_envs: int = 1
    """environments stepped side by side"""
    buffer_size: int = 1_000_000
    """transitions that the replay buffer holds (the end of an episode takes the room of one more)"""
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
    autotune: bool = True
    """learn the temperature; otherwise it stays at `alpha`"""
    alpha: float = 1.0
    """the temperature, or its first value when it is learned (CleanRL: log alpha starts at 0)"""


def fail(message: str) -> None:
    """Report a mistake of the user's in one line and exit with code 2, before anything is written."""
    print(f"{Path(__file__).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def check_args(args: Args) -> None:
    """Reject numbers that contradict each other or make no sense."""
    for name in ("total_timesteps", "num_envs", "buffer_size", "batch_size", "log_frequency", "eval_episodes"):
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    for name in ("seed", "learning_starts", "eval_frequency"):
        if getattr(args, name) < 0:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must not be negative")
    if not 0 <= args.gamma < 1:
        fail(f"--gamma is {args.gamma}; it must be in [0, 1)")
    if not 0 < args.tau <= 1:
        fail(f"--tau is {args.tau}; it must be in (0, 1]")
    if not 0 < args.utd_ratio < math.inf:
        fail(f"--utd-ratio is {args.utd_ratio}; it must be positive and finite")
    if not 0 < args.alpha < math.inf:
        fail(f"--alpha is {args.alpha}; it must be positive and finite")
    if args.batch_size > args.buffer_size:
        fail(f"--batch-size {args.batch_size} is above --buffer-size {args.buffer_size}; lower it or raise the buffer")
    if args.learning_starts < args.batch_size:
        fail(f"--learning-starts {args.learning_starts} is below --batch-size {args.batch_size}; raise it")
    if args.buffer_size < 2 * args.num_envs:
        fail(f"--buffer-size {args.buffer_size} is too small for --num-envs {args.num_envs}; raise it")
    if args.total_timesteps < args.num_envs:
        fail(f"--total-timesteps {args.total_timesteps} is below --num-envs {args.num_envs}; raise it")
    for flag, package in (("capture_video", "moviepy"), ("track", "wandb")):
        if getattr(args, flag):
            try:
                __import__(package)
            except ImportError:
                fail(f"--{flag.replace('_', '-')} needs the package {package}: pip install {package}")
    check_algorithm(args)


def make_env(env_id: str, video_folder: str | None = None) -> gym.Env:
    """Make one environment with flat float32 observations and actions in [-1, 1].

    With `video_folder` every episode is recorded there. Exits with code 2 when the id is unknown or when the spaces
    are not what a continuous-control algorithm on vectors can use.
    """
    if video_folder and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a display; read when mujoco first renders
    try:
        env = gym.make(env_id, render_mode="rgb_array") if video_folder else gym.make(env_id)
    except (gym.error.Error, ImportError) as error:
        near = difflib.get_close_matches(env_id, gym.registry, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "see gymnasium.pprint_registry()"
        fail(f"--env-id {env_id} cannot be made ({str(error).splitlines()[0]}); {hint}")
    if video_folder:
        try:
            env.reset(seed=0)
            env.render()
        except Exception as error:  # a missing package, driver or render mode, each with an exception of its own
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            fail(f"--capture-video cannot render {env_id} ({reason})")
    actions, observations = env.action_space, env.observation_space
    if not isinstance(actions, gym.spaces.Box) or len(actions.shape) != 1:
        fail(f"--env-id {env_id} has the action space {actions}; only a one-dimensional Box is supported")
    if not (np.isfinite(actions.low).all() and np.isfinite(actions.high).all()):
        fail(f"--env-id {env_id} has unbounded actions {actions}; wrap it so that they are bounded")
    if isinstance(observations, gym.spaces.Box) and len(observations.shape) == 3:
        fail(f"--env-id {env_id} has image observations {observations.shape}; only vectors are supported")
    if not isinstance(observations, gym.spaces.Box) or len(observations.shape) != 1:
        if not observations.is_np_flattenable:
            fail(f"--env-id {env_id} has the observation space {observations}, which cannot be flattened to a vector")
        env = gym.wrappers.FlattenObservation(env)
    if video_folder:
        env = gym.wrappers.RecordVideo(env, video_folder, episode_trigger=lambda episode: True)
    env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    env = gym.wrappers.DtypeObservation(env, np.float32)
    return gym.wrappers.RecordEpisodeStatistics(env)


class ReplayBuffer:
    """Ring of transitions of `num_envs` environments on `device`, each observation stored once.

    Row p holds the observations at one step and, if they were acted on, the actions, rewards and terminations that
    followed; row p + 1 holds the next observations. Where an episode ends, row p + 1 holds its last observation and
    the next episode begins in row p + 2, so row p + 1 is no start of a transition. `starts` lists the rows that are.
    """

    def __init__(self, size: int, num_envs: int, obs_dim: int, action_dim: int, device: torch.device):
        self.rows = size // num_envs + 1
        self.observations = torch.zeros(self.rows, num_envs, obs_dim, device=device)
        self.actions = torch.zeros(self.rows, num_envs, action_dim, device=device)
        self.rewards = torch.zeros(self.rows, num_envs, device=device)
        self.terminations = torch.zeros(self.rows, num_envs, device=device)
        self.starts = torch.zeros(self.rows, dtype=torch.long, device=device)  # itself a ring, oldest first
        # Host counters never wrap, so that row % rows and start % rows are the places in the two rings.
        self.row = self.first_start = self.last_start = 0
        # The same two on the device: a captured update reads them there, whatever they were at capture.
        self.span = torch.zeros(2, dtype=torch.long, device=device)
        self.start_row = [0] * self.rows  # host copy of `starts`, to see when the oldest one is overwritten

    def __len__(self) -> int:
        """The number of transitions that can be sampled."""
        return (self.last_start - self.first_start) * self.observations.shape[1]

    def add(self, obs, actions, rewards, terminations, next_obs, dones) -> None:
        """Append one transition per environment; arrays have `num_envs` rows, `next_obs` is final where `dones`."""
        here, there = self.row % self.rows, (self.row + 1) % self.rows
        self.observations[here] = torch.from_numpy(obs)
        self.observations[there] = torch.from_numpy(next_obs)
        self.actions[here] = torch.from_numpy(actions)
        self.rewards[here] = torch.from_numpy(rewards)
        self.terminations[here] = torch.from_numpy(terminations)
        self.starts[self.last_start % self.rows] = here
        self.start_row[self.last_start % self.rows] = self.row
        self.last_start += 1
        self.row += 2 if dones.any() else 1
        # Row `self.row - rows` and older ones are, or will be at the next step, overwritten.
        while self.start_row[self.first_start % self.rows] <= self.row - self.rows:
            self.first_start += 1
        self.span[0], self.span[1] = self.first_start, self.last_start

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


def check_algorithm(args: Args) -> None:
    """The part of `check_args` that belongs to this algorithm."""
    for name in ("policy_lr", "q_lr"):
        if not 0 < getattr(args, name) < math.inf:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be positive and finite")


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
        self.qf1_target, self.qf2_target = SoftQNetwork(obs_dim, action_dim), SoftQNetwork(obs_dim, action_dim)
        self.qf1_target.load_state_dict(self.qf1.state_dict())
        self.qf2_target.load_state_dict(self.qf2.state_dict())
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha)), requires_grad=args.autotune)
        self.target_entropy = -float(action_dim)
        self.to(device)
        self.q_parameters = [*self.qf1.parameters(), *self.qf2.parameters()]
        self.q_target_parameters = [*self.qf1_target.parameters(), *self.qf2_target.parameters()]
        self.q_optimizer = torch.optim.Adam(self.q_parameters, lr=args.q_lr, fused=True)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=args.policy_lr, fused=True)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], lr=args.q_lr, fused=True)

    @torch.no_grad()
    def sample_actions(self, obs: torch.Tensor) -> torch.Tensor:
        """Actions (B, d) for training."""
        mean, log_std = self.actor(obs)
        return torch.tanh(mean + log_std.exp() * torch.randn_like(mean))

    @torch.no_grad()
    def eval_actions(self, obs: torch.Tensor) -> torch.Tensor:
        """Actions (B, d) for evaluation: the squashed mean."""
        return torch.tanh(self.actor(obs)[0])

    def update(self, obs, actions, rewards, terminations, next_obs) -> dict[str, torch.Tensor]:
        """One step on the critics, their targets, the actor and the temperature; returns scalars for the log."""
        alpha = self.log_alpha.detach().exp()

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

        mean, log_std = self.actor(obs)
        pi, log_prob = squashed_gaussian(mean, log_std, torch.randn_like(mean))
        for p in self.q_parameters:  # the critics only pass the gradient on here
            p.requires_grad_(False)
        actor_loss = (alpha * log_prob - torch.minimum(self.qf1(obs, pi), self.qf2(obs, pi))).mean()
        self.actor_optimizer.zero_grad()
        actor_loss.backward()
        self.actor_optimizer.step()
        for p in self.q_parameters:
            p.requires_grad_(True)

        entropy = -log_prob.detach().mean()
        metrics = {
            "losses/qf1_values": q1.mean(),
            "losses/qf2_values": q2.mean(),
            "losses/qf1_loss": qf1_loss,
            "losses/qf2_loss": qf2_loss,
            "losses/qf_loss": (qf1_loss + qf2_loss) / 2,
            "losses/actor_loss": actor_loss,
            "losses/alpha": alpha,
            "diagnostics/entropy": entropy,
        }
        if self.args.autotune:
            alpha_loss = self.log_alpha.exp() * (entropy - self.target_entropy)
            self.alpha_optimizer.zero_grad()
            alpha_loss.backward()
            self.alpha_optimizer.step()
            metrics["losses/alpha_loss"] = alpha_loss
        return {name: value.detach() for name, value in metrics.items()}

    def warning(self, scalars: dict[str, float], num_updates: int) -> str | None:
        """What the user should know of the last logged scalars; SAC has nothing to warn of."""
        return None


def evaluate(agent: Agent, envs: list[gym.Env], seed: int, device: torch.device) -> np.ndarray:
    """Play one episode in each environment, all as one batch; returns the undiscounted returns (len(envs),).

    Training's random state is left as it was, and the result depends on the weights and `seed` alone.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        obs = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)])
        returns, running = np.zeros(len(envs)), list(range(len(envs)))
        while running:
            actions = agent.eval_actions(torch.from_numpy(obs).to(device)).cpu().numpy()
            still_running = []
            for i in running:
                obs[i], reward, terminated, truncated, _ = envs[i].step(actions[i])
                returns[i] += reward
                if not (terminated or truncated):
                    still_running.append(i)
            running = still_running
    return returns


def due(step: int, every: int, stride: int) -> bool:
    """Whether a multiple of `every` lies in (step - stride, step]; never when `every` is 0."""
    return every > 0 and step // every > (step - stride) // every


def evaluate_saved(args: Args, device: torch.device) -> None:
    """`--evaluate PATH`: load the weights that `--save-model` wrote and print the return they reach."""
    try:
        saved = torch.load(args.evaluate, map_location=device, weights_only=True)
        if saved["script"] != Path(__file__).stem:
            raise ValueError(f"it was written by {saved['script']}.py")
        trained = Args(**saved["args"])
    except Exception as error:  # whatever is wrong with the file, it is the user's to replace
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        fail(f"--evaluate {args.evaluate} is no model.pt of {Path(__file__).name} ({reason})")
    video_folder = f"{Path(args.evaluate).parent}/videos" if args.capture_video else None
    envs = [make_env(trained.env_id, video_folder if i == 0 else None) for i in range(args.eval_episodes)]
    obs_dim, action_dim = envs[0].observation_space.shape[0], envs[0].action_space.shape[0]
    agent = Agent(obs_dim, action_dim, trained, device)
    agent.load_state_dict(saved["agent"])
    returns = evaluate(agent, envs, args.seed, device)
    print(f"{trained.env_id}: return {returns.mean():.1f} +- {returns.std():.1f} over {len(returns)} episodes")
    for env in envs:
        env.close()


def train(args: Args) -> None:
    """Train from scratch; everything that the run writes goes to one folder under runs/."""
    check_args(args)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if args.evaluate:
        return evaluate_saved(args, device)

    env_name = args.env_id.replace("/", "-").replace(":", "-")
    run_name = f"{env_name}__{args.exp_name}__{args.seed}__{int(time.time())}"
    while Path("runs", run_name).exists():  # another run of the same second
        run_name += "x"
    video_folder = f"runs/{run_name}/videos" if args.capture_video else None
    envs = gym.vector.SyncVectorEnv(
        [lambda: make_env(args.env_id)] * args.num_envs, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP
    )
    num_eval_envs = args.eval_episodes if args.eval_frequency else 0
    eval_envs = [make_env(args.env_id, video_folder if i == 0 else None) for i in range(num_eval_envs)]
    obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=True)
    agent = Agent(obs_dim, action_dim, args, device)
    row_bytes = 4 * (obs_dim + action_dim + 2) + 8
    fits = device.type == "cpu" or args.buffer_size * row_bytes < 0.8 * torch.cuda.mem_get_info()[0]
    buffer = ReplayBuffer(args.buffer_size, args.num_envs, obs_dim, action_dim, device if fits else torch.device("cpu"))

    if args.track:
        import wandb

        wandb.init(
            project=args.wandb_project_name,
            entity=args.wandb_entity,
            sync_tensorboard=True,
            config=vars(args),
            name=run_name,
            save_code=True,
        )
    writer = SummaryWriter(f"runs/{run_name}")
    table = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")

    obs, _ = envs.reset(seed=args.seed)
    envs.action_space.seed(args.seed)
    num_updates, metrics, warned = 0, None, set()
    start_time, last_return = time.time(), math.nan
    progress = tqdm(total=args.total_timesteps, unit="step", mininterval=1.0)
    for global_step in range(args.num_envs, args.total_timesteps + 1, args.num_envs):
        if global_step <= args.learning_starts:
            actions = envs.action_space.sample()
        else:
            actions = agent.sample_actions(torch.from_numpy(obs).to(device)).cpu().numpy()

        # The update is launched before the environment steps: on a GPU the two then overlap.
        while num_updates < int((global_step - args.learning_starts) * args.utd_ratio):
            metrics = agent.update(*buffer.sample(args.batch_size, device))
            num_updates += 1

        next_obs, rewards, terminations, truncations, infos = envs.step(actions)
        dones = terminations | truncations
        final_obs = next_obs.copy()  # next_obs is already the next episode's first one where an episode ended
        for i in np.flatnonzero(dones):
            final_obs[i] = infos["final_obs"][i]
            last_return = float(infos["final_info"]["episode"]["r"][i])
            writer.add_scalar("charts/episodic_return", last_return, global_step)
            writer.add_scalar("charts/episodic_length", int(infos["final_info"]["episode"]["l"][i]), global_step)
        buffer.add(obs, actions, rewards, terminations, final_obs, dones)
        obs = next_obs
        progress.update(args.num_envs)

        if metrics and due(global_step, args.log_frequency, args.num_envs):
            scalars = dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))  # the only sync
            for name, value in scalars.items():
                writer.add_scalar(name, value, global_step)
            writer.add_scalar("charts/SPS", global_step / (time.time() - start_time), global_step)
            progress.set_postfix_str(f"return {last_return:.1f}", refresh=False)
            message = agent.warning(scalars, num_updates)
            if message and message not in warned:
                warned.add(message)
                progress.write(f"warning: {message}")
        if due(global_step, args.eval_frequency, args.num_envs):
            eval_seed = int(np.random.SeedSequence([args.seed, global_step]).generate_state(1)[0]) >> 1
            returns = evaluate(agent, eval_envs, eval_seed, device)
            writer.add_scalar("eval/episodic_return", returns.mean(), global_step)
            writer.add_scalar("eval/episodic_return_std", returns.std(), global_step)
            progress.write(f"step {global_step}: evaluation return {returns.mean():.1f} +- {returns.std():.1f}")
    progress.close()

    if args.save_model:
        saved = {"script": Path(__file__).stem, "args": dataclasses.asdict(args), "agent": agent.state_dict()}
        torch.save(saved, f"runs/{run_name}/model.pt")
    for env in (envs, *eval_envs):
        env.close()
    writer.close()
    print(f"The run's files are in runs/{run_name}")


if __name__ == "__main__":
    train(tyro.cli(Args))
