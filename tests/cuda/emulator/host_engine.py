"""The engine of the tests: NumPy arrays, kernels on the CPU, matrix products in NumPy."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from dcnops._backends.cuda.engine import Device, Engine
from tests.cuda.emulator.host_compiler import HostCompiler
from tests.cuda.emulator.sanitizers import is_sanitized

HOPPER = Device(0, 90, 4, 227 * 1024)
"""What plans believe to run on: compute capability 9.0, but with few multiprocessors, as the tests' sizes are small."""

_ALIGNMENT = 256
"""Of every allocation, as CUDA's allocator gives it."""

_LIBC = ctypes.CDLL(None)
_LIBC.posix_memalign.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
_LIBC.free.argtypes = (ctypes.c_void_p,)


class _Allocation:
    """Memory straight from the C library, whose end AddressSanitizer knows; NumPy keeps small pieces to itself."""

    def __init__(self, size: int) -> None:
        self._address = ctypes.c_void_p()
        if _LIBC.posix_memalign(ctypes.byref(self._address), _ALIGNMENT, max(size, 1)):
            raise MemoryError(f"cannot allocate {size} bytes")
        self.__array_interface__ = {
            "data": (self._address.value, False),
            "shape": (size,),
            "typestr": "|u1",
            "version": 3,
        }

    def __del__(self) -> None:
        _LIBC.free(self._address)


class HostArrays:
    """Stands for `cupy`: NumPy, but arrays are aligned as on a GPU and hold NaN until they are written."""

    def empty(self, shape: Any, dtype: Any = float) -> np.ndarray:
        """An array whose bytes are all 0xFF: NaN in every float type, -1 in signed integers."""
        kind = np.dtype(dtype)
        extents = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
        size = int(np.prod(extents, dtype=np.int64)) * kind.itemsize
        memory = np.asarray(_Allocation(size), dtype=np.uint8)
        memory.fill(0xFF)
        array: np.ndarray = memory.view(kind).reshape(extents)
        return array

    def zeros(self, shape: Any, dtype: Any = float) -> np.ndarray:
        array = self.empty(shape, dtype)
        array[...] = 0
        return array

    def empty_like(self, array: np.ndarray, dtype: Any = None) -> np.ndarray:
        return self.empty(array.shape, array.dtype if dtype is None else dtype)

    def zeros_like(self, array: np.ndarray, dtype: Any = None) -> np.ndarray:
        return self.zeros(array.shape, array.dtype if dtype is None else dtype)

    def asarray(self, array: Any, dtype: Any = None) -> np.ndarray:
        """A copy of `array` in such memory, as `cupy.asarray` copies to a GPU; itself if it is there already."""
        given = np.asarray(array, dtype=dtype)
        if _is_owned(given):
            return given
        copy = self.empty(given.shape, given.dtype)
        copy[...] = given
        return copy

    def ascontiguousarray(self, array: Any, dtype: Any = None) -> np.ndarray:
        given = np.asarray(array, dtype=dtype)
        if given.flags.c_contiguous:
            return given
        copy = self.empty(given.shape, given.dtype)
        copy[...] = given
        return copy

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def host_engine(
    schedule: str = "forward",
    seed: int = 0,
    single_block: bool = False,
    threads: int = 1,
    sanitize: bool | None = None,
    device: Device = HOPPER,
) -> Engine:
    """An engine whose kernels run on the CPU; see `HostCompiler` for the parameters.

    `sanitize` is None for: exactly in a process started by `run_sanitized`. `device` is what the plans believe to run
    on.
    """
    compiler = HostCompiler(
        schedule=schedule,
        seed=seed,
        single_block=single_block,
        threads=threads,
        sanitize=is_sanitized() if sanitize is None else sanitize,
    )
    return Engine(HostArrays(), compiler.compile, matmul, lambda: device, lambda array: int(array.ctypes.data))


def matmul(a: np.ndarray, b: np.ndarray, out: np.ndarray, accumulate: bool, precision: str = "ieee") -> None:
    """``out (+)= a @ b`` under the contract of `Engine.products`, that is, what cuBLAS can do.

    Raises
    ------
    AssertionError
        When the arguments break the contract.
    """
    assert a.ndim == b.ndim == out.ndim == 3, f"matmul: {a.shape} @ {b.shape} -> {out.shape}"
    (B, M, L), N = a.shape, b.shape[2]
    assert (b.shape, out.shape) == ((B, L, N), (B, M, N)), f"matmul: {a.shape} @ {b.shape} -> {out.shape}"
    wide = np.dtype(np.float64 if a.dtype == np.float64 else np.float32)
    assert a.dtype == b.dtype, f"matmul needs factors of one dtype, got {a.dtype} and {b.dtype}"
    assert out.dtype in (a.dtype, wide), f"matmul: {a.dtype} factors give {a.dtype} or {wide}, not {out.dtype}"
    for name, matrix, may_be_transposed in (("a", a, True), ("b", b, True), ("out", out, False)):
        rows, columns = matrix.shape[1:]
        vertical, horizontal = (stride // matrix.itemsize for stride in matrix.strides[1:])
        assert not any(stride % matrix.itemsize for stride in matrix.strides), f"matmul: strides of {name}"
        assert _covers(rows, vertical, columns, horizontal) or (
            may_be_transposed and _covers(columns, horizontal, rows, vertical)
        ), f"matmul: cuBLAS cannot take {name} of shape {matrix.shape} with strides {matrix.strides}"
    assert not any(np.shares_memory(out, factor) for factor in (a, b)), "matmul: out overlaps a factor"
    if out.shape[0] > 1:
        stacked = out.strides[0] >= out.strides[1] * (M - 1) + N * out.itemsize
        side_by_side = N * out.itemsize <= out.strides[0] and B * out.strides[0] <= out.strides[1]
        assert stacked or side_by_side, "matmul: the matrices of out overlap"

    if precision == "tf32" and a.dtype == np.float32:
        a, b = _tf32(a), _tf32(b)
    product = a.astype(wide) @ b.astype(wide)
    if accumulate:
        product += out.astype(wide)
    out[...] = product.astype(out.dtype)


def _tf32(array: np.ndarray) -> np.ndarray:
    """float32 rounded to 10 bits of mantissa, as tensor cores take it: to nearest, ties away from zero."""
    bits = np.ascontiguousarray(array).view(np.uint32)
    with np.errstate(over="ignore"):
        rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isnan(array), array, rounded)


def _covers(rows: int, vertical: int, columns: int, horizontal: int) -> bool:
    """Whether rows of unit stride lie `vertical` apart without overlap; the stride of an extent of 1 means nothing."""
    return (columns == 1 or horizontal == 1) and (rows == 1 or vertical >= max(columns, 1))


def _is_owned(array: np.ndarray) -> bool:
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    return isinstance(owner, _Allocation)
