"""Several runs at once on one machine, as people start them: training steps per second of each.

    python benchmark/several.py --out benchmark/results/speed/several
    python benchmark/several.py --peer "sac_continuous:before=python OLD_CHECKOUT/sac_continuous.py"

Each script is started once, twice and four times at the same moment, with the threads that it takes by itself. It is
timed from inside its environment (benchmark/timed.py) once it is past the random steps. What is reported is the mean
rate of the runs that went at once. A peer is another version of a script. Writes <out>.csv and <out>.md.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
from benchmark.speed import environment, machine, parse_peer, time_runs  # noqa: E402


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


def main(args: Args) -> None:
    commands = {(script, "now"): [sys.executable, str(ROOT / f"{script}.py")] for script in args.scripts}
    commands |= {(script, name): words for script, name, words in (parse_peer(p, args.scripts) for p in args.peer)}
    rows = []
    for count in args.counts:
        for (script, version), words in commands.items():
            alone = [*words, "--buffer-size", "100000", "--eval-frequency", "0", "--checkpoint-frequency", "0"]
            found = time_runs(alone, count, args.task, args.seconds, environment(None), first=5)
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
    text = f"{machine(None)}; {args.task}, {args.seconds:g} s each\n\n"
    Path(f"{args.out}.md").write_text(text + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
