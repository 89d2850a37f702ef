"""Whole updates against a second writing of each method: networks by hand, plain sums, finite differences.

From the weights before an update the second writing computes, in float64 and with the noise drawn in the same order,
the gradient that each optimiser must be handed and every metric. What becomes of a gradient and of a slow copy is a
formula. In a name, `before` and `after` are agents before and after the update.
"""

import copy
import functools
import math

import pytest
import scipy.stats
import torch
from torch.distributions import Normal, kl_divergence

import mfpo_continuous as mfpo
import sac_continuous as sac
import smfp_continuous as smfp

OBS_DIM, BATCH_SIZE = 3, 12


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def new_agent(module, action_dim, flags):
    """An agent whose slow copies differ from what they follow, so that it shows which of the two is used."""
    torch.manual_seed(0)
    agent = module.Agent(OBS_DIM, action_dim, module.Args(**flags), torch.device("cpu"))
    with torch.no_grad():
        for name, p in agent.named_parameters():
            if name != "log_alpha":
                p.add_(0.02 * torch.randn_like(p))
    return agent


def check_updates(agent, action_dim, reference, rates, slow, tolerance=1e-7):
    """Two updates of `agent` against `reference(before, after, batch)`: gradients by optimiser, and metrics.

    `rates` has the optimisers' learning rates; `slow` the slow copies: what each follows, and by which step.
    """
    for k in range(2):
        torch.manual_seed(10 + k)
        obs, next_obs = torch.randn(2, BATCH_SIZE, OBS_DIM)
        actions, rewards = 2 * torch.rand(BATCH_SIZE, action_dim) - 1, torch.randn(BATCH_SIZE)
        batch = obs, actions, rewards, (torch.rand(BATCH_SIZE) < 0.4).double(), next_obs
        before, gradients = copy.deepcopy(agent), {}
        with pytest.MonkeyPatch.context() as patch:
            for name in rates:
                optimizer = getattr(agent, name)
                patch.setattr(optimizer, "step", recorded(gradients, name, optimizer))
            torch.manual_seed(20 + k)
            metrics = agent.update(*batch)
        torch.manual_seed(20 + k)
        expected, expected_metrics = reference(before, agent, batch)

        assert gradients.keys() == expected.keys()
        for name, found in gradients.items():
            largest = max(g.abs().max() for g in expected[name]).item()
            for g, h in zip(found, expected[name], strict=True):
                torch.testing.assert_close(g, h, rtol=tolerance, atol=tolerance * largest)
            then, now = (getattr(x, name).param_groups[0]["params"] for x in (before, agent))
            if k == 0:  # Adam's first step
                for p, q, g in zip(now, then, found, strict=True):
                    torch.testing.assert_close(p, q - rates[name] * g / (g.abs() + 1e-8))
        for name, (followed, step) in slow.items():
            for p, q, goal in zip(
                getattr(agent, name).parameters(),
                getattr(before, name).parameters(),
                getattr(agent, followed).parameters(),
                strict=True,
            ):
                torch.testing.assert_close(p, (1 - step) * q + step * goal)
        assert metrics.keys() == expected_metrics.keys()
        for name, value in expected_metrics.items():
            assert metrics[name].item() == pytest.approx(value.item(), rel=tolerance, abs=tolerance), name


def recorded(gradients, name, optimizer):
    """The optimiser's step, which first copies the gradients that it is handed to `gradients[name]`."""
    real = optimizer.step

    def step():
        gradients[name] = [p.grad.clone() for p in optimizer.param_groups[0]["params"]]
        real()

    return step


def gradient(loss, parameters):
    """d loss / d parameters, zero where the loss does not depend on one."""
    return torch.autograd.grad(loss, [*parameters], allow_unused=True, materialize_grads=True)


def critic_metrics(q1, q2, loss1, loss2):
    means = {"losses/qf1_values": q1.mean(), "losses/qf2_values": q2.mean()}
    return means | {"losses/qf1_loss": loss1, "losses/qf2_loss": loss2, "losses/qf_loss": (loss1 + loss2) / 2}


def linear(layer, x):
    return x @ layer.weight.T + layer.bias


def bounded_std(x):
    """sigma from the output of a head: its logarithm is in [-5, 2]."""
    return (-5 + 7 * (torch.tanh(x) + 1) / 2).exp()


def log_det(y):
    """log |d tanh(y) / dy| (...) of y (..., d), the derivative being 1 / cosh^2."""
    return -2 * torch.log(torch.cosh(y)).sum(-1)


def slope(f, h=1e-3):
    """f'(0), by central differences of the fourth order."""
    return (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)


