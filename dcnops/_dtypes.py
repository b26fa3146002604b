"""The data types that the operations compute in, and their names in each place that needs one."""

from __future__ import annotations

from typing import NamedTuple


class DType(NamedTuple):
    """One data type of the arrays."""

    name: str
    """Name of the NumPy, CuPy, PyTorch and JAX type."""
    suffix: str
    """End of the names of kernels."""
    c_name: str
    """Type of an element in the CUDA sources."""
    itemsize: int
    """Bytes of an element."""
    cublas_type: int
    """`cudaDataType` of cuBLAS."""

    @property
    def is_16_bit(self) -> bool:
        """Whether sums and coordinates need the wider float32."""
        return self.itemsize == 2


DTYPES = {
    dtype.name: dtype
    for dtype in (
        DType("float16", "f16", "Half", 2, 2),
        DType("bfloat16", "bf16", "BFloat16", 2, 14),
        DType("float32", "f32", "float", 4, 0),
        DType("float64", "f64", "double", 8, 1),
    )
}
