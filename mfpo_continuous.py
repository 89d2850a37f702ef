# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==3.17.0", "tyro==1.0.17", "tensorboard==2.21.0",
#     "numpy==2.4.6", "tqdm==4.70.1",
# ]
# ///
"""Mean Flow Policy Optimization (MFPO): MaxEnt RL with a 2-step MeanFlow policy.

Paper: https://arxiv.org/abs/2604.14698 (MeanFlow: 2505.13447).

    python mfpo_continuous.py --env-id Hopper-v4 --seed 1
    python mfpo_continuous.py --env-id HalfCheetah-v4 --no-clipped-double-q
    python mfpo_continuous.py --evaluate runs/<run>/checkpoint.pt

The defaults are the paper's. The README links to a recipe that learns sooner, in a third of the time per step.

Flow time runs from t = 0 (action) to t = 1 (noise): x_t = (1 - t) a_0 + t eps with velocity v = (x_t - a_0) / t.
    policy      a_{t-1/T} = a_t - (1/T) u(s, a_t, t - 1/T, t) from a_1 ~ N(0, I); u is the average velocity on [r, t]
    likelihood  log pi(a_0|s) = log N(a_1; 0, I) + (1/T) sum_t delta(s, a_t, t - 1/T, t), over the same T steps
    identity    u(x_t, r, t) = v(x_t, t) - (t - r) d/dt u(x_t, r, t);  delta obeys it with the divergence of
                u(s, x_t, t, t) instead of v
    target      v(x_t, t) = E[(x_t - a_0) / t | x_t], a_0 ~ exp(Q / alpha) / Z, by self-normalised importance sampling
                (SNIS) from two proposals, the policy and a Gaussian, weighted by their effective sample sizes (ESS)
    critics     two of C51, towards r + gamma (1 - terminated) (z - alpha log pi(a'|s')), z by the one of smaller mean
    alpha       minimise alpha (H - H_target), H = -E[log pi], H_target = -rho d

In TensorBoard: eval/episodic_return is the score, from the best of 10 candidates.
    diagnostics/ess_*      near 1, the temperature is too low for the proposals
    diagnostics/entropy    should approach -rho d; it is delta's estimate: add adn_log_prob_bias for the policy's own
    diagnostics/q_std      C51's is 900 at first; small rewards stay hidden until it falls (see --critic)
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
from typing import Literal, NamedTuple

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
    learning_starts: int = 10_000  # uniformly random steps before the first update (paper)
    learning_rate: float = 3e-4  # Adam's learning rate for every network and the temperature (paper)
    sampling_steps: int = 2  # T, the sampler's steps from noise to action (paper)
    policy_proposals: int = 16  # K1, actions of the policy per state in the velocity estimate (paper)
    gaussian_proposals: int = 32  # K2, actions of the truncated Gaussian per x_t in the velocity estimate (paper)
    divergence_probes: int = 2  # N, normal probes of the Skilling-Hutchinson estimate in --likelihood adn (paper)
    data_proportion: float = 0.75  # share of the batch with r = t, which trains the instantaneous velocity (paper)
    clipped_double_q: bool = True  # take the critic of the smaller mean, or their average (paper: off on HalfCheetah)
    policy_batch_size: int | None = None  # states of the batch that train all but the critics; None: all (paper)
    noised_actions: int = 1  # R, x_t per state in the velocity estimate, which share the policy's proposals (paper)
    # what critics learn of the return: its distribution on fixed atoms (C51, paper), its quantiles, or its mean alone;
    # or its mean in CrossQ's networks, with batch renormalisation and without target networks
    critic: Literal["c51", "quantile", "mean", "crossq"] = "c51"
    num_atoms: int = 101  # atoms of C51's distributions (paper), or the number of quantiles
    v_min: float = -1600.0  # C51's smallest atom (paper)
    v_max: float = 1600.0  # C51's largest atom (paper)
    critic_init_std: float | None = None  # a new C51 critic's standard deviation, roughly; None: a wide start (paper)
    policy_frequency: int = 1  # updates of the critics per update of everything else (paper)
    # step of the moving average of the policy's weights, per update of the policy; the average acts, draws proposals
    # and the critics' next actions, and teaches delta; 1: none (paper)
    policy_tau: float = 1.0
    autotune: bool = True  # learn the temperature; otherwise it stays at --alpha
    alpha: float = 0.01  # the temperature, or its first value when it is learned (paper)
    rho: float = 0.5  # the target entropy is -rho d for d action dimensions (paper)
    eval_candidates: int = 10  # evaluation plays the best of this many sampled actions, by the target critics (paper)


@dataclass
class AblationArgs:
    meanflow: bool = True  # learn average velocities (paper); otherwise plain flow matching, r = t throughout
    # log pi: by the average divergence network (paper); by the same network, taught the T steps' own determinants
    # (map); exact; or left out (none)
    likelihood: Literal["adn", "map", "exact", "none"] = "adn"
    # proposals that the velocity estimate uses (paper: both); the others are drawn, but have weight 0
    proposals: Literal["both", "policy", "gaussian"] = "both"
    # weigh the proposals' two estimates by effective sample size (paper), or make one of all proposals together
    combination: Literal["ess", "pooled"] = "ess"
    # distribution of t and r: logit-normal(-0.4, 1) (paper), or uniform, which trains the ends of [0, 1] more often
    time_distribution: Literal["logit_normal", "uniform"] = "logit_normal"


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


class Linear(nn.Linear):
    """nn.Linear. Compiled, it leaves the bias to the next kernel instead of first copying it into every row."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return F.linear(x, self.weight) + self.bias
        return super().forward(x)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm, written out when compiled: that fuses, and PyTorch 2.13 can compile its forward-mode derivative."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            x = x - x.mean(-1, keepdim=True)
            return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight + self.bias
        return super().forward(x)


