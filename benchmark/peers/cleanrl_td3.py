"""Times an action of CleanRL's TD3 (PyTorch) from your checkout of github.com/vwxyzjn/cleanrl, commit fe8d8a0.

    python -m venv TD3 && TD3/bin/pip install torch==2.13.0 gymnasium==0.29.1 tyro==1.0.17 tensorboard==2.21.0
    python benchmark/speed.py --peer "sac_continuous:TD3=TD3/bin/python benchmark/peers/cleanrl_td3.py CHECKOUT"

The network and the exploration noise are the script's own; a GPU is used if there is one, as the script does by
default. CleanRL evaluates with the noise, too, so there is no other action to time. An action takes any gymnasium; the
script as a whole, which speed.py's --loop-peer times, needs 0.29 (and MuJoCo, for its tasks).
"""

# ruff: noqa: E402 (the checkout must be on the path before it is imported from)
import sys
from pathlib import Path
from types import SimpleNamespace

checkout, obs_dim, action_dim = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
sys.path[:0] = [checkout, str(Path(__file__).parent.parent)]

import numpy as np
import torch
from cleanrl.td3_continuous_action import Actor, Args
from gymnasium.spaces import Box
from rounds import answer_rounds

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
space = Box(-1, 1, (action_dim,))
spaces = SimpleNamespace(  # all that the actor reads of the environments
    single_observation_space=Box(-np.inf, np.inf, (obs_dim,)), single_action_space=space
)
actor, std = Actor(spaces).to(device), Args.exploration_noise
obs = np.random.default_rng(0).normal(size=(1, obs_dim))  # of one environment, in MuJoCo's double precision


@torch.no_grad()
def act():
    """The policy's action with the noise of the script's loop, clipped to the space."""
    mean = actor(torch.Tensor(obs).to(device))
    noisy = mean + torch.normal(0, actor.action_scale * std)
    return noisy.cpu().numpy().clip(space.low, space.high)[0]


answer_rounds(
    action=act,
    update=None,  # it stands within the script's loop: whole loops are compared, by speed.py's --loop-peer
    facts=lambda: {"steps": 1},
)
