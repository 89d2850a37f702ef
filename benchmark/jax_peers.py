"""What adapters of JAX peers (benchmark/peers/) share. It needs nothing but the peer's own JAX and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
from rounds import answer_rounds


def strong(state):
    """A state whose numbers keep their types from the first update on, so that JAX compiles each update only once."""
    return jax.tree.map(lambda x: jnp.array(x, jnp.asarray(x).dtype), state)


def time_learner(agent, obs_dim: int, action_dim: int, network: str, steps: int, **options) -> None:
    """Answer rounds with an agent of jaxrl5, the library that MaxEntDP's and MFPO's authors build on, on random data.

    A call of `agent` returns its successor. `network` names the one to wait for, `options` go to every update.
    """
    learner, rng = type(agent), np.random.default_rng(0)
    buffer = {
        "observations": rng.normal(size=(10_000, obs_dim)),
        "next_observations": rng.normal(size=(10_000, obs_dim)),
        "actions": rng.uniform(-1, 1, size=(10_000, action_dim)),
        "rewards": rng.normal(size=10_000),
        "masks": np.ones(10_000),
    }
    buffer = {name: value.astype(np.float32) for name, value in buffer.items()}

    def update():
        nonlocal agent
        rows = rng.integers(10_000, size=256)
        agent, _ = agent.update({name: value[rows] for name, value in buffer.items()}, **options)

    def act(method):
        nonlocal agent
        action, agent = method(agent, buffer["observations"][0])
        return np.asarray(action)

    answer_rounds(
        update=update,
        action=lambda: act(learner.sample_actions),
        best_action=lambda: act(learner.eval_actions),
        wait=lambda: jax.block_until_ready(getattr(agent, network).params),
        facts=lambda: {"steps": steps},
    )
