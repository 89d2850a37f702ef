"""Reports of invented runs whose numbers are known: resumes, pauses, stopped runs, the aggregate, the files."""

import csv
import time
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter

import mfpo_continuous
import sac_continuous

pytest.importorskip("rliable")
from rliable import metrics

from benchmark import report


def write_session(folder, start, rows, purge_step=None, args=None):
    """An event file as a run leaves it: `rows` are (seconds after `start`, tag, step, value); `args` on a first one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: start)  # of the file's name and of its first event
        writer = SummaryWriter(str(folder), purge_step=purge_step)
        if args:
            table = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
            writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
        for seconds, tag, step, value in rows:
            writer.add_scalar(f"{tag}/episodic_return", value, step, walltime=start + seconds)
            if tag != "charts":
                writer.add_scalar(f"{tag}/episodic_return_std", 0.5, step, walltime=start + seconds)
        writer.close()


def write_run(folder, task, name, seed, values, stopped=None, seconds=36, script=sac_continuous, **flags):
    """A run evaluated every 10,000 steps, each `seconds` long, with `values` for scores; to its end or to `stopped`."""
    steps = [10_000 * (i + 1) for i in range(len(values))]
    total = {"total_timesteps": 10_000 * len(values)} | flags
    args = script.Args(env_id=task, exp_name=name, seed=seed, eval_frequency=10_000, **total)
    rows = [
        (step / 10_000 * seconds, *row)
        for step, value in zip(steps, values, strict=True)
        for row in (
            ("charts", step - 5_000, value - 2),
            ("charts", step, value),
            ("eval", step, value),
            ("eval_exploring", step, value / 2),
        )
        if row[1] <= (stopped or step)
    ]
    run = folder / f"{task}__{name}__{seed}__1"
    write_session(run, 1e9, rows, args=args)
    if stopped:
        torch.save({"script": script.__name__, "args": vars(args), "global_step": stopped}, run / "checkpoint.pt")
    return run


def make(runs, out, **options):
    """The report's table as {(task, exp_name): cells}, its CSV's rows, and its whole text."""
    report.main(report.Args([*runs], out, **options))
    text = out.with_suffix(".md").read_text(encoding="utf-8")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert lines[0][:5] == ["task", "exp_name", "training return", "plain-sample evaluation", "best-of-N evaluation"]
    with open(out.with_suffix(".csv")) as file:
        return {(task, name): cells for task, name, *cells in lines[1:]}, list(csv.DictReader(file)), text


def test_a_resumed_run_has_each_row_once_and_no_hours_of_pauses_or_lost_work(tmp_path):
    """Checkpoints at steps 250 and 350; the work of steps 251 to 300 is lost in a kill and done again."""
    run = tmp_path / "run"
    args = sac_continuous.Args(env_id="Hopper-v4", eval_frequency=100, total_timesteps=400)
    first = [(9, "charts", 30, 1), (18, "charts", 100, 3), (36, "eval", 100, 10), (72, "eval", 200, 20)]
    first += [(81, "charts", 240, 5), (100, "charts", 260, 999), (108, "eval", 300, 999)]
    write_session(run, 1_000, first, args=args)
    (file,) = run.iterdir()
    file.write_bytes(file.read_bytes() + b"\x18\0\0\0\0\0\0\0half a row")  # killed while it wrote
    write_session(run, 9_000, [(2, "charts", 270, 7), (27, "eval", 300, 30)], purge_step=251)
    write_session(run, 50_000, [(36, "eval", 400, 40)], purge_step=351)  # with --total-timesteps 500
    vars(args)["total_timesteps"] = 500
    torch.save({"script": "sac_continuous", "args": vars(args), "global_step": 450}, run / "checkpoint.pt")
    _, rows, text = make([run], tmp_path / "report")
    found = [(row["metric"], int(row["step"]), float(row["value"]), row["std"], float(row["hours"])) for row in rows]
    assert found == [
        ("train", 100, 2.0, "", 18 / 3600),  # nothing ended in steps 101 to 200, nor in 301 to 400
        ("train", 300, 6.0, "", pytest.approx((81 + 2) / 3600, rel=1e-5)),
        ("eval", 100, 10.0, "0.5", 0.01),
        ("eval", 200, 20.0, "0.5", 0.02),
        ("eval", 300, 30.0, "0.5", 0.03),  # 81 s to the first file's last row that stayed, then 27 s
        ("eval", 400, 40.0, "0.5", 0.04),
    ]
    assert "- Incomplete: run, 450 of 500 steps" in text


def test_a_run_that_was_resumed_with_other_flags_says_so(tmp_path):
    args = sac_continuous.Args(env_id="Hopper-v4", eval_frequency=10, total_timesteps=20)
    later = replace(args, gamma=0.9, total_timesteps=30)
    write_session(tmp_path / "run", 0, [(1, "eval", 10, 1), (2, "eval", 20, 2)], args=args)
    write_session(tmp_path / "run", 100, [(1, "eval", 30, 3)], purge_step=21, args=later)
    torch.save({"args": vars(later), "global_step": 30}, tmp_path / "run/checkpoint.pt")
    _, _, text = make([tmp_path / "run"], tmp_path / "report")
    assert "- Changed: run was resumed with another gamma\n" in text and "Incomplete" not in text


def test_last_scores_at_the_last_step_that_all_seeds_have(tmp_path):
    """Seed 3 stopped at step 42,000; what the others did at 50,000, their best at 20,000, is not in the table."""
    values = [[1, 900, 30, 100, 500], [2, 900, 30, 200, 500], [3, 900, 30, 600, 500]]
    runs = [
        write_run(tmp_path, "Hopper-v4", "sac", seed + 1, values[seed], stopped=42_000 if seed == 2 else None)
        for seed in range(3)
    ]
    runs += [write_run(tmp_path, "Ant-v4", "mfpo", 1, [3, 4.5], script=mfpo_continuous)]
    table, rows, text = make(runs, tmp_path / "report")
    std = np.std([100, 200, 600], ddof=1)
    assert table["Hopper-v4", "sac"] == [
        f"299 ± {std:.0f}",
        f"150 ± {std / 2:.0f}",
        f"300 ± {std:.0f}",
        "40,000 of 50,000",
        "3",
    ]
    assert table["Ant-v4", "mfpo"] == ["3.50", "2.25", "4.50", "20,000", "1"]
    assert text.count("Incomplete") == 1 and "- Incomplete: Hopper-v4__sac__3__1, 42,000 of 50,000 steps" in text
    assert sorted({int(row["seed"]) for row in rows if row["step"] == "50000"}) == [1, 2]


def test_a_metric_that_ends_earlier_says_where_and_one_without_a_common_step_says_so(tmp_path):
    args = sac_continuous.Args(env_id="Hopper-v4", exp_name="sac", eval_frequency=10, total_timesteps=30)
    rows = [(1, "charts", 7, 5), (1, "eval", 10, 1), (2, "eval", 20, 2), (3, "eval", 30, 3)]
    write_session(tmp_path / "run", 0, rows, args=args)
    table, _, text = make([tmp_path / "run"], tmp_path / "report")
    assert table["Hopper-v4", "sac"] == ["5.00 (at 10)", "none in common", "3.00", "30", "1"]
    assert "Every run is complete." in text


def test_curves_of_earlier_reports_are_drawn_beside(tmp_path, monkeypatch, capsys):
    """Of the tasks at hand alone; a later file comes before an earlier one, and the runs before both."""
    old = [write_run(tmp_path, "Ant-v4", name, seed, [seed, 2]) for name in ("sac", "a", "b") for seed in (1, 2)]
    make([*old, write_run(tmp_path, "Hopper-v4", "sac", 1, [1, 2])], tmp_path / "first")
    make([write_run(tmp_path, "Ant-v4", "a", 3, [5, 6, 7])], tmp_path / "second")
    runs, drawn = [write_run(tmp_path, "Ant-v4", "b", 4, [8, 9])], []
    monkeypatch.setattr(report, "draw", lambda panels, *rest: drawn.append(panels))
    beside = (tmp_path / "first.csv", tmp_path / "second.csv")
    table, rows, text = make(runs, tmp_path / "report", beside=beside, until=20_000)
    for panels, x in zip(drawn, ([10_000, 20_000], [0.01, 0.02]), strict=True):
        ((task, _, lines),) = panels
        found = {name: (list(x), list(y)) for name, x, y, *_ in lines}
        assert task == "Ant-v4" and found == {"sac": (x, [1.5, 2]), "a": (x, [5, 6]), "b": (x, [8, 9])}
    assert table.keys() == {("Ant-v4", "b")} == {(row["env_id"], row["exp_name"]) for row in rows}
    assert "Curves without a row above: first.csv, second.csv." in text
    (tmp_path / "other.csv").write_text("env_id,metric\nAnt-v4,eval\n")
    for name, reason in (("other", "KeyError: 'exp_name'"), ("missing", "FileNotFoundError")):
        with pytest.raises(SystemExit):
            make(runs, tmp_path / "bad", beside=(tmp_path / f"{name}.csv",))
        assert f"{name}.csv is not the CSV of a report ({reason}" in capsys.readouterr().err


def test_what_came_after_a_step_can_be_left_out(tmp_path):
    runs = [write_run(tmp_path, "Ant-v4", "sac_continuous", 1, [10, 20, 60])]
    runs += [write_run(tmp_path, "Ant-v4", "smfp_continuous", 1, [5, 7])]
    table, rows, text = make(runs, tmp_path / "report", until=20_000)
    assert [row[2:4] for row in table.values()] == [["20.00", "20,000"], ["7.00", "20,000"]]
    assert {row["step"] for row in rows} == {"10000", "20000"}
    assert "Every run is complete." in text


def test_curves_of_any_tag(tmp_path, capsys):
    runs = [write_run(tmp_path, task, "sac_continuous", 1, [10, 20]) for task in ("Ant-v4", "Hopper-v4")]
    for run in runs:
        with SummaryWriter(str(run), purge_step=15_000) as writer:
            writer.add_scalar("diagnostics/entropy", -2.5, 18_000, walltime=1e9 + 360)
            writer.add_scalar("losses/alpha", 0.5, 18_000, walltime=1e9 + 360)
    runs.append(write_run(tmp_path, "Ant-v4", "without", 1, [10, 20]))
    table, rows, text = make(runs, tmp_path / "report", metric="diagnostics/entropy", also=("losses/alpha",))
    assert table["Ant-v4", "without"][2:5] == ["20.00", "", ""]
    assert table["Ant-v4", "sac_continuous"][2:5] == ["10.00 (at 10,000)", "-2.50", "0.50"]
    found = [(row["step"], row["value"]) for row in rows if row["metric"] == "diagnostics/entropy"]
    assert found == [("18000", "-2.5")] * 2
    assert "Not aggregated over tasks: diagnostics/entropy is no score." in text
    with pytest.raises(SystemExit):
        make(runs, tmp_path / "report", metric="diagnostics/entropi")
    assert "--metric diagnostics/entropi: no run has such a tag" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        make(runs, tmp_path / "report", also=("losses/alfa",))
    assert "--also losses/alfa: no run has such a tag" in capsys.readouterr().err


def test_rows_of_other_tags_can_be_thinned(tmp_path, capsys):
    run = write_run(tmp_path, "Ant-v4", "sac_continuous", 1, [10, 20, 30])
    with SummaryWriter(str(run), purge_step=30_001) as writer:
        for step in (30_100, 34_900, 35_000, 35_100, 48_000, 51_000):
            writer.add_scalar("losses/alpha", step / 1e5, step, walltime=1e9 + 500)
    options = dict(metric="eval", also=("losses/alpha",))
    _, rows, _ = make([run], tmp_path / "report", every=5_000, **options)
    assert [float(row["value"]) for row in rows if row["metric"] == "losses/alpha"] == [0.301, 0.35, 0.48, 0.51]
    assert [row["step"] for row in rows if row["metric"] == "eval"] == ["10000", "20000", "30000"]
    with pytest.raises(SystemExit):
        make([run], tmp_path / "report", every=0, **options)
    assert "--every is 0; it must be at least 1" in capsys.readouterr().err


def test_without_evaluations_training_returns_are_binned_by_hundredths_of_the_run(tmp_path):
    args = sac_continuous.Args(env_id="Hopper-v4", exp_name="sac", eval_frequency=0, total_timesteps=1000)
    write_session(tmp_path / "run", 0, [(1, "charts", step, step) for step in (11, 19, 20, 21, 1000)], args=args)
    _, rows, _ = make([tmp_path / "run"], tmp_path / "report")
    assert [row["metric"] for row in rows] == ["train"] * 3
    np.testing.assert_allclose([float(row["step"]) for row in rows], [20, 30, 1000])
    np.testing.assert_allclose([float(row["value"]) for row in rows], [50 / 3, 21, 1000], rtol=1e-5)


def four_seeds_on_two_tasks(folder):
    """SAC ends at 100 on one task and 1000 on the other, the mean over the seeds."""
    scores = {"Hopper-v4": [40, 80, 120, 160], "Ant-v4": [100, 900, 1000, 2000]}
    runs = []
    for task, last in scores.items():
        for seed, value in enumerate(last, 1):
            runs.append(write_run(folder, task, "sac", seed, [value / 10, value]))
            runs.append(
                write_run(folder, task, "mfpo", seed, [value / 5, 2 * value], script=mfpo_continuous, seconds=72)
            )
    return runs


@pytest.mark.parametrize("seeds", [1, 3, 4])
def test_interquartile_mean_is_rliables(seeds):
    scores = np.random.default_rng(0).normal(size=(seeds, 3, 5))
    expected = [metrics.aggregate_iqm(scores[..., i]) for i in range(5)]
    np.testing.assert_allclose(report.iqm(scores), expected)


def test_interquartile_mean_by_hand_and_its_interval(tmp_path):
    runs = [report.read_run(run) for run in four_seeds_on_two_tasks(tmp_path)]
    cells = {}
    for run in runs:
        cells.setdefault((run.env_id, run.exp_name), []).append(run)
    curves, why_not = report.aggregate(cells, "eval", "sac")
    # Normalised: 0.4 0.8 1.2 1.6 and 0.1 0.9 1.0 2.0; without the lower and the upper two 0.8, 0.9, 1.0 and 1.2.
    by_hand = (0.8 + 0.9 + 1.0 + 1.2) / 4
    assert not why_not
    for name, factor, hours in (("sac", 1, 0.01), ("mfpo", 2, 0.02)):
        steps, x, mean, (low, high) = curves[name]
        assert steps.tolist() == [10_000, 20_000]
        np.testing.assert_allclose(x, [hours, 2 * hours], rtol=1e-5)
        np.testing.assert_allclose(mean, [factor * by_hand / 10, factor * by_hand], rtol=1e-6)
        assert (low < mean).all() and (mean < high).all()
    scores = np.array([[40, 80, 120, 160], [100, 900, 1000, 2000]]) / [[100], [1000]]
    assert by_hand == pytest.approx(scipy.stats.trim_mean(scores, 0.25, axis=None))
    # All 4^8 resamples of the seeds within each task; the interval's ends are percentiles of 5,000 of them.
    hopper, ant = (row[np.indices((4,) * 4).reshape(4, -1)] for row in scores)  # (4 seeds, 256 resamples)
    resamples = np.concatenate([np.repeat(hopper, 256, axis=1), np.tile(ant, 256)])
    exact = scipy.stats.trim_mean(resamples, 0.25, axis=0)
    low, high = curves["sac"][3][:, -1]
    assert np.percentile(exact, 1.5) <= low <= np.percentile(exact, 3.5)
    assert np.percentile(exact, 96.5) <= high <= np.percentile(exact, 98.5)


@pytest.mark.parametrize("case", ["one task", "other tasks", "fewer seeds", "no reference", "negative"])
def test_what_cannot_be_aggregated_is_not(case, tmp_path):
    runs = {(t, n, s): [9, 10] for t in ("Ant-v4", "Hopper-v4") for n in ("sac", "mfpo") for s in (1, 2)}
    for task, name, seed in [*runs]:
        if (
            (case == "one task" and task == "Ant-v4")
            or (case == "other tasks" and (task, name) == ("Ant-v4", "mfpo"))
            or (case == "fewer seeds" and (task, name, seed) == ("Ant-v4", "mfpo", 2))
        ):
            del runs[task, name, seed]
        elif case == "negative" and task == "Ant-v4":
            runs[task, name, seed] = [-9, -10]
    cells = {}
    for (task, name, seed), values in runs.items():
        cells.setdefault((task, name), []).append(report.read_run(write_run(tmp_path, task, name, seed, values)))
    curves, why_not = report.aggregate(cells, "eval", "ppo" if case == "no reference" else "sac")
    assert (
        curves == {}
        and why_not
        == {
            "one task": "there is one task only",
            "other tasks": "mfpo does not have the same number of seeds on each task: {'Ant-v4': 0, 'Hopper-v4': 2}",
            "fewer seeds": "mfpo does not have the same number of seeds on each task: {'Ant-v4': 1, 'Hopper-v4': 2}",
            "no reference": "there are no runs of --normalize ppo",
            "negative": "the last score of sac is not above 0 on each task",
        }[case]
    )


def test_command_line_and_that_a_report_written_twice_has_the_same_bytes(tmp_path, capsys):
    runs = four_seeds_on_two_tasks(tmp_path)
    _, _, text = make(runs, tmp_path / "a" / "report", normalize="sac")
    line = [*map(str, runs), "--out", f"{tmp_path}/b/report", "--normalize", "sac"]
    report.main(tyro.cli(report.Args, args=line))
    assert capsys.readouterr().out == 2 * f"{text}\n"
    assert "- mfpo: 1.95 [" in text
    names = {f"report_{kind}.png" for kind in ("steps", "hours", "aggregate")}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names | {"report.csv", "report.md"}
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes() and path.stat().st_size > 1000


def test_commands_published_scores_and_provenance(tmp_path):
    published = tmp_path / "published.csv"
    published.write_text("env_id,script,score,source\nAnt-v4,mfpo_continuous,7 ± 1,a paper\nAnt-v4,other,8,another\n")
    plain, odd = (
        {"script": mfpo_continuous},
        {"script": mfpo_continuous, "autotune": False, "wandb_entity": "two words"},
    )
    runs = [write_run(tmp_path, "Ant-v4", "mfpo", seed, [1, 2], **plain) for seed in (1, 2)]
    runs += [write_run(tmp_path, "Hopper-v4", "mfpo", seed, [1, 2], **odd) for seed in (1, 2)]
    runs += [write_run(tmp_path, "Hopper-v4", "mfpo", 3, [1, 2], save_model=True, **odd)]
    given = {"machine": "a machine", "commit": "abc1234", "published": published}
    table, _, text = make(runs, tmp_path / "report", **given)
    assert table["Ant-v4", "mfpo"][-1] == "7 ± 1 [1]" and table["Hopper-v4", "mfpo"][-1] == ""
    assert "[1] a paper" in text and "another" not in text
    assert "- machine: a machine (as given)\n- commit: abc1234 (as given)" in text
    assert f"- date: {time.strftime('%Y-%m-%d')} (where the report was written)" in text
    base = "python mfpo_continuous.py --env-id <task> --seed <seed> --exp-name mfpo --total-timesteps 20000"
    assert text.split("```")[1].splitlines()[1:] == [
        "# Ant-v4: seed 1, 2",
        base,
        "# Hopper-v4: seed 1, 2",
        f"{base} --wandb-entity 'two words' --no-autotune",
        "# Hopper-v4: seed 3",
        f"{base} --wandb-entity 'two words' --save-model --no-autotune",
    ]
    assert "- Mixed: the seeds of Hopper-v4, mfpo differ in their flags; see the commands" in text


def test_what_is_no_run_gives_one_line_and_the_exit_code_2(tmp_path, capsys):
    good = write_run(tmp_path, "Ant-v4", "sac", 1, [1, 2])
    (tmp_path / "empty").mkdir()
    SummaryWriter(str(tmp_path / "foreign")).close()
    again, damaged = tmp_path / "again", write_run(tmp_path, "Ant-v4", "sac", 2, [1, 2])
    write_run(again, "Ant-v4", "sac", 1, [1, 2])
    (damaged / "checkpoint.pt").write_bytes(b"no checkpoint")
    for path, message in (
        (tmp_path / "empty", "empty is no run folder"),
        (tmp_path / "missing", "missing is no run folder"),
        (tmp_path / "foreign", "foreign is no run folder"),
        (damaged, "checkpoint.pt cannot be read"),
        (next(again.iterdir()), "are the same task, exp_name and seed; leave one out"),
    ):
        with pytest.raises(SystemExit) as stop:
            report.main(report.Args([good, path], tmp_path / "out" / "report"))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and message in error and str(path) in error
    (tmp_path / "columns.csv").write_text("env_id,script,score\nAnt-v4,sac_continuous,7\n")
    for published, message in ((tmp_path / "columns.csv", "KeyError: 'source'"), (tmp_path / "no.csv", "No such file")):
        with pytest.raises(SystemExit) as stop:
            report.main(report.Args([good], tmp_path / "out" / "report", published=published))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and message in error and str(published) in error
    assert not (tmp_path / "out").exists()
