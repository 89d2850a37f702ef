"""How fast the scripts are: updates, actions and whole training loops, by task shape and mode, in one run.

    python benchmark/speed.py --out benchmark/results/speed/speed_cpu
    python benchmark/speed.py --peer "mfpo_continuous:JAX=JAX_PYTHON benchmark/peers/mfpo.py CHECKOUT" \\
        --loop-peer "sac_continuous:CleanRL=PYTHON CHECKOUT/cleanrl/sac_continuous_action.py"

Everything is measured in rounds that alternate between the processes compared (benchmark/rounds.py), so that a
machine's drift cancels; what is reported is the median over the rounds, and their range. Updates and actions run in
a process each, on random data: an action is one observation from NumPy to NumPy. Whole loops are the scripts as users
start them, timed from inside the environment (benchmark/timed.py) once they are past the random steps.

With --compile actions are timed compiled, too, as somebody would deploy a policy (see COMPILED; it needs a C++ compiler
and takes minutes), and so are updates and loops, by the scripts' own flag.

An update is one environment step's, so of `--policy-frequency` 2 it is the mean of two. Its floor is its
floating-point operations in matrix products, counted by PyTorch, over the rate of one
(rows, 256) x (256, 256) product measured in the same rounds, rows being those of the update's largest one.

A peer is any command that follows benchmark/rounds.py, given the observation and action sizes as its last arguments
(benchmark/peers/ has some); a loop peer is a CleanRL-like script, given --env-id, --seed, --learning-starts and
--total-timesteps (CleanRL's needs PYTHONPATH=CHECKOUT and gymnasium 0.29). Each is compared with the script named
before the colon.
Writes <out>.csv, <out>.md and <out>.png.
"""

import csv
import datetime
import importlib
import itertools
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]
from benchmark.rounds import answer_rounds, seconds_per_call  # noqa: E402

MODES = ("eager", "graph", "compiled")  # of our scripts; any other name is a peer's
COMPILED = {"cpp_wrapper": True}  # for torch.compile: between the kernels, too, there is C++ and not Python
# Dog is of DeepMind Control; H1Hand, which is not timed by default, is HumanoidBench's humanoid with its hands.
SHAPES = {"Hopper": (11, 3), "Humanoid": (376, 17), "Dog": (223, 38), "H1Hand": (151, 61)}


@dataclass
class Args:
    out: str = "speed"
    """the results go to <out>.csv, <out>.md and <out>.png"""
    scripts: tuple[str, ...] = ("sac_continuous", "smfp_continuous", "mfpo_continuous")
    """what to time"""
    shapes: tuple[str, ...] = ("Hopper", "Humanoid", "Dog")
    """the sizes of observations and actions to time updates and actions at"""
    tasks: tuple[str, ...] = ("Hopper-v4", "Humanoid-v4")
    """the tasks to time the whole loop on"""
    threads: int = os.cpu_count() or 1
    """threads of each process; only one process works at a time"""
    rounds: int = 5
    """rounds of updates and actions"""
    loop_rounds: int = 3
    """rounds of the whole loop"""
    compile: bool = False
    """also time actions of a compiled policy, and updates with --compile"""
    loop_seconds: float = 15.0
    """how long a loop is timed for in a round"""
    variant: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """SCRIPT:NAME=FLAGS of one of ours with other flags; may be given more than once"""
    peer: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """SCRIPT:NAME=COMMAND of a process that follows benchmark/rounds.py; may be given more than once"""
    loop_peer: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """SCRIPT:NAME=COMMAND of a training script with CleanRL's flags; may be given more than once"""


def largest_product(args) -> int:
    """Rows of the largest matrix product of an update: the states times the samples per state."""
    if hasattr(args, "policy_proposals"):
        states = args.policy_batch_size or args.batch_size
        return states * (args.policy_proposals + args.gaussian_proposals)
    return args.batch_size * getattr(args, "latents", 1)


