"""Runs that survive: kills, resume, stops, faulty environments, bad numbers, full disks, bad files and bad flags."""

import fcntl
import importlib
import importlib.util
import os
import pty
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sac_continuous as sac
from tests.faulty import BOXES, FAULTS, NOT_FINITE, Single
from tests.program import ROOT, SCRIPTS, Program, run_program
from tests.test_skeleton import scalars

SMALL = "--batch-size 8 --learning-starts 40 --log-frequency 7 --eval-frequency 110 --eval-episodes 1"
SMALL_MFPO = "--policy-proposals 2 --gaussian-proposals 2"


def flags(script="sac_continuous", env_id="Walk-v0", steps=400, every=40, *more):
    """A short run whose checkpoints fall on the ends of the 20-step episodes.

    On the CPU, where a resumed run is the same to the bit, and where each update calls what a test puts in its place.
    """
    small = SMALL.split() + (SMALL_MFPO.split() if script == "mfpo_continuous" else [])
    every = ["--checkpoint-frequency", str(every)]
    return ["--env-id", f"tests.faulty:{env_id}", "--total-timesteps", str(steps), "--no-cuda", *every, *small, *more]


@pytest.fixture(autouse=True)
def warnings_are_said_again():
    for script in SCRIPTS:
        importlib.import_module(script).warn.cache_clear()


def only_run(folder):
    (run,) = (folder / "runs").iterdir()
    return run


def checkpoint(folder):
    return torch.load(only_run(folder) / "checkpoint.pt", weights_only=True)


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


@pytest.mark.parametrize(("script", "kills"), [("sac_continuous", 3), ("smfp_continuous", 1), ("mfpo_continuous", 1)])
def test_a_run_killed_again_and_again_is_the_run_that_was_never_killed(script, kills, tmp_path):
    """Kill -9 at random moments, every third one while a checkpoint is being written; then resume and compare."""
    line = [*flags(script, steps=60 * kills, every=20), "--utd-ratio", "0.25"]
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    undisturbed.mkdir(), disturbed.mkdir()
    process = Program(script, undisturbed, *line)
    random.seed(script)
    in_writing = 0
    for kill in range(kills):
        resumed = (disturbed / "runs").exists()
        again = ["--resume", f"runs/{only_run(disturbed).name}"] if resumed else line
        victim = Program(script, disturbed, *again)
        while not any((disturbed / "runs").glob("*")):
            time.sleep(0.001)
        whole, partial = only_run(disturbed) / "checkpoint.pt", only_run(disturbed) / "checkpoint.tmp"
        before = whole.stat().st_mtime_ns if whole.exists() else None
        while not whole.exists() or whole.stat().st_mtime_ns == before:  # at least one step forward
            assert victim.is_alive()
            time.sleep(0.0005)
        if kill % 3 == 0:
            while not partial.exists():
                assert victim.is_alive()
        else:
            time.sleep(random.uniform(0, 0.2))
        in_writing += partial.exists()
        victim.kill()
        victim.join()
        assert victim.exitcode == -signal.SIGKILL
    assert in_writing >= kills // 4
    last = Program(script, disturbed, "--resume", f"runs/{only_run(disturbed).name}")
    last.join()
    process.join()
    assert last.exitcode == process.exitcode == 0
    assert_equal_runs(only_run(undisturbed), only_run(disturbed))


# Stops


