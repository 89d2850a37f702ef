"""The sweep: all runs and none twice, kills, stops, failures, bad input."""

import importlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import tyro

from tests.program import ROOT

ray = pytest.importorskip("ray")
module = importlib.import_module("benchmark.sweep")  # which needs Ray
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")

SMALL = "--batch-size 8 --learning-starts 40 --checkpoint-frequency 40 --eval-frequency 100 --eval-episodes 1"


def words(scripts, seeds, steps, env_id="tests.faulty:Walk-v0"):
    line = ["--scripts", *scripts, "--env-ids", env_id, "--seeds", *map(str, seeds), "--num-cpus", "2"]
    return [*line, "--", "--total-timesteps", str(steps), *SMALL.split()]


def start(folder, line):
    """A sweep in a process group of its own, as a terminal would start it."""
    line = [sys.executable, str(ROOT / "benchmark" / "sweep.py"), *line]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(line, cwd=folder, text=True, start_new_session=True, **streams)


def sweep(folder, line):
    process = start(folder, line)
    out, _ = process.communicate()
    return process.returncode, out


def names(folder):
    """What is in runs/, without the times."""
    return sorted(re.sub(r"__\d+x*$", "", path.name) for path in (folder / "runs").iterdir() if path.name != ".sweep")


def saved(folder, name):
    (run,) = (folder / "runs").glob(f"*__{name}__*")
    return torch.load(run / "checkpoint.pt", weights_only=True)


