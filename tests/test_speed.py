"""The speed benchmark measures what it says: against processes that sleep, and a run that it times from inside."""

import ast
import importlib
import importlib.util
import itertools
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import tyro

import mfpo_continuous as mfpo
from benchmark import changed, paper_table, rounds, speed

ROOT = Path(__file__).parent.parent
SLEEPER = """
import sys, time
sys.path.insert(0, {root!r})
from benchmark.rounds import answer_rounds
assert sys.argv[1:] == ["11", "3"]
update, action, best_action = (lambda s=s: time.sleep(s) for s in (0.05, 0.02, 0.03))
answer_rounds(update=update, action=action, best_action=best_action, duration=0.3, facts=lambda: {{"steps": 7}})
"""


def test_a_call_is_timed_with_what_it_leaves_under_way():
    pending = []
    wait = lambda: time.sleep(0.02 * len(pending))  # noqa: E731
    assert rounds.seconds_per_call(lambda: pending.append(1), wait, 0.0) >= 0.02
    assert len(pending) == 3


def test_rounds_of_a_peer_that_sleeps(tmp_path):
    (tmp_path / "peer.py").write_text(SLEEPER.format(root=str(ROOT)))
    peer = f"sac_continuous:other={sys.executable} {tmp_path}/peer.py"
    answers = speed.time_rounds(speed.Args(scripts=("sac_continuous",), rounds=2, peer=(peer,)), "Hopper")
    assert {key[0] for key in answers} == {"sac_continuous"} and len(answers["sac_continuous", "other"]) == 2
    for answer in answers["sac_continuous", "other"]:
        for name, seconds in (("update", 0.05), ("action", 0.02), ("best_action", 0.03)):
            assert seconds <= answer[name] < 3 * seconds
        assert answer["steps"] == 7


