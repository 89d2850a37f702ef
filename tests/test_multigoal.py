"""The multi-goal task, and what the policies make of it."""

import math
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import scipy.integrate

from tests.multigoal import GOALS, WIDTH, boltzmann, reward
from tests.test_skeleton import ROOT

matplotlib = pytest.importorskip("matplotlib", reason="benchmark/density.py draws with it")
from benchmark.density import figures, histogram, load_agent  # noqa: E402


def test_reward_is_the_log_of_four_bumps_and_episodes_have_one_step():
    env = gym.make("tests.multigoal:MultiGoal-v0")
    env.reset(seed=0)
    action = np.array([0.5, 0.7], np.float32)
    _, paid, terminated, truncated, _ = env.step(action)
    bumps = sum(math.exp(-((action - goal) ** 2).sum() / (2 * WIDTH**2)) for goal in GOALS)
    assert paid == pytest.approx(math.log(bumps), rel=1e-6) and terminated and not truncated


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_boltzmann_against_quadrature(alpha):
    density = lambda y, x: math.exp(reward(np.array([x, y])) / alpha)  # noqa: E731
    quarter = scipy.integrate.dblquad(density, 0, 1, 0, 1)[0]  # the four quadrants are alike
    cell = scipy.integrate.dblquad(density, 0.5, 0.625, 0.625, 0.75)[0]
    table = boltzmann(alpha)
    assert table.sum() == pytest.approx(1) and table[12, 13] == pytest.approx(cell / (4 * quarter), rel=1e-3)


def test_figures_of_the_optimum_and_of_a_uniform_policy():
    optimal = boltzmann(1.0)
    perfect = figures(optimal, optimal)
    assert perfect["total variation"] == 0 and perfect["kl"] == pytest.approx(0)
    assert all(perfect[f"goal {i}"] == pytest.approx(0.25) for i in (1, 2, 3, 4))
    # In the box, each bump is a Gaussian of entropy log(2 pi e w^2), and there are four: the grid can only blur that.
    exact = math.log(2 * math.pi * math.e * WIDTH**2) + math.log(4)
    assert exact <= perfect["optimal entropy"] < exact + 0.1
    uniform = figures(np.full((16, 16), 1 / 256), optimal)
    assert uniform["entropy"] == pytest.approx(math.log(4))
    assert uniform["total variation"] == pytest.approx(np.clip(1 / 256 - optimal, 0, None).sum())


TRAIN = (
    "--env-id tests.multigoal:MultiGoal-v0 --no-autotune --alpha 1 --batch-size 64 --learning-starts 500 "
    "--total-timesteps 2000 --eval-frequency 0 --checkpoint-frequency 0"
)
"""The arguments of benchmark/multigoal.sh, for fewer steps."""
