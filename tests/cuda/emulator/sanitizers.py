"""Python processes with AddressSanitizer and UBSan."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[3]


def is_sanitized() -> bool:
    """Return True in a process started by `run_sanitized`."""
    return "libasan" in os.environ.get("LD_PRELOAD", "")


def run_sanitized(argv: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run the Python interpreter with arguments `argv` and the sanitizers, in the root of the checkout.

    Engines created in that process run sanitized kernels. A finding ends the process; its report in `stderr` names the
    file and line of the ``.cu``.
    """
    libraries = [_runtime("libasan.so"), _runtime("libstdc++.so.6")]
    environment = {
        **os.environ,
        # ASan looks for the exception functions of the C++ library once, when it starts.
        "LD_PRELOAD": " ".join(libraries),
        # Python leaks by design. Fibers have their own stacks, so ASan must not move frames to fake ones.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        # Reports go to the file descriptor, which pytest would redirect and lose when the process dies.
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