def work(script: str, mode: str, obs_dim: int, action_dim: int, flags: list[str]) -> None:
    """The process that is timed: one agent at random data, answering rounds."""
    module = importlib.import_module(script)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    if hasattr(module, "keep_freed_memory"):
        module.keep_freed_memory()
    args = module.parse_args([*flags, "--threads", str(torch.get_num_threads())])
    args.compile = mode == "compiled"
    module.set_up_torch(args)
    agent = module.Agent(obs_dim, action_dim, args, device)
    buffer = module.ReplayBuffer(10_000, 1, obs_dim, action_dim, device)
    observations, actions = np.random.randn(1001, 1, obs_dim), np.random.uniform(-1, 1, (1000, 1, action_dim))
    zero = np.zeros(1)
    for i in range(1000):
        transition = {"obs": observations[i], "actions": actions[i], "next_obs": observations[i + 1]}
        buffer.add(**transition, rewards=zero, terminations=zero)

    def learn(with_policy):
        return agent.update(*buffer.sample(args.batch_size), with_policy)

    graphed, count = mode == "graph", itertools.count(1)
    learn_graphed = module.CudaGraph(learn, graphed)

    def update():
        return learn_graphed(with_policy=next(count) % args.policy_frequency == 0)

    obs = torch.randn(1, obs_dim).numpy()

    def act(play):
        return play(torch.from_numpy(obs).to(device)).cpu().numpy()

    with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
        for i in range(args.policy_frequency):
            learn(with_policy=i == 0)
    left, right = torch.randn(largest_product(args), 256, device=device), torch.randn(256, 256, device=device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def facts():
        # The fastest of ten: other processes only ever slow a product down.
        rate = 2 * left.numel() * 256 / min(seconds_per_call(lambda: left @ right, wait, 0.02) for _ in range(10))
        gpu = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        operations = counter.get_total_flops() / args.policy_frequency
        steps = getattr(args, "sampling_steps", 1)
        return {"operations": operations, "floor": operations / rate, "gpu_memory": gpu, "steps": steps}

    plays = [agent.sample_actions, agent.eval_actions]
    if mode == "compiled":
        plays = [torch.compile(play, options=COMPILED) for play in plays]
    action, best_action = (partial(act, module.CudaGraph(play, graphed)) for play in plays)
    answer_rounds(update=update, action=action, best_action=best_action, wait=wait, facts=facts)


def environment(threads: int | None) -> dict[str, str]:
    """The environment variables of a timed process; without `threads` it chooses their number itself."""
    path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"  # benchmark.timed is found there
    return os.environ | {"PYTHONPATH": path} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})


def parse_peer(text: str, scripts: tuple[str, ...]) -> tuple[str, str, list[str]]:
    """SCRIPT:NAME=COMMAND as (script, name, words of the command)."""
    script, _, rest = text.partition(":")
    name, _, command = rest.partition("=")
    if script not in scripts or not command:
        sys.exit(f"speed.py: error: {text!r} is not SCRIPT:NAME=COMMAND with a SCRIPT of {', '.join(scripts)}")
    return script, name, shlex.split(command)


def time_rounds(args: Args, shape: str) -> dict[tuple[str, str], list[dict]]:
    """What each (script, mode) answered in each round at one shape."""
    sizes = [str(n) for n in SHAPES[shape]]
    modes = ["eager"] + ["graph"] * torch.cuda.is_available() + ["compiled"] * args.compile
    own = [sys.executable, str(Path(__file__))]
    variants = [(script, "", []) for script in args.scripts] + [parse_peer(v, args.scripts) for v in args.variant]
    commands = {
        (script, f"{mode} {name}".strip()): [*own, "--work", script, mode, *sizes, *flags]
        for script, name, flags in variants
        for mode in modes
    }
    peers = [parse_peer(peer, args.scripts) for peer in args.peer]
    commands |= {(script, name): [*words, *sizes] for script, name, words in peers}
    answers, processes = {key: [] for key in commands}, {}
    for key, words in commands.items():  # one after the other: warming up is work too
        processes[key] = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(args.threads)
        )
        if not json.loads(processes[key].stdout.readline() or "{}").get("ready"):
            sys.exit(f"speed.py: error: {shlex.join(words)} did not get ready")
    for _ in range(args.rounds):
        for key, process in processes.items():
            print(file=process.stdin, flush=True)
            answers[key].append(json.loads(process.stdout.readline()))
    for process in processes.values():
        process.stdin.close()
        process.wait()
    return answers


