"""Runs that survive: kills, resume, stops, faulty environments, bad numbers, full disks, bad files and bad flags."""

import importlib
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.faulty import FAULTS
from tests.test_skeleton import ROOT, SCRIPTS, command_line, scalars

SMALL = "--batch-size 8 --learning-starts 40 --log-frequency 7 --eval-frequency 110 --eval-episodes 1"
SMALL_MFPO = "--policy-proposals 2 --gaussian-proposals 2"


def flags(script, env_id="Walk-v0", steps=400, every=40, *more):
    """A short run whose checkpoints fall on the ends of the 20-step episodes.

    On the CPU, where a resumed run is the same to the bit, and where each update calls what a test puts in its place.
    """
    small = SMALL.split() + (SMALL_MFPO.split() if script == "mfpo_continuous" else [])
    every = ["--checkpoint-frequency", str(every)]
    return ["--env-id", f"tests.faulty:{env_id}", "--total-timesteps", str(steps), "--no-cuda", *every, *small, *more]


def run_here(script, folder, line):
    """Train in this process, in `folder`."""
    module = importlib.import_module(script)
    os.chdir(folder)
    module.train(module.parse_args(line))


def start(script, folder, line):
    """Train in a process that another one, with everything already imported, forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faulty", *SCRIPTS])
    process = context.Process(target=run_here, args=(script, str(folder), line))
    process.start()
    return process


def only_run(folder):
    (run,) = (folder / "runs").iterdir()
    return run


def assert_equal_runs(first, second):
    """Same weights, optimisers and buffer to the bit, and the same TensorBoard rows, each once."""
    a, b = (torch.load(run / "checkpoint.pt", weights_only=True) for run in (first, second))

    def compare(x, y, where):
        assert type(x) is type(y), where
        if isinstance(x, dict):
            assert x.keys() == y.keys(), where
            for key in x:
                compare(x[key], y[key], f"{where}.{key}")
        elif isinstance(x, torch.Tensor):
            assert torch.equal(x, y), where
        elif isinstance(x, list):
            assert len(x) == len(y), where
            for i, pair in enumerate(zip(x, y, strict=True)):
                compare(*pair, f"{where}[{i}]")
        else:
            assert x == y, where

    compare(a, b, "checkpoint")
    first_rows, second_rows = scalars(first), scalars(second)
    first_rows.pop("charts/SPS"), second_rows.pop("charts/SPS")
    assert first_rows == second_rows
    for rows in first_rows.values():
        assert len({step for step, _ in rows}) == len(rows)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_killed_20_times_is_the_run_that_was_never_killed(script, tmp_path):
    """Kill -9 at random moments, every third one while a checkpoint is being written; then resume and compare."""
    line = [*flags(script, steps=1200, every=20), "--utd-ratio", "0.25"]
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    undisturbed.mkdir(), disturbed.mkdir()
    process = start(script, undisturbed, line)
    random.seed(script)
    in_writing = kills = 0
    while kills < 20:
        resumed = (disturbed / "runs").exists()
        again = ["--resume", f"runs/{only_run(disturbed).name}"] if resumed else line
        victim = start(script, disturbed, again)
        while not any((disturbed / "runs").glob("*")):
            time.sleep(0.001)
        checkpoint, partial = only_run(disturbed) / "checkpoint.pt", only_run(disturbed) / "checkpoint.tmp"
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
        while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before:  # at least one step forward
            assert victim.is_alive()
            time.sleep(0.0005)
        if kills % 3 == 0:
            while not partial.exists():
                assert victim.is_alive()
        else:
            time.sleep(random.uniform(0, 0.2))
        in_writing += partial.exists()
        victim.kill()
        victim.join()
        assert victim.exitcode == -signal.SIGKILL
        kills += 1
    assert in_writing >= 5
    last = start(script, disturbed, ["--resume", f"runs/{only_run(disturbed).name}"])
    last.join()
    process.join()
    assert last.exitcode == process.exitcode == 0
    assert_equal_runs(only_run(undisturbed), only_run(disturbed))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_stall_leaves_a_checkpoint_and_says_how_to_go_on(script, number, tmp_path):
    running = stalled(tmp_path, "Stall-v0", script=script)
    running.send_signal(number)
    out, err = running.communicate()
    assert running.returncode == 128 + number and "Traceback" not in err
    again = f"python {script}.py --resume runs/{only_run(tmp_path).name}"
    assert out.splitlines()[-1] == f"stopped at step 130; from step 130: {again}"
    done = command_line(script, tmp_path, *again.split()[2:], "--total-timesteps", "140")
    assert done.returncode == 0, done.stderr
    assert torch.load(only_run(tmp_path) / "checkpoint.pt", weights_only=True)["global_step"] == 140


def stalled(folder, *line, script="sac_continuous"):
    """A run that has come to the stall of its environment."""
    line = [sys.executable, str(ROOT / f"{script}.py"), *flags(script, *line)]
    running = subprocess.Popen(line, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while running.stdout.readline().strip() != "stalling":
        assert running.poll() is None
    return running


def test_a_signal_during_an_evaluation_stops_the_run_after_it_with_a_checkpoint(tmp_path):
    running = stalled(tmp_path, "StallInEvaluation-v0")
    running.terminate()
    out, _ = running.communicate()
    assert running.returncode == 143 and "stopped at step 220; from step 220: python" in out
    assert torch.load(only_run(tmp_path) / "checkpoint.pt", weights_only=True)["global_step"] == 220


def test_a_signal_in_the_last_evaluation_lets_the_run_finish(tmp_path):
    running = stalled(tmp_path, "StallInEvaluation-v0", 220, 40, "--save-model")
    running.terminate()
    out, _ = running.communicate()
    assert running.returncode == 0 and out.splitlines()[-1].startswith("The run's files are in")
    assert (only_run(tmp_path) / "model.pt").exists()


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once(second, tmp_path):
    running = stalled(tmp_path, "Stall-v0")
    before = time.time()
    running.send_signal(signal.SIGINT)
    while "once more" not in running.stdout.readline():
        assert running.poll() is None
    running.send_signal(second)
    assert running.wait() == -second and time.time() - before < 8  # the stall takes 10
    assert torch.load(only_run(tmp_path) / "checkpoint.pt", weights_only=True)["global_step"] == 120


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_environment_stops_the_run_with_one_line(script, fault, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script)
    line = flags(script, fault)
    with pytest.raises(SystemExit) as stop:
        module.train(module.parse_args(line))
    run = only_run(tmp_path)
    step, safe = (80, 80) if fault == "RaiseInReset-v0" else (130, 120)  # the reset of the seventh is a checkpoint's
    error = capsys.readouterr().out.splitlines()[-1]
    assert stop.value.code == 1
    assert error.startswith(f"error: {FAULTS[fault]}") and f"at step {step} (seed 1)" in error
    assert f"from step {safe}: python {script}.py --resume runs/{run.name}" in error
    evidence = torch.load(run / "fault.pt", weights_only=True)
    assert evidence["global_step"] == step and evidence["obs"].shape == evidence["actions"].shape == (1, 3)
    assert torch.load(run / "checkpoint.pt", weights_only=True)["global_step"] == safe


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_non_finite_loss_stops_the_run_before_it_trains_on(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script)
    update, updates = module.Agent.update, []

    def poisoned(self, *batch, **options):
        updates.append(0)
        if len(updates) == 50:
            with torch.no_grad():
                next(self.qf1.parameters()).fill_(float("nan"))
        return update(self, *batch, **options)

    monkeypatch.setattr(module.Agent, "update", poisoned)
    with pytest.raises(SystemExit) as stop:
        module.train(module.parse_args(flags(script)))
    assert stop.value.code == 1 and len(updates) == 50
    assert "error: losses/qf1_values is nan, at step 90 (seed 1)" in capsys.readouterr().out
    saved = torch.load(only_run(tmp_path) / "checkpoint.pt", weights_only=True)
    assert saved["global_step"] == 80 and all(x.isfinite().all() for x in saved["agent"].values())
    assert len(torch.load(only_run(tmp_path) / "fault.pt", weights_only=True)["batch"]) == 5


def test_a_checkpoint_with_weights_that_are_no_numbers_is_not_written(tmp_path, monkeypatch, capsys):
    """The loss of the step that spoils the weights is still finite; the checkpoint of step 80 must stay the last."""
    import sac_continuous as module

    monkeypatch.chdir(tmp_path)
    update, updates = module.Agent.update, []

    def spoiling(self, *batch, **options):
        metrics = update(self, *batch, **options)
        updates.append(0)
        if len(updates) == 80:  # at step 120, where a checkpoint is due
            with torch.no_grad():
                next(self.actor.parameters())[0, 0] = float("inf")
        return metrics

    monkeypatch.setattr(module.Agent, "update", spoiling)
    with pytest.raises(SystemExit) as stop:
        module.train(module.parse_args(flags("sac_continuous")))
    assert stop.value.code == 1
    assert "error: a network's weight is not finite, at step 120 (seed 1)" in capsys.readouterr().out
    assert torch.load(only_run(tmp_path) / "checkpoint.pt", weights_only=True)["global_step"] == 80


def test_a_full_disk_costs_no_checkpoint_and_does_not_end_the_run(tmp_path):
    """A limit on the size of files stands for the disk: the buffer's growth passes it, and TensorBoard's file too."""
    line = flags("sac_continuous", "Walk-v0", 2000, 20)
    free = command_line("sac_continuous", tmp_path, *line[:2], "--total-timesteps", "60", *line[4:])
    assert free.returncode == 0
    size = (only_run(tmp_path) / "checkpoint.pt").stat().st_size

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20_000, size + 20_000))

    (tmp_path / "full").mkdir()
    line = [sys.executable, str(ROOT / "sac_continuous.py"), *line]
    done = subprocess.run(line, cwd=tmp_path / "full", preexec_fn=limit, capture_output=True, text=True)
    run = only_run(tmp_path / "full")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert f"warning: runs/{run.name}/checkpoint.pt was not written" in done.stdout
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    assert 60 < saved["global_step"] < 2000 and not (run / "checkpoint.tmp").exists()


def test_a_checkpoint_waits_for_the_end_of_all_episodes_but_not_for_ever(tmp_path, monkeypatch):
    """One begins new episodes, so with many environments and a step count for all they would never come to an end."""
    import sac_continuous as module

    monkeypatch.chdir(tmp_path)
    written = []
    monkeypatch.setattr(module, "save_file", lambda content, path: written.append(content["global_step"]) or True)
    for every, expected in ((30, [160, 320, 400]), (7, [56, 112, 168, 224, 280, 336, 392, 400])):
        module.train(module.parse_args(flags("sac_continuous", "Walk-v0", 400, every, "--num-envs", "4")))
        assert written == expected  # episodes have 20 steps; in the end there is one in any case
        written.clear()


def test_a_dead_tensorboard_writer_is_reported_once(tmp_path, monkeypatch, capsys):
    import sac_continuous as module

    monkeypatch.chdir(tmp_path)
    calls = []

    def no_space(self, name, value, step):
        calls.append(step)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.SummaryWriter, "add_scalar", no_space)
    module.train(module.parse_args(flags("sac_continuous", steps=200)))
    out = capsys.readouterr().out
    assert len(calls) > 10 and out.count("warning: TensorBoard cannot write ([Errno 28] No space left") == 1


class Malice:
    def __reduce__(self):
        return (os.mkdir, ("harm",))


def test_bad_checkpoints_are_refused_in_one_line(tmp_path, monkeypatch, capsys):
    import sac_continuous as module

    monkeypatch.chdir(tmp_path)
    module.train(module.parse_args(flags("sac_continuous", steps=100)))
    path = only_run(tmp_path) / "checkpoint.pt"
    good = path.read_bytes()
    saved = torch.load(path, weights_only=True)
    middle = len(good) // 2

    def written(content):
        torch.save(content, path)
        return path.read_bytes()

    bad = {
        "truncated": good[:middle],
        "empty": b"",
        "corrupted": good[:middle] + bytes(x ^ 255 for x in good[middle : middle + 64]) + good[middle + 64 :],
        "text": b"hello",
        "pickle": written({"script": Malice(), "args": {}}),
        "foreign": written({"model": torch.zeros(3)}),
        "list": written([1, 2]),
        "other script": written(saved | {"script": "mfpo_continuous"}),
        "other version": written(saved | {"args": saved["args"] | {"new_flag": 1}}),
        "other network": written(saved | {"agent": {"a": torch.zeros(3)}}),
        "no buffer": written({name: value for name, value in saved.items() if name != "buffer"}),
    }
    capsys.readouterr()
    for name, content in bad.items():
        path.write_bytes(content)
        with pytest.raises(SystemExit) as stop:
            module.train(module.parse_args(["--resume", str(path.parent), "--total-timesteps", "200"]))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and str(path) in error, (name, error)
    assert not Path("harm").exists()
    path.write_bytes(good)
    module.train(module.parse_args(["--resume", str(path.parent), "--total-timesteps", "200"]))


def test_what_contradicts_a_checkpoint_is_named_with_both_values(tmp_path, monkeypatch, capsys):
    import sac_continuous as module

    monkeypatch.chdir(tmp_path)
    module.train(module.parse_args(flags("sac_continuous", steps=100)))
    run = str(only_run(tmp_path))
    for more, message in (
        (["--seed", "2"], "--seed 2 contradicts the run's 1"),
        (["--env-id", "Hopper-v4"], "--env-id Hopper-v4 contradicts the run's tests.faulty:Walk-v0"),
        (["--no-autotune"], "--autotune False contradicts the run's True"),
        (["--total-timesteps", "100"], "--total-timesteps 100: the run already has 100 steps"),
        ([], "--total-timesteps 100: the run already has 100 steps"),
    ):
        with pytest.raises(SystemExit) as stop:
            module.train(module.parse_args(["--resume", run, *more]))
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_runs_of_the_same_second_do_not_share_a_folder(tmp_path, monkeypatch):
    import sac_continuous as module

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module.time, "time", lambda: 1000.0 + time.perf_counter() % 0.5)
    for _ in range(3):
        module.train(module.parse_args(flags("sac_continuous", steps=60)))
    assert len(list(Path("runs").iterdir())) == 3


BAD_LINES = """
--env-id Hoper-v4 | did you mean Hopper-v4
--env-id no_such_module:Hopper-v4 | no_such_module
--env-id CartPole-v1 | Discrete
--env-id FrozenLake-v1 | Discrete
--env-id Hopper-v99 | Hopper-v99
--env-id Hopper-v2 | did you mean Hopper-v5
--env-id tests.faulty:Broken-v0 | cannot be made (AttributeError: the simulator has changed)
--env-id = | --env-id = cannot be made
--total-timesteps 0 | --total-timesteps is 0
--total-timesteps -5 | --total-timesteps is -5
--total-timesteps 1.5 | Error parsing --total-timesteps
--total-timesteps 2 --num-envs 3 | --total-timesteps 2 is below --num-envs 3
--num-envs 0 | --num-envs is 0
--num-envs two | Error parsing --num-envs
--buffer-size 0 | --buffer-size is 0
--buffer-size -1 | --buffer-size is -1
--buffer-size 1000000000000 | would fit
--buffer-size 300 --num-envs 200 | --buffer-size 300 is too small for --num-envs 200
--batch-size 512 --buffer-size 300 | --buffer-size 300 is below --batch-size 512
--batch-size 0 | --batch-size is 0
--learning-starts 10 | --learning-starts 10 is below --batch-size 256
--learning-starts -1 | --learning-starts is -1
--learning-starts 256 --num-envs 300 | --learning-starts 256 is below --num-envs 300
--gamma 1.5 | --gamma is 1.5
--gamma 1 | --gamma is 1.0
--gamma -0.1 | --gamma is -0.1
--gamma nan | --gamma is nan
--gamma high | Error parsing --gamma
--tau 0 | --tau is 0
--tau 2 | --tau is 2
--tau nan | --tau is nan
--utd-ratio 0 | --utd-ratio is 0
--utd-ratio nan | --utd-ratio is nan
--utd-ratio inf | --utd-ratio is inf
--alpha -1 | --alpha is -1
--alpha 0 | --alpha is 0
--alpha inf | --alpha is inf
--alpha 1e-40 | --alpha is 1e-40
--seed -1 | --seed is -1
--seed | Missing value
--seed x | Error parsing --seed
--eval-frequency -1 | --eval-frequency is -1
--eval-episodes 0 | --eval-episodes is 0
--log-frequency 0 | --log-frequency is 0
--checkpoint-frequency -1 | --checkpoint-frequency is -1
--evaluate missing.pt | --evaluate: missing.pt
--evaluate . | --evaluate: .
--resume missing | --resume: missing/checkpoint.pt
--resume . | --resume: checkpoint.pt
--track | wandb
--no-such-flag | --no-such-flag
extra | extra
--sed 3 | Perhaps you meant
--exp-name a/b | --exp-name is a/b
"""

OWN_BAD_LINES = {
    "sac_continuous": """
