"""Peak extra memory of one call on the CPU, measured in a process of its own.

It is what the resident memory grows by at most during the first call at a shape, beside its results, in a process that
has already called the operation on a tiny shape. Linux only: elsewhere nothing is measured.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.contenders import Case, Operation

__all__ = ["peak_extra_bytes"]

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_TINY = (4, 5, 6)


def peak_extra_bytes(operation: Operation, case: Case, contender: str, direction: str) -> int | None:
    """Measure in a fresh process; None where the system cannot tell."""
    if not _CLEAR_REFS.exists():
        return None
    module = vars(operation)["__name__"]
    shape = [str(size) for size in (case.C, case.H, case.W)]
    command = [sys.executable, "-m", "benchmarks.memory", module, contender, direction, *shape]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], check=True, stdout=subprocess.PIPE, text=True)
    return int(json.loads(done.stdout))


def _measure(operation: Operation, case: Case, name: str, direction: str) -> int:
    contender = next(c for c in operation.contenders(case) if c.name == name)
    prepare = contender.forward if direction == "forward" else contender.backward
    tiny = case.resized(*_TINY)
    prepare(tiny, operation.inputs(tiny))()
    call = prepare(case, operation.inputs(case))
    before = _settled_bytes()
    results = call()
    peak = _status_bytes("VmHWM")
    arrays = results.values() if isinstance(results, dict) else [results]
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory")
    parser.add_argument("module")
    parser.add_argument("contender")
    parser.add_argument("direction", choices=("forward", "backward"))
    parser.add_argument("shape", nargs=3, type=int)
    options = parser.parse_args()
    operation: Any = import_module(options.module)
    case = Case("cpu", *options.shape)
    print(json.dumps(_measure(operation, case, options.contender, options.direction)))


if __name__ == "__main__":
    _main()
