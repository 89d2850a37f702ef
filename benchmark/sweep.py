"""Scripts x tasks x seeds on one machine or many: each run is a Ray task, and if it dies goes on from its checkpoint.

    python benchmark/sweep.py --scripts sac_continuous smfp_continuous --env-ids Hopper-v4 Ant-v4 --seeds 1 2 3
    python benchmark/sweep.py --env-ids Hopper-v4 --seeds 1 2 3 --gpus-per-run 0.1 \\
        --scripts "smfp: smfp_continuous" "smfp_M1: smfp_continuous --latents 1" -- --total-timesteps 50_000

What --scripts lists are scripts or variants of them, `name: script --flag value`; the name becomes the --exp-name. What
follows `--` goes to every run. A run writes to <runs-dir>/<env>__<name>__<seed>__<time>/ as ever; what it prints is in
<runs-dir>/.sweep/<env>__<name>__<seed>.log.

Ctrl-C and SIGTERM stop every run with a checkpoint. The same command then goes on: complete runs are skipped, others
resumed, whoever started them (so sweep over no run that is being trained by hand), and what an attempt has left that
came to no checkpoint is removed. A run that dies of a signal or with its machine is tried again; one that ends with
exit code 1 (environment, numbers) or 2 (flags) is not, for it would do the same. The sweep's own exit code is 0 when
all runs are complete, 1 when some failed, 2 on bad input, 130 or 143 when it was stopped.

On a cluster, add `--address auto`. This folder, the Python environment and --runs-dir must be on a file system that its
machines share, for any of them may resume a run. In a SLURM script with `--ntasks-per-node=1 --exclusive`:

    export RAY_process_group_cleanup_enabled=1 RAY_USAGE_STATS_ENABLED=0
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    srun ray symmetric-run --address "$head:6379" --min-nodes "$SLURM_NNODES" -- \\
        python benchmark/sweep.py --address auto --scripts ...

Needs `pip install ray==2.60.0` beside requirements.txt.
"""

import fcntl
import importlib
import itertools
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

# No telemetry; and if a worker dies, Ray kills its process group, in which the run is.
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_process_group_cleanup_enabled": "1"}
import ray
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@dataclass
class Args:
    scripts: list[str]
    """what to run: scripts, or variants of them as `name: script --flag value`"""
    env_ids: list[str]
    """the tasks, as Gymnasium ids"""
    seeds: list[int]
    """the seeds of each script on each task"""
    flags: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """after `--`: flags for all runs; a variant's own win over them"""
    runs_dir: Path = Path("runs")
    """where the runs' folders are"""
    cpus_per_run: int = 1
    """CPUs of a run, and its number of threads"""
    gpus_per_run: float | None = None
    """share of a GPU that a run takes; if not given 0.1, or 0 where there is no GPU"""
    num_cpus: int | None = None
    """how many CPUs of this machine to use, without `address`; if not given all"""
    pin: bool = True
    """on Linux, pin each run to CPUs of its own; not for containers that share a machine's CPUs"""
    retries: int = 2
    """how often a run that died is tried again"""
    address: str = "local"
    """`auto`, or host:port, to use a Ray cluster that is up already"""


@dataclass
class Run:
    name: str  # <env>__<exp_name>__<seed>: the folder's name up to the time
    script: str
    line: list[str]
    args: dict  # what the script makes of the line
    runs_dir: Path
    log: Path
    log_start: int  # bytes that earlier sweeps have left in the log
    state: str = "waiting"
    step: int = 0  # of the last evaluation, or of the checkpoint that the sweep began with if that is later
    since: float = 0.0  # when this process saw that evaluation
    speed: float = 0.0  # steps per second between the last two evaluations

    def ends_at(self, step: int) -> bool:
        """Whether a checkpoint of this step is the last one."""
        return step + self.args["num_envs"] > self.args["total_timesteps"]

    def folders(self) -> list[Path]:
        """The folders of this name, oldest first."""
        pattern = re.compile(re.escape(self.name) + r"__\d+")
        return sorted(path for path in self.runs_dir.glob("*") if pattern.fullmatch(path.name))

    def checkpoint(self) -> Path | None:
        """The newest one."""
        return next((path for folder in self.folders()[::-1] if (path := folder / "checkpoint.pt").exists()), None)


