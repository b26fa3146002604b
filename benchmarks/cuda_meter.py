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

_FLUSH_BYTES = 2**28
_HOST_CALLS = 7

_LEAST_HEAD_START = 2e-3
_CYCLES_PER_SECOND = 2e9
"""Upper bound of a GPU's clock rate, so that a head start is never too short."""


def is_available() -> bool:
    return bool(torch.cuda.is_available() and cupy.cuda.is_available())


class CudaMeter(Meter):
    """Time between two events around a call, and the allocators' high-water marks.

    Everything runs on the default stream, because torchvision always launches its deformable convolution there.
    """

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        l2_bytes = int(getattr(properties, "L2_cache_size", 0))
        self._flush = torch.empty(max(_FLUSH_BYTES, 4 * l2_bytes), dtype=torch.uint8, device="cuda")
        self._head_starts: dict[Callable[[], object], float] = {}

    def start(self, case: Case) -> None:
        self._head_starts.clear()
        torch.backends.cuda.matmul.allow_tf32 = case.products == "tf32"
        torch.backends.cudnn.allow_tf32 = case.products == "tf32"
        torch.backends.cudnn.benchmark = True

    def host_seconds(self, call: Callable[[], object]) -> float | None:
        """Return the median of several calls, each of which starts with an idle GPU."""
        seconds = []
        for _ in range(_HOST_CALLS):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
        self._head_starts[call] = 1.5 * statistics.median(seconds)
        return statistics.median(seconds)

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
        """Return the peak of the allocators of torch and CuPy beyond the results; the call is not the first."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with _CupyPeak() as cupy_peak:
            results = call()
            torch.cuda.synchronize()
        peak = int(torch.cuda.max_memory_allocated() - before + cupy_peak.bytes - cupy_peak.before)
        arrays = results.values() if isinstance(results, Mapping) else [results]
        return max(0, peak - sum(int(array.nbytes) for array in arrays))


class _CupyPeak(cupy.cuda.MemoryHook):  # type: ignore[misc]
    """High-water mark of CuPy's default pool while the hook is active."""

    name = "peak"

    def __init__(self) -> None:
        super().__init__()
        self._pool = cupy.get_default_memory_pool()
        self.before = self.bytes = int(self._pool.used_bytes())

    def malloc_postprocess(self, **_: Any) -> None:
        self.bytes = max(self.bytes, int(self._pool.used_bytes()))
