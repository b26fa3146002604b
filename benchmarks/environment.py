"""Where and with what a run was made."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
_PACKAGES = ("numpy", "numba", "torch", "torchvision")


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limit_threads(threads: int) -> None:
    """The same number of threads for all libraries, here and in child processes; to be called before their import."""
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))


def describe(threads: int, gpu: bool) -> dict[str, Any]:
    description = {
        "cpu": _cpu_name(),
        "threads": threads,
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        "cupy": next(filter(None, map(_version, ("cupy-cuda13x", "cupy-cuda12x", "cupy"))), None),
        "commit": _commit(),
    }
    if gpu:
        import torch

        description["gpu"] = torch.cuda.get_device_name()
        description["cuda"] = torch.version.cuda
        description["cudnn"] = torch.backends.cudnn.version()
    return description


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit that is checked out, with a plus sign when files differ from it."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=_ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()
