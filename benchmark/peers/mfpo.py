"""Times the authors' own MFPO (JAX) from your checkout of github.com/dongxiaoyi-xyz/MFPO, commit d8b3977.

    python -m venv JAX && JAX/bin/pip install jax==0.4.30 flax==0.8.5 optax==0.2.2 gym==0.23.1 ml_collections "numpy<2"
    python benchmark/speed.py --peer "mfpo_continuous:JAX=JAX/bin/python benchmark/peers/mfpo.py CHECKOUT"

Its own defaults are used, with the batch of 256 and one update of everything per step, as its training loop has them.
"""

# ruff: noqa: E402 (the checkout must be on the path before it is imported from)
import sys
from pathlib import Path

checkout, obs_dim, action_dim = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
sys.path[:0] = [checkout, str(Path(__file__).parent.parent)]

import numpy as np
from configs.mfpo_config import get_config
from gym.spaces import Box
from jax_peers import time_learner
from jaxrl5.agents.mean_flow_learner import MeanFlowLearner

options = dict(get_config())
options.pop("model_cls")
agent = MeanFlowLearner.create(0, Box(-1, 1, (obs_dim,), np.float32), Box(-1, 1, (action_dim,), np.float32), **options)
time_learner(agent, obs_dim, action_dim, "actor", steps=2, utd_ratio=1)
