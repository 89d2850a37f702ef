"""Times the authors' own DACER (JAX) from your checkout of github.com/happy-yan/DACER-Diffusion-with-Online-RL,
commit 848c1f2.

    python -m venv JAX && JAX/bin/pip install jax==0.4.27 jaxlib==0.4.27 dm-haiku==0.0.12 optax==0.2.2 \\
        numpyro==0.15.0 scikit-learn==1.5.0 dill==0.3.8 scipy==1.13.1 numpy==1.26.4
    python benchmark/speed.py --peer "mfpo_continuous:DACER=JAX/bin/python benchmark/peers/dacer.py CHECKOUT"

The networks are those of its training script (three layers of 256 and mish in all of them, 20 diffusion steps), the
rest are its own defaults, with its batch of 256. The script plays 20 environments at once for each update; here an
action is for one observation, as with its --num_vec_envs 0. An evaluation action leaves out the noise that is added
to the sample. Every 10,000th update fits Gaussian mixtures to 256 x 200 actions, beginning with the first one: that
is over when timing begins, so on a CPU updates are timed without it.
"""

# ruff: noqa: E402 (the checkout must be on the path before it is imported from)
import contextlib
import sys
from pathlib import Path

checkout, obs_dim, action_dim = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
sys.path[:0] = [checkout, str(Path(__file__).parent.parent)]

import jax
import jax.numpy as jnp
import numpy as np
from rounds import answer_rounds

with contextlib.redirect_stdout(sys.stderr):  # importing it and making its networks prints
    from relax.algorithm.dacer import DACER
    from relax.network.dacer import create_dacer_net
    from relax.utils.experience import Experience

    net, params = create_dacer_net(
        jax.random.key(0), obs_dim, action_dim, [256] * 3, [256] * 3, lambda x: x * jnp.tanh(jax.nn.softplus(x))
    )
algorithm = DACER(net, params)
rng = np.random.default_rng(0)
buffer = {
    "obs": rng.normal(size=(10_000, obs_dim)),
    "next_obs": rng.normal(size=(10_000, obs_dim)),
    "action": rng.uniform(-1, 1, size=(10_000, action_dim)),
    "reward": rng.normal(size=10_000),
}
buffer = {name: value.astype(np.float32) for name, value in buffer.items()} | {"done": np.zeros(10_000, bool)}
step, seed = 0, jax.random.key(1)
step_keys = jax.jit(lambda step: tuple(jax.random.split(jax.random.fold_in(seed, step))))
keys = step_keys(step)


def update():
    rows = rng.integers(10_000, size=256)
    algorithm.update(keys[1], Experience(**{name: value[rows] for name, value in buffer.items()}))


def act():
    global step, keys
    step += 1
    keys = step_keys(step)  # as in its loop, where one call makes both keys of a step
    return algorithm.get_action(keys[0], buffer["obs"][0])


answer_rounds(
    update=update,  # it waits for its own losses, which it turns into numbers
    action=act,
    best_action=lambda: algorithm.get_deterministic_action(buffer["obs"][0]),
    wait=lambda: jax.block_until_ready(algorithm.state),
    facts=lambda: {"steps": net.num_timesteps},
)
