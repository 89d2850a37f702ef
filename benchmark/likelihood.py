"""Where MFPO's log pi goes wrong: in the average divergence network, or in the sampler's few steps?

    python benchmark/likelihood.py runs/HalfCheetah-v4__mfpo* --out benchmark/results/likelihood/likelihood

The network integrates the divergence of the instantaneous field; the actions come from a map of T long steps. As far as
that map is not the field's flow, the two have different densities, however good the network. So this compares three
entropies, -E[log pi], each over the same states of the replay buffer and the same noise: by the network, of the field
(exact, 64 Euler steps of the instantaneous velocity) and of the map (exact, by its change of variables). Network
minus field is the network's error, field minus map that of the few steps, and their sum, network minus map, is what
`diagnostics/adn_log_prob_bias` shows with the other sign. Writes <out>.csv and prints a table.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import mfpo_continuous as mfpo
from benchmark.proposals import load

FIELD_STEPS = 64


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
    if agent.args.likelihood == "adn":
        result["network"] = agent.sample_with_log_prob(obs, noise)[1]

    def field(noise):
        return mfpo.sample_flow(agent.actor, obs, noise, FIELD_STEPS, meanflow=False)[0]

    result["field"] = mfpo.exact_log_prob(field, noise)
    result["map"] = mfpo.exact_log_prob(lambda noise: agent.sampler(obs, noise)[0], noise)
    return result


def main(args: Args) -> None:
    rows = []
    for run in args.runs:
        torch.manual_seed(args.seed)
        agent, obs = load(run, args.states)
        logs = log_probs(agent, obs, torch.randn(len(obs), agent.action_dim))
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
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, *(x + end for x in differences for end in ("", ": error"))])
        writer.writeheader()
        writer.writerows(rows)
    print("| run | target entropy | " + " | ".join([*columns[2:], *differences]) + " |\n" + "|-" * 7 + "|")
    for row in rows:
        cells = [f"{row[x]:.2f}" if x in row else "" for x in columns[1:]]
        cells += [f"{row[x]:.2f} ± {row[x + ': error']:.2f}" if x in row else "" for x in differences]
        print(f"| {row['run']} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
