"""A framework's stream, for CuPy."""

from __future__ import annotations


class CudaStream:
    """A stream by CUDA's protocol, from its handle. It is made inside of the context of its device."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle
