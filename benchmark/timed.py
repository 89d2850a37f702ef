"""The environment `benchmark.timed:Timed-v0`: another one, whose training steps are timed from inside.

It works in any script that makes environments by name, so the loops of two projects are timed alike. Set by the
environment variables TIMED_ENV (the id), TIMED_FROM (step at which timing begins), TIMED_SECONDS (how long it lasts)
and TIMED_FILE: when the time is over, `steps seconds` is written there and the process ends.
"""

import os
import time
from pathlib import Path

import gymnasium as gym


class Timed(gym.Wrapper):
    steps = 0

    def step(self, action):
        self.steps += 1
        now, first = time.perf_counter(), int(os.environ["TIMED_FROM"])
        if self.steps == first:
            self.begin = now
        elif self.steps > first and now - self.begin > float(os.environ["TIMED_SECONDS"]):
            Path(os.environ["TIMED_FILE"]).write_text(f"{self.steps - first} {now - self.begin}")
            os._exit(0)
        return self.env.step(action)


gym.register("Timed-v0", lambda **options: Timed(gym.make(os.environ["TIMED_ENV"], **options)))
