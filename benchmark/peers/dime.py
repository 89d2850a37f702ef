"""Times the authors' own DIME (JAX) from your checkout of github.com/AnonymousDIMEAuthors/DIME_Submission_ICML,
commit 6df4472.

    python -m venv DIME && DIME/bin/pip install jax==0.4.33 flax==0.9.0 optax==0.1.7 distrax==0.1.5 numpyro==0.15.3 \\
        tensorflow-probability==0.22.1 stable_baselines3==2.1.0 gymnasium==0.29.1 hydra-core==1.3.2 wandb==0.18.5 \\
        scipy==1.11.4 torch==2.13.0 "numpy<2"
    python benchmark/speed.py --peer "sac_continuous:DIME=DIME/bin/python benchmark/peers/dime.py CHECKOUT"

These are the authors' versions but for torch (theirs: 2.4.1; it only holds the replay buffer) and for
tensorflow-probability (theirs: 0.21.0, which cannot be installed together with them in one command). Its own
configuration is used, with its batch of 256 and, for each environment step, two updates of the critics and, after every
third of these, one of the actor. Only the buffer is smaller.
"""

# ruff: noqa: E402 (the checkout must be on the path before it is imported from)
import sys
from pathlib import Path

checkout, obs_dim, action_dim = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
sys.path[:0] = [checkout, str(Path(__file__).parent.parent)]

import gymnasium as gym
import hydra
import jax
import numpy as np
from diffusion.dime import DIME
from jax_peers import strong
from rounds import answer_rounds
from stable_baselines3.common.logger import Logger


class Sizes(gym.Env):
    """The spaces of a task; nothing is played."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (action_dim,), np.float32)


with hydra.initialize_config_dir(str(Path(checkout, "configs").resolve()), version_base=None):
    config = hydra.compose("base", ["alg.buffer_size=10000"])
config = hydra.utils.instantiate(config)
agent = DIME("MlpPolicy", Sizes(), model_save_path=None, save_every_n_steps=1, cfg=config)
agent.set_logger(Logger(None, []))


policy = agent.policy
policy.qf_state = strong(agent.soft_update(agent.tau, policy.qf_state))
policy.actor_state, policy.target_actor_state = strong(policy.actor_state), strong(policy.target_actor_state)
agent.ent_coef_state = strong(agent.ent_coef_state)
rng = np.random.default_rng(0)
for _ in range(10_000):
    obs, next_obs = rng.normal(size=(2, 1, obs_dim))
    agent.replay_buffer.add(obs, next_obs, rng.uniform(-1, 1, (1, action_dim)), rng.normal(size=1), np.zeros(1), [{}])
agent._last_obs = rng.normal(size=(1, obs_dim)).astype(np.float32)  # where the loop keeps it

answer_rounds(
    update=lambda: agent.train(agent.batch_size, agent.gradient_steps),
    action=lambda: agent._sample_action(learning_starts=0)[0][0],  # evaluation's is the same, as noisy
    wait=lambda: jax.block_until_ready((policy.actor_state.params, policy.qf_state.params)),
    facts=lambda: {"steps": policy.actor_model.num_steps},
)
