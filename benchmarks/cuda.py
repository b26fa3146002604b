"""Clock and memory meter on a GPU. Importing this module needs torch and CuPy; nothing of the CPU part imports it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import cupy
import torch

from benchmarks.contenders import Case, Operation

_FLUSH_BYTES = 2**28
_HOST_CALLS = 7

_LEAST_HEAD_START = 2e-3
_CYCLES_PER_SECOND = 2e9
"""Not less than a GPU's clock: a head start is that long or longer."""


def is_available() -> bool:
    return bool(torch.cuda.is_available() and cupy.cuda.is_available())


class CudaMeter:
    """Time between two events around a call, and the allocators' high-water marks.

    All is on the default stream: torchvision launches its deformable convolution there, whatever the current one is.
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
        """The median of some calls, each with an idle GPU before it."""
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
        """The L2 cache holds nothing of the inputs, and the CPU is ahead: its share is `host_seconds`.

        While the GPU sleeps, the call's kernels line up behind the first event.
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
        """What the allocators of torch and CuPy give out at most, beside the results; the call is not the first."""
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