@pytest.mark.parametrize("module", [sac, smfp, mfpo])
def test_the_slow_copies_of_a_new_agent_are_what_they_follow(module):
    flags = {"policy_tau": 0.05} if module is mfpo else {"critic": "sac"}  # CrossQ has no slow copies
    agent = module.Agent(OBS_DIM, 2, module.Args(**flags), torch.device("cpu"))
    copies = {"qf1_target": "qf1", "qf2_target": "qf2"}
    copies |= {sac: {}, smfp: {"slow_policy": "policy"}, mfpo: {"slow_actor": "actor"}}[module]
    for name, followed in copies.items():
        pairs = zip(getattr(agent, name).parameters(), getattr(agent, followed).parameters(), strict=True)
        assert all(p is not q and torch.equal(p, q) for p, q in pairs)
    assert not torch.equal(next(agent.qf1.parameters()), next(agent.qf2.parameters()))


# CrossQ's critics


def renorm(layer, x, statistics):
    """Batch renormalisation as CrossQ has it; `statistics` collects what the running ones become, None: evaluation."""
    mean, var = layer.running_mean, layer.running_var
    if statistics is None:
        return (x - mean) / (var + 1e-3).sqrt() * layer.weight + layer.bias
    batch_mean = x.mean(0)
    batch_var = ((x - batch_mean) ** 2).mean(0)
    r, d = 1.0, 0.0
    if layer.num_batches >= 100_000:
        r = ((batch_var + 1e-3) / (var + 1e-3)).sqrt().clamp(1 / 3, 3).detach()
        d = ((batch_mean - mean) / (var + 1e-3).sqrt()).clamp(-5, 5).detach()
    statistics.append((0.99 * mean + 0.01 * batch_mean, 0.99 * var + 0.01 * batch_var, layer.num_batches + 1))
    return ((x - batch_mean) / (batch_var + 1e-3).sqrt() * r + d) * layer.weight + layer.bias


def crossq_values(q, before, after, pairs):
    """Q_i(s, a) and Q_i(s', a') of both critics by `q`, in one pass; checks what the running statistics became."""
    (obs, actions), (next_obs, next_actions) = pairs
    both = torch.cat([obs, next_obs]), torch.cat([actions, next_actions])
    qs, next_qs = [], []
    for name in ("qf1", "qf2"):
        statistics = []
        values = q(getattr(before, name), *both, statistics)
        qs.append(values[: len(obs)]), next_qs.append(values[len(obs) :])
        layers = renorm_layers(getattr(after, name))
        for layer, expected in zip(layers, statistics, strict=True):
            found = layer.running_mean, layer.running_var, layer.num_batches
            for value, goal in zip(found, expected, strict=True):
                torch.testing.assert_close(value, goal)
    return qs, next_qs


def renorm_layers(network):
    return [layer for layer in network.modules() if type(layer).__name__ == "BatchRenorm"]


def settle(agent):
    """Statistics as after 99,999 batches: the next one is not renormalised, the one after it is."""
    for layer in renorm_layers(agent):
        layer.running_mean.normal_(0, 0.5), layer.running_var.uniform_(0.02, 3)
        layer.num_batches.fill_(99_999)


# SAC


def sac_policy(actor, obs):
    h = torch.relu(linear(actor.net[2], torch.relu(linear(actor.net[0], obs))))
    return linear(actor.mean, h), bounded_std(linear(actor.log_std, h))


def sac_q(qf, obs, actions, statistics=None):
    norms = renorm_layers(qf) or [None] * 3
    norm = lambda i, x: x if norms[i] is None else renorm(norms[i], x, statistics)  # noqa: E731
    first, second, last = (layer for layer in qf.net if isinstance(layer, torch.nn.Linear))
    h = torch.relu(linear(first, norm(0, torch.cat([obs, actions], -1))))
    return linear(last, norm(2, torch.relu(linear(second, norm(1, h)))))[:, 0]


