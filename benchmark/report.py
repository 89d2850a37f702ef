"""Learning curves, tables and a CSV with every seed, from the folders of runs.

    python benchmark/report.py runs/* --out benchmark/results/learning_curves/mujoco
    python benchmark/report.py runs/* --normalize sac_continuous --published benchmark/results/published.csv

Reads TensorBoard's event files and checkpoint.pt, nothing else. For <out> it writes

    <out>.csv                      every seed: env_id, exp_name, seed, metric, step, hours, value, std over the episodes
    <out>.md, printed too          last scores, incomplete runs, the command line behind each number, machine, commit
    <out>_{steps,hours}.png        a panel per task, over environment steps and over hours of training
    <out>_aggregate.png            interquartile mean over seeds and tasks with 95 % intervals (rliable)

Metrics: `train` (mean return of the training episodes that ended since the evaluation before; those after the last
evaluation are left out), `eval_exploring` (one plain sample of the policy per step) and `eval` (SAC's mean action, the
best of N candidates in MFPO and SMFP). Seeds are only averaged at steps that all have reached; nothing is smoothed.

Hours: an event file is one session, the run itself or a resume of it, and lasts from its first event to its last row
that no resume superseded. Sessions count, evaluations included; the pauses between them and work that was lost and done
again do not. A machine that slept during a session counts as working, for no event tells.
Needs `pip install -r requirements-dev.txt`.
"""

import csv
import datetime
import importlib
import itertools
import logging
import math
import os
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import torch
import tyro
from rliable.library import get_interval_estimates
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmark.speed import commit, hardware  # noqa: E402

TITLES = {"train": "training return", "eval_exploring": "plain-sample evaluation", "eval": "best-of-N evaluation"}
TEXT = "hyperparameters/text_summary"
SCRIPTS = sorted(path.stem for path in ROOT.glob("*_continuous.py"))
DEFAULTS = {x: {k: str(v) for k, v in vars(importlib.import_module(x).Args()).items()} for x in SCRIPTS}  # of the flags
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe-Ito: colour-blind safe
DASHES = ["-", (0, (5, 1)), (0, (3, 0.8, 1, 0.8)), (0, (1.2, 0.6)), (0, (8, 1, 1, 1))]  # to tell lines without colour
Cells = dict[tuple[str, str], list["Run"]]
"""(env_id, exp_name): its runs, sorted by seed"""


@dataclass
class Args:
    runs: Annotated[list[Path], tyro.conf.Positional]
    """run folders, one for each task, exp_name and seed"""
    out: Path = Path("report")
    """the files to write, without their endings"""
    metric: str = "eval"
    """what the curves show; or a TensorBoard tag, as diagnostics/entropy, which CSV and table then have too"""
    also: tuple[str, ...] = ()
    """more TensorBoard tags for CSV and table"""
    every: int = 1
    """of the tags of --also keep one row, the first, in this many steps"""
    until: int | None = None
    """leave out what runs did after this step, to compare some of unequal length"""
    beside: tuple[Path, ...] = ()
    """CSVs of earlier reports, whose curves of --metric are drawn too, in the panels of the tasks; where two have the
    same task and exp_name, the later one counts, and the runs before both"""
    normalize: str = "sac_continuous"
    """the exp_name whose mean last score on a task counts as 1 in the aggregate; a return of 0 counts as 0"""
    published: Path | None = None
    """a CSV of env_id, script, score, source, which adds a column of published scores to the table"""
    machine: str | None = None
    """what the runs were made on; by default the machine that writes the report"""
    commit: str | None = None
    """what the runs were made with; by default what is checked out where the report is written"""
    date: str | None = None
    """when the runs were made; by default the day on which the report is written"""


def script_of(args: dict) -> str:
    """The script with these flags, or with nearly the same if the run is of another version."""
    return min(DEFAULTS, key=lambda name: len(DEFAULTS[name].keys() ^ args.keys()))


@dataclass
class Run:
    folder: Path
    args: dict[str, str]  # as text
    reached: int  # environment steps
    curves: dict[str, dict[int, tuple]]  # metric: {step: (hours, value, std or None)}
    changed: tuple[str, ...] = ()  # flags that had another value when it was resumed

    def __post_init__(self):
        self.env_id, self.exp_name, self.seed = self.args["env_id"], self.args["exp_name"], int(self.args["seed"])
        self.last_step = int(self.args["total_timesteps"])
        self.last_step -= self.last_step % int(self.args["num_envs"])
        self.script = script_of(self.args)


