"""Interface between the launch plans and the libraries that execute them.

The library runs plans with CuPy on a GPU, the tests run them with NumPy and a host compiler.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, TypeVar

from dcnops._backends.cuda.kernel_source import Macros, compile_options, kernel_name, kernel_source
from dcnops._explain import LOGGER

_T = TypeVar("_T")


class Device(NamedTuple):
    """Properties of a device that plans depend on."""

    id: int
    architecture: int
    """Compute capability, 90 for 9.0."""
    multiprocessors: int
    shared_bytes: int
    """Maximum shared memory of a block."""


class Launcher(Protocol):
    """Compiled kernel that runs on `grid` blocks of `block` threads with the parameter struct `params`."""

    def __call__(self, grid: int, block: tuple[int, int], shared_bytes: int, params: ctypes.Structure) -> None: ...


class Engine:
    """Memory, kernels and matrix products for the launch plans.

    Parameters
    ----------
    xp : module
        `cupy`, or a stand-in with `empty`, `zeros`, `broadcast_to`, `dtype` and the names of dtypes.
    compile : callable
        ``compile(source, kernel, options)`` returns a `Launcher` for the kernel of that name in a self-contained
        CUDA source; `options` are NVRTC's.
    matmul : callable
        ``matmul(a, b, out, accumulate, precision)`` computes ``out (+)= a @ b`` on stacks of matrices, see
        `Engine.products`.
    device : callable
        Describes the current `Device`; kernels are compiled once per device.
    pointer : callable
        Returns the address of an array's first element.
    session : callable
        Returns a context within which `matmul` may be called repeatedly.
    """

    explains = False
    """True if plans log their decisions and the reasons."""

    def __init__(
        self,
        xp: Any,
        compile: Callable[[str, str, tuple[str, ...]], Launcher],
        matmul: Callable[[Any, Any, Any, bool, str], None],
        device: Callable[[], Device],
        pointer: Callable[[Any], int],
        session: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
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

    @functools.cached_property
    def explaining(self) -> Engine:
        """Engine with the same kernels that logs every launch and product.

        Its plans are cached separately, so calls that are not explained pay nothing.
        """
        return _ExplainingEngine(self)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return a new C-contiguous array, at least 16-byte aligned, with undefined contents."""
        return self.xp.empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return a new C-contiguous array of zeros."""
        return self.xp.zeros(shape, dtype)

    def pointer(self, array: Any | None) -> int | None:
        """Return the address of an array's first element, null for None."""
        return None if array is None else self._pointer(array)

    def recall(self, make: Callable[..., _T], *key: Any) -> _T:
        """Return ``make(self, device, *key)`` for the current device, cached after the first call.

        The hashable `key` must determine the result, which must not be modified.
        """
        found: _T = self._recall(make, self._device(), *key)
        return found

    def _make(self, make: Callable[..., Any], *key: Any) -> Any:
        return make(self, *key)

    def kernel(self, unit: str, kernel: str, macros: Macros) -> Launcher:
        """Return `kernel` of ``cuda/<unit>.cu``, specialised by `macros`, for the current device."""
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
        """Run `kernel` of ``cuda/<unit>.cu``, specialised by `macros`; do nothing if the grid is empty.

        `block` is (x, y); `params` is the kernel's only argument.
        """
        if grid:
            self.kernel(unit, kernel, macros)(grid, block, shared_bytes, params)

    @contextlib.contextmanager
    def products(self) -> Iterator[Callable[..., None]]:
        """Enter a context that yields ``matmul(a, b, out, accumulate=False, precision="ieee")``.

        It computes ``out (+)= a @ b`` with sums in float32 (float64 for float64).

        - `a` [B, M, L] and `b` [B, L, N] have the same dtype. Of the last two axes of each, one has stride 1 and the
          other a stride that covers it.
        - `out` [B, M, N] has the dtype of `a`, or float32 for 16-bit `a`, and unit stride in N.
        - `accumulate` adds to `out` instead of overwriting it.
        - `precision` "tf32" permits rounding float32 factors to the 10 bits of mantissa that tensor cores take.
        """
        with self._session():
            yield self._multiply

    def _multiply(self, a: Any, b: Any, out: Any, accumulate: bool = False, precision: str = "ieee") -> None:
        if out.size:
            self._matmul(a, b, out, accumulate, precision)


class _ExplainingEngine(Engine):
    """Engine that logs every launch and product of another one before it runs."""

    explains = True

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.xp, engine._compile, engine._matmul, engine._device, engine._pointer, engine._session)
        self._engine = engine

    def kernel(self, unit: str, kernel: str, macros: Macros) -> Launcher:
        launcher = self._engine.kernel(unit, kernel, macros)
        name = kernel_name(kernel, macros)

        def launch(grid: int, block: tuple[int, int], shared_bytes: int, params: ctypes.Structure) -> None:
            LOGGER.debug("launch %s: grid %d, block %dx%d, shared memory %d bytes", name, grid, *block, shared_bytes)
            launcher(grid, block, shared_bytes, params)

        return launch

    def _multiply(self, a: Any, b: Any, out: Any, accumulate: bool = False, precision: str = "ieee") -> None:
        LOGGER.debug("product %s @ %s -> %s, %s", a.shape, b.shape, out.dtype, precision)
        super()._multiply(a, b, out, accumulate, precision)


@functools.cache
def dtype_name(dtype: Any) -> str:
    """Return the name of a dtype; NumPy builds the string each time it is asked."""
    return str(dtype.name)
