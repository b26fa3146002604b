"""Launches and scratch memory of a call, counted without a GPU: `python -m benchmarks.accounting`.

The launch plans are recorded for arrays without memory. The command prints the kernel launches, matrix products, fills
and scratch memory of a modulated convolution for the layers of a ResNet-50 at 800x1333, and for the shapes of other
networks in the benchmark.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from benchmarks.deform_conv2d import OTHER_SHAPES, TAPS
from benchmarks.ms_deform_attn import CHANNELS, HEADS, levels_and_points
from benchmarks.operations import Case
from benchmarks.report import markdown
from dcnops._attention_shapes import DeformAggregateGeometry, MSDeformAttnGeometry
from dcnops._backends.cuda import plans
from dcnops._backends.cuda.engine import Device, Engine
from dcnops._backends.cuda.programs import ArrayForm, Fill, Launch, Product, Recorder
from dcnops._backends.cuda.workspace import get_workspace
from dcnops._shapes import DeformConvGeometry, DeformRoIPoolGeometry

LAYERS = {"conv3": (128, 100, 168), "conv4": (256, 50, 84), "conv5": (512, 50, 84), "conv5, stride 32": (512, 25, 42)}
"""Channels, height and width of the deformable layers, 3x3."""

H200 = Device(0, 90, 132, 227 * 1024)
"""Device presented to the plans: compute capability, multiprocessors and shared memory of an H100 or H200."""

_GRADIENTS = frozenset({"input", "offset", "weight", "bias", "mask"})


@dataclass(frozen=True)
class Account:
    """Resources of one call of a signature that was seen before."""

    kernels: tuple[str, ...]
    """Names of the kernels in the order of their launches."""
    products: int
    fills: int
    scratch_bytes: int
    """Memory beyond arguments and results."""

    @property
    def launches(self) -> int:
        return len(self.kernels)

    @property
    def counts(self) -> dict[str, int]:
        """Everything that the CPU issues."""
        return {"kernels": self.launches, "products": self.products, "fills": self.fills}

    @property
    def steps(self) -> int:
        return sum(self.counts.values())


def account(case: Case, direction: str, device: Device = H200) -> Account:
    """Count the resources of our call, as in the benchmark: RoI pooling is without offsets.

    The number of sizes in a shape tells the operations apart.
    """
    plan, geometry, forms, options = _CALLS[len(case.shape)](case, direction)
    program, _ = Recorder(_engine(device)).record(plan, geometry, forms, options)
    kernels = tuple(step.launcher.name for step in program.steps if isinstance(step, Launch))  # type: ignore[attr-defined]
    products, fills = (sum(isinstance(step, kind) for step in program.steps) for kind in (Product, Fill))
    return Account(kernels, products, fills, program.scratch_bytes)


class _NamedKernel:
    """Kernel that does nothing."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *_: Any) -> None: ...


@cache
def _engine(device: Device) -> Engine:
    return Engine(np, lambda source, kernel, options: _NamedKernel(kernel), _multiply, lambda: device, lambda array: 0)


def _multiply(*_: Any) -> None: ...


