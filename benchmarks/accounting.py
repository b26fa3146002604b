"""Launches and scratch memory of a convolution, counted without a GPU: `python -m benchmarks.accounting`.

The launch plans run on an engine that executes nothing. It counts kernel launches, matrix products and the peak of
scratch memory for the layers of a ResNet-50 at 800x1333.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.report import markdown
from dcnops._backends.cuda import plans
from dcnops._backends.cuda.engine import Device, Engine
from dcnops._shapes import DeformConvGeometry

LAYERS = {"conv3": (128, 100, 168), "conv4": (256, 50, 84), "conv5": (512, 50, 84), "conv5, stride 32": (512, 25, 42)}
"""Channels, height and width of the deformable layers, 3x3."""

H200 = Device(0, 90, 132, 227 * 1024)
"""Device presented to the plans: compute capability, multiprocessors and shared memory of an H100 or H200."""

_GRADIENTS = frozenset({"input", "offset", "weight", "bias", "mask"})


@dataclass(frozen=True)
class Account:
    """Resources of one call."""

    launches: int
    """Kernel launches and matrix products."""
    scratch_bytes: int
    """Peak memory beyond arguments and results."""
    column_bytes: int
    """Size of the im2col columns of the whole batch."""
    kernels: tuple[str, ...]


class _Ledger:
    """Array library and engine that record allocations and launches without touching memory."""

    def __init__(self) -> None:
        self.kernels: list[str] = []
        self.allocated = self.peak = 0

    def empty(self, shape: Any, dtype: Any = float) -> np.ndarray:
        array = np.empty(shape, dtype)
        self.allocated += array.nbytes
        self.peak = max(self.peak, self.allocated)
        weakref.finalize(array, self._release, array.nbytes)
        return array

    def zeros(self, shape: Any, dtype: Any = float) -> np.ndarray:
        return self.empty(shape, dtype).view(_Unfilled)

    def _release(self, size: int) -> None:
        self.allocated -= size

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def engine(self) -> Engine:
        def compile(source: str, kernel: str, options: tuple[str, ...]) -> Callable[..., None]:
            return lambda *_: self.kernels.append(kernel)

        def matmul(*_: Any) -> None:
            self.kernels.append("product")

        return Engine(self, compile, matmul, lambda: H200, lambda array: int(array.ctypes.data))


class _Unfilled(np.ndarray):
    """Array that ignores `fill`."""

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
    """Count the resources of a modulated 3x3 convolution with as many outputs as inputs."""
    C, H, W = layer
    data = np.dtype(getattr(ml_dtypes, dtype, dtype))

    def images(channels: int) -> np.ndarray:
        if layout == "NHWC":
            return np.empty((N, H, W, channels), data).transpose(0, 3, 1, 2)
        return np.empty((N, channels, H, W), data)

    input, offset, mask, grad_out = images(C), images(18), images(9), images(C)
    weight, bias = np.empty((C, C, 3, 3), data), np.empty(C, data)
    geometry = DeformConvGeometry.of(input, offset, weight, bias, mask, stride=1, padding=1, dilation=1)
    ledger = _Ledger()
    engine = ledger.engine()
    if direction == "forward":
        results = [plans.deform_conv2d(engine, geometry, input, offset, weight, bias, mask, precision)]
    else:
        arguments = (engine, geometry, grad_out, input, offset, weight, mask, _GRADIENTS, deterministic, precision)
        results = list(plans.deform_conv2d_backward(*arguments).values())
    scratch = ledger.peak - sum(result.nbytes for result in results)
    return Account(len(ledger.kernels), scratch, N * H * W * 9 * C * data.itemsize, tuple(ledger.kernels))


def main() -> int:
    for direction in ("forward", "backward"):
        lines = [["layer", "batch", "data", "layout", "launches and products", "scratch, MiB", "columns, MiB"]]
        for name, N, dtype, layout in itertools.product(LAYERS, (1, 8, 16), ("float16", "float32"), ("NCHW", "NHWC")):
            found = account(LAYERS[name], N, dtype, direction, layout)
            sizes = (f"{size / 2**20:.1f}" for size in (found.scratch_bytes, found.column_bytes))
            lines.append([name, str(N), dtype, layout, str(found.launches), *sizes])
        print(f"{direction}\n\n{markdown(lines)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
