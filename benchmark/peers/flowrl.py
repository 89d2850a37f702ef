"""Times the authors' own FlowRL (PyTorch, CPU) from your checkout of github.com/bytedance/FlowRL, commit e26279b.

    pip install -r requirements.txt
    python benchmark/speed.py --peer "mfpo_continuous:FlowRL=python benchmark/peers/flowrl.py CHECKOUT"

The first command makes this project's own environment, which is enough (tried with torch 2.13.0, numpy 2.4.6,
gymnasium 1.4.0), but for a C++ compiler: its code compiles actions and updates, which takes minutes at the start.
Its own defaults are used: a batch of 256, networks 512 wide and, as its training loop has them, one update per step,
every second of them with the policy's. (On a GPU its updates, not its actions, would use bfloat16; here nothing does.)
"""

# ruff: noqa: E402 (the checkout must be on the path before it is imported from)
import itertools
import sys
from pathlib import Path

checkout, obs_dim, action_dim = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
sys.path[:0] = [checkout, str(Path(__file__).parent.parent)]

import numpy as np
import torch
from gymnasium.spaces import Box
from model.algo import flowAC
from rounds import answer_rounds
from utilis.config import Config
from utilis.default_config import default_config
from utilis.Replaybuffer import ReplayMemory

torch.set_float32_matmul_precision("high")  # as its main.py does
config = Config(default_config, cuda=False, device=0, epsilon=0.0, lamda=0.1)  # the last three as in its main.py
# Its policy names the GPU: its two constants go there with .cuda(), which here leaves a tensor where it is while the
# agent is built, and it draws its noise on its `device`, an attribute that is only read when an action is sampled.
cuda, torch.Tensor.cuda = torch.Tensor.cuda, lambda tensor: tensor
agent = flowAC(obs_dim, Box(-1, 1, (action_dim,), np.float32), config)
torch.Tensor.cuda = cuda
agent.policy.device = agent.device

memory = ReplayMemory(10_000, config.seed)
rng = np.random.default_rng(0)
observations = rng.normal(size=(10_001, obs_dim)).astype(np.float32)
for i in range(10_000):
    action = rng.uniform(-1, 1, size=action_dim).astype(np.float32)
    memory.push(observations[i], action, rng.normal(), observations[i + 1], 1.0)
count = itertools.count()

answer_rounds(
    update=lambda: agent.update_parameters(memory, config.batch_size, next(count)),
    action=lambda: agent.select_action(observations[0]),
    # without the gradient's graph, which a training action builds and drops; otherwise the same: it draws as much noise
    best_action=lambda: agent.select_action(observations[0], evaluate=True),
    facts=lambda: {"steps": 2 * config.steps},  # a step of the midpoint rule evaluates the network twice
)
