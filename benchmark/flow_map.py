"""Why MFPO's two-step map is worse than the field it averages: one ingredient changed at a time, the critic known.

    python benchmark/flow_map.py --out benchmark/results/modes/flow_map

The policy and the average divergence network learn the multi-goal task's Boltzmann density at alpha = 1 by MFPO's own
code, with the exact reward in the place of the critics. Total variation to the optimum (16 x 16 grid) of the T-step map
for T = 2 and 4, of 64 Euler steps of the instantaneous field, and of the two hybrids that replace one of the two long
steps by 32 short ones; and the mean absolute error of the network's log pi at T = 2, in nats.
"""

import copy
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import mfpo_continuous as mfpo
from benchmark.density import figures, shares
from benchmark.table import write_csv
from tests.multigoal import FOUR, WIDTH, ExactQ, boltzmann

CPU = torch.device("cpu")
CENTRES = torch.tensor(FOUR.places, dtype=torch.float32)
BASE = {
    "velocity": "snis",
    "k": (8, 16),
    "times": "logit_normal",
    "data": 0.75,
    "ema": 0.0,
    "decay": False,
    "x_t": "policy",
}
VARIANTS = {
    "paper's recipe": {},
    "exact velocity": {"velocity": "marginal"},
    "twice the proposals (16 : 32)": {"k": (16, 32)},
    "uniform times, data proportion 0.25": {"times": "uniform", "data": 0.25},
    "cosine learning-rate decay": {"decay": True},
    "EMA of the policy (0.998)": {"ema": 0.998},
    "exact velocity, decay": {"velocity": "marginal", "decay": True},
    "exact velocity, decay, x_t from the optimum": {"velocity": "marginal", "decay": True, "x_t": "optimum"},
    "the same, uniform times": {
        "velocity": "marginal",
        "decay": True,
        "x_t": "optimum",
        "times": "uniform",
        "data": 0.25,
    },
}


@dataclass
class Args:
    out: Path = Path("flow_map")
    """the CSV, without its ending"""
    updates: int = 1500
    """updates per variant and seed"""
    batch_size: int = 64
    """rows per update"""
    learning_rate: float = 1e-3
    """Adam's, for both networks"""
    seeds: int = 1
    """seeds 0 .. seeds - 1"""
    jobs: int = 2
    """processes, one thread each"""


def marginal_velocity(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """E[(x_t - a_0) / t | x_t] for a_0 from the four bumps, in closed form (the box's edge is four widths away)."""
    variance = ((1 - t) * WIDTH) ** 2 + t**2
    offset = x_t[:, None] - (1 - t)[..., None] * CENTRES  # (B, 4, 2)
    weights = (-(offset**2).sum(-1) / (2 * variance)).softmax(-1)
    means = CENTRES + ((1 - t) * WIDTH**2 / variance)[..., None] * offset
    return (x_t - (weights[..., None] * means).sum(1)) / t


def total_variation(actions: torch.Tensor) -> float:
    """Of the clipped actions (N, 2) to the optimum."""
    return figures(shares(actions.clamp(-1, 1)), boltzmann(1.0, FOUR), FOUR)["total variation"]


@torch.no_grad()
def measure(agent, actor) -> dict[str, float]:
    """The figures of the docstring, of one policy network."""
    torch.manual_seed(1)
    obs, noise = torch.zeros(1), torch.randn(10_000, 2)

    def hybrid(first: int, second: int) -> torch.Tensor:
        """The interval [1/2, 1] in `first` steps and [0, 1/2] in `second`: the average velocity where that is 1."""
        x = noise
        for high, steps in ((1.0, first), (0.5, second)):
            for i in range(steps):
                t = torch.tensor([high - 0.5 * i / steps])
                x = x - 0.5 / steps * actor(obs, x, t - 0.5 if steps == 1 else t, t)
        return x

    agent.actor = actor
    return {
        "T = 2": total_variation(hybrid(1, 1)),
        "T = 4": total_variation(mfpo.sample_flow(actor, obs, noise, 4)[0]),
        "field": total_variation(mfpo.sample_flow(actor, obs, noise, 64, meanflow=False)[0]),
        "step, field": total_variation(hybrid(1, 32)),
        "field, step": total_variation(hybrid(32, 1)),
        "log pi error": agent.diagnostics(torch.zeros(2000, 1))["diagnostics/adn_log_prob_error"],
    }


def run(job: tuple[str, int, Args]) -> dict:
    """Train one variant with one seed."""
    name, seed, args = job
    options = BASE | VARIANTS[name]
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    k1, k2 = options["k"]
    trained = mfpo.Args(
        learning_rate=args.learning_rate,
        policy_proposals=k1,
        gaussian_proposals=k2,
        data_proportion=options["data"],
        time_distribution=options["times"],
    )
    agent = mfpo.Agent(1, 2, trained, CPU)
    exact_q = ExactQ(FOUR)
    agent.q_value = lambda qf1, qf2, obs, actions: exact_q(obs, actions)
    slow = copy.deepcopy(agent.actor)
    schedules = [
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.updates)
        for optimizer in (agent.actor_optimizer, agent.divergence_optimizer)
        if options["decay"]
    ]
    obs = torch.zeros(args.batch_size, 1)
    for _ in range(args.updates):
        t, r = mfpo.sample_times(args.batch_size, options["data"], options["times"], CPU)
        x_t, velocity, a_0 = (x[:, 0] for x in agent.estimate_velocity(obs, t[:, None], torch.tensor(1.0))[:3])
        if options["x_t"] == "optimum":
            a_0 = CENTRES[torch.randint(4, (args.batch_size,))] + WIDTH * torch.randn(args.batch_size, 2)
            x_t = (1 - t) * a_0 + t * torch.randn_like(a_0)
        if options["velocity"] == "marginal":
            velocity = marginal_velocity(x_t, t)
        loss = mfpo.meanflow_loss(
            partial(agent.actor, obs), x_t=x_t, r=r, t=t, velocity=velocity, instantaneous=velocity
        ).mean()
        agent.actor_optimizer.zero_grad()
        loss.backward()
        agent.actor_optimizer.step()
        agent.update_divergence(obs, a_0)
        for schedule in schedules:
            schedule.step()
        with torch.no_grad():
            torch._foreach_lerp_([*slow.parameters()], [*agent.actor.parameters()], 1 - options["ema"])
    row = {"variant": name, "seed": seed} | measure(agent, slow)
    print(", ".join(f"{key} {value:.3f}" if isinstance(value, float) else f"{value}" for key, value in row.items()))
    return row


def main(args: Args) -> None:
    with ProcessPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(run, [(name, seed, args) for seed in range(args.seeds) for name in VARIANTS]))
    names = [name for name in rows[0] if name not in ("variant", "seed")]
    print("| | " + " | ".join(names) + " |\n|-|" + "-|" * len(names))
    for variant in VARIANTS:
        cells = [[row[name] for row in rows if row["variant"] == variant] for name in names]
        print(f"| {variant} | " + " | ".join(f"{np.mean(x):.2f} ± {np.std(x):.2f}" for x in cells) + " |")
    write_csv(args.out, rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
