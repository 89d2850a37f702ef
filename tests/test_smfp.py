"""SMFP's equations against something independent: a closed form, quadrature, SciPy, NumPy or a finite difference."""

import copy
import itertools
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.stats
import torch

import smfp_continuous as smfp

CPU = torch.device("cpu")


def test_mixture_log_prob_against_scipy():
    torch.manual_seed(0)
    y, mean, log_std = torch.randn(2, 3, 2), torch.randn(2, 4, 2), torch.randn(2, 4, 2)
    log_prob = smfp.mixture_log_prob(y, mean, log_std)
    for b in range(2):
        for n in range(3):
            components = [
                scipy.stats.multivariate_normal(mean[b, j], np.diag(np.exp(2 * log_std[b, j].numpy()))).pdf(y[b, n])
                for j in range(4)
            ]
            assert log_prob[b, n].item() == pytest.approx(math.log(np.mean(components)), abs=1e-4)


def test_tanh_log_det_against_the_derivative():
    y = torch.linspace(-8, 8, 41, dtype=torch.float64)
    derivative = torch.func.vmap(torch.func.grad(torch.tanh))(y)
    torch.testing.assert_close(smfp.tanh_log_det(y[:, None]), derivative.log())


def test_entropy_bound_rises_with_m_to_the_entropy_of_a_known_mixture():
    """Means at -1.5 and 1.5 with probability 1/2, sigma 0.4; the entropy of tanh of it by quadrature."""
    std = 0.4
    density = lambda y: 0.5 * sum(scipy.stats.norm(c, std).pdf(y) for c in (-1.5, 1.5))  # noqa: E731
    log_det = lambda y: math.log(1 - math.tanh(y) ** 2)  # noqa: E731
    entropy = scipy.integrate.quad(lambda y: density(y) * (log_det(y) - math.log(density(y))), -5, 5, limit=200)[0]
    torch.manual_seed(0)
    bounds = []
    for m in (1, 2, 4, 16, 128):
        mean = torch.where(torch.rand(200_000 // m, m, 1, dtype=torch.float64) < 0.5, -1.5, 1.5).double()
        log_std = torch.full_like(mean, math.log(std))
        y = mean + std * torch.randn_like(mean)
        bounds.append(smfp.entropy_bound(y, mean, log_std).mean().item())
    assert all(low < high for low, high in itertools.pairwise(bounds))
    assert bounds[0] < entropy - 0.5 and bounds[-1] == pytest.approx(entropy, abs=0.02)
    conditional = (
        scipy.stats.norm(scale=std).entropy()
        + scipy.integrate.quad(lambda y: density(y) * log_det(y), -5, 5, limit=200)[0]
    )
    assert bounds[0] == pytest.approx(conditional, abs=0.01)  # M = 1 is the entropy given the latent


def test_gaussian_kl_against_torch_distributions():
    torch.manual_seed(0)
    mean, log_std, mean_k, log_std_k = torch.randn(4, 5, 3)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, log_std.exp()), normal(mean_k, log_std_k.exp())).sum(-1)
    torch.testing.assert_close(smfp.gaussian_kl(mean, log_std, mean_k, log_std_k), expected)
    near = torch.tensor([[1e-4]])  # to second order the KL is the log-ratio's square, which float32 must not lose
    assert smfp.gaussian_kl(near, near, near, 0 * near).item() == pytest.approx(1e-8, rel=0.02)


