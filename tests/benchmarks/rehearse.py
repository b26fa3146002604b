"""Rehearsal of the GPU benchmark on a CPU, with emulated kernels: `python -m tests.benchmarks.rehearse`.

It takes the options of `python -m benchmarks` and shows that the cases, contenders and checks work. Its times mean
nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

from benchmarks import contenders
from benchmarks.__main__ import main as benchmark
from benchmarks.operations import Case, Operation
from tests.cuda.emulated_cupy import emulated_cupy


class RehearsalMeter:
    """Wall clock in place of a GPU's meter."""

    shapes = ((32, 6, 5), (16, 6, 5, 8, 3))
    """Shapes of a convolution and of RoI pooling, in place of the standard ones."""

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


def main(arguments: Sequence[str] | None = None) -> int:
    with emulated_cupy() as stand_in, mock.patch.dict(contenders.ON_DEVICE, rehearsal=stand_in.asarray):
        return benchmark(arguments, rehearsal=RehearsalMeter())


if __name__ == "__main__":
    sys.exit(main())
