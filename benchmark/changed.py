"""A peer for benchmark/speed.py: one of our scripts with an optimisation taken out, or one put in that was not kept.

    python benchmark/speed.py --peer \\
        "mfpo_continuous:without concat_linear=python benchmark/changed.py mfpo_continuous concat_linear"

Timed in the same rounds as the script itself, it says what the optimisation gains; benchmark/gains.sh does it for all.
A peer's name ends in what is missing, so that the ratios read "1.3 x the updates/s of without concat_linear".
"""

import importlib
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]
from benchmark.speed import work  # noqa: E402


def concat_linear(module) -> None:
    """Without: the inputs of a first layer are expanded to all candidates and concatenated."""

    def forward(self, *inputs):
        shape = torch.broadcast_shapes(*(x.shape[:-1] for x in inputs))
        return F.linear(torch.cat([x.expand(*shape, -1) for x in inputs], -1), self.weight, self.bias)

    module.ConcatLinear.forward = forward


def keep_freed_memory(module) -> None:
    """Without: glibc returns freed memory to the system."""
    module.keep_freed_memory = lambda: None


def fused_adam(module) -> None:
    """Without: Adam as PyTorch runs it by default, one operation per parameter and term on a CPU."""
    adam = torch.optim.Adam
    torch.optim.Adam = lambda *arguments, **options: adam(*arguments, **options | {"fused": False, "capturable": False})


def set_after_set_up(module, owner, name: str, value) -> None:
    """Let `owner.name` be `value` once the script has set PyTorch up."""
    set_up = module.set_up_torch

    def set_up_and_set(args):
        device = set_up(args)
        setattr(owner, name, value)
        return device

    module.set_up_torch = set_up_and_set


def unfilled_memory(module) -> None:
    """Without: each new tensor is filled, as PyTorch's deterministic mode does by default."""
    set_after_set_up(module, torch.utils.deterministic, "fill_uninitialized_memory", True)


def onednn(module) -> None:
    """Without: PyTorch's default library, MKL, multiplies matrices on AMD's processors, too."""
    set_after_set_up(module, torch.backends.mkldnn.matmul, "fp32_precision", "ieee")


def states_by_parts(module) -> None:
    """Put in: MFPO's velocity estimate takes 64 states at a time, for the sake of the processor's cache."""
    whole = module.Agent.estimate_velocity

    def by_parts(self, obs, t, alpha):
        parts = [whole(self, *part, alpha) for part in zip(obs.split(64), t.split(64), strict=True)]
        return module.VelocityEstimate(*map(torch.cat, zip(*parts, strict=True)))

    module.Agent.estimate_velocity = by_parts


def elementary_layer_norm(module) -> None:
    """Put in: LayerNorm's compiled form, eagerly."""

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight + self.bias

    module.LayerNorm.forward = forward


def fused_bias(module) -> None:
    """Without: compiled, a layer's bias is copied into every row, and the product added to it."""
    module.Linear.forward = torch.nn.Linear.forward


def two_pass_variance(module) -> None:
    """Without: compiled, LayerNorm takes mean and variance in one pass, by Welford's method."""
    module.LayerNorm.forward = lambda self, x: (
        F.layer_norm(x, self.normalized_shape, eps=self.eps) * self.weight + self.bias
    )


CHANGES = {
    function.__name__: function
    for function in (
        concat_linear,
        keep_freed_memory,
        fused_adam,
        unfilled_memory,
        onednn,
        states_by_parts,
        elementary_layer_norm,
        fused_bias,
        two_pass_variance,
    )
}
WHEN_COMPILED = (fused_bias, two_pass_variance)  # these differ in the compiled form alone

if __name__ == "__main__":
    script, change, obs_dim, action_dim = sys.argv[1:]
    if change not in CHANGES:
        sys.exit(f"changed.py: error: {change} is not one of {', '.join(CHANGES)}")
    CHANGES[change](importlib.import_module(script))
    work(script, "compiled" if CHANGES[change] in WHEN_COMPILED else "eager", int(obs_dim), int(action_dim), flags=[])
