"""Contenders timed in turn, so that a noisy minute of the machine hits all of them alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

_LEAST_ROUNDS = 3
_MOST_ROUNDS = 100


@dataclass
class Timing:
    """Durations of one contender in seconds."""

    samples: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        return {
            "median_ms": 1e3 * statistics.median(self.samples),
            "min_ms": 1e3 * min(self.samples),
            "max_ms": 1e3 * max(self.samples),
            "rounds": len(self.samples),
        }


def interleave(
    calls: Mapping[str, Callable[[], object]],
    clock: Callable[[Callable[[], object]], float],
    seconds: float,
) -> dict[str, Timing]:
    """Rounds A B C A B C ... after one that does not count, at least 3, until `seconds` are spent."""
    timings = {name: Timing() for name in calls}
    for call in calls.values():
        clock(call)
    gc.collect()
    gc.disable()
    try:
        end = time.monotonic() + seconds
        for done in range(_MOST_ROUNDS):
            if done >= _LEAST_ROUNDS and time.monotonic() >= end:
                break
            for name, call in calls.items():
                timings[name].samples.append(clock(call))
    finally:
        gc.enable()
    return timings
