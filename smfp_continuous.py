# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==3.17.0", "tyro==1.0.17", "tensorboard==2.21.0",
#     "numpy==2.4.6", "tqdm==4.70.1",
# ]
# ///
"""Stochastic MeanFlow Policies (SMFP): a one-step, multimodal policy, trained by
entropic mirror descent.

Paper: https://arxiv.org/abs/2605.21282 (MeanFlow: 2505.13447).

    python smfp_continuous.py --env-id Hopper-v4 --seed 1
    python smfp_continuous.py --env-id HalfCheetah-v4 --critic sac
    python smfp_continuous.py --evaluate runs/<run>/checkpoint.pt

We have not seen the paper's text. Its abstract, scattered facts and its authors' plot data (the repository
voodooing/Issue-Plot) say: an action takes one evaluation of the network; one loss joins SAC's, with the log-probability
of one Gaussian, and a weighted MeanFlow regression that mirror descent re-weights; entropy and a KL to the previous
policy regularise it; the critics are CrossQ's, the smaller of two; the temperature is fixed per task; exploration plays
the best of K_b actions by Q, and the TD target takes the best of K_t. A standard deviation that depends on the state
seems to stand on top of the MeanFlow map.
Ours are the bound by M latents (theirs looks like M = 1), a slow copy as the previous policy, the bound of the KL, the
regression's proposals, the policy's network, one temperature for all tasks, and K_b = K_t = 1.

    policy    a = tanh(y), y = m + sigma xi, m = e - u(s, e, 0, 1), for a latent e and noise xi, both N(0, I)
    entropy   log pi_M(a|s) = log (1/M) sum_j N(y; m_j, sigma_j^2) - log |da/dy| over M latents, one of them y's own;
              -E[log pi_M] is a lower bound on the entropy, rises with M and tends to it
    descent   maximise E[Q] + alpha H(pi) - lambda KL(pi || pi_k), pi_k a slow copy of pi; the solution is
              pi_{k+1} = pi_k exp((Q - alpha log pi_k) / (alpha + lambda)) / Z
    actor     minimise  E[alpha log pi_M - min_i Q_i] + lambda E_e KL(N(m, sigma^2) || N(m_k, sigma_k^2))
              + c alpha (MeanFlow regression of u towards pi_{k+1}); lambda = kl_coef alpha, c = meanflow_coef;
              the regression alone would be too wide: it fits m to samples of pi_k, and sigma xi comes on top
    critics   Q(s, a)  <-  r + gamma (1 - terminated) (min_i Q'_i(s', a') - alpha log pi_M(a'|s')), Q' being Q itself in
              CrossQ, and its slow copy in SAC
    alpha     fixed; or, with --autotune, minimise alpha (H_M - H_target), H_M = -E[log pi_M] and H_target = -rho d

In TensorBoard: eval/episodic_return is the score, from the best of 10 candidates.
    diagnostics/latent_spread    if well below diagnostics/sigma, the policy is nearly a Gaussian; at first it is 1
    diagnostics/entropy_gap      the entropy bound is loose by at least this
    losses/actor_loss            the first of the actor's three terms
    losses/kl                    how far the policy is from its slow copy (the bound above)
"""

import copy
import ctypes
import fcntl
import io
import math
import os
import random
import shlex
import signal
import sys
import textwrap
import time
import warnings
import zipfile
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, make_dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

# A waiting thread gives up its core to other runs sooner. PyTorch's OpenMP reads this when it is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class RunArgs:
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run's folder name
    seed: int = 1  # seed of the networks, the noise, the replay sampling and the environments
    env_id: str = "Hopper-v4"  # a Gymnasium id, or `module:id` to import the module that registers it
    total_timesteps: int = 1_000_000  # environment steps, summed over the parallel environments
    num_envs: int = 1  # environments stepped in turn, on one batch of actions
    torch_deterministic: bool = True  # ask PyTorch for deterministic kernels
    cuda: bool = True  # train on the GPU when there is one
    cuda_graph: bool = True  # on a GPU, launch each update and each action as one CUDA graph, not kernel by kernel
    threads: int = 4  # most CPU threads to use; OMP_NUM_THREADS or the number of cores may lower it
    compile: bool = False  # compile the update with torch.compile; this needs a C++ compiler and takes a minute or two
    log_frequency: int = 100  # environment steps between two rows of losses and diagnostics
    diagnostics_frequency: int = 1_000  # environment steps between two rows of costlier diagnostics; 0 turns them off
    track: bool = False  # also log to Weights and Biases (needs `pip install wandb`)
    wandb_project_name: str = "meanflow-rl"  # the Weights and Biases project
    wandb_entity: str | None = None  # the Weights and Biases team


@dataclass
class OutputArgs:
    eval_frequency: int = 10_000  # environment steps between two evaluations; 0 turns them off
    eval_episodes: int = 10  # episodes per evaluation, run as one batch
    eval_max_steps: int = 10_000  # steps after which an evaluation episode that has not ended is cut
    capture_video: bool = False  # record an episode of each evaluated policy (needs `pip install moviepy`)
    evaluate: str | None = None  # play with this model.pt or checkpoint.pt, its flags where none are given; then stop
    save_model: bool = False  # write the trained weights to runs/<run>/model.pt at the end
    # steps of each environment (not their sum) between checkpoints, which begin new episodes; 0: when the run stops
    checkpoint_frequency: int = 10_000
    resume: str | None = None  # continue the run in this folder; flags that are not given keep the values of that run


@dataclass
class TrainingArgs:
    buffer_size: int = 1_000_000  # transitions that the replay buffer holds
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # step of the target critics' moving average (CrossQ's critics have no targets)
    batch_size: int = 256  # transitions per update
    utd_ratio: float = 1.0  # updates per environment step


@dataclass
class MethodArgs:
    learning_starts: int = 5_000  # uniformly random steps before the first update (as in SAC)
    policy_lr: float = 1e-3  # learning rate of the policy (as in CrossQ, measured)
    q_lr: float = 1e-3  # learning rate of the critics and of the temperature (as in SAC and CrossQ)
    policy_frequency: int = 2  # updates of the critics per update of policy, slow copy and temperature (measured)
    autotune: bool = False  # learn the temperature; otherwise it stays at --alpha (authors: fixed)
    alpha: float = 0.1  # the temperature, or its first value when it is learned (measured; authors: 0.01 to 0.2)
    rho: float = 0.5  # a learned temperature keeps the entropy bound at -rho d for d action dimensions (as in MFPO)
    latents: int = 5  # M, latents per state: samples, mixture components, and proposals of the regression (measured)
    kl_coef: float = 0.1  # lambda / alpha, weight of the KL to the slow copy of the policy; 0: without (measured)
    meanflow_coef: float = 1.0  # c, weight of the MeanFlow regression in units of alpha; 0 removes the term
    policy_tau: float = 0.005  # step of the slow copy's moving average, per update of the policy (our choice, as `tau`)
    data_proportion: float = 0.5  # share of the regression's batch at r = t, the instantaneous velocity (our choice)
    behavior_candidates: int = 1  # K_b, exploration plays the best, by Q, of this many actions (paper: above 1)
    target_candidates: int = 1  # K_t, the TD target takes the best, by Q, of this many of the M (paper: K_b / 2)
    eval_candidates: int = 10  # evaluation plays the best, by Q, of this many actions (as in MFPO)
    critic: Literal["sac", "crossq"] = "crossq"  # with target networks, or CrossQ's: batch renormalisation, no targets
    critic_width: int = 256  # units in each of the critics' two hidden layers (CrossQ: 2048)


