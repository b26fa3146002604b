"""Clock and memory meter on the CPU."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.contenders import Case, Operation, load

# Idle OpenMP threads spin for some milliseconds after a call and would disturb the next contender's.
_PAUSE = 0.02

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_TINY = 5


class CpuMeter:
    """Wall-clock time, and peak memory in a process of its own."""

    def start(self, case: Case) -> None:
        """Nothing is to be prepared."""

    def host_seconds(self, call: Callable[[], object]) -> float | None:
        """The CPU is the device."""

    def clock(self, call: Callable[[], object]) -> float:
        time.sleep(_PAUSE)
        begin = time.perf_counter()
        result = call()
        end = time.perf_counter()
        del result
        return end - begin

    def peak_extra_bytes(
        self, operation: Operation, case: Case, contender: str, direction: str, call: Callable[[], Any]
    ) -> int | None:
        """What resident memory grows by at most in the first call at a shape, beside its results.

        The process that it is measured in has called the operation on a tiny shape before. None where the system is
        not Linux.
        """
        if not _CLEAR_REFS.exists():
            return None
        command = [sys.executable, "-m", "benchmarks.cpu", operation.name, contender, direction]
        command += map(str, case.shape)
        done = subprocess.run(command, cwd=Path(__file__).parents[1], check=True, stdout=subprocess.PIPE, text=True)
        return int(json.loads(done.stdout))


def _peak_extra_bytes_here(operation: Operation, case: Case, name: str, direction: str) -> int:
    contender = next(c for c in operation.contenders(case) if c.name == name)
    prepare = contender.forward if direction == "forward" else contender.backward
    tiny = replace(case, shape=tuple(min(size, _TINY) for size in case.shape))
    prepare(tiny, operation.inputs(tiny))()
    call = prepare(case, operation.inputs(case))
    before = _settled_bytes()
    results = call()
    peak = _status_bytes("VmHWM")
    arrays = results.values() if isinstance(results, Mapping) else [results]
    return max(0, peak - before - sum(array.nbytes for array in arrays))


def _settled_bytes() -> int:
    """Resident memory, with free blocks given back and the high-water mark set to it."""
    gc.collect()
    trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    _CLEAR_REFS.write_text("5")
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description="Peak extra memory of one call.")
    parser.add_argument("operation")
    parser.add_argument("contender")
    parser.add_argument("direction", choices=("forward", "backward"))
    parser.add_argument("shape", nargs="+", type=int)
    options = parser.parse_args()
    case = Case("cpu", tuple(options.shape))
    operation = load(options.operation)
    print(json.dumps(_peak_extra_bytes_here(operation, case, options.contender, options.direction)))


if __name__ == "__main__":
    _main()
