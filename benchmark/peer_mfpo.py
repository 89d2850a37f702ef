"""Adapter for benchmark/speed.py: times the authors' JAX code of MFPO from your own checkout of it.

    python benchmark/speed.py --peer "mfpo_continuous:JAX=JAX_PYTHON benchmark/peer_mfpo.py CHECKOUT"

JAX_PYTHON has jax, flax, optax, gym and ml_collections; CHECKOUT is a clone of github.com/dongxiaoyi-xyz/MFPO.
Its own defaults are used, with the batch of 256 and one update of everything per step, as its training loop has them.
"""

# ruff: noqa: E402 (the checkout must be on the path before it is imported from)
import sys

checkout, obs_dim, action_dim = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
sys.path.insert(0, checkout)

import jax
import numpy as np
from configs.mfpo_config import get_config
from gym.spaces import Box
from jaxrl5.agents.mean_flow_learner import MeanFlowLearner
from rounds import answer_rounds

options = dict(get_config())
options.pop("model_cls")
agent = MeanFlowLearner.create(0, Box(-1, 1, (obs_dim,), np.float32), Box(-1, 1, (action_dim,), np.float32), **options)
rng = np.random.default_rng(0)
buffer = {
    "observations": rng.normal(size=(10_000, obs_dim)),
    "next_observations": rng.normal(size=(10_000, obs_dim)),
    "actions": rng.uniform(-1, 1, size=(10_000, action_dim)),
    "rewards": rng.normal(size=10_000),
    "masks": np.ones(10_000),
}
buffer = {name: value.astype(np.float32) for name, value in buffer.items()}


def update():
    global agent
    rows = rng.integers(10_000, size=256)
    agent, _ = agent.update({name: value[rows] for name, value in buffer.items()}, utd_ratio=1)


def act(method):
    global agent
    action, agent = method(agent, buffer["observations"][0])
    return np.asarray(action)


answer_rounds(
    update,
    lambda: act(MeanFlowLearner.sample_actions),
    lambda: act(MeanFlowLearner.eval_actions),
    wait=lambda: jax.block_until_ready(agent.actor.params),
)
