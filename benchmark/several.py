"""Several runs at once on one machine, as people start them: training steps per second of each.

    python benchmark/several.py --out benchmark/results/several
    python benchmark/several.py --peer "sac_continuous:before=python OLD_CHECKOUT/sac_continuous.py"

Each script is started once, twice and four times at the same moment, with the threads that it takes by itself. It is
timed from inside its environment (benchmark/timed.py) once it is past the random steps. What is reported is the mean
rate of the runs that went at once. A peer is another version of a script. Writes <out>.csv and <out>.md.
"""

import csv
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
from benchmark.speed import machine, parse_peer  # noqa: E402


@dataclass
class Args:
    out: str = "several"
    """the results go to <out>.csv and <out>.md"""
    scripts: tuple[str, ...] = ("sac_continuous", "smfp_continuous", "mfpo_continuous")
    """what to time"""
    counts: tuple[int, ...] = (1, 2, 4)
    """how many at once"""
    task: str = "Hopper-v4"
    """the task to train on"""
    seconds: float = 15.0
    """how long each run is timed for"""
    peer: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """SCRIPT:NAME=COMMAND of another version of a script; may be given more than once"""
    threads: int = os.cpu_count() or 1
    """cores of the machine, for the record; the runs choose their threads themselves"""


def rates(words: list[str], count: int, args: Args) -> list[float]:
    """Training steps per second of each of `count` runs that are started at the same moment."""
    flags = "--env-id benchmark.timed:Timed-v0 --learning-starts 1000 --total-timesteps 1000000 --buffer-size 100000"
    words = [*words, *flags.split(), "--eval-frequency", "0", "--checkpoint-frequency", "0"]
    with tempfile.TemporaryDirectory() as folder:
        files, processes = [Path(folder, f"time{i}") for i in range(count)], []
        for i, file in enumerate(files):
            timing = {"TIMED_ENV": args.task, "TIMED_FROM": "1005", "TIMED_SECONDS": str(args.seconds)}
            timing |= {"TIMED_FILE": str(file), "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
            streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
            line = [*words, "--seed", str(i + 1)]
            processes.append(subprocess.Popen(line, cwd=folder, env=os.environ | timing, **streams))
        errors = [process.communicate()[1] for process in processes]
        missing = [error for file, error in zip(files, errors, strict=True) if not file.exists()]
        if missing:
            sys.exit(f"several.py: error: {shlex.join(words)} was not timed: {missing[0][-300:]}")
        pairs = [map(float, file.read_text().split()) for file in files]
    return [steps / seconds for steps, seconds in pairs]


def main(args: Args) -> None:
    commands = {(script, "now"): [sys.executable, str(ROOT / f"{script}.py")] for script in args.scripts}
    commands |= {(script, name): words for script, name, words in (parse_peer(p, args.scripts) for p in args.peer)}
    rows = []
    for count in args.counts:
        for (script, version), words in commands.items():
            found = rates(words, count, args)
            rows.append((script, version, count, sum(found) / count, min(found), max(found)))
            print(*rows[-1], flush=True)
    with open(f"{args.out}.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["script", "version", "runs at once", "mean steps/s", "lowest", "highest"])
        writer.writerows((*row[:3], *(f"{x:.4g}" for x in row[3:])) for row in rows)
    means = {row[:3]: row[3] for row in rows}
    lines = ["| steps/s of each run | version | " + " | ".join(f"{n} at once" for n in args.counts) + " |"]
    lines.append("|-" * (2 + len(args.counts)) + "|")
    for script, version in commands:
        cells = [f"{means[script, version, count]:.3g}" for count in args.counts]
        lines.append(f"| {script} | {version} | " + " | ".join(cells) + " |")
    text = f"{machine(args).replace(f' ({args.threads} threads used)', '')}; {args.task}, {args.seconds:g} s each\n\n"
    Path(f"{args.out}.md").write_text(text + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