def fail(message: str) -> None:
    """Report a mistake of the user's in one line and exit with code 2, before anything is written."""
    print(f"{Path(__file__).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def training_hours(starts: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Hours of training (n,) at `times` (n,), when a run's rows were written; its sessions began at `starts`; in s."""
    session = np.searchsorted(starts, times, side="right") - 1
    lengths = [max(times[session == k], default=start) - start for k, start in enumerate(starts)]
    return (times - starts[session] + np.cumsum([0, *lengths])[session]) / 3600


def read_run(folder: Path, metrics: Iterable[str] = TITLES) -> Run:
    """A run's arguments and its curves of these metrics, without the rows that a resume superseded."""
    files = sorted(folder.glob("events.out.tfevents.*"))
    # A resume's file begins with the step it goes on from (SummaryWriter's purge_step): EventAccumulator, which reads
    # the files by name and so by time, then drops the scalars that it has from this step on. Texts it keeps.
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    if not files or TEXT not in events.Reload().Tags()["tensors"]:
        fail(f"{folder} is no run folder: it has no event file with the hyperparameters of a run")
    tables = [row.tensor_proto.string_val[0].decode().splitlines()[2:] for row in events.Tensors(TEXT)]
    args, *later = (dict(line[1:-1].split("|", 1) for line in table) for table in tables)  # at the start, when resumed
    changed = {name for other in later for name in other if other[name] != args.get(name)} - {"total_timesteps"}
    rows = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    reached = max((row.step for series in rows.values() for row in series), default=0)
    if (folder / "checkpoint.pt").exists():
        try:
            saved = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
            args["total_timesteps"] = str(saved["args"]["total_timesteps"])  # which a resume may have raised
            reached = max(reached, saved["global_step"])  # rows come every log_frequency steps only
        except Exception as error:  # torch has many for a file that is not what it seems
            fail(f"{folder}/checkpoint.pt cannot be read ({type(error).__name__})")

    starts = np.array([EventAccumulator(str(file)).FirstEventTimestamp() for file in files])
    times = np.array(sorted({row.wall_time for series in rows.values() for row in series}))
    hours = dict(zip(times, training_hours(starts, times), strict=True))
    run = Run(folder, args, reached, {}, tuple(sorted(changed)))
    for metric in metrics:
        tag = f"{metric}/episodic_return" if metric in TITLES else metric
        stds = {row.step: row.value for row in rows.get(f"{tag}_std", [])}
        run.curves[metric] = {x.step: (hours[x.wall_time], x.value, stds.get(x.step)) for x in rows.get(tag, [])}
    run.curves["train"], every = {}, max(1, run.last_step // 100)  # for a run without evaluations
    ends = list(run.curves["eval"]) or list(range(every, reached + 1, every))
    episodes = rows.get("charts/episodic_return", [])
    interval = np.searchsorted(ends, [row.step for row in episodes])
    for i, end in enumerate(ends):
        some = [episodes[k] for k in np.flatnonzero(interval == i)]
        if some:
            run.curves["train"][end] = hours[some[-1].wall_time], float(np.mean([row.value for row in some])), None
    return run


def read_cells(path: Path, metric: str) -> Cells:
    """The curves of one metric in the CSV of an earlier report, as runs that have nothing else."""
    runs: dict[tuple[str, str, str], Run] = {}
    try:
        with open(path, encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["metric"] == metric:
                    names = {name: row[name] for name in ("env_id", "exp_name", "seed")}
                    args = names | {"total_timesteps": "0", "num_envs": "1"}
                    run = runs.setdefault(tuple(names.values()), Run(path, args, 0, {metric: {}}))
                    run.curves[metric][int(row["step"])] = float(row["hours"]), float(row["value"]), None
    except (OSError, KeyError, ValueError) as error:
        fail(f"--beside {path} is not the CSV of a report ({type(error).__name__}: {error})")
    cells: Cells = {}
    for (env_id, exp_name, _), run in sorted(runs.items()):
        cells.setdefault((env_id, exp_name), []).append(run)
    return cells


def stack(runs: list[Run], metric: str) -> np.ndarray:
    """Steps, hours and values, (3, len(runs), n), at the n steps that all runs have in common."""
    steps = sorted(set.intersection(*(set(run.curves[metric]) for run in runs)))
    points = [[(step, *run.curves[metric][step][:2]) for step in steps] for run in runs]
    return np.array(points, dtype=float).reshape(len(runs), len(steps), 3).transpose(2, 0, 1)


def iqm(scores: np.ndarray) -> np.ndarray:
    """Interquartile mean (n,) of scores (seeds, tasks, n): rliable's aggregate_iqm, but at all n steps at once."""
    ordered = np.sort(scores.reshape(-1, scores.shape[-1]), axis=0)
    cut = len(ordered) // 4
    return ordered[cut : len(ordered) - cut].mean(0)


def aggregate(cells: Cells, metric: str, reference: str) -> tuple[dict, str]:
    """For each exp_name n steps, mean hours (n,), IQM (n,) and its interval (2, n); or nothing, and why.

    Scores are divided by the last mean score of `reference` on their task. The interval is the 95 % one of a bootstrap
    that draws seeds anew within each task, at each step.
    """
    tasks, names = (sorted(set(part)) for part in zip(*cells, strict=True))
    if len(tasks) == 1 or reference not in names:
        return {}, "there is one task only" if len(tasks) == 1 else f"there are no runs of --normalize {reference}"
    axes, scores = {}, {}
    for name in names:
        counts = {task: len(cells.get((task, name), [])) for task in tasks}
        if len(set(counts.values())) > 1:
            return {}, f"{name} does not have the same number of seeds on each task: {counts}"
        steps, hours, values = stack([run for task in tasks for run in cells[task, name]], metric)
        if not values.size:
            return {}, f"{name} has no evaluation that all its runs have in common"
        axes[name] = steps[0], hours.mean(0)
        scores[name] = values.reshape(len(tasks), -1, values.shape[1]).swapaxes(0, 1)  # (seeds, tasks, n)
    units = np.array([stack(cells[task, reference], metric)[2, :, -1].mean() for task in tasks])
    if units.min() <= 0:
        return {}, f"the last score of {reference} is not above 0 on each task"
    np.random.seed(0)  # rliable draws from NumPy's global generator
    means, intervals = get_interval_estimates({name: x / units[:, None] for name, x in scores.items()}, iqm, reps=5000)
    return {name: (*axes[name], means[name], intervals[name]) for name in names}, ""


def short(number: float, _=None) -> str:
    """10k for 10000: a tick's label."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:g}{unit}"
    return f"{number:g}"


def draw(panels: list[tuple[str, str, list]], ylabel: str, path: str) -> None:
    """PNG and SVG of panels (title, xlabel, lines); a line is exp_name, x (n,), y (n,), band (2, n) and seeds' x, y."""
    names = sorted({line[0] for *_, lines in panels for line in lines})
    looks = zip(names, itertools.cycle(COLORS), itertools.cycle(DASHES), strict=False)
    looks = {name: {"color": color, "linestyle": dash} for name, color, dash in looks}
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    legend_rows = math.ceil(len(names) / columns)
    size = (3.3 * columns, 2.5 * rows + 0.25 + 0.25 * legend_rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for ax, (title, xlabel, lines) in zip(axes.flat, panels, strict=False):
        for name, x, y, band, seeds in lines:
            for seed in seeds:
                ax.plot(*seed, linewidth=0.5, alpha=0.4, color=looks[name]["color"])
            ax.fill_between(x, *band, alpha=0.15, linewidth=0, color=looks[name]["color"])
            ax.plot(x, y, linewidth=1.8, marker="." if len(x) == 1 else "", **looks[name])
        ax.set(title=title, xlabel=xlabel)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
        for side in (ax.xaxis, ax.yaxis):
            side.set_major_formatter(short)
    figure.supylabel(ylabel, fontsize="medium")
    handles = [plt.Line2D([], [], linewidth=2, **look) for look in looks.values()]
    figure.legend(handles, names, loc="outside upper center", ncols=columns, frameon=False)
    figure.savefig(f"{path}.png", dpi=120)
    plt.close(figure)


def draw_tasks(cells: Cells, metric: str, title: str, axis: int, path: str) -> None:
    """A panel per task, over environment steps (axis 0) or hours (axis 1: their mean over the seeds at each step)."""
    panels = {task: (task, ("environment steps", "hours of training")[axis], []) for task, _ in cells}
    for (task, name), runs in cells.items():
        points = stack(runs, metric)
        mean, band = points.mean(1), np.array([points[2].min(0), points[2].max(0)])
        if len(runs) >= 5:
            band = mean[2] + np.array([[-1], [1]]) * points[2].std(0, ddof=1)
        seeds = [stack([run], metric)[[axis, 2], 0] for run in runs]
        panels[task][2].append((name, mean[axis], mean[2], band, seeds))
    draw([*panels.values()], title, path)


def spread(values: np.ndarray) -> str:
    """Mean and, of two and more seeds, sample standard deviation."""
    size = abs(values.mean())
    digits = 0 if size >= 100 else 2 if size >= 0.01 or size == 0 else 4
    return f"{values.mean():,.{digits}f}" + (f" ± {values.std(ddof=1):,.{digits}f}" if len(values) > 1 else "")


def score_table(cells: Cells, titles: dict[str, str], published: list[dict]) -> str:
    """Last scores in Markdown: of each metric the last that all seeds of the cell have, marked where it is earlier."""
    sources = list(dict.fromkeys(row["source"] for row in published))
    heads = ["task", "exp_name", *titles.values(), "steps", "seeds", *["published"] * bool(sources)]
    lines = ["| " + " | ".join(heads) + " |", "|-" * len(heads) + "|"]
    for (task, name), runs in cells.items():
        stacks = [stack(runs, metric) for metric in titles]
        ends = [int(points[0, 0, -1]) if points.size else 0 for points in stacks]
        budget, texts = max(run.last_step for run in runs), [task, name]
        for metric, points, end in zip(titles, stacks, ends, strict=True):
            early = f" (at {end:,})" if end < max(ends) else ""
            foreign = metric not in TITLES and not any(run.curves[metric] for run in runs)  # another script's tag
            missing = "" if foreign else "none in common"
            texts.append(spread(points[2, :, -1]) + early if points.size else missing)
        texts += [f"{max(ends):,}" + (f" of {budget:,}" if max(ends) < budget else ""), str(len(runs))]
        if sources:
            found = [row for row in published if (row["env_id"], row["script"]) == (task, runs[0].script)]
            texts.append(", ".join(f"{row['score']} [{sources.index(row['source']) + 1}]" for row in found))
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join([*lines, *(f"\n[{i}] {source}" for i, source in enumerate(sources, 1))])


def command(run: Run) -> str:
    """The command line of a run, with its flags that are not the script's defaults."""
    words = [f"python {run.script}.py --env-id <task> --seed <seed>"]
    for name, value in run.args.items():
        if name not in ("env_id", "seed") and value != DEFAULTS[run.script].get(name):
            flag = name.replace("_", "-")
            words.append({"True": f"--{flag}", "False": f"--no-{flag}"}.get(value, f"--{flag} {shlex.quote(value)}"))
    return " ".join(words)


def provenance(args: Args) -> str:
    """When, on what and with what the runs were made: as given, or else as it is where the report is written."""
    cpu, gpu = hardware()
    found = {
        "date": datetime.date.today(),
        "machine": f"{cpu}, {os.cpu_count()} cores, {gpu}, torch {torch.__version__}",
        "commit": commit() or "unknown",
    }
    where = {name: "as given" if getattr(args, name) else "where the report was written" for name in found}
    return "\n".join(f"- {name}: {getattr(args, name) or found[name]} ({where[name]})" for name in found)


PAGE = """\
{provenance}

{table}

Last scores, not best ones: mean ± sample standard deviation over the seeds at the last step that all of the row have.
Training return: mean of the episodes that ended since the evaluation before. Plain sample: one action drawn from the
policy. Best of N: by the critics, of N such actions; SAC plays its mean action there.

{warnings}

![{title} over environment steps]({name}_steps.png)
![{title} over hours of training]({name}_hours.png)

Thick: mean over the seeds at steps that all have, at the mean of their hours; thin: each seed; band: minimum to maximum
of fewer than 5 seeds, ± one standard deviation of more.{beside}

{together}

```bash
{commands}
```
"""
TOGETHER = """\
![{title}, interquartile mean over tasks]({name}_aggregate.png)

Interquartile mean of the {title} over seeds and tasks, at the mean of the runs' hours; 1 is the mean last score of
{reference} on a task, 0 a return of 0. Band: 95 % interval of a stratified bootstrap over the seeds (no width with one
seed). In the end:

{last}"""


def report(cells: Cells, beside: Cells, titles: dict[str, str], published: list[dict], args: Args) -> str:
    """Draw the pictures, `beside` in those of the tasks; returns the text of <out>.md."""
    for axis, kind in enumerate(("steps", "hours")):
        draw_tasks(beside | cells, args.metric, titles[args.metric], axis, f"{args.out}_{kind}")
    words = {"title": titles[args.metric], "name": args.out.name, "reference": args.normalize, "beside": ""}
    if args.beside:
        words["beside"] = f" Curves without a row above: {', '.join(path.name for path in args.beside)}."
    curves, why_not = {}, f"{args.metric} is no score"
    if args.metric in TITLES:
        curves, why_not = aggregate(cells, args.metric, args.normalize)
    words["together"] = f"Not aggregated over tasks: {why_not}."
    if curves:
        steps, hours = ([(name, x[axis], *x[2:], []) for name, x in curves.items()] for axis in (0, 1))
        panels = [("", "environment steps", steps), ("", "hours of training", hours)]
        draw(panels, "normalised IQM", f"{args.out}_aggregate")
        last = "\n".join(
            f"- {name}: {mean[-1]:.2f} [{low[-1]:.2f}, {high[-1]:.2f}] after {steps[-1]:,.0f} steps"
            for name, (steps, _, mean, (low, high)) in curves.items()
        )
        words["together"] = TOGETHER.format(last=last, **words)
    warnings, commands = [], {}
    for (task, name), runs in cells.items():
        lines: dict[str, list[str]] = {}
        for run in runs:
            lines.setdefault(command(run), []).append(str(run.seed))
            if run.reached < run.last_step:
                warnings.append(f"- Incomplete: {run.folder.name}, {run.reached:,} of {run.last_step:,} steps")
            if run.changed:
                warnings.append(f"- Changed: {run.folder.name} was resumed with another {', '.join(run.changed)}")
        if len(lines) > 1:
            warnings.append(f"- Mixed: the seeds of {task}, {name} differ in their flags; see the commands")
        for line, seeds in lines.items():
            commands.setdefault((line, ", ".join(seeds)), []).append(task)
    shell = [f"# {', '.join(tasks)}: seed {seeds}\n{line}" for (line, seeds), tasks in commands.items()]
    return PAGE.format(
        provenance=provenance(args),
        table=score_table(cells, titles, published),
        warnings="\n".join(warnings) or "Every run is complete.",
        commands="\n".join(shell),
        **words,
    )


def main(args: Args) -> None:
    if args.every < 1:
        fail(f"--every is {args.every}; it must be at least 1")
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of rows that a resume superseded
    titles = TITLES | {tag: TITLES.get(tag, tag) for tag in (args.metric, *args.also)}
    runs = [read_run(folder, titles) for folder in args.runs]
    beside: Cells = {}
    for path in args.beside:
        beside |= read_cells(path, args.metric)
    beside = {cell: found for cell, found in beside.items() if cell[0] in {run.env_id for run in runs}}
    earlier = [run for found in beside.values() for run in found]
    for run in (*runs, *earlier) if args.until is not None else ():
        run.reached, run.last_step = min(run.reached, args.until), min(run.last_step, args.until)
        for metric, curve in run.curves.items():
            run.curves[metric] = {step: point for step, point in curve.items() if step <= args.until}
    for run, tag in itertools.product(runs, args.also):
        kept = {step // args.every: (step, point) for step, point in reversed(run.curves[tag].items())}
        run.curves[tag] = dict(reversed(kept.values()))
    runs.sort(key=lambda run: (run.env_id, run.exp_name, run.seed))
    for flag, tags in (("metric", [args.metric]), ("also", args.also)):
        for tag in tags:
            if tag not in TITLES and not any(run.curves[tag] for run in runs):
                fail(f"--{flag} {tag}: no run has such a tag; TensorBoard shows which there are")
    cells: Cells = {}
    for run in runs:
        cell = cells.setdefault((run.env_id, run.exp_name), [])
        if cell and cell[-1].seed == run.seed:
            fail(f"{cell[-1].folder} and {run.folder} are the same task, exp_name and seed; leave one out")
        cell.append(run)
    published, known = [], {(run.env_id, run.script) for run in runs}
    if args.published:
        try:
            with open(args.published, encoding="utf-8") as file:
                rows = [{x: row[x] for x in ("env_id", "script", "score", "source")} for row in csv.DictReader(file)]
        except (OSError, KeyError) as error:
            fail(f"--published {args.published} cannot be read ({type(error).__name__}: {error})")
        published = [row for row in rows if (row["env_id"], row["script"]) in known]

    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{args.out}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["env_id", "exp_name", "seed", "metric", "step", "hours", "value", "std"])
        for run, metric in itertools.product(runs, titles):
            for step, numbers in run.curves[metric].items():
                texts = ["" if x is None else f"{x:.6g}" for x in numbers]
                writer.writerow([run.env_id, run.exp_name, run.seed, metric, step, *texts])
    text = report(cells, beside, titles, published, args)
    Path(f"{args.out}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
