"""Where MFPO's log pi goes wrong: in the average divergence network, or in the sampler's few steps?

    python benchmark/likelihood.py runs/HalfCheetah-v4__mfpo* --out benchmark/results/likelihood/likelihood

The network integrates the divergence of the instantaneous field; the actions come from a map of T long steps. As far as
that map is not the field's flow, the two have different densities, however good the network. So this compares three
entropies, -E[log pi], each over the same states of the replay buffer and the same noise: by the network, of the field
(exact, 64 Euler steps of the instantaneous velocity) and of the map (exact, by its change of variables). Network
minus field is the network's error, field minus map that of the few steps, and their sum, network minus map, is what
`diagnostics/adn_log_prob_bias` shows with the other sign. Writes <out>.csv and prints a table.

`--likelihood map` takes log |det(I - A)| of each step exactly, A being (1/T) du/da, by d products with A. Would a few
products with random probes do, by the power series -sum_k tr(A^k) / k? <out>_series.csv has, for each step, A's largest
eigenvalue and how far the series is from the determinant when it is cut, even with exact traces.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import mfpo_continuous as mfpo
from benchmark.proposals import load
from benchmark.table import write_csv

FIELD_STEPS = 64
TERMS = (2, 5, 10, 20)  # of the power series


@dataclass
class Args:
    runs: Annotated[list[Path], tyro.conf.Positional]
    """folders of runs of mfpo_continuous.py, with their checkpoints"""
    out: Path = Path("likelihood")
    """the CSV, without its ending"""
    states: int = 256
    """states of the replay buffer, with one noise each"""
    seed: int = 0


@torch.no_grad()
def log_probs(agent: mfpo.Agent, obs: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
    """log pi (B,) of what noise (B, d) becomes: by the network (if there is one), by the field and by the map."""
    result = {}
    if agent.args.likelihood in ("adn", "map"):
        result["network"] = agent.sample_with_log_prob(obs, noise)[1]

    def field(noise):
        return mfpo.sample_flow(agent.policy, obs, noise, FIELD_STEPS, meanflow=False)[0]

    result["field"] = mfpo.exact_log_prob(field, noise)
    result["map"] = mfpo.exact_log_prob(lambda noise: agent.sampler(obs, noise)[0], noise)
    return result


@torch.no_grad()
def series(agent: mfpo.Agent, obs: torch.Tensor, noise: torch.Tensor) -> list[dict[str, float]]:
    """For each of the sampler's steps: the largest |eigenvalue| of A, and the cut series' mean error in nats."""
    rows = []
    for x, r, t in agent.sampler(obs, noise)[1]:

        def shift(x, obs, r=r, t=t):
            return agent.policy(obs, x, r, t) / agent.args.sampling_steps

        a = torch.func.vmap(torch.func.jacfwd(shift))(x, obs)  # (B, d, d)
        radius = torch.linalg.eigvals(a).abs().amax(-1)
        row = {"t": t.item(), "radius, median": radius.median().item(), "radius, largest": radius.max().item()}
        exact = torch.linalg.slogdet(torch.eye(x.shape[-1]) - a).logabsdet
        power, total = torch.eye(x.shape[-1]).expand_as(a), torch.zeros(len(x))
        for k in range(1, max(TERMS) + 1):
            power = power @ a
            total -= power.diagonal(dim1=-2, dim2=-1).sum(-1) / k
            if k in TERMS:
                row[f"{k} terms"] = (total - exact).abs().mean().item()
        rows.append(row)
    return rows


def main(args: Args) -> None:
    rows, steps = [], []
    for run in args.runs:
        torch.manual_seed(args.seed)
        agent, obs = load(run, args.states)
        noise = torch.randn(len(obs), agent.action_dim)
        logs = log_probs(agent, obs, noise)
        steps += [{"run": run.name} | row for row in series(agent, obs, noise)]
        row = {"run": run.name, "target": agent.target_entropy}
        row |= {name: -value.mean().item() for name, value in logs.items()}
        for first, second in (("network", "field"), ("field", "map")):
            if first in logs:
                difference = logs[second] - logs[first]
                row[f"{first} - {second}"] = difference.mean().item()
                row[f"{first} - {second}: error"] = (difference.std() / len(difference) ** 0.5).item()
        rows.append(row)
    columns = ["run", "target", "network", "field", "map"]
    differences = ["network - field", "field - map"]
    write_csv(args.out, rows)
    write_csv(args.out.with_name(f"{args.out.name}_series"), steps)
    print("| run | target entropy | " + " | ".join([*columns[2:], *differences]) + " |\n" + "|-" * 7 + "|")
    for row in rows:
        cells = [f"{row[x]:.2f}" if x in row else "" for x in columns[1:]]
        cells += [f"{row[x]:.2f} ± {row[x + ': error']:.2f}" if x in row else "" for x in differences]
        print(f"| {row['run']} | " + " | ".join(cells) + " |")
    print("\n| " + " | ".join(steps[0]) + " |\n" + "|-" * len(steps[0]) + "|")
    for row in steps:
        print("| " + " | ".join(x if isinstance(x, str) else f"{x:.2f}" for x in row.values()) + " |")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
