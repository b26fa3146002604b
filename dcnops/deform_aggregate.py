"""Deformable aggregation, the core of DCNv3 and DCNv4, and its gradients on NumPy and CuPy arrays."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from dcnops._arguments import Pair, check_needs
from dcnops._attention_shapes import DeformAggregateGeometry
from dcnops._dispatch import ArrayT, check_arrays, load_backend
from dcnops._explain import is_explaining, log_call


class DeformAggregateGradients(NamedTuple):
    """Gradients of a deformable aggregation; `None` for those that are not needed.

    Each gradient has the shape and dtype of the argument of the same name. That of a packed `offset` holds the
    gradients of the offsets and the weights, and zeros in the padding.
    """

    input: Any | None
    offset: Any | None
    mask: Any | None


def deform_aggregate(
    input: ArrayT,
    offset: ArrayT,
    mask: ArrayT | None = None,
    *,
    groups: int,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
) -> ArrayT:
    """Compute deformable aggregation: weighted sums of samples around each pixel, the core of DCNv3 and DCNv4.

    NumPy arrays are processed on the CPU, CuPy arrays on their GPU in the current stream. All arrays of a call must
    belong to the same library and device. Unlike `deform_conv2d`, the weights are different at each pixel and equal
    for all channels of a group.

    Parameters
    ----------
    input : array [N, H, W, C], float16, bfloat16, float32 or float64
        Feature maps, channels last.
    offset : array [N, oh, ow, G*K*2], dtype of `input` or, for 16-bit data, also float32
        Offsets (x, y) of K taps in G groups, as in DCNv3. The taps run down the columns of the kernel: the column is
        the outer loop and the row the inner one. Without `mask`, the packed array of DCNv4 with the offsets and the
        weights: for each group 2*K offsets and K weights, and at the end padding to a multiple of 8 channels.
    mask : array [N, oh, ow, G*K], dtype of `offset`, optional
        Weight of each tap, any real number. No softmax is applied.
    groups : int
        Groups G of C/G = D channels.
    kernel_size : int or (kh, kw)
        The number of taps K is kh*kw, or one less with `remove_center`.
    stride, padding, dilation : int or (vertical, horizontal)
    offset_scale : float
        Factor of the kernel's extent around its middle and of the offsets.
    remove_center : bool
        Leave out the tap in the middle of the kernel, which must have odd sizes.

    Returns
    -------
    array [N, oh, ow, C], dtype of `input`

    Raises
    ------
    ShapeError
        An array has the wrong rank or size.
    ArgumentError
        A parameter is invalid.
    DtypeError
        An argument is not a NumPy or CuPy array, or has the wrong dtype.
    DeviceError
        The arrays belong to different libraries or devices.

    Notes
    -----
    InternImage (CVPR 2023), equation 3. For the tap k in row i and column j of the kernel, with s = `offset_scale` and
    the middle ``cy = dilation*(kh - 1)//2``, likewise for x::

        out[n,a,b,g*D + d] = sum over k:  mask[n,a,b,g*K + k] * B(input[n,:,:,g*D + d], y, x)

        y = (a*stride - padding + cy) + s*((i*dilation - cy) + offset[n,a,b,(g*K + k)*2 + 1])
        x = (b*stride - padding + cx) + s*((j*dilation - cx) + offset[n,a,b,(g*K + k)*2])

    B is as in `deform_conv2d`: bilinear on the image extended by zeros, 0 unless -1 < y < H and -1 < x < W. With
    `offset_scale` 1 this is a depthwise deformable convolution with unit weights. Pixels with interpolation weight 0,
    NaN and far-away positions are treated as in `ms_deform_attn`.

    Examples
    --------
    >>> import numpy as np
    >>> import dcnops
    >>> image = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    >>> offset = np.zeros((1, 4, 4, 18), np.float32)
    >>> mask = np.ones((1, 4, 4, 9), np.float32)
    >>> dcnops.deform_aggregate(image, offset, mask, groups=1, kernel_size=3, padding=1)[0, 1, :, 0]
    array([27., 45., 54., 39.], dtype=float32)

    The same as in DCNv4:

    >>> packed = np.zeros((1, 4, 4, 32), np.float32)  # 27 numbers, padded to a multiple of 8
    >>> packed[..., 18:27] = mask
    >>> dcnops.deform_aggregate(image, packed, groups=1, kernel_size=3, padding=1)[0, 1, :, 0]
    array([27., 45., 54., 39.], dtype=float32)
    """
    if is_explaining():
        log_call("deform_aggregate", locals())
    library = check_arrays({"input": input}, {"offset": offset, "mask": mask}, optional=("mask",))
    geometry = DeformAggregateGeometry.of(
        input, offset, mask, groups, kernel_size, stride, padding, dilation, offset_scale, remove_center
    )
    result: ArrayT = load_backend(library).deform_aggregate(geometry, input, offset, mask)
    return result


def deform_aggregate_backward(
    grad_out: ArrayT,
    input: ArrayT,
    offset: ArrayT,
    mask: ArrayT | None = None,
    *,
    groups: int,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    needs: Iterable[str] = DeformAggregateGradients._fields,
    deterministic: bool = False,
) -> DeformAggregateGradients:
    """Compute the gradients of `deform_aggregate` with respect to its arrays.

    Parameters
    ----------
    grad_out : array [N, oh, ow, C], dtype of `input`
        Gradient of a scalar with respect to the output.
    input, offset, mask, groups, kernel_size, stride, padding, dilation, offset_scale, remove_center
        Arguments of the forward call.
    needs : iterable of "input", "offset", "mask"
        Gradients to compute. That of a `mask` that is not given is always `None`.
    deterministic : bool
        Sum the gradient of `input` in a fixed order, so that two runs agree to the last bit. This is slower. The
        result for NumPy arrays is always deterministic.

    Returns
    -------
    DeformAggregateGradients
        Named tuple (input, offset, mask). Each field is an array with the shape and dtype of the argument, or `None` if
        it is not needed. The gradient of a packed array is packed.

    Raises
    ------
    ShapeError, DtypeError, DeviceError
        As in `deform_aggregate`.
    ArgumentError
        As in `deform_aggregate`, or `needs` contains an unknown name.

    Notes
    -----
    Kinks, positions outside the image and NaN positions are treated as in `ms_deform_attn_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> import dcnops
    >>> image = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    >>> offset = np.zeros((1, 4, 4, 2), np.float32)
    >>> mask = np.full((1, 4, 4, 1), 0.5, np.float32)
    >>> grad_out = np.ones((1, 4, 4, 1), np.float32)
    >>> grads = dcnops.deform_aggregate_backward(grad_out, image, offset, mask, groups=1, kernel_size=1)
    >>> grads.offset[0, 1, 1]  # moving right by a pixel adds 0.5 * 1, down 0.5 * 4
    array([0.5, 2. ], dtype=float32)
    >>> grads.mask[0, 1, :, 0]
    array([4., 5., 6., 7.], dtype=float32)
    """
    if is_explaining():
        log_call("deform_aggregate_backward", locals())
    library = check_arrays({"input": input, "grad_out": grad_out}, {"offset": offset, "mask": mask}, optional=("mask",))
    geometry = DeformAggregateGeometry.of(
        input, offset, mask, groups, kernel_size, stride, padding, dilation, offset_scale, remove_center
    )
    geometry.check_grad_out(tuple(grad_out.shape))
    wanted = check_needs(needs, input=input, offset=offset, mask=mask)
    gradients = load_backend(library).deform_aggregate_backward(
        geometry, grad_out, input, offset, mask, wanted, deterministic
    )
    return DeformAggregateGradients(*map(gradients.get, DeformAggregateGradients._fields))
