"""Deformable convolution and deformable RoI pooling on PyTorch tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function

from dcnops._arguments import Padding, Pair, check_precision, check_sampling, expand_padding, expand_pair
from dcnops._dtypes import DTYPES
from dcnops._errors import ArgumentError, DeviceError, DtypeError

from . import devices, eager, operators
from .devices import check_device, is_autocast_enabled
from .flops import register_formulas
from .precision import operator_precision

_FLOAT_DTYPES = tuple(getattr(torch, name) for name in DTYPES)
_SIXTEEN_BIT_DTYPES = tuple(getattr(torch, name) for name, dtype in DTYPES.items() if dtype.is_16_bit)


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Padding | str = 0,
    dilation: Pair = 1,
    mask: Tensor | None = None,
    *,
    precision: str | None = None,
) -> Tensor:
    """Compute a deformable convolution of tensors, modulated (v2) if `mask` is given.

    See `dcnops.deform_conv2d` for the formula. CPU tensors are passed to the CPU backend, CUDA tensors to the kernels,
    without a copy, on torch's current stream and with torch's memory. First and second gradients, compilation and
    export are supported.

    Parameters
    ----------
    input : Tensor [N, C, H, W], float16, bfloat16, float32 or float64
    offset : Tensor [N, 2*D*kh*kw, oh, ow], in pixels
    weight : Tensor [O, C/G, kh, kw]
    bias : Tensor [O], optional
    stride, dilation : int or (vertical, horizontal)
    padding : int, (vertical, horizontal), ((top, bottom), (left, right)), "same" or "valid"
        In pixels, or by name as in `torch.nn.functional.conv2d`.
    mask : Tensor [N, D*kh*kw, oh, ow], optional
    precision : "ieee", "tf32" or "3xtf32", optional
        Arithmetic of float32 products on a GPU, forward and backward. The default is that of `set_float32_precision`,
        and without it that of torch's own convolutions at the time of the call: "tf32", unless
        ``torch.backends.cudnn.conv.fp32_precision`` (before torch 2.9, ``torch.backends.cudnn.allow_tf32``) says
        otherwise. In compiled and exported graphs the switch is read when the graph runs.

    Returns
    -------
    Tensor [N, O, oh, ow]

    Raises
    ------
    ShapeError
        A tensor has the wrong rank or size.
    ArgumentError
        `stride`, `padding`, `dilation` or `precision` is invalid.
    DtypeError
        An argument is not a tensor, or its dtype is not a supported floating-point type.
    DeviceError
        The tensors are on different devices, or on a device that is neither a CPU nor a CUDA GPU.

    Notes
    -----
    Mixed dtypes: `input`, `weight` and `bias` are promoted to their common dtype (`torch.promote_types`), under
    autocast to autocast's dtype; float64 is kept. `offset` and `mask` are converted to the same dtype, with one
    exception: with 16-bit data they are converted to float32 unless both already have the dtype of the data.
    Coordinates and sums always have at least float32 precision.

    `torch.compile`, `torch.export` and `torch.func.vmap` (as a sequence of calls) work. `torch.func.grad` does not:
    use `torch.autograd.grad`. Second gradients are computed with plain torch operations, which are much slower, need
    memory of the size of the im2col matrix and follow torch's precision switches.

    `input`, `offset` and `mask` may have the channels_last memory format, and on a GPU they are not copied then. The
    output has the memory format of the input, each gradient that of its argument.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch import deform_conv2d
    >>> image = torch.arange(16.0).reshape(1, 1, 4, 4)
    >>> offset = torch.zeros(1, 2, 4, 4)
    >>> offset[:, 1] = 0.5  # every sampling point half a pixel to the right
    >>> deform_conv2d(image, offset, torch.ones(1, 1, 1, 1))[0, 0, 0]
    tensor([0.5000, 1.5000, 2.5000, 1.5000])
    """
    if type(padding) is str and isinstance(weight, Tensor):
        strides, dilations = expand_pair("stride", stride), expand_pair("dilation", dilation)
        kernel_size = weight.shape[2:] if weight.ndim == 4 else (1, 1)  # an error below
        padding = named_padding(padding, kernel_size, strides, dilations)
    if not torch.compiler.is_compiling() and eager.is_plain((input, offset, weight), (bias, mask)):
        output = _call_eagerly(input, offset, weight, bias, mask, stride, padding, dilation, precision)  # type: ignore[arg-type]
        if output is not None:
            return output
    if proxies := tensor_proxies(input, offset, weight, bias, mask):
        arguments = (input, offset, weight, bias, stride, padding, dilation, mask)
        return handle_torch_function(deform_conv2d, proxies, *arguments, precision=precision)
    check_precision(precision)
    required = {"input": input, "weight": weight, "offset": offset}
    check_tensors("deform_conv2d", required, {"bias": bias, "mask": mask})
    (input, weight, bias), (offset, mask) = promote_dtypes((input, weight, bias), (offset, mask))
    vertical, horizontal = expand_padding(padding)  # type: ignore[arg-type]
    numbers = (expand_pair("stride", stride), [*vertical, *horizontal], expand_pair("dilation", dilation))
    tensors = (input, offset, weight, bias, mask)
    return call_operator(operators.deform_conv2d, *tensors, *numbers, operator_precision(precision, input))


def deform_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    output_size: Pair,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 2,
    gamma: float = 0.1,
) -> Tensor:
    """Compute deformable RoI pooling, modulated (v2) if `mask` is given, or RoIAlign without `offset` and `mask`.

    See `dcnops.deform_roi_pool` for the formula, and `deform_conv2d` for memory, gradients and mixed dtypes.

    Parameters
    ----------
    input : Tensor [N, C, H, W], float16, bfloat16, float32 or float64
    rois : Tensor [R, 5]
        Regions (index of the feature map, x1, y1, x2, y2). They have no gradient.
    offset : Tensor [R, 2, P, Q], optional
        Shift of each bin as a fraction of the region: ``offset[r, 0]`` horizontal, ``offset[r, 1]`` vertical.
    mask : Tensor [R, P, Q], optional
    output_size : int or (P, Q)
        Bins of a region, vertical and horizontal.
    spatial_scale : float
        Pixels of `input` per unit of `rois`.
    sampling_ratio : int
        Samples of a bin along each axis; with 0, one for each pixel of the bin.
    gamma : float
        Factor of the offsets.

    Returns
    -------
    Tensor [R, C, P, Q]
        Contiguous for every memory format of the input, like torchvision's result.

    Raises
    ------
    ShapeError
        A tensor has the wrong rank or size.
    ArgumentError
        A parameter is invalid; or, on a CPU, `rois` refer to a feature map that `input` does not have.
    DtypeError, DeviceError
        See `deform_conv2d`.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch import deform_roi_pool
    >>> image = torch.arange(16.0).reshape(1, 1, 4, 4)
    >>> rois = torch.tensor([[0.0, 0, 0, 4, 4]])
    >>> deform_roi_pool(image, rois, output_size=2)[0, 0]
    tensor([[ 2.5000,  4.5000],
            [10.5000, 12.5000]])
    """
    if not torch.compiler.is_compiling() and eager.is_plain((input, rois), (offset, mask)):
        if is_autocast_enabled(input.device) and are_floating((input, offset, mask)):
            (input,), (offset, mask) = promote_dtypes((input,), (offset, mask))
        numbers = (output_size, spatial_scale, sampling_ratio, gamma)
        output = eager.deform_roi_pool(input, rois, offset, mask, *numbers)
        if output is not None:
            return output
    if proxies := tensor_proxies(input, rois, offset, mask):
        return handle_torch_function(
            deform_roi_pool,
            proxies,
            input,
            rois,
            offset,
            mask,
            output_size=output_size,
            spatial_scale=spatial_scale,
            sampling_ratio=sampling_ratio,
            gamma=gamma,
        )
    check_tensors("deform_roi_pool", {"input": input, "rois": rois}, {"offset": offset, "mask": mask})
    (input,), (offset, mask) = promote_dtypes((input,), (offset, mask))
    size = expand_pair("output_size", output_size)
    ratio, scale, factor = check_sampling(sampling_ratio, spatial_scale, gamma)
    return call_operator(operators.deform_roi_pool, input, rois, offset, mask, size, scale, ratio, factor)


def named_padding(
    padding: str, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return ((top, bottom), (left, right)) of a padding by name, as in `torch.nn.functional.conv2d`."""
    if padding not in ("same", "valid"):
        raise ArgumentError(f"padding must be numbers of pixels, 'same' or 'valid', got {padding!r}")
    if padding == "valid":
        return (0, 0), (0, 0)
    if max(stride) > 1:
        raise ArgumentError(f"stride must be 1 with padding='same', got {stride}")
    vertical, horizontal = (d * (k - 1) for d, k in zip(dilation, kernel_size))
    # An odd number of pixels has the larger half at the bottom and on the right.
    return (vertical // 2, -(-vertical // 2)), (horizontal // 2, -(-horizontal // 2))


def _call_eagerly(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    precision: str | None,
) -> Tensor | None:
    """Compute `deform_conv2d` of plain tensors past the dispatcher; return None where that is not possible."""
    if precision is not None:
        check_precision(precision)
    if not (input.is_cpu or input.is_cuda):
        return None
    if torch.is_autocast_enabled(input.device.type):
        if not are_floating((input, offset, weight, bias, mask)):
            return None
        # The kernels round float32 weights themselves, and do not round their gradient.
        is_wide = weight.dtype == torch.float32 and devices.is_on_current_gpu(input)
        data, (offset, mask) = promote_dtypes((input, bias) if is_wide else (input, bias, weight), (offset, mask))
        input, bias = data[:2]
        if not is_wide or input.dtype not in _SIXTEEN_BIT_DTYPES:
            weight = weight.to(input.dtype)
    elif weight.dtype != input.dtype:
        return None
    chosen = operator_precision(precision, input) if input.dtype is torch.float32 else "ieee"
    return eager.deform_conv2d(input, offset, weight, bias, mask, stride, padding, dilation, chosen)


def call_operator(operator: Callable[..., Tensor], *arguments: Any) -> Tensor:
    if forward_ad._current_level >= 0 and any(
        isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None for argument in arguments
    ):
        raise RuntimeError(
            "the operations of dcnops have no forward-mode derivative (torch.func.jvp, jacfwd, forward_ad); "
            "use torch.autograd.grad or backward()"
        )
    if not torch.compiler.is_compiling():
        register_formulas()
    try:
        return operator(*arguments)
    except RuntimeError as error:
        if "functorch transforms" in str(error):
            raise RuntimeError(
                "torch.func.grad, jvp and the like cannot differentiate the operations of dcnops; "
                "use torch.autograd.grad or backward() (torch.func.vmap of the forward pass works)"
            ) from error
        raise


def is_tensor_proxy(value: object) -> bool:
    """Return True for an object that replaces a tensor in calls of torch functions, such as a ``torch.fx`` proxy."""
    return not isinstance(value, Tensor) and hasattr(type(value), "__torch_function__")


def tensor_proxies(*values: object) -> list[Any]:
    return [value for value in values if is_tensor_proxy(value)]


def type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def check_tensors(operation: str, required: dict[str, Any], optional: dict[str, Any]) -> None:
    """Check the types, dtypes and devices of tensors by argument name; the first determines the device."""
    given = {**required, **{name: tensor for name, tensor in optional.items() if tensor is not None}}
    like, first = next(iter(given.items()))
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise DtypeError(
                f"{name} must be a torch.Tensor, got {type_name(tensor)}; for arrays there is dcnops.{operation}"
            )
        if tensor.dtype not in _FLOAT_DTYPES:
            raise DtypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.device != first.device:
            raise DeviceError(f"{name} must be on {first.device} like {like}, got {tensor.device}")
    check_device(like, first)


def are_floating(tensors: Sequence[Tensor | None]) -> bool:
    return all(tensor is None or tensor.dtype in _FLOAT_DTYPES for tensor in tensors)


def promote_dtypes(data: Sequence[Tensor | None], sampling: Sequence[Tensor | None]) -> tuple[list[Any], list[Any]]:
    """Convert the tensors to the dtypes that the operator accepts; see the notes of `deform_conv2d`."""
    first = data[0]
    assert first is not None
    dtype = first.dtype
    for tensor in data[1:]:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    if is_autocast_enabled(first.device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(first.device.type)
    same = all(tensor is None or tensor.dtype == dtype for tensor in sampling)
    sampling_dtype = torch.float32 if dtype in _SIXTEEN_BIT_DTYPES and not same else dtype
    return _convert(data, dtype), _convert(sampling, sampling_dtype)


def _convert(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Any]:
    return [tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors]
