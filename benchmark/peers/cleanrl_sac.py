"""Times an action of CleanRL's SAC (PyTorch) from your checkout of github.com/vwxyzjn/cleanrl, commit fe8d8a0.

    python -m venv SAC && SAC/bin/pip install torch==2.13.0 gymnasium==0.29.1 tyro==1.0.17 tensorboard==2.21.0
    python benchmark/speed.py --peer "sac_continuous:CleanRL=SAC/bin/python benchmark/peers/cleanrl_sac.py CHECKOUT"

The network is the script's own; a GPU is used if there is one, as the script does by default. An action takes any
gymnasium; the script as a whole, which speed.py's --loop-peer times, needs 0.29 (and MuJoCo, for its tasks).
"""

# ruff: noqa: E402 (the checkout must be on the path before it is imported from)
import sys
from pathlib import Path
from types import SimpleNamespace

checkout, obs_dim, action_dim = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
sys.path[:0] = [checkout, str(Path(__file__).parent.parent)]

import numpy as np
import torch
from cleanrl.sac_continuous_action import Actor
from gymnasium.spaces import Box
from rounds import answer_rounds

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
spaces = SimpleNamespace(  # all that the actor reads of the environments
    single_observation_space=Box(-np.inf, np.inf, (obs_dim,)), single_action_space=Box(-1, 1, (action_dim,))
)
actor = Actor(spaces).to(device)
obs = np.random.default_rng(0).normal(size=(1, obs_dim))  # of one environment, in MuJoCo's double precision


def act():
    """As in the script's loop: with a graph of gradients, and the log-density that get_action computes, too."""
    actions, _, _ = actor.get_action(torch.Tensor(obs).to(device))
    return actions.detach().cpu().numpy()[0]


answer_rounds(
    action=act,
    update=None,  # it stands within the script's loop: whole loops are compared, by speed.py's --loop-peer
    facts=lambda: {"steps": 1},
)
