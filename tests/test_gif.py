"""What becomes of trained weights: benchmark/gif.py, without a display, and benchmark/half.py."""

import re

import gymnasium as gym
import numpy as np
import pytest
import torch
from PIL import Image

import smfp_continuous
from benchmark import gif, half


class Painted(gym.Wrapper):
    """A picture that is as red as the number of steps since the episode began."""

    def reset(self, **options):
        self.steps = 0
        return self.env.reset(**options)

    def step(self, action):
        self.steps += 1
        return self.env.step(action)

    def render(self):
        picture = np.zeros((48, 64, 3), np.uint8)
        picture[..., 0] = 20 * self.steps
        return picture


@pytest.fixture
def model(tmp_path, monkeypatch):
    make_env = smfp_continuous.make_env
    monkeypatch.setattr(smfp_continuous, "make_env", lambda env_id, render=False: Painted(make_env(env_id)))
    args = smfp_continuous.Args(env_id="InvertedPendulum-v4", eval_candidates=1)
    agent = smfp_continuous.Agent(4, 1, args, torch.device("cpu"))
    torch.save({"args": vars(args), "agent": agent.state_dict()}, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_the_named_steps_of_an_episode_become_frames(model, capsys):
    gif.main(gif.Args(model, start=1, frames=2, every=2, size=(30, 30), milliseconds=40))
    with Image.open(model.with_suffix(".gif")) as image:
        assert image.n_frames == 2 and image.size == (30, 30) and image.info["loop"] == 0
        for frame, red in enumerate((20, 60)):  # steps 1 and 3
            image.seek(frame)
            assert image.info["duration"] == 40
            assert np.array(image.convert("RGB"))[..., 0] == pytest.approx(red, abs=3)
    _, total = gif.play(gif.Args(model))
    assert total >= 3 and f"the episode's return is {total:.0f}" in capsys.readouterr().out


def test_an_episode_that_ends_before_the_first_frame_is_refused(model):
    with pytest.raises(SystemExit, match="--start is 100"):
        gif.main(gif.Args(model))


@pytest.mark.parametrize(("size", "part"), [((20, 20), np.s_[:, 50:150]), ((40, 10), np.s_[50:, :])])
def test_crop_keeps_the_lower_middle_and_the_proportions(size, part):
    picture = np.zeros((100, 200, 3), np.uint8)
    picture[part] = 255  # what is to be kept is white
    assert (np.array(gif.crop(Image.fromarray(picture), size)) == 255).all()


def test_half_precision_is_numpys_and_the_script_plays_it(model, tmp_path, capsys):
    torch.save(torch.load(model, weights_only=True) | {"global_step": 7}, tmp_path / "checkpoint.pt")
    half.main(tmp_path / "checkpoint.pt", tmp_path / "half.pt")
    size, half_size = (float(word) for word in re.findall(r"([0-9.]+) MB", capsys.readouterr().out))
    weights = torch.load(model, weights_only=True)["agent"]
    # By address: CrossQ's critics are their own targets.
    floats = {x.data_ptr(): x.numel() for x in weights.values() if x.is_floating_point()}
    assert size - half_size == pytest.approx(2e-6 * sum(floats.values()), abs=0.02)
    saved, args = smfp_continuous.load_file(str(tmp_path / "half.pt"), "the file")
    assert args.env_id == "InvertedPendulum-v4" and saved.keys() == {"args", "agent"}
    agent = smfp_continuous.Agent(4, 1, args, torch.device("cpu"))
    agent.load_state_dict(saved["agent"])
    for name, value in weights.items():
        expected = value.numpy()
        expected = expected.astype(np.float16).astype(np.float32) if value.is_floating_point() else expected
        np.testing.assert_array_equal(agent.state_dict()[name].numpy(), expected)


def test_a_weight_too_large_for_half_precision_is_named():
    with pytest.raises(ValueError, match="70000 is too large"):
        half.half({"a": torch.tensor([1.0, -70000.0])})
    infinite, whole = torch.tensor([float("inf")]), torch.tensor(70000)
    assert half.half({"a": infinite, "b": whole}) == {"a": infinite, "b": whole}