def processes(folder):
    """The runs that are being trained in this folder: process id by exp_name."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line = (path / "cmdline").read_text().split("\0")
            if "--exp-name" in line and (path / "cwd" / "runs").resolve() == folder / "runs":
                found[line[line.index("--exp-name") + 1]] = int(path.name)
        except OSError:  # it has ended
            pass
    return found


def wait_for_checkpoint(folder, process, name=r"\w+", but=()):
    """Wait until a run of this name, but none of these, has written its first one; returns its name and process."""
    while True:
        assert process.poll() is None, process.communicate()[0]
        for found, pid in processes(folder).items():
            written = list((folder / "runs").glob(f"*__{found}__*/checkpoint.pt"))
            if written and found not in but and re.fullmatch(name, found):
                return found, pid
        time.sleep(0.01)


def test_every_run_is_made_once_and_one_that_is_killed_is_resumed(tmp_path, monkeypatch, capsys):
    """It ends as the run that was not killed; the same command then finds nothing to do."""
    line = words(["killed: sac_continuous --tau 0.1", "undisturbed: sac_continuous --tau 0.1"], [1], 600)
    process = start(tmp_path, line)
    os.kill(wait_for_checkpoint(tmp_path, process, "killed")[1], signal.SIGKILL)
    out, _ = process.communicate()
    assert process.returncode == 0 and "2 of 2 runs are complete" in out, out
    expected = [f"tests.faulty-Walk-v0__{name}__1" for name in ("killed", "undisturbed")]
    assert names(tmp_path) == expected
    logs = [(tmp_path / "runs" / ".sweep" / f"{name}.log").read_text() for name in expected]
    for name, log in zip(expected, logs, strict=True):
        assert re.search(rf"{name} +running", out) and re.search(rf"{name} +complete +step 600/600", out), out
        assert "step 600: eval return" in log
    first, second = re.findall(r"^\$ .*", logs[0], re.MULTILINE)
    assert "--resume" not in first and "--resume" in second and logs[1].count("$ ") == 1
    killed, undisturbed = saved(tmp_path, "killed__1"), saved(tmp_path, "undisturbed__1")
    for checkpoint in (killed, undisturbed):
        assert checkpoint["global_step"] == 600
        assert (checkpoint["args"]["tau"], checkpoint["args"]["seed"]) == (0.1, 1)
    for key, value in undisturbed["agent"].items():
        assert torch.equal(killed["agent"][key], value), key

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.chdir(tmp_path)
    module.main(tyro.cli(module.Args, args=line))
    assert capsys.readouterr().out == "2 runs, 2 of them complete already\n"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    line[line.index("killed: sac_continuous --tau 0.1")] = "killed: sac_continuous --tau 0.2"
    with pytest.raises(SystemExit) as stop:
        module.main(tyro.cli(module.Args, args=line))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "has tau 0.1, not 0.2" in error and error.count("\n") == 1


def test_ctrl_c_stops_with_checkpoints_and_the_same_command_goes_on(tmp_path):
    line = words(["a: sac_continuous", "b: sac_continuous", "c: sac_continuous"], [1], 800)
    process = start(tmp_path, line)
    running = {}
    while len(running) < 2:
        name, pid = wait_for_checkpoint(tmp_path, process, but=running)
        running[name] = pid
        while saved(tmp_path, f"{name}__1")["global_step"] == 40:  # that of the first checkpoint
            time.sleep(0.01)
        os.kill(pid, signal.SIGSTOP)  # or it might be complete before the sweep is stopped
    assert processes(tmp_path) == running
    for pid in running.values():
        environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
        assert {"OMP_NUM_THREADS=1", "MKL_NUM_THREADS=1"} <= set(environment)
    cpus = [os.sched_getaffinity(pid) for pid in running.values()]
    assert cpus[0] != cpus[1] or cpus[0] == os.sched_getaffinity(0)  # other tests may have claimed them all
    os.killpg(process.pid, signal.SIGINT)  # to the whole group, as a terminal does
    for pid in running.values():
        while not is_pending(pid, signal.SIGTERM):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        os.kill(pid, signal.SIGCONT)
    out, _ = process.communicate()
    assert process.returncode == 130 and "0 of 3 runs are complete\nto go on: python" in out, out
    assert processes(tmp_path) == {}
    assert names(tmp_path) == [f"tests.faulty-Walk-v0__{name}__1" for name in sorted(running)]
    steps = {name: saved(tmp_path, f"{name}__1")["global_step"] for name in running}
    for name, step in steps.items():
        log = (tmp_path / "runs" / ".sweep" / f"tests.faulty-Walk-v0__{name}__1.log").read_text()
        assert 40 < step < 800 and f"stopped at step {step}; from step {step}" in log
    code, out = sweep(tmp_path, line)
    assert code == 0, out
    for name, step in steps.items():
        assert f"tests.faulty-Walk-v0__{name}__1  waiting   step {step}/800" in out, out
    assert [saved(tmp_path, f"{name}__1")["global_step"] for name in "abc"] == [800] * 3


def is_pending(pid, number):
    """Whether a signal waits for a process that is stopped."""
    (mask,) = re.findall(r"^ShdPnd:\s+(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(mask, 16) >> (number - 1) & 1


def test_a_run_whose_last_evaluation_was_stopped_is_not_complete(tmp_path):
    (tmp_path / "task__sac__1__5").mkdir()
    args = {"num_envs": 4, "total_timesteps": 102}
    run = module.Run("task__sac__1", "sac_continuous", [], args, tmp_path, tmp_path / "log", 0)
    for unscored in (False, True):
        content = {"args": args, "global_step": 100, "unscored": unscored}
        torch.save(content, tmp_path / "task__sac__1__5/checkpoint.pt")
        assert run.ends_at(module.checkpoint_step(run)) == (not unscored)


def test_no_two_runs_get_the_same_cpu(monkeypatch):
    cpus = {os.getpid() * 10 + i for i in range(3)}  # which no machine has
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cpus)
    one, two = module.claim_cpus(1), module.claim_cpus(2)
    assert one.keys() | two.keys() == cpus and len(one) == 1 and len(two) == 2
    assert module.claim_cpus(1) == {}
    del two
    assert module.claim_cpus(3) == {} and len(module.claim_cpus(2)) == 2


def test_a_run_that_reports_a_fault_is_not_tried_again(tmp_path):
    code, out = sweep(tmp_path, words(["sac_continuous"], [1], 200, "tests.faulty:NanReward-v0"))
    (log,) = (tmp_path / "runs" / ".sweep").iterdir()
    assert code == 1 and f"failed with exit code 1, see {log}" in out, out
    assert log.read_text().count("$ ") == 1


BAD = {
    "no_such_script": "there is no script no_such_script; there are mfpo_continuous, sac_continuous, smfp_continuous",
    "a: b: c": "there is no script b:",
    "a: ": "'a: ' cannot be read",
    "a: sac_continuous --exp-name 'b": "cannot be read",
    "sac_continuous --seed 7": "leave --env-id, --exp-name, --seed, --evaluate and --resume to the sweep",
    "sac_continuous --evaluate model.pt": "leave --env-id",
    "sac_continuous --tau 7": "--tau is 7.0; it must be between",
    "sac_continuous --latents 1": "Unrecognized options: --latents",
}


def test_bad_input_is_refused_before_anything_is_started(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    good = words(["sac_continuous"], [1], 200)
    cases = [(words([entry], [1], 200), message) for entry, message in BAD.items()]
    cases += [
        (words(["sac_continuous", "sac_continuous --tau 0.1"], [1], 200), "is there twice; name variants apart"),
        (words(["sac_continuous"], [1, 1], 200), "tests.faulty-Walk-v0__sac_continuous__1 is there twice"),
        (words(["sac_continuous"], [-1], 200), "--seed is -1"),
        (words(["sac_continuous"], [1], 200, "Hoper-v4"), "Did you mean: `Hopper`?"),
        (words([], [1], 200), "must each have a value"),
        (["--cpus-per-run", "0", *good], "--cpus-per-run is 0; it must be at least 1"),
        (["--retries", "-1", *good], "--retries is -1; it must be at least 0"),
        (["--gpus-per-run", "nan", *good], "--gpus-per-run is nan"),
        (["--address", "127.0.0.1:1", *good], "--address 127.0.0.1:1: [Errno 111]"),
        (["--address", "127.0.0.1:", *good], "--address 127.0.0.1:: invalid literal for int()"),
        (
            ["--cpus-per-run", "999", "--gpus-per-run", "0", *good],
            "no machine has more than 2 CPUs",
        ),
    ]
    for line, message in cases:
        with pytest.raises(SystemExit) as stop:
            module.main(tyro.cli(module.Args, args=line))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error, (line, error)
        assert error.count("\n") == 1 or "For full helptext" in error, (line, error)
    ray.shutdown()
    assert list(tmp_path.iterdir()) == []