class MLP(nn.Module):
    """Three hidden layers of 256 with LayerNorm and GELU on the concatenation of its inputs (paper, appendix).

    The GELU is the exact one. The authors' code has its tanh form, which changes losses and targets by up to 0.6 %.
    """

    def __init__(self, in_features: tuple[int, ...], out_features: int):
        super().__init__()
        self.first = ConcatLinear(in_features, 256)
        layers = [LayerNorm(256, eps=1e-6), nn.GELU()]
        for _ in range(2):
            layers += [Linear(256, 256), LayerNorm(256, eps=1e-6), nn.GELU()]
        self.rest = nn.Sequential(*layers, Linear(256, out_features))

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.rest(self.first(*inputs))


class CrossQNetwork(nn.Module):
    """CrossQ's critic, 256 units wide: obs (..., obs_dim) and actions (..., d) to Q(s, a) (..., 1)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.norm_obs, self.norm_actions = BatchRenorm(obs_dim), BatchRenorm(action_dim)
        self.first = ConcatLinear((obs_dim, action_dim), 256)
        layers = [nn.ReLU(), BatchRenorm(256), nn.Linear(256, 256), nn.ReLU(), BatchRenorm(256)]
        self.rest = nn.Sequential(*layers, nn.Linear(256, 1))

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        return self.rest(self.first(self.norm_obs(obs), self.norm_actions(actions)))


class TimeEmbedding(nn.Module):
    """Learnable Fourier features of a time in [0, 1] and a small MLP: (..., 1) to (..., 64)."""

    def __init__(self):
        super().__init__()
        self.frequencies = nn.Parameter(0.2 * torch.randn(64))
        self.mlp = nn.Sequential(Linear(128, 64), nn.GELU(), Linear(64, 64))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        phase = 2 * math.pi * t * self.frequencies
        return self.mlp(torch.cat([phase.cos(), phase.sin()], dim=-1))


class MeanFlowNetwork(nn.Module):
    """The average over [r, t] of the policy's velocity (u, out_dim = d) or of its divergence (delta, out_dim = 1).

    obs (..., obs_dim), x (..., d), r and t (..., 1) broadcast against each other; at r = t the average is the
    instantaneous value.
    """

    def __init__(self, obs_dim: int, action_dim: int, out_dim: int):
        super().__init__()
        self.embed_t, self.embed_interval = TimeEmbedding(), TimeEmbedding()
        self.mlp = MLP((obs_dim, 64, action_dim), out_dim)

    def forward(self, obs: torch.Tensor, x: torch.Tensor, r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.mlp(obs, self.embed_t(t) + self.embed_interval(t - r), x)


def xavier_uniform(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every linear layer (paper)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def sample_flow(actor, obs: torch.Tensor, noise: torch.Tensor, steps: int, meanflow: bool = True):
    """The T-step MeanFlow sampler: a_{t-1/T} = a_t - (1/T) u(s, a_t, t - 1/T, t) from a_1 = noise.

    Without `meanflow` it is Euler's method on the instantaneous velocity u(s, a_t, t, t). obs (..., obs_dim) broadcasts
    against noise (..., d). Returns the action a_0 before clipping (..., d) and the trajectory: a list of the
    (a_t, r, t) at which `actor` was evaluated.
    """
    x, trajectory = noise, []
    for i in range(steps, 0, -1):
        t = torch.full((1,), i / steps, device=noise.device)
        r = torch.full_like(t, (i - 1) / steps) if meanflow else t
        trajectory.append((x, r, t))
        x = x - actor(obs, x, r, t) / steps
    return x, trajectory


def standard_normal_log_prob(x: torch.Tensor) -> torch.Tensor:
    """log N(x; 0, I) of x (..., d)."""
    return -0.5 * (x**2 + math.log(2 * math.pi)).sum(-1)


def flow_log_prob(divergence, obs: torch.Tensor, trajectory) -> torch.Tensor:
    """log pi(a_0|s) = log N(a_1; 0, I) + (1/T) sum_t delta(s, a_t, t - 1/T, t) over the sampler's T steps; (...)."""
    log_prob = standard_normal_log_prob(trajectory[0][0])
    return log_prob + sum(divergence(obs, x, r, t).squeeze(-1) for x, r, t in trajectory) / len(trajectory)