def sac_reference(before, after, batch):
    obs, actions, rewards, terminations, next_obs = batch
    args, alpha = before.args, before.log_alpha.detach().exp()

    def act(obs):
        mean, std = sac_policy(before.actor, obs)
        y = mean + std * torch.randn_like(mean)
        return torch.tanh(y), Normal(mean, std).log_prob(y).sum(-1) - log_det(y)

    a, log_prob = act(next_obs)
    if args.critic == "crossq":
        (q1, q2), next_qs = crossq_values(sac_q, before, after, ((obs, actions), (next_obs, a)))
    else:
        q1, q2 = (sac_q(qf, obs, actions) for qf in (before.qf1, before.qf2))
        next_qs = [sac_q(qf, next_obs, a) for qf in (before.qf1_target, before.qf2_target)]
    target = rewards + args.gamma * (1 - terminations) * (torch.minimum(*next_qs) - alpha * log_prob)
    loss1, loss2 = (((q - target.detach()) ** 2).mean() for q in (q1, q2))

    a, log_prob = act(obs)
    actor_loss = (alpha * log_prob - torch.minimum(sac_q(after.qf1, obs, a), sac_q(after.qf2, obs, a))).mean()
    gradients = {
        "q_optimizer": gradient(loss1 + loss2, before.q_parameters),
        "actor_optimizer": gradient(actor_loss, before.actor.parameters()),
    }
    entropy = -log_prob.mean()
    metrics = {"losses/actor_loss": actor_loss, "losses/alpha": alpha, "diagnostics/entropy": entropy}
    if args.autotune:
        metrics["losses/alpha_loss"] = alpha * (entropy + args.rho * a.shape[-1]).detach()
        gradients["alpha_optimizer"] = [metrics["losses/alpha_loss"]]  # its derivative by log alpha, too
    return gradients, critic_metrics(q1, q2, loss1, loss2) | metrics


SAC_FLAGS = [
    {},
    {"autotune": False},
    {"gamma": 0.8, "tau": 0.3, "alpha": 0.2, "policy_lr": 0.01, "q_lr": 0.02, "rho": 1.5},
    {"critic": "crossq", "critic_width": 32},
]


@pytest.mark.parametrize("flags", SAC_FLAGS)
def test_sac(flags):
    agent = new_agent(sac, 2, flags)
    settle(agent)
    rates = {
        "q_optimizer": agent.args.q_lr,
        "actor_optimizer": agent.args.policy_lr,
        "alpha_optimizer": agent.args.q_lr,
    }
    slow = {} if agent.crossq else {f"qf{i}_target": (f"qf{i}", agent.args.tau) for i in (1, 2)}
    check_updates(agent, 2, sac_reference, rates, slow)


def test_sac_acts_by_its_mean_in_evaluation():
    agent, obs = new_agent(sac, 2, {"rho": 0.75}), torch.randn(5, OBS_DIM)
    mean, std = sac_policy(agent.actor, obs)
    torch.testing.assert_close(agent.eval_actions(obs), torch.tanh(mean))
    torch.manual_seed(1)
    actions = agent.sample_actions(obs)
    torch.manual_seed(1)
    torch.testing.assert_close(actions, torch.tanh(mean + std * torch.randn(5, 2)))
    assert agent.target_entropy == -1.5


# SMFP


def silu(x):
    return x / (1 + torch.exp(-x))


def smfp_flow(policy, obs, x, r, t):
    """u and sigma, (..., d), at x (..., d); r and t are numbers or (..., 1)."""
    r, t = (torch.as_tensor(time).expand(*x.shape[:-1], 1) for time in (r, t))
    h = silu(linear(policy.first, torch.cat([obs.expand(*x.shape[:-1], -1), x, r, t], -1)))
    h = silu(linear(policy.second, h))
    return linear(policy.velocity, h), bounded_std(linear(policy.log_std, h))


def smfp_gaussian(policy, obs, e):
    u, std = smfp_flow(policy, obs, e, 0.0, 1.0)
    return e - u, std


def smfp_log_prob(y, mean, std):
    """log pi_M (B, N) of tanh(y), y (B, N, d), under components (B, M, d): one component after the other."""
    densities = [Normal(mean[:, [j]], std[:, [j]]).log_prob(y).sum(-1).exp() for j in range(mean.shape[1])]
    return torch.log(sum(densities) / len(densities)) - log_det(y)


def smfp_q(qf, obs, actions, statistics=None):
    norm = renorm if renorm_layers(qf) else lambda layer, x, statistics: x
    obs = obs.expand(*actions.shape[:-1], -1)
    x = torch.cat([norm(qf.norm_obs, obs, statistics), norm(qf.norm_actions, actions, statistics)], -1)
    x = norm(qf.rest[1], torch.relu(linear(qf.first, x)), statistics)
    x = norm(qf.rest[4], torch.relu(linear(qf.rest[2], x)), statistics)
    return linear(qf.rest[5], x)[..., 0]


def smaller_q(qf1, qf2, obs, actions):
    return torch.minimum(smfp_q(qf1, obs, actions), smfp_q(qf2, obs, actions))


