"""What the scripts share: buffer, evaluation, seeding, command line, files on disk."""

import ast
import dataclasses
import importlib
import itertools
import os
import platform
import re
import subprocess
import sys
import tomllib
import warnings
from concurrent.futures import ProcessPoolExecutor

import gymnasium as gym
import numpy as np
import pytest
import scipy.stats
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sac_continuous
from tests.program import ROOT, SCRIPTS, context, run_program

MODULES = {name: importlib.import_module(name) for name in SCRIPTS}
SHORT = ["--total-timesteps", "300", "--learning-starts", "200", "--batch-size", "32", "--log-frequency", "50"]


def scalars(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("script", MODULES)
def test_smoke_save_and_evaluate(script, tmp_path):
    env_id = "Hopper-v4"
    flags = ["--env-id", env_id, *SHORT, "--eval-frequency", 150, "--eval-episodes", 2, "--save-model"]
    flags += ["--diagnostics-frequency", 150]
    if script == "mfpo_continuous":
        flags += ["--policy-proposals", 4, "--gaussian-proposals", 4, "--batch-size", 8]
    line = [sys.executable, str(ROOT / f"{script}.py"), *map(str, flags)]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)  # the real thing
    assert done.returncode == 0, done.stderr
    assert "is out of date" not in done.stderr  # papers report v4
    (run,) = (tmp_path / "runs").iterdir()
    assert done.stdout.splitlines()[-1] == f"Done; the run's files are in runs/{run.name}"
    logged = scalars(run)
    expected = {"losses/qf1_values", "losses/qf1_loss", "losses/actor_loss", "losses/alpha", "losses/alpha_loss"}
    expected |= {"charts/SPS", "charts/episodic_return", "charts/episodic_length", "diagnostics/entropy"}
    expected |= {f"{tag}/episodic_return{end}" for tag in ("eval", "eval_exploring") for end in ("", "_std")}
    if script == "mfpo_continuous":
        names = ("ess_policy", "ess_gaussian", "policy_proposal_weight", "clipped_fraction", "edge_mass")
        names += ("q_std", "q_action_std", "flow_gap", "adn_log_prob_error", "adn_log_prob_bias")
        expected |= {"losses/divergence_loss", *(f"diagnostics/{name}" for name in names)}
    if script == "smfp_continuous":
        names = ("ess", "sigma", "latent_spread", "entropy_gap")
        expected |= {"losses/kl", "losses/meanflow_loss", *(f"diagnostics/{name}" for name in names)}
        expected.remove("losses/alpha_loss")  # the temperature is fixed
    assert expected <= logged.keys()
    assert all(np.isfinite(value) for series in logged.values() for _, value in series)
    assert [step for step, _ in logged["losses/actor_loss"]] == [250, 300]
    assert [step for step, _ in logged["eval/episodic_return"]] == [150, 300]
    loaded = run_program(script, tmp_path, "--evaluate", run / "model.pt", "--eval-episodes", 2)
    assert loaded.returncode == 0, loaded.stderr
    lines = loaded.stdout.splitlines()
    for line, name in zip(lines, ("evaluation", "exploring policy"), strict=True):
        assert re.fullmatch(rf"{env_id}: {name} return -?\d+\.\d \+- \d+\.\d \(2 episodes\)", line)
    assert len(list((tmp_path / "runs").iterdir())) == 1


@pytest.mark.parametrize("script", MODULES)
def test_same_seed_gives_the_same_run_with_and_without_evaluation(script, tmp_path, monkeypatch):
    flags = ["--env-id", "tests.faulty:Walk-v0", *SHORT, "--learning-starts", 150, "--total-timesteps", 200]
    flags += ["--eval-episodes", 2]
    if script == "mfpo_continuous":
        flags += ["--policy-proposals", 2, "--gaussian-proposals", 2, "--batch-size", 8, "--learning-starts", 180]
    series = []
    for name, frequency in (("here", 0), ("here_too", 100), ("elsewhere", 100)):
        line = [*map(str, flags), "--eval-frequency", str(frequency)]
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if name == "elsewhere":
            done = run_program(script, tmp_path / name, *line)
            assert done.returncode == 0, done.stderr
        else:
            MODULES[script].train(MODULES[script].parse_args(line))
        (run,) = (tmp_path / name / "runs").iterdir()
        series.append({tag: values for tag, values in scalars(run).items() if tag != "charts/SPS"})
    assert series[1] == series[2]
    assert series[0] == {tag: values for tag, values in series[1].items() if not tag.startswith("eval")}