def log_abs_det(function, x: torch.Tensor) -> torch.Tensor:
    """log |det df/dx| (...) of a map from x (..., d) to (..., d): d forward-mode products and a determinant per row.

    vmap takes the d products at once and evaluates the function itself only once.
    """
    basis = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)

    def column(e):  # of every row's Jacobian; cloned, because jvp takes no expanded tensor
        return torch.func.jvp(function, (x,), (e.expand_as(x).clone(),))[1]

    return torch.linalg.slogdet(torch.func.vmap(column, out_dims=-1)(basis)).logabsdet


def exact_log_prob(flow_map, noise: torch.Tensor) -> torch.Tensor:
    """log pi(a_0|s) = log N(a_1; 0, I) - log |det d a_0 / d a_1| (...) of `flow_map` from noise a_1 (..., d) to a_0.

    Where the map folds, other noises reach the same action, and this is only a lower bound.
    """
    return standard_normal_log_prob(noise) - log_abs_det(flow_map, noise)


def sample_times(batch_size: int, data_proportion: float, distribution: str, device: torch.device):
    """Interval ends t >= r, each (B, 1); the first `data_proportion` of the batch has r = t."""
    if distribution == "logit_normal":
        times = torch.sigmoid(torch.randn(2, batch_size, 1, device=device) - 0.4)
    else:
        times = torch.rand(2, batch_size, 1, device=device).clamp(1e-3, 1 - 1e-3)  # the proposals divide by t and 1 - t
    t, r = times.amax(0), times.amin(0)
    n = int(batch_size * data_proportion)
    return t, torch.cat([t[:n], r[n:]])


def meanflow_loss(average, *, x_t, r, t, velocity, instantaneous) -> torch.Tensor:
    """Squared error (...) of a network against its MeanFlow target, summed over outputs (MeanFlow, equations 6 and 9).

    `average(x, r, t)` is the network. Its target is instantaneous - (t - r) d/dt average(x_t, r, t), without gradient.
    The total derivative is along dx/dt = `velocity` (..., d), with r held fixed. `instantaneous` is the quantity that
    the network averages over [r, t]: the velocity (..., d) for u, its divergence (..., 1) for delta. (The authors' code
    takes the mean over outputs. Adam does not see the factor.)
    """
    with torch.no_grad():
        tangents = (velocity, torch.zeros_like(r), torch.ones_like(t))
        _, derivative = torch.func.jvp(average, (x_t, r, t), tangents)
        target = instantaneous - (t - r) * derivative
    return ((average(x_t, r, t) - target) ** 2).sum(-1)


def hutchinson_divergence(field, x: torch.Tensor, probes: torch.Tensor):
    """Value of a vector field at x (B, d) and the Skilling-Hutchinson estimate (B, 1) of its divergence.

    The estimate is the mean of e . (J e) over probes e (N, B, d) of zero mean and unit covariance.
    """
    values, products = torch.func.vmap(lambda e: torch.func.jvp(field, (x,), (e,)))(probes)
    return values[0], (probes * products).sum(-1, keepdim=True).mean(0)


