"""Every equation against something independent: a closed form, quadrature, SciPy, brute-force autograd or a loop."""

import importlib
import itertools
import math
from functools import partial

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch

import mfpo_continuous as mfpo
import sac_continuous as sac
import smfp_continuous as smfp
from benchmark.likelihood import log_probs
from benchmark.proposals import exact_means, grid_of_q, load


def small_flow(action_dim=2, out_dim=None, seed=0):
    """A random MeanFlow network in float64, so that comparisons are not limited by rounding."""
    torch.manual_seed(seed)
    network = mfpo.MeanFlowNetwork(obs_dim=3, action_dim=action_dim, out_dim=out_dim or action_dim)
    return network.apply(mfpo.xavier_uniform).double()


@pytest.mark.parametrize("script", [mfpo, smfp])
def test_concat_linear_is_linear_on_the_concatenation(script):
    torch.manual_seed(0)
    layer = script.ConcatLinear((5, 2, 3), 7)
    of_state, of_all, x = torch.randn(4, 1, 5), torch.randn(2), torch.randn(4, 6, 3)
    inputs = torch.cat([of_state.expand(4, 6, 5), of_all.expand(4, 6, 2), x], -1)
    whole = torch.nn.functional.linear(inputs, layer.weight, layer.bias)
    torch.testing.assert_close(layer(of_state, of_all, x), whole)


@pytest.mark.parametrize("steps", range(1, 9))
def test_sampler_is_the_loop_in_the_paper(steps):
    actor, divergence = small_flow(), small_flow(out_dim=1, seed=1)
    obs, noise = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    with torch.no_grad():
        action, trajectory = mfpo.sample_flow(actor, obs, noise, steps)
        log_prob = mfpo.flow_log_prob(divergence, obs, trajectory)
        for row in range(4):
            x = noise[row]
            expected = scipy.stats.multivariate_normal(np.zeros(2)).logpdf(x)
            for i in reversed(range(1, steps + 1)):
                r, t = torch.tensor([(i - 1) / steps]).double(), torch.tensor([i / steps]).double()
                expected += divergence(obs[row], x, r, t).item() / steps
                x = x - actor(obs[row], x, r, t) / steps
            torch.testing.assert_close(action[row], x, rtol=1e-6, atol=1e-6)
            assert log_prob[row].item() == pytest.approx(expected, abs=1e-5)


def quantile_batch():
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(6, n, generator=generator, dtype=torch.float64) for n in (5, 8))


def test_quantile_loss_against_a_loop_and_its_gradient_against_differences():
    quantiles, targets = quantile_batch()
    expected = np.zeros(6)
    for b in range(6):
        for i in range(5):
            for j in range(8):
                u, tau = (targets[b, j] - quantiles[b, i]).item(), (i + 0.5) / 5
                huber = 0.5 * u**2 if abs(u) <= 1 else abs(u) - 0.5
                expected[b] += abs(tau - (u < 0)) * huber / 8
    loss = mfpo.quantile_huber_loss(quantiles, targets)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    quantiles.requires_grad_()
    assert torch.autograd.gradcheck(mfpo.quantile_huber_loss, (quantiles, targets))


def test_quantile_loss_is_least_at_the_quantiles():
    """Of many samples, far apart: there Huber's threshold of 1 does not matter."""
    samples = 1e5 * np.random.default_rng(0).exponential(size=1001)
    exact = np.quantile(samples, (np.arange(5) + 0.5) / 5)
    targets = torch.from_numpy(samples)[None]
    quantiles = torch.from_numpy(exact)[None].requires_grad_()
    mfpo.quantile_huber_loss(quantiles, targets).sum().backward()
    assert quantiles.grad.abs().max() < 2 / 1001  # one sample more or less on a side
    least = mfpo.quantile_huber_loss(quantiles, targets).item()
    for i in range(5):
        for shift in (-3000, 3000):
            moved = quantiles.detach().clone()
            moved[0, i] += shift
            assert mfpo.quantile_huber_loss(moved, targets).item() > least


@pytest.mark.parametrize("meanflow", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_determinants_of_the_steps_make_the_likelihood_that_of_the_map(steps, meanflow):
    """With what `--likelihood map` regresses on in delta's place, log pi is the exact one, by autograd's Jacobian."""
    actor = small_flow()
    obs, noise = torch.randn(4, 3).double(), torch.randn(4, 2).double()

    def delta(obs, x, r, t):
        return -steps * mfpo.log_abs_det(lambda x: x - actor(obs, x, r, t) / steps, x)[:, None]

    with torch.no_grad():
        _, trajectory = mfpo.sample_flow(actor, obs, noise, steps, meanflow)
        found = mfpo.flow_log_prob(delta, obs, trajectory)
    for row in range(4):
        sampler = lambda e, row=row: mfpo.sample_flow(actor, obs[row], e, steps, meanflow)[0]  # noqa: E731
        jacobian = torch.autograd.functional.jacobian(sampler, noise[row])
        expected = scipy.stats.norm.logpdf(noise[row]).sum() - jacobian.det().abs().log().item()
        assert found[row].item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("x_t", "t"), [(0.3, 0.5), (-0.7, 0.9), (0.9, 0.05), (-3.0, 0.6), (4.0, 0.2), (0.1, 0.999)])
