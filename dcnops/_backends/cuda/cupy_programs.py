"""Issue recorded programs on a GPU, through CuPy's thinnest wrappers of the driver."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
from cupy_backends.cuda.api import driver, runtime

from dcnops._backends.cuda.cublas import CublasSession, multiply, prepare_product
from dcnops._backends.cuda.deform_roi_pool_programs import RoIPoolProgram
from dcnops._backends.cuda.programs import Launch, Product, Program

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
        self._steps, words, pointers, bases = prepare(program)
        self._template = np.array(words, np.uint64)
        self._pointers, self._bases = np.array(pointers, np.intp), np.array(bases, np.intp)
        self._multiplies = any(kind == _PRODUCT for kind, *_ in self._steps)

    def __call__(self, addresses: Sequence[int], stream: int) -> None:
        """Issue the program for the `addresses` of null, arguments, results and scratch memory."""
        buffer = self._template.copy()
        start = buffer.__array_interface__["data"][0]
        buffer[self._pointers] += np.array((*addresses, start), np.uint64)[self._bases]
        if self._multiplies:
            with CublasSession(stream) as handle:
                issue(self._steps, addresses, stream, start, handle)
        else:
            issue(self._steps, addresses, stream, start)


class CupyRoIPoolProgram:
    """A program of RoI pooling that is ready to be issued on the device that it was recorded for."""

    def __init__(self, program: RoIPoolProgram) -> None:
        self._program = program
        self._steps, words, pointers, bases = prepare(program.one_region)
        self._template = array("Q", words)
        # With few pointers, this is faster than NumPy.
        self._pointers = [(word, base, words[word]) for word, base in zip(pointers, bases)]

    def __call__(self, addresses: Sequence[int], stream: int, regions: int) -> None:
        """Issue the program for the `addresses` of null, arguments, results and scratch memory."""
        buffer = self._template[:]
        start, _ = buffer.buffer_info()
        located = (*addresses, start)
        for word, base, offset in self._pointers:
            buffer[word] = located[base] + offset
        blocks, shared_bytes = self._program.fill_in(buffer, regions)
        steps, pooling = [*self._steps], self._program.pooling
        if blocks:
            # More shared memory than for one region, but never so much that the kernel has to ask for it.
            kind, function, _, x, y, _, argument = steps[pooling]
            steps[pooling] = (kind, function, blocks, x, y, shared_bytes, argument)
        else:
            del steps[pooling]
        issue(steps, addresses, stream, start)


def prepare(program: Program) -> tuple[list[tuple[Any, ...]], list[int], list[int], list[int]]:
    """Return the steps for `issue`, the parameter structs in words, and which words are pointers to which bases.

    The driver takes an array of pointers to arguments. Here such an array holds a single pointer, to a parameter
    struct. These arrays follow the structs, and where the structs are in memory is the last base.
    """
    words, pointers, bases = program.params.tolist(), program.pointers.tolist(), program.bases.tolist()
    steps: list[tuple[Any, ...]] = []
    for step in program.steps:
        if isinstance(step, Product):
            steps.append((_PRODUCT, prepare_product(step)))
        elif isinstance(step, Launch):
            function = step.launcher.function(step.shared_bytes)  # type: ignore[attr-defined]
            steps.append((_LAUNCH, function, step.grid, *step.block, step.shared_bytes, 8 * len(words)))
            pointers.append(len(words))
            bases.append(program.base_count)
            words.append(step.params)
        else:
            steps.append((_FILL, *step.location, step.nbytes))
    return steps, words, pointers, bases


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
