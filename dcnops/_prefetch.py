"""Ahead-of-time compilation."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from dcnops._arguments import Padding, Pair, as_integer, expand_padding, expand_pair, shown
from dcnops._attention_shapes import packed_channels
from dcnops._dtypes import DTYPES
from dcnops._errors import ArgumentError, ShapeError
from dcnops._shapes import output_extent
from dcnops.deform_aggregate import deform_aggregate, deform_aggregate_backward
from dcnops.deform_conv2d import deform_conv2d, deform_conv2d_backward
from dcnops.deform_roi_pool import deform_roi_pool, deform_roi_pool_backward
from dcnops.ms_deform_attn import ms_deform_attn, ms_deform_attn_backward

LIBRARIES = ("numpy", "cupy")
_MOST_VALUES = 2**31  # of an array

_Zeros: TypeAlias = Callable[..., Any]
"""Function that returns an array of zeros of a shape."""


def prefetch(
    library: str = "numpy",
    dtypes: Sequence[str] = ("float32",),
    *,
    input: Sequence[int] = (1, 16, 32, 32),
    weight: Sequence[int] = (16, 16, 3, 3),
    stride: Pair = 1,
    padding: Padding = 1,
    dilation: Pair = 1,
    deform_groups: int = 1,
    output_size: Pair = 7,
    heads: int = 1,
    backward: bool = True,
    precision: str | None = None,
) -> None:
    """Compile everything that later calls need, so that the first call does not wait for the compiler.

    For each dtype, all operations run on arrays of zeros: convolution with and without a mask, pooling with and
    without offsets and masks, with a fixed and an adaptive number of samples, attention with 4 points, and aggregation
    with separate and packed weights. For 16-bit dtypes, they also run with offsets, masks, locations and attention
    weights in float32. The compiled code is kept on disk in the cache folders of Numba and CuPy, also for later
    processes; ``python -m dcnops`` shows the folders.

    Parameters
    ----------
    library : "numpy" or "cupy"
        Library of the arrays of later calls.
    dtypes : sequence of "float16", "bfloat16", "float32" and "float64"
    input : (N, C, H, W)
    weight : (O, C/G, kh, kw)
    stride, padding, dilation, deform_groups : as in `deform_conv2d`
    output_size : int or (P, Q)
        Bins of RoI pooling.
    heads : int
        Heads of attention and groups of aggregation, between which the C channels of `input` are divided.
    backward : bool
        Compile the gradients as well.
    precision : str, optional
        As in `deform_conv2d`.

    Raises
    ------
    ArgumentError
        `library` or a name in `dtypes` is unknown, or `heads` is not a divisor of C.
    ShapeError
        `input`, `weight` and `deform_groups` do not fit each other.
    ImportError
        CuPy, or ml_dtypes for bfloat16, is not installed.

    Notes
    -----
    On a CPU one call covers all sizes. On a GPU kernels are specialised for the architecture, the dtype, the numbers of
    channels and groups, and the algorithm, which depends on the sizes: call this function once for each set of sizes
    that you use.

    Examples
    --------
    >>> import dcnops
    >>> dcnops.prefetch(dtypes=["float32", "float64"])

    Compile for the layers of a network on a GPU::

        for channels, size in ((128, 100), (256, 50), (512, 25)):
            dcnops.prefetch(
                "cupy", ["float16"], input=(16, channels, size, size), weight=(channels, channels, 3, 3)
            )
    """
    if library not in LIBRARIES:
        raise ArgumentError(f"library must be 'numpy' or 'cupy', got {shown(library)}")
    names = list(itertools.islice(dtypes, len(DTYPES) + 1))
    wrong = [name for name in names if not (isinstance(name, str) and name in DTYPES)]
    if wrong or len(names) > len(DTYPES):
        got = shown(wrong[0] if wrong else dtypes)
        raise ArgumentError(f"dtypes must be among {', '.join(DTYPES)}, got {got}")
    image, taps = (tuple(itertools.islice(shape, 5)) for shape in (input, weight))
    for argument, sizes in (("input", image), ("weight", taps)):
        if len(sizes) != 4 or min(sizes) < 1 or math.prod(sizes) >= _MOST_VALUES:
            needed = f"4 positive numbers with a product of less than {_MOST_VALUES}"
            raise ShapeError(f"{argument} must be {needed}, got {shown(sizes)}")
    if as_integer(heads) is None or heads < 1 or image[1] % heads:
        raise ArgumentError(f"heads must be a divisor of input's C={image[1]}, got {shown(heads)}")
    xp = importlib.import_module(library)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "precision": precision}
    for name in names:
        for sampling_name in (name, "float32") if DTYPES[name].is_16_bit else (name,):
            zeros, sampling = _zeros(xp, name), _zeros(xp, sampling_name)
            _convolve(zeros, sampling, image, taps, deform_groups, options, backward)
            _pool(zeros, sampling, image, expand_pair("output_size", output_size), backward)
            _attend(zeros, sampling, image, heads, backward)
            _aggregate(zeros, sampling, image, heads, taps[2:], backward)


def _zeros(xp: Any, name: str) -> _Zeros:
    dtype = importlib.import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name
    return lambda *shape: xp.zeros(shape, dtype)


def _convolve(
    zeros: _Zeros,
    sampling: _Zeros,
    input: tuple[int, ...],
    weight: tuple[int, ...],
    deform_groups: int,
    options: dict[str, Any],
    backward: bool,
) -> None:
    kernel, step = weight[2:], expand_pair("stride", options["stride"])
    sides, dilation = expand_padding(options["padding"]), expand_pair("dilation", options["dilation"])
    size = [
        output_extent(axis, extent, sum(side), k, s, d)
        for axis, extent, side, k, s, d in zip(("height", "width"), input[2:], sides, kernel, step, dilation)
    ]
    points = deform_groups * kernel[0] * kernel[1]
    image, offset, taps = zeros(*input), sampling(input[0], 2 * points, *size), zeros(*weight)
    for mask in (None, sampling(input[0], points, *size)):
        output = deform_conv2d(image, offset, taps, zeros(weight[0]), mask=mask, **options)
        if backward:
            deform_conv2d_backward(output, image, offset, taps, mask=mask, **options)


def _pool(zeros: _Zeros, sampling: _Zeros, input: tuple[int, ...], bins: tuple[int, int], backward: bool) -> None:
    image, rois = zeros(*input), zeros(1, 5)
    rois[:, 3:] = 8
    offset, mask = sampling(1, 2, *bins), sampling(1, *bins)
    # The adaptive number of samples (ratio 0) has a separate code path.
    calls: list[dict[str, Any]] = [{}, {"offset": offset}, {"offset": offset, "mask": mask}, {"sampling_ratio": 0}]
    for options in calls:
        output = deform_roi_pool(image, rois, output_size=bins, **options)
        if backward:
            deform_roi_pool_backward(output, image, rois, output_size=bins, **options)


def _attend(zeros: _Zeros, sampling: _Zeros, input: tuple[int, ...], heads: int, backward: bool) -> None:
    N, C, H, W = input
    value, shapes = zeros(N, H * W, heads, C // heads), [(H, W)]
    points = sampling(N, H * W, heads, 1, 4, 2), sampling(N, H * W, heads, 1, 4)
    output = ms_deform_attn(value, shapes, *points)
    if backward:
        ms_deform_attn_backward(output, value, shapes, *points)


def _aggregate(
    zeros: _Zeros,
    sampling: _Zeros,
    input: tuple[int, ...],
    groups: int,
    kernel: tuple[int, ...],
    backward: bool,
) -> None:
    N, C, H, W = input
    taps = kernel[0] * kernel[1]
    padding = kernel[0] // 2, kernel[1] // 2
    size = N, H + 2 * padding[0] - kernel[0] + 1, W + 2 * padding[1] - kernel[1] + 1
    image = zeros(N, H, W, C)
    options: dict[str, Any] = {"groups": groups, "kernel_size": kernel, "padding": padding}
    for points in (
        (sampling(*size, packed_channels(groups, taps)),),
        (sampling(*size, 2 * groups * taps), sampling(*size, groups * taps)),
    ):
        output = deform_aggregate(image, *points, **options)
        if backward:
            deform_aggregate_backward(output, image, *points, **options)