@dataclass
class AblationArgs:
    mirror_descent_weights: bool = True  # regress towards the mirror-descent solution; otherwise the slow copy itself


@dataclass
class Args(AblationArgs, MethodArgs, TrainingArgs, OutputArgs, RunArgs):
    """All flags. The base classes, from last to first, are the groups of --help."""


class BatchRenorm(nn.Module):
    """Batch renormalisation of the last axis, with a learned scale and offset (arXiv 1702.03275; CrossQ's constants).

    In training mode it normalises (B, features) by the batch. After `warmup` batches the paper's factor r and offset d,
    bounded by r_max and d_max, correct this towards the running statistics. In evaluation mode, that of acting and of
    the policy's update, it uses the running statistics alone.
    """

    momentum, eps, warmup, r_max, d_max = 0.99, 1e-3, 100_000, 3.0, 5.0

    def __init__(self, features: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        running_std = (self.running_var + self.eps).sqrt()
        if not self.training:
            return torch.addcmul(self.bias, x - self.running_mean, self.weight / running_std)
        mean = x.mean(0)
        centred = x - mean
        var = centred.square().mean(0)  # x.var(0) is slow on a CPU
        std = (var + self.eps).sqrt()
        with torch.no_grad():
            settled = self.num_batches >= self.warmup
            r = torch.where(settled, (std / running_std).clamp(1 / self.r_max, self.r_max), 1.0)
            d = torch.where(settled, ((mean - self.running_mean) / running_std).clamp(-self.d_max, self.d_max), 0.0)
            self.running_mean.lerp_(mean, 1 - self.momentum)
            self.running_var.lerp_(var, 1 - self.momentum)
            self.num_batches += 1
        return torch.addcmul(self.bias + d * self.weight, centred, self.weight * r / std)


class ConcatLinear(nn.Linear):
    """nn.Linear on the concatenation of inputs that broadcast against each other, without forming it.

    Inputs that all candidates of a state share are multiplied once per state instead of once per candidate. This saves
    a fifth of an update's time where an observation has 376 numbers, none where it has 11. The largest input comes
    last: then only one sum is of its size.
    """

    def __init__(self, in_features: tuple[int, ...], out_features: int):
        super().__init__(sum(in_features), out_features)
        self.sizes = in_features

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        products = [F.linear(x, w) for x, w in zip(inputs, self.weight.split(self.sizes, dim=1), strict=True)]
        return sum(products[1:], products[0] + self.bias)


class SoftQNetwork(nn.Module):
    """Q(s, a) for obs (..., obs_dim) and actions (..., d) in [-1, 1]; returns (...). `renorm` is CrossQ's form."""

    def __init__(self, obs_dim: int, action_dim: int, width: int, renorm: bool):
        super().__init__()
        norm = BatchRenorm if renorm else nn.Identity
        self.norm_obs, self.norm_actions = norm(obs_dim), norm(action_dim)
        self.first = ConcatLinear((obs_dim, action_dim), width)
        layers = [nn.ReLU(), norm(width), nn.Linear(width, width), nn.ReLU(), norm(width)]
        self.rest = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        return self.rest(self.first(self.norm_obs(obs), self.norm_actions(actions))).squeeze(-1)


LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0  # as in CleanRL


class Policy(nn.Module):
    """The average velocity u(s, x, r, t) before the tanh, and log sigma by a second head on the same trunk.

    obs (..., obs_dim) broadcasts against x (..., d), r and t (..., 1) to x; u and log sigma are (..., d).
    """

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.first = ConcatLinear((obs_dim, action_dim + 2), 256)
        self.second = nn.Linear(256, 256)
        self.velocity = nn.Linear(256, action_dim)
        self.log_std = nn.Linear(256, action_dim)
        # With these zeros m = e, and sigma is the same in every state. Otherwise large observations (Humanoid's)
        # saturate the tanh and put sigma at a bound. At the lower one the KL to the slow copy, which is as narrow,
        # keeps the policy there for thousands of updates.
        for head in (self.velocity, self.log_std):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, obs, x, r, t) -> tuple[torch.Tensor, torch.Tensor]:
        flow = torch.cat([x, r.expand(*x.shape[:-1], 1), t.expand(*x.shape[:-1], 1)], dim=-1)
        h = F.silu(self.first(obs, flow))
        h = F.silu(self.second(h))
        log_std = LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (torch.tanh(self.log_std(h)) + 1)
        return self.velocity(h), log_std


