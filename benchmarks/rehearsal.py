"""What the benchmark does on a GPU, on a CPU: the CUDA backend on emulated kernels, wall clocks. Figures mean nothing.

It shows, on a machine without a GPU, that the benchmark's cases, contenders and checks work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.contenders import Case, Operation
from tests.cuda.emulated_cupy import StandIn, emulated_cupy

SHAPES = ((32, 6, 5), (16, 6, 5, 8, 3))
"""Instead of the standard ones: a convolution and a RoI pooling."""

STAND_IN = StandIn()


@contextmanager
def rehearse() -> Iterator[None]:
    """Within, arrays of `STAND_IN` are computed by the CUDA backend on emulated kernels."""
    with emulated_cupy():
        yield


class RehearsalMeter:
    """Goes through the motions of the meter of a GPU."""

    def start(self, case: Case) -> None: ...

    def clock(self, call: Callable[[], object]) -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    def host_seconds(self, call: Callable[[], object]) -> float | None:
        return self.clock(call)

    def peak_extra_bytes(
        self, operation: Operation, case: Case, contender: str, direction: str, call: Callable[[], Any]
    ) -> int | None:
        return None