def fail(message: str) -> None:
    """Report a mistake of the user's in one line and exit with code 2, before any run is started."""
    print(f"{Path(__file__).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def plan(args: Args) -> list[Run]:
    """All runs, seed by seed. What the scripts would refuse they refuse here, in their own words."""
    for name, least in (("cpus_per_run", 1), ("gpus_per_run", 0), ("num_cpus", 1), ("retries", 0)):
        value = getattr(args, name)
        if value is not None and not value >= least:
            fail(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    scripts = sorted(path.stem for path in ROOT.glob("*_continuous.py"))
    runs, runs_dir = {}, args.runs_dir.resolve()
    for seed, env_id, entry in itertools.product(args.seeds, args.env_ids, args.scripts):
        name, colon, rest = entry.partition(": ")
        try:
            script, *flags = shlex.split(rest if colon else entry)
        except ValueError:  # nothing there, or a quotation mark without its other half
            fail(f"--scripts {entry!r} cannot be read; write a script's name or `name: script --flag value`")
        if script not in scripts:
            fail(f"--scripts {entry!r}: there is no script {script}; there are {', '.join(scripts)}")
        name = name if colon else script
        line = ["--env-id", env_id, "--exp-name", name, "--seed", str(seed), *args.flags, *flags]
        module = importlib.import_module(script)
        parsed = module.parse_args(line, module.Args())  # with defaults that are given it reads no saved run
        ours = (parsed.env_id, parsed.exp_name, parsed.seed, parsed.evaluate, parsed.resume)
        if ours != (env_id, name, seed, None, None):
            fail(f"--scripts {entry!r}: leave --env-id, --exp-name, --seed, --evaluate and --resume to the sweep")
        if (seed, entry) == (args.seeds[0], args.scripts[0]):
            module.make_env(env_id).close()
        name = re.sub("[/:]", "-", f"{env_id}__{name}__{seed}")
        if name in runs:
            fail(f"--scripts {entry!r}: {name} is there twice; name variants apart, `name: script --flag value`")
        log = runs_dir / ".sweep" / f"{name}.log"
        log_start = log.stat().st_size if log.exists() else 0
        runs[name] = Run(name, script, line, vars(parsed), runs_dir, log, log_start)
    if not runs:
        fail("--scripts, --env-ids and --seeds must each have a value")
    return list(runs.values())


def checkpoint_step(run: Run) -> int:
    """The step of the run's checkpoint, or the one before if its evaluation is left; 0 without a checkpoint.

    Exits if it was made under other flags than the sweep's.
    """
    path = run.checkpoint()
    if path is None:
        return 0
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # reads no tensor
    except Exception as error:  # whatever is wrong with the file, it is the user's to replace
        fail(f"{path} cannot be read ({str(error).splitlines()[0]}); move its folder away")
    before, now = saved["args"], run.args
    for name in sorted((before.keys() | now.keys()) - {"resume", "total_timesteps"}):
        if before.get(name) != now.get(name):
            fail(f"{path} has {name} {before.get(name)}, not {now.get(name)}; give the variant a name of its own")
    return saved["global_step"] - saved.get("unscored", False) * before["num_envs"]


def start_ray(args: Args) -> float:
    """Start Ray or join a cluster; returns the share of a GPU that a run takes. Exits if a run fits on no machine."""
    local = {"num_cpus": args.num_cpus, "include_dashboard": False, "object_store_memory": 10**8}
    options = {"log_to_driver": False, "logging_level": "error"} | (local if args.address == "local" else {})
    try:
        if ":" in args.address:  # ray.init would wait for ever for what does not answer
            host, _, port = args.address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(args.address, **options)
    except (OSError, ValueError) as error:
        fail(f"--address {args.address}: {str(error).splitlines()[0]}")
    cpus, gpus = (max(node["Resources"].get(name, 0) for node in ray.nodes()) for name in ("CPU", "GPU"))
    share = min(0.1, gpus) if args.gpus_per_run is None else args.gpus_per_run
    if args.cpus_per_run > cpus or share > gpus:
        asked = f"--cpus-per-run {args.cpus_per_run} --gpus-per-run {share}"
        fail(f"{asked}: no machine has more than {cpus:g} CPUs and {gpus:g} GPUs; lower them")
    return share


def claim_cpus(count: int) -> dict[int, socket.socket]:
    """CPUs that no run of any sweep on this machine has; none if there are too few.

    A name in Linux's abstract socket namespace is the claim: the kernel drops it with the process, however that ends.
    """
    claims = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0meanflow-rl-sweep-cpu-{cpu}")
        except OSError:  # another run has it
            continue
        claims[cpu] = claim
        if len(claims) == count:
            return claims
    return {}


def train(run: Run, cpus: int, pin: bool) -> int:
    """The Ray task: start the run, or resume it if it has a checkpoint, and return its exit code.

    Ray repeats it when it raises or its worker is lost. The worker's process group is its own, so that the terminal's
    Ctrl-C does not reach the run.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # for ray.cancel, where a shell's & has Ctrl-C ignored
    with open(run.log, "a") as log, tempfile.TemporaryDirectory() as directory:
        fcntl.flock(log, fcntl.LOCK_EX)  # the run's process holds it too: two attempts are never at work at once
        checkpoint = run.checkpoint()
        if checkpoint is None and log.tell():  # attempts of ours that came to nothing
            for folder in run.folders():
                shutil.rmtree(folder)
        resume = ["--resume", str(checkpoint.parent)] if checkpoint else []
        line = [sys.executable, str(ROOT / f"{run.script}.py"), *run.line, *resume]
        print("$", shlex.join(line), file=log, flush=True)
        Path(directory, "runs").symlink_to(run.runs_dir)  # the script writes to ./runs
        threads = {"OMP_NUM_THREADS": str(cpus), "MKL_NUM_THREADS": str(cpus), "PYTHONUNBUFFERED": "1"}
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(line, cwd=directory, env=os.environ | threads, **streams)
        claims = claim_cpus(cpus) if pin and sys.platform == "linux" else {}
        if claims:
            os.sched_setaffinity(process.pid, claims)  # of its only thread yet; all others will inherit it
        try:
            while process.poll() is None:
                time.sleep(0.2)
        except KeyboardInterrupt:  # how ray.cancel arrives
            process.terminate()
            process.wait()
    if process.returncode not in (0, 1, 2):
        raise RuntimeError(f"exit code {process.returncode}")
    return process.returncode


def show(runs: list[Run], shown: list[str]) -> list[str]:
    """Draw the table on a terminal, elsewhere print the rows that are not in `shown`; returns all rows.

    Speed and return are as of the last evaluation, and so is the step, once it is past the checkpoint at the start.
    """
    rows, width = [], max(len(run.name) for run in runs)
    for run in sorted(runs, key=lambda run: run.state in ("waiting", "complete")):  # these go where there is no room
        text = ""
        if run.log.exists():
            with open(run.log, "rb") as log:
                log.seek(max(run.log_start, run.log.stat().st_size - 10_000))
                text = log.read().decode(errors="replace")
        if text and run.state == "waiting":
            run.state = "running"
        step, last_return = (re.findall(r"step (\d+): eval return (\S+)", text) or [(0, "-")])[-1]
        if int(step) > run.step:
            now = time.time()
            run.speed = (int(step) - run.step) / (now - run.since) if run.since else 0.0
            run.step, run.since = int(step), now
        progress = f"step {run.step}/{run.args['total_timesteps']}  {run.speed:.0f} steps/s  return {last_return}"
        rows.append(f"{run.name:{width}}  {run.state:8}  {progress}")
    if sys.stdout.isatty():
        print("\x1b[H\x1b[J", *rows[: shutil.get_terminal_size().lines - 3], sep="\n", flush=True)
    else:
        print("".join(f"{row}\n" for row in rows if row not in shown), end="", flush=True)
    return rows


def main(args: Args) -> None:
    """Plan, hand the runs to Ray, wait, and say what became of them."""
    runs = plan(args)
    for run in runs:
        run.step = checkpoint_step(run)
    todo = [run for run in runs if not run.ends_at(run.step)]
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them complete already", flush=True)
    if not todo:
        return
    share = start_ray(args)
    signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
    todo[0].log.parent.mkdir(parents=True, exist_ok=True)
    options = {"num_cpus": args.cpus_per_run, "num_gpus": share, "max_retries": args.retries, "retry_exceptions": True}
    task = ray.remote(**options)(train)
    tasks = {task.options(name=run.name).remote(run, args.cpus_per_run, args.pin): run for run in todo}
    stopping, shown = False, show(todo, [])
    while tasks and len(signals) < 2:  # the second one stops at once: Ray kills its workers, and with them the runs
        ready, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=1)
        for ref in ready:
            run = tasks.pop(ref)
            try:
                end = f"exit code {ray.get(ref)}"
            except ray.exceptions.RayError as error:  # it died once too often, or was cancelled
                end = (str(error) or repr(error)).splitlines()[-1]
            # A run that was killed after its last checkpoint is complete.
            done = end == "exit code 0" or run.ends_at(checkpoint_step(run))
            run.state = "complete" if done else "stopped" if signals else f"failed with {end}, see {run.log}"
        shown = show(todo, shown)
        if signals and not stopping:
            print("stopping with checkpoints; once more to stop at once", flush=True)
            for ref in tasks:
                ray.cancel(ref)
            stopping = True
    ray.shutdown()
    missing = sum(run.state != "complete" for run in todo)
    print(f"{len(runs) - missing} of {len(runs)} runs are complete")
    if missing:
        print(f"to go on: {shlex.join(['python', *sys.argv])}")
        sys.exit(128 + signals[0] if signals else 1)


if __name__ == "__main__":
    main(tyro.cli(Args))