class Counter(gym.Env):
    """Observation (env number, episode, step); ends after 3 steps in even episodes, is truncated after 4 in odd."""

    observation_space = gym.spaces.Box(-1e6, 1e6, (3,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, number):
        self.number, self.episode = number, -1 - number  # the environments are out of phase

    def observation(self):
        return np.array([self.number, self.episode, self.step_number], np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.step_number = self.episode + 1, 0
        return self.observation(), {}

    def step(self, action):
        self.step_number += 1
        terminated = self.episode % 2 == 0 and self.step_number == 3
        truncated = self.episode % 2 == 1 and self.step_number == 4
        return self.observation(), float(self.step_number), terminated, truncated, {}


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("size", [30, 1000])
def test_buffer_holds_what_a_plain_loop_saw(num_envs, size, monkeypatch, tmp_path):
    """The training loop's own transitions, past terminations, truncations and the buffer's end, against a loop."""
    numbers, buffers = iter(range(100)), []
    make = sac_continuous.ReplayBuffer
    monkeypatch.setattr(sac_continuous, "make_env", lambda *a: Counter(next(numbers)))
    monkeypatch.setattr(sac_continuous, "ReplayBuffer", lambda *a: buffers.append(make(*a)) or buffers[-1])
    monkeypatch.chdir(tmp_path)
    steps = 60 * num_envs
    counts = {"total_timesteps": steps, "num_envs": num_envs, "buffer_size": size, "learning_starts": steps}
    sac_continuous.train(sac_continuous.Args(**counts, eval_frequency=0))

    expected = []
    for number in range(num_envs):
        env = Counter(number)
        obs, _ = env.reset()
        transitions = []
        for _ in range(60):
            next_obs, reward, terminated, truncated, _ = env.step(None)
            transitions.append((*obs, reward, float(terminated), *next_obs))
            obs = env.reset()[0] if terminated or truncated else next_obs
        expected.append(transitions)
    kept = min(60, size // num_envs)
    torch.manual_seed(0)
    obs, _, rewards, terminations, next_obs = buffers[0].sample(20_000)
    sampled = torch.cat([obs, rewards[:, None], terminations[:, None], next_obs], 1).tolist()
    wanted = {transition for transitions in expected for transition in transitions[-kept:]}
    assert set(map(tuple, sampled)) == wanted
    counts = np.unique(np.array(sampled), axis=0, return_counts=True)[1]
    assert scipy.stats.chisquare(counts).pvalue > 1e-3  # uniform


@pytest.mark.parametrize("script", MODULES)
def test_policy_frequency(script, monkeypatch, tmp_path):
    """The policy and the temperature learn in every third update and stay as they are in the others."""
    module, seen = MODULES[script], []
    real = module.Agent.update

    def weights(agent):
        actor = agent.policy if script == "smfp_continuous" else agent.actor
        return torch.cat([x.detach().flatten() for x in (*actor.parameters(), agent.log_alpha)])

    def update(agent, *batch):
        before = weights(agent).clone()
        metrics = real(agent, *batch)
        seen.append(not torch.equal(weights(agent), before))
        return metrics

    monkeypatch.setattr(module.Agent, "update", update)
    monkeypatch.chdir(tmp_path)
    flags = {
        "env_id": "Pendulum-v1",
        "total_timesteps": 49,
        "learning_starts": 40,
        "batch_size": 4,
        "eval_frequency": 0,
        "cuda": False,  # a graph's replay calls no Python
    }
    module.train(module.Args(**flags, policy_frequency=3))
    assert seen == [False, False, True] * 3


def test_episodes_that_end_together_have_one_row_and_the_last_step_has_an_evaluation(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    flags = {"env_id": "tests.faulty:Walk-v0", "total_timesteps": 100, "num_envs": 3, "learning_starts": 100}
    sac_continuous.train(sac_continuous.Args(**flags, eval_frequency=40, eval_episodes=1))
    (run,) = (tmp_path / "runs").iterdir()
    rows = scalars(run)
    assert [step for step, _ in rows["eval/episodic_return"]] == [42, 81, 99]
    ((step, mean),) = rows["charts/episodic_return"]
    rewards = torch.load(run / "checkpoint.pt", weights_only=True)["buffer"]["rewards"]  # (33, 3)
    assert step == 60 and mean == pytest.approx(np.mean([rewards[:20, i].sum() for i in range(3)]), rel=1e-5)


def test_random_actions_and_an_environments_noise_are_drawn_apart():
    """Gymnasium seeds both generators alike: one seed for the two would make the noise a function of the action."""
    envs = [sac_continuous.make_env("tests.faulty:Walk-v0") for _ in range(2)]
    sac_continuous.restart(envs, 3)
    draws = [env.action_space.np_random.random(5) for env in envs]
    draws += [np.random.Generator(np.random.PCG64(3 + i)).random(5) for i in range(2)]  # the environments' own
    assert len({values[0] for values in draws}) == 4


def test_the_first_step_may_be_one_of_the_policy(monkeypatch, tmp_path):
    """With no random steps there is nothing to learn from before the first step."""
    monkeypatch.chdir(tmp_path)
    flags = {"env_id": "Pendulum-v1", "total_timesteps": 6, "num_envs": 2, "learning_starts": 0, "eval_frequency": 0}
    sac_continuous.train(sac_continuous.Args(**flags))
    (run,) = (tmp_path / "runs").iterdir()
    assert torch.load(run / "checkpoint.pt", weights_only=True)["num_updates"] == 6


def test_speed_is_that_since_the_last_row(monkeypatch, tmp_path):
    """50 steps in a second of a clock of our own, whatever went before."""
    monkeypatch.chdir(tmp_path)
    clock = itertools.count(1000, 1)
    monkeypatch.setattr(sac_continuous.time, "time", lambda: float(next(clock)))
    flags = {"env_id": "Pendulum-v1", "total_timesteps": 300, "learning_starts": 100, "eval_frequency": 0}
    sac_continuous.train(sac_continuous.Args(**flags, batch_size=8, log_frequency=50))
    (run,) = (tmp_path / "runs").iterdir()
    events = scalars(run)["charts/SPS"]
    assert [step for step, _ in events] == [150, 200, 250, 300]
    assert all(value <= 50 for _, value in events[1:]) and events[0][1] > 0


@pytest.mark.parametrize("script", MODULES)
def test_help_has_groups_and_no_ragged_lines(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        MODULES[script].parse_args(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    groups = ["run", "output", "training", "method"] + ["ablation"] * (script != "sac_continuous")
    assert re.findall(r"(\w+) options", "\n".join(lines)) == groups
    assert any(f"python {script}.py --env-id Hopper-v4 --seed 1" in line for line in lines)
    texts = [line.strip("│ ") for line in lines if line.startswith("│  ")]  # what goes on below a flag
    unfinished = [
        a for a, b in itertools.pairwise(texts) if len(a) < 20 and not a.endswith((")", "}")) and b[:1].islower()
    ]
    assert unfinished == []


def test_make_env_rescales_actions_flattens_and_casts():
    env = sac_continuous.make_env("Humanoid-v4")
    assert env.action_space == gym.spaces.Box(-1, 1, (17,), np.float32)
    assert env.observation_space.shape == (376,)
    assert sac_continuous.own_copy(env, env.reset(seed=0)[0]).dtype == np.float32
    env.step(np.ones(17, np.float32))
    np.testing.assert_allclose(env.unwrapped.data.ctrl, 0.4, rtol=1e-6)  # Humanoid's own bound

    class DictEnv(Counter):
        observation_space = gym.spaces.Dict(a=Counter.observation_space, b=gym.spaces.Discrete(4))

        def observation(self):
            return {"a": super().observation(), "b": 2}

    gym.register("DictEnv-v0", lambda: DictEnv(0))
    obs, _ = sac_continuous.make_env("DictEnv-v0").reset(seed=0)
    np.testing.assert_array_equal(obs, np.array([0, 0, 0, 0, 0, 1, 0], np.float32))


def test_a_package_that_turns_warnings_on_changes_nothing_afterwards():
    def loud():
        warnings.simplefilter("always", DeprecationWarning)  # as dm_control does when it is imported
        return Counter(0)

    gym.register("Loud-v0", loud)
    before = list(warnings.filters)
    sac_continuous.make_env("Loud-v0")
    assert warnings.filters == before


def test_observations_that_are_not_vectors_are_refused(capsys):
    sequence = gym.spaces.Sequence(gym.spaces.Box(0, 1, (2,)))
    for name, space in (("Image", gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)), ("Sequence", sequence)):
        kind = type("Env", (Counter,), {"observation_space": space})
        gym.register(f"{name}-v0", lambda kind=kind: kind(0))
        with pytest.raises(SystemExit):
            sac_continuous.make_env(f"{name}-v0")
        assert f"--env-id {name}-v0: its observations are" in capsys.readouterr().err


@pytest.mark.parametrize("script", MODULES)
def test_what_cannot_be_recorded_is_refused(script, capsys):
    class Shown(Counter):
        def __init__(self, render_mode=None):
            super().__init__(0)

        def render(self):
            return "a text"

    def broken(render_mode=None):
        raise TypeError("f() got an unexpected keyword argument " + ("'size'" if render_mode else "'render_mode'"))

    gym.register("NoMode-v0", lambda: Counter(0))
    gym.register("Shown-v0", Shown)
    gym.register("OwnFault-v0", broken)
    for name, message in (("NoMode", "NoMode-v0 has no render_mode"), ("Shown", "render() returned 'a text'")):
        MODULES[script].make_env(f"{name}-v0")
        with pytest.raises(SystemExit):
            MODULES[script].make_env(f"{name}-v0", render=True)
        assert message in capsys.readouterr().err
    for render, fault in ((True, "'size'"), (False, "'render_mode'")):  # theirs to debug
        with pytest.raises(TypeError, match=f"unexpected keyword argument {fault}"):
            MODULES[script].make_env("OwnFault-v0", render)


PAGE_FAULTS = """
import resource, mfpo_continuous, torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        temporaries = [torch.ones(2**18) for _ in range(32)]
        del temporaries
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
{} and mfpo_continuous.keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc")
def test_freed_memory_is_kept():
    """The system hands out the pages of 32 MiB of temporaries ten times, or not once again.

    glibc adapts its thresholds to what it sees, and may come to keep them by itself, unless one is set at the start.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    again, kept = (
        int(subprocess.check_output([sys.executable, "-c", PAGE_FAULTS.format(keep)], cwd=ROOT, env=environment))
        for keep in (False, True)
    )
    assert kept < 100 < 10_000 < again


def test_matrices_are_multiplied_in_float32():
    """Whatever library does it: rounded to bfloat16 first, the error of 256 terms is 0.1 instead of 1e-4."""
    sac_continuous.set_up_torch(sac_continuous.Args())
    torch.manual_seed(0)
    x, y = torch.randn(2, 256, 256)
    exact = x.double() @ y.double()
    assert (x @ y - exact).abs().max() < 1e-3 < (x.bfloat16() @ y.bfloat16() - exact).abs().max()


def nonzero_averages(flush):
    """How many of Adam's averages are left after 1,000 gradients of 0, in a process of two threads."""
    torch.set_flush_denormal(False)  # as at the start of a process; to import this file sets it
    torch.set_num_threads(2)
    if flush:
        sac_continuous.set_up_torch(sac_continuous.Args(threads=2))
    weights = torch.nn.Parameter(torch.ones(2**16))
    optimizer = torch.optim.Adam([weights], fused=True)
    for gradient in [1.0] + 1000 * [0.0]:
        weights.grad = torch.full_like(weights, gradient)
        optimizer.step()
    return optimizer.state[weights]["exp_avg"].count_nonzero().item()


@pytest.mark.skipif(not torch.set_flush_denormal(True), reason="this processor cannot")
def test_denormals_are_flushed_in_every_thread():
    """Adam's averages for weights without a gradient, as those of dead ReLUs, reach 0: 0.9^1000 is below 1e-45.

    Without, they stay at a denormal, for 0.9 times a small one rounds to itself. Two threads share the work.
    """
    with ProcessPoolExecutor(mp_context=context, max_tasks_per_child=1) as pool:
        kept, flushed = pool.map(nonzero_averages, (False, True))
    assert flushed == 0 < kept == 2**16


def source(script):
    return (ROOT / f"{script}.py").read_text()


def test_what_the_scripts_share_is_byte_identical():
    """And in the same order: whatever has the same name in all three, but for what is each algorithm's own."""
    texts = {script: source(script) for script in MODULES}
    nodes = {
        script: {n.name: n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        for script, text in texts.items()
    }
    shared = set.intersection(*(set(named) for named in nodes.values())) - {"Args", "MethodArgs", "Agent"}
    assert len(shared) >= 20 and {"RunArgs", "ReplayBuffer", "evaluate", "train", "Run", "CudaGraph"} < shared
    pieces = []
    for script, text in texts.items():
        definitions = [ast.get_source_segment(text, node) for name, node in nodes[script].items() if name in shared]
        imports = text[text.index("import copy") : text.index("@dataclass\n")]
        imports = re.sub(r"import ctypes\n|from typing import .*\n|, partial", "", imports)
        main = text[text.index("if __name__") :].replace("    keep_freed_memory()\n", "")
        pieces.append([imports, *definitions, main])
    assert pieces[0] == pieces[1] == pieces[2]
    found = [re.search(r" def critic_values.*?\n\n", text, re.S) for text in texts.values()]
    assert [bool(x) for x in found] == [script != "mfpo_continuous" for script in texts]
    assert len({x[0] for x in found if x}) == 1


@pytest.mark.parametrize("script", MODULES)
def test_every_flag_is_used(script):
    text = source(script)
    for field in dataclasses.fields(MODULES[script].Args):
        assert re.search(rf"args\.{field.name}\b|trained\.{field.name}\b", text), field.name


@pytest.mark.parametrize("script", MODULES)
def test_inline_metadata_equals_requirements(script):
    requirements = (ROOT / "requirements.txt").read_text().split()
    lines = re.match(r"# /// script\n((?:# .*\n)*?)# ///\n", source(script))[1].splitlines()
    metadata = tomllib.loads("\n".join(line.removeprefix("# ") for line in lines))
    assert metadata == {"requires-python": ">=3.11", "dependencies": requirements}
