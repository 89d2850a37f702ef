"""benchmark/posture.py against a plain list of what was observed."""

import numpy as np
import pytest
import torch

import sac_continuous as sac
from benchmark.posture import PITCH, VELOCITY, posture


def test_posture_of_the_steps_that_the_ring_still_holds(tmp_path):
    num_envs, size, steps, every = 2, 60, 200, 16
    buffer = sac.ReplayBuffer(size, num_envs, 17, 6, torch.device("cpu"))
    rng, seen = np.random.default_rng(0), []
    for step in range(num_envs, steps + 1, num_envs):
        obs = rng.normal(size=(num_envs, 17), scale=3).astype(np.float32)
        seen.append((step, obs))
        zeros = np.zeros(num_envs, np.float32)
        buffer.add(obs=obs, actions=np.zeros((num_envs, 6)), rewards=zeros, terminations=zeros, next_obs=obs)
    args = {"env_id": "HalfCheetah-v4", "num_envs": num_envs}
    torch.save({"args": args, "buffer": buffer.state_dict(), "global_step": steps}, tmp_path / "checkpoint.pt")

    held = seen[-(size // num_envs) :]
    rows = posture(tmp_path, every)
    lasts = [k for k in range(every, steps + 1, every) if held[0][0] <= k - every + num_envs]
    assert 2 <= len(lasts) < steps // every
    assert [row["step"] for row in rows] == lasts
    for row in rows:
        chosen = np.concatenate([obs for step, obs in held if row["step"] - every < step <= row["step"]])
        turned = [abs((angle + np.pi) % (2 * np.pi) - np.pi) > np.pi / 2 for angle in chosen[:, PITCH]]
        assert row["upside_down"] == pytest.approx(np.mean(turned))
        assert row["velocity"] == pytest.approx(chosen[:, VELOCITY].mean(), rel=1e-5)


def test_other_runs_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        posture(tmp_path, 10)
    torch.save({"args": {"env_id": "Hopper-v4"}, "buffer": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit):
        posture(tmp_path, 10)
    missing, other = capsys.readouterr().err.splitlines()
    assert "no checkpoint.pt" in missing and "Hopper-v4" in other
