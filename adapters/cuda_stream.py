"""CUDA stream of a framework in a form that CuPy accepts."""

from __future__ import annotations


class CudaStream:
    """Stream handle with CUDA's stream protocol, to be created inside the context of its device."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle
