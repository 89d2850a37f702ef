"""What is left of the bias of MFPO's log pi with --likelihood map: is it lag, and what would more work on delta cost?

    OMP_NUM_THREADS=1 python benchmark/likelihood_lag.py runs/<run> ... --out benchmark/results/likelihood/lag

Each variant goes on from a run's checkpoint for some updates from its replay buffer, the policy included, with the same
seed, and no environment. Every tenth update log pi of the policy's own samples, by the network, is compared with the
exact one of the sampler's map. After a burn-in, the mean difference (bias), the mean of its absolute value (error), in
nats, and the CPU time of an update are written to <out>.csv and printed. Networks run eagerly.
"""

import itertools
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import mfpo_continuous as mfpo
from benchmark.report import fail
from benchmark.speed import machine
from benchmark.table import write_csv

CPU = torch.device("cpu")


@dataclass
class Variant:
    flags: dict
    divergence_updates: int = 1  # of delta for each of the rest; those beyond the first have other states
    divergence_states: int | None = None  # in those beyond the first; None: as many as the policy learns from
    divergence_lr: float = 1.0  # times the run's learning rate


VARIANTS = {
    "none at all": Variant({"likelihood": "map"}, divergence_lr=0),
    "the paper's target": Variant({"likelihood": "adn"}),
    "map": Variant({"likelihood": "map"}),
    "map, learning rate x 3": Variant({"likelihood": "map"}, divergence_lr=3),
    "map, 2 updates": Variant({"likelihood": "map"}, 2),
    "map, 4 updates": Variant({"likelihood": "map"}, 4),
    "map, 2 updates, the second of 256 states": Variant({"likelihood": "map"}, 2, 256),
}


@dataclass
class Args:
    runs: Annotated[list[Path], tyro.conf.Positional]
    """folders of runs of mfpo_continuous.py, with their checkpoints"""
    out: Path = Path("lag")
    """the CSV, without its ending"""
    updates: int = 600
    """updates that each variant makes"""
    burn_in: int = 200
    """of them, those that do not count"""
    variants: tuple[str, ...] = tuple(VARIANTS)
    seed: int = 0


def load_run(run: Path, flags: dict) -> tuple[mfpo.Agent, mfpo.ReplayBuffer]:
    """The agent, with its optimisers, and the replay buffer of a run's checkpoint; eager, with some flags changed."""
    saved, trained = mfpo.load_file(run / "checkpoint.pt", "runs")
    trained = replace(trained, compile=False, **flags)
    obs_dim, action_dim = (saved["buffer"][name].shape[-1] for name in ("obs", "actions"))
    agent = mfpo.Agent(obs_dim, action_dim, trained, CPU)
    agent.load_state_dict(saved["agent"])
    for name, optimizer in mfpo.optimizers(agent).items():
        state = {"state": saved["optimizers"][name]["state"]}
        optimizer.load_state_dict(optimizer.state_dict() | state)
    buffer = mfpo.ReplayBuffer(trained.buffer_size, trained.num_envs, obs_dim, action_dim, CPU)
    buffer.load_state_dict(saved["buffer"])
    return agent, buffer


def go_on(run: Path, variant: Variant, args: Args) -> dict[str, float]:
    """The bias, error and milliseconds of one variant from a run's checkpoint on."""
    torch.manual_seed(args.seed)
    agent, buffer = load_run(run, variant.flags)
    trained, action_dim = agent.args, agent.action_dim
    agent.divergence_optimizer.param_groups[0]["lr"] = variant.divergence_lr * trained.learning_rate
    errors, seconds = [], 0.0
    for i in range(args.updates):
        start = time.process_time()
        batch = buffer.sample(trained.batch_size)
        agent.update(*batch)
        for _ in range(variant.divergence_updates - 1):
            obs = buffer.sample(variant.divergence_states or trained.policy_batch_size or trained.batch_size)[0]
            agent.update_divergence(obs, None)
        seconds += time.process_time() - start
        if i >= args.burn_in and i % 10 == 0:
            with mfpo.seeded(i, CPU), torch.no_grad():
                obs = buffer.sample(64)[0]
                noise = torch.randn(len(obs), action_dim)
                by_network = mfpo.flow_log_prob(agent.divergence, obs, agent.sampler(obs, noise)[1])
                errors.append(by_network - mfpo.exact_log_prob(lambda x, obs=obs: agent.sampler(obs, x)[0], noise))
    errors = torch.cat(errors)
    return {
        "bias": errors.mean().item(),
        "error": errors.abs().mean().item(),
        "ms": 1000 * seconds / args.updates,
        "alpha": agent.log_alpha.exp().item(),
    }


def each_variant(args, known: dict):
    """Refuse variants that are not `known`, print the machine, and yield each run with each variant's name."""
    if unknown := set(args.variants) - set(known):
        fail(f"--variants has {unknown.pop()}; there are {', '.join(known)}")
    print(f"{machine(torch.get_num_threads())}; seed {args.seed}")
    yield from itertools.product(args.runs, args.variants)


def main(args: Args) -> None:
    rows = []
    for run, name in each_variant(args, VARIANTS):
        row = {"run": run.name, "variant": name} | go_on(run, VARIANTS[name], args)
        rows.append(row)
        print(f"{run.name}: {name}: bias {row['bias']:.2f}, error {row['error']:.2f}, {row['ms']:.0f} ms", flush=True)
    write_csv(args.out, rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