def time_runs(words: list[str], count: int, task: str, seconds: float, variables: dict, first: int = 50) -> list[float]:
    """Training steps per second of each of `count` runs of a script, all at once, from learning step `first` on."""
    same = ["--env-id", "benchmark.timed:Timed-v0", "--learning-starts", "1000", "--total-timesteps", "1000000"]
    variables = variables | {"TIMED_ENV": task, "TIMED_FROM": str(1000 + first), "TIMED_SECONDS": str(seconds)}
    with tempfile.TemporaryDirectory() as folder:
        files, processes = [Path(folder, f"time{i}") for i in range(count)], []
        for i, file in enumerate(files):
            streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
            line, timing = [*words, *same, "--seed", str(i + 1)], variables | {"TIMED_FILE": str(file)}
            processes.append(subprocess.Popen(line, cwd=folder, env=timing, **streams))
        errors = [process.communicate()[1] for process in processes]
        for file, error in zip(files, errors, strict=True):
            if not file.exists():
                sys.exit(f"speed.py: error: {shlex.join(words)} was not timed: {error[-300:]}")
        pairs = [map(float, file.read_text().split()) for file in files]
        return [steps / seconds for steps, seconds in pairs]


def time_loops(args: Args, task: str) -> dict[tuple[str, str], list[float]]:
    """Training steps per second of each (script, mode) on one task, in each round."""
    modes = {"eager": ["--no-cuda-graph"], "graph": []} if torch.cuda.is_available() else {"eager": []}
    modes |= {"compiled": ["--compile", "--no-cuda-graph"]} if args.compile else {}
    own = ["--checkpoint-frequency", "0", "--eval-frequency", "0", "--buffer-size", "100000"]
    commands = {
        (script, mode): [sys.executable, str(ROOT / f"{script}.py"), *own, *flags]
        for script in args.scripts
        for mode, flags in modes.items()
    }
    commands |= {(script, name): words for script, name, words in (parse_peer(p, args.scripts) for p in args.loop_peer)}
    speeds = {key: [] for key in commands}
    for _ in range(args.loop_rounds):
        for key, words in commands.items():
            speeds[key] += time_runs(words, 1, task, args.loop_seconds, environment(args.threads))
    return speeds


def hardware() -> tuple[str, str]:
    """The names of the CPU and of the GPU, if there is one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    return cpu, torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


@cache
def commit() -> str:
    """What was checked out when the run began, with `-dirty` if it was changed; empty outside a repository."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return git.stdout.strip()


def machine(threads: int | None) -> str:
    """What the numbers were measured on, in words."""
    cpu, gpu = hardware()
    used = f" ({threads} threads used)" if threads else ""
    return (
        f"{cpu}, {os.cpu_count()} cores{used}, {gpu}, PyTorch {torch.__version__}, "
        f"commit {commit()}, {datetime.date.today()}"
    )


def main(args: Args) -> None:
    for peer in (*args.peer, *args.loop_peer, *args.variant):
        parse_peer(peer, args.scripts)
    commit()  # before the results, which may be tracked, are written
    rows = []  # (script, mode, place, quantity, median, lowest, highest)

    def add(key, place, quantity, values):
        rows.append((*key, place, quantity, statistics.median(values), min(values), max(values)))

    for shape in args.shapes:
        for key, answers in time_rounds(args, shape).items():
            if "steps" in answers[0]:
                add(key, shape, "steps", [a["steps"] for a in answers])
            add(key, shape, "ms per action", [1e3 * a["action"] for a in answers])
            if "best_action" in answers[0]:
                add(key, shape, "ms per evaluation action", [1e3 * a["best_action"] for a in answers])
            if "update" not in answers[0]:
                continue
            add(key, shape, "updates/s", [1 / a["update"] for a in answers])
            add(key, shape, "peak memory, MiB", [a["peak_memory"] / 2**20 for a in answers])
            if "floor" in answers[0]:
                add(key, shape, "share of the floor, %", [100 * a["floor"] / a["update"] for a in answers])
                if answers[0]["gpu_memory"]:
                    add(key, shape, "peak GPU memory, MiB", [a["gpu_memory"] / 2**20 for a in answers])
        report = write(args, rows)  # after each place: what is measured is kept if a later one fails
    for task in args.tasks:
        for key, speeds in time_loops(args, task).items():
            add(key, task, "training steps/s", speeds)
        report = write(args, rows)
    print(report)


