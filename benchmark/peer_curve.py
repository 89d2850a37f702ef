"""A learning curve of the authors' JAX code of MFPO, from your own checkout of it, on a Gymnasium task.

    JAX_PYTHON benchmark/peer_curve.py CHECKOUT --env-id HalfCheetah-v4 --seed 1 --total-timesteps 13000 \\
        --learning-starts 1000 --eval-frequency 2000 --config use_cdq=false --out mfpo_peer_jax

Their own training loop needs gym 0.23 and mujoco-py; here their agent, with the defaults of their config but for
--config, learns in the loop of mfpo_continuous.py: the same tasks, random steps, evaluations and scores. Writes
<out>.csv in the columns of benchmark/report.py: the scores, and what the update at that step said of itself, under the
names that mfpo_continuous.py has for it. `hours` count the evaluations too.

JAX_PYTHON has jax, flax, optax, gym, ml_collections, gymnasium and mujoco; CHECKOUT is a clone of
github.com/dongxiaoyi-xyz/MFPO.
"""

# ruff: noqa: E402 (the checkout must be on the path before it is imported from)
import argparse
import csv
import json
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkout")
parser.add_argument("--env-id", default="Hopper-v4")
parser.add_argument("--exp-name", default="official JAX")
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--total-timesteps", type=int, default=1_000_000)
parser.add_argument("--learning-starts", type=int, default=10_000)
parser.add_argument("--eval-frequency", type=int, default=10_000)
parser.add_argument("--eval-episodes", type=int, default=10)
parser.add_argument("--config", nargs="*", default=[], metavar="KEY=JSON", help="other values of their config's keys")
parser.add_argument("--out", type=Path, required=True)
args = parser.parse_args()
sys.path.insert(0, args.checkout)

import gym.spaces  # theirs; the environments are gymnasium's
import gymnasium
import numpy as np
from configs.mfpo_config import get_config
from jaxrl5.agents.mean_flow_learner import MeanFlowLearner


def make_env() -> gymnasium.Env:
    """As mfpo_continuous.py makes it: actions in [-1, 1], float32 observations."""
    env = gymnasium.wrappers.RescaleAction(gymnasium.make(args.env_id), np.float32(-1), np.float32(1))
    return gymnasium.wrappers.DtypeObservation(env, np.float32)


config = get_config()
config.update({key: json.loads(value) for key, value in (pair.split("=") for pair in args.config)})
options = dict(config)
options.pop("model_cls")
env, eval_env = make_env(), make_env()
obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
agent = MeanFlowLearner.create(
    args.seed,
    gym.spaces.Box(-1, 1, (obs_dim,), np.float32),
    gym.spaces.Box(-1, 1, (action_dim,), np.float32),
    **options,
)
size = args.total_timesteps
buffer = {
    "observations": np.zeros((size, obs_dim), np.float32),
    "next_observations": np.zeros((size, obs_dim), np.float32),
    "actions": np.zeros((size, action_dim), np.float32),
    "rewards": np.zeros(size, np.float32),
    "masks": np.zeros(size, np.float32),
}
rng = np.random.default_rng(args.seed)
start, rows, episodes, episode_return = time.time(), [], [], 0.0


def row(metric: str, step: int, value: float, std: float | None = None) -> None:
    numbers = ("" if x is None else f"{float(x):.6g}" for x in ((time.time() - start) / 3600, value, std))
    rows.append([args.env_id, args.exp_name, args.seed, metric, step, *numbers])
    print(f"step {step}: {metric} {value:.3f}", flush=True)


def evaluate(method, step: int) -> np.ndarray:
    """The returns of `method`'s actions; the agent's own random state stays as it is."""
    player, returns = agent, []
    for i in range(args.eval_episodes):
        obs, total, done = eval_env.reset(seed=1000 * step + i)[0], 0.0, False
        while not done:
            action, player = method(player, obs)
            obs, reward, terminated, truncated, _ = eval_env.step(np.asarray(action))
            total, done = total + reward, terminated or truncated
        returns.append(total)
    return np.array(returns)


obs = env.reset(seed=args.seed)[0]
env.action_space.seed(args.seed)
for step in range(1, args.total_timesteps + 1):
    if step <= args.learning_starts:
        action = env.action_space.sample()
    else:
        action, agent = agent.sample_actions(obs)
        action = np.asarray(action)
        batch = rng.integers(step - 1, size=256)
        agent, info = agent.update({name: value[batch] for name, value in buffer.items()}, utd_ratio=1)
    next_obs, reward, terminated, truncated, _ = env.step(action)
    for name, value in zip(buffer, (obs, next_obs, action, reward, 1.0 - terminated), strict=True):
        buffer[name][step - 1] = value
    obs, episode_return = next_obs, episode_return + reward
    if terminated or truncated:
        episodes.append(episode_return)
        obs, episode_return = env.reset()[0], 0.0
    if step % args.eval_frequency == 0:
        if episodes:
            row("train", step, np.mean(episodes))
            episodes = []
        for metric, method in (
            ("eval", MeanFlowLearner.eval_actions),
            ("eval_exploring", MeanFlowLearner.sample_actions),
        ):
            returns = evaluate(method, step)
            row(metric, step, returns.mean(), returns.std())
        if step > args.learning_starts:
            row("losses/qf_loss", step, (info["c_loss_1"] + info["c_loss_2"]) / 2)
            row("losses/actor_loss", step, info["actor_loss"] * action_dim)  # theirs is the mean over the dimensions
            row("losses/divergence_loss", step, info["logp_loss"])
            row("losses/alpha", step, info["temperature"])
            row("diagnostics/entropy", step, info["entropy"])

with open(args.out.with_suffix(".csv"), "w", newline="") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["env_id", "exp_name", "seed", "metric", "step", "hours", "value", "std"])
    writer.writerows(rows)
