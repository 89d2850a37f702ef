"""The multi-goal task, and what the policies make of it."""

import csv
import math

import gymnasium as gym
import numpy as np
import pytest
import scipy.integrate
import torch

import mfpo_continuous
import sac_continuous
import smfp_continuous
from benchmark import modes
from benchmark.density import figures, histogram
from tests.multigoal import FOUR, TASKS, UNEQUAL, WIDTH, ExactQ, boltzmann, reward


@pytest.mark.parametrize("env_id", TASKS)
def test_reward_is_the_log_of_bumps_and_episodes_have_one_step(env_id):
    env, (places, masses) = gym.make(env_id), TASKS[env_id]
    env.reset(seed=0)
    action = np.array([0.5, 0.7], np.float32)
    _, paid, terminated, truncated, _ = env.step(action)
    squares = [((action - place) ** 2).sum() for place in places]
    bumps = sum(mass * math.exp(-x / (2 * WIDTH**2)) for mass, x in zip(masses, squares, strict=True))
    assert paid == pytest.approx(math.log(bumps), rel=1e-6) and terminated and not truncated


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_boltzmann_against_quadrature(alpha):
    density = lambda y, x: math.exp(reward(np.array([x, y]), FOUR) / alpha)  # noqa: E731
    quarter = scipy.integrate.dblquad(density, 0, 1, 0, 1)[0]  # the four quadrants are alike
    cell = scipy.integrate.dblquad(density, 0.5, 0.625, 0.625, 0.75)[0]
    table = boltzmann(alpha, FOUR)
    assert table.sum() == pytest.approx(1) and table[12, 13] == pytest.approx(cell / (4 * quarter), rel=1e-3)


def test_figures_of_the_optimum_and_of_a_uniform_policy():
    optimal = boltzmann(1.0, FOUR)
    perfect = figures(optimal, optimal, FOUR)
    assert perfect["total variation"] == 0 and perfect["kl"] == pytest.approx(0)
    assert all(perfect[f"goal {i}"] == pytest.approx(0.25) for i in (1, 2, 3, 4))
    # In the box, each bump is a Gaussian of entropy log(2 pi e w^2), and there are four: the grid can only blur that.
    exact = math.log(2 * math.pi * math.e * WIDTH**2) + math.log(4)
    assert exact <= perfect["optimal entropy"] < exact + 0.1
    uniform = figures(np.full((16, 16), 1 / 256), optimal, FOUR)
    assert uniform["entropy"] == pytest.approx(math.log(4))
    assert uniform["total variation"] == pytest.approx(np.clip(1 / 256 - optimal, 0, None).sum())
    unequal = boltzmann(1.0, UNEQUAL)
    shares = figures(unequal, unequal, UNEQUAL)
    assert [shares[f"goal {i}"] for i in (1, 2, 3)] == pytest.approx(UNEQUAL.masses, abs=0.005)


@pytest.mark.parametrize("goals", TASKS.values())
def test_the_exact_critic_is_the_reward(goals):
    actions = np.random.default_rng(0).uniform(-1, 1, (50, 2))
    found = ExactQ(goals)(torch.zeros(50, 1), torch.tensor(actions, dtype=torch.float32))
    np.testing.assert_allclose(found, reward(actions, goals), rtol=1e-4, atol=1e-4)


def improved(agent, updates):
    """What is learned by the policy's updates alone, at a temperature of 1."""
    agent.qf1 = agent.qf2 = ExactQ(FOUR)
    for _ in range(updates):
        agent.update_policy(torch.zeros(64, 1), torch.tensor(1.0))
    found = figures(histogram(agent, 50_000, 16), boltzmann(1.0, FOUR), FOUR)
    print(type(agent).__module__, found)  # pytest -s shows it
    return found


def test_smfp_comes_much_nearer_to_the_optimum_than_any_one_gaussian():
    """What a multimodal policy must beat is the Gaussian: SAC's spreads over the box, or sits on one goal."""
    torch.manual_seed(0)
    flags, cpu = {"alpha": 1.0, "autotune": False, "policy_lr": 1e-3}, torch.device("cpu")
    gaussian = improved(sac_continuous.Agent(1, 2, sac_continuous.Args(**flags), cpu), 600)
    flags |= {"latents": 16}
    found = improved(smfp_continuous.Agent(1, 2, smfp_continuous.Args(**flags), cpu), 400)
    assert all(0.15 < found[f"goal {i}"] < 0.35 for i in (1, 2, 3, 4))
    assert found["total variation"] < 0.3 < 0.5 < gaussian["total variation"] and found["kl"] < 0.5 * gaussian["kl"]


def test_mfpo_goes_to_the_one_goal_that_there_is():
    """By the policy's updates alone, with the exact Q of one bump. For four goals it needs thousands (see results)."""
    torch.manual_seed(0)
    flags = {"alpha": 1.0, "autotune": False, "learning_rate": 1e-3, "policy_proposals": 4, "gaussian_proposals": 8}
    agent, goal = (
        mfpo_continuous.Agent(1, 2, mfpo_continuous.Args(**flags), torch.device("cpu")),
        torch.tensor([0.5, -0.4]),
    )
    agent.q_value = lambda qf1, qf2, obs, actions: -((actions - goal) ** 2).sum(-1) / (2 * 0.2**2)
    distances = []
    for updates in (0, 150):
        for _ in range(updates):
            agent.update_policy(torch.zeros(64, 1), torch.tensor(1.0))
        distances.append((agent.sample_actions(torch.zeros(10_000, 1)) - goal).norm(dim=1).mean().item())
    # The optimum, a Gaussian of deviation 0.2 in each direction, is 0.2 sqrt(pi / 2) = 0.25 away in the mean.
    assert distances[0] > 0.8 and 0.05 < distances[1] < 0.4
    print(distances)


def test_modes_trains_the_policy_alone_and_writes_what_it_finds(tmp_path, capsys):
    modes.main(modes.Args(out=tmp_path / "modes", updates=2, variants=("SAC", "SMFP, lambda = 1", "MFPO, map")))
    assert len(capsys.readouterr().out.splitlines()) == 2 + 6
    with open(tmp_path / "modes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["task"] for row in rows] == ["MultiGoal-v0"] * 3 + ["UnequalGoals-v0"] * 3
    assert [(bool(row["sigma"]), bool(row["bias"])) for row in rows[:3]] == [(True, False)] * 2 + [(False, True)]
    for row in rows:
        shares = [float(value) for name, value in row.items() if name.startswith("goal ") and value]
        assert sum(shares) == pytest.approx(1, abs=1e-3) and 0 < float(row["total variation"]) < 1
    with pytest.raises(SystemExit, match="there is no lambda = 7"):
        modes.main(modes.Args(variants=("lambda = 7",)))
