"""The front page's table and picture, from the CSVs that lie in benchmark/results.

    python benchmark/front_page.py

Writes benchmark/results/learning_curves/front_page.md and front_page.png; the table is copied by hand
into README.md and benchmark/results/learning_curves/README.md.
Curves are evaluation returns: of SAC's mean action, of the best of ten actions in MFPO and SMFP. Where a task has
several seeds, they are averaged at the steps that all have. Needs `pip install -r requirements-dev.txt`.
"""

import csv
import re
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmark.report import COLORS, DASHES  # noqa: E402

RESULTS = ROOT / "benchmark/results"
TASKS = ["HalfCheetah-v4", "Hopper-v4", "Walker2d-v4", "Ant-v4", "Humanoid-v4"]
STEP = 100_000  # of the table; the curves end there
OURS = {  # method: the exp_names of its runs in each file
    "MFPO": {"mfpo_policy_tau.csv": ("mfpo-policy-tau",)},
    "SMFP": {"smfp_policy_lr.csv": ("smfp-policy-lr-1e-3",)},
    "SAC, CrossQ's critics": {f"sac_crossq{i}.csv": ("sac-crossq-alpha0.1",) for i in "23"},
    "SAC": {"mujoco_cpu.csv": ("sac",), "mujoco_cpu2.csv": ("sac",)},
}
PUBLISHED = {  # name: (its script in published.csv, marker)
    "SAC, published": ("sac_continuous", "s"),
    "CrossQ, published": ("crossq", "o"),
    "SMFP, authors' plots": ("smfp_continuous", "*"),
}
Curves = dict[str, dict[str, dict[int, dict[int, float]]]]
"""method: task: seed: step: evaluation return"""


def read_curves() -> Curves:
    """Ours, up to STEP. Raises ValueError where two files have different runs of one method, task and seed."""
    curves = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for method, files in OURS.items():
        for file, exp_names in files.items():
            with open(RESULTS / "learning_curves" / file) as rows:
                for row in csv.DictReader(rows):
                    step = int(row["step"])
                    if row["exp_name"] in exp_names and row["metric"] == "eval" and step <= STEP:
                        curve, value = curves[method][row["env_id"]][int(row["seed"])], float(row["value"])
                        if curve.setdefault(step, value) != value:
                            raise ValueError(f"{file} has another run of {method}, {row['env_id']}, {row['seed']}")
    return curves


def read_published() -> dict[str, dict[str, str]]:
    """name: task: score at STEP, as `mean ± std` or `mean`."""
    scores = defaultdict(dict)
    with open(RESULTS / "published.csv") as rows:
        for row in csv.DictReader(rows):
            for method, (script, _) in PUBLISHED.items():
                if row["script"] == script and f"after {STEP:,} steps" in row["source"]:
                    scores[method][row["env_id"]] = row["score"]
    return scores


def average(seeds: dict[int, dict[int, float]]) -> tuple[list[int], np.ndarray]:
    """The steps that all seeds have, and the returns (seeds, steps) at them."""
    steps = sorted(set.intersection(*map(set, seeds.values())))
    return steps, np.array([[curve[step] for step in steps] for curve in seeds.values()])


def cell(seeds: dict[int, dict[int, float]]) -> str:
    """The mean return at STEP of the seeds that reached it, and how many they are if more than one."""
    values = [curve[STEP] for curve in seeds.values() if STEP in curve]
    if not values:
        return ""
    return f"{np.mean(values):,.0f}" + (f" ({len(values)} seeds)" if len(values) > 1 else "")


def table(curves: Curves, published: dict[str, dict[str, str]]) -> str:
    """A row for each task, in Markdown."""
    heads = [*OURS, *PUBLISHED]
    lines = [f"| | {' | '.join(heads)} |", "|-" * (len(heads) + 1) + "|"]
    for task in TASKS:
        cells = [cell(curves[method][task]) for method in OURS]
        cells += [re.sub(r"\d{4,}", lambda n: f"{int(n[0]):,}", published[method][task]) for method in PUBLISHED]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def picture(curves: Curves, published: dict[str, dict[str, str]]) -> plt.Figure:
    """A panel for each task; in the last one the legend."""
    figure, axes = plt.subplots(2, 3, figsize=(10, 5.6), layout="constrained")
    for axis, task in zip(axes.flat, TASKS, strict=False):
        for method, color, dash in zip(OURS, COLORS, DASHES, strict=False):
            if seeds := curves[method][task]:
                steps, values = average(seeds)
                axis.plot(steps, values.mean(0), color=color, linestyle=dash, linewidth=2)
                if len(seeds) > 1:
                    axis.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
        for i, (method, (_, marker)) in enumerate(PUBLISHED.items()):
            mean, _, std = published[method][task].partition(" ± ")
            x = STEP * (1.03 + 0.03 * i)
            axis.errorbar(x, float(mean), float(std or 0), fmt=marker, color="0.35", capsize=2, markersize=5)
        axis.set_title(task)
        axis.set_xlim(0, 1.13 * STEP)
        axis.set_xticks([0, STEP / 2, STEP], ["0", f"{STEP // 2000}k steps", f"{STEP // 1000}k"])
        axis.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    figure.supylabel("evaluation return", fontsize="medium")
    axes.flat[-1].axis("off")
    lines = [
        plt.Line2D([], [], color=color, linestyle=dash, linewidth=2, label=method)
        for method, color, dash in zip(OURS, COLORS, DASHES, strict=False)
    ]
    for method, (_, marker) in PUBLISHED.items():
        label = method.replace("published", "ten published seeds")
        lines.append(plt.Line2D([], [], color="0.35", marker=marker, linestyle="", label=label))
    axes.flat[-1].legend(handles=lines, loc="center", frameon=False)
    return figure


def main() -> None:
    curves, published = read_curves(), read_published()
    text = table(curves, published)
    (RESULTS / "learning_curves/front_page.md").write_text(text)
    picture(curves, published).savefig(RESULTS / "learning_curves/front_page.png", dpi=100)
    print(text, end="")


if __name__ == "__main__":
    main()
