"""The command lines in benchmark/*.sh: sweep.py, report.py and the rest of their programs still take them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

pytest.importorskip("ray")
pytest.importorskip("rliable")
from benchmark import density, likelihood, posture, report, sweep

ROOT = Path(__file__).parent.parent
RECORD = """#!/bin/sh
exec "{python}" -c 'import json, sys; print(json.dumps(sys.argv[1:]), file=open("{file}", "a"))' "$@"
"""


@pytest.mark.parametrize(
    "script",
    [
        "mujoco.sh",
        "mujoco_cpu.sh",
        "mfpo_ablations.sh",
        "mfpo_cpu.sh",
        "mfpo_recipe.sh",
        "smfp_defaults.sh",
        "multigoal.sh",
    ],
)
def test_the_sweeps_of_an_experiment_are_valid_and_distinct(script, tmp_path):
    """With a `python` on the PATH that only writes down what it is asked."""
    file = tmp_path / "lines"
    fake = tmp_path / "python"
    fake.write_text(RECORD.format(python=sys.executable, file=file))
    fake.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SEEDS": "3", "STEPS": "20000"}
    subprocess.run(["bash", str(ROOT / "benchmark" / script)], env=environment, check=True)
    names = {}
    for program, *line in map(json.loads, file.read_text().splitlines()):
        if program == "benchmark/sweep.py":
            args = tyro.cli(sweep.Args, args=line)
            for run in sweep.plan(args):
                # Two sweeps of a script may not give one name to different runs.
                assert names.setdefault((args.runs_dir, run.name), run.line) == run.line
        else:
            modules = {module.__name__: module for module in (density, likelihood, posture, report)}
            module = modules[program.removesuffix(".py").replace("/", ".")]
            args = tyro.cli(module.Args, args=line)
            assert args.out.parent.parent == Path("benchmark/results") and (ROOT / args.out.parent).is_dir()
            folders = {name for folder, name in names if folder == args.runs[0].parent}
            assert folders
            if module is report:
                assert any(f"__{args.normalize}__" in name for name in folders)
    assert len(names) >= 12