def stalled(folder, *line, before=None):
    """A run that has come to the stall of its environment."""
    running = Program("sac_continuous", folder, *flags("sac_continuous", *line), before=before)
    while running.stdout.readline().strip() != "stalling":
        assert running.is_alive()
    return running


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_a_stall_leaves_a_checkpoint_and_says_how_to_go_on(number, tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    running = stalled(folder, "Stall-v0")
    running.send_signal(number)
    out, err = running.communicate()
    assert running.exitcode == 128 + number and "Traceback" not in err
    said, again = out.splitlines()[-1].split("; from step 130: ")
    assert said == "stopped at step 130"
    if number == signal.SIGINT:
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        shell = {"shell": True, "cwd": folder, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run(f"{again} --total-timesteps 140", **shell)
        assert done.returncode == 0, done.stderr
        assert checkpoint(folder)["global_step"] == 140


def test_nohup_lets_a_run_go_on_when_its_terminal_is_closed(tmp_path):
    running = stalled(tmp_path, "Stall-v0", 200, before=partial(signal.signal, signal.SIGHUP, signal.SIG_IGN))
    running.send_signal(signal.SIGHUP)
    out, _ = running.communicate()
    assert running.exitcode == 0 and out.splitlines()[-1].startswith("Done; the run's files are in")


def test_a_signal_during_an_evaluation_stops_it_and_leaves_a_checkpoint(tmp_path):
    running = stalled(tmp_path, "StallInEvaluation-v0")
    running.terminate()
    out, _ = running.communicate()
    assert running.exitcode == 143 and "stopped at step 220; from step 220: python" in out
    assert out.count("the evaluation was stopped; a resumed run begins with it") == 1
    assert checkpoint(tmp_path)["global_step"] == 220


@pytest.mark.parametrize("env_id", ["StallInEvaluation-v0", "StallInExploring-v0"])
def test_a_resumed_run_makes_up_for_the_last_evaluation_that_a_signal_stopped(env_id, tmp_path):
    line = flags("sac_continuous", env_id, 220, 40, "--save-model")
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    undisturbed.mkdir(), disturbed.mkdir()
    running = stalled(disturbed, env_id, 220, 40, "--save-model")
    running.terminate()
    out, _ = running.communicate()
    assert running.exitcode == 143 and out.splitlines()[-1].startswith("stopped at step 220; from step 220: python")
    done = run_program("sac_continuous", disturbed, "--resume", f"runs/{only_run(disturbed).name}")
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("Done; the run's files are in")
    assert (only_run(disturbed) / "model.pt").exists()
    assert run_program("sac_continuous", undisturbed, *line).returncode == 0
    assert_equal_runs(only_run(undisturbed), only_run(disturbed))
    assert [step for step, _ in scalars(only_run(disturbed))["eval_exploring/episodic_return"]] == [110, 220]


def test_a_resumed_run_makes_up_for_the_last_evaluation_if_an_exception_came_before_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="the simulator lost its mind"):  # the seventh reset ends the last episode
        sac.train(sac.parse_args(flags(env_id="RaiseInReset-v0", steps=120, every=0)))
    assert checkpoint(tmp_path)["global_step"] == 120 and checkpoint(tmp_path)["unscored"]
    assert sac.train(sac.parse_args(["--resume", f"runs/{only_run(tmp_path).name}"])) == 0
    for tag in ("eval", "eval_exploring"):
        assert [step for step, _ in scalars(only_run(tmp_path))[f"{tag}/episodic_return"]] == [110, 120]


def test_no_step_is_made_before_an_evaluation_that_is_left(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    evaluate = sac.evaluate
    monkeypatch.setattr(sac, "evaluate", lambda *inputs: os.kill(os.getpid(), signal.SIGINT))  # it returns None
    assert sac.train(sac.parse_args(flags())) == 128 + signal.SIGINT
    again = ["--resume", f"runs/{only_run(tmp_path).name}"]
    for _ in range(2):
        assert checkpoint(tmp_path)["global_step"] == 110 and checkpoint(tmp_path)["unscored"]
        assert sac.train(sac.parse_args(again)) == 128 + signal.SIGINT
    assert sac.train(sac.parse_args([*again, "--total-timesteps", "120", "--eval-frequency", "0"])) == 0
    assert not checkpoint(tmp_path)["unscored"]
    monkeypatch.setattr(sac, "evaluate", evaluate)
    assert sac.train(sac.parse_args([*again, "--total-timesteps", "125", "--eval-frequency", "110"])) == 0
    assert [step for step, _ in scalars(only_run(tmp_path))["eval/episodic_return"]] == [125]  # the last step's
    capsys.readouterr()
    assert sac.train(sac.parse_args(again)) == 0
    assert "no step is left; for more, raise --total-timesteps 125" in capsys.readouterr().out


def test_a_resumed_run_logs_its_new_flags_and_no_loss_that_it_no_longer_has(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sac.train(sac.parse_args(flags(steps=80)))
    again = ["--resume", f"runs/{only_run(tmp_path).name}", "--no-autotune", "--total-timesteps", "120"]
    capsys.readouterr()
    sac.train(sac.parse_args(again))
    assert "Training on cpu from step 80 on; the run's files are in" in capsys.readouterr().out
    rows = scalars(only_run(tmp_path))
    assert {step > 80 for step, _ in rows["losses/alpha_loss"]} == {False}
    assert {step > 80 for step, _ in rows["losses/alpha"]} == {False, True}
    events = EventAccumulator(str(only_run(tmp_path))).Reload().Tensors("hyperparameters/text_summary")
    tables = {event.step: event.tensor_proto.string_val[0].decode() for event in events}
    assert tables.keys() == {0, 80}
    assert "|autotune|True|" in tables[0] and "|autotune|False|" in tables[80]


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once(second, tmp_path):
    running = stalled(tmp_path, "Stall-v0")
    before = time.time()
    running.send_signal(signal.SIGINT)
    while "once more" not in running.stdout.readline():
        assert running.is_alive()
    running.send_signal(second)
    running.join()
    assert running.exitcode == 128 + second and time.time() - before < 3  # the stall takes 4
    assert checkpoint(tmp_path)["global_step"] == 120


def test_two_processes_cannot_train_one_run(tmp_path):
    running = stalled(tmp_path, "Stall-v0")
    second = run_program("sac_continuous", tmp_path, "--resume", f"runs/{only_run(tmp_path).name}")
    running.kill()
    running.communicate()
    assert second.returncode == 2 and second.stderr.count("\n") == 1, second.stderr
    assert "another process is training it" in second.stderr


# Environments


def test_an_environment_that_reuses_its_array_and_its_info_is_stored_as_one_that_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = []
    for env_id in ("Walk-v0", "Reusing-v0"):
        (tmp_path / env_id).mkdir()
        monkeypatch.chdir(tmp_path / env_id)
        sac.train(sac.parse_args(flags(env_id=env_id)))
        saved.append(checkpoint(tmp_path / env_id)["buffer"])
    for name, ring in saved[0].items():
        assert np.array_equal(ring, saved[1][name]), name
    episodes = saved[0]["obs"][:, 0].reshape(-1, 20, 3)
    assert not (episodes[1:, 0] == saved[0]["next_obs"][:, 0].reshape(-1, 20, 3)[:-1, -1]).any()  # not the final one


@pytest.mark.parametrize("fault", FAULTS)
def test_an_exception_is_passed_on_after_a_checkpoint_of_the_last_whole_step(fault, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    updates = counted_updates(monkeypatch)
    with pytest.raises(Exception) as raised:
        sac.train(sac.parse_args(flags(env_id=fault)))
    assert f"{type(raised.value).__name__}: {raised.value}".startswith(FAULTS[fault])
    step = 80 if fault == "RaiseInReset-v0" else 129  # the reset of the seventh is a checkpoint's
    saved = checkpoint(tmp_path)
    assert saved["global_step"] == saved["buffer"]["added"] == step
    (note,) = raised.value.__notes__
    said, again = note.split(f"; from step {step}: python {os.path.relpath(ROOT)}/sac_continuous.py ")
    assert said == f"after step {step} (seed 1)"
    sac.train(sac.parse_args([*again.split(), "--total-timesteps", "140"]))
    assert checkpoint(tmp_path)["num_updates"] == len(updates) == 100  # those of the failed step were done before it


def counted_updates(monkeypatch):
    """A list that grows by one with each update of SAC."""
    updates, update = [], sac.Agent.update
    monkeypatch.setattr(sac.Agent, "update", lambda *inputs, **flags: (updates.append(1), update(*inputs, **flags))[1])
    return updates


def test_a_run_that_is_resumed_before_its_first_update_makes_all_of_them(tmp_path, monkeypatch):
    """Without random steps, those of the first step are owed until there is something to learn from."""
    monkeypatch.chdir(tmp_path)
    updates = counted_updates(monkeypatch)
    line = ["--env-id", "Pendulum-v1", "--num-envs", "2", "--learning-starts", "0", "--eval-frequency", "0"]
    sac.train(sac.parse_args([*line, "--total-timesteps", "2"]))
    assert not updates
    sac.train(sac.parse_args(["--resume", f"runs/{only_run(tmp_path).name}", "--total-timesteps", "6"]))
    assert checkpoint(tmp_path)["num_updates"] == len(updates) == 6


def test_an_exception_is_shown_with_its_traceback_and_below_it_how_to_go_on(tmp_path):
    done = run_program("sac_continuous", tmp_path, *flags(env_id="RaiseInStep-v0"))
    assert done.returncode == 1 and "Traceback (most recent call last)" in done.stderr
    assert 'raise RuntimeError("the simulator lost its mind' in done.stderr  # the line of the environment
    assert done.stderr.splitlines()[-1].startswith("after step 129 (seed 1); from step 129: python ")


@pytest.mark.parametrize(
    ("script", "fault"),
    [*(("sac_continuous", fault) for fault in NOT_FINITE), *((script, "NanReward-v0") for script in SCRIPTS[1:])],
)
def test_a_number_that_is_not_finite_leaves_the_last_checkpoint_alone(script, fault, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script)
    with pytest.raises(FloatingPointError) as raised, warnings.catch_warnings(action="ignore"):
        module.train(module.parse_args(flags(script, fault)))
    assert f"FloatingPointError: {raised.value}".startswith(NOT_FINITE[fault])
    assert raised.value.__notes__[0].startswith("after step 129 (seed 1); from step 120: python ")
    assert raised.value.__notes__[0].endswith(" (with the same flags and seed it will likely happen again)")
    assert checkpoint(tmp_path)["global_step"] == 120


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_non_finite_loss_stops_the_run_before_it_trains_on(script, tmp_path, monkeypatch):
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
    with pytest.raises(FloatingPointError, match="losses/qf1_values is nan") as raised:
        module.train(module.parse_args(flags(script)))
    assert len(updates) == 50 and raised.value.__notes__[0].startswith("after step 90 (seed 1); from step 80")
    saved = checkpoint(tmp_path)
    assert saved["global_step"] == 80 and all(x.isfinite().all() for x in saved["agent"].values())


def test_a_checkpoint_with_weights_that_are_no_numbers_is_not_written(tmp_path, monkeypatch):
    """The loss of the step that spoils the weights is still finite; the checkpoint of step 80 must stay the last."""
    monkeypatch.chdir(tmp_path)
    update, updates = sac.Agent.update, []

    def spoiling(self, *batch, **options):
        metrics = update(self, *batch, **options)
        updates.append(0)
        if len(updates) == 80:  # at step 120, where a checkpoint is due
            with torch.no_grad():
                next(self.actor.parameters())[0, 0] = float("inf")
        return metrics

    monkeypatch.setattr(sac.Agent, "update", spoiling)
    with pytest.raises(FloatingPointError, match="a network's weight is not finite"):
        sac.train(sac.parse_args(flags()))
    assert checkpoint(tmp_path)["global_step"] == 80


def test_no_action_that_is_not_finite_reaches_the_environment():
    class Untouched:
        def step(self, action):
            raise AssertionError

    with pytest.raises(FloatingPointError, match="the policy's action is"):
        sac.step(Untouched(), np.array([0.0, np.nan]))


@pytest.mark.parametrize("env_id", BOXES)
def test_action_spaces_that_cannot_be_rescaled_are_refused(env_id, capsys):
    with pytest.raises(SystemExit) as stop:
        sac.make_env(f"tests.faulty:{env_id}")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert f"--env-id tests.faulty:{env_id}: its actions are Box(" in error


def test_an_environment_that_can_be_made_once_is_trained_on_without_evaluation_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Single.made = 0
    with pytest.raises(SystemExit) as stop:
        sac.train(sac.parse_args(flags(env_id="Single-v0")))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "there is one robot" in error
    assert list(tmp_path.iterdir()) == []
    Single.made = 0
    sac.train(sac.parse_args([*flags(env_id="Single-v0", steps=60), "--eval-frequency", "0"]))


def test_an_exception_where_an_environment_is_made_is_shown_before_anything_is_written(tmp_path):
    done = run_program("sac_continuous", tmp_path, *flags(env_id="Broken-v0"))
    assert done.returncode == 1 and list(tmp_path.iterdir()) == []
    assert "in broken" in done.stderr and "AttributeError: the simulator has changed" in done.stderr


def test_what_is_learned_is_saved_before_environments_are_closed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="cannot be closed"):
        sac.train(sac.parse_args([*flags(env_id="BadClose-v0", steps=60), "--save-model"]))
    assert (only_run(tmp_path) / "model.pt").exists() and checkpoint(tmp_path)["global_step"] == 60


def test_evaluations_of_episodes_that_never_end_are_cut_and_checkpoints_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sac.train(sac.parse_args([*flags(env_id="Endless-v0", steps=250), "--eval-max-steps", "30"]))
    out = capsys.readouterr().out
    assert out.count("had not ended after 30 steps and was cut (see --eval-max-steps)") == 1
    assert out.count("a checkpoint cut an episode after 80 steps; a higher --checkpoint-frequency lets it end") == 1
    assert "step 220: eval return" in out and checkpoint(tmp_path)["global_step"] == 250


def test_a_checkpoint_waits_for_the_end_of_all_episodes_but_not_for_ever(tmp_path, monkeypatch, capsys):
    """One begins new episodes, so with many environments and a step count for all they would never come to an end."""
    monkeypatch.chdir(tmp_path)
    written = []
    monkeypatch.setattr(sac, "write_file", lambda path, content: written.append(content()["global_step"]) or True)
    for every, expected in ((30, [160, 320, 400]), (7, [56, 112, 168, 224, 280, 336, 392, 400])):
        sac.train(sac.parse_args(flags("sac_continuous", "Walk-v0", 400, every, "--num-envs", "4")))
        assert written == expected  # episodes have 20 steps; in the end there is one in any case
        written.clear()
        shutil.rmtree("runs")
        assert ("a checkpoint cut an episode after 14 steps" in capsys.readouterr().out) == (every == 7)


# Disk, memory, output


def test_a_full_disk_costs_no_checkpoint_and_does_not_end_the_run(tmp_path):
    """A limit on the size of files stands for the disk: the buffer's growth passes it, and TensorBoard's file too."""
    line = flags("sac_continuous", "Walk-v0", 400, 20)
    free = run_program("sac_continuous", tmp_path, *line[:2], "--total-timesteps", "60", *line[4:])
    assert free.returncode == 0
    size = (only_run(tmp_path) / "checkpoint.pt").stat().st_size

    (tmp_path / "full").mkdir()
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size + 8_000, size + 8_000))
    done = run_program("sac_continuous", tmp_path / "full", *line, before=limit)
    run = only_run(tmp_path / "full")
    assert done.returncode == 1 and done.stderr == ""
    assert f"warning: runs/{run.name}/checkpoint.pt was not written" in done.stdout
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    assert 60 < saved["global_step"] < 400 and not (run / "checkpoint.tmp").exists()
    said = f"the last files are missing; from step {saved['global_step']}: python "
    assert done.stdout.splitlines()[-1].startswith(said)


def test_a_checkpoint_does_not_copy_the_buffer_and_survives_where_memory_runs_out(tmp_path, monkeypatch, capsys):
    buffer = sac.ReplayBuffer(1000, 1, 3, 2, torch.device("cpu"))
    for i in range(10):
        row = np.full((1, 1), i, np.float32)
        obs, actions = row.repeat(3, 1), row.repeat(2, 1)
        buffer.add(obs=obs, actions=actions, rewards=row[0], terminations=row[0], next_obs=obs)
    for name, rows in buffer.state_dict().items():
        if name != "added":
            assert len(rows) == 10 and rows.data_ptr() == buffer.rings[name].data_ptr()
            assert rows.untyped_storage().nbytes() == rows.numel() * 4  # what torch.save writes
    monkeypatch.chdir(tmp_path)
    state_dict, calls = sac.ReplayBuffer.state_dict, []

    def full(self):
        calls.append(0)
        if len(calls) == 2:
            raise MemoryError
        return state_dict(self)

    monkeypatch.setattr(sac.ReplayBuffer, "state_dict", full)
    sac.train(sac.parse_args(flags(steps=120)))
    assert "checkpoint.pt was not written (MemoryError" in capsys.readouterr().out
    assert len(calls) == 3 and checkpoint(tmp_path)["global_step"] == 120


def test_a_dead_tensorboard_writer_is_reported_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    calls = []

    def no_space(self, name, value, step):
        calls.append(step)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sac.SummaryWriter, "add_scalar", no_space)
    sac.train(sac.parse_args(flags(steps=200)))
    out = capsys.readouterr().out
    assert len(calls) > 10 and out.count("warning: TensorBoard cannot write ([Errno 28] No space left") == 1


