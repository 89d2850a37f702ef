"""How fast does MFPO's policy follow its critics? They stand still here, while the policy learns.

    OMP_NUM_THREADS=1 python benchmark/frozen.py runs/<run> ... --out benchmark/results/ablations/frozen

Each variant goes on from a run's checkpoint for some updates of the policy and of the divergence network, with states
from the replay buffer, the run's temperature and the same seed. At 48 of the last states before the checkpoint the
critics value 32 of the policy's actions and their mean. The variant "gradient" is a yardstick: it ascends Q by its
derivative, through the sampler, with 4 actions per state and a new optimiser. Writes <out>.csv and prints it: values of
Q beyond the ones at the start, the actions' standard deviation, the policy's exact entropy, and the CPU time of an
update. Networks run eagerly.
"""

import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import mfpo_continuous as mfpo
from benchmark.likelihood_lag import CPU, each_variant, load_run
from benchmark.table import write_csv

POOLED = {"combination": "pooled"}
EIGHT = {"noised_actions": 8, "gaussian_proposals": 4}
VARIANTS = {  # flags that differ from the run's
    "as it was": {},
    "learning rate 1e-3": {"learning_rate": 1e-3},
    "256 states": {"policy_batch_size": 256},
    "pooled": POOLED,
    "8 noised actions": EIGHT,
    "8 noised actions, pooled": EIGHT | POOLED,
    "8 noised actions, pooled, learning rate 1e-3": EIGHT | POOLED | {"learning_rate": 1e-3},
    "gradient": None,
}


@dataclass
class Args:
    runs: Annotated[list[Path], tyro.conf.Positional]
    """folders of runs of mfpo_continuous.py, with their checkpoints"""
    out: Path = Path("frozen")
    """the CSV, without its ending"""
    updates: int = 200
    """updates of the policy that each variant makes"""
    variants: tuple[str, ...] = tuple(VARIANTS)
    seed: int = 0


def ascend(agent: mfpo.Agent, obs: torch.Tensor) -> None:
    """One step of the policy up the derivative of Q at its actions, which a penalty keeps in the box."""
    noise = torch.randn(len(obs), 4, agent.action_dim)
    actions = agent.sampler(obs[:, None], noise)[0]
    inside = actions.clamp(-1, 1)
    q = agent.q_value(agent.qf1, agent.qf2, obs[:, None], inside)
    agent.actor_optimizer.zero_grad()
    (-q.mean() + (actions - inside).square().sum(-1).mean()).backward()
    agent.actor_optimizer.step()


@torch.no_grad()
def measure(agent: mfpo.Agent, obs: torch.Tensor) -> dict[str, float]:
    """Q of the policy's actions and of their mean, their standard deviation and their exact entropy, at `obs`."""
    noise = torch.randn(len(obs), 32, agent.action_dim)
    actions = agent.sampler(obs[:, None], noise)[0]
    log_prob = mfpo.exact_log_prob(lambda x: agent.sampler(obs[:, None], x)[0], noise)
    actions = actions.clamp(-1, 1)
    q, q_of_mean = (
        agent.q_value(agent.qf1, agent.qf2, obs[:, None], a).mean().item() for a in (actions, actions.mean(1, True))
    )
    std = actions.std(1, correction=0).mean().item()
    return {"q": q, "q of the mean": q_of_mean, "std": std, "entropy": -log_prob.mean().item()}


def follow(run: Path, name: str, args: Args) -> list[dict]:
    """The rows of one variant, at five numbers of updates."""
    torch.manual_seed(args.seed)
    agent, buffer = load_run(run, (VARIANTS[name] or {}) | {"autotune": False})
    agent.qf1.requires_grad_(False), agent.qf2.requires_grad_(False)
    alpha = agent.log_alpha.detach().exp()
    learn = partial(agent.update_policy, alpha=alpha)
    if VARIANTS[name] is None:
        learn = partial(ascend, agent)
        agent.actor.load_state_dict(agent.policy.state_dict())
        agent.slow_actor = None
        agent.actor_optimizer.state.clear()  # it has the scale of another loss
    last = buffer.added - 1 - torch.randint(0, min(buffer.added, 5_000), (48,))
    obs, rows, made, seconds = buffer.rings["obs"][last % buffer.num_rows, 0], [], 0, 0.0
    for updates in (args.updates * part // 8 for part in (0, 1, 2, 4, 8)):
        start = time.process_time()
        for _ in range(updates - made):
            learn(buffer.sample(agent.args.policy_batch_size or agent.args.batch_size)[0])
        seconds += time.process_time() - start
        made = updates
        with mfpo.seeded(1, CPU):
            rows.append({"run": run.name, "variant": name, "updates": made} | measure(agent, obs))
    start = {quantity: rows[0][quantity] for quantity in ("q", "q of the mean")}
    for row in rows:
        row |= {quantity: row[quantity] - value for quantity, value in start.items()}
        row |= {"alpha": alpha.item(), "ms": 1000 * seconds / args.updates}
    return rows


def main(args: Args) -> None:
    rows = []
    for run, name in each_variant(args, VARIANTS):
        rows += follow(run, name, args)
        for row in rows[-5:]:
            print(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else str(v) for k, v in row.items()), flush=True)
    write_csv(args.out, rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
