"""Multi-scale deformable attention and its gradients on NumPy and CuPy arrays."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from dcnops._arguments import Points, SpatialShapes, check_needs
from dcnops._attention_shapes import MSDeformAttnGeometry
from dcnops._dispatch import ArrayT, check_arrays, is_device_array, load_backend
from dcnops._explain import is_explaining, log_call


class MSDeformAttnGradients(NamedTuple):
    """Gradients of a multi-scale deformable attention; `None` for those that are not needed.

    Each gradient has the shape and dtype of the argument of the same name.
    """

    value: Any | None
    sampling_locations: Any | None
    attention_weights: Any | None


def ms_deform_attn(
    value: ArrayT,
    spatial_shapes: SpatialShapes,
    sampling_locations: ArrayT,
    attention_weights: ArrayT,
    *,
    points: Points | None = None,
) -> ArrayT:
    """Compute multi-scale deformable attention: weighted sums of samples from feature maps of several sizes.

    NumPy arrays are processed on the CPU, CuPy arrays on their GPU in the current stream. All arrays of a call must
    belong to the same library and device; `spatial_shapes` may be on the host in any case.

    Parameters
    ----------
    value : array [N, S, M, D], float16, bfloat16, float32 or float64
        Feature maps of all levels, flattened and concatenated: S is the sum of height times width, M the number of
        heads, D the number of channels per head.
    spatial_shapes : sequence of L pairs (height, width), or integer array [L, 2]
        Size of each level. A CuPy array of int32 or int64 stays on the GPU: it is not checked, and levels that exceed S
        are cut off.
    sampling_locations : array [N, Lq, M, L, P, 2], dtype of `value` or, for 16-bit data, also float32
        Positions (x, y) of the samples, from 0 to 1 across each level, for Lq queries and P points per level. With a
        sequence of `points` the shape is [N, Lq, M, sum(points), 2], level by level.
    attention_weights : array [N, Lq, M, L, P] or [N, Lq, M, sum(points)], dtype of `sampling_locations`
        Factor of each sample, any real number. No softmax is applied.
    points : int or sequence of L ints, optional
        Points per level. A sequence allows different numbers per level.

    Returns
    -------
    array [N, Lq, M*D], dtype of `value`

    Raises
    ------
    ShapeError
        An array has the wrong rank or size, or `spatial_shapes` on the host do not add up to S.
    ArgumentError
        `spatial_shapes` or `points` is invalid.
    DtypeError
        An argument is not a NumPy or CuPy array, or has the wrong dtype.
    DeviceError
        The arrays belong to different libraries or devices.

    Notes
    -----
    Deformable DETR (ICLR 2021), equation 3, without the projections::

        out[n,q,m*D + d] = sum over l, p:  attention_weights[n,q,m,l,p] * B(value[n,level l,m,d], y, x)

        y = sampling_locations[n,q,m,l,p,1] * height[l] - 1/2
        x = sampling_locations[n,q,m,l,p,0] * width[l] - 1/2

    B interpolates bilinearly on the level extended by zeros. It is 0 unless -1 < y < height and -1 < x < width, and
    equals ``grid_sample(..., padding_mode="zeros", align_corners=False)`` at ``2*sampling_locations - 1``. A pixel with
    interpolation weight 0 does not contribute, even if it is infinite or NaN. A NaN location makes the output NaN, an
    infinite location contributes 0.
    For 16-bit data, positions, weights and sums are in float32. float16 has about 3 digits, and bfloat16 2, too few for
    positions on a large map: pass float32 locations.

    Examples
    --------
    >>> import numpy as np
    >>> import dcnops
    >>> shapes = [(2, 2), (1, 1)]
    >>> value = np.array([0, 1, 2, 3, 10], np.float32).reshape(1, 5, 1, 1)
    >>> locations = np.full((1, 1, 1, 2, 1, 2), 0.5, np.float32)  # the middle of both levels
    >>> weights = np.ones((1, 1, 1, 2, 1), np.float32)
    >>> dcnops.ms_deform_attn(value, shapes, locations, weights)  # the mean of the first level plus 10
    array([[[11.5]]], dtype=float32)

    Two points on the first level, one on the second:

    >>> locations = np.full((1, 1, 1, 3, 2), 0.5, np.float32)
    >>> weights = np.array([0.5, 0.25, 0.25], np.float32).reshape(1, 1, 1, 3)
    >>> dcnops.ms_deform_attn(value, shapes, locations, weights, points=(2, 1))
    array([[[3.625]]], dtype=float32)
    """
    if is_explaining():
        log_call("ms_deform_attn", locals())
    library = check_arrays(
        {"value": value}, {"sampling_locations": sampling_locations, "attention_weights": attention_weights}
    )
    on_device = is_device_array("spatial_shapes", spatial_shapes, "value", value, library)
    geometry = MSDeformAttnGeometry.of(
        value, spatial_shapes, sampling_locations, attention_weights, points, on_device=on_device
    )
    shapes = spatial_shapes if on_device else None
    backend = load_backend(library)
    result: ArrayT = backend.ms_deform_attn(geometry, value, shapes, sampling_locations, attention_weights)
    return result


def ms_deform_attn_backward(
    grad_out: ArrayT,
    value: ArrayT,
    spatial_shapes: SpatialShapes,
    sampling_locations: ArrayT,
    attention_weights: ArrayT,
    *,
    points: Points | None = None,
    needs: Iterable[str] = MSDeformAttnGradients._fields,
    deterministic: bool = False,
) -> MSDeformAttnGradients:
    """Compute the gradients of `ms_deform_attn` with respect to its arrays.

    Parameters
    ----------
    grad_out : array [N, Lq, M*D], dtype of `value`
        Gradient of a scalar with respect to the output.
    value, spatial_shapes, sampling_locations, attention_weights, points
        Arguments of the forward call.
    needs : iterable of "value", "sampling_locations", "attention_weights"
        Gradients to compute.
    deterministic : bool
        Sum the gradient of `value` in a fixed order, so that two runs agree to the last bit. This is slower. The
        result for NumPy arrays is always deterministic.

    Returns
    -------
    MSDeformAttnGradients
        Named tuple (value, sampling_locations, attention_weights). Each field is an array with the shape and dtype of
        the argument, or `None` if it is not needed.

    Raises
    ------
    ShapeError, DtypeError, DeviceError
        As in `ms_deform_attn`.
    ArgumentError
        As in `ms_deform_attn`, or `needs` contains an unknown name.

    Notes
    -----
    Bilinear interpolation has a kink at the centers of pixels; the gradient there is the right derivative. Outside the
    open box of the forward pass all gradients of a sample are 0. A sample with a NaN location has NaN gradients of the
    location and the weight, and adds nothing to the gradient of `value`.

    Examples
    --------
    >>> import numpy as np
    >>> import dcnops
    >>> value = np.array([0, 1, 2, 3], np.float32).reshape(1, 4, 1, 1)
    >>> locations = np.full((1, 1, 1, 1, 1, 2), 0.5, np.float32)
    >>> weights = np.ones((1, 1, 1, 1, 1), np.float32)
    >>> grad_out = np.ones((1, 1, 1), np.float32)
    >>> grads = dcnops.ms_deform_attn_backward(grad_out, value, [(2, 2)], locations, weights)
    >>> grads.sampling_locations.ravel()  # across the map of 2 pixels, x adds 2 * 1 and y adds 2 * 2
    array([2., 4.], dtype=float32)
    >>> grads.attention_weights.item(), grads.value.ravel()
    (1.5, array([0.25, 0.25, 0.25, 0.25], dtype=float32))
    """
    if is_explaining():
        log_call("ms_deform_attn_backward", locals())
    library = check_arrays(
        {"value": value, "grad_out": grad_out},
        {"sampling_locations": sampling_locations, "attention_weights": attention_weights},
    )
    on_device = is_device_array("spatial_shapes", spatial_shapes, "value", value, library)
    geometry = MSDeformAttnGeometry.of(
        value, spatial_shapes, sampling_locations, attention_weights, points, on_device=on_device
    )
    geometry.check_grad_out(tuple(grad_out.shape))
    wanted = check_needs(needs, value=value, sampling_locations=sampling_locations, attention_weights=attention_weights)
    shapes = spatial_shapes if on_device else None
    backend = load_backend(library)
    gradients = backend.ms_deform_attn_backward(
        geometry, grad_out, value, shapes, sampling_locations, attention_weights, wanted, deterministic
    )
    return MSDeformAttnGradients(*map(gradients.get, MSDeformAttnGradients._fields))