def _conv(case: Case, direction: str) -> tuple[Any, ...]:
    """Return the plan of a 3x3 convolution, its geometry, and the forms of its arrays and its options."""
    (C, H, W), N, dtype = case.shape, case.N, _numpy_dtype(case.dtype)
    is_nhwc = case.layout == "NHWC"
    input = grad_out = ArrayForm((N, C, H, W), dtype, is_nhwc)
    # The offsets are a part of the branch's output; the mask, the sigmoid of the other part, is a new array.
    taps = TAPS * case.deformable_groups
    channels = 3 * taps
    elements = (channels * H * W, 1, channels * W, channels) if is_nhwc else (channels * H * W, H * W, W, 1)
    is_strided = N > 1 or is_nhwc
    strides = tuple(dtype.itemsize * stride for stride in elements) if is_strided else None
    offset = ArrayForm((N, 2 * taps, H, W), dtype, strides=strides)
    mask = ArrayForm((N, taps, H, W), dtype, is_nhwc)
    weight, bias = ArrayForm((C, C // case.groups, 3, 3), dtype), ArrayForm((C,), dtype)
    geometry = DeformConvGeometry.of(input, offset, weight, bias, mask, stride=1, padding=1, dilation=1)
    arithmetic = case.products, get_workspace()
    if direction == "forward":
        return plans.deform_conv2d, geometry, [input, offset, weight, bias, mask], arithmetic
    options = (_GRADIENTS, case.deterministic, *arithmetic)
    return plans.deform_conv2d_backward, geometry, [grad_out, input, offset, weight, mask], options


def _pool(case: Case, direction: str) -> tuple[Any, ...]:
    (C, H, W, R, P), dtype = case.shape, _numpy_dtype(case.dtype)
    input = ArrayForm((case.N, C, H, W), dtype, case.layout == "NHWC")
    rois = ArrayForm((R, 5), np.dtype(np.float32))
    geometry = DeformRoIPoolGeometry.of(input, rois, None, None, [P, P], 1.0, 2, 0.1)
    if direction == "forward":
        return plans.deform_roi_pool, geometry, [input, rois, None, None], ()
    forms = [ArrayForm((R, C, P, P), dtype), input, rois, None, None]
    return plans.deform_roi_pool_backward, geometry, forms, ({"input"}, case.deterministic, get_workspace())


def _attention(case: Case, direction: str) -> tuple[Any, ...]:
    sizes, points = levels_and_points(case.shape)
    dtype, float32 = _numpy_dtype(case.dtype), np.dtype(np.float32)
    queries = (case.N, case.shape[2], HEADS, sum(points))
    value = ArrayForm((case.N, sum(height * width for height, width in sizes), HEADS, CHANNELS), dtype)
    locations, weights = ArrayForm((*queries, 2), float32), ArrayForm(queries, float32)
    geometry = MSDeformAttnGeometry.of(value, sizes, locations, weights, points)
    if direction == "forward":
        return plans.ms_deform_attn, geometry, [value, None, locations, weights], ()
    forms = [ArrayForm(geometry.output_shape, dtype), value, None, locations, weights]
    needs = {"value", "sampling_locations", "attention_weights"}
    return plans.ms_deform_attn_backward, geometry, forms, (needs, case.deterministic, get_workspace())


def _aggregation(case: Case, direction: str) -> tuple[Any, ...]:
    (G, D, H, W), float32 = case.shape, np.dtype(np.float32)
    input = ArrayForm((case.N, H, W, G * D), _numpy_dtype(case.dtype))
    sampling = [ArrayForm((case.N, H, W, channels * G * TAPS), float32) for channels in (2, 1)]
    geometry = DeformAggregateGeometry.of(input, *sampling, groups=G, kernel_size=3, padding=1)
    if direction == "forward":
        return plans.deform_aggregate, geometry, [input, *sampling], ()
    options = ({"input", "offset", "mask"}, case.deterministic, get_workspace())
    return plans.deform_aggregate_backward, geometry, [input, input, *sampling], options


_CALLS = {3: _conv, 4: _aggregation, 5: _pool, 6: _attention}


def _numpy_dtype(name: str) -> Any:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def main() -> int:
    layers = {name: Case("cuda", shape) for name, shape in LAYERS.items()}
    layers |= {f"{case.label}, {case.grouping}".rstrip(", "): replace(case, device="cuda") for case in OTHER_SHAPES}
    for direction in ("forward", "backward"):
        lines = [["layer", "batch", "data", "layout", "kernels", "products", "fills", "scratch, MiB", "columns, MiB"]]
        for name, N, dtype, layout in itertools.product(layers, (1, 8, 16), ("float16", "float32"), ("NCHW", "NHWC")):
            case = replace(layers[name], N=N, dtype=dtype, layout=layout)
            found = account(case, direction)
            C, H, W = case.shape
            column_bytes = N * H * W * TAPS * C * np.dtype(dtype).itemsize
            sizes = (f"{size / 2**20:.1f}" for size in (found.scratch_bytes, column_bytes))
            lines.append([name, str(N), dtype, layout, *map(str, found.counts.values()), *sizes])
        print(f"{direction}\n\n{markdown(lines)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
