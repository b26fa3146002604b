"""Matrix products by the cuBLAS that CuPy has loaded.

CuPy's own wrappers refuse to be captured in a CUDA graph, so two functions are called through ctypes.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import cupy
from cupy_backends.cuda.api import runtime
from cupy_backends.cuda.libs import cublas

from dcnops._backends.cuda.engine import dtype_name
from dcnops._backends.cuda.programs import Location, Product
from dcnops._dtypes import DTYPES

_Matrices: TypeAlias = tuple[Any, tuple[int, ...], tuple[int, ...]]
"""dtype, shape and strides of a stack of matrices."""

_DISALLOW_REDUCED_PRECISION_REDUCTION = 16
_MATH_MODE = cublas.CUBLAS_DEFAULT_MATH | _DISALLOW_REDUCED_PRECISION_REDUCTION
"""Mode of all products: TF32 only if the compute type asks for it, and 16-bit products summed in float32."""


class CublasSession:
    """Context in which CuPy's cuBLAS handle is set up for products on a stream, the current one by default."""

    def __init__(self, stream: int | None = None) -> None:
        self._stream = stream

    def __enter__(self) -> int:
        stream = cupy.cuda.get_current_stream().ptr if self._stream is None else self._stream
        self._handle = cupy.cuda.device.get_cublas_handle()
        _check(_set_stream(ctypes.c_void_p(self._handle), ctypes.c_void_p(stream)))
        self._mode = cublas.getMathMode(self._handle)
        cublas.setMathMode(self._handle, _MATH_MODE)
        return int(self._handle)

    def __exit__(self, *_: object) -> None:
        cublas.setMathMode(self._handle, self._mode)


class PreparedProduct(NamedTuple):
    """A recorded product: cuBLAS's arguments but for the handle, and where `b`, `a` and `out` lie."""

    sizes: tuple[Any, ...]
    after_b: tuple[Any, ...]
    after_a: tuple[Any, ...]
    after_out: tuple[Any, ...]
    b: Location
    a: Location
    out: Location


def prepare_product(product: Product) -> PreparedProduct:
    """Work out all that cuBLAS takes for a recorded product, but for the addresses."""
    a, b, out = product.a, product.b, product.out
    sizes, after_b, after_a, after_out = _gemm_arguments(a[:3], b[:3], out[:3], product.accumulate, product.precision)
    return PreparedProduct(sizes, after_b, after_a, after_out, b.location, a.location, out.location)


def multiply(handle: int, product: PreparedProduct, addresses: Sequence[int]) -> None:
    """Issue a prepared product for the addresses of a call, within a `CublasSession` that gave `handle`."""
    sizes, after_b, after_a, after_out, (b, b_offset), (a, a_offset), (out, out_offset) = product
    pointer = ctypes.c_void_p
    status = _gemm(
        pointer(handle), *sizes, pointer(addresses[b] + b_offset), *after_b, pointer(addresses[a] + a_offset), *after_a,
        pointer(addresses[out] + out_offset), *after_out,
    )  # fmt: skip
    _check(status)


def matmul(a: cupy.ndarray, b: cupy.ndarray, out: cupy.ndarray, accumulate: bool, precision: str) -> None:
    """Compute ``out (+)= a @ b`` within a `CublasSession`; see `Engine.products`."""
    sizes, after_b, after_a, after_out = _gemm_arguments(
        (a.dtype, a.shape, a.strides), (b.dtype, b.shape, b.strides), (out.dtype, out.shape, out.strides),
        accumulate, precision,
    )  # fmt: skip
    address = ctypes.c_void_p
    status = _gemm(
        address(cupy.cuda.device.get_cublas_handle()), *sizes,
        address(b.data.ptr), *after_b, address(a.data.ptr), *after_a, address(out.data.ptr), *after_out,
    )  # fmt: skip
    _check(status)


@functools.lru_cache(maxsize=1024)
def _gemm_arguments(
    a: _Matrices, b: _Matrices, out: _Matrices, accumulate: bool, precision: str
) -> tuple[tuple[Any, ...], ...]:
    """Return the arguments of cublasGemmStridedBatchedEx between the handle and the addresses of `b`, `a` and `out`.

    cuBLAS expects column-major matrices, so it is asked for the transposed product: out.T (+)= b.T @ a.T.
    """
    batch, rows, columns = out[1]
    scalar_type, compute_type = _compute_types(dtype_name(a[0]), precision)
    (a_operation, after_a), (b_operation, after_b), (_, after_out) = map(_gemm_operand, (a, b, out))
    factor, old_factor = (ctypes.byref(scalar_type(value)) for value in (1, accumulate))
    sizes = b_operation, a_operation, columns, rows, a[1][2], factor
    return sizes, after_b, (*after_a, old_factor), (*after_out, batch, compute_type, cublas.CUBLAS_GEMM_DEFAULT)


def _compute_types(dtype: str, precision: str) -> tuple[Any, int]:
    """Return the C type of the scalar factors and cuBLAS's compute type."""
    if dtype == "float64":
        return ctypes.c_double, cublas.CUBLAS_COMPUTE_64F
    if dtype == "float32" and precision == "tf32":
        return ctypes.c_float, cublas.CUBLAS_COMPUTE_32F_FAST_TF32
    return ctypes.c_float, cublas.CUBLAS_COMPUTE_32F


def _gemm_operand(matrices: _Matrices) -> tuple[int, tuple[Any, ...]]:
    """Return cuBLAS's operation for a stack of transposed matrices, and their type, leading dimension and stride."""
    dtype, (_, rows, columns), strides = matrices
    distance, row_stride, column_stride = (stride // dtype.itemsize for stride in strides)
    kind, step = DTYPES[dtype_name(dtype)].cublas_type, ctypes.c_longlong(distance)
    # The stride of an axis of length 1 is meaningless.
    if columns == 1 or column_stride == 1:
        return cublas.CUBLAS_OP_N, (kind, max(columns, 1 if rows == 1 else row_stride), step)
    return cublas.CUBLAS_OP_T, (kind, max(rows, column_stride), step)


def _check(status: int) -> None:
    if status:
        raise cublas.CUBLASError(status)


_WINDOWS_NAME = f"cublas64_{runtime.runtimeGetVersion() // 1000}.dll"
# A look-up in an extension module also searches the libraries that it is linked with. No argtypes are set: converting
# the arguments would take longer than the call. All but ints are ctypes objects.
_LIBRARY = ctypes.CDLL(_WINDOWS_NAME if sys.platform == "win32" else cublas.__file__)
_set_stream, _gemm = _LIBRARY.cublasSetStream_v2, _LIBRARY.cublasGemmStridedBatchedEx