--policy-lr 0 | --policy-lr is 0
--q-lr inf | --q-lr is inf
""",
    "mfpo_continuous": """
--sampling-steps 0 | --sampling-steps is 0
--policy-proposals 0 | --policy-proposals is 0
--gaussian-proposals 0 | --gaussian-proposals is 0
--divergence-probes 0 | --divergence-probes is 0
--eval-candidates 0 | --eval-candidates is 0
--num-atoms 1 | --num-atoms is 1
--learning-rate nan | --learning-rate is nan
--data-proportion 1 | for plain flow matching: --no-meanflow
--rho nan | --rho is nan
--v-max inf | --v-max is inf
--v-min 5 --v-max 1 | --v-min 5.0 must be below --v-max 1.0
--critic-init-std 0 | --critic-init-std is 0
--critic-init-std 1e-18 | --critic-init-std is 1e-18
--critic-init-std inf | --critic-init-std is inf
--likelihood none | add --no-autotune
--proposals none | Invalid choice
""",
    "smfp_continuous": """
--latents 0 | --latents is 0
--behavior-candidates 0 | --behavior-candidates is 0
--target-candidates 6 --latents 5 | --target-candidates 6 is above --latents 5
--critic-width 0 | --critic-width is 0
--q-lr 0 | --q-lr is 0
--kl-coef -1 | --kl-coef is -1
--meanflow-coef inf | --meanflow-coef is inf
--policy-tau 0 | --policy-tau is 0
--data-proportion 1.1 | --data-proportion is 1.1
""",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_bad_command_lines(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    module = importlib.import_module(script)
    lines = BAD_LINES.strip().splitlines() + OWN_BAD_LINES[script].strip().splitlines()
    cases = [line.rsplit(" | ", 1) for line in lines]
    assert len(cases) >= 50
    for line, message in cases:
        with pytest.raises(SystemExit) as stop:
            module.train(module.parse_args(line.split()))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error and "Traceback" not in error, (line, error)
        reported_by_tyro = "For full helptext" in error  # in a box of a few lines, with the flags that come near
        assert error.count("\n") == 1 or reported_by_tyro, (line, error)
    assert list(tmp_path.iterdir()) == []


def test_without_a_compiler_a_run_cannot_be_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = command_line("mfpo_continuous", tmp_path, "--compile", "--env-id", "Pendulum-v1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []
    assert "--compile: PyTorch finds no working C++ compiler" in done.stderr and "no-such-compiler" in done.stderr
