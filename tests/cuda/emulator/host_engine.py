"""Engine of the tests: NumPy arrays, kernels on the CPU, matrix products in NumPy."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dcnops._backends.cuda.deform_roi_pool_programs import RoIPoolProgram
from dcnops._backends.cuda.engine import Device, Engine
from dcnops._backends.cuda.programs import Launch, Matrices, Product, Program
from tests.cuda.emulator.host_compiler import HostCompiler
from tests.cuda.emulator.sanitizers import is_sanitized

HOPPER = Device(0, 90, 4, 227 * 1024)
"""Compute capability 9.0 with few multiprocessors, because the tests use small sizes."""

_ALIGNMENT = 256
"""Alignment of every allocation, like that of CUDA's allocator."""

_LIBC = ctypes.CDLL(None)
_LIBC.posix_memalign.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
_LIBC.free.argtypes = (ctypes.c_void_p,)


class _Allocation:
    """Memory of the C library, so that AddressSanitizer knows where it ends. NumPy pools small allocations."""

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
    """Replacement of `cupy`: NumPy with arrays that are aligned as on a GPU and filled with NaN."""

    def empty(self, shape: Any, dtype: Any = float) -> np.ndarray:
        """Return an array of bytes 0xFF, which are NaN in every float type."""
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
        """Copy `array` to such memory, like `cupy.asarray`; return it unchanged if it is already there."""
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
    """Return an engine that runs kernels on the CPU. See `HostCompiler` for the parameters.

    `device` is the device that the plans see. `sanitize=None` sanitizes if `run_sanitized` started this process.
    """
    compiler = HostCompiler(
        schedule=schedule,
        seed=seed,
        single_block=single_block,
        threads=threads,
        sanitize=is_sanitized() if sanitize is None else sanitize,
    )
    return Engine(HostArrays(), compiler.compile, matmul, lambda: device, lambda array: int(array.ctypes.data))


def prepare_program(program: Program) -> Callable[[Sequence[int], int], None]:
    """Return a function that issues a recorded program for the addresses of a call."""

    def issue(addresses: Sequence[int], stream: int) -> None:
        params = program.located_params(addresses)
        for step in program.steps:
            if isinstance(step, Launch):
                struct = step.kind.from_buffer(params, step.params)
                step.launcher(step.grid, step.block, step.shared_bytes, struct)
            elif isinstance(step, Product):
                a, b, out = (_matrices(matrices, addresses) for matrices in (step.a, step.b, step.out))
                matmul(a, b, out, step.accumulate, step.precision)
            else:
                ctypes.memset(addresses[step.location.base] + step.location.offset, 0, step.nbytes)

    return issue


def prepare_roi_pool_program(program: RoIPoolProgram) -> Callable[[Sequence[int], int, int], None]:
    """Return a function that issues a program of RoI pooling for the addresses and the regions of a call."""
    return lambda addresses, stream, regions: prepare_program(program.for_regions(regions))(addresses, stream)


def _matrices(matrices: Matrices, addresses: Sequence[int]) -> np.ndarray:
    """Return a view of a stack of matrices at the addresses of a call."""
    span = matrices.dtype.itemsize + sum((n - 1) * s for n, s in zip(matrices.shape, matrices.strides))
    memory = (ctypes.c_char * span).from_address(addresses[matrices.location.base] + matrices.location.offset)
    return np.ndarray(matrices.shape, matrices.dtype, memory, strides=matrices.strides)


def matmul(a: np.ndarray, b: np.ndarray, out: np.ndarray, accumulate: bool, precision: str = "ieee") -> None:
    """Compute ``out (+)= a @ b``, and assert that cuBLAS can: see `Engine.products`."""
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
    """Round float32 to 10 bits of mantissa like tensor cores: to nearest, ties away from zero."""
    bits = np.ascontiguousarray(array).view(np.uint32)
    with np.errstate(over="ignore"):
        rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isnan(array), array, rounded)


def _covers(rows: int, vertical: int, columns: int, horizontal: int) -> bool:
    """Return True if rows of unit stride do not overlap. The stride of an axis of length 1 is ignored."""
    return (columns == 1 or horizontal == 1) and (rows == 1 or vertical >= max(columns, 1))


def _is_owned(array: np.ndarray) -> bool:
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    return isinstance(owner, _Allocation)
