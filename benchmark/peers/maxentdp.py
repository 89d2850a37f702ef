"""Times the authors' own MaxEntDP (JAX) from your checkout of github.com/diffusionyes/MaxEntDP, commit 8adfc7e.

    python -m venv JAX && JAX/bin/pip install jax==0.4.30 jaxlib==0.4.30 flax==0.8.5 optax==0.2.3 gym==0.23.1 \\
        ml_collections==0.1.1 tensorflow-probability==0.24.0 scipy==1.13.1 numpy==1.26.4
    python benchmark/speed.py --peer "mfpo_continuous:MaxEntDP=JAX/bin/python benchmark/peers/maxentdp.py CHECKOUT"

Its own configuration and batch of 256 are used, with one update of everything per step, as its training loop has them.
An evaluation action is the best of 10 by its critics. One update evaluates the policy network on 256 x 50 x 20 inputs
(for the log-probability) and the critics on 256 x 500 (for the target score), which takes seconds on a CPU.
"""

# ruff: noqa: E402 (the checkout must be on the path before it is imported from)
import sys
from pathlib import Path

checkout, obs_dim, action_dim = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
sys.path[:0] = [checkout, f"{checkout}/examples/states", str(Path(__file__).parent.parent)]

import numpy as np
from configs.max_entropy_learner_config import get_config
from gym.spaces import Box
from jax_peers import time_learner
from jaxrl5.agents import MaxEntropyLearner

options = dict(get_config())
options.pop("model_cls")
spaces = Box(-1, 1, (obs_dim,), np.float32), Box(-1, 1, (action_dim,), np.float32)
agent = MaxEntropyLearner.create(0, *spaces, **options)
# An evaluation action takes its steps with 10 candidates at once.
time_learner(agent, obs_dim, action_dim, "score_model", steps=agent.T)
