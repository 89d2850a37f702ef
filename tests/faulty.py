"""A noisy walk with short episodes, and the same with a fault at one step or reset: `--env-id tests.faulty:Walk-v0`."""

import time

import gymnasium as gym
import numpy as np

FAULTS = {  # id: what goes wrong, as the scripts should report it
    "NanReward-v0": "step returned the observation",
    "InfObservation-v0": "step returned the observation [inf,",
    "RaiseInStep-v0": "step raised RuntimeError: the simulator lost its mind",
    "RaiseInReset-v0": "reset raised RuntimeError: the simulator lost its mind",
    "WrongShape-v0": "step returned an observation float32 (2,) instead of float32 (3,)",
    "WrongDtype-v0": "step returned an observation <U4 (3,) instead of float32 (3,)",
    "NoReward-v0": "step raised TypeError",
    "WrongLength-v0": "step raised ValueError: not enough values",
    "OldStep-v0": "step raised ValueError: not enough values",
    "HugeObservation-v0": "step returned the observation [1e+300,",
}


def stall():
    print("stalling", flush=True)
    time.sleep(10)


class Walk(gym.Env):
    """x' = 0.9 x + action + noise in three dimensions, reward -|x|, 20 steps; the fault is at step or reset `when`."""

    observation_space = gym.spaces.Box(-100, 100, (3,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (3,), np.float32)

    def __init__(self, fault="", when=0):
        self.fault, self.when = fault, when
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
                case "InfObservation-v0":
                    obs[0] = np.inf
                case "RaiseInStep-v0":
                    raise RuntimeError("the simulator lost its mind\nand has more to say")
                case "WrongShape-v0":
                    obs = obs[:2]
                case "WrongDtype-v0":
                    obs = np.array(["left", "0", "0"])
                case "NoReward-v0":
                    reward = None
                case "WrongLength-v0":
                    return ()
                case "OldStep-v0":
                    return obs, reward, False, {}
                case "HugeObservation-v0":
                    obs = obs.astype(np.float64)
                    obs[0] = 1e300
                case "Stall-v0":
                    stall()
                case "StallInEvaluation-v0" if self.resets == 3:  # in the training environment it is the fourth
                    stall()
        return obs, reward, False, self.length == 20, {}


def broken():
    raise AttributeError("the simulator has changed\nand has more to say")


gym.register("Walk-v0", Walk)
gym.register("Broken-v0", broken)
for name in FAULTS:
    when = 7 if name == "RaiseInReset-v0" else 130
    gym.register(name, Walk, kwargs={"fault": name, "when": when}, disable_env_checker=True)
for name, when in (("Stall-v0", 130), ("StallInEvaluation-v0", 50)):
    gym.register(name, Walk, kwargs={"fault": name, "when": when}, disable_env_checker=True)
