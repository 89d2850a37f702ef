"""benchmark/likelihood_lag.py, likelihood.py and frozen.py against the same by hand, the Jacobian by reverse mode."""

import dataclasses

import numpy as np
import pytest
import torch

pytest.importorskip("rliable")
import mfpo_continuous as mfpo
from benchmark import frozen, likelihood
from benchmark import likelihood_lag as lag


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    args = mfpo.Args(
        env_id="tests.faulty:Walk-v0",
        policy_proposals=2,
        gaussian_proposals=2,
        batch_size=8,
        policy_batch_size=4,
        policy_tau=0.5,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        mfpo.train(dataclasses.replace(args, total_timesteps=25, learning_starts=20, eval_frequency=0))
    return next((folder / "runs").iterdir())


def test_bias_and_error_of_one_update(run):
    found = lag.go_on(run, lag.Variant({"likelihood": "map"}, 2, 6, 3), lag.Args([run], updates=1, burn_in=0, seed=5))
    saved, args = mfpo.load_file(run / "checkpoint.pt", "run")
    cpu = torch.device("cpu")
    torch.manual_seed(5)
    agent = mfpo.Agent(3, 3, dataclasses.replace(args, likelihood="map"), cpu)
    agent.load_state_dict(saved["agent"])
    for name, optimizer in mfpo.optimizers(agent).items():
        optimizer.load_state_dict(saved["optimizers"][name])
    agent.divergence_optimizer.param_groups[0]["lr"] = 9e-4
    buffer = mfpo.ReplayBuffer(1000, 1, 3, 3, cpu)
    buffer.load_state_dict(saved["buffer"])
    agent.update(*buffer.sample(8))
    agent.update_divergence(buffer.sample(6)[0], None)
    torch.manual_seed(0)
    obs, errors = buffer.sample(64)[0], []
    for s, noise in zip(obs, torch.randn(64, 3), strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda x, s=s: agent.sampler(s, x)[0], noise)
        exact = torch.distributions.Normal(0, 1).log_prob(noise).sum() - jacobian.det().abs().log()
        errors.append(mfpo.flow_log_prob(agent.divergence, s, agent.sampler(s, noise)[1]) - exact)
    errors = torch.stack(errors)
    assert found["bias"] == pytest.approx(errors.mean().item(), abs=1e-4)
    assert found["error"] == pytest.approx(errors.abs().mean().item(), abs=1e-4)
    assert found["alpha"] == pytest.approx(agent.log_alpha.exp().item()) and found["ms"] > 0


def test_without_a_learning_rate_the_network_stays_as_it_was(run, monkeypatch, capsys):
    kept, real = [], mfpo.flow_log_prob
    monkeypatch.setattr(mfpo, "flow_log_prob", lambda delta, *rest: kept.append(delta) or real(delta, *rest))
    lag.go_on(run, lag.VARIANTS["none at all"], lag.Args([run], updates=11, burn_in=0))
    saved = mfpo.load_file(run / "checkpoint.pt", "run")[0]["agent"]
    for name, value in kept[-1].state_dict().items():
        assert torch.equal(value, saved[f"divergence.{name}"])
    with pytest.raises(SystemExit):
        lag.main(lag.Args([run], variants=("mop",)))
    assert "--variants has mop; there are none at all" in capsys.readouterr().err


def test_series_against_numpy_at_each_state():
    torch.manual_seed(0)
    agent = mfpo.Agent(4, 3, mfpo.Args(policy_batch_size=4, policy_tau=0.5), torch.device("cpu"))
    agent.actor.apply(mfpo.xavier_uniform)
    obs, noise = torch.randn(5, 4), torch.randn(5, 3)
    actor = agent.policy
    found = likelihood.series(agent, obs, noise)
    x = noise
    for row, (r, t) in zip(found, ((0.5, 1.0), (0.0, 0.5)), strict=True):
        radii, errors = [], []
        r, t = torch.tensor([r]), torch.tensor([t])
        for s, a in zip(obs, x, strict=True):
            matrix = torch.autograd.functional.jacobian(lambda a, s=s, r=r, t=t: actor(s, a, r, t) / 2, a).numpy()
            radii.append(abs(np.linalg.eigvals(matrix)).max())
            cut = -sum(np.trace(np.linalg.matrix_power(matrix, k)) / k for k in range(1, 6))
            errors.append(abs(cut - np.linalg.slogdet(np.eye(3) - matrix)[1]))
        assert row["t"] == t
        assert row["radius, median"] == pytest.approx(np.median(radii), rel=1e-3)
        assert row["radius, largest"] == pytest.approx(max(radii), rel=1e-3)
        assert row["5 terms"] == pytest.approx(np.mean(errors), rel=1e-2, abs=1e-6)
        x = (x - actor(obs, x, r, t) / 2).detach()


def test_a_frozen_measurement_against_a_loop():
    torch.manual_seed(0)
    agent = mfpo.Agent(4, 2, mfpo.Args(), torch.device("cpu"))
    obs = torch.randn(3, 4)
    torch.manual_seed(1)
    found = frozen.measure(agent, obs)
    torch.manual_seed(1)
    noise, values, of_mean, deviations, log_probs = torch.randn(3, 32, 2), [], [], [], []
    with torch.no_grad():
        for s, e in zip(obs, noise, strict=True):
            actions = agent.sampler(s, e)[0]
            for x in e:
                jacobian = torch.autograd.functional.jacobian(lambda x, s=s: agent.sampler(s, x)[0], x)
                log_probs.append(torch.distributions.Normal(0, 1).log_prob(x).sum() - jacobian.det().abs().log())
            inside = actions.clamp(-1, 1)
            values += [agent.q_value(agent.qf1, agent.qf2, s, a) for a in inside]
            of_mean.append(agent.q_value(agent.qf1, agent.qf2, s, inside.mean(0)))
            deviations.append(np.std(inside.numpy(), 0))
    expected = [np.mean(values), np.mean(of_mean), np.mean(deviations), -np.mean(log_probs)]
    assert [*found] == ["q", "q of the mean", "std", "entropy"]
    np.testing.assert_allclose([*found.values()], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["8 noised actions, pooled", "gradient"])
def test_frozen_critics_stay_and_the_policy_learns(name, run, monkeypatch):
    monkeypatch.setitem(frozen.EIGHT, "policy_proposals", 8)  # the run has 2
    monkeypatch.setitem(frozen.VARIANTS, "8 noised actions, pooled", frozen.EIGHT | frozen.POOLED)
    agents, real = [], frozen.measure
    monkeypatch.setattr(frozen, "measure", lambda agent, obs: agents.append(agent) or real(agent, obs))
    rows = frozen.follow(run, name, frozen.Args([run], updates=8))
    assert [row["updates"] for row in rows] == [0, 1, 2, 4, 8] and rows[0]["q"] == rows[0]["q of the mean"] == 0
    saved = mfpo.load_file(run / "checkpoint.pt", "run")[0]["agent"]
    for key, value in agents[-1].state_dict().items():
        assert torch.equal(value, saved[key]) or key.startswith(("actor", "slow_actor", "divergence")), key
    assert not torch.equal(agents[-1].policy.mlp.first.weight, saved["slow_actor.mlp.first.weight"])
    assert len({row["q"] for row in rows}) == 5
    assert all(row["alpha"] == pytest.approx(saved["log_alpha"].exp().item()) for row in rows)
    if name == "gradient":
        assert rows[-1]["q"] > 0 and rows[-1]["q of the mean"] > 0  # it climbs