def test_the_kl_with_shared_latents_is_above_the_kl_of_the_mixtures():
    """Two semi-implicit policies y = c e + sigma xi are Gaussians themselves, so both sides are known."""
    c, c_k, std, std_k = 1.0, 0.6, 0.3, 0.5
    e = torch.randn(400_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_std, log_std_k = (torch.full_like(e, math.log(x)) for x in (std, std_k))
    bound = smfp.gaussian_kl(c * e, log_std, c_k * e, log_std_k).mean().item()
    v, v_k = c**2 + std**2, c_k**2 + std_k**2
    marginal = 0.5 * (v / v_k - 1 - math.log(v / v_k))
    closed = 0.5 * (std**2 / std_k**2 + (c - c_k) ** 2 / std_k**2 - 1 - 2 * math.log(std / std_k))
    assert bound == pytest.approx(closed, abs=0.005) and bound > marginal
    y = c * e + std * torch.randn(e.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    log_ratio = scipy.stats.norm(scale=v**0.5).logpdf(y) - scipy.stats.norm(scale=v_k**0.5).logpdf(y)
    assert log_ratio.mean() == pytest.approx(marginal, abs=0.01)  # the Monte-Carlo KL
    identical = smfp.gaussian_kl(c * e, log_std, c * e, log_std)
    torch.testing.assert_close(identical, torch.zeros_like(identical))  # exact where the policies agree


def test_mirror_descent_weights_solve_the_problem_on_a_grid():
    rng = np.random.default_rng(0)
    q, previous, alpha, kl_weight = rng.normal(size=6), rng.dirichlet(np.ones(6)), 0.3, 0.2

    def objective(pi):
        return -(pi @ q - alpha * pi @ np.log(pi) - kl_weight * pi @ np.log(pi / previous))

    solved = scipy.optimize.minimize(
        objective,
        np.full(6, 1 / 6),
        bounds=[(1e-9, 1)] * 6,
        constraints={"type": "eq", "fun": lambda pi: pi.sum() - 1},
        options={"ftol": 1e-14, "maxiter": 1000},
    ).x
    weights = smfp.mirror_descent_weights(torch.tensor(q), torch.tensor(previous).log(), alpha, kl_weight).numpy()
    policy = previous * weights / (previous * weights).sum()
    np.testing.assert_allclose(policy, solved, atol=1e-5)


def test_meanflow_loss_is_the_distance_to_a_finite_difference_along_the_flow():
    torch.manual_seed(0)
    policy = smfp.Policy(3, 2).double()
    obs, x, velocity = torch.randn(6, 3).double(), torch.randn(6, 2).double(), torch.randn(6, 2).double()
    r, t = torch.full((6, 1), 0.2).double(), torch.full((6, 1), 0.7).double()
    u = lambda x, r, t: policy(obs, x, r, t)[0]  # noqa: E731
    with torch.no_grad():
        h = 1e-5
        derivative = (u(x + h * velocity, r, t + h) - u(x - h * velocity, r, t - h)) / (2 * h)
        expected = ((u(x, r, t) - velocity + 0.5 * derivative) ** 2).sum(-1)
    torch.testing.assert_close(smfp.meanflow_loss(u, x, r, t, velocity), expected, rtol=1e-6, atol=1e-7)


def test_the_trained_one_step_map_equals_many_euler_steps_of_its_own_field():
    """Trained on y_0 ~ N((1, -0.5), 0.3^2), the map is y = mean + 0.3 e, in one step as in 100."""
    torch.manual_seed(0)
    policy = smfp.Policy(1, 2)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    updates, goal = 700, torch.tensor([1.0, -0.5])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    obs = torch.zeros(256, 1)
    for _ in range(updates):
        y_0, eps = goal + 0.3 * torch.randn(256, 2), torch.randn(256, 2)
        t, r = smfp.sample_times(256, 0.5, CPU)
        x_t, velocity = (1 - t) * y_0 + t * eps, eps - y_0
        loss = smfp.meanflow_loss(lambda x, r, t: policy(obs, x, r, t)[0], x_t, r, t, velocity).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        e = torch.randn(2000, 2)
        one, _ = smfp.one_step(policy, torch.zeros(2000, 1), e)
        x = e
        for i in range(100, 0, -1):
            t = torch.full((2000, 1), i / 100)
            x = x - policy(torch.zeros(2000, 1), x, t, t)[0] / 100
    assert (one - e).norm(dim=-1).mean() > 1.0  # the map does something
    assert (one - x).norm(dim=-1).mean() < 0.12  # as its own field does
    assert (one - (goal + 0.3 * e)).norm(dim=-1).mean() < 0.25  # which is near the known one


def reference_renorm(x, mean, var, settled):
    """Batch renormalisation of one feature by hand; returns the output and the next running statistics."""
    batch_mean, batch_std = np.mean(x), math.sqrt(np.var(x) + 1e-3)
    r, d = 1.0, 0.0
    if settled:
        r = min(max(batch_std / math.sqrt(var + 1e-3), 1 / 3), 3)
        d = min(max((batch_mean - mean) / math.sqrt(var + 1e-3), -5), 5)
    return (x - batch_mean) / batch_std * r + d, 0.99 * mean + 0.01 * batch_mean, 0.99 * var + 0.01 * np.var(x)


@pytest.mark.parametrize("settled", [False, True])
def test_batch_renormalisation_against_a_reference(settled):
    rng = np.random.default_rng(0)
    layer = smfp.BatchRenorm(2).double()
    mean, var = [0.0, 0.0], [1.0, 1.0]
    if settled:
        layer.num_batches.fill_(layer.warmup)
    for step in range(5):
        x = rng.normal([0.5, 30.0], [1.0, 20.0], size=(16, 2)) * (step + 1)  # the second feature meets both limits
        output = layer(torch.tensor(x)).detach().numpy()
        for j in range(2):
            expected, mean[j], var[j] = reference_renorm(x[:, j], mean[j], var[j], settled)
            np.testing.assert_allclose(output[:, j], expected)
    layer.eval()
    x = rng.normal(size=(4, 2))
    expected = (x - mean) / np.sqrt(np.array(var) + 1e-3)
    np.testing.assert_allclose(layer(torch.tensor(x)).detach().numpy(), expected)
    np.testing.assert_allclose(layer.running_mean, mean)  # evaluation learns nothing


def test_resampling_draws_each_row_by_its_weights():
    torch.manual_seed(0)
    weights = torch.tensor([[0.1, 0.2, 0.7], [0.0, 1.0, 0.0]]).repeat_interleave(50_000, 0)
    drawn = smfp.resample(torch.tensor([[[1.0, -1], [2, -2], [3, -3]]]).expand(100_000, 3, 2), weights)
    assert torch.equal(drawn[:, 0], -drawn[:, 1])
    counts = [(drawn[:50_000, 0] == k).sum().item() for k in (1, 2, 3)]
    assert scipy.stats.chisquare(counts, [5_000, 10_000, 35_000]).pvalue > 1e-3
    assert (drawn[50_000:, 0] == 2).all()


def batch(size=32, obs_dim=3, action_dim=2):
    torch.manual_seed(7)
    obs, next_obs = torch.randn(2, size, obs_dim)
    actions, rewards = torch.rand(size, action_dim) * 2 - 1, torch.randn(size)
    return obs, actions, rewards, (torch.rand(size) < 0.2).float(), next_obs


def agent_with_heads(**flags):
    """An agent whose policy depends on its inputs, as a new one's, with its heads at zero, does not."""
    agent = smfp.Agent(3, 2, smfp.Args(**{"critic": "sac"} | flags), CPU)
    for head in (agent.policy.velocity, agent.policy.log_std):
        head.reset_parameters()
    agent.slow_policy.load_state_dict(agent.policy.state_dict())
    return agent


def perturbed_agent(**flags):
    """An agent whose slow policy differs from its policy, the same whatever the flags."""
    torch.manual_seed(0)
    agent = agent_with_heads(alpha=0.5, **flags)
    with torch.no_grad():
        for p in agent.slow_policy.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return agent


def test_a_new_policy_is_the_same_whatever_the_observations():
    torch.manual_seed(0)
    agent = smfp.Agent(3, 2, smfp.Args(), CPU)
    obs, e = torch.tensor([1.0, 30.0, 1e4])[:, None] * torch.randn(3, 3), torch.randn(3, 2)
    for policy in (agent.policy, agent.slow_policy):
        mean, log_std = smfp.one_step(policy, obs, e)
        torch.testing.assert_close(mean, e)
        torch.testing.assert_close(log_std, torch.full_like(e, (smfp.LOG_STD_MIN + smfp.LOG_STD_MAX) / 2))


def policy_gradient(**flags):
    """Gradient of the policy's loss, from the same networks, batch and noise whatever the flags."""
    agent, obs = perturbed_agent(**flags), batch()[0]
    torch.manual_seed(1)
    agent.update_policy(obs, torch.tensor(0.5))
    return torch.cat([p.grad.flatten() for p in agent.policy.parameters()])


def gradient_by_hand(loss, agent):
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, [*agent.policy.parameters()], materialize_grads=True)]
    )


