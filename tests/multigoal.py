"""Goals in a box, one step per episode: `--env-id tests.multigoal:MultiGoal-v0` or `tests.multigoal:UnequalGoals-v0`.

The reward is log sum_i m_i exp(-|a - g_i|^2 / (2 w^2)) for an action a in [-1, 1]^2. With a fixed temperature alpha the
optimal maximum-entropy policy is known, exp(reward / alpha) / Z; at alpha = 1 it is Gaussian bumps of width w with
masses in proportion to m_i, which no single Gaussian fits. The first task has four equal goals, the second three with
the masses 0.6, 0.3 and 0.1.
"""

from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch

WIDTH = 0.15


class Goals(NamedTuple):
    places: np.ndarray  # (n, 2)
    masses: np.ndarray  # (n,)


FOUR = Goals(np.array([[0.6, 0.6], [-0.6, 0.6], [-0.6, -0.6], [0.6, -0.6]]), np.ones(4))
UNEQUAL = Goals(np.array([[0.5, 0.5], [-0.6, 0.3], [0.2, -0.6]]), np.array([0.6, 0.3, 0.1]))
TASKS = {"tests.multigoal:MultiGoal-v0": FOUR, "tests.multigoal:UnequalGoals-v0": UNEQUAL}


def reward(actions: np.ndarray, goals: Goals) -> np.ndarray:
    """Reward (...) of actions (..., 2)."""
    squared_distance = ((actions[..., None, :] - goals.places) ** 2).sum(-1)
    return np.logaddexp.reduce(np.log(goals.masses) - squared_distance / (2 * WIDTH**2), axis=-1)


def boltzmann(alpha: float, goals: Goals, cells: int = 16, points: int = 32) -> np.ndarray:
    """Probability of each of cells x cells squares of [-1, 1]^2 under exp(reward / alpha) / Z, by the midpoint rule."""
    n = cells * points
    middles = (np.arange(n) + 0.5) / n * 2 - 1
    log_density = reward(np.stack(np.meshgrid(middles, middles, indexing="ij"), -1), goals) / alpha
    density = np.exp(log_density - log_density.max()).reshape(cells, points, cells, points).sum((1, 3))
    return density / density.sum()


class ExactQ(torch.nn.Module):
    """The reward as a critic, which is what critics of these tasks should learn: (..., 2) actions to (...)."""

    def __init__(self, goals: Goals):
        super().__init__()
        self.places, self.masses = (torch.tensor(x, dtype=torch.float32) for x in goals)

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        squared_distance = ((actions[..., None, :] - self.places) ** 2).sum(-1)
        return (self.masses.log() - squared_distance / (2 * WIDTH**2)).logsumexp(-1)


class MultiGoal(gym.Env):
    """One state, one step."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, goals: Goals):
        self.goals = goals

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), float(reward(action, self.goals)), True, False, {}


for env_id, goals in TASKS.items():
    gym.register(env_id.split(":")[1], MultiGoal, kwargs={"goals": goals})
