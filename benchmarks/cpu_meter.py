"""Measurement of time and memory on a CPU."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.environment import run_module
from benchmarks.measure import Meter
from benchmarks.operations import Case, Operation, load

# Idle OpenMP threads spin for some milliseconds after a call and would disturb the next contender.
_PAUSE = 0.02

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_TINY = 5


class CpuMeter(Meter):
    """Wall-clock time, and peak memory in a separate process."""

    def clock(self, call: Callable[[], object]) -> float:
        time.sleep(_PAUSE)
        return super().clock(call)

    def peak_extra_bytes(
        self, operation: Operation, case: Case, contender: str, direction: str, call: Callable[[], Any]
    ) -> int | None:
        """Return the growth of resident memory beyond the results, or None on systems other than Linux.

        It is measured for the first call of a shape, in a process that has called the operation on a tiny shape.
        """
        if not _CLEAR_REFS.exists():
            return None
        arguments = (operation.name, contender, direction, json.dumps(asdict(case)))
        return int(run_module("benchmarks.cpu_meter", *arguments))


def _peak_extra_bytes_here(operation: Operation, case: Case, name: str, direction: str) -> int:
    def prepare(case: Case) -> Callable[[], Any]:
        contender = next(c for c in operation.contenders(case) if c.name == name)
        return contender.prepare(case, operation.inputs(case), direction)

    tiny = Case(case.device, tuple(min(size, _TINY) for size in case.shape))
    prepare(tiny)()
    call = prepare(case)
    before = _settled_bytes()
    results = call()
    peak = _status_bytes("VmHWM")
    arrays = results.values() if isinstance(results, Mapping) else [results]
    return max(0, peak - before - sum(array.nbytes for array in arrays))


def _settled_bytes() -> int:
    """Release free blocks, reset the high-water mark and return the resident memory."""
    gc.collect()
    trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    _CLEAR_REFS.write_text("5")
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    operation_name, contender_name, direction, fields = sys.argv[1:]
    case = Case(**json.loads(fields))
    case = replace(case, shape=tuple(case.shape))
    print(json.dumps(_peak_extra_bytes_here(load(operation_name), case, contender_name, direction)))
