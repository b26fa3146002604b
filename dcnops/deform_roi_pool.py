"""(Modulated) deformable RoI pooling and its gradients on NumPy and CuPy arrays."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from dcnops._arguments import Pair, check_layout, check_needs
from dcnops._dispatch import ArrayT, check_arrays, load_backend
from dcnops._explain import is_explaining, log_call
from dcnops._layout import NCHW
from dcnops._shapes import DeformRoIPoolGeometry


class DeformRoIPoolGradients(NamedTuple):
    """Gradients of a deformable RoI pooling; `None` for those that are not needed.

    Each gradient has the shape, layout and dtype of the argument of the same name.
    """

    input: Any | None
    offset: Any | None
    mask: Any | None


def deform_roi_pool(
    input: ArrayT,
    rois: ArrayT,
    offset: ArrayT | None = None,
    mask: ArrayT | None = None,
    *,
    output_size: Pair,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 2,
    gamma: float = 0.1,
    layout: str = "NCHW",
) -> ArrayT:
    """Compute deformable RoI pooling, modulated (v2) if `mask` is given, or RoIAlign without `offset` and `mask`.

    NumPy arrays are processed on the CPU, CuPy arrays on their GPU in the current stream. All arrays of a call must
    belong to the same library and device.

    Parameters
    ----------
    input : array [N, C, H, W] or [N, H, W, C], float16, bfloat16, float32 or float64
        Feature maps.
    rois : array [R, 5], float16, bfloat16, float32 or float64, in image coordinates
        Regions (index of the feature map, x1, y1, x2, y2). R may be 0.
    offset : array [R, 2, P, Q], dtype of `input` or, for 16-bit data, also float32, optional
        Shift of each bin as a fraction of the region size: ``offset[r, 0]`` horizontal, ``offset[r, 1]`` vertical. Note
        that `deform_conv2d` has the opposite order.
    mask : array [R, P, Q], dtype of `offset`, optional
        Factor of each bin, any real number.
    output_size : int or (P, Q)
        Bins per region, vertical and horizontal.
    spatial_scale : float
        Pixels of `input` per unit of `rois`, such as 1/16.
    sampling_ratio : int
        Samples per bin along each axis; 0 for one per pixel of the bin.
    gamma : float
        Factor of the offsets. mmcv also uses 0.1; the papers have no such factor, which corresponds to 1.
    layout : "NCHW" or "NHWC"
        Axis order of `input` and the result. The other arrays are the same in both.

    Returns
    -------
    array [R, C, P, Q] or [R, P, Q, C], dtype of `input`

    Raises
    ------
    ShapeError
        An array has the wrong rank or size.
    ArgumentError
        A parameter is invalid, or NumPy `rois` refer to a feature map that `input` does not have.
    DtypeError
        An argument is not a NumPy or CuPy array, or has the wrong dtype.
    DeviceError
        The arrays belong to different libraries or devices.

    Notes
    -----
    Deformable ConvNets v2 (CVPR 2019), equation 2, with the sampling of RoIAlign. For s = `spatial_scale`,
    ``X1 = s*x1 - 1/2``, ``Rw = s*(x2 - x1)``, ``bw = Rw/Q``, Sw horizontal samples per bin, and likewise for y::

        y[r,c,p,q] = mask[r,p,q] / max(Sh*Sw, 1) * sum over i, j:  A(x[c], py, px)

        py = Y1 + p*bh + gamma*Rh*offset[r,1,p,q] + (i + 1/2)*bh/Sh
        px = X1 + q*bw + gamma*Rw*offset[r,0,p,q] + (j + 1/2)*bw/Sw

    A is 0 outside [-1, H] x [-1, W]; inside, it clamps the position to the image and interpolates bilinearly. Without
    `offset` and `mask` this is ``torchvision.ops.roi_align(..., aligned=True)``. A pixel with interpolation weight 0
    does not contribute, even if it is infinite or NaN. The formula also applies to inverted and empty regions, and to
    regions outside the image. A non-finite region or a NaN offset makes the bin NaN, an infinite offset makes it 0
    for any `gamma`.
    On a GPU the values of `rois` are not checked, and the bins of a region of a nonexistent feature map are NaN. With
    `sampling_ratio` 0 a bin has at most 2**24 samples along an axis.

    Examples
    --------
    >>> import numpy as np
    >>> import dcnops
    >>> image = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    >>> rois = np.array([[0, 0, 0, 4, 4]], np.float32)
    >>> dcnops.deform_roi_pool(image, rois, output_size=2)[0, 0]
    array([[ 2.5,  4.5],
           [10.5, 12.5]], dtype=float32)
    >>> offset = np.zeros((1, 2, 2, 2), np.float32)
    >>> offset[0, 0, 0, 0] = 2.5  # gamma * 2.5 moves the first bin right by 1/4 of the region, 1 pixel
    >>> dcnops.deform_roi_pool(image, rois, offset, output_size=2)[0, 0]
    array([[ 3.5,  4.5],
           [10.5, 12.5]], dtype=float32)
    """
    if is_explaining():
        log_call("deform_roi_pool", locals())
    order = check_layout(layout)
    library = check_arrays(
        {"input": input}, {"offset": offset, "mask": mask}, {"rois": rois}, optional=("offset", "mask")
    )
    geometry = DeformRoIPoolGeometry.of(
        input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma, order
    )
    backend = load_backend(library)
    output = backend.deform_roi_pool(geometry, order.to_nchw(input), rois, offset, mask, order is not NCHW)
    result: ArrayT = order.from_nchw(output, backend.contiguous)
    return result


def deform_roi_pool_backward(
    grad_out: ArrayT,
    input: ArrayT,
    rois: ArrayT,
    offset: ArrayT | None = None,
    mask: ArrayT | None = None,
    *,
    output_size: Pair,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 2,
    gamma: float = 0.1,
    needs: Iterable[str] = DeformRoIPoolGradients._fields,
    deterministic: bool = False,
    layout: str = "NCHW",
) -> DeformRoIPoolGradients:
    """Compute the gradients of `deform_roi_pool` with respect to its arrays.

    Parameters
    ----------
    grad_out : array [R, C, P, Q] or [R, P, Q, C], dtype of `input`
        Gradient of a scalar with respect to the output.
    input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma, layout
        Arguments of the forward call; `layout` also applies to `grad_out`.
    needs : iterable of "input", "offset", "mask"
        Gradients to compute. Gradients of arguments that are not given are always `None`.
    deterministic : bool
        Sum the gradient of `input` in a fixed order, so that two runs agree to the last bit. The result for NumPy
        arrays is always deterministic.

    Returns
    -------
    DeformRoIPoolGradients
        Named tuple (input, offset, mask). Each field is an array with the shape, layout and dtype of the argument, or
        `None` if it is not needed. Regions have no gradient.

    Raises
    ------
    ShapeError, DtypeError, DeviceError
        As in `deform_roi_pool`.
    ArgumentError
        As in `deform_roi_pool`, or `needs` contains an unknown name.

    Notes
    -----
    The gradients are the true derivatives of the forward pass. A sample that is clamped to the image does not move with
    the offset in that direction, so its derivative is 0. Bilinear interpolation has a kink at integer positions; the
    gradient there is the right derivative. A NaN bin has NaN offset and mask gradients and adds nothing to the input
    gradient.

    Examples
    --------
    >>> import numpy as np
    >>> import dcnops
    >>> image = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    >>> rois = np.array([[0, 1, 1, 3, 3]], np.float32)
    >>> offset = np.zeros((1, 2, 1, 1), np.float32)
    >>> grad_out = np.ones((1, 1, 1, 1), np.float32)
    >>> grads = dcnops.deform_roi_pool_backward(grad_out, image, rois, offset, output_size=1, gamma=1.0)
    >>> grads.offset.ravel()  # moving right by the region width adds 2 * 1, down 2 * 4
    array([2., 8.], dtype=float32)
    """
    if is_explaining():
        log_call("deform_roi_pool_backward", locals())
    order = check_layout(layout)
    library = check_arrays(
        {"input": input, "grad_out": grad_out},
        {"offset": offset, "mask": mask},
        {"rois": rois},
        optional=("offset", "mask"),
    )
    geometry = DeformRoIPoolGeometry.of(
        input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma, order
    )
    geometry.check_grad_out(tuple(grad_out.shape), order)
    wanted = check_needs(needs, input=input, offset=offset, mask=mask)
    backend = load_backend(library)
    gradients = backend.deform_roi_pool_backward(
        geometry, order.to_nchw(grad_out), order.to_nchw(input), rois, offset, mask, wanted, deterministic
    )
    grad_input = order.from_nchw(gradients.get("input"), backend.contiguous)
    return DeformRoIPoolGradients(grad_input, gradients.get("offset"), gradients.get("mask"))