def test_lines_appear_at_once_and_a_reader_that_goes_away_ends_nothing(tmp_path):
    line = [sys.executable, str(ROOT / "sac_continuous.py"), *flags(steps=400), "--eval-frequency", "60"]
    running = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert running.stdout.readline().startswith("Training on cpu; the run's files are in runs/")
    assert running.stdout.readline().startswith("step 60: eval return")
    assert running.poll() is None and not (only_run(tmp_path) / "model.pt").exists()  # it is under way
    running.stdout.close()
    assert running.wait() == 0 and checkpoint(tmp_path)["global_step"] == 400


def close(*numbers):
    for number in numbers:
        os.close(number)


@pytest.mark.parametrize("numbers", [(1,), (1, 2)])
def test_a_run_that_is_started_without_an_output_goes_on(numbers, tmp_path):
    """As by `python script >&- 2>&-`: Python then has None for sys.stdout."""
    line = [sys.executable, str(ROOT / "sac_continuous.py"), *flags(steps=60)]
    assert subprocess.run(line, cwd=tmp_path, preexec_fn=partial(close, *numbers)).returncode == 0
    assert checkpoint(tmp_path)["global_step"] == 60


def test_a_full_disk_under_the_log_ends_nothing(tmp_path):
    with open("/dev/full", "w") as full:
        line = [sys.executable, str(ROOT / "sac_continuous.py"), *flags(steps=120)]
        done = subprocess.run(line, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and checkpoint(tmp_path)["global_step"] == 120, done.stderr


def test_a_terminal_that_is_closed_stops_the_run_with_a_checkpoint(tmp_path):
    ours, its = pty.openpty()
    line = [sys.executable, str(ROOT / "sac_continuous.py"), *flags(env_id="Stall-v0")]
    running = subprocess.Popen(line, cwd=tmp_path, stdin=its, stdout=its, stderr=its, preexec_fn=os.setsid)
    os.close(its)
    seen = b""
    while b"stalling\r\n" not in seen:
        seen += os.read(ours, 10_000)
    os.close(ours)
    running.send_signal(signal.SIGHUP)
    assert running.wait() == 128 + signal.SIGHUP and checkpoint(tmp_path)["global_step"] == 130


# Files


class Malice:
    def __reduce__(self):
        return (os.mkdir, ("harm",))


def test_bad_checkpoints_are_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sac.train(sac.parse_args(flags(steps=100)))
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
        "unknown flag": written(saved | {"args": saved["args"] | {"new_flag": 1}}),
        "other task": written(saved | {"args": saved["args"] | {"env_id": "Hopper-v4"}}),
        "other network": written(saved | {"agent": {"a": torch.zeros(3)}}),
        "no weights": written({name: value for name, value in saved.items() if name != "agent"}),
        "no buffer": written({name: value for name, value in saved.items() if name != "buffer"}),
    }
    capsys.readouterr()
    for name, content in bad.items():
        path.write_bytes(content)
        for flag, file in (("--resume", path.parent), ("--evaluate", path)):
            if flag == "--evaluate" and name == "no buffer":
                continue
            with pytest.raises(SystemExit) as stop:
                args = sac.parse_args([flag, str(file), "--total-timesteps", "200", "--eval-episodes", "1"])
                (sac.train if flag == "--resume" else sac.evaluate_saved)(args)
            error = capsys.readouterr().err
            assert stop.value.code == 2 and error.count("\n") == 1 and str(path.parent) in error, (name, error)
            assert len(error) < 600
    assert not Path("harm").exists()
    path.write_bytes(good)
    sac.train(sac.parse_args(["--resume", str(path.parent), "--total-timesteps", "200"]))


