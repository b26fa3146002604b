"""CuPy arrays: the launch plans run on the arrays' GPU, on its current stream.

The only module that needs CuPy to be imported.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import cupy
import numpy
from cupy._core import _routines_linalg as cupy_linalg
from cupy_backends.cuda.api import runtime
from cupy_backends.cuda.libs import cublas

from dcnops._backends.cuda import plans
from dcnops._backends.cuda.engine import Device, Engine, Launcher, dtype_name
from dcnops._backends.cuda.plans.array_jobs import is_channels_last, sum_dtype
from dcnops._dtypes import DTYPES
from dcnops._errors import KernelCompileError
from dcnops._geometry import DeformConvGeometry, DeformRoIPoolGeometry

_FLOAT32 = numpy.dtype(numpy.float32)

_Matrices: TypeAlias = tuple[Any, tuple[int, ...], tuple[int, ...]]
"""The dtype, shape and strides of a stack of matrices."""

_SHARED_BYTES_OF_ALL = 48 * 1024
"""Dynamic shared memory that a kernel has without asking for more."""


def deform_conv2d(
    geometry: DeformConvGeometry,
    input: cupy.ndarray,
    offset: cupy.ndarray,
    weight: cupy.ndarray,
    bias: cupy.ndarray | None,
    mask: cupy.ndarray | None,
    precision: str | None,
) -> cupy.ndarray:
    """See `dcnops.deform_conv2d`; the arguments have been checked."""
    with input.device:
        return plans.deform_conv2d(
            ENGINE,
            geometry,
            _images(input),
            _images(offset),
            contiguous(weight),
            _given(contiguous, bias),
            _given(_images, mask),
            precision=_precision(precision, input),
        )


def deform_conv2d_backward(
    geometry: DeformConvGeometry,
    grad_out: cupy.ndarray,
    input: cupy.ndarray,
    offset: cupy.ndarray,
    weight: cupy.ndarray,
    mask: cupy.ndarray | None,
    needs: frozenset[str],
    deterministic: bool,
    precision: str | None,
) -> dict[str, cupy.ndarray]:
    """See `dcnops.deform_conv2d_backward`; the arguments have been checked."""
    with input.device:
        return plans.deform_conv2d_backward(
            ENGINE,
            geometry,
            _images(grad_out),
            _images(input),
            _images(offset),
            contiguous(weight),
            _given(_images, mask),
            needs,
            deterministic,
            precision=_precision(precision, input),
        )


def deform_roi_pool(
    geometry: DeformRoIPoolGeometry,
    input: cupy.ndarray,
    rois: cupy.ndarray,
    offset: cupy.ndarray | None,
    mask: cupy.ndarray | None,
    channels_last: bool = False,
) -> cupy.ndarray:
    """See `dcnops.deform_roi_pool`; the arguments have been checked.

    With `channels_last` the result [R, C, P, Q] lies in memory as [R, P, Q, C].
    """
    with input.device:
        return plans.deform_roi_pool(
            ENGINE,
            geometry,
            _images(input),
            _coordinates(rois, input),
            _given(contiguous, offset),
            _given(contiguous, mask),
            channels_last,
        )


def deform_roi_pool_backward(
    geometry: DeformRoIPoolGeometry,
    grad_out: cupy.ndarray,
    input: cupy.ndarray,
    rois: cupy.ndarray,
    offset: cupy.ndarray | None,
    mask: cupy.ndarray | None,
    needs: frozenset[str],
    deterministic: bool,
) -> dict[str, cupy.ndarray]:
    """See `dcnops.deform_roi_pool_backward`; the arguments have been checked."""
    with input.device:
        return plans.deform_roi_pool_backward(
            ENGINE,
            geometry,
            _images(grad_out),
            _images(input),
            _coordinates(rois, input),
            _given(contiguous, offset),
            _given(contiguous, mask),
            needs,
            deterministic,
        )


def _coordinates(rois: cupy.ndarray, input: cupy.ndarray) -> cupy.ndarray:
    """The regions in the dtype of coordinates beside `input`."""
    if dtype_name(rois.dtype) == "bfloat16":
        # Not every CuPy converts bfloat16: its bits are the upper half of a float32's.
        rois = (cupy.ascontiguousarray(rois.view(numpy.uint16)).astype(numpy.uint32) << 16).view(numpy.float32)
    return cupy.ascontiguousarray(rois, sum_dtype(ENGINE, input.dtype))


def contiguous(array: cupy.ndarray) -> cupy.ndarray:
    """The array, or a C-contiguous copy."""
    if array.flags.c_contiguous:
        return array
    if array.dtype.itemsize == 2:
        # Copied as integers: not every CuPy has a copy kernel for bfloat16.
        return cupy.ascontiguousarray(array.view(numpy.uint16)).view(array.dtype)
    return cupy.ascontiguousarray(array)


def _images(array: cupy.ndarray) -> cupy.ndarray:
    return array if array.flags.c_contiguous or is_channels_last(array) else contiguous(array)


def _given(change: Callable[[cupy.ndarray], cupy.ndarray], array: cupy.ndarray | None) -> cupy.ndarray | None:
    return None if array is None else change(array)


def _precision(precision: str | None, input: cupy.ndarray) -> str:
    """The precision of matrix products; None is what CuPy's own products have, by its compute type or CUPY_TF32."""
    if input.dtype != _FLOAT32:
        return "ieee"
    if precision is not None:
        return precision
    return "tf32" if cupy_linalg.get_compute_type(numpy.float32) == cupy_linalg.COMPUTE_TYPE_TF32 else "ieee"