def write(args: Args, rows) -> str:
    """The CSV, the table and the picture of what has been measured so far; returns the table."""
    with open(f"{args.out}.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["script", "mode", "place", "quantity", "median", "lowest", "highest"])
        writer.writerows((*row[:4], *(f"{x:.4g}" for x in row[4:])) for row in rows)
    report = f"{machine(args.threads)}; medians over {args.rounds} rounds ({args.loop_rounds} of the loop)\n\n"
    # A peer's command has the user's paths.
    words = [re.sub(r"(:[^=]+)=.*", r"\1=...", word) if "/" in word else word for word in sys.argv[1:]]
    report += f"`python benchmark/speed.py {shlex.join(words)}`\n\n" + table(rows)
    Path(f"{args.out}.md").write_text(report)
    draw(rows, f"{args.out}.png")
    return report


def table(rows) -> str:
    """Markdown: a line for each script, mode and place; a peer's column says how much faster than it the script is."""
    medians = {row[:4]: row[4] for row in rows}
    quantities = list(dict.fromkeys(row[3] for row in rows))
    lines = ["| script | mode | shape or task | " + " | ".join(quantities) + " |", "|-" * (3 + len(quantities)) + "|"]
    for script, mode, place in dict.fromkeys(row[:3] for row in rows):
        cells = [f"{medians[key]:.3g}" if (key := (script, mode, place, q)) in medians else "" for q in quantities]
        lines.append(f"| {script} | {mode} | {place} | " + " | ".join(cells) + " |")
    ratios = []
    for (script, mode, place, quantity), value in medians.items():
        if mode.split()[0] not in MODES and quantity in ("updates/s", "training steps/s"):
            for ours in MODES:
                if (script, ours, place, quantity) in medians:
                    ratio = medians[script, ours, place, quantity] / value
                    ratios.append(f"- {script} ({ours}), {place}: {ratio:.2f} x the {quantity} of {mode}")
        sac = medians.get(("sac_continuous", mode.split()[0], place, quantity))
        if quantity.startswith("ms") and sac and script != "sac_continuous":
            ratios.append(f"- {script} ({mode}), {place}: {value / sac:.2f} x the {quantity} of sac_continuous")
        if quantity == "training steps/s" and sac and script != "sac_continuous":
            ratios.append(f"- {script} ({mode}), {place}: {sac / value:.2f} x the training time of sac_continuous")
    return "\n".join([*lines, "", *ratios, ""])


def draw(rows, path: str) -> None:
    """Bars of updates and training steps per second, one panel per shape or task; lines for the rounds' range."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = [row for row in rows if row[3] in ("updates/s", "training steps/s")]
    panels = list(dict.fromkeys((row[2], row[3]) for row in drawn))
    figure, axes = plt.subplots(1, len(panels), figsize=(3 * len(panels), 3), layout="constrained", squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        bars = [row for row in drawn if row[2:4] == panel]
        names = [f"{row[0].removesuffix('_continuous').upper()} {row[1]}".replace(" ", "\n") for row in bars]
        spread = [[row[4] - row[5] for row in bars], [row[6] - row[4] for row in bars]]
        colors = ["#0072B2" if row[1].split()[0] in MODES else "#999999" for row in bars]
        axis.bar(names, [row[4] for row in bars], yerr=spread, color=colors)
        axis.set(title=f"{panel[0]}, {panel[1]}", yscale="log", ylim=(1, 3 * max(row[6] for row in bars)))
        axis.tick_params(labelsize=7)
        axis.minorticks_off()
        axis.title.set_fontsize(9)
        for name, row in zip(names, bars, strict=True):
            axis.annotate(f"{row[4]:.3g}", (name, 1.1 * row[6]), ha="center", va="bottom", fontsize=7)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    if "--work" in sys.argv:
        script, mode, obs_dim, action_dim, *flags = sys.argv[sys.argv.index("--work") + 1 :]
        work(script, mode, int(obs_dim), int(action_dim), flags)
    else:
        main(tyro.cli(Args))
