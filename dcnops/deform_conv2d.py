"""(Modulated) deformable convolution and its gradients on NumPy and CuPy arrays."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from dcnops._arguments import Padding, Pair, check_layout, check_needs, check_precision
from dcnops._dispatch import ArrayT, check_arrays, load_backend
from dcnops._explain import is_explaining, log_call
from dcnops._shapes import DeformConvGeometry


class DeformConv2dGradients(NamedTuple):
    """Gradients of a deformable convolution; `None` for those that are not needed.

    Each gradient has the shape, layout and dtype of the argument of the same name.
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
    """Compute a deformable convolution, modulated (v2) if `mask` is given.

    The arguments have the order of ``torchvision.ops.deform_conv2d``. NumPy arrays are processed on the CPU, CuPy
    arrays on their GPU in the current stream. All arrays of a call must belong to the same library and device.

    Parameters
    ----------
    input : array [N, C, H, W] or [N, H, W, C], float16, bfloat16, float32 or float64
        Images. N may be 0.
    offset : array [N, 2*D*kh*kw, oh, ow] or [N, oh, ow, 2*D*kh*kw], in pixels
        Shift of each sampling point, in the dtype of `input` or, for 16-bit data, also in float32. Channel
        ``2*(d*kh*kw + i*kw + j)`` is the vertical shift dy of tap (i, j) in deformable group d; the next channel is
        the horizontal shift dx. The number of deformable groups D is inferred and must divide C.
    weight : array [O, C/G, kh, kw], dtype of `input`
        Filters. The number of weight groups G is inferred and must divide C and O.
    bias : array [O], dtype of `input`, optional
    stride, dilation : int or (vertical, horizontal)
    padding : int, (vertical, horizontal) or ((top, bottom), (left, right)), in pixels
        Zero padding.
    mask : array [N, D*kh*kw, oh, ow] or [N, oh, ow, D*kh*kw], dtype of `offset`, optional
        Factor of each sampling point, any real number. Channel ``d*kh*kw + i*kw + j`` belongs to tap (i, j) in
        deformable group d.
    layout : "NCHW" or "NHWC"
        Axis order of `input`, `offset`, `mask` and the result. `weight` is the same in both.
    precision : "ieee", "tf32" or "3xtf32", optional
        Computation of float32 products on a GPU. "ieee" uses float32. "tf32" uses tensor cores with factors rounded to
        10 mantissa bits. "3xtf32" uses three tensor core products, which are about as accurate as float32. The default
        follows CuPy's setting ("ieee" unless the environment variable ``CUPY_TF32`` is 1). The result may be more
        accurate than requested. Other dtypes and NumPy arrays are not affected.

    Returns
    -------
    array [N, O, oh, ow] or [N, oh, ow, O], dtype of `input`
        ``oh = (H + top + bottom - dilation*(kh-1) - 1) // stride + 1``, and `ow` likewise.

    Raises
    ------
    ShapeError
        An array has the wrong rank or size.
    ArgumentError
        `stride`, `padding`, `dilation`, `layout` or `precision` is invalid.
    DtypeError
        An argument is not a NumPy or CuPy array, or has the wrong dtype.
    DeviceError
        The arrays belong to different libraries or devices.

    Notes
    -----
    Deformable ConvNets v2 (CVPR 2019), equation 1, with weight groups::

        y[n,o,a,b] = bias[o] + sum over c, i, j:  w[o,c,i,j] * mask[n,d*K+k,a,b] * B(x[n,c], py, px)

        py = a*stride - pad_top  + i*dilation + offset[n,2*(d*K+k),a,b]
        px = b*stride - pad_left + j*dilation + offset[n,2*(d*K+k)+1,a,b]

    with ``k = i*kw + j`` and ``K = kh*kw``. Inside the open box -1 < py < H, -1 < px < W, B interpolates the
    zero-extended image bilinearly; outside, B is 0. A pixel with interpolation weight 0 does not contribute, even if it
    is infinite or NaN. A NaN coordinate makes the sample NaN; an infinite or distant one makes it 0. Coordinates and
    sums are computed in float32, or in float64 for float64 data.

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
        geometry, order.to_nchw(input), order.to_nchw(offset), weight, bias, order.to_nchw(mask), precision
    )
    result: ArrayT = order.from_nchw(output, backend.contiguous)
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
    """Compute the gradients of `deform_conv2d` with respect to its arrays.

    Parameters
    ----------
    grad_out : array [N, O, oh, ow] or [N, oh, ow, O], dtype of `input`
        Gradient of a scalar with respect to the output.
    input, offset, weight, bias, stride, padding, dilation, mask, layout, precision
        Arguments of the forward call; `layout` also applies to `grad_out`.
    needs : iterable of "input", "offset", "weight", "bias", "mask"
        Gradients to compute. Gradients of arguments that are not given are always `None`.
    deterministic : bool
        Sum the gradient of `input` in a fixed order, so that two runs agree to the last bit. This is slower. The
        result for NumPy arrays is always deterministic.

    Returns
    -------
    DeformConv2dGradients
        Named tuple (input, offset, weight, bias, mask). Each field is an array with the shape, layout and dtype of the
        argument, or `None` if it is not needed.

    Raises
    ------
    ShapeError, DtypeError, DeviceError
        As in `deform_conv2d`.
    ArgumentError
        As in `deform_conv2d`, or `needs` contains an unknown name.

    Notes
    -----
    Bilinear interpolation has a kink at integer coordinates; the offset gradient there is the right derivative.
    Outside the open box of the forward pass all gradients of a sample are 0. A sample with a NaN coordinate has NaN
    offset and mask gradients, makes the weight gradient NaN and adds nothing to the input gradient.

    Examples
    --------
    >>> import numpy as np
    >>> import dcnops
    >>> image = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    >>> weight = np.ones((1, 1, 1, 1), np.float32)
    >>> offset = np.zeros((1, 2, 4, 4), np.float32)
    >>> grad_out = np.ones((1, 1, 4, 4), np.float32)
    >>> grads = dcnops.deform_conv2d_backward(grad_out, image, offset, weight, needs=("offset", "weight"))
    >>> grads.offset[0, :, 1, 1]  # moving down by a pixel adds 4, moving right adds 1
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
    images = map(order.to_nchw, (grad_out, input, offset))
    gradients = backend.deform_conv2d_backward(
        geometry, *images, weight, order.to_nchw(mask), wanted, deterministic, precision
    )
    for name in gradients.keys() - {"weight", "bias"}:
        gradients[name] = order.from_nchw(gradients[name], backend.contiguous)
    return DeformConv2dGradients(*map(gradients.get, DeformConv2dGradients._fields))
