"""Rehearsal of the GPU benchmarks on a CPU, with emulated kernels: `python -m tests.benchmarks.rehearse`.

It takes the options of `python -m benchmarks`, or `workspace` and the options of `python -m benchmarks.workspace`. It
shows that the cases, contenders and checks work. Its times mean nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from unittest import mock

from benchmarks import contenders, workspace
from benchmarks.__main__ import main as benchmark
from benchmarks.measure import Meter
from tests.cuda.emulated_cupy import emulated_cupy


class RehearsalMeter(Meter):
    """Wall clock in place of a GPU's meter."""

    shapes = ((32, 3, 2), (16, 6, 5, 4, 2), (5, 4, 3, 2, 2, 3), (2, 8, 5, 4))
    """Shapes of all operations, in place of the standard ones."""
    workspaces = (2**13, 2**20)

    def host_seconds(self, call: Callable[[], object]) -> float | None:
        return self.clock(call)


def main(arguments: Sequence[str] | None = None) -> int:
    options = list(sys.argv[1:] if arguments is None else arguments)
    run = benchmark
    if options[:1] == ["workspace"]:
        run = workspace.main
        del options[0]
    with emulated_cupy() as stand_in, mock.patch.dict(contenders.ON_DEVICE, rehearsal=stand_in.asarray):
        return run(options, rehearsal=RehearsalMeter())


if __name__ == "__main__":
    sys.exit(main())