def test_a_saved_run_survives_a_new_flag_and_a_new_name(tmp_path, monkeypatch, capsys):
    """A copy of the script with one more flag plays the weights of the original, and goes on with its run."""
    monkeypatch.chdir(tmp_path)
    sac.train(sac.parse_args([*flags(steps=60), "--save-model"]))
    flag = '    new_flag: int = 3\n    """something new"""\n    utd_ratio: float = 1.0'
    Path("variant.py").write_text((ROOT / "sac_continuous.py").read_text().replace("    utd_ratio: float = 1.0", flag))
    monkeypatch.syspath_prepend(tmp_path)
    variant = importlib.import_module("variant")
    run = f"runs/{only_run(tmp_path).name}"
    variant.evaluate_saved(variant.parse_args(["--evaluate", f"{run}/model.pt", "--eval-episodes", "1"]))
    variant.train(variant.parse_args(["--resume", run, "--total-timesteps", "80"]))
    out = capsys.readouterr().out
    assert out.count(f"warning: {run}/model.pt was made without new_flag: the defaults are taken") == 1
    assert out.count(f"warning: {run}/checkpoint.pt was made without new_flag: the defaults are taken") == 1
    assert checkpoint(tmp_path)["args"]["new_flag"] == 3 and checkpoint(tmp_path)["global_step"] == 80