def log_pi(y, mean, log_std):
    """log pi_M of tanh(y), y (B, N, d), by torch.distributions."""
    normal = torch.distributions.Normal(mean[:, None], log_std.exp()[:, None])  # (B, 1, M, d)
    log_prob = normal.log_prob(y[:, :, None]).sum(-1).logsumexp(-1) - math.log(mean.shape[1])
    return log_prob - (1 - y.tanh() ** 2).log().sum(-1)


def test_the_first_term_is_alpha_log_pi_minus_the_smaller_q():
    agent, obs = perturbed_agent(), batch()[0]
    torch.manual_seed(1)
    mean, log_std = smfp.one_step(agent.policy, obs[:, None], torch.randn(32, 5, 2))
    y = mean + log_std.exp() * torch.randn(32, 5, 2)
    q = torch.minimum(agent.qf1(obs[:, None], y.tanh()), agent.qf2(obs[:, None], y.tanh()))
    expected = gradient_by_hand((0.5 * log_pi(y, mean, log_std) - q).mean(), agent)
    torch.testing.assert_close(policy_gradient(kl_coef=0, meanflow_coef=0), expected, rtol=1e-3, atol=1e-5)


def test_the_second_term_is_the_kl_to_the_slow_copy_times_lambda():
    agent, obs = perturbed_agent(), batch()[0]
    torch.manual_seed(1)
    e = torch.randn(32, 5, 2)
    pairs = [smfp.one_step(policy, obs[:, None], e) for policy in (agent.policy, agent.slow_policy)]
    normals = [torch.distributions.Normal(mean, log_std.exp()) for mean, log_std in pairs]
    kl = torch.distributions.kl_divergence(*normals).sum(-1).mean()
    expected = policy_gradient(kl_coef=0, meanflow_coef=0) + gradient_by_hand(0.2 * 0.5 * kl, agent)
    torch.testing.assert_close(policy_gradient(kl_coef=0.2, meanflow_coef=0), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weighted", [True, False])
def test_the_third_term_regresses_on_slow_samples_drawn_by_the_mirror_descent_weights(weighted, monkeypatch):
    """The draws of the update, seen from outside; its target by a finite difference along the flow."""
    seen = []
    monkeypatch.setattr(
        smfp, "resample", lambda y, w, real=smfp.resample: seen.append([y, w, real(y, w)]) or seen[-1][2]
    )
    monkeypatch.setattr(smfp, "sample_times", lambda *a, real=smfp.sample_times: seen.append(real(*a)) or seen[-1])
    flags = {"kl_coef": 0.3, "mirror_descent_weights": weighted}
    found = policy_gradient(**flags, meanflow_coef=2) - policy_gradient(**flags, meanflow_coef=0)
    (y_k, weights, y_0), (t, r) = seen
    agent, obs = perturbed_agent(), batch()[0]
    torch.manual_seed(1)
    e, _, _ = (torch.randn(32, 5, 2) for _ in range(3))
    mean_k, log_std_k = smfp.one_step(agent.slow_policy, obs[:, None], e)
    q = torch.minimum(*(qf(obs[:, None], y_k.tanh()) for qf in (agent.qf1, agent.qf2)))
    unnormalised = ((q - 0.5 * log_pi(y_k, mean_k, log_std_k)) / (0.5 * 1.3)).exp() if weighted else torch.ones(32, 5)
    torch.testing.assert_close(weights, unnormalised / unnormalised.sum(-1, keepdim=True), rtol=1e-3, atol=1e-4)
    assert all((y_0[b] == y_k[b]).all(-1).any() for b in range(32))  # one of the slow copy's own samples

    agent.double()
    y_0, t, r, obs = (x.double() for x in (y_0, t, r, obs))
    eps = epsilon_of(weights)
    u = lambda x, r, t: agent.policy(obs, x, r, t)[0]  # noqa: E731
    x_t, v, h = (1 - t) * y_0 + t * eps, eps - y_0, 1e-5
    derivative = (u(x_t + h * v, r, t + h) - u(x_t - h * v, r, t - h)) / (2 * h)
    loss = ((u(x_t, r, t) - (v - (t - r) * derivative).detach()) ** 2).sum(-1).mean()
    torch.testing.assert_close(found.double(), gradient_by_hand(2 * 0.5 * loss, agent), rtol=2e-3, atol=2e-5)


def epsilon_of(weights):
    """The noise of the regression's x_t: what follows the latents, two sets of xi and the draw of y_0."""
    torch.manual_seed(1)
    for _ in range(3):
        torch.randn(32, 5, 2)
    torch.empty_like(weights).exponential_()
    return torch.randn(32, 2).double()


def test_the_slow_copies_move_by_their_step_and_the_temperature_towards_its_target():
    for target, sign in ((50.0, 1), (-50.0, -1)):
        torch.manual_seed(0)
        agent = agent_with_heads(tau=0.25, policy_tau=0.5, autotune=True)
        agent.target_entropy, before = target, copy.deepcopy(agent.state_dict())
        agent.update(*batch())
        after = agent.state_dict()
        for slow, fast, step in (
            ("slow_policy", "policy", 0.5),
            ("qf1_target", "qf1", 0.25),
            ("qf2_target", "qf2", 0.25),
        ):
            for name in getattr(agent, fast).state_dict():
                expected = before[f"{slow}.{name}"].lerp(after[f"{fast}.{name}"], step)
                torch.testing.assert_close(after[f"{slow}.{name}"], expected)
        assert (agent.log_alpha.item() - before["log_alpha"].item()) * sign > 0


def test_the_regression_grows_with_its_coefficient_and_the_weights_change_it():
    none, one, two = (policy_gradient(kl_coef=0, meanflow_coef=c) for c in (0, 1, 2))
    torch.testing.assert_close(two - one, one - none, rtol=1e-3, atol=1e-5)
    assert (one - none).norm() > 1e-3
    unweighted = policy_gradient(kl_coef=0, meanflow_coef=1, mirror_descent_weights=False)
    assert (unweighted - one).norm() > 1e-3


@pytest.mark.parametrize(("scale", "latents"), [(0.0, 5), (0.6, 5), (0.6, 1)])
def test_diagnostics_of_a_known_policy(scale, latents, monkeypatch):
    """The mean is `scale` times the latent, sigma 0.3: its spread is `scale`, and without it the bound is tight."""
    monkeypatch.setattr(smfp, "one_step", lambda policy, obs, e: (scale * e, torch.full_like(e, math.log(0.3))))
    torch.manual_seed(0)
    found = smfp.Agent(1, 2, smfp.Args(latents=latents), CPU).diagnostics(torch.zeros(4000, 1))
    n = 8 * latents  # their standard deviation is on average a little less than that of the distribution
    spread = scale * scipy.stats.chi(n - 1).mean() / math.sqrt(n - 1)
    assert found["diagnostics/latent_spread"] == pytest.approx(spread, abs=0.01)
    gap = found["diagnostics/entropy_gap"]
    assert gap == pytest.approx(0, abs=1e-4) if scale == 0 else gap > 0.05


def test_best_of_n_plays_the_candidate_with_the_highest_target_value():
    torch.manual_seed(0)
    agent = agent_with_heads()
    obs = batch()[0]
    with torch.random.fork_rng(), torch.no_grad():
        e = torch.randn(32, 10, 2)
        mean, log_std = smfp.one_step(agent.policy, obs[:, None], e)
        actions = torch.tanh(mean + log_std.exp() * torch.randn(32, 10, 2))
        q = torch.minimum(agent.qf1_target(obs[:, None], actions), agent.qf2_target(obs[:, None], actions))
    torch.testing.assert_close(agent.eval_actions(obs), actions[torch.arange(32), q.argmax(1)])


def test_td_target_against_a_loop_with_candidates():
    """K_t = 3 of M = 4: the candidate with the highest target value, its soft value, no bootstrap where terminated."""
    torch.manual_seed(0)
    agent = agent_with_heads(latents=4, target_candidates=3, gamma=0.9)
    obs, actions, rewards, terminations, next_obs = batch()
    torch.manual_seed(1)
    with torch.no_grad():
        e = torch.randn(32, 4, 2)
        mean, log_std = smfp.one_step(agent.policy, next_obs[:, None], e)
        y = mean + log_std.exp() * torch.randn(32, 4, 2)
        losses = []
        for b in range(32):
            values = [
                min(q(next_obs[b], torch.tanh(y[b, k])).item() for q in (agent.qf1_target, agent.qf2_target))
                for k in range(3)
            ]
            k = int(np.argmax(values))
            mixture = np.mean([scipy.stats.norm(mean[b, j], log_std[b, j].exp()).pdf(y[b, k]).prod() for j in range(4)])
            log_prob = math.log(mixture) - np.log(1 - np.tanh(y[b, k].numpy()) ** 2).sum()
            target = rewards[b].item() + 0.9 * (1 - terminations[b].item()) * (values[k] - 0.5 * log_prob)
            losses.append((agent.qf1(obs[b], actions[b]).item() - target) ** 2)
    torch.manual_seed(1)
    metrics = agent.update_critics(obs, actions, rewards, terminations, next_obs, torch.tensor(0.5))
    assert metrics["losses/qf1_loss"].item() == pytest.approx(np.mean(losses), rel=1e-4)


def test_crossq_has_no_targets_and_learns_its_statistics_in_the_critic_update_alone():
    torch.manual_seed(0)
    agent = agent_with_heads(critic="crossq", latents=2)
    assert not any("target" in name for name, _ in agent.named_parameters())
    optimizers = (agent.q_optimizer, agent.policy_optimizer, agent.alpha_optimizer)
    assert [optimizer.defaults["betas"][0] for optimizer in optimizers] == [0.5, 0.5, 0.9]
    renorm = next(module for module in agent.qf1.modules() if isinstance(module, smfp.BatchRenorm))
    before = [p.clone() for p in agent.policy.parameters()]
    agent.eval_actions(batch()[0])
    assert renorm.num_batches == 0
    agent.update(*batch(), with_policy=False)
    assert renorm.num_batches == 1
    obs, _, _, _, next_obs = batch()
    torch.testing.assert_close(renorm.running_mean, 0.01 * torch.cat([obs, next_obs]).mean(0))  # of both halves
    assert all(torch.equal(p, q) for p, q in zip(before, agent.policy.parameters(), strict=True))
    agent.update(*batch())
    assert renorm.num_batches == 2  # the policy's update uses the running statistics
    assert not all(torch.equal(p, q) for p, q in zip(before, agent.policy.parameters(), strict=True))


def test_crossq_regresses_on_the_joint_pass_without_a_gradient_of_the_target():
    torch.manual_seed(0)
    agent = agent_with_heads(critic="crossq", latents=2, gamma=0.9)
    critics = copy.deepcopy(agent.qf1).train(), copy.deepcopy(agent.qf2).train()
    obs, actions, rewards, terminations, next_obs = batch()
    torch.manual_seed(1)
    with torch.no_grad():
        y, mean, log_std = agent.sample_y(agent.policy, next_obs, torch.randn(32, 2, 2))
        next_log_prob = log_pi(y[:, :1], mean, log_std)[:, 0]
    values = [qf(torch.cat([obs, next_obs]), torch.cat([actions, y[:, 0].tanh()])) for qf in critics]
    next_q = torch.minimum(values[0][32:], values[1][32:]).detach()
    target = rewards + 0.9 * (1 - terminations) * (next_q - 0.5 * next_log_prob)
    loss = sum(((q[:32] - target) ** 2).mean() for q in values)
    expected = torch.autograd.grad(loss, [p for qf in critics for p in qf.parameters()])
    torch.manual_seed(1)
    agent.update_critics(obs, actions, rewards, terminations, next_obs, torch.tensor(0.5))
    for p, gradient in zip(agent.q_parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-5)
