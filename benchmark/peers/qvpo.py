"""Times the authors' own QVPO (PyTorch, CPU) from your checkout of github.com/wadx2019/qvpo, commit 40a1974.

    pip install -r requirements.txt
    python benchmark/speed.py --peer "mfpo_continuous:QVPO=python benchmark/peers/qvpo.py CHECKOUT"

The first command makes this project's own environment, which is enough (tried with torch 2.13.0, numpy 2.4.6,
gymnasium 1.4.0). The options are those of `main.py --weighted --aug`, the command of its README (without these flags
it trains another algorithm): a batch of 256, and one update of everything per step, as its training loop has them.
It picks the best of 4 candidates when it trains and of 32 when it evaluates.
"""

# ruff: noqa: E402 (the checkout must be on the path before it is imported from)
import sys
from pathlib import Path
from types import SimpleNamespace

checkout, obs_dim, action_dim = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
sys.path[:0] = [checkout, str(Path(__file__).parent.parent)]

import gymnasium
import numpy as np
import torch

# main.py is imported for its options' defaults only; its simulator and its log, which it imports, are not used
sys.modules.update(gym=gymnasium, tensorboardX=SimpleNamespace(SummaryWriter=None))
from agent.qvpo import QVPO
from agent.replay_memory import ReplayMemory
from main import readParser
from rounds import answer_rounds

sys.argv = ["main.py", "--weighted", "--aug", "--cuda", "cpu"]
options = readParser()
device = torch.device(options.cuda)
space = gymnasium.spaces.Box(-1, 1, (action_dim,), np.float32)
memory = ReplayMemory(obs_dim, action_dim, 10_000, device)
agent = QVPO(options, obs_dim, space, memory, None, device)  # --aug needs no memory of improved actions
rng = np.random.default_rng(0)
observations = rng.normal(size=(10_001, obs_dim))
for i in range(10_000):
    action = rng.uniform(-1, 1, size=action_dim)
    agent.append_memory(observations[i], action, rng.normal(), observations[i + 1], options.gamma)

answer_rounds(
    update=lambda: agent.train(1, 1, batch_size=options.batch_size),
    action=lambda: agent.sample_action(observations[0], eval=False),
    best_action=lambda: agent.sample_action(observations[0], eval=True),
    facts=lambda: {"steps": options.n_timesteps},  # one after the other, each of all the candidates at once
)