def cdf_of_box(mean: torch.Tensor, std: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The distribution function of N(|mean|, std^2) at -1 and at 1, for float64 inputs.

    A box far from the mean lies in the lower tail, where erfc keeps its relative precision and ndtr is 0.
    """
    return tuple(0.5 * torch.erfc((mean.abs() - bound) / (std * math.sqrt(2))) for bound in (-1.0, 1.0))


def truncated_normal(mean: torch.Tensor, std: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """N(mean, std^2) truncated to [-1, 1], by inverting its distribution function at `uniform` in (0, 1).

    It works in float64 and reflects the problem so that the mean is not negative. Returns float32.
    """
    mean, std = mean.double(), std.double()
    sign = torch.where(mean < 0, -1.0, 1.0)
    low, high = cdf_of_box(mean, std)
    cdf = (low + uniform * (high - low)).clamp(min=1e-300)  # beyond 37 std the sample is the nearest face
    return (sign * (mean.abs() + std * torch.special.ndtri(cdf)).clamp(-1, 1)).float()


def policy_log_weights(q, log_prob, x_t, actions, t, alpha) -> torch.Tensor:
    """log of exp(Q / alpha) N(x_t; (1 - t) a_k, t^2 I) / pi(a_k|s) for a_k ~ pi; shape (..., K).

    q and log_prob (..., K), x_t (..., d), actions (..., K, d), t (..., 1) broadcast against each other.
    """
    z = (x_t[..., None, :] - (1 - t[..., None]) * actions) / t[..., None]
    return q / alpha + standard_normal_log_prob(z) - x_t.shape[-1] * t.log() - log_prob


def gaussian_log_mass(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """log of the integral (..., 1) of the kernel N(x_t; (1 - t) a, t^2 I) over the box; x_t (..., d), t (..., 1)."""
    low, high = cdf_of_box((x_t / (1 - t)).double(), (t / (1 - t)).double())
    mass = (high - low).clamp(min=1e-300)  # (..., d), of the Gaussian in [-1, 1]
    return (mass / (1 - t)).log().sum(-1, keepdim=True).float()


def snis_velocity(log_weights: torch.Tensor, x_t: torch.Tensor, actions: torch.Tensor, t: torch.Tensor):
    """Self-normalised importance sampling of the marginal velocity E[(x_t - a_0) / t | x_t].

    log_weights (..., K), x_t (..., d), actions (..., K, d), t (..., 1). Returns the velocity (..., d) and the effective
    sample size 1 / sum_k w_k^2 (..., 1), between 1 and K.
    """
    weights = log_weights.softmax(-1)
    velocity = (x_t - (weights[..., None] * actions).sum(-2)) / t
    return velocity, 1 / (weights**2).sum(-1, keepdim=True)


def project_categorical(probs: torch.Tensor, atoms: torch.Tensor, v_min: float, v_max: float) -> torch.Tensor:
    """C51's projection of the masses `probs` at `atoms`, both (B, N), onto N evenly spaced atoms in [v_min, v_max].

    Each mass is clipped to the support and split between its two neighbours, which keeps the total and, where nothing
    is clipped, the mean.
    """
    last = probs.shape[-1] - 1
    place = ((atoms - v_min) / (v_max - v_min) * last).clamp(0, last)
    below = place.nan_to_num(0).floor()  # nan is no index; it stays in `above`, and so in the loss
    above = place - below  # the share of the atom above
    projected = torch.zeros_like(probs).scatter_add_(-1, below.long(), probs * (1 - above))
    return projected.scatter_add_(-1, (below.long() + 1).clamp(max=last), probs * above)


def quantile_huber_loss(quantiles: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Quantile regression of `quantiles` (B, N), those at (i + 1/2) / N, on samples `targets` (B, K); returns (B,).

    sum_i mean_j |tau_i - 1{u_ij < 0}| L(u_ij), u_ij = target_j - quantile_i, with Huber's loss L of threshold 1
    (QR-DQN, arXiv 1710.10044, equation 10).
    """
    n = quantiles.shape[-1]
    tau = (torch.arange(n, dtype=quantiles.dtype, device=quantiles.device) + 0.5) / n
    errors = targets[:, None, :] - quantiles[:, :, None]  # (B, N, K)
    weights = (tau[:, None] - (errors < 0).to(tau.dtype)).abs()
    return (weights * F.huber_loss(errors, torch.zeros_like(errors), reduction="none")).mean(-1).sum(-1)


class VelocityEstimate(NamedTuple):
    """What `Agent.estimate_velocity` finds at B states, with R noised actions at each."""

    x_t: torch.Tensor  # (B, R, d), the noised actions, at which the velocity is estimated
    velocity: torch.Tensor  # (B, R, d), the Boltzmann policy's marginal velocity at x_t
    a_0: torch.Tensor  # (B, R, d), the policy's actions that were noised
    log_prob: torch.Tensor  # (B, K1), log pi of all policy proposals
    ess_policy: torch.Tensor  # (B, R, 1), effective sample size of the policy proposal
    ess_gaussian: torch.Tensor  # (B, R, 1)
    policy_weight: torch.Tensor  # (B, R, 1), weight of the policy proposal in `velocity`


class Agent(nn.Module):
    """Networks, optimisers and one update of everything."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args, device: torch.device):
        super().__init__()
        self.args, self.action_dim = args, action_dim
        self.data_proportion = args.data_proportion if args.meanflow else 1.0
        self.actor = MeanFlowNetwork(obs_dim, action_dim, action_dim)
        self.divergence = MeanFlowNetwork(obs_dim, action_dim, 1)
        self.crossq = args.critic == "crossq"
        if self.crossq:
            self.qf1, self.qf2 = (CrossQNetwork(obs_dim, action_dim) for _ in range(2))
        else:
            outputs = 1 if args.critic == "mean" else args.num_atoms
            self.qf1, self.qf2 = (MLP((obs_dim, action_dim), outputs) for _ in range(2))
        self.apply(xavier_uniform)
        # Not persistent: a run that goes on with another support must not get the old one back.
        self.register_buffer("atoms", torch.linspace(args.v_min, args.v_max, args.num_atoms), persistent=False)
        if args.critic_init_std is not None:
            # The softmax of this bias is Student's t with 3 degrees of freedom and standard deviation critic_init_std,
            # but for where the support cuts it, and for atoms as wide apart as that.
            for output in (self.qf1.rest[-1], self.qf2.rest[-1]):
                nn.init.zeros_(output.weight)
                output.bias.data = -2 * torch.log1p((self.atoms / args.critic_init_std) ** 2)
        # CrossQ has no target networks: its critics are their own targets.
        self.qf1_target, self.qf2_target = (qf if self.crossq else copy.deepcopy(qf) for qf in (self.qf1, self.qf2))
        self.slow_actor = copy.deepcopy(self.actor) if args.policy_tau < 1 else None
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha)), requires_grad=args.autotune)
        self.target_entropy = -args.rho * action_dim
        self.eval().to(device)  # batch renormalisation learns in the critics' update alone
        if args.likelihood in ("exact", "map") and action_dim > 16 and device.type == "cuda":
            # Here PyTorch prefers MAGMA for determinants, which waits for the GPU. A CUDA graph cannot record that.
            torch.backends.cuda.preferred_linalg_library("cusolver")
        self.q_parameters = [*self.qf1.parameters(), *self.qf2.parameters()]
        self.q_target_parameters = [*self.qf1_target.parameters(), *self.qf2_target.parameters()]
        adam = partial(torch.optim.Adam, lr=args.learning_rate, fused=True, capturable=True)
        self.q_optimizer = adam(self.q_parameters, betas=(0.5 if self.crossq else 0.9, 0.999))
        self.actor_optimizer = adam(self.actor.parameters())
        self.divergence_optimizer, self.alpha_optimizer = adam(self.divergence.parameters()), adam([self.log_alpha])
        if args.compile:  # for fixed shapes; fallback_random draws the same numbers as the eager update
            self.update = torch.compile(self.update, dynamic=False, options={"fallback_random": True})

    def q_mean(self, outputs: torch.Tensor) -> torch.Tensor:
        """The mean (...) of the return, from a critic's outputs (..., N): logits, quantiles, or the mean itself."""
        return outputs.softmax(-1) @ self.atoms if self.args.critic == "c51" else outputs.mean(-1)

    def q_value(self, qf1: nn.Module, qf2: nn.Module, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Q(s, a) (...): the smaller of the two critics' means or, without clipped double Q, their average."""
        q1, q2 = (self.q_mean(qf(obs, actions)) for qf in (qf1, qf2))
        return torch.minimum(q1, q2) if self.args.clipped_double_q else (q1 + q2) / 2

    @property
    def policy(self) -> MeanFlowNetwork:
        """What samples all actions: `actor`, which learns, or its moving average (--policy-tau)."""
        return self.actor if self.slow_actor is None else self.slow_actor

    def sampler(self, obs: torch.Tensor, noise: torch.Tensor):
        """`sample_flow` of the policy."""
        return sample_flow(self.policy, obs, noise, self.args.sampling_steps, self.args.meanflow)

    def sample_with_log_prob(self, obs: torch.Tensor, noise: torch.Tensor):
        """Actions before clipping (..., d) and their log pi (...) by --likelihood; zeros where that is none."""
        actions, trajectory = self.sampler(obs, noise)
        if self.args.likelihood in ("adn", "map"):
            return actions, flow_log_prob(self.divergence, obs, trajectory)
        if self.args.likelihood == "exact":
            return actions, exact_log_prob(lambda noise: self.sampler(obs, noise)[0], noise)
        return actions, torch.zeros_like(actions[..., 0])

    @torch.no_grad()
    def sample_actions(self, obs: torch.Tensor, candidates: int = 1) -> torch.Tensor:
        """One policy sample per state (B, d), or the best of several `candidates` by the target critics."""
        noise = torch.randn(len(obs), candidates, self.action_dim, device=obs.device)
        obs = obs[:, None]  # (B, 1, obs_dim)
        actions = self.sampler(obs, noise)[0].clamp(-1, 1)  # (B, candidates, d)
        if candidates == 1:
            return actions[:, 0]
        best = self.q_value(self.qf1_target, self.qf2_target, obs, actions).argmax(1)
        return actions.take_along_dim(best[:, None, None], 1)[:, 0]

    def eval_actions(self, obs: torch.Tensor) -> torch.Tensor:
        """Actions (B, d) for evaluation."""
        return self.sample_actions(obs, self.args.eval_candidates)

    def update(self, obs, actions, rewards, terminations, next_obs, with_policy=True) -> dict[str, torch.Tensor]:
        """One step on the critics and, `with_policy`, on policy, average divergence and temperature; scalars to log.

        An update must keep three rules, or it cannot be recorded as a CUDA graph. It reads no number on the host (no
        `.item()`, no `if` on a tensor). It changes no Python state from call to call. Its shapes stay the same.
        """
        alpha = self.log_alpha.detach().exp()
        metrics = self.update_critics(obs, actions, rewards, terminations, next_obs, alpha)
        if with_policy:
            metrics |= self.update_policy(obs[: self.args.policy_batch_size], alpha)
        # Detached: a loss that keeps its autograd graph alive ties the parameters to a stream and prevents CUDA graphs.
        return {name: value.detach() for name, value in metrics.items()}

    def update_critics(self, obs, actions, rewards, terminations, next_obs, alpha) -> dict[str, torch.Tensor]:
        """One step on the critics, then on their targets, if any. a' is from `policy`, the actor or its average."""
        args = self.args
        with torch.no_grad():
            noise = torch.randn(len(obs), self.action_dim, device=obs.device)
            a_next, next_log_prob = self.sample_with_log_prob(next_obs, noise)
        outputs, next_outputs = self.critic_outputs(obs, actions, next_obs, a_next.clamp(-1, 1))
        (target1, mean1), (target2, mean2) = (
            self.critic_target(x, rewards, terminations, alpha * next_log_prob) for x in next_outputs
        )
        if args.clipped_double_q:
            target = torch.where((mean1 < mean2)[:, None], target1, target2)
        else:  # the two distributions' mixture
            target = (target1 + target2) / 2 if args.critic == "c51" else torch.cat([target1, target2], -1)
        qf1_loss, qf2_loss = (self.critic_loss(x, target) for x in outputs)
        self.q_optimizer.zero_grad()
        (qf1_loss + qf2_loss).backward()
        self.q_optimizer.step()
        if not self.crossq:
            with torch.no_grad():
                torch._foreach_lerp_(self.q_target_parameters, self.q_parameters, args.tau)
        outputs = outputs.detach()
        q_values = self.q_mean(outputs)  # (2, B)
        metrics = {
            "losses/qf1_values": q_values[0].mean(),
            "losses/qf2_values": q_values[1].mean(),
            "losses/qf1_loss": qf1_loss,
            "losses/qf2_loss": qf2_loss,
            "losses/qf_loss": (qf1_loss + qf2_loss) / 2,
        }
        if args.critic == "c51":
            probs = outputs.softmax(-1)
            variance = (probs * (self.atoms - q_values[..., None]) ** 2).sum(-1)
            metrics["diagnostics/q_std"] = variance.sqrt().mean()
            metrics["diagnostics/edge_mass"] = (probs[..., 0] + probs[..., -1]).mean()
        if args.critic == "quantile":
            metrics["diagnostics/q_std"] = outputs.std(-1, correction=0).mean()
        return metrics

    def critic_outputs(self, obs, actions, next_obs, next_actions) -> tuple[torch.Tensor, torch.Tensor]:
        """The outputs (2, B, N) of both critics at s, a and, without gradient, of both target critics at s', a'."""
        if self.crossq:  # which normalises both pairs by the statistics of the two together (arXiv 1902.05605)
            self.train()
            both = torch.cat([obs, next_obs]), torch.cat([actions, next_actions])
            outputs, next_outputs = torch.stack([self.qf1(*both), self.qf2(*both)]).chunk(2, dim=1)
            self.eval()
            return outputs, next_outputs.detach()
        with torch.no_grad():
            next_outputs = torch.stack([qf(next_obs, next_actions) for qf in (self.qf1_target, self.qf2_target)])
        return torch.stack([self.qf1(obs, actions), self.qf2(obs, actions)]), next_outputs

    def critic_target(self, outputs, rewards, terminations, entropy_term) -> tuple[torch.Tensor, torch.Tensor]:
        """The critics' target and its mean (B,), from a target critic's outputs (B, N) and alpha log pi (B,) at s', a'.

        It is r + gamma (1 - terminated) (z - alpha log pi), z being the return after s': C51's atoms, quantiles, or the
        mean. C51's has moved off the atoms, and is projected back onto them: their probabilities (B, N) are returned.
        """
        z = self.atoms if self.args.critic == "c51" else outputs
        target = rewards[:, None] + self.args.gamma * (1 - terminations)[:, None] * (z - entropy_term[:, None])
        if self.args.critic == "c51":
            probs = project_categorical(outputs.softmax(-1), target, self.args.v_min, self.args.v_max)
            return probs, probs @ self.atoms
        return target, target.mean(-1)

    def critic_loss(self, outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The mean loss of a critic's outputs (B, N) against `critic_target`'s result, or a mixture of two of them."""
        if self.args.critic == "c51":
            return F.cross_entropy(outputs, target)
        if self.args.critic == "quantile":
            return quantile_huber_loss(outputs, target).mean()
        return F.mse_loss(outputs[:, 0], target.mean(-1))

    def update_policy(self, obs: torch.Tensor, alpha: torch.Tensor) -> dict[str, torch.Tensor]:
        """One step on the policy, towards the Boltzmann policy's velocity; then divergence network and temperature."""
        rows = len(obs) * self.args.noised_actions
        times = sample_times(rows, self.data_proportion, self.args.time_distribution, obs.device)
        t, r = (x.view(len(obs), -1, 1) for x in times)  # (B, R, 1)
        estimate = self.estimate_velocity(obs, t, alpha)
        u, x_t, v = partial(self.actor, obs[:, None]), estimate.x_t, estimate.velocity
        actor_loss = meanflow_loss(u, x_t=x_t, r=r, t=t, velocity=v, instantaneous=v).mean()
        self.actor_optimizer.zero_grad()
        actor_loss.backward()
        self.actor_optimizer.step()
        if self.slow_actor is not None:
            with torch.no_grad():
                torch._foreach_lerp_([*self.slow_actor.parameters()], [*self.actor.parameters()], self.args.policy_tau)

        metrics = {
            "losses/actor_loss": actor_loss,
            "losses/alpha": alpha,
            "diagnostics/ess_policy": estimate.ess_policy.mean(),
            "diagnostics/ess_gaussian": estimate.ess_gaussian.mean(),
            "diagnostics/policy_proposal_weight": estimate.policy_weight.mean(),
            "diagnostics/clipped_fraction": (estimate.a_0.abs() == 1).float().mean(),
        }
        entropy = -estimate.log_prob.mean()
        if self.args.likelihood != "none":
            metrics["diagnostics/entropy"] = entropy
        if self.args.likelihood in ("adn", "map"):
            metrics["losses/divergence_loss"] = self.update_divergence(obs, estimate.a_0[:, 0])  # of the new policy
        if self.args.autotune:
            alpha_loss = self.log_alpha.exp() * (entropy - self.target_entropy)
            self.alpha_optimizer.zero_grad()
            alpha_loss.backward()
            self.alpha_optimizer.step()
            metrics["losses/alpha_loss"] = alpha_loss
        return metrics

    @torch.no_grad()
    def estimate_velocity(self, obs: torch.Tensor, t: torch.Tensor, alpha: torch.Tensor) -> VelocityEstimate:
        """The Boltzmann policy's velocity at noised policy samples, from both proposals (paper, section 4).

        t (B, R, 1): the policy's proposals serve all R noised actions of a state; each has Gaussian ones of its own.
        """
        (batch_size, points, _), d, args = t.shape, self.action_dim, self.args
        obs = obs[:, None]  # (B, 1, obs_dim)
        noise = torch.randn(batch_size, args.policy_proposals, d, device=obs.device)
        from_policy, log_prob = self.sample_with_log_prob(obs, noise)  # (B, K1, d) and (B, K1)
        from_policy = from_policy.clamp(-1, 1)  # log_prob stays that of the action before clipping
        a_0 = from_policy[:, :points]  # noised to x_t; each stays a proposal (authors' code), favoured at small t
        x_t = (1 - t) * a_0 + t * torch.randn_like(a_0)  # (B, R, d)
        uniform = torch.rand(*x_t.shape[:2], args.gaussian_proposals, d, dtype=torch.float64, device=obs.device)
        # The kernel N(x_t; (1 - t) a, t^2 I), as a density of a in the box.
        mean, std = x_t / (1 - t), t / (1 - t)
        from_gaussian = truncated_normal(mean[..., None, :], std[..., None], uniform)  # (B, R, K2, d)

        q = self.q_value(self.qf1, self.qf2, obs, torch.cat([from_policy, from_gaussian.flatten(1, 2)], 1))
        q_policy, q_gaussian = q[:, None, : args.policy_proposals], q[:, args.policy_proposals :]
        from_policy = from_policy[:, None]  # (B, 1, K1, d)
        log_w_policy = policy_log_weights(q_policy, log_prob[:, None], x_t, from_policy, t, alpha)  # (B, R, K1)
        # The kernel cancels, but for its mass in the box, the same for all k.
        log_w_gaussian = q_gaussian.unflatten(1, (points, -1)) / alpha  # (B, R, K2)
        v_policy, ess_policy = snis_velocity(log_w_policy, x_t, from_policy, t)
        v_gaussian, ess_gaussian = snis_velocity(log_w_gaussian, x_t, from_gaussian, t)
        policy_weight = ess_policy / (ess_policy + ess_gaussian)  # (B, R, 1)
        if args.combination == "pooled":  # each estimate's share of all weights, which have the same mean
            log_sum_gaussian = log_w_gaussian.logsumexp(-1, True) + gaussian_log_mass(x_t, t)
            policy_weight = (log_w_policy.logsumexp(-1, True) - log_sum_gaussian).sigmoid()
        if args.proposals != "both":
            policy_weight = torch.full_like(policy_weight, float(args.proposals == "policy"))
        velocity = policy_weight * v_policy + (1 - policy_weight) * v_gaussian
        return VelocityEstimate(x_t, velocity, a_0, log_prob, ess_policy, ess_gaussian, policy_weight)

    def update_divergence(self, obs: torch.Tensor, a_0: torch.Tensor) -> torch.Tensor:
        """One step on the average divergence network, towards the policy that was just updated; returns the loss."""
        loss = self.flow_divergence_loss(obs, a_0) if self.args.likelihood == "adn" else self.map_divergence_loss(obs)
        self.divergence_optimizer.zero_grad()
        loss.backward()
        self.divergence_optimizer.step()
        return loss

    def flow_divergence_loss(self, obs: torch.Tensor, a_0: torch.Tensor) -> torch.Tensor:
        """delta as the average of div v over [r, t], at the policy's actions a_0 (B, d), noised (paper)."""
        t, r = sample_times(len(obs), self.data_proportion, self.args.time_distribution, obs.device)
        with torch.no_grad():
            x_t = (1 - t) * a_0 + t * torch.randn_like(a_0)
            probes = torch.randn(self.args.divergence_probes, *a_0.shape, device=obs.device)
            v, div_v = hutchinson_divergence(lambda x: self.policy(obs, x, t, t), x_t, probes)
        delta = partial(self.divergence, obs)
        return meanflow_loss(delta, x_t=x_t, r=r, t=t, velocity=v, instantaneous=div_v).mean()

    def map_divergence_loss(self, obs: torch.Tensor) -> torch.Tensor:
        """delta as what makes the likelihood of the sampler's T steps exact: -T log |det(I - (1/T) du/da)| at each.

        That is not in the paper, whose delta follows the flow. The steps of a MeanFlow policy differ from the flow.
        """
        steps = self.args.sampling_steps
        with torch.no_grad():
            noise = torch.randn(len(obs), self.action_dim, device=obs.device)
            x, r, t = map(torch.stack, zip(*self.sampler(obs, noise)[1], strict=True))  # (T, B, d), (T, 1), (T, 1)
            r, t = r[:, None], t[:, None]  # (T, 1, 1)
            target = -steps * log_abs_det(lambda x: x - self.policy(obs, x, r, t) / steps, x)
        return ((self.divergence(obs, x, r, t).squeeze(-1) - target) ** 2).mean()

    @torch.no_grad()
    def diagnostics(self, obs: torch.Tensor) -> dict[str, float]:
        """Measures at states (B, obs_dim) that are too costly for every update. Warns if the support is too narrow.

        adn_log_prob_*: the error of the divergence network's log pi against the exact one, in nats.
        flow_gap: the distance from the sampler's actions to those of 64 Euler steps from the same noise.
        q_action_std: the spread of Q over random actions; where it is far above alpha, the Boltzmann policy is peaked.
        """
        noise = torch.randn(len(obs), self.action_dim, device=obs.device)
        actions, trajectory = self.sampler(obs, noise)
        gap = actions - sample_flow(self.policy, obs, noise, 64, meanflow=False)[0]
        random_actions = 2 * torch.rand(len(obs), 64, self.action_dim, device=obs.device) - 1
        q = self.q_value(self.qf1, self.qf2, obs[:, None], random_actions)  # (B, 64)
        if self.args.critic == "c51":
            probs = self.qf1(obs, actions.clamp(-1, 1)).softmax(-1)  # new critics: about 2 / num_atoms
            if (probs[:, 0] + probs[:, -1]).mean() > 3 / self.args.num_atoms:
                warn(f"the critics' support [{self.args.v_min}, {self.args.v_max}] is too narrow; see --v-min, --v-max")
        scalars = {
            "diagnostics/flow_gap": gap.norm(dim=-1).mean().item(),
            "diagnostics/q_action_std": q.std(1).mean().item(),
        }
        if self.args.likelihood in ("adn", "map"):
            exact = exact_log_prob(lambda noise: self.sampler(obs, noise)[0], noise)
            error = flow_log_prob(self.divergence, obs, trajectory) - exact
            scalars["diagnostics/adn_log_prob_error"] = error.abs().mean().item()
            scalars["diagnostics/adn_log_prob_bias"] = error.mean().item()
        return scalars


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

    An update then takes about a fifth less time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # None on other C libraries
    if mallopt:
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_mmap_threshold, 32 * 2**20)  # the largest value: beyond are the replay buffer's rings
        mallopt(m_trim_threshold, 2**31 - 1)


LIMITS = {"seed": (0, 2**32 - 1), "gamma": (0, 1 - 1e-6), "tau": (1e-30, 1)}  # other numbers are positive
LIMITS |= {name: (0, 1e30) for name in ("learning_starts", "eval_frequency", "checkpoint_frequency")}
LIMITS |= {name: (-1e30, 1e30) for name in ("rho", "v_min", "v_max")} | {"data_proportion": (0, 0.999)}
LIMITS |= {"diagnostics_frequency": (0, 1e30), "num_atoms": (2, 1e30), "critic_init_std": (1e-6, 1e30)}
LIMITS |= {"policy_tau": (1e-30, 1)}
CONFLICTS = {  # what is wrong with the flags, and a function of them that is true where it is
    "--v-min must be below --v-max": lambda args: args.v_min >= args.v_max,
    "--critic-init-std is for --critic c51; leave it out": lambda args: args.critic_init_std and args.critic != "c51",
    "--policy-batch-size is above --batch-size; lower it": lambda args: (args.policy_batch_size or 0) > args.batch_size,
    "--noised-actions is above --policy-proposals; lower it": lambda args: args.noised_actions > args.policy_proposals,
    "--likelihood none leaves no entropy to tune the temperature by; add --no-autotune and choose --alpha": (
        lambda args: args.likelihood == "none" and args.autotune
    ),
    "--combination pooled needs both proposals and a likelihood; leave --proposals or --likelihood out": (
        lambda args: args.combination == "pooled" and (args.proposals != "both" or args.likelihood == "none")
    ),
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
