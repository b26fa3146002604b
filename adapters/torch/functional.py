"""Deformable convolution and deformable RoI pooling on PyTorch tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function

from dcnops._arguments import Padding, Pair, check_precision, check_sampling, expand_padding, expand_pair
from dcnops._errors import DeviceError, DtypeError

from . import operators

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SIXTEEN_BIT = (torch.float16, torch.bfloat16)


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    mask: Tensor | None = None,
    *,
    precision: str | None = None,
) -> Tensor:
    """Deformable convolution of tensors; modulated (v2) when `mask` is given.

    What it computes is described at `dcnops.deform_conv2d`. Tensors are handed over without a copy: those of the CPU to
    the CPU backend, CUDA tensors to the kernels, on torch's current stream and from torch's memory. It has gradients,
    also second ones, and can be compiled and exported.

    Parameters
    ----------
    input : Tensor [N, C, H, W], float16, bfloat16, float32 or float64
    offset : Tensor [N, 2*D*kh*kw, oh, ow], in pixels
    weight : Tensor [O, C/G, kh, kw]
    bias : Tensor [O], optional
    stride, dilation : int or (vertical, horizontal)
    padding : int, (vertical, horizontal) or ((top, bottom), (left, right)), in pixels
    mask : Tensor [N, D*kh*kw, oh, ow], optional
    precision : "ieee", "tf32" or "3xtf32", optional
        How float32 products are computed on a GPU, forward and backward. By default as torch computes its own matrix
        products at the time of the call: "tf32" if ``torch.backends.cuda.matmul.fp32_precision`` or an older switch
        (`allow_tf32`, `torch.set_float32_matmul_precision`) says so, else "ieee".

    Returns
    -------
    Tensor [N, O, oh, ow]

    Raises
    ------
    ShapeError, ArgumentError
        As in `dcnops.deform_conv2d`.
    DtypeError
        An argument is no tensor, or is not of a floating type.
    DeviceError
        The tensors are on different devices, or on one that is neither a CPU nor a CUDA GPU.

    Notes
    -----
    Mixed dtypes: `input`, `weight` and `bias` are promoted to their common type (`torch.promote_types`), under autocast
    to autocast's type; float64 stays. `offset` and `mask` take that type too, but stay or become float32 beside 16-bit
    data unless both have the type of the data. Coordinates and sums are float32 at least in any case.

    `torch.compile`, `torch.export` and `torch.func.vmap` (one call after the other) work; `torch.func.grad` does not:
    use `torch.autograd.grad`. Second gradients take a path through plain torch operations, which is much slower,
    needs memory of the size of the columns and has the precision of torch's switches.

    `input`, `offset` and `mask` may be in the channels_last format; on a GPU none of them is then copied. The output
    has the format of the input, each gradient that of its argument.

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
    if stand_ins := _stand_ins(input, offset, weight, bias, mask):
        return handle_torch_function(
            deform_conv2d,
            stand_ins,
            input,
            offset,
            weight,
            bias,
            stride,
            padding,
            dilation,
            mask,
            precision=precision,
        )
    check_precision(precision)
    _check_tensors({"input": input, "weight": weight, "offset": offset}, {"bias": bias, "mask": mask})
    (input, weight, bias), (offset, mask) = _promote((input, weight, bias), (offset, mask))
    sides = expand_padding(padding)
    return _call(
        operators.deform_conv2d,
        input,
        offset,
        weight,
        bias,
        mask,
        expand_pair("stride", stride),
        [*sides[0], *sides[1]],
        expand_pair("dilation", dilation),
        _precision(precision, input),
    )


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
    """Deformable RoI pooling of tensors; modulated (v2) when `mask` is given, RoIAlign without `offset` and `mask`.

    What it computes is described at `dcnops.deform_roi_pool`; memory, gradients and dtypes are as in `deform_conv2d`.

    Parameters
    ----------
    input : Tensor [N, C, H, W], float16, bfloat16, float32 or float64
    rois : Tensor [R, 5]
        Regions (index of the feature map, x1, y1, x2, y2). They have no gradient.
    offset : Tensor [R, 2, P, Q], optional
        Horizontal shifts first, as fractions of the region.
    mask : Tensor [R, P, Q], optional
    output_size : int or (P, Q)
    spatial_scale : float
        Pixels of `input` per unit of `rois`.
    sampling_ratio : int
        Samples of a bin along each axis; 0 for as many as the bin has pixels.
    gamma : float
        Factor of the offsets.

    Returns
    -------
    Tensor [R, C, P, Q]
        Contiguous, whatever the format of the input, as torchvision's is.

    Raises
    ------
    ShapeError, ArgumentError
        As in `dcnops.deform_roi_pool`.
    DtypeError
        An argument is no tensor, or is not of a floating type.
    DeviceError
        The tensors are on different devices, or on one that is neither a CPU nor a CUDA GPU.

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
    if stand_ins := _stand_ins(input, rois, offset, mask):
        return handle_torch_function(
            deform_roi_pool,
            stand_ins,
            input,
            rois,
            offset,
            mask,
            output_size=output_size,
            spatial_scale=spatial_scale,
            sampling_ratio=sampling_ratio,
            gamma=gamma,
        )
    _check_tensors({"input": input, "rois": rois}, {"offset": offset, "mask": mask})
    (input,), (offset, mask) = _promote((input,), (offset, mask))
    size = expand_pair("output_size", output_size)
    ratio, scale, factor = check_sampling(sampling_ratio, spatial_scale, gamma)
    return _call(operators.deform_roi_pool, input, rois, offset, mask, size, scale, ratio, factor)


def _call(operator: Callable[..., Tensor], *arguments: Any) -> Tensor:
    if forward_ad._current_level >= 0 and any(
        isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None for argument in arguments
    ):
        raise RuntimeError(
            "the operations of dcnops have no forward-mode derivative (torch.func.jvp, jacfwd, forward_ad); "
            "use torch.autograd.grad or backward()"
        )
    try:
        return operator(*arguments)
    except RuntimeError as error:
        if "functorch transforms" in str(error):
            raise RuntimeError(
                "torch.func.grad, jvp and the like cannot differentiate the operations of dcnops; "
                "use torch.autograd.grad or backward() (torch.func.vmap of the forward pass works)"
            ) from error
        raise


def is_stand_in(value: object) -> bool:
    """Whether something that is no tensor takes part in torch's functions, as the proxies of ``torch.fx`` do."""
    return not isinstance(value, Tensor) and hasattr(type(value), "__torch_function__")