def test_a_run_goes_on_with_its_own_flags_where_no_others_are_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sac.train(sac.parse_args([*flags(steps=60), "--tau", "0.1"]))
    sac.train(sac.parse_args(["--resume", f"runs/{only_run(tmp_path).name}", "--total-timesteps", "80"]))
    saved = checkpoint(tmp_path)
    assert saved["global_step"] == 80 and saved["args"]["tau"] == 0.1 and saved["args"]["batch_size"] == 8
    sac.train(sac.parse_args(["--resume", f"runs/{only_run(tmp_path).name}", "--gamma", "0.5"]))  # it is complete
    assert checkpoint(tmp_path)["args"]["gamma"] == 0.99
    more = ["--total-timesteps", "100", "--q-lr", "0.5", "--utd-ratio", "0.5", "--buffer-size", "2000000"]
    sac.train(sac.parse_args(["--resume", f"runs/{only_run(tmp_path).name}", *more]))
    saved = checkpoint(tmp_path)
    assert saved["optimizers"]["q_optimizer"]["param_groups"][0]["lr"] == 0.5
    assert saved["num_updates"] == 30 and saved["buffer"]["added"] == len(saved["buffer"]["obs"]) == 100


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_temperature_that_is_fixed_in_a_resumed_run_is_the_flags(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script)
    module.train(module.parse_args(flags(script, steps=50)))
    again = ["--resume", f"runs/{only_run(tmp_path).name}", "--total-timesteps", "60", "--no-autotune"]
    module.train(module.parse_args([*again, "--alpha", "0.05"]))
    assert checkpoint(tmp_path)["agent"]["log_alpha"].exp().item() == pytest.approx(0.05)


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_resumed_run_saves_can_be_evaluated_and_resumed(script, tmp_path, monkeypatch, capsys):
    """Also a model.pt that names the run which it was resumed from, as older versions wrote it."""
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script)
    module.train(module.parse_args(flags(script, steps=45)))
    run = f"runs/{only_run(tmp_path).name}"
    module.train(module.parse_args(["--resume", run, "--total-timesteps", "50", "--save-model"]))
    saved = torch.load(f"{run}/model.pt")
    assert saved["args"]["resume"] is None
    torch.save(saved | {"args": saved["args"] | {"resume": run}}, f"{run}/older.pt")
    capsys.readouterr()
    for name in ("model.pt", "older.pt", "checkpoint.pt"):
        module.evaluate_saved(module.parse_args(["--evaluate", f"{run}/{name}", "--eval-episodes", "1"]))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[:2] == lines[2:4] == lines[4:]  # the same weights in all three
    module.train(module.parse_args(["--resume", run, "--total-timesteps", "55"]))
    assert checkpoint(tmp_path)["global_step"] == 55


