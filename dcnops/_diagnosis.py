"""Environment report of ``python -m dcnops``: versions, devices, backends, caches, and advice on problems."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from dcnops._threads import get_num_threads

MINIMUM = {"numpy": (1, 26), "numba": (0, 60), "cupy": (14,), "torch": (2, 6), "jax": (0, 9)}
"""Oldest supported versions, as in pyproject.toml."""

REPORTED = ("numpy", "numba", "torch", "torchvision", "jax", "onnx", "onnxruntime", "ml-dtypes")


@dataclass(frozen=True)
class Backend:
    """Result of the check of one backend; `arrays` names the library of its arrays."""

    arrays: str
    device: str
    error: str | None


@dataclass(frozen=True)
class Cache:
    """Folder of compiled code."""

    what: str
    folder: str
    bytes: int
    writable: bool


@dataclass(frozen=True)
class Environment:
    """State of the environment.

    Attributes
    ----------
    versions : dict of str to str
        Versions of the installed packages; CuPy appears under the names of its packages, such as cupy-cuda13x.
    driver : int or None
        Newest CUDA version that the NVIDIA driver supports (13020 for 13.2); None without a driver.
    backends : list of Backend
        The NumPy backend, and the CuPy backend if CuPy is installed.
    caches : list of Cache
    interpreted : bool
        True if NUMBA_DISABLE_JIT is set.
    """

    versions: dict[str, str]
    driver: int | None
    backends: list[Backend]
    caches: list[Cache]
    interpreted: bool = False
    python: str = field(default_factory=platform.python_version)

    @property
    def cupy(self) -> list[str]:
        """Names of the installed CuPy packages."""
        return [name for name in self.versions if name.startswith("cupy")]

    @property
    def works(self) -> bool:
        """True if all installed backends work."""
        return all(backend.error is None for backend in self.backends)

    def to_dict(self) -> dict[str, Any]:
        """Return the content as a dictionary for JSON."""
        return {**asdict(self), "works": self.works, "advice": advise(self)}


def inspect_environment() -> Environment:
    """Inspect the current environment, including a small call on each backend."""
    versions = {name: version for name in REPORTED if (version := _version(name))}
    for distribution in metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower()
        if name == "cupy" or re.fullmatch(r"cupy-(cuda\d+x|rocm.*)", name):
            versions[name] = distribution.version
    cupy = any(name.startswith("cupy") for name in versions)
    backends = [_cpu_backend(), *([_gpu_backend()] if cupy else [])]
    caches = [_cpu_cache(), *([_gpu_cache()] if cupy else [])]
    interpreted = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")
    return Environment(versions, _driver_cuda_version(), backends, [cache for cache in caches if cache], interpreted)


def advise(environment: Environment) -> list[str]:
    """Return a sentence for each problem, with its remedy."""
    found = []
    versions, cupy, driver = environment.versions, environment.cupy, environment.driver
    for name, minimum in MINIMUM.items():
        for package in cupy if name == "cupy" else [name]:
            version = versions.get(package)
            if version and _version_numbers(version) < minimum:
                least = ".".join(map(str, minimum))
                found.append(f"{package} {version} is too old: pip install --upgrade '{package}>={least}'.")
    gpu = next((backend for backend in environment.backends if backend.arrays == "cupy"), None)
    if len(cupy) > 1:
        names = " ".join(cupy)
        found.append(
            f"Several CuPy packages are installed ({names}), which overwrite each other: pip uninstall {names}, then "
            "install the one for your CUDA."
        )
    elif driver is None and cupy:
        found.append(
            "No NVIDIA driver was found, so CuPy arrays cannot be made; NumPy arrays need none. If there is a GPU, "
            "install its driver, or give it to the container (docker run --gpus all): nvidia-smi must list it."
        )
    elif driver is not None and not cupy:
        extra = "cuda13" if driver >= 13000 else "cuda12"
        found.append(f"There is an NVIDIA driver but no CuPy: pip install 'dcnops[{extra}]' to compute on the GPU.")
    elif driver is not None and (needed := _cuda_major(cupy)) and needed * 1000 > driver:
        major, minor = driver // 1000, driver % 1000 // 10
        found.append(
            f"{cupy[0]} needs a driver for CUDA {needed}, this one runs CUDA {major}.{minor} at most: update the "
            f"driver, or pip uninstall {cupy[0]} and pip install 'dcnops[cuda{major}]'."
        )
    elif gpu and gpu.error:
        found.append(_explain_gpu_error(gpu.error, cupy[0]))
    if driver is not None and "+cpu" in versions.get("torch", ""):
        found.append(
            f"torch {versions['torch']} is a build without CUDA, but there is a GPU: its tensors stay on the CPU. "
            "Install a CUDA build (pip install torch, from PyPI) to compute on the GPU."
        )
    if environment.interpreted:
        found.append("NUMBA_DISABLE_JIT is set: the CPU backend is interpreted, thousands of times slower. Unset it.")
    for cache in environment.caches:
        if not cache.writable:
            variable = "NUMBA_CACHE_DIR" if cache.what == "CPU code" else "CUPY_CACHE_DIR"
            found.append(
                f"{cache.folder} cannot be written to: compiled {cache.what} is lost at the end of each process. Set "
                f"{variable} to a folder that can be."
            )
    cpu = environment.backends[0]
    if cpu.error:
        found.append(f"The CPU backend does not work ({cpu.error}): reinstall numpy and numba, versions that fit.")
    return found


def format_report(environment: Environment) -> str:
    """Format the report as text."""
    lines = [f"python {environment.python} on {platform.platform()}, dcnops {_version('dcnops') or 'without metadata'}"]
    lines.append(", ".join(f"{name} {version}" for name, version in environment.versions.items()))
    if environment.driver is None:
        lines.append("no NVIDIA driver")
    else:
        lines.append(f"NVIDIA driver for CUDA {environment.driver // 1000}.{environment.driver % 1000 // 10}")
    lines.append("")
    for backend in environment.backends:
        state = "works" if backend.error is None else f"does not work: {backend.error}"
        lines.append(f"{backend.arrays} arrays: {backend.device}; {state}")
    for cache in environment.caches:
        writable = "" if cache.writable else ", cannot be written to"
        lines.append(f"compiled {cache.what}: {cache.folder} ({cache.bytes / 2**20:.1f} MiB{writable})")
    advice = advise(environment)
    lines += ["", *(f"* {sentence}" for sentence in advice)] if advice else []
    return "\n".join(lines)


def _cpu_backend() -> Backend:
    def call() -> None:
        import numpy

        _check_results(numpy)

    error = _error_message(call)
    try:
        import llvmlite.binding

        processor = f"{get_num_threads()} threads, {llvmlite.binding.get_host_cpu_name()}"
    except Exception:
        processor = f"{get_num_threads()} threads"
    return Backend("numpy", f"CPU, {processor}", error)


def _gpu_backend() -> Backend:
    devices = "no GPU"

    def call() -> None:
        nonlocal devices
        import cupy

        names = []
        for index in range(cupy.cuda.runtime.getDeviceCount()):
            properties = cupy.cuda.runtime.getDeviceProperties(index)
            names.append(
                f"{properties['name'].decode()} (compute capability {properties['major']}.{properties['minor']}, "
                f"{properties['totalGlobalMem'] / 2**30:.0f} GiB)"
            )
        runtime = cupy.cuda.runtime.runtimeGetVersion()
        devices = f"{', '.join(names)}; CUDA {runtime // 1000}.{runtime % 1000 // 10}"
        _check_results(cupy)

    error = _error_message(call)
    return Backend("cupy", devices, error)


def _check_results(xp: Any) -> None:
    """Run a small convolution, forward and backward, and compare it with its known result."""
    import dcnops

    image = xp.arange(16, dtype=xp.float32).reshape(1, 1, 4, 4)
    offset = xp.zeros((1, 2, 4, 4), xp.float32)
    offset[:, 1] = 1
    weight = xp.ones((1, 1, 1, 1), xp.float32)
    output = dcnops.deform_conv2d(image, offset, weight)
    gradients = dcnops.deform_conv2d_backward(output, image, offset, weight)
    assert gradients.weight is not None
    found = output[0, 0, 0].tolist(), float(gradients.weight.sum())
    if found != ([1.0, 2.0, 3.0, 0.0], 1016.0):
        raise ArithmeticError(f"wrong numbers: {found}")


def _error_message(call: Callable[[], None]) -> str | None:
    """Return the error that a call raises on one line, and None if it succeeds."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
    return None