def smfp_reference(before, after, batch):
    obs, actions, rewards, terminations, next_obs = batch
    args, alpha = before.args, before.log_alpha.detach().exp()
    size, m, d = len(obs), args.latents, actions.shape[-1]
    crossq = args.critic == "crossq"

    mean, std = smfp_gaussian(before.policy, next_obs[:, None], torch.randn(size, m, d))
    y = mean + std * torch.randn(size, m, d)
    targets = (before.qf1, before.qf2) if crossq else (before.qf1_target, before.qf2_target)
    best = smaller_q(*targets, next_obs[:, None], torch.tanh(y[:, : args.target_candidates])).argmax(1)
    y = y[torch.arange(size), best]
    a, log_prob = torch.tanh(y), smfp_log_prob(y[:, None], mean, std)[:, 0]
    if crossq:
        qs, next_qs = crossq_values(smfp_q, before, after, ((obs, actions), (next_obs, a)))
    else:
        qs = [smfp_q(qf, obs, actions) for qf in (before.qf1, before.qf2)]
        next_qs = [smfp_q(qf, next_obs, a) for qf in targets]
    target = rewards + args.gamma * (1 - terminations) * (torch.minimum(*next_qs) - alpha * log_prob)
    losses = [((q - target.detach()) ** 2).mean() for q in qs]

    e = torch.randn(size, m, d)
    mean, std = smfp_gaussian(before.policy, obs[:, None], e)
    y = mean + std * torch.randn(size, m, d)
    mean_k, std_k = (x.detach() for x in smfp_gaussian(before.slow_policy, obs[:, None], e))
    y_k = mean_k + std_k * torch.randn(size, m, d)
    entropy = -smfp_log_prob(y, mean, std).mean()
    actor_loss = -alpha * entropy - smaller_q(after.qf1, after.qf2, obs[:, None], torch.tanh(y)).mean()
    kl = kl_divergence(Normal(mean, std), Normal(mean_k, std_k)).sum(-1).mean()
    loss = actor_loss + args.kl_coef * alpha * kl
    metrics = {"losses/actor_loss": actor_loss, "losses/kl": kl, "losses/alpha": alpha}
    if args.meanflow_coef > 0:
        weights = torch.ones(size, m) / m
        if args.mirror_descent_weights:
            q_k = smaller_q(after.qf1, after.qf2, obs[:, None], torch.tanh(y_k))
            weights = torch.exp(
                (q_k - alpha * smfp_log_prob(y_k, mean_k, std_k)) / (alpha * (1 + args.kl_coef))
            ).detach()
            weights = weights / weights.sum(1, keepdim=True)
        race = weights / torch.empty(size, m).exponential_()
        y_0, eps = y_k[torch.arange(size), race.argmax(1)], torch.randn(size, d)
        times, n = torch.rand(2, size, 1), int(size * args.data_proportion)
        t, r = times.max(0).values, times.min(0).values
        r[:n] = t[:n]
        x, v = (1 - t) * y_0 + t * eps, eps - y_0
        du = slope(lambda h: smfp_flow(before.policy, obs, x + h * v, r, t + h)[0])
        goal = (v - (t - r) * du).detach()
        regression = ((smfp_flow(before.policy, obs, x, r, t)[0] - goal) ** 2).sum(-1).mean()
        loss = loss + args.meanflow_coef * alpha * regression
        metrics |= {"losses/meanflow_loss": regression, "diagnostics/ess": (1 / (weights**2).sum(1)).mean()}
    metrics |= {"diagnostics/entropy": entropy, "diagnostics/sigma": std.mean()}
    gradients = {
        "q_optimizer": gradient(losses[0] + losses[1], before.q_parameters),
        "policy_optimizer": gradient(loss, before.policy.parameters()),
    }
    if args.autotune:
        metrics["losses/alpha_loss"] = alpha * (entropy + args.rho * d).detach()
        gradients["alpha_optimizer"] = [metrics["losses/alpha_loss"]]  # its derivative by log alpha, too
    return gradients, critic_metrics(*qs, *losses) | metrics


SMFP_FLAGS = [
    {},
    {"critic": "sac"},
    {"critic": "sac", "latents": 1, "target_candidates": 1},
    {
        "critic": "sac",
        "latents": 4,
        "target_candidates": 3,
        "kl_coef": 0.7,
        "meanflow_coef": 2.5,
        "data_proportion": 0.25,
    },
    {
        "critic": "sac",
        "tau": 0.1,
        "policy_tau": 0.2,
        "gamma": 0.9,
        "policy_lr": 0.01,
        "q_lr": 0.02,
        "data_proportion": 0.0,
    },
    {"kl_coef": 0.0, "meanflow_coef": 0.0, "autotune": False},
    {"mirror_descent_weights": False, "data_proportion": 1.0},
    {"critic_width": 32, "target_candidates": 2},
]