def one_step(policy, obs: torch.Tensor, e: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean m = e - u(s, e, 0, 1) and log sigma, each (..., d), of the Gaussian before the tanh, given latents e."""
    u, log_std = policy(obs, e, e.new_zeros(1), e.new_ones(1))
    return e - u, log_std


def tanh_log_det(y: torch.Tensor) -> torch.Tensor:
    """log |da/dy| of a = tanh(y), summed over the last axis; exact where 1 - tanh(y)^2 rounds to 0."""
    return (2 * (math.log(2) - y - F.softplus(-2 * y))).sum(-1)


def mixture_log_prob(y: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """log (1/M) sum_j N(y; m_j, sigma_j^2) of y (..., N, d) for components (..., M, d); returns (..., N)."""
    mean, log_std = mean[..., None, :, :], log_std[..., None, :, :]  # (..., 1, M, d)
    z = (y[..., None, :] - mean) * (-log_std).exp()  # (..., N, M, d)
    log_prob = (-0.5 * z**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
    return log_prob.logsumexp(-1) - math.log(mean.shape[-2])


def policy_log_prob(y: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """log pi_M(a|s) of a = tanh(y), y (..., N, d), under the components (..., M, d); returns (..., N)."""
    return mixture_log_prob(y, mean, log_std) - tanh_log_det(y)


def entropy_bound(y: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """-E[log pi_M(a|s)] of a = tanh(y), y (..., M, d) one sample of each component: the entropy's lower bound."""
    return -policy_log_prob(y, mean, log_std).mean(-1)


def gaussian_kl(mean, log_std, mean_k, log_std_k) -> torch.Tensor:
    """KL(N(mean, std^2) || N(mean_k, std_k^2)) of diagonal Gaussians (..., d); returns (...)."""
    log_ratio = log_std - log_std_k
    return 0.5 * ((2 * log_ratio).expm1() - 2 * log_ratio + ((mean - mean_k) / log_std_k.exp()) ** 2).sum(-1)


def mirror_descent_weights(q: torch.Tensor, log_prob_k: torch.Tensor, alpha, kl_weight) -> torch.Tensor:
    """Importance weights (..., P) from pi_k to the maximiser of E[Q] + alpha H(pi) - lambda KL(pi || pi_k).

    That is pi_k exp((Q - alpha log pi_k) / (alpha + lambda)) / Z with lambda = `kl_weight`; q and log_prob_k (..., P)
    are at samples of pi_k.
    """
    return ((q - alpha * log_prob_k) / (alpha + kl_weight)).softmax(-1)


def resample(y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """One of y (B, P, d) for each row, drawn by weights (B, P) that sum to 1; returns (B, d)."""
    # The winner of an exponential race. torch.multinomial draws it so too, but waits for the GPU.
    chosen = (weights / torch.empty_like(weights).exponential_()).argmax(-1)
    return y.take_along_dim(chosen[:, None, None], 1)[:, 0]


def soft_td_target(rewards, terminations, next_q, next_log_prob, alpha, gamma) -> torch.Tensor:
    """r + gamma (1 - terminated) (Q'(s', a') - alpha log pi(a'|s')), all of shape (B,) (arXiv 1812.05905, eq. 6)."""
    return rewards + gamma * (1 - terminations) * (next_q - alpha * next_log_prob)


def sample_times(batch_size: int, data_proportion: float, device: torch.device):
    """Interval ends t >= r, each (B, 1): two uniform numbers; in the first `data_proportion` of the batch r = t."""
    times = torch.rand(2, batch_size, 1, device=device)
    t, r = times.amax(0), times.amin(0)
    n = int(batch_size * data_proportion)
    return t, torch.cat([t[:n], r[n:]])


def meanflow_loss(u, x_t, r, t, velocity) -> torch.Tensor:
    """Squared error, summed over d, between u and its target v - (t - r) du/dt (MeanFlow, equations 6 and 9); (B,).

    `u(x, r, t)` is the average velocity; the total derivative runs along dx/dt = `velocity` (B, d), r held fixed.
    """
    with torch.no_grad():
        tangents = (velocity, torch.zeros_like(r), torch.ones_like(t))
        _, derivative = torch.func.jvp(u, (x_t, r, t), tangents)
        target = velocity - (t - r) * derivative
    return ((u(x_t, r, t) - target) ** 2).sum(-1)


class Agent(nn.Module):
    """Networks, optimisers and one update of everything."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args, device: torch.device):
        super().__init__()
        self.args, self.action_dim, self.crossq = args, action_dim, args.critic == "crossq"
        self.policy = Policy(obs_dim, action_dim)
        self.slow_policy = copy.deepcopy(self.policy)
        self.qf1, self.qf2 = (SoftQNetwork(obs_dim, action_dim, args.critic_width, self.crossq) for _ in range(2))
        # CrossQ has no target networks: its critics are their own targets.
        self.qf1_target, self.qf2_target = (qf if self.crossq else copy.deepcopy(qf) for qf in (self.qf1, self.qf2))
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha)), requires_grad=args.autotune)
        self.target_entropy = -args.rho * action_dim
        self.eval().to(device)  # batch renormalisation learns in the critics' update alone
        self.q_parameters = [*self.qf1.parameters(), *self.qf2.parameters()]
        self.q_target_parameters = [*self.qf1_target.parameters(), *self.qf2_target.parameters()]
        adam = partial(torch.optim.Adam, fused=True, capturable=True)
        betas = (0.5 if self.crossq else 0.9, 0.999)
        self.q_optimizer = adam(self.q_parameters, lr=args.q_lr, betas=betas)
        self.policy_optimizer = adam(self.policy.parameters(), lr=args.policy_lr, betas=betas)
        self.alpha_optimizer = adam([self.log_alpha], lr=args.q_lr)
        if args.compile:  # for fixed shapes; fallback_random draws the same numbers as the eager update
            self.update = torch.compile(self.update, dynamic=False, options={"fallback_random": True})

    def q_value(self, obs: torch.Tensor, actions: torch.Tensor, target: bool = False) -> torch.Tensor:
        """The smaller (...) of the two critics, or of their target networks."""
        qf1, qf2 = (self.qf1_target, self.qf2_target) if target else (self.qf1, self.qf2)
        return torch.minimum(qf1(obs, actions), qf2(obs, actions))

    def sample_y(self, policy, obs: torch.Tensor, e: torch.Tensor):
        """One y (B, M, d) for each of the latents e (B, M, d), and the mean and log sigma it was drawn with."""
        mean, log_std = one_step(policy, obs[:, None], e)
        return mean + log_std.exp() * torch.randn_like(mean), mean, log_std

    def best_of(self, obs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Of y (B, K, d) the one, (B, 1, d), whose action the target critics (CrossQ: the critics) value most."""
        if y.shape[1] == 1:
            return y
        best = self.q_value(obs[:, None], torch.tanh(y), target=True).argmax(1)
        return y.take_along_dim(best[:, None, None], 1)

    @torch.no_grad()
    def sample_actions(self, obs: torch.Tensor, candidates: int | None = None) -> torch.Tensor:
        """Actions (B, d) for training, each the best of K_b or of `candidates`."""
        candidates = candidates or self.args.behavior_candidates
        e = torch.randn(len(obs), candidates, self.action_dim, device=obs.device)
        y, _, _ = self.sample_y(self.policy, obs, e)
        return torch.tanh(self.best_of(obs, y)[:, 0])

    def eval_actions(self, obs: torch.Tensor) -> torch.Tensor:
        """Actions (B, d) for evaluation."""
        return self.sample_actions(obs, self.args.eval_candidates)

    def update(self, obs, actions, rewards, terminations, next_obs, with_policy=True) -> dict[str, torch.Tensor]:
        """One step on the critics and, `with_policy`, on policy, slow copy and temperature; returns scalars to log.

        An update must keep three rules, or it cannot be recorded as a CUDA graph. It reads no number on the host (no
        `.item()`, no `if` on a tensor). It changes no Python state from call to call. Its shapes stay the same.
        """
        alpha = self.log_alpha.detach().exp()
        metrics = self.update_critics(obs, actions, rewards, terminations, next_obs, alpha)
        if with_policy:
            metrics |= self.update_policy(obs, alpha)
        # Detached: a loss that keeps its autograd graph alive ties the parameters to a stream and prevents CUDA graphs.
        return {name: value.detach() for name, value in metrics.items()}

    def update_critics(self, obs, actions, rewards, terminations, next_obs, alpha) -> dict[str, torch.Tensor]:
        """One step on the critics and, for SAC's, on their targets."""
        args = self.args
        with torch.no_grad():
            # M latents for one action: its density has M components.
            e = torch.randn(len(obs), args.latents, self.action_dim, device=obs.device)
            y, mean, log_std = self.sample_y(self.policy, next_obs, e)
            best_y = self.best_of(next_obs, y[:, : args.target_candidates])  # (B, 1, d)
            next_actions = torch.tanh(best_y[:, 0])
            # The density of the policy, also where a' is the best of K_t.
            next_log_prob = policy_log_prob(best_y, mean, log_std)[:, 0]
        q1, q2, next_q = self.critic_values(obs, actions, next_obs, next_actions)
        target = soft_td_target(rewards, terminations, next_q, next_log_prob, alpha, args.gamma)
        qf1_loss, qf2_loss = F.mse_loss(q1, target), F.mse_loss(q2, target)
        self.q_optimizer.zero_grad()
        (qf1_loss + qf2_loss).backward()
        self.q_optimizer.step()
        if not self.crossq:
            with torch.no_grad():
                torch._foreach_lerp_(self.q_target_parameters, self.q_parameters, args.tau)
        return {
            "losses/qf1_values": q1.mean(),
            "losses/qf2_values": q2.mean(),
            "losses/qf1_loss": qf1_loss,
            "losses/qf2_loss": qf2_loss,
            "losses/qf_loss": (qf1_loss + qf2_loss) / 2,
        }

    def critic_values(self, obs, actions, next_obs, next_actions) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Q_1(s, a), Q_2(s, a) and, without gradient, the smaller of Q'_1(s', a') and Q'_2(s', a'); each (B,)."""
        if self.crossq:  # which normalises both pairs by the statistics of the two together (arXiv 1902.05605)
            self.train()
            both = torch.cat([obs, next_obs]), torch.cat([actions, next_actions])
            (q1, next_q1), (q2, next_q2) = (qf(*both).chunk(2) for qf in (self.qf1, self.qf2))
            self.eval()
            return q1, q2, torch.minimum(next_q1, next_q2).detach()
        with torch.no_grad():
            next_q = torch.minimum(self.qf1_target(next_obs, next_actions), self.qf2_target(next_obs, next_actions))
        return self.qf1(obs, actions), self.qf2(obs, actions), next_q

    def update_policy(self, obs: torch.Tensor, alpha: torch.Tensor) -> dict[str, torch.Tensor]:
        """One step on the policy by the three terms, on its slow copy and on the temperature."""
        args, batch_size = self.args, len(obs)
        e = torch.randn(batch_size, args.latents, self.action_dim, device=obs.device)
        y, mean, log_std = self.sample_y(self.policy, obs, e)
        with torch.no_grad():
            y_k, mean_k, log_std_k = self.sample_y(self.slow_policy, obs, e)

        # 1. Soft policy improvement, reparameterised through e and xi.
        entropy = entropy_bound(y, mean, log_std).mean()
        actor_loss = -alpha * entropy - self.q_value(obs[:, None], torch.tanh(y)).mean()

        # 2. KL to the slow copy, the latent shared: an upper bound, by joint convexity.
        kl = gaussian_kl(mean, log_std, mean_k, log_std_k).mean()
        loss = actor_loss + args.kl_coef * alpha * kl

        metrics = {"losses/actor_loss": actor_loss, "losses/kl": kl, "losses/alpha": alpha}
        metrics |= {"diagnostics/entropy": entropy, "diagnostics/sigma": log_std.exp().mean()}

        # 3. MeanFlow regression towards the mirror-descent solution, from proposals of the slow copy.
        if args.meanflow_coef > 0:
            with torch.no_grad():
                if args.mirror_descent_weights:
                    q_k = self.q_value(obs[:, None], torch.tanh(y_k))
                    log_prob_k = policy_log_prob(y_k, mean_k, log_std_k)  # of M latents, as pi's own
                    weights = mirror_descent_weights(q_k, log_prob_k, alpha, args.kl_coef * alpha)
                else:  # towards the slow copy itself
                    weights = torch.full_like(y_k[..., 0], 1 / args.latents)
                y_0 = resample(y_k, weights)
                eps = torch.randn_like(y_0)
                t, r = sample_times(batch_size, args.data_proportion, obs.device)
                x_t, velocity = (1 - t) * y_0 + t * eps, eps - y_0
            regression = meanflow_loss(lambda x, r, t: self.policy(obs, x, r, t)[0], x_t, r, t, velocity).mean()
            loss = loss + args.meanflow_coef * alpha * regression
            metrics["losses/meanflow_loss"] = regression
            metrics["diagnostics/ess"] = (1 / (weights**2).sum(-1)).mean()
        self.policy_optimizer.zero_grad()
        loss.backward(inputs=[*self.policy.parameters()])  # the critics only pass the gradient on
        self.policy_optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_([*self.slow_policy.parameters()], [*self.policy.parameters()], args.policy_tau)

        if args.autotune:
            alpha_loss = self.log_alpha.exp() * (entropy.detach() - self.target_entropy)
            self.alpha_optimizer.zero_grad()
            alpha_loss.backward()
            self.alpha_optimizer.step()
            metrics["losses/alpha_loss"] = alpha_loss
        return metrics

    @torch.no_grad()
    def diagnostics(self, obs: torch.Tensor) -> dict[str, float]:
        """Measures that are too costly for every update, at states (B, obs_dim).

        entropy_gap: how much the entropy bound rises from M to 8 M latents, in nats. latent_spread: the standard
        deviation over the latents of the mean before the tanh; near 0 the policy is a Gaussian.
        """
        e = torch.randn(len(obs), 8 * self.args.latents, self.action_dim, device=obs.device)
        sample = self.sample_y(self.policy, obs, e)  # y, mean and log sigma, each (B, 8 M, d)
        bound_8m = entropy_bound(*sample).mean()
        bound_m = entropy_bound(*(x.unflatten(1, (8, -1)) for x in sample)).mean()  # each by its own group of M alone
        return {
            "diagnostics/entropy_gap": (bound_8m - bound_m).item(),
            "diagnostics/latent_spread": sample[1].std(1).mean().item(),
        }


def make_env(env_id: str, render: bool = False) -> gym.Env:
    """An environment with vector observations and actions in [-1, 1]^d; exits with code 2 where there is none.

    With `render` it can be recorded.
    """
    mode = {"render_mode": "rgb_array"} if render else {}
    if env_id.startswith(":") or env_id.count(":") > 1:
        fail(f"--env-id {env_id} cannot be made: it must be an id, or module:id")
    try:
        with warnings.catch_warnings():  # what an imported package changes is undone: dm_control turns all warnings on
            warnings.filterwarnings("ignore", ".*is out of date")  # said of the v4 tasks, which papers report
            env = gym.make(env_id, disable_env_checker=True, **mode)
    except (gym.error.Error, ImportError) as error:
        fail(f"--env-id {env_id} cannot be made: {error}")
    except TypeError as error:
        if not render or "argument 'render_mode'" not in str(error):
            raise
        fail(f"--capture-video: {env_id} has no render_mode, so nothing can be recorded; leave the flag out")
    actions, observations = env.action_space, env.observation_space
    usable = isinstance(actions, gym.spaces.Box) and len(actions.shape) == 1 and actions.dtype.kind == "f"
    width = actions.high.astype(float) - actions.low if usable else np.zeros(0)
    if width.size == 0 or not 0 < width.min() <= width.max() < 1e30:
        fail(f"--env-id {env_id}: its actions are {actions}; they must be a bounded Box of d floats with low < high")
    if not observations.is_np_flattenable or len(observations.shape or ()) > 2:
        fail(f"--env-id {env_id}: its observations are {observations}; they must be vectors, or flatten to one")
    if not isinstance(observations, gym.spaces.Box) or len(observations.shape) != 1:
        env = gym.wrappers.FlattenObservation(env)
    if render:
        with refusing("--capture-video: no frame can be rendered (where there is no display, try MUJOCO_GL=egl)"):
            env.reset(seed=0)
            if not isinstance(frame := env.render(), np.ndarray):
                raise ValueError(f"render() returned {frame!r}")
    return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


def own_copy(env: gym.Env, obs) -> np.ndarray:
    """An observation as float32 (obs_dim,), copied: an environment may change the array that it returned."""
    obs = np.array(obs, np.float32).reshape(env.observation_space.shape)
    if not np.isfinite(obs).all():
        raise FloatingPointError(f"the environment returned the observation {obs.tolist()}")
    return obs


def reset(env: gym.Env, seed: int | None = None) -> np.ndarray:
    """Begin an episode; returns its first observation (obs_dim,)."""
    return own_copy(env, env.reset(seed=seed)[0])


def step(env: gym.Env, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
    """One step: the next observation (obs_dim,), reward, terminated, truncated. The info dict is ignored."""
    if not np.isfinite(action).all():
        raise FloatingPointError(f"the policy's action is {action.tolist()}")
    obs, reward, terminated, truncated, _ = env.step(action)
    reward = np.asarray(reward, np.float64).item()
    if not abs(reward) < 3e38:  # nan, or outside float32's range
        raise FloatingPointError(f"the environment returned the reward {reward}")
    return own_copy(env, obs), reward, bool(terminated), bool(truncated)


def restart(envs: list[gym.Env], seed: int) -> np.ndarray:
    """Seed every random generator and begin new episodes; returns their first observations (num_envs, obs_dim).

    This is called at the start and at each checkpoint, by a run that goes on and by a run that is resumed. So the two
    are the same, whatever generators an environment keeps. On a CPU they agree bit for bit.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    for i, env in enumerate(envs):
        env.action_space.seed(derive_seed(seed, i))  # not the environment's own seed: equal seeds give equal noise
    return np.stack([reset(env, seed + i) for i, env in enumerate(envs)])


class ReplayBuffer:
    """The latest transitions, `size` in all, in rings on `device`; a row has one transition of each environment."""

    def __init__(self, size: int, num_envs: int, obs_dim: int, action_dim: int, device: torch.device):
        self.num_rows, self.num_envs = max(size // num_envs, 1), num_envs
        sizes = {"obs": [obs_dim], "actions": [action_dim], "rewards": [], "terminations": [], "next_obs": [obs_dim]}
        self.rings = {name: torch.zeros(self.num_rows, num_envs, *n, device=device) for name, n in sizes.items()}
        self.added = 0  # rows so far
        self.filled = torch.zeros((), dtype=torch.float64, device=device)  # filled rows, where a CUDA graph reads it

    def add(self, **transition: np.ndarray) -> None:
        """Append a row: for each ring an array of `num_envs` rows."""
        for name, ring in self.rings.items():
            ring[self.added % self.num_rows] = torch.from_numpy(transition[name])
        self.added += 1
        self.filled.fill_(min(self.added, self.num_rows))

    def sample(self, batch_size: int) -> tuple[torch.Tensor, ...]:
        """B uniform draws: obs (B, obs_dim), actions (B, d), rewards (B,), terminations (B,), next_obs (B, obs_dim)."""
        uniform = torch.rand(2, batch_size, dtype=torch.float64, device=self.filled.device)
        row, env = (uniform[0] * self.filled).long(), (uniform[1] * self.num_envs).long()
        return tuple(ring[row, env] for ring in self.rings.values())

    def state_dict(self) -> dict:
        """The filled rows. NumPy makes them views (on a CPU): of PyTorch's own, torch.save writes the whole ring."""
        rows = min(self.added, self.num_rows)
        rings = {name: torch.from_numpy(ring[:rows].cpu().numpy()) for name, ring in self.rings.items()}
        return rings | {"added": self.added}

    def load_state_dict(self, state: dict) -> None:
        """Take back what `state_dict` returned, of a buffer of the same size or of a smaller one that was not full."""
        if state["rewards"].shape != (min(state["added"], self.num_rows), self.num_envs):
            raise ValueError("the replay buffer has another --buffer-size or --num-envs")
        for name, ring in self.rings.items():
            ring[: len(state[name])] = state[name]
        self.added = state["added"]
        self.filled.fill_(min(self.added, self.num_rows))


def evaluate(act, envs: list[gym.Env], seed: int, device: torch.device, max_steps: int, stop=lambda: False):
    """Play one episode in each environment, all as one batch; returns the undiscounted returns (len(envs),).

    `act` maps observations (B, obs_dim) to actions (B, d). The result depends on the weights and `seed` alone, and
    PyTorch's random state is left as it was. Episodes are cut after `max_steps`. Returns None once `stop()` is true.
    """
    with seeded(seed, device):
        obs = np.stack([reset(env, seed + i) for i, env in enumerate(envs)])
        returns, running = np.zeros(len(envs)), set(range(len(envs)))
        for _ in range(max_steps):
            # All environments, finished ones too: a CUDA graph needs one shape.
            actions = act(torch.from_numpy(obs).to(device)).cpu().numpy()
            for i in tuple(running):
                obs[i], reward, terminated, truncated = step(envs[i], actions[i])
                returns[i] += reward
                if terminated or truncated:
                    running.remove(i)
            if not running:
                return returns
            if stop():
                say("the evaluation was stopped; a resumed run begins with it")
                return None
    warn(f"an evaluation episode had not ended after {max_steps} steps and was cut (see --eval-max-steps)")
    return returns


def train(args: Args) -> int:
    """Train from scratch or, with `--resume`, from a checkpoint; returns the exit code. `Run` has the rest of a run."""
    device = set_up_torch(args)
    envs = [make_env(args.env_id) for _ in range(args.num_envs)]
    with refusing(f"--env-id {args.env_id} cannot be made once more, for evaluation (see --eval-frequency)"):
        num_eval_envs = args.eval_episodes if args.eval_frequency else 0
        eval_envs = [make_env(args.env_id, render=args.capture_video and i == 0) for i in range(num_eval_envs)]
    obs_dim, action_dim = envs[0].observation_space.shape[0], envs[0].action_space.shape[0]
    torch.manual_seed(args.seed)
    agent = Agent(obs_dim, action_dim, args, device)
    with refusing(f"--buffer-size {args.buffer_size} does not fit"):
        buffer = ReplayBuffer(args.buffer_size, args.num_envs, obs_dim, action_dim, device)
    graphed = args.cuda_graph and device.type == "cuda"
    learn = CudaGraph(lambda with_policy: agent.update(*buffer.sample(args.batch_size), with_policy), graphed)
    act, play = CudaGraph(agent.sample_actions, graphed), CudaGraph(agent.eval_actions, graphed)
    with Run(args, agent, buffer) as run:
        if args.capture_video:
            videos = f"{run.folder}/videos_from_{run.global_step}"  # two per evaluation: eval, eval_exploring
            eval_envs[0] = gym.wrappers.RecordVideo(eval_envs[0], videos, lambda episode: True)

        def score() -> None:
            """Evaluate. If a signal or an exception stops it, a resumed run begins with it."""
            results, seed = {}, derive_seed(args.seed, run.global_step, 0)
            for tag, policy in (("eval", play), ("eval_exploring", act)):
                scores = evaluate(policy, eval_envs, seed, device, args.eval_max_steps, run.stop_requested)
                if scores is None:
                    return
                results |= {f"{tag}/episodic_return": scores.mean(), f"{tag}/episodic_return_std": scores.std()}
                say(f"step {run.global_step}: {tag} return {scores.mean():.1f} +- {scores.std():.1f}")
            run.log(results)
            run.unscored = False

        if run.unscored:
            score()
            run.save()
        obs = restart(envs, derive_seed(args.seed, run.global_step, 1))  # (num_envs, obs_dim)
        returns, lengths = np.zeros(args.num_envs), np.zeros(args.num_envs, int)  # of the running episodes
        for global_step in run.steps():
            if global_step <= args.learning_starts:
                actions = np.stack([env.action_space.sample() for env in envs])
            else:
                actions = act(torch.from_numpy(obs).to(device)).cpu().numpy()

            # The update is launched before the environments step: on a GPU the two then overlap. (Without random steps
            # the first step has nothing to learn from.)
            while buffer.added and run.num_updates < int((global_step - args.learning_starts) * args.utd_ratio):
                run.num_updates += 1
                run.metrics |= learn(with_policy=run.num_updates % args.policy_frequency == 0)

            steps = [step(env, action) for env, action in zip(envs, actions, strict=True)]
            next_obs, rewards, terminations, truncations = map(np.array, zip(*steps, strict=True))
            buffer.add(obs=obs, actions=actions, rewards=rewards, terminations=terminations, next_obs=next_obs)
            run.global_step, obs = global_step, next_obs
            run.unscored = args.eval_frequency > 0 and (run.due(args.eval_frequency) or run.complete)
            returns, lengths = returns + rewards, lengths + 1
            ended = np.flatnonzero(terminations | truncations)
            if len(ended):  # the mean of several, because TensorBoard shows one row per step
                mean_return, mean_length = returns[ended].mean(), lengths[ended].mean()
                run.log({"charts/episodic_return": mean_return, "charts/episodic_length": mean_length})
                obs[ended], returns[ended], lengths[ended] = [reset(envs[i]) for i in ended], 0, 0

            scalars = to_floats(run.metrics)  # in each step, so that a run stops at the one that went wrong
            if scalars and run.due(args.log_frequency):
                run.log(scalars | {"charts/SPS": run.steps_per_second()})
            if scalars and run.due(args.diagnostics_frequency):
                with seeded(derive_seed(args.seed, global_step, 2), device):
                    run.log(agent.diagnostics(buffer.sample(64)[0]))
            if run.unscored:
                score()
            if run.checkpoint_due(lengths.max()):
                run.save()
                if run.complete or run.stop_requested():
                    break
                # As a resumed run does, which begins here with new episodes. So the two are equal.
                obs = restart(envs, derive_seed(args.seed, global_step, 1))
                returns[:], lengths[:], run.metrics = 0, 0, {}
    for env in (*eval_envs, *envs):
        env.close()
    return run.exit_code


class Run:
    """What a run does besides learning: its folder, log, progress, checkpoints and end.

    Ctrl-C, SIGTERM and a closed terminal end it after a step, with a checkpoint. So does an exception, which is then
    shown as it is; only numbers that are not finite (FloatingPointError) leave the last checkpoint alone.
    """

    def __init__(self, args: Args, agent: Agent, buffer: ReplayBuffer):
        self.args = replace(args, resume=None)  # as its files keep them: they do not say where the run was resumed
        self.agent, self.buffer = agent, buffer
        self.global_step, self.num_updates = 0, 0
        self.unscored = False  # whether an evaluation is due and has not ended; checkpoints hold all three
        self.metrics = {}  # the latest scalars of the updates since the last checkpoint
        self.saved_step = None  # of the last checkpoint
        self.exit_code = 0  # or 128 + the number of the signal that has asked the run to stop
        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}".replace("/", "-").replace(":", "-")
        self.folder = Path(args.resume or f"runs/{name}")
        if not args.resume:
            with refusing("the run's folder cannot be made"):
                self.folder.mkdir(parents=True)
        with refusing(f"--resume {self.folder}: it is no folder, or another process is training it"):
            self.lock = os.open(self.folder, os.O_RDONLY)
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            if args.resume:
                self.load()
            if args.track:
                place = {"project": args.wandb_project_name, "entity": args.wandb_entity}
                place |= dict.fromkeys(("id", "name"), self.folder.resolve().name)
                with refusing("--track: Weights and Biases cannot log the run"):
                    __import__("wandb").init(**place, resume="allow", sync_tensorboard=True, config=vars(args))
        except SystemExit:
            os.close(self.lock)
            if not args.resume:
                os.removedirs(self.folder)  # it is empty
            raise
        self.writer = SummaryWriter(str(self.folder), purge_step=self.global_step + 1 if args.resume else None)
        table = "\n".join(f"|{name}|{value}|" for name, value in vars(self.args).items())
        self.writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}", self.global_step)
        self.restart_step = self.log_step = self.global_step
        self.log_time = time.time()

    def __enter__(self) -> "Run":
        self.handlers = {number: signal.signal(number, self.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # under nohup it is ignored, and stays so
            self.handlers[signal.SIGHUP] = signal.signal(signal.SIGHUP, self.on_signal)
        start = "" if self.saved_step is None else f" from step {self.saved_step} on"
        say(f"Training on {self.agent.log_alpha.device}{start}; the run's files are in {self.folder}")
        if self.complete:
            say(f"no step is left; for more, raise --total-timesteps {self.args.total_timesteps}")
        return self

    def on_signal(self, number: int, frame) -> None:
        if self.exit_code:
            os._exit(128 + number)
        self.exit_code = 128 + number
        say("stopping with a checkpoint; once more to stop at once")

    def stop_requested(self) -> bool:
        return self.exit_code > 0

    def steps(self) -> tqdm:
        """The global steps that are left, under a progress bar; none while an evaluation is left."""
        total, stride = self.global_step if self.unscored else self.args.total_timesteps, self.args.num_envs
        # miniters, smoothing: so that the time left is right soon after the random steps, which are much faster
        options = {"unit": "step", "unit_scale": stride > 1 and stride, "mininterval": 1, "miniters": 1}
        options |= {"smoothing": 0.5, "disable": None, "initial": self.global_step // stride, "total": total // stride}
        return tqdm(range(self.global_step + stride, total + 1, stride), **options)

    def due(self, every: int) -> bool:
        """Whether this step is the first one at or after a multiple of `every`; never if that is 0."""
        return every > 0 and self.global_step % every < self.args.num_envs

    @property
    def complete(self) -> bool:
        """Whether no step and no evaluation is left."""
        return self.global_step + self.args.num_envs > self.args.total_timesteps and not self.unscored

    def log(self, scalars: dict[str, float]) -> None:
        """Write scalars to TensorBoard. A full disk costs the curves and not the run."""
        try:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, self.global_step)
            self.writer.flush()
        except OSError as error:
            warn(f"TensorBoard cannot write ({error}); its rows are missing until the run is resumed")

    def steps_per_second(self) -> float:
        """Environment steps per second since the last call."""
        steps, seconds = self.global_step - self.log_step, time.time() - self.log_time
        self.log_step, self.log_time = self.global_step, time.time()
        return steps / max(seconds, 1e-9)

    def checkpoint_due(self, longest: int) -> bool:
        """Whether to write a checkpoint and begin new episodes; `longest` is the length of the longest one that runs.

        A checkpoint waits for a step after which none runs (`longest` is 0), but at most as long again.
        """
        since, every = (self.global_step - self.restart_step) // self.args.num_envs, self.args.checkpoint_frequency
        overdue = 0 < 2 * every <= since
        if overdue and longest == since:
            warn(f"a checkpoint cut an episode after {since} steps; a higher --checkpoint-frequency lets it end")
        return self.complete or self.stop_requested() or overdue or (0 < every <= since and longest == 0)

    def save(self) -> None:
        """Write a checkpoint; if a weight is not finite, leave the last one and raise FloatingPointError."""
        if not all(x.isfinite().all() for x in self.agent.state_dict().values()):
            raise FloatingPointError("a network's weight is not finite")
        self.restart_step = self.global_step
        if write_file(self.folder / "checkpoint.pt", self.state_dict):
            self.saved_step = self.global_step

    def state_dict(self) -> dict:
        """What a checkpoint holds."""
        state = {name: getattr(self, name) for name in ("global_step", "num_updates", "unscored")}
        state["optimizers"] = {name: optimizer.state_dict() for name, optimizer in optimizers(self.agent).items()}
        state |= {"agent": self.agent.state_dict(), "buffer": self.buffer.state_dict()}
        return state | {"args": vars(self.args)}

    def load(self) -> None:
        """Take up what the folder's checkpoint holds; exits with code 2 if it does not fit."""
        saved, before = load_file(self.folder / "checkpoint.pt", "--resume")
        with refusing(f"--resume {self.folder} does not fit"):
            self.agent.load_state_dict(saved["agent"])
            if not self.args.autotune:  # the temperature is the flag's, as the learning rates are
                self.agent.log_alpha.fill_(math.log(self.args.alpha))
            for name, optimizer in optimizers(self.agent).items():
                # A copy: while tensors are mapped to a file, its space on the disk stays taken.
                state = copy.deepcopy(saved["optimizers"][name]["state"])
                optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
            self.buffer.load_state_dict(saved["buffer"])
            self.global_step = self.saved_step = saved["global_step"]
        self.num_updates = saved["num_updates"]
        self.unscored = self.args.eval_frequency > 0 and saved.get("unscored", False)
        if any(getattr(self.args, name) != getattr(before, name) for name in ("learning_starts", "utd_ratio")):
            # Updates go on from here at the new rate.
            self.num_updates = max(int((self.global_step - self.args.learning_starts) * self.args.utd_ratio), 0)

    def __exit__(self, kind, error: BaseException | None, traceback) -> None:
        if error and not isinstance(error, FloatingPointError) and self.global_step > (self.saved_step or 0):
            with suppress(Exception):  # it must not hide the first error
                self.save()
        written, model = self.saved_step == self.global_step, self.folder / "model.pt"
        if self.complete and not error and self.args.save_model:
            written &= write_file(model, lambda: {"args": vars(self.args), "agent": self.agent.state_dict()})
        with suppress(OSError):
            self.writer.close()
        os.close(self.lock)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        again = shlex.join(["python", os.path.relpath(__file__), "--resume", str(self.folder)])
        how = "there is no checkpoint" if self.saved_step is None else f"from step {self.saved_step}: {again}"
        if error:  # shown below the traceback
            if isinstance(error, FloatingPointError):
                how += " (with the same flags and seed it will likely happen again)"
            error.add_note(f"after step {self.global_step} (seed {self.args.seed}); {how}")
        elif self.complete:
            self.exit_code = 0 if written else 1
            say(f"Done; the run's files are in {self.folder}" if written else f"the last files are missing; {how}")
        else:
            say(f"stopped at step {self.global_step}; {how}")


def write_file(path: Path, content) -> bool:
    """Write what `content()` returns, whole or not at all; False, with a warning, where the disk or memory is full."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content(), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        return True
    except (OSError, RuntimeError, MemoryError) as error:  # torch.save has RuntimeErrors for a full disk
        say(f"warning: {path} was not written ({type(error).__name__}: {error}); an earlier one, if any, is unchanged")
        with suppress(OSError):
            temporary.unlink()
        return False


def load_file(path: str | Path, what: str) -> tuple[dict, Args]:
    """A saved file's content, on the CPU, and its arguments. Runs no code from it.

    Exits with code 2 if it is unusable; `what` begins the message.
    """
    with refusing(f"{what} {path} cannot be used"):
        if damaged := zipfile.ZipFile(path).testzip():  # torch.load does not look at the checksums
            raise ValueError(f"{damaged} is damaged")
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        known, found = {field.name for field in fields(Args)}, saved["args"].keys()
        if unknown := ", ".join(sorted(found - known)):
            raise ValueError(f"it was made with {unknown}, which {Path(__file__).name} does not know")
        if missing := ", ".join(sorted(known - found)):
            warn(f"{path} was made without {missing}: the defaults are taken")
        return saved, Args(**saved["args"])


def to_floats(scalars: dict[str, torch.Tensor]) -> dict[str, float]:
    """Scalars on the host, by one transfer; raises FloatingPointError where one is not finite."""
    floats = dict(zip(scalars, torch.stack([*scalars.values()]).tolist(), strict=True)) if scalars else {}
    for name, value in floats.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"{name} is {value}")
    return floats


def optimizers(agent: Agent) -> dict[str, torch.optim.Optimizer]:
    """The agent's optimisers by name."""
    return {name: value for name, value in vars(agent).items() if isinstance(value, torch.optim.Optimizer)}


def derive_seed(*key: int) -> int:
    """A seed below 2^31 for one purpose at one step, so that nothing depends on how many numbers were drawn before.

    In `train` the key is (seed, step, purpose): 0 is an evaluation, 1 a restart, 2 are diagnostics.
    """
    return int(np.random.SeedSequence(key).generate_state(1)[0]) >> 1


@contextmanager
def seeded(seed: int, device: torch.device):
    """Inside, PyTorch draws from `seed`; afterwards its generators go on where they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class CudaGraph:
    """Calls `function`; on a GPU, if `enabled`, by replaying a CUDA graph of it: one launch instead of hundreds.

    There is a graph for each combination of flags and input shapes. A replay draws fresh random numbers. It overwrites
    the outputs of the last one, so use or copy those first. What cannot be recorded runs eagerly, with one warning.
    """

    warmup = 3  # calls before the recording, in which libraries allocate memory and optimisers create their state

    def __init__(self, function, enabled: bool):
        self.function, self.enabled, self.calls, self.graphs = function, enabled, Counter(), {}
        self.stream = torch.cuda.Stream() if enabled else None  # PyTorch wants warming up off its default stream

    def __call__(self, *inputs: torch.Tensor, **flags):
        if not self.enabled:
            return self.function(*inputs, **flags)
        key = (*flags.items(), *(x.shape for x in inputs))
        self.calls[key] += 1
        if self.calls[key] <= self.warmup:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.function(*inputs, **flags)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if key not in self.graphs:
            graph, copies, current = torch.cuda.CUDAGraph(), [x.clone() for x in inputs], torch.cuda.current_stream()
            try:
                with torch.cuda.graph(graph, stream=self.stream):
                    self.graphs[key] = graph, copies, self.function(*copies, **flags)
            except RuntimeError as error:
                torch.cuda.set_stream(current)  # where recording fails at its end, PyTorch leaves its own
                warn(f"a CUDA graph cannot be recorded, so the run goes on without ({error})")
                self.enabled = False
                return self.function(*inputs, **flags)
        graph, copies, outputs = self.graphs[key]
        for recorded, given in zip(copies, inputs, strict=True):
            recorded.copy_(given)
        graph.replay()
        return outputs


def set_up_torch(args: Args) -> torch.device:
    """Set PyTorch up before it first computes; returns the device to train on."""
    torch.set_num_threads(min(args.threads, torch.get_num_threads()))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS is not deterministic
    torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it costs a kernel per tensor
    if "AMD" in torch.cpu.get_capabilities().get("cpu_name", ""):
        # This lets oneDNN multiply matrices, on an EPYC in less than half of MKL's time. The name misleads: oneDNN
        # rounds to bfloat16 only where a processor has AMX, which AMD's have not.
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    torch.set_flush_denormal(True)  # Adam's averages for dead ReLUs end as denormals, which are slow on many a CPU
    warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")  # Adam's, outside a graph
    return torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")


def keep_freed_memory() -> None:
    """Make glibc keep freed memory instead of returning it, because the system zeroes each page that comes back.

    An update then takes about a tenth less time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # None on other C libraries
    if mallopt:
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_mmap_threshold, 32 * 2**20)  # the largest value: beyond are the replay buffer's rings
        mallopt(m_trim_threshold, 2**31 - 1)


LIMITS = {"seed": (0, 2**32 - 1), "gamma": (0, 1 - 1e-6), "tau": (1e-30, 1)}  # other numbers are positive
LIMITS |= {name: (0, 1e30) for name in ("learning_starts", "eval_frequency", "checkpoint_frequency")}
LIMITS |= {name: (0, 1e30) for name in ("diagnostics_frequency", "kl_coef", "meanflow_coef")}
LIMITS |= {"rho": (-1e30, 1e30), "policy_tau": (1e-30, 1), "data_proportion": (0, 1)}
CONFLICTS = {  # what is wrong with the flags, and a function of them that is true where it is
    "--target-candidates must not be above --latents": lambda args: args.target_candidates > args.latents,
}


def can_compile() -> bool:
    """Whether torch.compile works here."""
    try:
        return bool(torch.compile(torch.ones_like, fullgraph=True)(torch.zeros(8)).all())
    except Exception:  # no compiler, or one that does not work
        return False


def check_args(args: Args) -> None:
    """Refuse numbers that make no sense, flags that contradict each other, and what is not installed."""
    for name, value in vars(args).items():
        low, high = LIMITS.get(name, (1 if type(value) is int else 1e-30, 1e30))
        if type(value) in (int, float) and not low <= value <= high:
            fail(f"--{name.replace('_', '-')} is {value}; it must be between {low:g} and {high:g}")
    for message, is_wrong in CONFLICTS.items():
        if is_wrong(args):
            fail(message)
    if args.compile and args.evaluate is None and not can_compile():
        fail("--compile needs a working C++ compiler; install one, such as g++")
    if args.total_timesteps < args.num_envs:
        fail(f"--total-timesteps {args.total_timesteps} is below --num-envs {args.num_envs}; raise it")
    if args.total_timesteps <= args.learning_starts and args.evaluate is None:
        warn(f"--total-timesteps {args.total_timesteps} is not above --learning-starts: nothing will be learned")
    if len(args.exp_name) > 100:
        fail(f"--exp-name is too long for a folder's name: {args.exp_name}")
    for flag, package in (("capture_video", "moviepy"), ("track", "wandb")):
        if getattr(args, flag) and not find_spec(package):
            fail(f"--{flag.replace('_', '-')} needs the package {package}: pip install {package}")
    if args.capture_video and not args.eval_frequency and args.evaluate is None:
        fail("--capture-video records evaluations, which --eval-frequency 0 turns off")
    if args.track:
        with refusing("--track: there is no access to Weights and Biases"):
            __import__("wandb").login()


def parse_args(line: list[str] | None = None, default: Args | None = None) -> Args:
    """The flags, checked. With `--resume` and `--evaluate`, those that are not given are the ones of that run."""
    values = vars(default or Args())
    kinds = {kind.__name__.removesuffix("Args").lower(): kind for kind in Args.__bases__[::-1]}
    groups = {name: kind(**{f.name: values[f.name] for f in fields(kind)}) for name, kind in kinds.items()}
    description = textwrap.indent("\n\n".join(__doc__.split("\n\n")[:3]), " ")  # tyro keeps lines that begin so
    flags, config = make_dataclass("Flags", kinds.items()), (tyro.conf.OmitArgPrefixes,)
    parsed = tyro.cli(flags, args=line, default=flags(**groups), description=description, config=config)
    args = Args(**{name: value for group in vars(parsed).values() for name, value in vars(group).items()})
    if args.resume is not None and args.evaluate is not None:
        fail("--resume goes on with a run and --evaluate plays one; leave one of them out")
    if args.resume is not None and default is None:
        if Path(args.resume).is_file():
            fail(f"--resume {args.resume} is a file; name its folder, {Path(args.resume).parent}")
        return parse_args(line, load_file(Path(args.resume, "checkpoint.pt"), "--resume")[1])
    if args.evaluate is not None and default is None:
        if Path(args.evaluate).is_dir():
            fail(f"--evaluate {args.evaluate} is a folder; name the model.pt or checkpoint.pt in it")
        saved = load_file(args.evaluate, "--evaluate")[1]
        return parse_args(line, replace(saved, resume=None, track=False, capture_video=False))
    if (args.resume or args.evaluate) and args.critic != default.critic:
        fail(f"--critic {args.critic}: the critics that were saved are --critic {default.critic}; leave the flag out")
    if args.resume and args.env_id != default.env_id:
        fail(f"--env-id {args.env_id}: the run in {args.resume} trains on {default.env_id}; leave the flag out")
    check_args(args)
    return args


def evaluate_saved(args: Args) -> None:
    """`--evaluate PATH`: print the returns of the weights in a model.pt or checkpoint.pt."""
    saved, _ = load_file(args.evaluate, "--evaluate")
    device = set_up_torch(args)
    envs = [make_env(args.env_id, args.capture_video and i == 0) for i in range(args.eval_episodes)]
    agent = Agent(envs[0].observation_space.shape[0], envs[0].action_space.shape[0], args, device)
    with refusing(f"--evaluate {args.evaluate} does not fit {args.env_id}, the flags, or this script"):
        agent.load_state_dict(saved["agent"])
    if args.capture_video:
        with refusing("--capture-video: its folder cannot be made"):
            videos = f"{Path(args.evaluate).parent}/videos_evaluate"
            envs[0] = gym.wrappers.RecordVideo(envs[0], videos, lambda episode: True)
            say(f"the videos are in {videos}")
    for name, act in (("evaluation", agent.eval_actions), ("exploring policy", agent.sample_actions)):
        returns = evaluate(act, envs, args.seed, device, args.eval_max_steps)
        say(f"{args.env_id}: {name} return {returns.mean():.1f} +- {returns.std():.1f} ({len(returns)} episodes)")
    for env in envs:
        env.close()


def say(line: str) -> None:
    """Print a line above the progress bar; drop it where it cannot be printed (no reader, a full disk)."""
    with suppress(OSError, ValueError, RuntimeError):  # RuntimeError: a signal came in the middle of another print
        tqdm.write(line.replace("\n", " "))


@cache
def warn(message: str) -> None:
    """Print a warning, once for each message."""
    say(f"warning: {message}")


def fail(message: str) -> None:
    """Report a user's mistake in one line and exit with code 2."""
    print(f"{Path(__file__).name}: error: {message}".replace("\n", " "), file=sys.stderr)
    sys.exit(2)


@contextmanager
def refusing(what: str):
    """Whatever goes wrong inside is reported in one line, and the program exits with code 2."""
    try:
        yield
    except Exception as error:
        fail(textwrap.shorten(f"{what}: {type(error).__name__}: {error}", 500, placeholder=" ..."))


if __name__ == "__main__":
    keep_freed_memory()
    sys.stderr = sys.stderr or io.StringIO()  # None where it was closed
    if sys.stdout:  # unbuffered: lines appear at once, and one that cannot be printed does not stop the next one
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), sys.stdout.encoding, write_through=True)
    args = parse_args()
    sys.exit(train(args) if args.evaluate is None else evaluate_saved(args))
