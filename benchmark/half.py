"""A trained policy in half the bytes: the weights of a model.pt or checkpoint.pt rounded to half precision.

    python benchmark/half.py runs/<run>/model.pt benchmark/weights/<name>.pt

Nothing but weights and arguments is kept. `--evaluate` plays them as before; PyTorch widens the weights as it loads
them. Rounding changes an action by about a part in a thousand, so evaluate both files before you publish one.
"""

from pathlib import Path
from typing import Annotated

import torch
import tyro


def half(agent: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The float32 weights of `agent` in half precision; what shares its memory, as CrossQ's critics do, still does.

    Raises ValueError where a weight is too large.
    """
    rounded = {}  # by address and shape

    def round_one(x):
        if x.dtype != torch.float32:
            return x
        y = rounded.setdefault((x.data_ptr(), x.shape), x.half())
        if not torch.equal(y.isfinite(), x.isfinite()):
            raise ValueError(f"{x.abs().max():.6g} is too large for half precision, which ends at 65504")
        return y

    return {name: round_one(x) for name, x in agent.items()}


def main(model: Annotated[Path, tyro.conf.Positional], out: Annotated[Path, tyro.conf.Positional]) -> None:
    saved = torch.load(model, map_location="cpu", weights_only=True)
    torch.save({"args": saved["args"], "agent": half(saved["agent"])}, out)
    print(f"{model}: {model.stat().st_size / 1e6:.2f} MB, {out}: {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
