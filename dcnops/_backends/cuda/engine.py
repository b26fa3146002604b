"""Finds and flattens the CUDA sources, compiles them at run time, launches them.

`Engine` is the one seam between the launch plans and what executes them: CuPy and a GPU in the library, NumPy and the
host compiler in the tests.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

Macros = Mapping[str, "str | int"]

_T = TypeVar("_T")

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
_PACKAGE = Path(__file__).resolve().parents[2]
_ROOTS = (_PACKAGE / "cuda", _PACKAGE.parent / "cuda")


class Device(NamedTuple):
    """What plans ask of a device."""

    id: int
    architecture: int
    """Compute capability, 90 for 9.0."""
    multiprocessors: int
    shared_bytes: int
    """Shared memory that a block can have."""


class Launcher(Protocol):
    """A compiled kernel: runs on `grid` blocks of `block` threads with the parameter struct `params`."""

    def __call__(self, grid: int, block: tuple[int, int], shared_bytes: int, params: ctypes.Structure) -> None: ...


class Engine:
    """What a launch plan needs of the world: memory, kernels and matrix products.

    Parameters
    ----------
    xp : module
        `cupy`, or a stand-in with `empty`, `zeros`, `broadcast_to`, `dtype` and the names of dtypes.
    compile : callable
        ``compile(source, kernel, options)`` returns a `Launcher` for the kernel of that name in a self-contained
        CUDA source; `options` are NVRTC's.
    matmul : callable
        ``matmul(a, b, out, accumulate, precision)`` computes ``out (+)= a @ b`` on stacks of matrices, see
        `Engine.matmul`.
    device : callable
        Describes the current `Device`; kernels are compiled once for each.
    pointer : callable
        Address of an array's first element.
    session : callable
        A context within which `matmul` can be called any number of times.
    """

    def __init__(
        self,
        xp: Any,
        compile: Callable[[str, str, tuple[str, ...]], Launcher],
        matmul: Callable[[Any, Any, Any, bool, str], None],
        device: Callable[[], Device],
        pointer: Callable[[Any], int],
        session: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self.xp = xp
        self._compile = compile
        self._matmul = matmul
        self._device = device
        self._pointer = pointer
        self._session = session
        self._launchers: dict[tuple[object, ...], Launcher] = {}
        self._lock = threading.Lock()
        self._recall = functools.lru_cache(maxsize=512)(self._make)

    @property
    def device(self) -> Device:
        """The current device."""
        return self._device()

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """A new C-contiguous array, at least 16-byte aligned, contents undefined."""
        return self.xp.empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """A new C-contiguous array of zeros."""
        return self.xp.zeros(shape, dtype)

    def pointer(self, array: Any | None) -> int | None:
        """Address of an array's first element, null for None."""
        return None if array is None else self._pointer(array)

    def recall(self, make: Callable[..., _T], *key: Any) -> _T:
        """``make(self, device, *key)`` for the current device, made once: what it returns must not be changed.

        `key` is hashable and says all that the result depends on.
        """
        found: _T = self._recall(make, self._device(), *key)
        return found

    def _make(self, make: Callable[..., Any], *key: Any) -> Any:
        return make(self, *key)

    def kernel(self, unit: str, kernel: str, macros: Macros) -> Launcher:
        """`kernel` of ``cuda/<unit>.cu``, specialised by `macros`, for the current device."""
        key = (unit, kernel, tuple(macros.items()), self._device().id)
        launcher = self._launchers.get(key)
        if launcher is None:
            with self._lock:
                launcher = self._launchers.get(key)
                if launcher is None:
                    launcher = self._compile(kernel_source(unit), kernel_name(kernel, macros), compile_options(macros))
                    self._launchers[key] = launcher
        return launcher

    def launch(
        self,
        unit: str,
        kernel: str,
        macros: Macros,
        grid: int,
        block: tuple[int, int],
        params: ctypes.Structure,
        shared_bytes: int = 0,
    ) -> None:
        """Run `kernel` of ``cuda/<unit>.cu``, specialised by `macros`; nothing happens on an empty grid.

        `block` is (x, y); `params` is the kernel's only argument.
        """
        if grid:
            self.kernel(unit, kernel, macros)(grid, block, shared_bytes, params)

    def matmul(self, a: Any, b: Any, out: Any, accumulate: bool = False, precision: str = "ieee") -> None:
        """``out (+)= a @ b`` with sums in float32 (float64 for float64).

        Parameters
        ----------
        a : array [B, M, L], b : array [B, L, N]
            Same dtype; of the last two axes of each, one has stride 1 and the other a stride that covers it.
        out : array [B, M, N]
            dtype of `a`, or float32 for 16-bit `a`; unit stride in N.
        accumulate : bool
            Add to `out` instead of overwriting it.
        precision : str
            "tf32" allows float32 factors to be rounded to the 10 bits of mantissa that tensor cores take; any other
            does not.
        """
        with self._session():
            self._multiply(a, b, out, accumulate, precision)

    @contextlib.contextmanager
    def products(self) -> Iterator[Callable[..., None]]:
        """For many products in a row: a context with a cheaper `matmul`."""
        with self._session():
            yield self._multiply

    def _multiply(self, a: Any, b: Any, out: Any, accumulate: bool = False, precision: str = "ieee") -> None:
        if out.size:
            self._matmul(a, b, out, accumulate, precision)


@functools.cache
def dtype_name(dtype: Any) -> str:
    """The name of a dtype; NumPy makes it up anew each time it is asked."""
    return str(dtype.name)


def kernel_name(kernel: str, macros: Macros) -> str:
    """The name of a kernel in its compiled form, as a profiler shows it: ``<op>_<role>_<dtype>``."""
    return f"{kernel}_{macros['DCN_SUFFIX']}"


def compile_options(macros: Macros) -> tuple[str, ...]:
    """NVRTC's options for one specialisation.

    The macro DCN_ARCHITECTURE names an architecture of which a specialisation uses instructions that no other has.
    """
    options = ["--std=c++17", "--generate-line-info", *(f"-D{name}={value}" for name, value in macros.items())]
    if "DCN_ARCHITECTURE" in macros:
        # NVRTC takes it before the device's own, which CuPy adds: the more specific one.
        options.append(f"-arch=sm_{macros['DCN_ARCHITECTURE']}")
    return tuple(options)


@functools.cache
def kernel_source(unit: str) -> str:
    """The self-contained text of ``cuda/<unit>.cu``: its own includes stand in place of the include lines, each once.

    CuPy's cache on disk knows a kernel by its source text: an edit in a header must change it. `#line` keeps the
    compiler's messages at the true file and line.
    """
    root = next((root for root in _ROOTS if root.is_dir()), None)
    if root is None:
        raise FileNotFoundError(f"the CUDA sources of dcnops are in neither {_ROOTS[0]} nor {_ROOTS[1]}")
    return "".join(_flatten(root, f"{unit}.cu", set()))


def _flatten(root: Path, name: str, seen: set[str]) -> list[str]:
    seen.add(name)
    text = [f'#line 1 "cuda/{name}"\n']
    for number, line in enumerate((root / name).read_text(encoding="utf-8").splitlines(), start=1):
        include = _INCLUDE.match(line)
        if include is None:
            text.append(f"{line}\n")
        elif include.group(1) not in seen:
            text += [*_flatten(root, include.group(1), seen), f'#line {number + 1} "cuda/{name}"\n']
        else:
            text.append("\n")
    return text
