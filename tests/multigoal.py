"""Four goals in a box, one step per episode: `--env-id tests.multigoal:MultiGoal-v0`.

The reward is log sum_i exp(-|a - g_i|^2 / (2 w^2)) for an action a in [-1, 1]^2. With a fixed temperature alpha the
optimal maximum-entropy policy is known, exp(reward / alpha) / Z; at alpha = 1 it is four equal Gaussian bumps of width
w, which no single Gaussian fits.
"""

import gymnasium as gym
import numpy as np

GOALS = np.array([[0.6, 0.6], [-0.6, 0.6], [-0.6, -0.6], [0.6, -0.6]])
WIDTH = 0.15


def reward(actions: np.ndarray) -> np.ndarray:
    """Reward (...) of actions (..., 2)."""
    squared_distance = ((actions[..., None, :] - GOALS) ** 2).sum(-1)
    return np.logaddexp.reduce(-squared_distance / (2 * WIDTH**2), axis=-1)


def boltzmann(alpha: float, cells: int = 16, points: int = 32) -> np.ndarray:
    """Probability of each of cells x cells squares of [-1, 1]^2 under exp(reward / alpha) / Z, by the midpoint rule."""
    n = cells * points
    middles = (np.arange(n) + 0.5) / n * 2 - 1
    log_density = reward(np.stack(np.meshgrid(middles, middles, indexing="ij"), -1)) / alpha
    density = np.exp(log_density - log_density.max()).reshape(cells, points, cells, points).sum((1, 3))
    return density / density.sum()


class MultiGoal(gym.Env):
    """One state, one step."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), float(reward(action)), True, False, {}


gym.register("MultiGoal-v0", MultiGoal)