@pytest.mark.parametrize("flags", SMFP_FLAGS)
def test_smfp(flags):
    agent = new_agent(smfp, 2, {"alpha": 0.3, "autotune": True} | flags)
    settle(agent)
    rates = {"q_optimizer": agent.args.q_lr, "policy_optimizer": agent.args.policy_lr}
    rates["alpha_optimizer"] = agent.args.q_lr
    slow = {"slow_policy": ("policy", agent.args.policy_tau)}
    if not agent.crossq:
        slow |= {f"qf{i}_target": (f"qf{i}", agent.args.tau) for i in (1, 2)}
    check_updates(agent, 2, smfp_reference, rates, slow)


@pytest.mark.parametrize("candidates", [1, 3])
def test_smfp_acts_by_the_best_of_its_candidates(candidates):
    flags = {"behavior_candidates": candidates, "eval_candidates": 7, "rho": 0.75}
    agent, obs = new_agent(smfp, 2, flags), torch.randn(5, OBS_DIM)
    for act, k in ((agent.sample_actions, candidates), (agent.eval_actions, 7)):
        torch.manual_seed(1)
        actions = act(obs)
        torch.manual_seed(1)
        mean, std = smfp_gaussian(agent.policy, obs[:, None], torch.randn(5, k, 2))
        a = torch.tanh(mean + std * torch.randn(5, k, 2))
        best = smaller_q(agent.qf1_target, agent.qf2_target, obs[:, None], a).argmax(1)
        torch.testing.assert_close(actions, a[torch.arange(5), best])
    assert agent.target_entropy == -1.5


# MFPO


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def mlp(net, x):
    x = linear(net.first, x)
    for norm, following in ((0, 2), (3, 5), (6, 8)):
        layer = net.rest[norm]
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        x = linear(net.rest[following], gelu(x * layer.weight + layer.bias))
    return x


def embed(embedding, t):
    phase = 2 * math.pi * t * embedding.frequencies
    hidden = gelu(linear(embedding.mlp[0], torch.cat([torch.cos(phase), torch.sin(phase)], -1)))
    return linear(embedding.mlp[2], hidden)


def mfpo_flow(net, obs, x, r, t):
    """u or delta at x (B, d); r and t are numbers or (B, 1)."""
    r, t = (torch.as_tensor(time).expand(len(x), 1) for time in (r, t))
    return mlp(net.mlp, torch.cat([obs, embed(net.embed_t, t) + embed(net.embed_interval, t - r), x], -1))


def mfpo_sample(agent, obs, x):
    """An action for each noise (B, d), before clipping, and log pi (B,)."""
    steps, log_prob = agent.args.sampling_steps, Normal(0.0, 1.0).log_prob(x).sum(-1)
    for i in range(steps):
        t = 1 - i / steps
        r = t - 1 / steps if agent.args.meanflow else t
        log_prob = log_prob + mfpo_flow(agent.divergence, obs, x, r, t)[:, 0] / steps
        x = x - mfpo_flow(agent.slow_actor or agent.actor, obs, x, r, t) / steps
    return x.detach(), log_prob.detach()


def mfpo_times(args, size):
    if args.time_distribution == "logit_normal":
        times = torch.sigmoid(-0.4 + torch.randn(2, size, 1))
    else:
        times = torch.rand(2, size, 1).clamp(0.001, 0.999)
    t, r = times.max(0).values, times.min(0).values
    n = int(size * args.data_proportion) if args.meanflow else size
    r[:n] = t[:n]
    return t, r


def mfpo_regression(net, obs, x, r, t, velocity, instantaneous):
    slopes = slope(lambda h: mfpo_flow(net, obs, x + h * velocity, r, t + h))
    goal = (instantaneous - (t - r) * slopes).detach()
    return ((mfpo_flow(net, obs, x, r, t) - goal) ** 2).sum(-1).mean()


def mfpo_step(actor, obs, x, r, t, steps, shift):
    """One step of the sampler from x + shift."""
    return (x + shift - mfpo_flow(actor, obs, x + shift, r, t) / steps).detach()


def map_loss(before, after, obs, x):
    """Squared error of delta, one step of the sampler after the other, with the Jacobian's columns by differences."""
    steps, loss = before.args.sampling_steps, 0
    for i in range(steps):
        t = 1 - i / steps
        r = t - 1 / steps if before.args.meanflow else t
        move = functools.partial(mfpo_step, after.slow_actor or after.actor, obs, x, r, t, steps)
        columns = [slope(lambda h, e=e, move=move: move(h * e)) for e in torch.eye(x.shape[1])]
        goal = -steps * torch.linalg.det(torch.stack(columns, -1)).abs().log()
        loss += ((mfpo_flow(before.divergence, obs, x, r, t)[:, 0] - goal) ** 2).mean() / steps
        x = move(0)
    return loss