def _compile(source: str, kernel: str, options: tuple[str, ...]) -> Launcher:
    try:
        raw = cupy.RawModule(code=source, options=options).get_function(kernel)
        # The function of this device: the engine keeps one launcher for each.
        function = raw.kernel
    except cupy.cuda.compiler.CompileException as error:
        raise KernelCompileError(f"{kernel} must compile, got from NVRTC:\n{error}") from error
    allowed_bytes = _SHARED_BYTES_OF_ALL
    as_argument, address = cupy.cuda.function.CPointer, ctypes.addressof

    def launch(grid: int, block: tuple[int, int], shared_bytes: int, params: ctypes.Structure) -> None:
        nonlocal allowed_bytes
        if shared_bytes > allowed_bytes:
            raw.max_dynamic_shared_size_bytes = allowed_bytes = shared_bytes
        function((grid,), block, (as_argument(address(params)),), shared_mem=shared_bytes)

    return launch


def _matmul(a: cupy.ndarray, b: cupy.ndarray, out: cupy.ndarray, accumulate: bool, precision: str) -> None:
    sizes, after_b, after_a, after_out = _gemm_arguments(
        (a.dtype, a.shape, a.strides), (b.dtype, b.shape, b.strides), (out.dtype, out.shape, out.strides),
        accumulate, precision,
    )  # fmt: skip
    address = ctypes.c_void_p
    _CUBLAS.gemm(
        address(cupy.cuda.device.get_cublas_handle()), *sizes,
        address(b.data.ptr), *after_b, address(a.data.ptr), *after_a, address(out.data.ptr), *after_out,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _gemm_arguments(
    a: _Matrices, b: _Matrices, out: _Matrices, accumulate: bool, precision: str
) -> tuple[tuple[Any, ...], ...]:
    """What cublasGemmStridedBatchedEx takes between the handle and the addresses of `b`, `a` and `out`, and after them.

    cuBLAS stores columns first, so it is asked for the transposed product: out.T (+)= b.T @ a.T.
    """
    batch, rows, columns = out[1]
    scalar_type, compute_type = _gemm_type(dtype_name(a[0]), precision)
    (a_operation, after_a), (b_operation, after_b), (_, after_out) = map(_gemm_operand, (a, b, out))
    factor, old_factor = (ctypes.byref(scalar_type(value)) for value in (1, accumulate))
    sizes = b_operation, a_operation, columns, rows, a[1][2], factor
    return sizes, after_b, (*after_a, old_factor), (*after_out, batch, compute_type, cublas.CUBLAS_GEMM_DEFAULT)


class _Session:
    """Readies CuPy's cuBLAS for products on the current stream."""

    def __enter__(self) -> None:
        self._handle = cupy.cuda.device.get_cublas_handle()
        _CUBLAS.set_stream(self._handle, cupy.cuda.get_current_stream().ptr)
        self._mode = cublas.getMathMode(self._handle)
        cublas.setMathMode(self._handle, _MATH_MODE)

    def __exit__(self, *_: object) -> None:
        cublas.setMathMode(self._handle, self._mode)


class _Cublas:
    """Two functions of the cuBLAS that CuPy has loaded: its own wrappers refuse to be captured in a graph."""

    def __init__(self) -> None:
        major = runtime.runtimeGetVersion() // 1000
        # What is looked up in an extension module is found in the libraries that it is linked with.
        library = ctypes.CDLL(f"cublas64_{major}.dll" if sys.platform == "win32" else cublas.__file__)
        # Without types of arguments, whose conversion takes longer than the call: all but ints are ctypes objects.
        self._set_stream, self._gemm = library.cublasSetStream_v2, library.cublasGemmStridedBatchedEx

    def set_stream(self, handle: int, stream: int) -> None:
        self._check(self._set_stream(ctypes.c_void_p(handle), ctypes.c_void_p(stream)))

    def gemm(self, *arguments: Any) -> None:
        """cublasGemmStridedBatchedEx."""
        self._check(self._gemm(*arguments))

    @staticmethod
    def _check(status: int) -> None:
        if status:
            raise cublas.CUBLASError(status)


def _gemm_type(dtype: str, precision: str) -> tuple[Any, int]:
    """The type of scalar factors, and what cuBLAS computes with."""
    if dtype == "float64":
        return ctypes.c_double, cublas.CUBLAS_COMPUTE_64F
    if dtype == "float32" and precision == "tf32":
        return ctypes.c_float, cublas.CUBLAS_COMPUTE_32F_FAST_TF32
    return ctypes.c_float, cublas.CUBLAS_COMPUTE_32F


def _gemm_operand(matrices: _Matrices) -> tuple[int, tuple[Any, ...]]:
    """cuBLAS's operation for the transposes of a stack of matrices; their type, leading dimension and distance."""
    dtype, (_, rows, columns), strides = matrices
    distance, row_stride, column_stride = (stride // dtype.itemsize for stride in strides)
    kind, step = DTYPES[dtype_name(dtype)].cublas_type, ctypes.c_longlong(distance)
    # The stride of an axis of length 1 says nothing.
    if columns == 1 or column_stride == 1:
        return cublas.CUBLAS_OP_N, (kind, max(columns, 1 if rows == 1 else row_stride), step)
    return cublas.CUBLAS_OP_T, (kind, max(rows, column_stride), step)


def _current_device() -> Device:
    return _describe(int(cupy.cuda.runtime.getDevice()))


@functools.cache
def _describe(index: int) -> Device:
    device = cupy.cuda.Device(index)
    return Device(
        index,
        int(device.compute_capability),
        int(device.attributes["MultiProcessorCount"]),
        int(device.attributes["MaxSharedMemoryPerBlockOptin"]),
    )


def _pointer(array: cupy.ndarray) -> int:
    return int(array.data.ptr)


_CUBLAS = _Cublas()

_DISALLOW_REDUCED_PRECISION_REDUCTION = 16
_MATH_MODE = cublas.CUBLAS_DEFAULT_MATH | _DISALLOW_REDUCED_PRECISION_REDUCTION
"""Whatever a program has set on CuPy's handle: no TF32 but by the compute type, and partial sums of 16-bit products are
added in float32."""

ENGINE = Engine(cupy, _compile, _matmul, _current_device, _pointer, _Session)
