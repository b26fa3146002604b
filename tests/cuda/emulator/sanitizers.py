"""AddressSanitizer and UBSan around a Python process."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[3]


def is_sanitized() -> bool:
    """Whether this process was started by `run_sanitized`."""
    return "libasan" in os.environ.get("LD_PRELOAD", "")


def run_sanitized(argv: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run this Python on `argv` in the checkout's root, with the sanitizers' runtime in place.

    Engines made in that process run sanitized kernels. A finding ends the process: the report, with the file and the
    line of the ``.cu``, is in `stderr`.

    Parameters
    ----------
    argv : sequence of str
        Arguments of the interpreter, such as ``["-m", "pytest", "-x", "tests/cuda/test_launch_plans.py"]``.
    timeout : float
        Seconds.
    """
    libraries = [_runtime("libasan.so"), _runtime("libstdc++.so.6")]
    environment = {
        **os.environ,
        # The C++ library too: ASan looks for its exception functions once, at the start.
        "LD_PRELOAD": " ".join(libraries),
        # Python itself leaks by design; a fiber's stack is its own, so no second stack is kept for each frame.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        # A report is written to the descriptor itself, which pytest would redirect and lose with the process.
        "PYTEST_ADDOPTS": f"{os.environ.get('PYTEST_ADDOPTS', '')} --capture=sys",
    }
    return subprocess.run(
        [sys.executable, *argv],
        cwd=_CHECKOUT,
        env=environment,
        timeout=timeout,
        capture_output=True,
        text=True,
        check=False,
    )


@functools.cache
def _runtime(name: str) -> str:
    printed = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
    path = Path(printed.strip())
    if not path.is_absolute():
        raise RuntimeError(f"the sanitizer tests need {name}, which g++ does not find; install its development package")
    return str(path.resolve())
