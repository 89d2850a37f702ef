"""A noisy walk with short episodes, and the same with a fault: `--env-id tests.faulty:Walk-v0`."""

import time

import gymnasium as gym
import numpy as np

NOT_FINITE = {  # id: how the scripts report it
    "NanReward-v0": "FloatingPointError: the environment returned the reward nan",
    "NoReward-v0": "FloatingPointError: the environment returned the reward nan",
    "HugeReward-v0": "FloatingPointError: the environment returned the reward 1e+300",
    "InfObservation-v0": "FloatingPointError: the environment returned the observation [inf,",
    "HugeObservation-v0": "FloatingPointError: the environment returned the observation [inf,",
}
FAULTS = {  # id: the exception
    "RaiseInStep-v0": "RuntimeError: the simulator lost its mind",
    "RaiseInReset-v0": "RuntimeError: the simulator lost its mind",
    "OutOfMemory-v0": "MemoryError",
    "WrongShape-v0": "ValueError: cannot reshape array of size 2 into shape (3,)",
    "WordObservation-v0": "ValueError: could not convert string to float: ",
    "WordReward-v0": "ValueError: could not convert string to float: ",
    "WrongLength-v0": "ValueError: not enough values to unpack",
    "OldStep-v0": "ValueError: not enough values to unpack",
}


def stall():
    print("stalling", flush=True)
    time.sleep(4)


class Walk(gym.Env):
    """x' = 0.9 x + action + noise in three dimensions, reward -|x|, 20 steps; the fault is at step or reset `when`."""

    observation_space = gym.spaces.Box(-100, 100, (3,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (3,), np.float32)

    def __init__(self, fault="", when=0, length=20):
        self.fault, self.when, self.max_length = fault, when, length
        self.steps = self.resets = 0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.resets += 1
        if self.fault == "RaiseInReset-v0" and self.resets == self.when:
            raise RuntimeError("the simulator lost its mind\nand has more to say")
        self.x, self.length = self.np_random.normal(size=3).astype(np.float32), 0
        return self.x.copy(), {}

    def step(self, action):
        self.steps += 1
        self.length += 1
        self.x = (0.9 * self.x + action + 0.1 * self.np_random.normal(size=3)).astype(np.float32)
        obs, reward = self.x.copy(), -float(np.linalg.norm(self.x))
        if self.steps == self.when:
            match self.fault:
                case "NanReward-v0":
                    reward = float("nan")
                case "NoReward-v0":
                    reward = None
                case "HugeReward-v0":
                    reward = 1e300
                case "WordReward-v0":
                    reward = "much"
                case "InfObservation-v0":
                    obs[0] = np.inf
                case "HugeObservation-v0":
                    obs = obs.astype(np.float64)
                    obs[0] = 1e300
                case "WordObservation-v0":
                    obs = np.array(["left", "0", "0"])
                case "RaiseInStep-v0":
                    raise RuntimeError("the simulator lost its mind\nand has more to say")
                case "OutOfMemory-v0":
                    raise MemoryError
                case "WrongShape-v0":
                    obs = obs[:2]
                case "WrongLength-v0":
                    return ()
                case "OldStep-v0":
                    return obs, reward, False, {}
                case "Stall-v0":
                    stall()
                case "StallInEvaluation-v0" if self.resets == 3:  # in the training environment it is the fourth
                    stall()
                case "StallInExploring-v0" if self.resets == 4:  # and here the fifth
                    stall()
        return obs, reward, False, self.length == self.max_length, {}


class Reusing(Walk):
    """Returns one array and one info dictionary, both changed in place, and a reward of shape (1,)."""

    array, info = np.zeros(3, np.float32), {"episode": "mine"}

    def reset(self, seed=None, options=None):
        self.array[:], _ = super().reset(seed=seed)
        return self.array, self.info

    def step(self, action):
        self.array[:], reward, terminated, truncated, _ = super().step(action)
        self.info[f"key {self.steps}"] = np.zeros(self.steps % 3)
        return self.array, np.array([reward]), terminated, truncated, None if self.steps % 2 else self.info


class Single(Walk):
    """Cannot be made a second time."""

    made = 0

    def __init__(self):
        super().__init__()
        type(self).made += 1
        if self.made > 1:
            raise RuntimeError("there is one robot")


class BadClose(Walk):
    def close(self):
        raise RuntimeError("cannot be closed")


class Boxes(Walk):
    """The same with any action space."""

    def __init__(self, low, high, dtype=np.float32):
        super().__init__()
        self.action_space = gym.spaces.Box(np.array(low, dtype), np.array(high, dtype), dtype=dtype)


def broken():
    raise AttributeError("the simulator has changed\nand has more to say")


gym.register("Walk-v0", Walk)
gym.register("Broken-v0", broken)
gym.register("Reusing-v0", Reusing)
gym.register("Single-v0", Single)
gym.register("BadClose-v0", BadClose)
gym.register("Endless-v0", Walk, kwargs={"length": -1})
gym.register("Long-v0", Walk, kwargs={"length": 100})
for name in (*FAULTS, *NOT_FINITE):
    gym.register(name, Walk, kwargs={"fault": name, "when": 7 if name == "RaiseInReset-v0" else 130})
for name, when in (("Stall-v0", 130), ("StallInEvaluation-v0", 50), ("StallInExploring-v0", 70)):
    gym.register(name, Walk, kwargs={"fault": name, "when": when})
BOXES = {
    "Point-v0": ([0, 0], [1, 0]),
    "Whole-v0": ([0], [4], np.int64),
    "Vast-v0": ([0, -3e38], [1, 3e38]),
    "Empty-v0": ([], []),
    "Unbounded-v0": ([-np.inf], [1]),
    "Square-v0": ([[0]], [[1]]),
}
for name, box in BOXES.items():
    gym.register(name, Boxes, kwargs=dict(zip(("low", "high", "dtype"), box, strict=False)))
