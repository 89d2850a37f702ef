"""How good MFPO's estimates of the velocity are, by K1 : K2, with the critics of a trained run, against quadrature.

    python benchmark/proposals.py runs/InvertedPendulum-v4__mfpo_continuous__1__* --out proposals

A velocity is (x_t - E[a_0 | x_t]) / t, so what is compared is E[a_0 | x_t] for the density exp(Q / alpha) of a_0: that
of `estimate_velocity`, at states of the replay buffer and its own x_t, for each number of proposals, and that of a
grid over the whole action box, which at most three action dimensions afford. Errors are root mean squares of a vector
in [-1, 1]^d, over states and over t as in training, and for small, middle and large t apart; at the temperature that
the run has reached, and at ten and a hundred times it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import mfpo_continuous as mfpo
from benchmark.table import write_csv

CPU = torch.device("cpu")
POINTS = {1: 20_001, 2: 301, 3: 61}  # of the grid, per dimension
PROPOSALS = [  # flags of mfpo_continuous.py; a policy proposal is drawn even if unused, for x_t is made of it
    ("48 : 0", {"proposals": "policy", "policy_proposals": 48, "gaussian_proposals": 1}),
    ("32 : 16", {"policy_proposals": 32, "gaussian_proposals": 16}),
    ("16 : 32", {"policy_proposals": 16, "gaussian_proposals": 32}),
    ("8 : 40", {"policy_proposals": 8, "gaussian_proposals": 40}),
    ("0 : 48", {"proposals": "gaussian", "policy_proposals": 1, "gaussian_proposals": 48}),
    ("4 : 8", {"policy_proposals": 4, "gaussian_proposals": 8}),
    ("128 : 256", {"policy_proposals": 128, "gaussian_proposals": 256}),
    (
        "48 : 0, exact log pi",
        {"proposals": "policy", "policy_proposals": 48, "gaussian_proposals": 1, "likelihood": "exact"},
    ),
    ("16 : 32, exact log pi", {"policy_proposals": 16, "gaussian_proposals": 32, "likelihood": "exact"}),
]


@dataclass
class Args:
    runs: Annotated[list[Path], tyro.conf.Positional]
    """folders of runs of mfpo_continuous.py, with their checkpoints"""
    out: Path = Path("proposals")
    """the CSV, without its ending"""
    states: int = 64
    """states of the replay buffer"""
    repeats: int = 32
    """x_t and estimates per state"""
    seed: int = 0


def load(run: Path, states: int) -> tuple[mfpo.Agent, torch.Tensor]:
    """A run's agent, and observations (states, obs_dim) drawn from its replay buffer."""
    saved, args = mfpo.load_file(run / "checkpoint.pt", "runs")
    buffer = saved["buffer"]
    agent = mfpo.Agent(buffer["obs"].shape[-1], buffer["actions"].shape[-1], args, CPU)
    agent.load_state_dict(saved["agent"])
    return agent, buffer["obs"][torch.randint(len(buffer["obs"]), (states,)), 0]


@torch.no_grad()
def grid_of_q(agent: mfpo.Agent, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The grid's actions (G, d), the middles of equal cells, and Q there (states, G)."""
    n = POINTS[agent.action_dim]
    line = (torch.arange(n) + 0.5) * 2 / n - 1
    actions = torch.cartesian_prod(*[line] * agent.action_dim).reshape(-1, agent.action_dim)
    q = [agent.q_value(agent.qf1, agent.qf2, obs[:, None], part) for part in actions.split(512)]
    return actions, torch.cat(q, 1)


def exact_means(q: torch.Tensor, actions: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, alpha: float):
    """E[a_0 | x_t] (N, d) at one state, from Q (G,) on the grid, for x_t (N, d) and t (N, 1)."""
    distances = ((x_t[:, None] - (1 - t[:, None]) * actions) ** 2).sum(-1)  # (N, G)
    return (q / alpha - distances / (2 * t**2)).softmax(-1) @ actions


@torch.no_grad()
def measure(run: Path, args: Args) -> list[dict]:
    """A row for each temperature and each number of proposals."""
    torch.manual_seed(args.seed)
    agent, obs = load(run, args.states)
    if agent.action_dim not in POINTS:
        print(f"proposals.py: error: {run} has {agent.action_dim} action dimensions, more than 3", file=sys.stderr)
        sys.exit(2)
    actions, q = grid_of_q(agent, obs)
    trained, reached, rows = agent.args, agent.log_alpha.exp().item(), []
    for alpha in (reached, 10 * reached, 100 * reached):
        for name, flags in PROPOSALS:
            agent.args = mfpo.Args(**vars(trained) | {"proposals": "both"} | flags)
            repeated = obs.repeat(args.repeats, 1)
            t, _ = mfpo.sample_times(len(repeated), trained.data_proportion, trained.time_distribution, CPU)
            estimate = agent.estimate_velocity(repeated, t[:, None], torch.tensor(alpha))
            x_t, velocity = estimate.x_t[:, 0], estimate.velocity[:, 0]
            exact = torch.empty_like(x_t)
            for i in range(args.states):
                mine = slice(i, None, args.states)
                exact[mine] = exact_means(q[i], actions, x_t[mine], t[mine], alpha)
            errors = ((x_t - t * velocity - exact) ** 2).sum(-1, keepdim=True)
            parts = {"all t": t > 0, "t < 1/3": t < 1 / 3, "middle": (t >= 1 / 3) & (t <= 2 / 3), "t > 2/3": t > 2 / 3}
            rows.append(
                {"task": trained.env_id, "run": run.name, "alpha": alpha, "K1 : K2": name}
                | {part: errors[chosen].mean().sqrt().item() for part, chosen in parts.items()}
                | {
                    "ESS, policy": estimate.ess_policy.mean().item(),
                    "ESS, Gaussian": estimate.ess_gaussian.mean().item(),
                }
            )
    return rows


def main(args: Args) -> None:
    rows = [row for run in args.runs for row in measure(run, args)]
    write_csv(args.out, rows)
    names = [name for name in rows[0] if name != "run"]
    print("| " + " | ".join(names) + " |\n|" + "-|" * len(names))
    for row in rows:
        print("| " + " | ".join(f"{row[x]:.3g}" if isinstance(row[x], float) else row[x] for x in names) + " |")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
