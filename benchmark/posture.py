"""Does a HalfCheetah run on its feet or on its back? From the replay buffers in the checkpoints of runs.

    python benchmark/posture.py runs/HalfCheetah-v4__* --every 2000 --out benchmark/results/taking_off/posture

A cheetah that has fallen on its back learns to slide along on it, which pays well enough to stay there. A curve that
levels off may say that, and nothing of the algorithm. Writes <out>.csv and prints a table: for each `every` steps of
training, up to the step named, the share of them with the torso upside down, and the mean forward velocity in m/s.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

PITCH, VELOCITY = 1, 8  # of the torso, in HalfCheetah's observation


@dataclass
class Args:
    runs: Annotated[list[Path], tyro.conf.Positional]
    """folders of runs on HalfCheetah, with their checkpoints"""
    out: Path = Path("posture")
    """the CSV, without its ending"""
    every: int = 2_000
    """environment steps per row"""


def fail(message: str) -> None:
    """One line, and exit code 2."""
    print(f"posture.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def posture(run: Path, every: int) -> list[dict]:
    """A row for each `every` steps that the replay buffer still holds whole."""
    if not (run / "checkpoint.pt").is_file():
        fail(f"{run} has no checkpoint.pt; name the folders of runs")
    saved = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
    args, buffer = saved["args"], saved["buffer"]
    if "HalfCheetah" not in args["env_id"]:
        fail(f"{run} is a run on {args['env_id']}, not on HalfCheetah; leave it out")
    stride = args["num_envs"]
    observations = buffer["obs"].roll(-buffer["added"], 0)  # the row to be written next is the oldest; now it is first
    steps = saved["global_step"] - stride * torch.arange(len(observations) - 1, -1, -1)
    rows = []
    for last in range(every, saved["global_step"] + 1, every):
        chosen = observations[(last - every < steps) & (steps <= last)]
        if len(chosen) == every // stride:
            upside_down = (chosen[..., PITCH].cos() < 0).float().mean().item()
            velocity = chosen[..., VELOCITY].mean().item()
            rows.append({"run": run.name, "step": last, "upside_down": upside_down, "velocity": velocity})
    return rows


def main(args: Args) -> None:
    rows = [row for run in args.runs for row in posture(run, args.every)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, ["run", "step", "upside_down", "velocity"])
        writer.writeheader()
        writer.writerows(rows)
    steps = sorted({row["step"] for row in rows})
    cells = {(row["run"], row["step"]): f"{row['upside_down']:.0%}, {row['velocity']:.1f}" for row in rows}
    print("| run | " + " | ".join(f"{step:,}" for step in steps) + " |\n|" + "-|" * (len(steps) + 1))
    for run in args.runs:
        print(f"| {run.name} | " + " | ".join(cells.get((run.name, step), "") for step in steps) + " |")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
