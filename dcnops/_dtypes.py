"""Table of the supported data types and of everything that the library needs to know about each."""

from __future__ import annotations

from typing import NamedTuple


class DType(NamedTuple):
    """Entry of the table."""

    name: str  # name in NumPy, CuPy, PyTorch and JAX
    suffix: str  # suffix of kernel names
    c_name: str  # element type in the CUDA sources
    itemsize: int  # bytes per element
    cublas_type: int  # `cudaDataType` value for cuBLAS

    @property
    def is_16_bit(self) -> bool:
        """True for float16 and bfloat16."""
        return self.itemsize == 2

    @property
    def sum_dtype(self) -> str:
        """Name of the type of coordinates and sums."""
        return "float64" if self.name == "float64" else "float32"


DTYPES = {
    dtype.name: dtype
    for dtype in (
        DType("float16", "f16", "Half", 2, 2),
        DType("bfloat16", "bf16", "BFloat16", 2, 14),
        DType("float32", "f32", "float", 4, 0),
        DType("float64", "f64", "double", 8, 1),
    )
}