def importance_estimate(log_weights, actions, x, t):
    """Velocity (B, d) and effective sample size (B, 1) from lists of log-weights (B,) and actions (B, d)."""
    weights = [torch.exp(w)[:, None] for w in log_weights]
    total = sum(weights)
    velocity = sum(w / total * (x - a) / t for w, a in zip(weights, actions, strict=True))
    return velocity, 1 / sum((w / total) ** 2 for w in weights)


def critic_outputs(qf, obs, actions, statistics=None):
    if isinstance(qf, mfpo.CrossQNetwork):
        return smfp_q(qf, obs, actions, statistics)[..., None]
    return mlp(qf, torch.cat([obs, actions], -1))


def critic_mean(args, outputs):
    if args.critic == "c51":
        return torch.softmax(outputs, -1) @ torch.linspace(args.v_min, args.v_max, args.num_atoms)
    return outputs.sum(-1) / outputs.shape[-1]


def c51_losses(before, outputs, next_outputs, backup):
    """Cross-entropies of both critics with the target, each mass of it shared out by a hat function; and metrics."""
    args = before.args
    z = torch.linspace(args.v_min, args.v_max, args.num_atoms)
    hats = (1 - (backup(z).clamp(args.v_min, args.v_max)[:, :, None] - z).abs() / (z[1] - z[0])).clamp(min=0)
    p1, p2 = ((torch.softmax(x, -1)[:, :, None] * hats).sum(1).detach() for x in next_outputs)  # hats: (B, from, to)
    target = (p1 + p2) / 2
    if args.clipped_double_q:
        target = torch.stack([p if p @ z < q @ z else q for p, q in zip(p1, p2, strict=True)])
    probs = [torch.softmax(x, -1) for x in outputs]
    stds = [((p @ z**2) - (p @ z) ** 2).sqrt().mean() for p in probs]
    edge_mass = sum(p[:, [0, -1]].sum(-1).mean() for p in probs) / 2
    metrics = {"diagnostics/q_std": sum(stds) / 2, "diagnostics/edge_mass": edge_mass}
    return [-(target * torch.log(p)).sum(-1).mean() for p in probs], metrics


def quantile_losses(before, outputs, next_outputs, backup):
    """QR-DQN's loss of both critics, pair by pair, or the squared error of their one output; and metrics."""
    goals = [backup(x).detach() for x in next_outputs]
    losses, n = [], outputs[0].shape[1]
    for x in outputs:
        total = 0
        for b in range(BATCH_SIZE):
            smaller = min((g[b] for g in goals), key=lambda z: z.mean())
            z = smaller if before.args.clipped_double_q else torch.cat([g[b] for g in goals])
            if before.args.critic in ("mean", "crossq"):
                total += (x[b, 0] - z.mean()) ** 2
                continue
            for i in range(n):
                u = z - x[b, i]
                huber = torch.where(u.abs() < 1, u**2 / 2, u.abs() - 0.5)
                tau = (i + 0.5) / n
                total += (torch.where(u < 0, 1 - tau, tau) * huber).sum() / len(z)
        losses.append(total / BATCH_SIZE)
    if before.args.critic in ("mean", "crossq"):
        return losses, {}
    return losses, {"diagnostics/q_std": sum(x.std(-1, correction=0).mean() for x in outputs) / 2}


