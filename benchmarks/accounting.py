"""Count what a convolution asks of a GPU, without one: `python -m benchmarks.accounting`.

The launch plans run on an engine that executes nothing. It counts kernel launches, matrix products and the most scratch
memory that is alive at once, for the layers of a ResNet-50 at 800x1333.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.report import markdown
from dcnops._backends.cuda import plans
from dcnops._backends.cuda.engine import Device, Engine
from dcnops._geometry import DeformConvGeometry

LAYERS = {"conv3": (128, 100, 168), "conv4": (256, 50, 84), "conv5": (512, 50, 84), "conv5, stride 32": (512, 25, 42)}
"""Channels, height and width of the deformable layers, 3x3."""

H200 = Device(0, 90, 132, 227 * 1024)
"""What the plans believe to run on: compute capability, multiprocessors and shared memory of an H100 or H200."""

_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float64": np.dtype(np.float64),
}
_NEEDS = frozenset({"input", "offset", "weight", "bias", "mask"})


@dataclass(frozen=True)
class Account:
    """What one call asks for."""

    launches: int
    """Kernel launches and matrix products."""
    scratch_bytes: int
    """Most memory that is alive at once beside arguments and results."""
    column_bytes: int
    """What the columns of the whole batch would take."""
    kernels: tuple[str, ...]


class _Ledger:
    """Stands for an array library and its memory: what it hands out is never touched."""

    def __init__(self) -> None:
        self.kernels: list[str] = []
        self.alive = self.most = 0

    def empty(self, shape: Any, dtype: Any = float) -> np.ndarray:
        array = np.empty(shape, dtype)
        self.alive += array.nbytes
        self.most = max(self.most, self.alive)
        weakref.finalize(array, self._free, array.nbytes)
        return array

    def zeros(self, shape: Any, dtype: Any = float) -> np.ndarray:
        return self.empty(shape, dtype).view(_Untouched)

    def _free(self, size: int) -> None:
        self.alive -= size

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def engine(self) -> Engine:
        def compile(source: str, kernel: str, options: tuple[str, ...]) -> Callable[..., None]:
            return lambda *_: self.kernels.append(kernel)

        def matmul(*_: Any) -> None:
            self.kernels.append("product")

        return Engine(self, compile, matmul, lambda: H200, lambda array: int(array.ctypes.data))


class _Untouched(np.ndarray):
    """An array that is not really filled."""

    def fill(self, value: Any) -> None: ...


def account(
    layer: tuple[int, int, int],
    N: int,
    dtype: str,
    direction: str,
    layout: str = "NCHW",
    precision: str = "ieee",
    deterministic: bool = False,
) -> Account:
    """What a modulated 3x3 convolution of as many outputs as inputs asks for."""
    C, H, W = layer

    def images(channels: int) -> np.ndarray:
        if layout == "NHWC":
            return np.empty((N, H, W, channels), _DTYPES[dtype]).transpose(0, 3, 1, 2)
        return np.empty((N, channels, H, W), _DTYPES[dtype])

    input, offset, mask, grad_out = images(C), images(18), images(9), images(C)
    weight, bias = np.empty((C, C, 3, 3), _DTYPES[dtype]), np.empty(C, _DTYPES[dtype])
    geometry = DeformConvGeometry.of(input, offset, weight, bias, mask, stride=1, padding=1, dilation=1)
    ledger = _Ledger()
    engine = ledger.engine()
    if direction == "forward":
        results = [plans.deform_conv2d(engine, geometry, input, offset, weight, bias, mask, precision)]
    else:
        arguments = (engine, geometry, grad_out, input, offset, weight, mask, _NEEDS, deterministic, precision)
        results = list(plans.deform_conv2d_backward(*arguments).values())
    scratch = ledger.most - sum(result.nbytes for result in results)
    columns = N * H * W * 9 * C * _DTYPES[dtype].itemsize
    return Account(len(ledger.kernels), scratch, columns, tuple(ledger.kernels))


def main() -> int:
    for direction in ("forward", "backward"):
        lines = [["layer", "batch", "data", "order", "launches and products", "scratch, MiB", "columns, MiB"]]
        for name, N, dtype, layout in _rows():
            found = account(LAYERS[name], N, dtype, direction, layout)
            sizes = (f"{size / 2**20:.1f}" for size in (found.scratch_bytes, found.column_bytes))
            lines.append([name, str(N), dtype, layout, str(found.launches), *sizes])
        print(f"{direction}\n\n{markdown(lines)}\n")
    return 0


def _rows() -> Iterable[tuple[str, int, str, str]]:
    for name in LAYERS:
        for N in (1, 8, 16):
            for dtype in ("float16", "float32"):
                for layout in ("NCHW", "NHWC"):
                    yield name, N, dtype, layout


if __name__ == "__main__":
    sys.exit(main())
