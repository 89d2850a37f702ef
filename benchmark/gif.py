"""A trained policy as a small moving picture.

    MUJOCO_GL=egl python benchmark/gif.py benchmark/weights/smfp_halfcheetah.pt

Plays one episode as in an evaluation, prints its return and writes <model>.gif. Without a GPU, `apt-get install
libosmesa6` and MUJOCO_GL=osmesa will do. Needs `pip install -r requirements-dev.txt`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import gymnasium as gym
import mujoco
import torch
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmark.density import load_agent


@dataclass
class Args:
    model: Annotated[Path, tyro.conf.Positional]
    """a model.pt or checkpoint.pt"""
    start: int = 100
    """the first step that is shown"""
    frames: int = 60
    """frames"""
    every: int = 1
    """environment steps per frame"""
    milliseconds: int = 50
    """how long a frame is shown"""
    size: tuple[int, int] = (240, 160)
    """width and height in pixels"""
    colors: int = 32
    """colours, the same in all frames"""
    seed: int = 1
    """seed of the episode"""


class Film(gym.Wrapper):
    """Keeps the pictures of the steps that `args` name."""

    def __init__(self, env: gym.Env, args: Args):
        super().__init__(env)
        self.size, self.shown = args.size, range(args.start, args.start + args.frames * args.every, args.every)
        self.steps, self.frames = 0, []
        # Gymnasium's cameras stand still, and animals run out of the picture. -1 is one, for tasks without this one.
        if hasattr(env.unwrapped, "mujoco_renderer"):
            camera = mujoco.mj_name2id(env.unwrapped.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
            env.unwrapped.mujoco_renderer.camera_id = camera

    def step(self, action):
        if self.steps in self.shown:
            self.frames.append(crop(Image.fromarray(self.render()), self.size))
        self.steps += 1
        return super().step(action)


def play(args: Args) -> tuple[list[Image.Image], float]:
    """The frames, and the return of the whole episode."""
    script, agent, trained, _ = load_agent(args.model)
    film = Film(script.make_env(trained.env_id, render=True), args)
    device = torch.device("cpu")
    (total,) = script.evaluate(agent.eval_actions, [film], args.seed, device, trained.eval_max_steps)
    return film.frames, total


def crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The lower middle of a picture, where the animals are, in the proportions of `size`, shrunk to it."""
    width, height = image.size
    scale = min(width / size[0], height / size[1])
    left = (width - scale * size[0]) / 2
    return image.crop((left, height - scale * size[1], width - left, height)).resize(size, Image.Resampling.LANCZOS)


def main(args: Args) -> None:
    frames, total = play(args)
    if not frames:
        sys.exit(f"gif.py: error: --start is {args.start}, and the episode had ended")
    sheet = Image.new("RGB", (args.size[0], args.size[1] * len(frames)))  # one palette for all
    for i, frame in enumerate(frames):
        sheet.paste(frame, (0, i * args.size[1]))
    palette = sheet.quantize(args.colors, Image.Quantize.MAXCOVERAGE)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    out = args.model.with_suffix(".gif")
    frames[0].save(out, save_all=True, append_images=frames[1:], duration=args.milliseconds, loop=0, optimize=True)
    print(f"{out}: {len(frames)} frames, {out.stat().st_size / 1000:.0f} kB; the episode's return is {total:.0f}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
