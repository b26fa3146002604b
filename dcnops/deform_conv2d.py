"""(Modulated) deformable convolution and its gradients on NumPy and CuPy arrays."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from dcnops._arguments import Padding, Pair, check_layout, check_needs, check_precision
from dcnops._dispatch import ArrayT, check_arrays, load_backend
from dcnops._explain import is_explaining, log_call
from dcnops._geometry import DeformConvGeometry


class DeformConv2dGradients(NamedTuple):
    """Gradients of a deformable convolution, `None` where not needed.

    Each has the shape, layout and dtype of the argument it is named after.
    """

    input: Any | None
    offset: Any | None
    weight: Any | None
    bias: Any | None
    mask: Any | None


def deform_conv2d(
    input: ArrayT,
    offset: ArrayT,
    weight: ArrayT,
    bias: ArrayT | None = None,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    mask: ArrayT | None = None,
    *,
    layout: str = "NCHW",
    precision: str | None = None,
) -> ArrayT:
    """Deformable convolution; modulated (v2) when `mask` is given.

    The arguments are those of ``torchvision.ops.deform_conv2d``, in the same order. NumPy arrays are computed on the
    CPU, CuPy arrays on their GPU and the current stream; all arrays of a call share library and device.

    Parameters
    ----------
    input : array [N, C, H, W] or [N, H, W, C], float16, bfloat16, float32 or float64
        The images. N may be 0.
    offset : array [N, 2*D*kh*kw, oh, ow] or [N, oh, ow, 2*D*kh*kw], in pixels
        Shift of each sampling point, in the dtype of `input` (beside 16-bit data also float32). Channel
        ``2*(d*kh*kw + i*kw + j)`` is the vertical shift dy of tap (i, j) in deformable group d, the channel after it
        the horizontal shift dx. D, the number of deformable groups, is inferred and divides C.
    weight : array [O, C/G, kh, kw], dtype of `input`
        The filters. G, the number of weight groups, is inferred and divides C and O.
    bias : array [O], dtype of `input`, optional
    stride, dilation : int or (vertical, horizontal)
    padding : int, (vertical, horizontal) or ((top, bottom), (left, right)), in pixels
        Zero padding.
    mask : array [N, D*kh*kw, oh, ow] or [N, oh, ow, D*kh*kw], dtype of `offset`, optional
        Factor of each sampling point, channel ``d*kh*kw + i*kw + j``; any real number.
    layout : "NCHW" or "NHWC"
        Which of the two orders of axes `input`, `offset`, `mask` and the result have. `weight` has one.
    precision : "ieee", "tf32" or "3xtf32", optional
        How float32 products are computed on a GPU: in float32; on tensor cores, with factors rounded to 10 bits of
        mantissa; or on tensor cores in three such products, about as accurate as float32. By default as CuPy's own
        are ("ieee" unless the environment variable ``CUPY_TF32`` is 1). It may be done more accurately than asked for,
        and makes no difference to other dtypes and NumPy arrays.

    Returns
    -------
    array [N, O, oh, ow] or [N, oh, ow, O], dtype of `input`
        With ``oh = (H + top + bottom - dilation*(kh-1) - 1) // stride + 1`` and `ow` likewise.

    Raises
    ------
    ShapeError
        An array has the wrong rank or size.
    ArgumentError
        `stride`, `padding`, `dilation`, `layout` or `precision` is not legal.
    DtypeError
        An argument is no NumPy or CuPy array, or has the wrong dtype.
    DeviceError
        The arrays are of different libraries or on different devices.

    Notes
    -----
    Deformable ConvNets v2 (CVPR 2019), equation 1, with weight groups::

        y[n,o,a,b] = bias[o] + sum over c, i, j:  w[o,c,i,j] * mask[n,d*K+k,a,b] * B(x[n,c], py, px)

        py = a*stride - pad_top  + i*dilation + offset[n,2*(d*K+k),a,b]
        px = b*stride - pad_left + j*dilation + offset[n,2*(d*K+k)+1,a,b]

    for ``k = i*kw + j`` and ``K = kh*kw``. B is bilinear interpolation of the image extended by zeros, inside the
    open box -1 < py < H, -1 < px < W, and 0 outside of it. A pixel of weight zero does not take part, whatever its
    value. A NaN coordinate makes the sample NaN; infinite and far-away ones make it 0. Coordinates and sums are
    float32, or float64 for float64 data.

    Examples
    --------
    >>> import numpy as np
    >>> import dcnops
    >>> image = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    >>> weight = np.ones((1, 1, 1, 1), np.float32)
    >>> offset = np.zeros((1, 2, 4, 4), np.float32)
    >>> offset[:, 1] = 0.5  # every sampling point half a pixel to the right
    >>> dcnops.deform_conv2d(image, offset, weight)[0, 0, 0]
    array([0.5, 1.5, 2.5, 1.5], dtype=float32)
    >>> channels_last = [np.ascontiguousarray(array.transpose(0, 2, 3, 1)) for array in (image, offset)]
    >>> dcnops.deform_conv2d(*channels_last, weight, layout="NHWC")[0, 0, :, 0]
    array([0.5, 1.5, 2.5, 1.5], dtype=float32)
    """
    if is_explaining():
        log_call("deform_conv2d", locals())
    order = check_layout(layout)
    check_precision(precision)
    library = check_arrays(
        {"input": input, "weight": weight, "bias": bias},
        {"offset": offset, "mask": mask},
        optional=("bias", "mask"),
    )
    geometry = DeformConvGeometry.of(input, offset, weight, bias, mask, stride, padding, dilation, order)
    backend = load_backend(library)
    output = backend.deform_conv2d(
        geometry, order.images(input), order.images(offset), weight, bias, order.images(mask), precision
    )
    result: ArrayT = order.array(output, backend.contiguous)
    return result


def deform_conv2d_backward(
    grad_out: ArrayT,
    input: ArrayT,
    offset: ArrayT,
    weight: ArrayT,
    bias: ArrayT | None = None,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    mask: ArrayT | None = None,
    needs: Iterable[str] = DeformConv2dGradients._fields,
    deterministic: bool = False,
    *,
    layout: str = "NCHW",
    precision: str | None = None,
) -> DeformConv2dGradients:
    """Gradients of `deform_conv2d` with respect to its arrays.

    Parameters
    ----------
    grad_out : array [N, O, oh, ow] or [N, oh, ow, O], dtype of `input`
        Gradient of a scalar with respect to the output.
    input, offset, weight, bias, stride, padding, dilation, mask, layout, precision
        The arguments of the forward call; `layout` is also that of `grad_out`.
    needs : iterable of "input", "offset", "weight", "bias", "mask"
        The gradients to compute. Those of arguments that were not given are `None` in any case.
    deterministic : bool
        Sum the input's gradient in an order that is always the same, more slowly, so that two runs agree to the last
        bit. On NumPy arrays it always is.

    Returns
    -------
    DeformConv2dGradients
        A named tuple (input, offset, weight, bias, mask); each field is an array of the shape, layout and dtype of
        its argument, or `None` where not needed.

    Raises
    ------
    ShapeError, DtypeError, DeviceError
        As in `deform_conv2d`.
    ArgumentError
        Also when `needs` holds an unknown name.

    Notes
    -----
    At integer coordinates, where bilinear interpolation has a kink, the offset gradient is the right derivative.
    Outside the open box of the forward pass every gradient of a sample is 0. A sample with a NaN coordinate has NaN
    offset and mask gradients, makes the weight gradient NaN and gives nothing to the input's.

    Examples
    --------
    >>> import numpy as np
    >>> import dcnops
    >>> image = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    >>> weight = np.ones((1, 1, 1, 1), np.float32)
    >>> offset = np.zeros((1, 2, 4, 4), np.float32)
    >>> grad_out = np.ones((1, 1, 4, 4), np.float32)
    >>> grads = dcnops.deform_conv2d_backward(grad_out, image, offset, weight, needs=("offset", "weight"))
    >>> grads.offset[0, :, 1, 1]  # one pixel down adds 4, one pixel right adds 1
    array([4., 1.], dtype=float32)
    >>> grads.weight.item(), grads.input
    (120.0, None)
    """
    if is_explaining():
        log_call("deform_conv2d_backward", locals())
    order = check_layout(layout)
    check_precision(precision)
    library = check_arrays(
        {"input": input, "grad_out": grad_out, "weight": weight, "bias": bias},
        {"offset": offset, "mask": mask},
        optional=("bias", "mask"),
    )
    geometry = DeformConvGeometry.of(input, offset, weight, bias, mask, stride, padding, dilation, order)
    geometry.check_grad_out(tuple(grad_out.shape), order)
    wanted = check_needs(needs, input=input, offset=offset, weight=weight, bias=bias, mask=mask)
    backend = load_backend(library)
    images = map(order.images, (grad_out, input, offset))
    gradients = backend.deform_conv2d_backward(
        geometry, *images, weight, order.images(mask), wanted, deterministic, precision
    )
    for name in gradients.keys() - {"weight", "bias"}:
        gradients[name] = order.array(gradients[name], backend.contiguous)
    return DeformConv2dGradients(*map(gradients.get, DeformConv2dGradients._fields))
