"""(Modulated) deformable RoI pooling and its gradients on NumPy and CuPy arrays."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from dcnops._arguments import Pair, check_layout, check_needs
from dcnops._dispatch import ArrayT, check_arrays, load_backend
from dcnops._explain import is_explaining, log_call
from dcnops._geometry import DeformRoIPoolGeometry
from dcnops._layout import NCHW


class DeformRoIPoolGradients(NamedTuple):
    """Gradients of a deformable RoI pooling, `None` where not needed.

    Each has the shape, layout and dtype of the argument it is named after.
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
    """Deformable RoI pooling; modulated (v2) when `mask` is given, RoIAlign when neither `offset` nor `mask` is.

    NumPy arrays are computed on the CPU, CuPy arrays on their GPU and the current stream; all arrays of a call share
    library and device.

    Parameters
    ----------
    input : array [N, C, H, W] or [N, H, W, C], float16, bfloat16, float32 or float64
        The feature maps.
    rois : array [R, 5], float16, bfloat16, float32 or float64, in units of the image
        Regions (index of the feature map, x1, y1, x2, y2). R may be 0.
    offset : array [R, 2, P, Q], dtype of `input` (beside 16-bit data also float32), optional
        Shift of each bin, as a fraction of the region: ``offset[r, 0]`` horizontal, ``offset[r, 1]`` vertical. This is
        not the order of `deform_conv2d`.
    mask : array [R, P, Q], dtype of `offset`, optional
        Factor of each bin; any real number.
    output_size : int or (P, Q)
        Bins of a region, vertical and horizontal.
    spatial_scale : float
        Pixels of `input` per unit of `rois`, such as 1/16.
    sampling_ratio : int
        Samples of a bin along each axis; 0 for as many as the bin has pixels.
    gamma : float
        Factor of the offsets. mmcv's default is 0.1; the papers' formula has none, that is 1.
    layout : "NCHW" or "NHWC"
        Which of the two orders of axes `input` and the result have. The other arrays have one.

    Returns
    -------
    array [R, C, P, Q] or [R, P, Q, C], dtype of `input`

    Raises
    ------
    ShapeError
        An array has the wrong rank or size.
    ArgumentError
        A parameter is not legal; or `rois` (of NumPy) name a feature map that `input` does not have.
    DtypeError
        An argument is no NumPy or CuPy array, or has the wrong dtype.
    DeviceError
        The arrays are of different libraries or on different devices.

    Notes
    -----
    Deformable ConvNets v2 (CVPR 2019), equation 2, with RoIAlign's sampling: with s = `spatial_scale`,
    ``X1 = s*x1 - 1/2``, ``Rw = s*(x2 - x1)``, ``bw = Rw/Q``, Sw samples of a bin, and likewise for y::

        y[r,c,p,q] = mask[r,p,q] / max(Sh*Sw, 1) * sum over i, j:  A(x[c], py, px)

        py = Y1 + p*bh + gamma*Rh*offset[r,1,p,q] + (i + 1/2)*bh/Sh
        px = X1 + q*bw + gamma*Rw*offset[r,0,p,q] + (j + 1/2)*bw/Sw

    A is 0 outside of [-1, H] x [-1, W]; inside, the position is clamped to the image and interpolated bilinearly.
    Without offset and mask this is ``torchvision.ops.roi_align(..., aligned=True)``. A pixel of weight zero does not
    take part, whatever its value. Regions that are inverted, empty or outside of the image pool what the formula says.
    A region that is not finite, or a NaN offset, makes NaN. On a GPU, where values are not read back, so does a region
    of a feature map that does not exist. An infinite offset makes 0. With `sampling_ratio` 0 a bin has at most
    2**24 samples along an axis.

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
    >>> offset[0, 0, 0, 0] = 2.5  # the first bin moves right by gamma * 2.5 = a quarter of the region, 1 pixel
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
    output = backend.deform_roi_pool(geometry, order.images(input), rois, offset, mask, order is not NCHW)
    result: ArrayT = order.array(output, backend.contiguous)
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
    """Gradients of `deform_roi_pool` with respect to its arrays.

    Parameters
    ----------
    grad_out : array [R, C, P, Q] or [R, P, Q, C], dtype of `input`
        Gradient of a scalar with respect to the output.
    input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma, layout
        The arguments of the forward call; `layout` is also that of `grad_out`.
    needs : iterable of "input", "offset", "mask"
        The gradients to compute. Those of arguments that were not given are `None` in any case.
    deterministic : bool
        Sum the input's gradient in an order that is always the same, so that two runs agree to the last bit. On NumPy
        arrays it always is.

    Returns
    -------
    DeformRoIPoolGradients
        A named tuple (input, offset, mask); each field is an array of the shape, layout and dtype of its argument, or
        `None` where not needed. Regions have no gradient.

    Raises
    ------
    ShapeError, DtypeError, DeviceError
        As in `deform_roi_pool`.
    ArgumentError
        Also when `needs` holds an unknown name.

    Notes
    -----
    These are the derivatives of the forward pass, also where a sample is clamped to the image: it does not move with
    the offset in that direction, and its derivative is 0. At integer positions, where bilinear interpolation has a
    kink, the right derivative is taken. A bin that is NaN has NaN offset and mask gradients and gives nothing to the
    input's.

    Examples
    --------
    >>> import numpy as np
    >>> import dcnops
    >>> image = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    >>> rois = np.array([[0, 1, 1, 3, 3]], np.float32)
    >>> offset = np.zeros((1, 2, 1, 1), np.float32)
    >>> grad_out = np.ones((1, 1, 1, 1), np.float32)
    >>> grads = dcnops.deform_roi_pool_backward(grad_out, image, rois, offset, output_size=1, gamma=1.0)
    >>> grads.offset.ravel()  # by one region to the right adds 2 * 1, by one region down 2 * 4
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
        geometry, order.images(grad_out), order.images(input), rois, offset, mask, wanted, deterministic
    )
    grad_input = order.array(gradients.get("input"), backend.contiguous)
    return DeformRoIPoolGradients(grad_input, gradients.get("offset"), gradients.get("mask"))
