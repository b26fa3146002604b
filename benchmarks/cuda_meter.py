"""Measurement of time and memory on a GPU. Import it only on demand: it needs CuPy and torch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import cupy
import torch

from benchmarks.measure import Meter
from benchmarks.operations import Case, Operation
from dcnops._backends.cuda.cupy_engine import ENGINE

_FLUSH_BYTES = 2**28
_HOST_CALLS = 50
_HOST_ROUNDS = 3

_LEAST_HEAD_START = 2e-3
_CYCLES_PER_SECOND = 2e9
"""Upper bound of a GPU's clock rate, so that a head start is never too short."""


def is_available() -> bool:
    return bool(torch.cuda.is_available() and cupy.cuda.is_available())


class CudaMeter(Meter):
    """Time between two events around a call, and the allocator's high-water mark.

    Everything runs on the default stream, because torchvision always launches its deformable convolution there.
    """

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        l2_bytes = int(getattr(properties, "L2_cache_size", 0))
        self._flush = torch.empty(max(_FLUSH_BYTES, 4 * l2_bytes), dtype=torch.uint8, device="cuda")
        self._head_starts: dict[Callable[[], object], float] = {}
        self.device = ENGINE.device

    def start(self, case: Case) -> None:
        self._head_starts.clear()
        torch.backends.cuda.matmul.allow_tf32 = case.products == "tf32"
        torch.backends.cudnn.allow_tf32 = case.products == "tf32"
        torch.backends.cudnn.benchmark = True

    def host_seconds(self, call: Callable[[], object]) -> float | None:
        """Return the time to enqueue a call, measured over many calls behind a kernel that sleeps.

        Return None for a call that waits for the GPU.
        """
        alone = statistics.median(self._enqueue(call, 1, 0.0)[0] for _ in range(_HOST_ROUNDS + 1))
        self._head_starts[call] = 1.5 * alone
        calls, sleep = _HOST_CALLS, 2 * _HOST_CALLS * alone
        rounds: list[float] = []
        while len(rounds) < _HOST_ROUNDS:
            seconds, is_asleep = self._enqueue(call, calls, sleep)
            if is_asleep:
                rounds.append(seconds)
            elif calls == 1:
                return None
            else:
                # The driver's queue holds about 1000 launches: when it is full, the CPU waits for the GPU.
                calls //= 2
        return statistics.median(rounds)

    def _enqueue(self, call: Callable[[], object], calls: int, sleep: float) -> tuple[float, bool]:
        """Return the seconds per call on the CPU, and whether the GPU was asleep all the time."""
        awake = torch.cuda.Event()
        torch.cuda.synchronize()
        torch.cuda._sleep(int(_CYCLES_PER_SECOND * sleep))  # type: ignore[no-untyped-call]
        awake.record()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        seconds = (time.perf_counter() - begin) / calls
        is_asleep = not awake.query()
        torch.cuda.synchronize()
        return seconds, is_asleep

    def clock(self, call: Callable[[], object]) -> float:
        """Return the GPU's seconds with a cold L2 cache and without waiting for the CPU.

        The GPU sleeps until the kernels of the call are queued behind the first event. For the CPU's share, see
        `host_seconds`.
        """
        head_start = max(_LEAST_HEAD_START, self._head_starts.get(call, 0.0))
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(int(_CYCLES_PER_SECOND * head_start))  # type: ignore[no-untyped-call]
        begin.record()
        result = call()
        end.record()
        end.synchronize()
        del result
        return float(begin.elapsed_time(end)) * 1e-3

    def peak_extra_bytes(
        self, operation: Operation, case: Case, contender: str, direction: str, call: Callable[[], Any]
    ) -> int | None:
        """Return the peak of torch's allocator beyond the results; the call is not the first."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = call()
        torch.cuda.synchronize()
        peak = int(torch.cuda.max_memory_allocated()) - before
        arrays = results.values() if isinstance(results, Mapping) else [results]
        return max(0, peak - sum(int(array.nbytes) for array in arrays))
