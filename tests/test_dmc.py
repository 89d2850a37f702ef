"""DeepMind Control through shimmy: skipped where requirements-dmc.txt is not installed."""

import numpy as np
import pytest
import torch

import sac_continuous
import smfp_continuous

pytest.importorskip("shimmy")
pytest.importorskip("dm_control")
TASK = "shimmy:dm_control/humanoid-run-v0"


def test_observations_are_flat_and_a_seed_repeats_an_episode():
    env, episodes = sac_continuous.make_env(TASK), []
    assert env.observation_space.shape == (67,) and env.action_space.shape == (21,)
    actions = np.random.default_rng(0).uniform(-1, 1, (20, 21)).astype(np.float32)
    for _ in range(2):
        steps = [sac_continuous.reset(env, 3), *(sac_continuous.step(env, action)[0] for action in actions)]
        assert all(obs.shape == (67,) and obs.dtype == np.float32 for obs in steps)
        episodes.append(np.stack(steps))
    np.testing.assert_array_equal(*episodes)
    assert not np.array_equal(sac_continuous.reset(env, 4), episodes[0][0])


@pytest.mark.parametrize("module", [sac_continuous, smfp_continuous])
def test_training_runs_to_its_end(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = module.Args(env_id=TASK, total_timesteps=60, learning_starts=40, batch_size=16, eval_frequency=0)
    module.train(args)
    (run,) = (tmp_path / "runs").iterdir()
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    assert saved["global_step"] == 60 and saved["num_updates"] == 20
