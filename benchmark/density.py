"""The action density that a run on the multi-goal task learned, beside the Boltzmann density that is optimal there.

    python sac_continuous.py --env-id tests.multigoal:MultiGoal-v0 --no-autotune --total-timesteps 5000
    python benchmark/density.py runs/<run> runs/<another> --out benchmark/results/modes/multigoal
    python benchmark/density.py benchmark/results/modes/multigoal_variants.csv

For each run, in the order given: total variation to the optimum and Kullback-Leibler divergence from it on a 16 x 16
grid, the probability that each goal is the nearest, the entropy of the histogram in nats and, for MFPO, the error of
its log pi. Prints means over the runs of each --exp-name, writes <out>.csv and <out>.png; of a CSV it prints the means.
Needs `pip install -r requirements-dev.txt`.
"""

import csv
import importlib
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import torch
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmark.report import script_of, spread
from benchmark.table import write_csv
from tests.multigoal import TASKS, UNEQUAL, Goals, boltzmann

CELLS = 16


@dataclass
class Args:
    runs: Annotated[list[Path], tyro.conf.Positional]
    """run folders, each with a checkpoint.pt, or one CSV that this script wrote"""
    out: Path = Path("density")
    """the CSV and the picture, without their endings"""
    samples: int = 200_000
    """actions drawn from each policy"""
    picture: bool = True
    """draw the picture too"""


def load_agent(path: Path):
    """The agent in a checkpoint.pt or model.pt: its script's module, itself, its arguments, all that was saved."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    script = importlib.import_module(script_of(saved["args"]))
    args = script.Args(**saved["args"])
    env = script.make_env(args.env_id)
    agent = script.Agent(env.observation_space.shape[0], env.action_space.shape[0], args, torch.device("cpu"))
    agent.load_state_dict(saved["agent"])
    return script, agent, args, saved


def shares(actions: torch.Tensor, cells: int = CELLS) -> np.ndarray:
    """Share of the actions (N, 2) in each cell of the box."""
    counts, _, _ = np.histogram2d(*actions.numpy().T, bins=cells, range=[[-1, 1], [-1, 1]])
    return counts / counts.sum()


def histogram(agent, samples: int, cells: int) -> np.ndarray:
    """Share of the policy's actions in each cell of the box."""
    torch.manual_seed(0)
    actions = [agent.sample_actions(torch.zeros(10_000, 1)) for _ in range(math.ceil(samples / 10_000))]
    return shares(torch.cat(actions), cells)


def figures(learned: np.ndarray, optimal: np.ndarray, goals: Goals) -> dict[str, float]:
    """Distances between two (cells, cells) tables of probabilities, and the mass of the first nearest to each goal."""
    some = learned > 0
    middles = (np.arange(len(learned)) + 0.5) / len(learned) * 2 - 1
    places = np.stack(np.meshgrid(middles, middles, indexing="ij"), -1)  # (cells, cells, 2)
    nearest = ((places[:, :, None] - goals.places) ** 2).sum(-1).argmin(-1)
    return {
        "total variation": 0.5 * np.abs(learned - optimal).sum(),
        "kl": (learned[some] * np.log(learned[some] / optimal[some])).sum(),
        "entropy": -(learned[some] * np.log(learned[some] / (2 / len(learned)) ** 2)).sum(),
        "optimal entropy": -(optimal * np.log(optimal / (2 / len(optimal)) ** 2)).sum(),
        **{f"goal {i + 1}": learned[nearest == i].sum() for i in range(len(goals.places))},
    }


def print_means(rows: list[dict]) -> None:
    """A Markdown table: mean and sample standard deviation over the runs of each script or variant."""
    goals = [[value for name, value in row.items() if name.startswith("goal ")] for row in rows]
    rows = [row | {"smallest goal": min(g), "largest goal": max(g)} for row, g in zip(rows, goals, strict=True)]
    names = ["total variation", "kl", "entropy", "smallest goal", "largest goal"]
    if len(goals[0]) == len(UNEQUAL.places):  # their masses are in this order
        names[3:] = [f"goal {i + 1}" for i in range(len(goals[0]))]
    names += [name for name in ("flow_gap", "adn_log_prob_error", "adn_log_prob_bias") if any(name in r for r in rows)]
    print("| | runs | " + " | ".join(names) + " |\n|-|-|" + "-|" * len(names))
    for variant in dict.fromkeys(row["variant"] for row in rows):
        group = [row for row in rows if row["variant"] == variant]
        cells = [np.array([row[name] for row in group if name in row]) for name in names]
        texts = [spread(x) if len(x) else "" for x in cells]
        print(f"| {variant} | {len(group)} | " + " | ".join(texts) + " |")


def read_rows(path: Path) -> list[dict]:
    """What an earlier call wrote; cells that were empty are left out."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v if k in ("run", "variant") else float(v) for k, v in row.items() if v} for row in rows]


def main(args: Args) -> None:
    if [path.suffix for path in args.runs] == [".csv"]:
        return print_means(read_rows(args.runs[0]))
    rows, pictures, tasks = [], [], set()
    for run in args.runs:
        _, agent, trained, saved = load_agent(run / "checkpoint.pt")
        tasks.add(trained.env_id)
        goals = TASKS[trained.env_id]
        optimal = boltzmann(agent.log_alpha.exp().item(), goals, CELLS)
        row = {"run": run.name, "variant": trained.exp_name, "seed": trained.seed, "updates": saved["num_updates"]}
        row |= figures(histogram(agent, args.samples, CELLS), optimal, goals)
        torch.manual_seed(0)
        row |= {name.split("/")[1]: value for name, value in agent.diagnostics(torch.zeros(2000, 1)).items()}
        rows.append(row)
        pictures.append((f"{trained.exp_name}\nTV {row['total variation']:.2f}", agent, optimal))
    if len(tasks) > 1:
        sys.exit(f"the runs are of several tasks, {', '.join(sorted(tasks))}: name those of one")
    write_csv(args.out, [{k: f"{x:.4f}" if isinstance(x, float) else x for k, x in row.items()} for row in rows])
    print_means(rows)
    if args.picture:
        tables = [("optimal", boltzmann(pictures[0][1].log_alpha.exp().item(), goals, 64))]
        tables += [(title, histogram(agent, args.samples, 64)) for title, agent, _ in pictures]
        figure, axes = plt.subplots(
            1, len(tables), figsize=(2.6 * len(tables), 3.1), squeeze=False, layout="constrained"
        )
        for ax, (title, table) in zip(axes[0], tables, strict=True):
            ax.imshow(table.T, origin="lower", extent=(-1, 1, -1, 1), cmap="magma", vmax=tables[0][1].max())
            ax.plot(*goals.places.T, "c+", markersize=6)
            ax.set_title(title, fontsize=9)
            ax.set_xticks([]), ax.set_yticks([])
        figure.savefig(args.out.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
