"""Backend for CuPy arrays: makes the arrays contiguous and runs the launch plans on their GPU and current stream."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import cupy
import numpy
from cupy._core import _routines_linalg as cupy_linalg

from dcnops._arguments import MAX_EXTENT
from dcnops._attention_shapes import DeformAggregateGeometry, MSDeformAttnGeometry
from dcnops._backends.cuda import plans
from dcnops._backends.cuda.cupy_engine import ENGINE, PROGRAMS, ROI_POOL_PROGRAMS
from dcnops._backends.cuda.engine import dtype_name
from dcnops._backends.cuda.plans.array_jobs import is_channels_last, is_evenly_spaced, sum_dtype
from dcnops._backends.cuda.workspace import get_workspace
from dcnops._errors import ArgumentError
from dcnops._explain import is_explaining
from dcnops._shapes import DeformConvGeometry, DeformRoIPoolGeometry

_FLOAT32 = numpy.dtype(numpy.float32)


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
        arrays = _images(input), _sampling(offset), contiguous(weight), contiguous(bias), _sampling(mask)
        return _run(plans.deform_conv2d, geometry, arrays, _precision(precision, input), get_workspace())


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
        arrays = _images(grad_out), _images(input), _sampling(offset), contiguous(weight), _sampling(mask)
        options = needs, deterministic, _precision(precision, input), get_workspace()
        gradients: dict[str, cupy.ndarray] = _run(plans.deform_conv2d_backward, geometry, arrays, *options)
        return gradients


def deform_roi_pool(
    geometry: DeformRoIPoolGeometry,
    input: cupy.ndarray,
    rois: cupy.ndarray,
    offset: cupy.ndarray | None,
    mask: cupy.ndarray | None,
    channels_last: bool = False,
) -> cupy.ndarray:
    """See `dcnops.deform_roi_pool`; the arguments have been checked.

    With `channels_last` the result [R, C, P, Q] is stored as [R, P, Q, C].
    """
    _check_image_indices(input)
    with input.device:
        arrays = _images(input), _coordinates(rois, input), contiguous(offset), contiguous(mask)
        return _run_prepared(plans.deform_roi_pool, geometry, arrays, channels_last)


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
    _check_image_indices(input)
    with input.device:
        arrays = _images(grad_out), _images(input), _coordinates(rois, input), contiguous(offset), contiguous(mask)
        options = needs, deterministic, get_workspace()
        run = _run_prepared if needs and not (deterministic and "input" in needs) else _run_plan
        gradients: dict[str, cupy.ndarray] = run(plans.deform_roi_pool_backward, geometry, arrays, *options)
        return gradients


def ms_deform_attn(
    geometry: MSDeformAttnGeometry,
    value: cupy.ndarray,
    spatial_shapes: cupy.ndarray | None,
    sampling_locations: cupy.ndarray,
    attention_weights: cupy.ndarray,
) -> cupy.ndarray:
    """See `dcnops.ms_deform_attn`; the arguments have been checked.

    `spatial_shapes` is None if they were on the host, in which case the geometry has them.
    """
    with value.device:
        arrays = tuple(map(contiguous, (value, spatial_shapes, sampling_locations, attention_weights)))
        return _run(plans.ms_deform_attn, geometry, arrays)


def ms_deform_attn_backward(
    geometry: MSDeformAttnGeometry,
    grad_out: cupy.ndarray,
    value: cupy.ndarray,
    spatial_shapes: cupy.ndarray | None,
    sampling_locations: cupy.ndarray,
    attention_weights: cupy.ndarray,
    needs: frozenset[str],
    deterministic: bool,
) -> dict[str, cupy.ndarray]:
    """See `dcnops.ms_deform_attn_backward`; the arguments have been checked."""
    with value.device:
        arrays = tuple(map(contiguous, (grad_out, value, spatial_shapes, sampling_locations, attention_weights)))
        options = needs, deterministic, get_workspace()
        gradients: dict[str, cupy.ndarray] = _run(plans.ms_deform_attn_backward, geometry, arrays, *options)
        return gradients


def deform_aggregate(
    geometry: DeformAggregateGeometry, input: cupy.ndarray, offset: cupy.ndarray, mask: cupy.ndarray | None
) -> cupy.ndarray:
    """See `dcnops.deform_aggregate`; the arguments have been checked."""
    with input.device:
        arrays = contiguous(input), contiguous(offset), contiguous(mask)
        return _run(plans.deform_aggregate, geometry, arrays)


def deform_aggregate_backward(
    geometry: DeformAggregateGeometry,
    grad_out: cupy.ndarray,
    input: cupy.ndarray,
    offset: cupy.ndarray,
    mask: cupy.ndarray | None,
    needs: frozenset[str],
    deterministic: bool,
) -> dict[str, cupy.ndarray]:
    """See `dcnops.deform_aggregate_backward`; the arguments have been checked."""
    with input.device:
        arrays = contiguous(grad_out), contiguous(input), contiguous(offset), contiguous(mask)
        options = needs, deterministic, get_workspace()
        gradients: dict[str, cupy.ndarray] = _run(plans.deform_aggregate_backward, geometry, arrays, *options)
        return gradients


def contiguous(array: Any) -> Any:
    """Return the array itself or a C-contiguous copy; None for None."""
    if array is None or array.flags.c_contiguous:
        return array
    if array.dtype.itemsize == 2:
        # Copied as integers: some versions of CuPy have no copy kernel for bfloat16.
        return cupy.ascontiguousarray(array.view(numpy.uint16)).view(array.dtype)
    return cupy.ascontiguousarray(array)


def _images(array: Any) -> Any:
    """Return images in one of the two memory orders that the plans take; None for None."""
    is_taken = array is None or array.flags.c_contiguous or is_channels_last(array)
    return array if is_taken else contiguous(array)


def _sampling(array: Any) -> Any:
    """Return offsets or masks with evenly spaced pixels; None for None."""
    return array if array is None or is_evenly_spaced(array) else contiguous(array)


def _check_image_indices(input: cupy.ndarray) -> None:
    """Check that the kernels, which read regions in the dtype of coordinates, can tell all images apart."""
    if input.shape[0] > MAX_EXTENT and input.dtype != numpy.float64:
        raise ArgumentError(
            f"input must have at most {MAX_EXTENT} images in RoI pooling of {input.dtype} arrays on a GPU, "
            f"got {input.shape[0]}"
        )


def _coordinates(rois: cupy.ndarray, input: cupy.ndarray) -> cupy.ndarray:
    """Return the regions in the dtype of the coordinates for `input`."""
    if dtype_name(rois.dtype) == "bfloat16":
        # Some versions of CuPy cannot convert bfloat16: its bits are the upper half of a float32.
        rois = (cupy.ascontiguousarray(rois.view(numpy.uint16)).astype(numpy.uint32) << 16).view(numpy.float32)
    return cupy.ascontiguousarray(rois, sum_dtype(ENGINE, input.dtype))


def _run(plan: Callable[..., Any], geometry: Any, arrays: tuple[Any, ...], *options: Hashable) -> Any:
    """Run a plan, or replay what it launched in an earlier call of the same signature."""
    if is_explaining():
        return _run_plan(plan, geometry, arrays, *options)
    return PROGRAMS.run(plan, geometry, arrays, *options)


def _run_prepared(plan: Callable[..., Any], geometry: Any, arrays: tuple[Any, ...], *options: Hashable) -> Any:
    """Run a plan of RoI pooling, prepared by an earlier call that may have had another number of regions."""
    if is_explaining():
        return _run_plan(plan, geometry, arrays, *options)
    return ROI_POOL_PROGRAMS.run(plan, geometry, arrays, *options)


def _run_plan(plan: Callable[..., Any], geometry: Any, arrays: tuple[Any, ...], *options: Hashable) -> Any:
    return plan(ENGINE.explaining if is_explaining() else ENGINE, geometry, *arrays, *options)


def _precision(precision: str | None, input: cupy.ndarray) -> str:
    """Return the precision of matrix products; None follows CuPy's own, set by its compute type or CUPY_TF32."""
    if input.dtype != _FLOAT32:
        return "ieee"
    if precision is not None:
        return precision
    return "tf32" if cupy_linalg.get_compute_type(numpy.float32) == cupy_linalg.COMPUTE_TYPE_TF32 else "ieee"
