"""Issue recorded programs on a GPU, through CuPy's thinnest wrappers of the driver."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from cupy_backends.cuda.api import driver, runtime

from dcnops._backends.cuda.cublas import CublasSession, multiply, prepare_product
from dcnops._backends.cuda.deform_roi_pool_programs import RoIPoolProgram
from dcnops._backends.cuda.programs import Launch, Product, Program, Step

_LAUNCH, _PRODUCT, _FILL = range(3)


class _Thread(threading.local):
    has_context = False


_THREAD = _Thread()


class CupyProgram:
    """A recorded program that is ready to be issued on the device that it was recorded for.

    Every call has a parameter buffer of its own: the driver's wrapper releases the GIL, so two threads may issue the
    same program at the same time. All that is issued can be captured in a CUDA graph.
    """

    def __init__(self, program: Program) -> None:
        words = program.params.tolist()
        pointers, bases = program.pointers.tolist(), program.bases.tolist()
        self.steps = [self._prepare(step, words) for step in program.steps]
        for kind, *_, argument in self.steps:
            if kind == _LAUNCH:
                pointers.append(argument // 8)
                bases.append(program.base_count)
        self._template = np.array(words, np.uint64)
        self._pointers, self._bases = np.array(pointers, np.intp), np.array(bases, np.intp)
        self._multiplies = any(kind == _PRODUCT for kind, *_ in self.steps)

    @staticmethod
    def _prepare(step: Step, words: list[int]) -> tuple[Any, ...]:
        if isinstance(step, Product):
            return (_PRODUCT, prepare_product(step))
        if not isinstance(step, Launch):
            return (_FILL, *step.location, step.nbytes)
        # The driver takes an array of pointers to arguments. This one holds a single pointer, to the parameter struct,
        # and follows the structs in the buffer.
        argument = 8 * len(words)
        words.append(step.params)
        function = step.launcher.function(step.shared_bytes)  # type: ignore[attr-defined]
        return (_LAUNCH, function, step.grid, *step.block, step.shared_bytes, argument)

    def __call__(self, addresses: Sequence[int], stream: int) -> None:
        """Issue the program for the `addresses` of null, arguments, results and scratch memory."""
        _buffer, start = self.locate(addresses)
        if self._multiplies:
            with CublasSession(stream) as handle:
                issue(self.steps, addresses, stream, start, handle)
        else:
            issue(self.steps, addresses, stream, start)

    def locate(self, addresses: Sequence[int]) -> tuple[np.ndarray, int]:
        """Return the parameter structs of a call and where they are in memory."""
        buffer = self._template.copy()
        start: int = buffer.__array_interface__["data"][0]
        buffer[self._pointers] += np.array((*addresses, start), np.uint64)[self._bases]
        return buffer, start


class CupyRoIPoolProgram:
    """A program of RoI pooling that is ready to be issued on the device that it was recorded for."""

    def __init__(self, program: RoIPoolProgram) -> None:
        self._program = program
        self._one_region = CupyProgram(program.one_region)

    def __call__(self, addresses: Sequence[int], stream: int, regions: int) -> None:
        """Issue the program for the `addresses` of null, arguments, results and scratch memory."""
        buffer, start = self._one_region.locate(addresses)
        blocks, shared_bytes = self._program.fill_in(buffer, regions)
        steps, pooling = [*self._one_region.steps], self._program.pooling
        if blocks:
            # More shared memory than for one region, but never so much that the kernel has to ask for it.
            kind, function, _, x, y, _, argument = steps[pooling]
            steps[pooling] = (kind, function, blocks, x, y, shared_bytes, argument)
        else:
            del steps[pooling]
        issue(steps, addresses, stream, start)


def issue(
    steps: Sequence[tuple[Any, ...]], addresses: Sequence[int], stream: int, start: int, cublas_handle: int = 0
) -> None:
    """Issue prepared steps of which the parameter structs are at `start`."""
    if not _THREAD.has_context:
        # The driver launches nothing in a thread, such as autograd's, before the runtime has given it a context.
        runtime.setDevice(runtime.getDevice())
        _THREAD.has_context = True
    launch, fill = driver.launchKernel, runtime.memsetAsync
    for step in steps:
        kind = step[0]
        if kind == _LAUNCH:
            _, function, grid, x, y, shared_bytes, argument = step
            launch(function, grid, 1, 1, x, y, 1, shared_bytes, stream, start + argument, 0)
        elif kind == _PRODUCT:
            multiply(cublas_handle, step[1], addresses)
        else:
            fill(addresses[step[1]] + step[2], 0, step[3], stream)