def mfpo_reference(before, after, batch):
    obs, actions, rewards, terminations, next_obs = batch
    args, alpha, d = before.args, before.log_alpha.detach().exp(), actions.shape[-1]

    def q_value(obs, actions):
        q1, q2 = (critic_mean(args, critic_outputs(qf, obs, actions)) for qf in (after.qf1, after.qf2))
        return torch.minimum(q1, q2).detach() if args.clipped_double_q else (q1 + q2).detach() / 2

    a, log_prob = mfpo_sample(before, next_obs, torch.randn(BATCH_SIZE, d))
    next_actions = a.clamp(-1, 1)
    if args.critic == "crossq":
        outputs, next_outputs = crossq_values(critic_outputs, before, after, ((obs, actions), (next_obs, next_actions)))
    else:
        outputs = [critic_outputs(qf, obs, actions) for qf in (before.qf1, before.qf2)]
        next_outputs = [critic_outputs(qf, next_obs, next_actions) for qf in (before.qf1_target, before.qf2_target)]
    find_losses = c51_losses if args.critic == "c51" else quantile_losses
    losses, metrics = find_losses(
        before,
        outputs,
        next_outputs,
        lambda z: rewards[:, None] + args.gamma * (1 - terminations[:, None]) * (z - alpha * log_prob[:, None]),
    )
    gradients = {"q_optimizer": gradient(losses[0] + losses[1], before.q_parameters)}
    metrics |= critic_metrics(*(critic_mean(args, x) for x in outputs), *losses)

    few = obs[: args.policy_batch_size]
    size, points = len(few), args.noised_actions
    rows = size * points
    obs = few.repeat_interleave(points, 0)  # one row for each noised action
    t, r = mfpo_times(args, rows)
    noise, eps = torch.randn(size, args.policy_proposals, d), torch.randn(size, points, d).view(rows, d)
    uniform = torch.rand(size, points, args.gaussian_proposals, d).view(rows, -1, d)
    samples = [mfpo_sample(before, few, noise[:, k]) for k in range(args.policy_proposals)]
    from_policy = [a.clamp(-1, 1).repeat_interleave(points, 0) for a, _ in samples]
    log_probs = [log_prob.repeat_interleave(points, 0) for _, log_prob in samples]
    a_0 = torch.stack([from_policy[i % points][i] for i in range(rows)])
    x = (1 - t) * a_0 + t * eps
    log_weights = [
        q_value(obs, a) / alpha + Normal((1 - t) * a, t).log_prob(x).sum(-1) - log_prob
        for a, log_prob in zip(from_policy, log_probs, strict=True)
    ]
    v_policy, ess_policy = importance_estimate(log_weights, from_policy, x, t)
    policy_total = sum(torch.exp(w) for w in log_weights)[:, None]
    mean, std = x / (1 - t), t / (1 - t)
    from_gaussian = []
    for k in range(args.gaussian_proposals):
        u = torch.where(mean < 0, 1 - uniform[:, k], uniform[:, k])  # the inverse is taken of the lower tail
        box = ((-1 - mean) / std).numpy(), ((1 - mean) / std).numpy()
        a = scipy.stats.truncnorm(*box, mean.numpy(), std.expand_as(mean).numpy()).ppf(u.numpy())
        from_gaussian.append(torch.from_numpy(a).float().double())
    log_weights = [q_value(obs, a) / alpha for a in from_gaussian]
    v_gaussian, ess_gaussian = importance_estimate(log_weights, from_gaussian, x, t)
    both = ess_policy / (ess_policy + ess_gaussian)
    if args.combination == "pooled":  # the Gaussian's density is the kernel over its integral in the box
        to = Normal(mean, std)
        integral = ((to.cdf(torch.ones(d)) - to.cdf(-torch.ones(d))) / (1 - t)).prod(-1)
        gaussian_total = sum(torch.exp(w) * integral for w in log_weights)[:, None]
        both = policy_total / (policy_total + gaussian_total)
    share = {"both": both, "policy": torch.ones(rows, 1), "gaussian": torch.zeros(rows, 1)}[args.proposals]
    velocity = share * v_policy + (1 - share) * v_gaussian
    actor_loss = mfpo_regression(before.actor, obs, x, r, t, velocity, velocity)
    gradients["actor_optimizer"] = gradient(actor_loss, before.actor.parameters())
    entropy = -torch.stack(log_probs).mean()
    metrics |= {
        "losses/actor_loss": actor_loss,
        "losses/alpha": alpha,
        "diagnostics/ess_policy": ess_policy.mean(),
        "diagnostics/ess_gaussian": ess_gaussian.mean(),
        "diagnostics/policy_proposal_weight": share.mean(),
        "diagnostics/clipped_fraction": sum((a.abs() >= 1).double().mean() for a, _ in samples[:points]) / points,
        "diagnostics/entropy": entropy,
    }

    obs, a_0 = few, samples[0][0].clamp(-1, 1)
    if args.likelihood == "map":
        divergence_loss = map_loss(before, after, obs, torch.randn(size, d))
    else:
        t, r = mfpo_times(args, size)
        x = (1 - t) * a_0 + t * torch.randn(size, d)
        field = after.slow_actor or after.actor
        velocity = mfpo_flow(field, obs, x, t, t).detach()
        probes = torch.randn(args.divergence_probes, size, d)
        products = [(e * slope(lambda h, e=e: mfpo_flow(field, obs, x + h * e, t, t))).sum(-1) for e in probes]
        divergence = (sum(products) / len(products))[:, None]
        divergence_loss = mfpo_regression(before.divergence, obs, x, r, t, velocity, divergence)
    gradients["divergence_optimizer"] = gradient(divergence_loss, before.divergence.parameters())
    metrics["losses/divergence_loss"] = divergence_loss
    metrics["losses/alpha_loss"] = alpha * (entropy + args.rho * d)
    gradients["alpha_optimizer"] = [metrics["losses/alpha_loss"]]  # its derivative by log alpha, too
    return gradients, metrics


