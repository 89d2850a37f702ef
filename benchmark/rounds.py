"""The protocol between benchmark/speed.py and the processes that it times (no packages needed, so peers can use it).

A process prints one line of JSON when it is ready; then, for each line on its input, it runs one round and prints the
seconds that one update, one action and one evaluation action took in it. Between rounds it sleeps, so that the
processes of a comparison take turns on a machine and drift cancels.
"""

import json
import resource
import sys
import time


def seconds_per_call(function, wait, duration: float) -> float:
    """Mean seconds of a call of `function`, over calls that fill `duration` seconds; `wait` ends what is under way.

    The number of calls is a multiple of 3, for peers that update their policy every third time.
    """
    calls, begin = 0, time.perf_counter()
    while calls == 0 or calls % 3 or time.perf_counter() - begin < duration:
        function()
        calls += 1
    wait()
    return (time.perf_counter() - begin) / calls


def answer_rounds(
    *, action, update=None, best_action=None, wait=lambda: None, facts=dict, duration: float = 2.0
) -> None:
    """Warm up, then answer one round for each line on the input.

    `action` plays one training action, from a NumPy observation to a NumPy action; `update` is one step of training as
    a whole; `best_action` plays an evaluation action, where that is another one. What is None is not timed. `facts()`
    returns what else to report in each round, such as the network evaluations of an action, `steps`.
    """
    # The update first: after it a JAX peer may compile its action once more, and that belongs to the warming up.
    timed = {
        "update": (update, duration),
        "action": (action, duration / 10),
        "best_action": (best_action, duration / 10),
    }
    timed = {name: what for name, what in timed.items() if what[0] is not None}
    for function, _ in timed.values():
        seconds_per_call(function, wait, duration / 2)
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        seconds = {name: seconds_per_call(function, wait, length) for name, (function, length) in timed.items()}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(seconds | {"peak_memory": peak} | facts()), flush=True)
