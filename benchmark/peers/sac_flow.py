"""Times the authors' own SAC Flow-T (JAX) from your checkout of github.com/Elessar123/SAC-FLOW, commit 3df8b9d.

    python -m venv FLOW && FLOW/bin/pip install jax==0.6.2 flax==0.10.7 gymnasium==0.29.1 tyro==1.0.17 \\
        tensorboard==2.21.0 torch==2.13.0
    python benchmark/speed.py --peer "sac_continuous:SAC-Flow=FLOW/bin/python benchmark/peers/sac_flow.py CHECKOUT"

Its setup page asks for this flax and for a new JAX; torch holds the replay buffer. Its own defaults are used, with the
batch of 512 and one update of the critics per step and one of the actor after every third. Only the buffer is smaller.
"""

# ruff: noqa: E402 (the checkout must be on the path before it is imported from)
import os
import runpy
import sys
import tempfile
from contextlib import chdir, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

checkout, obs_dim, action_dim = Path(sys.argv[1]).resolve(), int(sys.argv[2]), int(sys.argv[3])
sys.path[:0] = [str(checkout), str(Path(__file__).parent.parent)]

import gymnasium as gym
import jax
import numpy as np
from jax_peers import strong
from rounds import answer_rounds


class Sizes(gym.Env):
    """The spaces of a task; nothing is played."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float64)  # as MuJoCo's tasks have it
    action_space = gym.spaces.Box(-1, 1, (action_dim,), np.float32)

    def reset(self, *, seed=None, options=None):
        return np.zeros(obs_dim), {}


gym.register("Sizes-v0", Sizes, disable_env_checker=True)
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # as the script sets it
jax.devices()  # chooses the device before the script hides every GPU but its authors' third
script = checkout / "from_scratch_code" / "SAC_flow_transformer_jax.py"
sys.argv[1:] = ["--env-id", "Sizes-v0", "--no-track", "--total-timesteps", "0", "--buffer-size", "10000"]
with tempfile.TemporaryDirectory() as folder, chdir(folder), redirect_stdout(sys.stderr):
    # its functions are made where it trains, so it runs, for no step
    run = SimpleNamespace(**runpy.run_path(str(script), run_name="__main__"))


run.qf_state = strong(run.update_target(run.qf_state, run.args.tau))
run.actor_state, run.alpha_state = strong(run.actor_state), strong(run.alpha_state)
rng = np.random.default_rng(0)
for _ in range(10_000):
    obs, next_obs = rng.normal(size=(2, 1, obs_dim))
    run.rb.add(obs, next_obs, rng.uniform(-1, 1, (1, action_dim)), rng.normal(size=1), np.zeros(1), [{}])


def act():
    run.key, sample_key = jax.random.split(run.key)
    state = run.actor_state
    action, _ = run.actor_apply_inference(state.params, state.batch_stats, obs, sample_key)
    return np.array(action)[0]


def update():
    data = run.rb.sample(run.args.batch_size)
    rows = [data.observations, data.actions, data.next_observations, data.rewards.flatten(), data.dones.flatten()]
    rows = [values.numpy() for values in rows]
    states = run.actor_state, run.qf_state, run.alpha_state
    run.qf_state, *_, run.key = run.update_critic(*states, *rows, run.key)
    run.qf_state = run.update_target(run.qf_state, run.args.tau)
    run.n_updates += 1
    if run.n_updates % run.args.policy_delay == 0:
        states = run.actor_state, run.qf_state, run.alpha_state
        run.actor_state, run.alpha_state, *_, run.key = run.update_actor_and_alpha(*states, rows[0], run.key)


answer_rounds(
    update=update,
    action=act,  # the script has no evaluation: its returns are of the training episodes
    wait=lambda: jax.block_until_ready((run.actor_state.params, run.qf_state.target_params)),
    facts=lambda: {"steps": run.actor.denoising_steps},
)
