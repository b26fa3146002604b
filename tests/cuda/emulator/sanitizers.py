"""Python processes with AddressSanitizer and UBSan."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
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


def run_each(names: Iterable[str], run: Callable[[str], object]) -> None:
    """Call `run` with each name in a forked process, which may crash, and print what `reports_of_each` reads."""
    for name in names:
        print(f"<<< {name}", file=sys.stderr, flush=True)
        process = os.fork()
        if process == 0:
            code = 1
            try:
                run(name)
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        print(f"\n>>> {os.waitpid(process, 0)[1]}", file=sys.stderr, flush=True)


def reports_of_each(stderr: str) -> dict[str, tuple[int, str]]:
    """Return the exit status and the report on standard error of each name that `run_each` was given."""
    found = re.findall(r"^<<< (.*?)\n(.*?)^>>> (\d+)$", stderr, re.DOTALL | re.MULTILINE)
    return {name: (int(status), report) for name, report, status in found}


@functools.cache
def _runtime(name: str) -> str:
    printed = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
    path = Path(printed.strip())
    if not path.is_absolute():
        raise RuntimeError(f"the sanitizer tests need {name}, which g++ does not find; install its development package")
    return str(path.resolve())