@pytest.mark.parametrize("program", ["speed.py --work sac_continuous eager", "changed.py sac_continuous fused_adam"])
def test_our_worker_counts_the_operations_of_an_update(program):
    script, *words = program.split()
    line = [sys.executable, ROOT / "benchmark" / script, *words, "11", "3"]
    worker = subprocess.Popen(list(map(str, line)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert json.loads(worker.stdout.readline()) == {"ready": True}
    answer = json.loads(worker.communicate("\n")[0])
    # By hand, in multiplications and additions: each network's layers forward, and again for each gradient needed.
    batch, actor, critic = 256, (11, 256, 256, 6), (14, 256, 256, 1)
    forward_actor, forward_critic = (sum(a * b for a, b in itertools.pairwise(sizes)) for sizes in (actor, critic))
    learn_actor, learn_critic = 3 * forward_actor - 11 * 256, 3 * forward_critic - 14 * 256  # no gradient of the input
    target, critics = forward_actor + 2 * forward_critic, 2 * learn_critic
    policy = learn_actor + 2 * 2 * forward_critic  # the critics pass the gradient to the action, none to their weights
    assert answer["operations"] == 2 * batch * (target + critics + policy)
    assert answer["update"] > answer["floor"] and answer["peak_memory"] > 1e8


@pytest.mark.parametrize("script", speed.Args.scripts)
def test_a_compiled_policy_plays_the_same_actions(script):
    module = importlib.import_module(script)
    torch.manual_seed(0)
    agent, obs = module.Agent(11, 3, module.Args(), torch.device("cpu")), torch.randn(4, 11)
    compiled = torch.compile(agent.sample_actions, options=speed.COMPILED | {"fallback_random": True})
    actions = []
    for play in (agent.sample_actions, compiled, compiled):
        torch.manual_seed(1)
        actions.append(play(obs))
    torch.testing.assert_close(actions[1], actions[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(actions[1], actions[2]) and not torch.equal(compiled(obs), actions[2])  # fresh noise


def test_a_loop_is_timed_from_inside_the_environment(tmp_path):
    args = speed.Args(scripts=("sac_continuous",), loop_rounds=1, loop_seconds=0.5)
    ((key, (steps_per_second,)),) = speed.time_loops(args, "Pendulum-v1").items()
    assert key == ("sac_continuous", "eager") or key == ("sac_continuous", "graph")
    assert 1 < steps_per_second < 10_000


def test_a_table_has_the_ratios():
    rows = [
        ("sac_continuous", "eager", "Hopper", "ms per action", 0.5, 0.4, 0.6),
        ("mfpo_continuous", "eager", "Hopper", "ms per action", 2.0, 1.9, 2.1),
        ("mfpo_continuous", "eager", "Hopper", "updates/s", 6.0, 5.0, 7.0),
        ("mfpo_continuous", "JAX", "Hopper", "updates/s", 4.0, 3.0, 5.0),
        ("mfpo_continuous", "compiled", "Hopper", "updates/s", 8.0, 7.0, 9.0),
        ("sac_continuous", "graph", "Hopper-v4", "training steps/s", 900.0, 800.0, 1000.0),
        ("mfpo_continuous", "graph", "Hopper-v4", "training steps/s", 500.0, 400.0, 600.0),
        ("sac_continuous", "eager", "Hopper-v4", "training steps/s", 100.0, 90.0, 110.0),
        ("sac_continuous", "compiled", "Hopper-v4", "training steps/s", 110.0, 90.0, 115.0),
        ("mfpo_continuous", "eager", "Hopper-v4", "training steps/s", 10.0, 9.0, 11.0),
        ("mfpo_continuous", "compiled", "Hopper-v4", "training steps/s", 12.5, 12.0, 13.0),
    ]
    text = speed.table(rows)
    assert "- mfpo_continuous (eager), Hopper: 4.00 x the ms per action of sac_continuous" in text
    assert "- mfpo_continuous (eager), Hopper: 1.50 x the updates/s of JAX" in text
    assert "- mfpo_continuous (compiled), Hopper: 2.00 x the updates/s of JAX" in text
    assert "- mfpo_continuous (graph), Hopper-v4: 1.80 x the training time of sac_continuous" in text
    assert "- mfpo_continuous (eager), Hopper-v4: 10.00 x the training time of sac_continuous" in text
    assert "- mfpo_continuous (compiled), Hopper-v4: 8.80 x the training time of sac_continuous" in text


@pytest.mark.parametrize("text", ["mfpo_continuous=x", "jax:mfpo=x", "mfpo_continuous:jax="])
def test_a_peer_that_cannot_be_read_is_named(text):
    with pytest.raises(SystemExit, match="SCRIPT:NAME=COMMAND"):
        speed.parse_peer(text, ("mfpo_continuous",))


def test_the_papers_table_has_ratios_to_sac_and_the_papers_figures(tmp_path):
    rows = [
        ("sac_continuous", "eager", "Hopper", "ms per action", 0.1),
        ("sac_continuous", "eager", "Hopper", "updates/s", 120.0),
        ("sac_continuous", "eager", "Hopper", "steps", 1),
        ("mfpo_continuous", "compiled T4", "Hopper", "ms per action", 0.4),
        ("mfpo_continuous", "compiled T4", "Hopper", "updates/s", 8.0),
        ("mfpo_continuous", "compiled T4", "Hopper", "steps", 4),
        ("sac_continuous", "MFPO (authors)", "Hopper", "ms per action", 1.5),
        ("sac_continuous", "MFPO (authors)", "Hopper", "steps", 2),
        ("sac_continuous", "eager", "Hopper-v4", "training steps/s", 100.0),
    ]
    with open(tmp_path / "table.csv", "w") as file:
        print("script,mode,place,quantity,median,lowest,highest", file=file)
        for row in rows:
            print(*row, row[-1], row[-1], sep=",", file=file)
    ((size, found),) = paper_table.read(tmp_path / "table.csv").items()
    assert size == "Hopper" and paper_table.table(found).splitlines()[2:] == [
        "| SAC, ours, eager | 1 | 0.100 | 1.0 | 120 | 1.0 |  |  |",
        "| MFPO T4, ours, compiled | 4 | 0.400 | 4.0 | 8 | 15.0 |  |  |",
        "| MFPO (authors) | 2 | 1.500 | 15.0 |  |  | 0.46 | 3.1 |",
    ]


def test_every_peers_adapter_is_in_the_papers_table_and_says_how_to_make_its_environment():
    script = (ROOT / "benchmark/paper_table.sh").read_text()
    adapters = sorted((ROOT / "benchmark/peers").glob("*.py"))
    assert len(adapters) == 9
    for adapter in adapters:
        text = ast.get_docstring(ast.parse(adapter.read_text()))
        assert f"[{adapter.stem}]=" in script
        assert re.search(r"github\.com/\S+", text) and re.search(r"commit\s[0-9a-f]{7}", text)
        assert "pip install" in text and f"benchmark/peers/{adapter.name} CHECKOUT" in text


def test_every_peer_is_kept():
    args = tyro.cli(speed.Args, args=["--peer", "a:b=c", "--loop-peer", "x:y=z", "--peer", "d:e=f g"])
    assert args.peer == ("a:b=c", "d:e=f g") and args.loop_peer == ("x:y=z",)


def three_updates(script, change) -> dict[str, list[float]]:
    """Losses and diagnostics of three updates, by a copy of its own of the script, changed or not."""
    spec = importlib.util.spec_from_file_location(f"{script}_{change}", ROOT / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    if change:
        change(module)
    torch.manual_seed(1)
    agent = module.Agent(11, 3, module.Args(), torch.device("cpu"))
    batch = torch.randn(64, 11), 2 * torch.rand(64, 3) - 1, torch.randn(64), torch.zeros(64)
    rows = [agent.update(*batch, torch.randn(64, 11)) for _ in range(3)]
    del sys.modules[spec.name]
    return {name: [row[name].item() for row in rows] for name in rows[0]}


@pytest.mark.parametrize(
    "script, change",
    [
        ("mfpo_continuous", changed.concat_linear),
        ("mfpo_continuous", changed.elementary_layer_norm),
        ("mfpo_continuous", changed.fused_adam),
        ("smfp_continuous", changed.concat_linear),
        ("sac_continuous", changed.fused_adam),
        ("mfpo_continuous", changed.fused_bias),
        ("mfpo_continuous", changed.two_pass_variance),
    ],
)
def test_what_an_optimisation_replaces_has_the_same_numbers(script, change, monkeypatch):
    calls = []
    if change in changed.WHEN_COMPILED:  # eagerly, in the form that is compiled
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    expected = three_updates(script, None)
    monkeypatch.setattr(torch.optim, "Adam", torch.optim.Adam)  # put back afterwards
    found = three_updates(script, lambda module: calls.append(change(module)))
    assert calls == [None] and found.keys() == expected.keys()
    for name, values in expected.items():  # the second and third losses are those of weights that were learned
        assert found[name] == pytest.approx(values, rel=1e-3, abs=1e-5), name


def test_a_velocity_estimate_by_parts_is_that_of_each_part(monkeypatch):
    torch.manual_seed(0)
    agent = mfpo.Agent(3, 2, mfpo.Args(policy_proposals=4, gaussian_proposals=6), torch.device("cpu"))
    obs, t, alpha = torch.randn(160, 3), torch.linspace(0.1, 0.9, 160)[:, None, None], torch.tensor(0.5)
    torch.manual_seed(1)
    parts = [agent.estimate_velocity(obs[i : i + 64], t[i : i + 64], alpha) for i in (0, 64, 128)]
    monkeypatch.setattr(mfpo.Agent, "estimate_velocity", mfpo.Agent.estimate_velocity)  # put back afterwards
    changed.states_by_parts(mfpo)
    torch.manual_seed(1)
    for whole, *pieces in zip(agent.estimate_velocity(obs, t, alpha), *parts, strict=True):
        torch.testing.assert_close(whole, torch.cat(pieces), rtol=0, atol=0)