def _stand_ins(*values: object) -> list[Any]:
    return [value for value in values if is_stand_in(value)]


def _check_tensors(required: dict[str, Any], optional: dict[str, Any]) -> None:
    given = {**required, **{name: tensor for name, tensor in optional.items() if tensor is not None}}
    first = next(iter(given.values()))
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
            raise DtypeError(
                f"{name} must be a torch.Tensor, got {kind}; for arrays there is dcnops.{_operation(given)}"
            )
        if tensor.dtype not in _FLOATS:
            raise DtypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.device != first.device:
            raise DeviceError(f"{name} must be on {first.device} like input, got {tensor.device}")
    if first.device.type not in ("cpu", "cuda", "meta"):
        raise DeviceError(f"input must be on a CPU or a CUDA GPU, got {first.device}")


def _precision(precision: str | None, input: Tensor) -> str:
    """What the operator is told; other devices and dtypes know one precision only."""
    if input.device.type != "cuda" or input.dtype != torch.float32:
        return "ieee"
    return _matmul_precision() if precision is None else precision


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _matmul_precision() -> str:
    """The precision of torch's own float32 matrix products on a GPU: "tf32" or "ieee".

    A constant to `torch.compile`, which compiles anew when the switch has been moved.
    """
    matmul = torch.backends.cuda.matmul
    # Before torch 2.9 there is one switch only; since then reading the old one is an error where the new one was set.
    tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


def _operation(given: dict[str, Any]) -> str:
    return "deform_roi_pool" if "rois" in given else "deform_conv2d"


def _promote(data: Sequence[Tensor | None], sampling: Sequence[Tensor | None]) -> tuple[list[Any], list[Any]]:
    """The tensors in the dtypes that the operation takes, by the rule in `deform_conv2d`'s notes."""
    first = data[0]
    assert first is not None
    dtype = first.dtype
    for tensor in data[1:]:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    device = first.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    same = all(tensor is None or tensor.dtype == dtype for tensor in sampling)
    sampling_dtype = torch.float32 if dtype in _SIXTEEN_BIT and not same else dtype
    return (
        [tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype) for tensor in data],
        [
            tensor if tensor is None or tensor.dtype == sampling_dtype else tensor.to(sampling_dtype)
            for tensor in sampling
        ],
    )