def test_the_gaussians_weight_has_the_kernels_integral_over_the_box(x_t, t):
    q, alpha = torch.tensor([[1.5, -2.0]]), 0.5
    kernel = lambda a: scipy.stats.norm.pdf(x_t, (1 - t) * a, t)  # noqa: E731
    near = np.clip(x_t / (1 - t), -1, 1)
    integral = scipy.integrate.quad(kernel, -1, 1, points=[near] if abs(near) < 1 else None, epsabs=0)[0]
    x = torch.tensor([[x_t, 0.2]])  # the second dimension alike, by SciPy's distribution function
    other = scipy.stats.norm(0.2 / (1 - t), t / (1 - t))
    expected = q / alpha + math.log(integral) + math.log((other.cdf(1) - other.cdf(-1)) / (1 - t))
    found = q / alpha + mfpo.gaussian_log_mass(x, torch.tensor([[t]]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_all_proposals_pooled_come_nearer_to_quadrature_where_the_policy_misses_a_mode():
    """Two modes; the policy's samples are all at the first one, and by its effective sample size it would count."""
    t, x_t = 0.6, 0.1
    log_q = lambda a: np.logaddexp(-50 * (a - 0.5) ** 2, 0.5 - 50 * (a + 0.5) ** 2)  # noqa: E731
    grid = np.linspace(-1, 1, 20_001)
    density = np.exp(log_q(grid)) * scipy.stats.norm.pdf(x_t, (1 - t) * grid, t)
    exact = ((x_t - grid) / t * density).sum() / density.sum()
    rng, size = np.random.default_rng(0), 200_000
    policy = scipy.stats.truncnorm(-15, 5, 0.5, 0.1)  # on [-1, 1]
    kernel = scipy.stats.truncnorm((-1 - x_t / (1 - t)) / 1.5, (1 - x_t / (1 - t)) / 1.5, x_t / (1 - t), 1.5)
    samples = [torch.from_numpy(p.rvs(size, random_state=rng))[None] for p in (policy, kernel)]  # float64
    x, time = torch.tensor([[x_t]]).double(), torch.tensor([[t]]).double()
    values = [torch.from_numpy(log_q(a.numpy())) for a in samples]
    log_prob = torch.from_numpy(policy.logpdf(samples[0].numpy()))
    weights = [
        mfpo.policy_log_weights(values[0], log_prob, x, samples[0][..., None], time, 1.0),
        values[1] + mfpo.gaussian_log_mass(x, time),
    ]
    estimates = [mfpo.snis_velocity(w, x, a[..., None], time) for w, a in zip(weights, samples, strict=True)]
    share = (weights[0].logsumexp(1, True) - weights[1].logsumexp(1, True)).sigmoid()
    pooled = share * estimates[0][0] + (1 - share) * estimates[1][0]
    by_ess = sum(v * ess for v, ess in estimates) / sum(ess for _, ess in estimates)
    # One estimate from the two sets of samples; the mode that half of them miss still has too little.
    union, _ = mfpo.snis_velocity(torch.cat(weights, 1), x, torch.cat(samples, 1)[..., None], time)
    torch.testing.assert_close(pooled, union, rtol=1e-6, atol=1e-6)
    assert abs(pooled.item() - exact) < 0.5 * abs(by_ess.item() - exact)


def test_log_prob_equals_the_change_of_variables_for_a_flow_whose_average_divergence_is_known():
    """For u = c x, x_0 = x_1 - c x_1 has log-density log N(x_1) - d log(1 - c); -d log(1 - c) is the average of div."""
    c, d = 0.4, 3
    noise = torch.randn(5, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    velocity = lambda obs, x, r, t: c * x  # noqa: E731
    average_divergence = lambda obs, x, r, t: torch.full_like(x[..., :1], -d * math.log(1 - c))  # noqa: E731
    action, trajectory = mfpo.sample_flow(velocity, None, noise, 1)
    log_prob = mfpo.flow_log_prob(average_divergence, None, trajectory)
    expected = scipy.stats.norm(scale=1 - c).logpdf(action.numpy()).sum(-1)
    np.testing.assert_allclose(log_prob.numpy(), expected, rtol=1e-10)


def test_average_divergence_network_learns_the_exact_log_prob():
    """Trained by its own loss on a frozen linear flow, the ADN gives the exact log-density of the sampler.

    The flow from N(0, I) to N(0, s^2 I) has the marginal velocity v = x (t - s^2 (1 - t)) / sigma_t^2 with sigma_t^2 =
    s^2 (1 - t)^2 + t^2, hence x_r = x_t sigma_r / sigma_t and the average velocity (x_t - x_r) / (t - r).
    """
    s, d = 0.5, 2
    sigma = lambda t: (s**2 * (1 - t) ** 2 + t**2).sqrt()  # noqa: E731

    def flow(obs, x, r, t):
        instantaneous = x * (t - s**2 * (1 - t)) / sigma(t) ** 2
        interval = torch.where(t - r > 1e-6, t - r, torch.ones_like(t))
        return torch.where(t - r > 1e-6, x * (1 - sigma(r) / sigma(t)) / interval, instantaneous)

    torch.manual_seed(0)
    args = mfpo.Args(learning_rate=2e-3, time_distribution="uniform", data_proportion=0.25)
    agent = mfpo.Agent(1, d, args, torch.device("cpu"))
    obs = torch.zeros(64, 1)
    updates = 400
    # Orthogonal probes, whose mean is the exact trace: the noise of normal ones leaves a bias that varies by the seed.
    probes = math.sqrt(d) * torch.eye(d)[:, None].expand(d, 64, d)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(agent.divergence_optimizer, updates)
    for _ in range(updates):
        t, r = mfpo.sample_times(64, 0.25, "uniform", torch.device("cpu"))
        x_t = sigma(t) * torch.randn(64, d)
        velocity, divergence = mfpo.hutchinson_divergence(lambda x, t=t: flow(obs, x, t, t), x_t, probes)
        loss = mfpo.meanflow_loss(
            partial(agent.divergence, obs), x_t=x_t, r=r, t=t, velocity=velocity, instantaneous=divergence
        ).mean()
        agent.divergence_optimizer.zero_grad()
        loss.backward()
        agent.divergence_optimizer.step()
        schedule.step()
    with torch.no_grad():
        action, trajectory = mfpo.sample_flow(flow, torch.zeros(2000, 1), torch.randn(2000, d), 2)
        log_prob = mfpo.flow_log_prob(agent.divergence, torch.zeros(2000, 1), trajectory)
    exact = scipy.stats.norm(scale=s).logpdf(action.numpy()).sum(-1)
    untrained_error = abs(scipy.stats.norm().logpdf(action.numpy() / s).sum(-1) - exact).mean()
    assert untrained_error > 1.0  # without the divergence term the log-density would be 2 log 2 off
    assert np.abs(log_prob.numpy() - exact).mean() < 0.05


def test_hutchinson_divergence_is_unbiased():
    actor = small_flow()
    obs, x = torch.randn(3, 3).double(), torch.randn(3, 2).double()
    t = torch.full((3, 1), 0.3).double()
    value, estimate = mfpo.hutchinson_divergence(
        lambda x: actor(obs, x, t, t), x, torch.randn(4000, 3, 2, generator=torch.Generator().manual_seed(0)).double()
    )
    for row in range(3):
        field = lambda y, row=row: actor(obs[row], y, t[row], t[row])  # noqa: E731
        trace = torch.autograd.functional.jacobian(field, x[row]).trace()
        assert estimate[row].item() == pytest.approx(trace.item(), abs=0.1)
    torch.testing.assert_close(value, actor(obs, x, t, t))
    # Probes at +-sqrt(d) e_i give the trace itself.
    basis = math.sqrt(2) * torch.eye(2).double()[:, None].expand(2, 3, 2).clone()
    _, exact = mfpo.hutchinson_divergence(lambda x: actor(obs, x, t, t), x, basis)
    traces = [
        torch.autograd.functional.jacobian(lambda y, i=i: actor(obs[i], y, t[i], t[i]), x[i]).trace() for i in range(3)
    ]
    torch.testing.assert_close(exact[:, 0], torch.stack(traces))


def test_meanflow_loss_is_the_distance_to_a_finite_difference_along_the_flow():
    actor = small_flow()
    obs, x, velocity = torch.randn(6, 3).double(), torch.randn(6, 2).double(), torch.randn(6, 2).double()
    r, t = torch.full((6, 1), 0.2).double(), torch.full((6, 1), 0.7).double()
    network = lambda x, r, t: actor(obs, x, r, t)  # noqa: E731
    with torch.no_grad():
        h = 1e-5
        derivative = (network(x + h * velocity, r, t + h) - network(x - h * velocity, r, t - h)) / (2 * h)
        expected = ((network(x, r, t) - velocity + 0.5 * derivative) ** 2).sum(-1)
    loss = mfpo.meanflow_loss(network, x_t=x, r=r, t=t, velocity=velocity, instantaneous=velocity)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)


def test_meanflow_identity_holds_for_a_flow_with_known_average_velocity():
    """dx/dt = x has x_r = x_t e^(r-t): average velocity x_t (1 - e^(r-t)) / (t - r) is its own target."""
    x = torch.randn(8, 2).double()
    r, t = torch.full((8, 1), 0.1).double(), torch.full((8, 1), 0.9).double()
    average = lambda x, r, t: x * (1 - torch.exp(r - t)) / (t - r)  # noqa: E731
    loss = mfpo.meanflow_loss(average, x_t=x, r=r, t=t, velocity=x, instantaneous=x)
    torch.testing.assert_close(loss.sqrt(), torch.zeros(8).double())


@pytest.mark.parametrize("t", [0.02, 0.1, 0.3, 0.7, 0.98])
@pytest.mark.parametrize("x_t", [-3.0, -0.99, 0.0, 0.5, 1.0, 2.5])
def test_truncated_normal_against_scipy(t, x_t):
    mean, std = x_t / (1 - t), t / (1 - t)
    uniform = torch.linspace(0.001, 0.999, 201, dtype=torch.float64)
    samples = mfpo.truncated_normal(torch.tensor(mean).double(), torch.tensor(std).double(), uniform).numpy()
    assert np.isfinite(samples).all() and (np.abs(samples) <= 1).all()
    if (abs(mean) - 1) / std > 35:  # beyond float64's distribution function: everything at the near face
        assert (samples == np.sign(mean)).all()
        return
    reference = scipy.stats.truncnorm((-1 - mean) / std, (1 - mean) / std, loc=mean, scale=std)
    expected = reference.ppf(uniform.numpy() if mean >= 0 else 1 - uniform.numpy())  # reflected where mean < 0
    np.testing.assert_allclose(samples, expected, atol=2e-6)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_snis_velocity_against_quadrature_in_one_dimension(t):
    q = lambda a: np.exp(-((a - 0.5) ** 2) / 0.1) + 0.5 * np.exp(-((a + 0.6) ** 2) / 0.05)  # noqa: E731
    alpha, x_t = 0.3, 0.4
    density = lambda a: np.exp(q(a) / alpha - (x_t - (1 - t) * a) ** 2 / (2 * t**2))  # noqa: E731
    z = scipy.integrate.quad(density, -1, 1, limit=200)[0]
    mean = scipy.integrate.quad(lambda a: a * density(a), -1, 1, limit=200)[0] / z
    exact = (x_t - mean) / t

    k, generator = 200_000, torch.Generator().manual_seed(0)
    x, time = torch.tensor([[x_t]]), torch.tensor([[t]])
    uniform = torch.rand(1, k, 1, dtype=torch.float64, generator=generator)
    gaussian = mfpo.truncated_normal((x / (1 - time))[:, None], (time / (1 - time))[:, None], uniform)
    log_weights = torch.from_numpy(q(gaussian[..., 0].numpy())) / alpha
    v_gaussian, ess = mfpo.snis_velocity(log_weights.float(), x, gaussian, time)
    assert v_gaussian.item() == pytest.approx(exact, abs=0.01 / t)
    assert 1 <= ess.item() <= k

    policy = torch.rand(1, k, 1, generator=generator) * 2 - 1  # uniform: log pi = -log 2
    log_weights = mfpo.policy_log_weights(
        torch.from_numpy(q(policy[..., 0].numpy())).float(), torch.full((1, k), -math.log(2)), x, policy, time, alpha
    )
    v_policy, _ = mfpo.snis_velocity(log_weights, x, policy, time)
    assert v_policy.item() == pytest.approx(exact, abs=0.01 / t)


def test_the_grid_that_proposals_py_compares_with_against_scipy(monkeypatch):
    """Q / alpha of a Gaussian: then a_0 given x_t is Gaussian too, truncated to the box."""
    middle, std, alpha = torch.tensor([0.6, -0.3]), 0.4, 0.05
    agent, obs = agent_with(), torch.zeros(1, 3)

    def q_value(qf1, qf2, obs, actions):
        return obs.sum(-1) - alpha * ((actions - middle) ** 2).sum(-1) / (2 * std**2)

    monkeypatch.setattr(agent, "q_value", q_value)
    actions, q = grid_of_q(agent, obs)
    t = torch.tensor([[0.1], [0.5], [0.9]])
    x_t = torch.tensor([[0.9, -0.4], [0.2, 0.8], [-1.5, 0.1]])
    variance = 1 / (1 / std**2 + ((1 - t) / t) ** 2)
    mean = variance * (middle / std**2 + (1 - t) * x_t / t**2)
    low, high = (-1 - mean) / variance.sqrt(), (1 - mean) / variance.sqrt()
    expected = scipy.stats.truncnorm.mean(low, high, mean, variance.sqrt())
    np.testing.assert_allclose(exact_means(q[0], actions, x_t, t, alpha), expected, atol=1e-3)


def test_the_log_probs_that_likelihood_py_compares_in_closed_form():
    """A linear field, c x at r = t, shrinks noise by e^-c; a map with another rate, g x, by (1 - g / T)^T."""
    c, g, delta, steps = torch.tensor([0.8, -0.5]), torch.tensor([1.2, 0.3]), 0.7, 4

    class Linear(torch.nn.Module):
        def forward(self, obs, x, r, t):
            return torch.where(r == t, c, g) * x

    class Constant(torch.nn.Module):
        def forward(self, obs, x, r, t):
            return torch.full_like(x[:, :1], delta)

    agent = agent_with(sampling_steps=steps)
    agent.actor, agent.divergence = Linear(), Constant()
    noise = torch.randn(30, 2)
    normal = torch.from_numpy(scipy.stats.norm.logpdf(noise).sum(-1)).float()
    logs = log_probs(agent, torch.zeros(30, 3), noise)
    torch.testing.assert_close(logs["network"], normal + delta)
    torch.testing.assert_close(logs["field"], normal + c.sum(), atol=0.01, rtol=0)  # 64 Euler steps
    torch.testing.assert_close(logs["map"], normal - steps * (1 - g / steps).log().sum())
    assert "network" not in log_probs(agent_with(likelihood="exact"), torch.zeros(30, 3), noise)

    torch.manual_seed(1)
    found = agent.diagnostics(torch.zeros(30, 3))
    torch.manual_seed(1)
    gap = ((1 - g / steps) ** steps - (1 - c / 64) ** 64) * torch.randn(30, 2)
    assert found["diagnostics/flow_gap"] == pytest.approx(gap.norm(dim=1).mean().item(), rel=1e-4)
    bias = delta + steps * (1 - g / steps).log().sum().item()  # the same at each noise
    assert bias < -1 and found["diagnostics/adn_log_prob_bias"] == pytest.approx(bias, rel=1e-4)
    assert found["diagnostics/adn_log_prob_error"] == pytest.approx(-bias, rel=1e-4)


def test_states_of_a_run_are_those_that_were_acted_on(tmp_path):
    """Rows that only end an episode, and the rest of the rings, are none."""
    agent, buffer = agent_with(), mfpo.ReplayBuffer(12, 1, 3, 2, torch.device("cpu"))
    zero, acted_on = np.zeros(1, np.float32), list(range(1, 21))
    for step in acted_on:
        obs = np.full((1, 3), step, np.float32)
        buffer.add(obs=obs, actions=np.zeros((1, 2)), rewards=zero, terminations=zero, next_obs=-obs)
    saved = {"script": "mfpo_continuous", "args": vars(agent.args), "agent": agent.state_dict()}
    torch.save(saved | {"buffer": buffer.state_dict()}, tmp_path / "checkpoint.pt")
    loaded, obs = load(tmp_path, 500)
    assert sorted(set(obs[:, 0].tolist())) == acted_on[-buffer.num_rows :]
    torch.testing.assert_close(loaded.state_dict(), agent.state_dict())


def test_snis_velocity_against_quadrature_in_two_dimensions():
    """A non-uniform policy proposal N(0, 0.5^2), so that a wrong sign of log pi shows."""
    t, alpha, x_t = 0.6, 0.5, np.array([0.2, -0.3])
    q = lambda a: np.exp(-((a[..., 0] - 0.5) ** 2 + (a[..., 1] + 0.5) ** 2) / 0.2)  # noqa: E731
    grid = np.linspace(-1, 1, 801)
    grid = np.stack(np.meshgrid(grid, grid, indexing="ij"), -1)
    density = np.exp(q(grid) / alpha - ((x_t - (1 - t) * grid) ** 2).sum(-1) / (2 * t**2))
    exact = (x_t - (grid * density[..., None]).sum((0, 1)) / density.sum()) / t

    k = 400_000
    noise = torch.randn(1, k, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.5
    log_prob = torch.from_numpy(scipy.stats.norm(scale=0.5).logpdf(noise.numpy()).sum(-1))
    x, time = torch.from_numpy(x_t)[None], torch.tensor([[t]]).double()
    values = torch.from_numpy(np.where((np.abs(noise.numpy()) <= 1).all(-1), q(noise.numpy()), -np.inf))
    log_weights = mfpo.policy_log_weights(values, log_prob, x, noise, time, alpha)
    velocity, _ = mfpo.snis_velocity(log_weights, x, noise, time)
    np.testing.assert_allclose(velocity[0].numpy(), exact, atol=0.01)


def test_effective_sample_size_of_equal_and_of_degenerate_weights():
    x, actions, t = torch.zeros(2, 1), torch.zeros(2, 8, 1), torch.full((2, 1), 0.5)
    log_weights = torch.stack([torch.zeros(8), torch.tensor([1000.0] + [0.0] * 7)])
    _, ess = mfpo.snis_velocity(log_weights, x, actions, t)
    torch.testing.assert_close(ess[:, 0], torch.tensor([8.0, 1.0]))


def test_categorical_projection_against_a_loop():
    rng = np.random.default_rng(0)
    n, v_min, v_max = 11, -5.0, 5.0
    probs, atoms = rng.dirichlet(np.ones(n), size=20), rng.uniform(-8, 8, size=(20, n))
    atoms[0] = np.linspace(v_min, v_max, n)  # exactly on the support: nothing may move
    projected = mfpo.project_categorical(torch.from_numpy(probs), torch.from_numpy(atoms), v_min, v_max).numpy()
    expected, support = np.zeros((20, n)), np.linspace(v_min, v_max, n)
    for row in range(20):
        for p, z in zip(probs[row], np.clip(atoms[row], v_min, v_max), strict=True):
            for j in range(n):
                expected[row, j] += p * max(0.0, 1 - abs(z - support[j]) / (support[1] - support[0]))
    np.testing.assert_allclose(projected, expected, atol=1e-12)
    np.testing.assert_allclose(projected.sum(1), 1)
    np.testing.assert_allclose(projected @ support, (probs * np.clip(atoms, v_min, v_max)).sum(1))
    np.testing.assert_allclose(projected[0], probs[0], atol=1e-12)


def test_time_pairs():
    torch.manual_seed(0)
    t, r = mfpo.sample_times(40_000, 0.75, "logit_normal", torch.device("cpu"))
    assert (t >= r).all() and (t == r).float().mean().item() == pytest.approx(0.75, abs=1e-3)
    logit_normal = torch.sigmoid(torch.tensor(scipy.stats.norm(-0.4, 1).rvs((2, 100_000), random_state=0)))
    assert t.mean().item() == pytest.approx(logit_normal.amax(0).mean().item(), abs=0.005)
    assert r[30_000:].mean().item() == pytest.approx(logit_normal.amin(0).mean().item(), abs=0.01)
    for draw in (partial(mfpo.sample_times, distribution="uniform"), smfp.sample_times):
        t, r = draw(40_000, 0.25, device=torch.device("cpu"))
        assert (t >= r).all() and (t == r).float().mean().item() == pytest.approx(0.25, abs=1e-3)
        assert scipy.stats.kstest(t[:, 0], lambda x: x**2).statistic < 0.01  # the larger of two uniform numbers
        assert scipy.stats.kstest(r[10_000:, 0], lambda x: 1 - (1 - x) ** 2).statistic < 0.01  # the smaller
    t, r = mfpo.sample_times(40_000, 0.25, "uniform", torch.device("cpu"))
    assert r.min() > 0 and t.max() < 1  # the proposals divide by t and 1 - t


def test_best_of_n_plays_the_candidate_with_the_highest_target_value():
    torch.manual_seed(0)
    agent = mfpo.Agent(3, 2, mfpo.Args(), torch.device("cpu"))
    obs = torch.randn(5, 3)
    with torch.random.fork_rng(), torch.no_grad():
        noise = torch.randn(5, 10, 2)
        candidates, _ = mfpo.sample_flow(agent.actor, obs[:, None], noise, 2)
        candidates = candidates.clamp(-1, 1)
        means = [qf(obs[:, None], candidates).softmax(-1) @ agent.atoms for qf in (agent.qf1_target, agent.qf2_target)]
        best = torch.minimum(*means).argmax(1)
    torch.testing.assert_close(agent.eval_actions(obs), candidates[torch.arange(5), best])


@pytest.mark.parametrize("scale", [0.1, 5.0])
def test_squashed_gaussian_against_torch_distributions(scale):
    torch.manual_seed(0)
    mean, log_std, noise = (
        scale * torch.randn(64, 3).double(),
        -torch.rand(64, 3).double(),
        torch.randn(64, 3).double(),
    )
    action, log_prob = sac.squashed_gaussian(mean, log_std, noise)
    base = torch.distributions.Normal(mean, log_std.exp())
    squashed = torch.distributions.TransformedDistribution(
        base, torch.distributions.transforms.TanhTransform(cache_size=1)
    )
    squashed.transforms[0]._cached_x_y = (mean + log_std.exp() * noise, action)
    torch.testing.assert_close(log_prob, squashed.log_prob(action).sum(-1))


@pytest.mark.parametrize("script", ["sac_continuous", "smfp_continuous"])
def test_soft_td_target(script):
    one, module = torch.ones(2), importlib.import_module(script)
    target = module.soft_td_target(one, torch.tensor([0.0, 1.0]), 5 * one, -2 * one, torch.tensor(0.5), 0.9)
    torch.testing.assert_close(target, torch.tensor([1 + 0.9 * (5 + 0.5 * 2), 1.0]))


def test_exact_log_prob_against_brute_force_jacobians():
    actor = small_flow(action_dim=3)
    obs, noise = torch.randn(4, 2, 3).double(), torch.randn(4, 2, 3).double()
    with torch.no_grad():
        log_prob = mfpo.exact_log_prob(lambda e: mfpo.sample_flow(actor, obs, e, 3)[0], noise)
    for i in range(4):
        for j in range(2):
            sampler = lambda e, i=i, j=j: mfpo.sample_flow(actor, obs[i, j], e, 3)[0]  # noqa: E731
            jacobian = torch.autograd.functional.jacobian(sampler, noise[i, j])
            expected = scipy.stats.norm.logpdf(noise[i, j]).sum() - math.log(abs(np.linalg.det(jacobian)))
            assert log_prob[i, j].item() == pytest.approx(expected, abs=1e-6)


def test_exact_log_prob_against_the_density_of_samples_in_one_dimension():
    """The share of 100,000 samples in each bin, against the density's integral over the bin."""
    torch.manual_seed(0)
    actor = small_flow(action_dim=1)
    obs = torch.randn(3).double()
    sampler = lambda e: mfpo.sample_flow(actor, obs, e, 2)[0]  # noqa: E731
    with torch.no_grad():
        samples = sampler(torch.randn(100_000, 1).double())[:, 0]
        noise = torch.linspace(-6, 6, 20_001).double()[:, None]
        x, density = sampler(noise)[:, 0], mfpo.exact_log_prob(sampler, noise).exp()
    assert (x.diff() > 0).all()  # the map is monotone, so that x is a grid to integrate on
    edges = np.quantile(samples, np.linspace(0.02, 0.98, 25))
    cdf = scipy.integrate.cumulative_trapezoid(density, x, initial=0)
    assert cdf[-1] == pytest.approx(1, abs=1e-4)
    shares = np.diff(np.interp(edges, x, cdf))
    np.testing.assert_allclose(shares, np.histogram(samples, edges)[0] / len(samples), atol=0.004)


def batch():
    torch.manual_seed(7)
    obs, next_obs = torch.randn(2, 40, 3)
    return obs, torch.rand(40, 2) * 2 - 1, torch.randn(40), (torch.rand(40) < 0.2).float(), next_obs


def agent_with(**flags):
    """The same weights, whatever the flags; the second network of each pair differs from the first."""
    torch.manual_seed(0)
    return mfpo.Agent(3, 2, mfpo.Args(policy_proposals=4, gaussian_proposals=6, **flags), torch.device("cpu"))


def estimate(agent):
    obs, t = batch()[0], torch.linspace(0.1, 0.9, 40 * agent.args.noised_actions).view(40, -1, 1)
    torch.manual_seed(1)
    return agent.estimate_velocity(obs, t, torch.tensor(0.5))._asdict()


@pytest.mark.parametrize(("points", "v_max"), [(1, 2.0), (3, 3.0)])
def test_velocity_estimate_against_a_loop(points, v_max):
    """Draw by draw, with SciPy's truncated normal; the live critics judge, so other targets make no difference."""
    # Q / alpha is of order 1, so that several proposals count.
    agent = agent_with(v_min=-v_max, v_max=v_max, noised_actions=points)
    with torch.no_grad():
        for p in agent.q_target_parameters:
            p.add_(torch.randn_like(p))
    found = estimate(agent)
    obs, t = batch()[0], np.linspace(0.1, 0.9, 40 * points).reshape(40, points)
    torch.manual_seed(1)
    noise, eps = torch.randn(40, 4, 2), torch.randn(40, points, 2).numpy()
    uniform = torch.rand(40, points, 6, 2, dtype=torch.float64).numpy()
    softmax_mean = lambda logits: scipy.special.softmax(logits) @ np.linspace(-v_max, v_max, 101)  # noqa: E731

    def q_over_alpha(s, a):
        a = torch.tensor(a, dtype=torch.float32)
        return min(softmax_mean(qf(s, a).double().numpy()) for qf in (agent.qf1, agent.qf2)) / 0.5

    def combine(log_weights, actions, x, time):
        w = scipy.special.softmax(log_weights)
        return (w @ (x - actions)) / time, 1 / (w @ w)

    with torch.no_grad():
        for b, j in itertools.product((0, 20, 39), range(points)):
            unclipped, trajectory = mfpo.sample_flow(agent.actor, obs[b], noise[b], 2)
            log_pi = mfpo.flow_log_prob(agent.divergence, obs[b], trajectory).numpy()
            a = np.clip(unclipped.numpy(), -1, 1)
            time = t[b, j]
            x = (1 - time) * a[j] + time * eps[b, j]
            kernel = [scipy.stats.norm((1 - time) * a_k, time).logpdf(x).sum() for a_k in a]
            v_1, ess_1 = combine([q_over_alpha(obs[b], a_k) for a_k in a] + np.array(kernel) - log_pi, a, x, time)
            mean, std = x / (1 - time), time / (1 - time)
            quantile = np.where(mean < 0, 1 - uniform[b, j], uniform[b, j])  # reflected there
            drawn = scipy.stats.truncnorm((-1 - mean) / std, (1 - mean) / std, mean, std).ppf(quantile)
            v_2, ess_2 = combine([q_over_alpha(obs[b], a_k) for a_k in drawn], drawn, x, time)
            expected = {"x_t": x, "ess_policy": ess_1, "ess_gaussian": ess_2, "policy_weight": ess_1 / (ess_1 + ess_2)}
            expected["velocity"] = (ess_1 * v_1 + ess_2 * v_2) / (ess_1 + ess_2)
            for name, value in expected.items():
                np.testing.assert_allclose(found[name][b, j], value, rtol=1e-3, atol=1e-4, err_msg=name)
    assert 1.2 < ess_1 < 3.8 and 1.2 < ess_2 < 5.9  # of 4 and 6: in the last one all count


def test_target_critics_move_by_tau_and_the_divergence_follows_the_policy_as_it_is_now(monkeypatch):
    agent, seen = agent_with(tau=0.25, policy_tau=0.5), []
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    real = mfpo.hutchinson_divergence

    def recorded(*arguments):
        seen.append([p.clone() for p in agent.slow_actor.parameters()])
        return real(*arguments)

    monkeypatch.setattr(mfpo, "hutchinson_divergence", recorded)
    agent.update(*batch())
    after = agent.state_dict()
    for name in agent.qf1.state_dict():
        for qf in ("qf1", "qf2"):
            expected = before[f"{qf}_target.{name}"].lerp(after[f"{qf}.{name}"], 0.25)
            torch.testing.assert_close(after[f"{qf}_target.{name}"], expected)
    (then,) = seen
    now = [*agent.slow_actor.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(then, now, strict=True))
    assert not torch.equal(now[0], before["slow_actor.embed_t.frequencies"])


def test_proposals_flag_changes_the_velocity_and_nothing_else():
    both, policy, gaussian = (estimate(agent_with(proposals=name)) for name in ("both", "policy", "gaussian"))
    share = both["ess_policy"] / (both["ess_policy"] + both["ess_gaussian"])
    torch.testing.assert_close(both["velocity"], share * policy["velocity"] + (1 - share) * gaussian["velocity"])
    for name in both.keys() - {"velocity", "policy_weight"}:
        assert torch.equal(both[name], policy[name]) and torch.equal(both[name], gaussian[name])
    assert (policy["velocity"] - gaussian["velocity"]).abs().max() > 0.01
    assert (policy["policy_weight"] == 1).all() and (gaussian["policy_weight"] == 0).all()


def test_likelihood_flag_changes_log_pi_and_what_follows_from_it():
    adn, exact, none = (estimate(agent_with(likelihood=x, autotune=False)) for x in ("adn", "exact", "none"))
    assert torch.equal(adn["a_0"], exact["a_0"]) and torch.equal(adn["a_0"], none["a_0"])
    assert (none["log_prob"] == 0).all() and (exact["log_prob"] - adn["log_prob"]).abs().max() > 0.01
    agent = agent_with(likelihood="exact")
    torch.manual_seed(1)
    noise = torch.randn(40, 4, 2)
    with torch.no_grad():
        for i in range(3):
            sampler = lambda e, i=i: mfpo.sample_flow(agent.actor, batch()[0][i], e, 2)[0]  # noqa: E731
            jacobian = torch.autograd.functional.jacobian(sampler, noise[i, 0])
            expected = scipy.stats.norm.logpdf(noise[i, 0]).sum() - jacobian.det().abs().log().item()
            assert exact["log_prob"][i, 0].item() == pytest.approx(expected, abs=1e-4)
    flags = {"autotune": False, "proposals": "gaussian"}
    with_adn, without = (estimate(agent_with(likelihood=name, **flags)) for name in ("adn", "none"))
    assert torch.equal(with_adn["velocity"], without["velocity"])  # log pi is not in that proposal's weights


@pytest.mark.parametrize("likelihood", ["adn", "map", "exact", "none"])
def test_the_critics_target_holds_the_entropy_of_the_likelihood_in_use(likelihood):
    """Transitions that pay 0 and go on, all target critics' mass at 0: the target's mean is -gamma alpha log pi."""
    agent = agent_with(likelihood=likelihood, autotune=False, alpha=100.0, v_min=-1000, v_max=1000, gamma=0.5)
    with torch.no_grad():
        for qf in (agent.qf1_target, agent.qf2_target):
            qf.rest[-1].weight.zero_()
            qf.rest[-1].bias.copy_(torch.where(agent.atoms == 0, 100.0, 0.0))
    obs, actions, _, _, next_obs = batch()
    targets = []
    cross_entropy = torch.nn.functional.cross_entropy

    def recorded(logits, target):
        targets.append(target)
        return cross_entropy(logits, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mfpo.F, "cross_entropy", recorded)
        divergence_before = [p.clone() for p in agent.divergence.parameters()]
        noise_agent = agent_with(likelihood=likelihood, autotune=False)
        torch.manual_seed(1)
        metrics = agent.update(obs, actions, torch.zeros(40), torch.zeros(40), next_obs)
    torch.manual_seed(1)
    noise = torch.randn(40, 2)
    with torch.no_grad():
        _, trajectory = mfpo.sample_flow(noise_agent.actor, next_obs, noise, 2)
        log_prob = {
            "adn": mfpo.flow_log_prob(noise_agent.divergence, next_obs, trajectory),
            "map": mfpo.flow_log_prob(noise_agent.divergence, next_obs, trajectory),
            "exact": mfpo.exact_log_prob(lambda e: noise_agent.sampler(next_obs, e)[0], noise),
            "none": torch.zeros(40),
        }[likelihood]
    torch.testing.assert_close(targets[0] @ agent.atoms, -0.5 * 100 * log_prob, rtol=1e-3, atol=0.05)
    trained = any((p != q).any() for p, q in zip(agent.divergence.parameters(), divergence_before, strict=True))
    assert trained == ("losses/divergence_loss" in metrics) == (likelihood in ("adn", "map"))
    assert ("diagnostics/entropy" in metrics) == (likelihood != "none")


def test_without_meanflow_the_sampler_is_euler_and_the_regression_is_on_the_instantaneous_velocity():
    agent = agent_with(meanflow=False)
    obs, noise = batch()[0], torch.randn(40, 2)
    with torch.no_grad():
        x, _ = mfpo.sample_flow(agent.actor, obs, noise, 3, meanflow=False)
        expected = noise
        for t in (1.0, 2 / 3, 1 / 3):
            time = torch.full((40, 1), t)
            expected = expected - agent.actor(obs, expected, time, time) / 3
        torch.testing.assert_close(x, expected)
        t, r = mfpo.sample_times(40, agent.data_proportion, "logit_normal", torch.device("cpu"))
        assert torch.equal(t, r)
        velocity = torch.randn(40, 2)
        loss = mfpo.meanflow_loss(
            partial(agent.actor, obs), x_t=noise, r=r, t=t, velocity=velocity, instantaneous=velocity
        )
        torch.testing.assert_close(loss, ((agent.actor(obs, noise, t, t) - velocity) ** 2).sum(-1))


def test_clipped_double_q_takes_the_smaller_mean_and_otherwise_the_average():
    clipped, average = agent_with(), agent_with(clipped_double_q=False)
    obs, actions = batch()[:2]
    with torch.no_grad():
        q1, q2 = (qf(obs, actions).softmax(-1) @ clipped.atoms for qf in (clipped.qf1, clipped.qf2))
        for agent, expected in ((clipped, torch.minimum(q1, q2)), (average, (q1 + q2) / 2)):
            torch.testing.assert_close(agent.q_value(agent.qf1, agent.qf2, obs, actions), expected)


def test_new_critics_predict_the_same_narrow_return_everywhere_if_asked():
    obs, actions = batch()[:2]
    for std in (32.0, 100.0):  # the atoms are 32 apart
        agent = agent_with(critic_init_std=std)
        for qf in (agent.qf1, agent.qf2, agent.qf1_target, agent.qf2_target):
            probs = qf(obs, actions).softmax(-1)
            # Student's t of 3 degrees of freedom, scaled to this standard deviation, at the atoms.
            expected = scipy.stats.t(3, scale=std / math.sqrt(3)).pdf(agent.atoms.numpy())
            np.testing.assert_allclose(probs.detach(), np.tile(expected / expected.sum(), (len(obs), 1)), rtol=1e-4)
    spread = agent_with().update(*batch())["diagnostics/q_std"]
    assert spread == pytest.approx(3200 / math.sqrt(12), rel=0.1)  # by default about uniform on [-1600, 1600]


def test_new_networks_have_xavier_weights_no_biases_and_slow_frequencies():
    agent = agent_with()
    for layer in agent.modules():
        if isinstance(layer, torch.nn.Linear):
            bound = math.sqrt(6 / (layer.in_features + layer.out_features))
            assert 0.9 * bound < layer.weight.abs().max() <= bound and (layer.bias == 0).all()
    embeddings = [net.get_submodule(f"embed_{x}") for net in (agent.actor, agent.divergence) for x in ("t", "interval")]
    frequencies = torch.stack([embedding.frequencies for embedding in embeddings])
    assert len(frequencies.unique()) == 4 * 64 and frequencies.std().item() == pytest.approx(0.2, rel=0.15)


@pytest.mark.parametrize(("support", "warned"), [({}, False), ({"v_min": -1.0, "v_max": 1.0}, True)])
def test_critics_that_learn_a_return_outside_their_support_are_warned_of_once(support, warned, capsys):
    """Every return is 5: near an atom of the paper's support, and beyond the edge of the other."""
    mfpo.warn.cache_clear()
    agent, (obs, actions, _, _, next_obs) = agent_with(learning_rate=1e-2, **support), batch()
    agent.diagnostics(obs)
    assert capsys.readouterr().out == ""  # new critics have a little of their mass there
    for _ in range(100):
        agent.update(obs, actions, torch.full((40,), 5.0), torch.ones(40), next_obs, with_policy=False)
    for _ in range(2):
        agent.diagnostics(obs)
    out = capsys.readouterr().out
    assert out.count("the critics' support [-1.0, 1.0] is too narrow; see --v-min, --v-max") == warned
    assert out.count("warning") == warned


def test_how_much_q_tells_random_actions_apart(monkeypatch):
    agent, obs = agent_with(), batch()[0]
    monkeypatch.setattr(agent, "q_value", lambda qf1, qf2, obs, actions: 3 * actions.sum(-1) + 100 * obs.sum(-1))
    expected = 3 * math.sqrt(agent.action_dim / 3)  # a uniform number in [-1, 1] has the variance 1 / 3
    assert agent.diagnostics(obs)["diagnostics/q_action_std"] == pytest.approx(expected, rel=0.1)


def test_a_fixed_temperature_stays_and_a_learned_one_moves_towards_rho():
    for rho, moves in ((50.0, -1), (-50.0, 1)):  # entropy above its target -rho d: alpha falls; below: it rises
        agent = agent_with(rho=rho)
        agent.update(*batch())
        assert (agent.log_alpha.item() - math.log(0.01)) * moves > 1e-4
    agent = agent_with(autotune=False)
    agent.update(*batch())
    assert agent.log_alpha.item() == pytest.approx(math.log(0.01))