@pytest.mark.parametrize("script", SCRIPTS)
def test_critics_of_another_kind_and_another_task_do_not_take_up_what_was_learned(
    script, tmp_path, monkeypatch, capsys
):
    """C51's critics and quantiles have the same shapes."""
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script)
    module.train(module.parse_args([*flags(script, steps=45), "--save-model"]))
    run = only_run(tmp_path)
    other = {"sac_continuous": "crossq", "smfp_continuous": "sac", "mfpo_continuous": "quantile"}[script]
    for saved in (["--resume", f"runs/{run.name}"], ["--evaluate", f"runs/{run.name}/model.pt"]):
        with pytest.raises(SystemExit) as stop:
            module.parse_args([*saved, "--critic", other])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and f"error: --critic {other}: the critics" in error
    with pytest.raises(SystemExit) as stop:
        module.parse_args(["--resume", f"runs/{run.name}", "--env-id", "tests.faulty:Long-v0"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "trains on tests.faulty:Walk-v0" in error


def test_a_run_that_will_learn_nothing_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for steps, warned in ((40, True), (41, False)):
        sac.parse_args([*flags(), "--learning-starts", "40", "--total-timesteps", str(steps)])
        assert ("warning: --total-timesteps 40 is not above --learning-starts" in capsys.readouterr().out) == warned


def test_a_resumed_run_has_the_support_that_it_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mfpo = importlib.import_module("mfpo_continuous")
    mfpo.train(mfpo.parse_args(flags("mfpo_continuous", steps=45)))
    atoms, update = [], mfpo.Agent.update

    def spy(self, *batch, **options):
        atoms.append(self.atoms)
        return update(self, *batch, **options)

    monkeypatch.setattr(mfpo.Agent, "update", spy)
    again = ["--resume", f"runs/{only_run(tmp_path).name}", "--total-timesteps", "50", "--v-min", "-8", "--v-max", "2"]
    mfpo.train(mfpo.parse_args(again))
    assert len(atoms) == 5 and torch.equal(atoms[-1], torch.linspace(-8, 2, 101))


def test_an_evaluation_takes_the_runs_flags_where_no_others_are_given(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    smfp = importlib.import_module("smfp_continuous")
    smfp.train(smfp.parse_args([*flags("smfp_continuous", steps=50), "--save-model", "--eval-candidates", "3"]))
    model, seen = f"{only_run(tmp_path)}/model.pt", []
    monkeypatch.setattr(smfp.Agent, "best_of", lambda self, obs, y: seen.append(y.shape[1]) or y[:, :1])
    for more, candidates, episodes in (((), 3, 1), (("--eval-candidates", "7", "--eval-episodes", "2"), 7, 2)):
        seen.clear()
        args = smfp.parse_args(["--evaluate", model, *more])
        assert args.env_id == "tests.faulty:Walk-v0" and not args.track
        smfp.evaluate_saved(args)
        assert set(seen) == {candidates, 1} and f"({episodes} episodes)" in capsys.readouterr().out


def test_a_buffer_of_another_shape_is_refused():
    """What it would read instead are zeros, or one environment's transitions as those of two."""
    state = {}
    for num_envs, size in ((1, 4), (1, 8), (2, 8)):
        buffer = sac.ReplayBuffer(size, num_envs, 3, 2, torch.device("cpu"))
        if state:
            with pytest.raises(ValueError, match="another --buffer-size or --num-envs"):
                buffer.load_state_dict(state)
            continue
        for _ in range(6):
            buffer.add(**{name: np.zeros(ring.shape[1:]) for name, ring in buffer.rings.items()})
        state = buffer.state_dict()


def test_what_is_in_the_way_of_the_folder_is_said_before_anything_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def error_of(line):
        with pytest.raises(SystemExit) as stop:
            sac.train(sac.parse_args(line))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1
        return error

    assert "--exp-name is too long" in error_of([*flags(), "--exp-name", 300 * "x"])
    assert list(tmp_path.iterdir()) == []
    runs = Path("runs")
    runs.symlink_to("nowhere")
    assert "the run's folder cannot be made: FileExistsError" in error_of(flags())
    runs.unlink()
    runs.write_text("")
    assert "the run's folder cannot be made: NotADirectoryError" in error_of(flags())
    runs.unlink()
    monkeypatch.setattr(sac.time, "time", lambda: 1000.0)
    sac.train(sac.parse_args(flags(steps=60)))
    assert "FileExistsError" in error_of(flags())  # two of the same name in one second


def test_weights_and_biases_without_a_key_is_said_before_anything_is_made(tmp_path, monkeypatch, capsys):
    class FakeWandb:
        def login(self):
            raise RuntimeError("api_key not configured (no-tty)")

    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    monkeypatch.setattr(sac, "find_spec", lambda name: True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        sac.train(sac.parse_args([*flags(), "--track"]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "api_key not configured" in error
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_another_process_trains_is_not_taken_up_in_weights_and_biases(tmp_path, monkeypatch, capsys):
    calls = []
    wandb = SimpleNamespace(login=lambda: None, init=lambda **settings: calls.append(settings))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(sac, "find_spec", lambda name: True)
    monkeypatch.chdir(tmp_path)
    sac.train(sac.parse_args([*flags(steps=60), "--track"]))
    assert [settings["id"] for settings in calls] == [only_run(tmp_path).name]
    lock = os.open(only_run(tmp_path), os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        sac.train(sac.parse_args(["--resume", f"runs/{only_run(tmp_path).name}", "--total-timesteps", "80"]))
    os.close(lock)
    assert "another process is training it" in capsys.readouterr().err and len(calls) == 1


def test_a_run_that_weights_and_biases_refuses_leaves_no_folder(tmp_path, monkeypatch, capsys):
    class FakeWandb:
        def login(self):
            pass

        def init(self, **settings):
            raise RuntimeError(f"entity {settings['entity']} not found")

    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    monkeypatch.setattr(sac, "find_spec", lambda name: True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        sac.train(sac.parse_args([*flags(), "--track", "--wandb-entity", "tpyo"]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "RuntimeError: entity tpyo not found" in error
    assert list(tmp_path.iterdir()) == []


BAD_LINES = """
--capture-video --eval-frequency 0 | which --eval-frequency 0 turns off
--env-id Hoper-v4 | Did you mean: `Hopper`?
--env-id no_such_module:Hopper-v4 | no_such_module
--env-id CartPole-v1 | its actions are Discrete
--env-id FrozenLake-v1 | its actions are Discrete
--env-id Hopper-v99 | --env-id Hopper-v99 cannot be made
--env-id Hopper-v2 | --env-id Hopper-v2 cannot be made
--env-id = | --env-id = cannot be made
--env-id :Hopper-v4 | it must be an id, or module:id
--env-id a:b:c | it must be an id, or module:id
--total-timesteps 0 | --total-timesteps is 0
--total-timesteps -5 | --total-timesteps is -5
--total-timesteps 1.5 | Error parsing --total-timesteps
--total-timesteps 2 --num-envs 3 | --total-timesteps 2 is below --num-envs 3
--num-envs 0 | --num-envs is 0
--num-envs two | Error parsing --num-envs
--buffer-size 0 | --buffer-size is 0
--buffer-size -1 | --buffer-size is -1
--buffer-size 1000000000000 | --buffer-size 1000000000000 does not fit
--batch-size 0 | --batch-size is 0
--learning-starts -1 | --learning-starts is -1
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
--seed 4294967296 | --seed is 4294967296
--seed | Missing value
--seed x | Error parsing --seed
--threads 0 | --threads is 0
--eval-frequency -1 | --eval-frequency is -1
--eval-episodes 0 | --eval-episodes is 0
--eval-max-steps 0 | --eval-max-steps is 0
--log-frequency 0 | --log-frequency is 0
--diagnostics-frequency -1 | --diagnostics-frequency is -1
--checkpoint-frequency -1 | --checkpoint-frequency is -1
--evaluate missing.pt | --evaluate missing.pt cannot be used: FileNotFoundError
--evaluate . | --evaluate . is a folder; name the model.pt or checkpoint.pt in it
--evaluate '' | --evaluate
--resume missing | --resume missing/checkpoint.pt cannot be used: FileNotFoundError
--resume . | --resume checkpoint.pt cannot be used: FileNotFoundError
--resume runs/a --evaluate b.pt | leave one of them out
--track | pip install wandb
--no-such-flag | --no-such-flag
extra | extra
--sed 3 | Perhaps you meant
"""

BAD_LINES += f"--resume {shlex.quote(__file__)} | is a file; name its folder, {Path(__file__).parent}\n"

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
--data-proportion 1 | --data-proportion is 1
--policy-tau 0 | --policy-tau is 0
--policy-tau 1.5 | --policy-tau is 1.5
--rho nan | --rho is nan
--v-max inf | --v-max is inf
--v-min -1e300 | --v-min is -1e+300
--v-min 5 --v-max 1 | --v-min must be below --v-max
--critic-init-std 0 | --critic-init-std is 0
--critic-init-std 1e-18 | --critic-init-std is 1e-18
--critic-init-std inf | --critic-init-std is inf
--critic-init-std 32 --critic quantile | --critic-init-std is for --critic c51; leave it out
--policy-batch-size 300 | --policy-batch-size is above --batch-size; lower it
--noised-actions 17 | --noised-actions is above --policy-proposals; lower it
--noised-actions 0 | --noised-actions is 0
--likelihood none | add --no-autotune
--proposals none | Invalid choice
--combination pooled --proposals gaussian | --combination pooled needs both proposals
--combination pooled --likelihood none --no-autotune | --combination pooled needs both proposals
""",
    "smfp_continuous": """
--latents 0 | --latents is 0
--behavior-candidates 0 | --behavior-candidates is 0
--target-candidates 6 --latents 5 | --target-candidates must not be above --latents
--critic-width 0 | --critic-width is 0
--q-lr 0 | --q-lr is 0
--kl-coef -1 | --kl-coef is -1
--meanflow-coef inf | --meanflow-coef is inf
--policy-tau 0 | --policy-tau is 0
--policy-tau 1.5 | --policy-tau is 1.5
--data-proportion 1.1 | --data-proportion is 1.1
""",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_bad_command_lines(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    monkeypatch.setattr(sac, "find_spec", lambda name: name == "moviepy" or importlib.util.find_spec(name))
    module = importlib.import_module(script)
    shared = BAD_LINES if script == "sac_continuous" else ""
    cases = [line.rsplit(" | ", 1) for line in (shared + OWN_BAD_LINES[script]).splitlines() if line]
    assert len(cases) == {"sac_continuous": 60, "mfpo_continuous": 25, "smfp_continuous": 10}[script]
    for line, message in cases:
        with pytest.raises(SystemExit) as stop:
            args = module.parse_args(shlex.split(line))
            (module.train if args.evaluate is None else module.evaluate_saved)(args)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error and "Traceback" not in error, (line, error)
        reported_by_tyro = "For full helptext" in error  # in a box of a few lines, with the flags that come near
        assert error.count("\n") == 1 or reported_by_tyro, (line, error)
    assert list(tmp_path.iterdir()) == []


def name_no_compiler():
    os.environ["CXX"] = "no-such-compiler"


def test_without_a_compiler_a_run_cannot_be_compiled(tmp_path):
    line = ["--compile", "--env-id", "Pendulum-v1"]
    done = run_program("sac_continuous", tmp_path, *line, before=name_no_compiler)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []
    assert "--compile needs a working C++ compiler" in done.stderr