MFPO_FLAGS = [
    {},
    {"clipped_double_q": False, "time_distribution": "uniform", "data_proportion": 0.0},
    {"sampling_steps": 1, "divergence_probes": 3, "learning_rate": 0.01, "tau": 0.3},
    {"sampling_steps": 3, "meanflow": False, "proposals": "policy"},
    {"proposals": "gaussian", "rho": 1.5, "gamma": 0.8, "num_atoms": 5},
    {"critic": "quantile", "num_atoms": 5, "policy_batch_size": 7, "combination": "pooled"},
    {"noised_actions": 3, "policy_batch_size": 5, "combination": "pooled", "data_proportion": 0.5},
    {"noised_actions": 2},
    {"critic": "quantile", "num_atoms": 4, "clipped_double_q": False, "likelihood": "map"},
    {"critic": "mean", "sampling_steps": 1, "likelihood": "map", "policy_batch_size": 5},
    {"critic": "mean", "clipped_double_q": False, "sampling_steps": 3, "meanflow": False, "likelihood": "map"},
    {"critic": "crossq", "learning_rate": 0.01, "noised_actions": 2, "combination": "pooled"},
    {"critic": "crossq", "clipped_double_q": False, "policy_batch_size": 5, "likelihood": "map"},
    {"policy_tau": 0.3},
    {"policy_tau": 0.2, "critic": "crossq", "likelihood": "map", "learning_rate": 0.01},
]


@pytest.mark.parametrize("flags", MFPO_FLAGS)
@pytest.mark.parametrize("action_dim", [1, 2])
def test_mfpo(flags, action_dim):
    few = {"policy_proposals": 3, "gaussian_proposals": 4, "v_min": -2.0, "v_max": 2.0, "alpha": 0.3}
    agent = new_agent(mfpo, action_dim, few | flags)
    names = ("q", "actor", "divergence", "alpha")
    rates = {f"{name}_optimizer": agent.args.learning_rate for name in names}
    settle(agent)
    slow = {} if agent.crossq else {f"qf{i}_target": (f"qf{i}", agent.args.tau) for i in (1, 2)}
    if agent.args.policy_tau < 1:
        slow["slow_actor"] = ("actor", agent.args.policy_tau)
    # The Gaussian's proposals are rounded to float32, and that may go either way.
    check_updates(agent, action_dim, mfpo_reference, rates, slow, tolerance=1e-6)


@pytest.mark.parametrize(("candidates", "critic"), [(1, "c51"), (4, "c51"), (4, "crossq")])
def test_mfpo_acts_by_the_best_of_its_candidates(candidates, critic):
    agent = new_agent(mfpo, 2, {"eval_candidates": candidates, "critic": critic})
    settle(agent)
    obs, before = torch.randn(5, OBS_DIM), copy.deepcopy(agent.state_dict())
    for act, k in ((agent.sample_actions, 1), (agent.eval_actions, candidates)):
        torch.manual_seed(1)
        actions = act(obs)
        torch.manual_seed(1)
        a = [mfpo_sample(agent, obs, x)[0].clamp(-1, 1) for x in torch.randn(5, k, 2).unbind(1)]
        targets = agent.qf1_target, agent.qf2_target
        q = [torch.minimum(*(critic_mean(agent.args, critic_outputs(qf, obs, b)) for qf in targets)) for b in a]
        torch.testing.assert_close(actions, torch.stack(a, 1)[torch.arange(5), torch.stack(q).argmax(0)])
    for name, value in agent.state_dict().items():  # CrossQ's statistics stay
        assert torch.equal(value, before[name]), name


def test_mfpo_has_crossqs_settings_for_crossqs_critics_alone():
    agent = new_agent(mfpo, 2, {"critic": "crossq"})
    assert not any("target" in name for name, _ in agent.named_parameters())
    optimizers = agent.q_optimizer, agent.actor_optimizer, agent.divergence_optimizer, agent.alpha_optimizer
    assert [optimizer.defaults["betas"] for optimizer in optimizers] == [(0.5, 0.999)] + 3 * [(0.9, 0.999)]
    assert new_agent(mfpo, 2, {}).q_optimizer.defaults["betas"] == (0.9, 0.999)