def _explain_gpu_error(error: str, package: str) -> str:
    """Return the likely reason why CuPy fails although there is a driver."""
    with_libraries = f"pip install '{package}[ctk]'" if package != "cupy" else "install the CUDA toolkit"
    if re.search(r"could not open source file|cannot open source file|cuda_fp16|CUDA_PATH|headers", error):
        return f"CuPy does not find CUDA's headers: {with_libraries}. ({error})"
    if re.search(r"nvrtc|cublas|libcu\w+|DLL|shared object", error, re.IGNORECASE):
        return f"CuPy does not find CUDA's libraries: {with_libraries}. ({error})"
    if re.search(r"no CUDA-capable device|cudaErrorNoDevice|invalid device", error):
        return f"The driver shows no GPU: nvidia-smi must list it, and CUDA_VISIBLE_DEVICES must not hide it. ({error})"
    return f"CuPy does not work; its own check may tell more: python -c 'import cupy; cupy.show_config()'. ({error})"


def _driver_cuda_version() -> int | None:
    """Return the newest CUDA version that the driver supports."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    return version.value if library.cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value else None


def _cpu_cache() -> Cache | None:
    try:
        from dcnops._backends.cpu import deform_conv2d_loops

        folders = {
            value.stats.cache_path for value in vars(deform_conv2d_loops).values() if hasattr(value, "stats")
        } - {None}
    except Exception:
        return None
    if not folders:
        return Cache("CPU code", "no folder", 0, False)
    return _cache("CPU code", Path(sorted(folders)[0]))


def _gpu_cache() -> Cache:
    return _cache("GPU code", Path(os.environ.get("CUPY_CACHE_DIR", Path.home() / ".cupy" / "kernel_cache")))


def _cache(what: str, folder: Path) -> Cache:
    existing = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    try:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    except OSError:
        size = 0
    return Cache(what, str(folder), size, existing.is_dir() and os.access(existing, os.W_OK))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _version_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _cuda_major(packages: list[str]) -> int | None:
    """Return the CUDA major version of a CuPy package."""
    match = re.search(r"cuda(\d+)x", packages[0])
    return int(match.group(1)) if match else None
