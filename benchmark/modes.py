"""What lets SMFP's policy keep several modes: its flags, with the exact reward in the critics' place.

    python benchmark/modes.py --out benchmark/results/modes/modes

Only the policy learns, on the tasks of tests/multigoal.py at alpha = 1, so that nothing but the policy's own objective
is judged. Prints a line for each variant and writes <out>.csv: total variation to the optimum and the share of each
goal (optimum: 0.25 each; 0.6, 0.3, 0.1), the spread of the policy's mean over latents and its sigma, before the tanh.
About a minute a line on one thread.
"""

import csv
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import sac_continuous
import smfp_continuous
from benchmark.density import figures, histogram
from tests.multigoal import TASKS, ExactQ, boltzmann

SMFP = {  # M = 5, lambda = 1 and c = 1 unless named
    "lambda = 1": "--kl-coef 1",
    "lambda = 0": "--kl-coef 0",
    "lambda = 0.1": "--kl-coef 0.1",
    "lambda = 3": "--kl-coef 3",
    "M = 1": "--kl-coef 1 --latents 1",
    "M = 16": "--kl-coef 1 --latents 16",
    "M = 16, lambda = 0.1": "--kl-coef 0.1 --latents 16",
    "c = 0": "--kl-coef 1 --meanflow-coef 0",
    "c = 10": "--kl-coef 1 --meanflow-coef 10",
    "no mirror-descent weights": "--kl-coef 1 --no-mirror-descent-weights",
}


@dataclass
class Args:
    out: Path = Path("modes")
    """the CSV, without its ending"""
    updates: int = 2_400
    """updates of the policy"""
    batch_size: int = 64
    """states per update, all the same one"""
    policy_lr: float = 1e-3
    """learning rate of the policy; the scripts' is 3e-4, for more updates"""
    seed: int = 1
    """seed of the networks and the noise"""
    variants: tuple[str, ...] = ("SAC", *SMFP)
    """what to train: SAC, or names of SMFP's variants (see SMFP above)"""


def train(module, flags: list[str], goals, args: Args) -> dict[str, float]:
    """Figures of a policy after `args.updates` updates on the goals."""
    torch.manual_seed(args.seed)
    flags = [*flags, "--no-autotune", "--alpha", "1", "--policy-lr", str(args.policy_lr)]
    agent = module.Agent(1, 2, module.parse_args(flags), torch.device("cpu"))
    agent.qf1 = agent.qf2 = ExactQ(goals)
    for _ in range(args.updates):
        metrics = agent.update_policy(torch.zeros(args.batch_size, 1), torch.tensor(1.0))
    found = figures(histogram(agent, 100_000, 16), boltzmann(1.0, goals), goals)
    torch.manual_seed(args.seed)
    diagnostics = agent.diagnostics(torch.zeros(2_000, 1))
    sigma = metrics.get("diagnostics/sigma", torch.tensor(diagnostics.get("diagnostics/policy_std", 0.0))).item()
    return found | {"latent spread": diagnostics.get("diagnostics/latent_spread", 0.0), "sigma": sigma}


def main(args: Args) -> None:
    if unknown := set(args.variants) - {"SAC", *SMFP}:
        sys.exit(f"modes.py: error: --variants: there is no {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    smfp_continuous.keep_freed_memory()
    rows = []
    print(
        "| task | policy | total variation | goals | latent spread | sigma | seconds |\n" + "|-" * 7 + "|", flush=True
    )
    for task, goals in TASKS.items():
        for name in args.variants:
            begin = time.perf_counter()
            module, flags = (sac_continuous, "") if name == "SAC" else (smfp_continuous, SMFP[name])
            found = train(module, shlex.split(flags), goals, args)
            task_name = task.split(":")[1]
            rows.append({"task": task_name, "policy": name, "flags": flags, "seed": args.seed} | found)
            shares = ", ".join(f"{value:.2f}" for key, value in found.items() if key.startswith("goal "))
            cells = [task_name, name if name == "SAC" else f"SMFP, {name}", f"{found['total variation']:.2f}", shares]
            cells += [f"{found['latent spread']:.2f}", f"{found['sigma']:.2f}", f"{time.perf_counter() - begin:.0f}"]
            print("| " + " | ".join(cells) + " |", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{x:.4f}" if isinstance(x, float) else x for key, x in row.items()} for row in rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
