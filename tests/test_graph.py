"""CUDA graphs: what a machine without a GPU can check; and, with one, that every mode gives the same numbers."""

import contextlib
import gc
import importlib

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sac_continuous

CASES = [
    ("sac_continuous", {}),
    ("sac_continuous", {"critic": "crossq"}),
    ("mfpo_continuous", {"policy_proposals": 4, "gaussian_proposals": 4}),
    ("mfpo_continuous", {"policy_proposals": 2, "gaussian_proposals": 2, "likelihood": "exact", "critic": "mean"}),
    ("mfpo_continuous", {"likelihood": "map", "critic": "quantile", "num_atoms": 5, "policy_batch_size": 4}),
    (
        "mfpo_continuous",
        {"critic": "crossq", "noised_actions": 4, "gaussian_proposals": 2, "combination": "pooled", "policy_tau": 0.05},
    ),
    ("smfp_continuous", {"critic": "sac", "autotune": True}),
    ("smfp_continuous", {"critic": "crossq", "target_candidates": 2, "behavior_candidates": 4}),
]
COMPILED = [
    ("mfpo_continuous", {"policy_proposals": 2, "gaussian_proposals": 2}),
    ("mfpo_continuous", {"likelihood": "map", "critic": "quantile", "policy_batch_size": 16, "policy_frequency": 2}),
    (
        "mfpo_continuous",
        {"critic": "crossq", "policy_proposals": 2, "gaussian_proposals": 2, "noised_actions": 2, "policy_tau": 0.05},
    ),
    # SAC has no part that SMFP lacks.
    ("smfp_continuous", {"latents": 2, "policy_frequency": 1, "autotune": True, "policy_lr": 3e-4}),
]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def deterministic():
    """As `train` sets it: it changes kernels."""
    sac_continuous.set_up_torch(sac_continuous.Args())
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True)
def no_graph_is_left():
    """One that is collected while another is being recorded spoils it."""
    yield
    gc.collect()


class OnlyOn(TorchDispatchMode):
    """Fails at an operation that touches a tensor of another device: a graph records no copy from or to the host."""

    def __init__(self, device):
        super().__init__()
        self.device, self.operations = device, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations += 1
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor) and not leaf._is_zerotensor():  # forward mode's zeros have no storage
                assert leaf.device == self.device, f"{function} has a tensor on {leaf.device}"
        return result


@pytest.mark.parametrize(("script", "options"), CASES)
def test_sampling_updating_and_acting_never_look_at_the_host(script, options):
    """On the meta device a number cannot be read and a host's tensor stands out: both would break a recording."""
    module, device = importlib.import_module(script), torch.device("meta")
    agent = module.Agent(11, 3, module.Args(**options), device)
    for optimizer in module.optimizers(agent).values():
        optimizer.step = lambda: None  # PyTorch's fused Adam knows no meta device; it is safe with capturable=True
        assert optimizer.defaults["capturable"]
    buffer = module.ReplayBuffer(100, 1, 11, 3, device)
    with OnlyOn(device) as mode:
        for with_policy in (True, False):
            batch = buffer.sample(8)
            metrics = agent.update(*batch, with_policy)
            assert all(value.shape == () for value in metrics.values())
        assert agent.sample_actions(batch[0]).shape == agent.eval_actions(batch[0]).shape == (8, 3)
    assert mode.operations > 200


def test_a_host_read_would_be_noticed():
    x = torch.zeros(3, device="meta")
    with pytest.raises(AssertionError, match="cpu"), OnlyOn(x.device):
        x + torch.tensor(1.0)
    with pytest.raises(RuntimeError):
        x.sum().item()


@pytest.mark.parametrize(("script", "options"), CASES)
def test_an_update_leaves_no_part_of_its_autograd_graph_behind(script, options):
    """What it left would tie the parameters to the stream of that update, and the next could not be recorded.

    An AccumulateGrad node is made anew for a parameter when nothing holds the one before.
    """
    module = importlib.import_module(script)
    agent = module.Agent(11, 3, module.Args(**options), torch.device("cpu"))
    groups = [optimizer.param_groups[0]["params"] for optimizer in module.optimizers(agent).values()]
    learning = {p for group in groups for p in group if p.requires_grad}  # a fixed temperature does not
    marks = lambda: [p.view_as(p).grad_fn.next_functions[0][0].metadata for p in learning]  # noqa: E731
    backward = torch.Tensor.backward

    def marking(loss, **options):
        for mark in marks():
            mark["seen"] = True
        backward(loss, **options)

    obs, next_obs = torch.randn(2, 8, 11)
    batch = obs, torch.rand(8, 3), torch.zeros(8), torch.zeros(8), next_obs
    for with_policy in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "backward", marking)
            metrics = agent.update(*batch, with_policy)
        assert metrics and not any(mark.get("seen") for mark in marks())


