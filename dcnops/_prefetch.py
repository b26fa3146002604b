"""Compilation ahead of the first call."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from dcnops._arguments import Padding, Pair, expand_padding, expand_pair
from dcnops._dispatch import FLOAT_DTYPES
from dcnops._errors import ArgumentError, ShapeError
from dcnops._geometry import output_extent
from dcnops.deform_conv2d import deform_conv2d, deform_conv2d_backward
from dcnops.deform_roi_pool import deform_roi_pool, deform_roi_pool_backward

LIBRARIES = ("numpy", "cupy")


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
    backward: bool = True,
    precision: str | None = None,
) -> None:
    """Compile what later calls need, so that the first one does not wait for it.

    Both operations are called on arrays of zeros for each dtype: convolution with and without a mask, pooling with and
    without offsets and masks, and with as many samples as a bin has pixels. What is compiled is kept on disk, for later
    processes too: in Numba's and CuPy's cache folders (``python -m dcnops`` shows them).

    Parameters
    ----------
    library : "numpy" or "cupy"
        Of the arrays.
    dtypes : sequence of "float16", "bfloat16", "float32" and "float64"
    input : (N, C, H, W)
    weight : (O, C/G, kh, kw)
    stride, padding, dilation, deform_groups : as in `deform_conv2d`
    output_size : int or (P, Q)
        Of RoI pooling.
    backward : bool
        Whether to compile the gradients too.
    precision : str, optional
        As in `deform_conv2d`.

    Raises
    ------
    ArgumentError
        There is no such library or dtype.
    ShapeError
        The sizes do not fit each other.
    ImportError
        CuPy is not installed, or for bfloat16 ml_dtypes.

    Notes
    -----
    On a CPU one call covers all sizes. On a GPU a kernel is compiled for the architecture, the dtype, numbers of
    channels and groups and the way of computing, which sizes decide: call it with the sizes of your own calls, once for
    each.

    Examples
    --------
    >>> import dcnops
    >>> dcnops.prefetch(dtypes=["float32", "float64"])

    The layers of a network on a GPU::

        for channels, size in ((128, 100), (256, 50), (512, 25)):
            dcnops.prefetch(
                "cupy", ["float16"], input=(16, channels, size, size), weight=(channels, channels, 3, 3)
            )
    """
    if library not in LIBRARIES:
        raise ArgumentError(f"library must be 'numpy' or 'cupy', got {library!r}")
    for dtype in dtypes:
        if dtype not in FLOAT_DTYPES:
            raise ArgumentError(f"dtypes must be among {', '.join(FLOAT_DTYPES)}, got {dtype!r}")
    xp = importlib.import_module(library)
    numbers = {"stride": stride, "padding": padding, "dilation": dilation, "precision": precision}
    for name in dtypes:
        dtype = importlib.import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name

        def zeros(*shape: int, dtype: Any = dtype) -> Any:
            return xp.zeros(shape, dtype)

        _convolve(zeros, tuple(input), tuple(weight), deform_groups, numbers, backward)
        _pool(zeros, tuple(input), expand_pair("output_size", output_size), backward)


def _convolve(
    zeros: Callable[..., Any],
    input: tuple[int, ...],
    weight: tuple[int, ...],
    deform_groups: int,
    numbers: dict[str, Any],
    backward: bool,
) -> None:
    if len(input) != 4 or len(weight) != 4:
        raise ShapeError(
            f"input and weight must be 4 numbers, (N, C, H, W) and (O, C/G, kh, kw), got {input}, {weight}"
        )
    kernel, step = weight[2:], expand_pair("stride", numbers["stride"])
    sides, dilation = expand_padding(numbers["padding"]), expand_pair("dilation", numbers["dilation"])
    size = [
        output_extent(axis, extent, sum(side), k, s, d)
        for axis, extent, side, k, s, d in zip(("height", "width"), input[2:], sides, kernel, step, dilation)
    ]
    points = deform_groups * kernel[0] * kernel[1]
    image, offset, taps = zeros(*input), zeros(input[0], 2 * points, *size), zeros(*weight)
    for mask in (None, zeros(input[0], points, *size)):
        output = deform_conv2d(image, offset, taps, zeros(weight[0]), mask=mask, **numbers)
        if backward:
            deform_conv2d_backward(output, image, offset, taps, mask=mask, **numbers)


def _pool(zeros: Callable[..., Any], input: tuple[int, ...], bins: tuple[int, int], backward: bool) -> None:
    image, rois = zeros(*input), zeros(1, 5)
    rois[:, 3:] = 8
    offset, mask = zeros(1, 2, *bins), zeros(1, *bins)
    for given in ({}, {"offset": offset}, {"offset": offset, "mask": mask}):
        output = deform_roi_pool(image, rois, output_size=bins, **given)
        if backward:
            deform_roi_pool_backward(output, image, rois, output_size=bins, **given)
    # As many samples as a bin has pixels.
    output = deform_roi_pool(image, rois, output_size=bins, sampling_ratio=0)
    if backward:
        deform_roi_pool_backward(output, image, rois, output_size=bins, sampling_ratio=0)
