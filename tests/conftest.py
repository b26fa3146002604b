"""Runners of the tests: the CPU backend, CUDA kernels emulated on the CPU, and a GPU (marker `gpu`)."""

from __future__ import annotations

import functools
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import dcnops
from dcnops._backends.cuda import plans
from dcnops._backends.cuda.plans.array_jobs import is_channels_last, is_evenly_spaced
from dcnops._backends.cuda.programs import ArrayForm, ProgramCache
from dcnops._shapes import DeformRoIPoolGeometry
from tests.cases import Case
from tests.cuda.emulator import host_engine
from tests.cuda.emulator.host_engine import prepare_program

# make clean deletes it. In the system's temporary folder, torch's default, it would stay.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "torchinductor")
)
# The tests compile few kernels. Preparing to compile many takes longer: trials of vector instructions, a compiled
# header, and processes that compile.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")
os.environ.setdefault("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

settings.register_profile(
    "default",
    derandomize=True,  # the same examples in every run; the thorough profile draws new examples
    deadline=None,
    max_examples=30,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
settings.register_profile("brief", settings.get_profile("default"), max_examples=15)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=1000, derandomize=False)
settings.load_profile("default")


# A shell that runs `make test &` ignores this signal, which some tests send to themselves and to other processes.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def share_of_examples(share: float) -> settings:
    """Return settings that give a slow test this share of the examples of the profile."""
    return settings(max_examples=max(1, round(share * settings.default.max_examples)))


NEEDED_PACKAGES = {
    "arrays/test_precision.py": ("torch", "cupy"),
    "benchmarks": ("torch", "torchvision"),
    "cuda/test_disassembly.py": ("cupy",),
    "cuda/test_kernels_compile.py": ("cupy",),
    "detector": ("torch", "torchvision", "pycocotools", "tensorboard", "orjson"),
    "jax": ("jax",),
    "project/test_comparison.py": ("torch", "torchvision"),
    "torch": ("torch", "torchvision"),
}
"""Optional packages without which a file or folder of tests is left out."""


def _missing(paths: Iterable[str] = NEEDED_PACKAGES) -> dict[str, list[str]]:
    """Return the packages that are missing, by the path that needs them."""
    packages = {path: [name for name in NEEDED_PACKAGES[path] if _is_missing(name)] for path in paths}
    return {path: names for path, names in packages.items() if names}


def _is_missing(package: str) -> bool:
    return sys.modules.get(package, package) is None or importlib.util.find_spec(package) is None


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out tests that need packages that are missing."""
    relative = collection_path.relative_to(Path(__file__).parent).as_posix()
    return True if relative in NEEDED_PACKAGES and _missing([relative]) else None


class Runner(Protocol):
    """Runs a case of NumPy arrays and returns NumPy arrays."""

    def forward(self, case: Case) -> np.ndarray: ...
    def backward(self, case: Case, needs: tuple[str, ...] | None = None) -> Mapping[str, np.ndarray]: ...


class CpuRunner:
    """The public functions on NumPy arrays."""

    def __init__(self, deterministic: bool = False) -> None:
        self.deterministic = deterministic

    def forward(self, case: Case) -> np.ndarray:
        arguments = {name: self.to_device(value) for name, value in case.arguments().items()}
        return self.to_host(getattr(dcnops, case.operation)(**arguments))

    def backward(self, case: Case, needs: tuple[str, ...] | None = None) -> Mapping[str, np.ndarray]:
        arguments = {name: self.to_device(value) for name, value in case.arguments().items()}
        backward = getattr(dcnops, f"{case.operation}_backward")
        options = {"needs": needs or case.needs, "deterministic": self.deterministic}
        gradients = backward(self.to_device(case.grad_out), **arguments, **options)
        return {name: self.to_host(array) for name, array in gradients._asdict().items() if array is not None}

    def to_device(self, value: Any) -> Any:
        return value

    def to_host(self, array: Any) -> np.ndarray:
        return array


class GpuRunner(CpuRunner):
    """The public functions on CuPy arrays."""

    def to_device(self, value: Any) -> Any:
        import cupy

        return cupy.asarray(value) if isinstance(value, np.ndarray) else value

    def to_host(self, array: Any) -> np.ndarray:
        import cupy

        return cupy.asnumpy(array)


class EmulatedRunner:
    """The plans and kernels of the CUDA backend, emulated on the CPU.

    All but RoI pooling runs twice, by its plan and by the recorded program of the plan. The bits must be the same.
    """

    def __init__(
        self,
        chunk_bytes: int = 2**20,
        deterministic: bool = False,
        forward: Mapping[str, Any] | None = None,
        backward: Mapping[str, Any] | None = None,
        **engine_options: Any,
    ) -> None:
        self.engine = host_engine(**engine_options)
        self.chunk_bytes = chunk_bytes
        self.deterministic = deterministic
        self.forward_options = forward or {}
        self.backward_options = backward or {}
        # Other schedules change the order of atomic additions.
        self.programs = None if engine_options else ProgramCache(self.engine, prepare_program)

    def forward(self, case: Case) -> np.ndarray:
        plan = getattr(plans, case.operation)
        # The other forward passes have no chunks.
        chunks = {"workspace_bytes": self.chunk_bytes} if case.operation == "deform_conv2d" else {}
        return self._run(plan, case.geometry(), self._arrays(case), **chunks, **self.forward_options)

    def backward(self, case: Case, needs: tuple[str, ...] | None = None) -> Mapping[str, np.ndarray]:
        plan = getattr(plans, f"{case.operation}_backward")
        has_images = case.operation in ("deform_conv2d", "deform_roi_pool")
        grad_out = (_images if has_images else np.ascontiguousarray)(case.grad_out)
        arrays = [grad_out, *self._arrays(case, without="bias")]
        options = {
            "needs": frozenset(needs or case.needs),
            "deterministic": self.deterministic,
            "workspace_bytes": self.chunk_bytes,
            **self.backward_options,
        }
        return self._run(plan, case.geometry(), arrays, **options)

    def _run(self, plan: Callable[..., Any], geometry: Any, arrays: list[Any], **options: Any) -> Any:
        results = plan(self.engine, geometry, *arrays, **options)
        forms = [None if array is None else ArrayForm.of(self.engine, array) for array in arrays]
        is_aligned = all(form is None or form.aligned for form in forms)
        if self.programs is not None and is_aligned and not isinstance(geometry, DeformRoIPoolGeometry):
            replay = self.programs.record(functools.partial(plan, **options), geometry, forms, ())
            assert_same_bits(replay.run(self.engine, 0, arrays), results)
        return results

    @staticmethod
    def _arrays(case: Case, without: str = "") -> list[np.ndarray | None]:
        """Return the arrays in the form that the CUDA backend passes to a plan."""
        arrays = {name: _contiguous(getattr(case, name)) for name in case.arrays if name != without}
        if case.operation == "ms_deform_attn":  # the shapes of the levels are on the host
            return [arrays["value"], None, arrays["sampling_locations"], arrays["attention_weights"]]
        if case.operation == "deform_aggregate":
            return list(arrays.values())
        arrays["input"] = _images(case.input)
        if case.operation == "deform_conv2d":
            arrays |= {name: _sampling(getattr(case, name)) for name in ("offset", "mask")}
        kinds = {name: array.dtype for name, array in arrays.items() if array is not None and name != "rois"}
        apart = {kinds.pop(name) for name in ("offset", "mask") if name in kinds}  # may be float32 for 16-bit data
        assert len(apart) <= 1 and len(set(kinds.values())) == 1, f"the public functions would not pass {kinds, apart}"
        if "rois" in arrays:
            arrays["rois"] = arrays["rois"].astype(np.float64 if case.dtype == "float64" else np.float32)
        return list(arrays.values())


def assert_same_bits(found: Any, wanted: Any) -> None:
    """Check an array, or arrays by name, for the same bits and memory order."""
    if isinstance(wanted, Mapping):
        assert list(found) == list(wanted)
    for name in wanted if isinstance(wanted, Mapping) else [...]:
        assert found[name].shape == wanted[name].shape
        # The stride of an axis of length 1 means nothing.
        axes = [axis for axis, size in enumerate(wanted[name].shape) if size > 1]
        assert [found[name].strides[axis] for axis in axes] == [wanted[name].strides[axis] for axis in axes]
        bits = [np.ascontiguousarray(array[name]).view(np.uint8) for array in (found, wanted)]
        np.testing.assert_array_equal(*bits)


def _images(array: np.ndarray) -> np.ndarray:
    return array if is_channels_last(array) else np.ascontiguousarray(array)


def _sampling(array: np.ndarray | None) -> np.ndarray | None:
    return array if array is None or is_evenly_spaced(array) else np.ascontiguousarray(array)


def _contiguous(array: np.ndarray | None) -> np.ndarray | None:
    return None if array is None else np.ascontiguousarray(array)


@pytest.fixture(scope="session", params=["cpu", "emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest) -> Runner:
    """Each runner in turn."""
    return {"cpu": CpuRunner, "emulated": EmulatedRunner, "gpu": GpuRunner}[request.param]()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Name the tests that were left out, and print the registers and spills that the compile tests recorded."""
    if missing := _missing():
        packages = sorted({name for names in missing.values() for name in names})
        paths = ", ".join(f"tests/{path}" for path in missing)
        terminalreporter.write_line(f"left out because {', '.join(packages)} cannot be imported: {paths}")
    by_architecture: dict[int, dict[str, tuple[int, int]]] = {}
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "kernel_resources":
                worst = by_architecture.setdefault(value[0], {})
                worst.update({kernel: max(used, worst.get(kernel, used)) for kernel, used in value[1].items()})
    if not by_architecture:
        return
    architectures = sorted(by_architecture)
    terminalreporter.section("registers of each kernel by architecture (spilled bytes in brackets)")
    terminalreporter.write_line(f"{'':34}" + "".join(f"{'sm_' + str(a):>8}" for a in architectures))
    for kernel in sorted({kernel for used in by_architecture.values() for kernel in used}):
        cells = (by_architecture[a].get(kernel, (0, 0)) for a in architectures)
        row = "".join(f"{f'{registers}({spills})' if spills else registers:>8}" for registers, spills in cells)
        terminalreporter.write_line(f"{kernel:34}{row}")