@needs_cuda
@pytest.mark.parametrize(("script", "options"), CASES)
def test_no_operation_waits_for_the_gpu(script, options, deterministic):
    """Where recording a graph would only say that it failed, this names the operation."""
    module, device = importlib.import_module(script), torch.device("cuda")
    action_dim = action_size(options)
    agent = module.Agent(11, action_dim, module.Args(**options), device)
    buffer = module.ReplayBuffer(100, 1, 11, action_dim, device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for with_policy in (True, False):
            batch = buffer.sample(8)
            agent.update(*batch, with_policy)
        agent.sample_actions(batch[0]), agent.eval_actions(batch[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def action_size(options):
    """Determinants above 16 x 16 are another kernel."""
    return 17 if options.get("likelihood") == "exact" else 3


def trained(script, options, graphed, updates=100):
    """An agent after some updates from a buffer on the GPU, eagerly or by graphs, and the losses on the way."""
    module, device = importlib.import_module(script), torch.device("cuda")
    torch.manual_seed(0)
    action_dim = action_size(options)
    agent = module.Agent(11, action_dim, module.Args(**options), device)
    buffer, random = module.ReplayBuffer(1000, 1, 11, action_dim, device), np.random.default_rng(0)
    for _ in range(900):
        shapes = {name: ring.shape[1:] for name, ring in buffer.rings.items()}
        buffer.add(**{name: random.uniform(-1, 1, shape) for name, shape in shapes.items()})
    learn = module.CudaGraph(lambda with_policy: agent.update(*buffer.sample(64), with_policy), graphed)
    losses = [learn(with_policy=i % 4 != 3)["losses/qf1_loss"].item() for i in range(updates)]
    return agent, torch.tensor(losses)


@needs_cuda
@pytest.mark.parametrize(
    ("script", "options"), [*CASES, *((script, flags | {"compile": True}) for script, flags in COMPILED)]
)
def test_graphed_training_equals_eager_training(script, options, deterministic):
    (eager, eager_losses), (graphed, graphed_losses) = (trained(script, options, flag) for flag in (False, True))
    torch.testing.assert_close(graphed_losses, eager_losses, rtol=1e-3, atol=1e-4)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(graphed.state_dict()[name], value, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize(("script", "options"), COMPILED)
def test_compiled_training_equals_eager_training(script, options):
    """With the same random numbers; a low temperature, or a high learning rate, would magnify their roundings."""
    module, agents, metrics = importlib.import_module(script), [], []
    numbers = torch.rand(60, 5, 32, 11, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for compiled in (False, True):
        torch.manual_seed(0)
        args = module.Args(alpha=10.0, compile=compiled, **options)
        agent = module.Agent(11, 3, args, torch.device("cpu"))
        agents.append(agent)
        metrics.append([])
        for i, (obs, actions, rewards, terminations, next_obs) in enumerate(numbers):
            batch = obs, actions[:, :3], rewards[:, 0], (terminations[:, 0] > 0.8).float(), next_obs
            metrics[-1].append(agent.update(*batch, with_policy=i % args.policy_frequency == 0))
        assert ("update" in vars(agent)) == compiled
    torch.testing.assert_close(metrics[1], metrics[0], rtol=1e-4, atol=1e-4)
    for name, value in agents[0].state_dict().items():
        torch.testing.assert_close(agents[1].state_dict()[name], value, rtol=1e-4, atol=1e-4, msg=name)


@needs_cuda
def test_replays_draw_fresh_noise_and_obey_the_seed():
    module = importlib.import_module("sac_continuous")
    draw = module.CudaGraph(lambda x: x + torch.randn(1000, device="cuda"), enabled=True)
    zeros = torch.zeros(1000, device="cuda")
    samples = [draw(zeros).clone() for _ in range(20)]
    assert len({sample[0].item() for sample in samples}) == 20
    assert abs(torch.stack(samples[4:]).std().item() - 1) < 0.05
    again = []
    for _ in range(2):
        torch.manual_seed(7)
        again.append(draw(zeros).clone())
    assert torch.equal(*again)
    assert torch.equal(draw(zeros + 5) > 0, torch.ones(1000, dtype=torch.bool, device="cuda"))


class FakeGraph(contextlib.AbstractContextManager):
    """What CudaGraph needs of torch.cuda, on the CPU: recording runs the function once, replaying does nothing."""

    def __init__(self, monkeypatch, fails=False):
        self.fails, self.replays = fails, 0
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: self)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: self)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())

    def __enter__(self):
        if self.fails:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def __exit__(self, *error):
        pass

    def wait_stream(self, stream):
        pass

    def replay(self):
        self.replays += 1


def test_there_is_a_graph_for_each_combination_of_flags_and_shapes(monkeypatch):
    fake, calls = FakeGraph(monkeypatch), []
    double = sac_continuous.CudaGraph(lambda x, sign: calls.append(sign) or 2 * sign * x, enabled=True)
    for n in (3, 4):
        for sign in (1, -1):
            for i in range(double.warmup + 3):
                found = double(torch.full((n,), float(i)), sign=sign)
                if i < double.warmup:
                    assert torch.equal(found, torch.full((n,), 2.0 * sign * i))
            # A graph that is replayed sees what was copied to where it was recorded.
            _, (recorded,), outputs = double.graphs[("sign", sign), torch.Size([n])]
            assert outputs is found and torch.equal(recorded, torch.full((n,), double.warmup + 2.0))
    assert len(calls) == 4 * (double.warmup + 1) and fake.replays == 4 * 3


@pytest.mark.parametrize("script", ["sac_continuous", "mfpo_continuous", "smfp_continuous"])
def test_a_graph_that_cannot_be_recorded_costs_one_warning_and_no_run(script, tmp_path, monkeypatch, capsys):
    """Of the same numbers as the run that never tries."""
    module, weights = importlib.import_module(script), []
    monkeypatch.chdir(tmp_path)
    line = ["--env-id", "Pendulum-v1", "--total-timesteps", "80", "--learning-starts", "40", "--batch-size", "8"]
    line += ["--policy-frequency", "2", "--eval-frequency", "30", "--eval-episodes", "2", "--eval-max-steps", "20"]
    for fails in (True, False):
        module.warn.cache_clear()
        if fails:
            FakeGraph(monkeypatch, fails=True)
            graph = module.CudaGraph
            monkeypatch.setattr(module, "CudaGraph", lambda function, enabled, graph=graph: graph(function, True))
        else:
            monkeypatch.undo()
            monkeypatch.chdir(tmp_path)
        module.train(module.parse_args([*line, "--exp-name", f"fails_{fails}"]))
        said = capsys.readouterr().out.count("a CUDA graph cannot be recorded, so the run goes on without (CUDA error")
        assert said == fails
        (run,) = (tmp_path / "runs").glob(f"*fails_{fails}*")
        weights.append(torch.load(run / "checkpoint.pt", weights_only=True)["agent"])
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@needs_cuda
@pytest.mark.parametrize("script", ["sac_continuous", "mfpo_continuous", "smfp_continuous"])
def test_a_run_records_acts_evaluates_and_is_resumed(script, tmp_path, monkeypatch, capsys):
    """With updates of both kinds."""
    module = importlib.import_module(script)
    monkeypatch.chdir(tmp_path)
    line = ["--env-id", "Pendulum-v1", "--total-timesteps", "120", "--learning-starts", "40", "--batch-size", "8"]
    line += ["--policy-frequency", "2", "--eval-frequency", "30", "--eval-episodes", "2"]
    module.train(module.parse_args(line))
    (run,) = (tmp_path / "runs").iterdir()
    module.train(module.parse_args(["--resume", str(run), "--total-timesteps", "240"]))
    assert "cannot be recorded" not in capsys.readouterr().out
    saved = torch.load(run / "checkpoint.pt", weights_only=True, map_location="cpu")
    assert saved["global_step"] == 240 and saved["num_updates"] == 200
    assert all(value.isfinite().all() for value in saved["agent"].values())
