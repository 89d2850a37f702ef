"""What lets a policy keep several modes: the flags of SMFP and of MFPO, with the exact reward in the critics' place.

    python benchmark/modes.py --out benchmark/results/modes/modes

Only the policy learns, on the tasks of tests/multigoal.py at alpha = 1, so that nothing but the policy's own objective
is judged. Prints a line for each variant and writes <out>.csv: total variation to the optimum and the share of each
goal (optimum: 0.25 each; 0.6, 0.3, 0.1). Of SAC and SMFP also sigma and the spread of the mean over latents, before the
tanh; of MFPO the bias of its log pi, in nats. About a minute a line on one thread, of MFPO three to five.
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
import mfpo_continuous
import sac_continuous
import smfp_continuous
from benchmark.density import figures, histogram
from tests.multigoal import TASKS, ExactQ, boltzmann

UNIFORM = "--time-distribution uniform --data-proportion 0.25"
POLICIES = {  # name: script and flags
    "SAC": (sac_continuous, ""),  # SMFP has M = 5, lambda = 1 and c = 1 unless named
    "SMFP, lambda = 1": (smfp_continuous, "--kl-coef 1"),
    "SMFP, lambda = 0": (smfp_continuous, "--kl-coef 0"),
    "SMFP, lambda = 0.1": (smfp_continuous, "--kl-coef 0.1"),
    "SMFP, lambda = 3": (smfp_continuous, "--kl-coef 3"),
    "SMFP, M = 1": (smfp_continuous, "--kl-coef 1 --latents 1"),
    "SMFP, M = 16": (smfp_continuous, "--kl-coef 1 --latents 16"),
    "SMFP, M = 16, lambda = 0.1": (smfp_continuous, "--kl-coef 0.1 --latents 16"),
    "SMFP, c = 0": (smfp_continuous, "--kl-coef 1 --meanflow-coef 0"),
    "SMFP, c = 10": (smfp_continuous, "--kl-coef 1 --meanflow-coef 10"),
    "SMFP, no mirror-descent weights": (smfp_continuous, "--kl-coef 1 --no-mirror-descent-weights"),
    "MFPO": (mfpo_continuous, ""),
    "MFPO, map": (mfpo_continuous, "--likelihood map"),
    "MFPO, exact": (mfpo_continuous, "--likelihood exact"),
    "MFPO, map, pooled": (mfpo_continuous, "--likelihood map --combination pooled"),
    "MFPO, exact, pooled": (mfpo_continuous, "--likelihood exact --combination pooled"),
    "MFPO, Gaussian proposal alone": (mfpo_continuous, "--likelihood map --proposals gaussian"),
    "MFPO, map, uniform times": (mfpo_continuous, f"--likelihood map {UNIFORM}"),
    "MFPO, map, pooled, uniform times": (mfpo_continuous, f"--likelihood map --combination pooled {UNIFORM}"),
    "MFPO, the same, 8 noised actions": (
        mfpo_continuous,
        f"--likelihood map --combination pooled {UNIFORM} --noised-actions 8 --gaussian-proposals 4",
    ),
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
    """learning rate of the policy and, in MFPO, of the divergence network; SAC and MFPO have 3e-4, for more updates"""
    seed: int = 1
    """seed of the networks and the noise"""
    variants: tuple[str, ...] = tuple(POLICIES)
    """what to train: names of POLICIES above"""
    tasks: tuple[str, ...] = tuple(task.split(":")[1] for task in TASKS)
    """on what"""


def train(module, flags: list[str], goals, args: Args) -> dict[str, float]:
    """Figures of a policy after `args.updates` updates on the goals."""
    torch.manual_seed(args.seed)
    rate = "--learning-rate" if module is mfpo_continuous else "--policy-lr"
    flags = [*flags, "--no-autotune", "--alpha", "1", rate, str(args.policy_lr)]
    agent = module.Agent(1, 2, module.parse_args(flags), torch.device("cpu"))
    exact_q = ExactQ(goals)
    if module is mfpo_continuous:  # whose own critics are distributions
        agent.q_value = lambda qf1, qf2, obs, actions: exact_q(obs, actions)
    else:
        agent.qf1 = agent.qf2 = exact_q
    for _ in range(args.updates):
        metrics = agent.update_policy(torch.zeros(args.batch_size, 1), torch.tensor(1.0))
    found = figures(histogram(agent, 100_000, 16), boltzmann(1.0, goals), goals)
    torch.manual_seed(args.seed)
    diagnostics = agent.diagnostics(torch.zeros(2_000, 1))
    if module is mfpo_continuous:  # the exact likelihood has no network whose error there is to know
        return found | {"bias": diagnostics.get("diagnostics/adn_log_prob_bias", 0.0)}
    sigma = metrics.get("diagnostics/sigma", torch.tensor(diagnostics.get("diagnostics/policy_std", 0.0))).item()
    return found | {"latent spread": diagnostics.get("diagnostics/latent_spread", 0.0), "sigma": sigma}


def main(args: Args) -> None:
    if unknown := set(args.variants) - POLICIES.keys():
        sys.exit(f"modes.py: error: --variants: there is no {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    smfp_continuous.keep_freed_memory()
    rows = []
    heads = ["task", "policy", "total variation", "goals", "latent spread", "sigma", "bias", "seconds"]
    print("| " + " | ".join(heads) + " |\n" + "|-" * len(heads) + "|", flush=True)
    for task, goals in TASKS.items():
        task = task.split(":")[1]
        for name in args.variants if task in args.tasks else ():
            begin = time.perf_counter()
            module, flags = POLICIES[name]
            found = train(module, shlex.split(flags), goals, args)
            rows.append({"task": task, "policy": name, "flags": flags, "seed": args.seed} | found)
            shares = ", ".join(f"{value:.2f}" for key, value in found.items() if key.startswith("goal "))
            others = [f"{found[key]:.2f}" if key in found else "" for key in ("latent spread", "sigma", "bias")]
            cells = [task, name, f"{found['total variation']:.2f}", shares, *others]
            print("| " + " | ".join([*cells, f"{time.perf_counter() - begin:.0f}"]) + " |", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{x:.4f}" if isinstance(x, float) else x for key, x in row.items()} for row in rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
