"""What the sampling layers of a network do during a call, watched without a change of the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node as Made
from torch.overrides import TorchFunctionMode

from dcnops._errors import ArgumentError

from ..functional import deform_conv2d, deform_roi_pool
from .grids import Grids
from .places import Grid

_views: ContextVar[int] = ContextVar("views", default=0)  # within each other


class Probe(NamedTuple):
    """What was added to a call to see what depends on it.

    Attributes
    ----------
    delta : Tensor, like the call's offset
        Zeros that were added to the offsets, to differentiate by.
    source, result : torch.autograd.graph.Node or None
        What made the call's input (None if that depends on nothing that is differentiated by), and its result.
    """

    delta: Tensor
    source: Made | None
    result: Made | None


@dataclass(frozen=True)
class ConvCall:
    """One call of a deformable convolution, or of a regular one seen as deformable.

    Attributes
    ----------
    name : str
        Of the innermost module that was running, as in ``model.named_modules()``.
    regular : bool
    kernel, stride, padding, dilation : (int, int)
        `padding` is that above and to the left.
    input_size : (H, W)
    offset : Tensor [N, 2*D*kh*kw, oh, ow]
    mask : Tensor [N, D*kh*kw, oh, ow] or None
    probe : Probe or None
    input_grid, output_grid : Grid or None
    """

    name: str
    regular: bool
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    input_size: tuple[int, int]
    offset: Tensor
    mask: Tensor | None
    probe: Probe | None
    input_grid: Grid | None
    output_grid: Grid | None

    def positions(self) -> Tensor:
        """The sampling positions (y, x) in the input map, [N, D, kh*kw, oh, ow, 2], float64."""
        taps = self.kernel[0] * self.kernel[1]
        height, width = self.offset.shape[2:]
        offset = self.offset.double().reshape(len(self.offset), -1, taps, 2, height, width)
        y, x = (
            _steps(count, offset) * stride - padding
            for count, stride, padding in zip((height, width), self.stride, self.padding)
        )
        i, j = (_steps(count, offset) * step for count, step in zip(self.kernel, self.dilation))
        taps_y, taps_x = i.repeat_interleave(self.kernel[1]), j.repeat(self.kernel[0])
        return torch.stack(
            [
                offset[:, :, :, 0] + y[:, None] + taps_y[:, None, None],
                offset[:, :, :, 1] + x + taps_x[:, None, None],
            ],
            dim=-1,
        )


@dataclass(frozen=True)
class PoolCall:
    """One call of a deformable RoI pooling, or of RoIAlign seen as deformable.

    Attributes
    ----------
    name : str
        As in `ConvCall`.
    regular : bool
    bins : (P, Q)
    input_size : (H, W)
    rois : Tensor [R, 5]
        Regions (index of the map, x1, y1, x2, y2) in pixels of the map, whose corner is 0.
    offset : Tensor [R, 2, P, Q]
        As fractions of the region, gamma being applied.
    mask : Tensor [R, P, Q] or None
    probe : Probe or None
    input_grid : Grid or None
    """

    name: str
    regular: bool
    bins: tuple[int, int]
    input_size: tuple[int, int]
    rois: Tensor
    offset: Tensor
    mask: Tensor | None
    probe: Probe | None
    input_grid: Grid | None

    def boxes(self) -> Tensor:
        """The bins x1, y1, x2, y2 in pixels of the input map, whose corner is 0, [R, P, Q, 4], float64."""
        rois, offset = self.rois.double(), self.offset.double()
        first, extent = rois[:, None, None, 1:3], rois[:, None, None, 3:] - rois[:, None, None, 1:3]
        rows, columns = (_steps(count, rois) for count in self.bins)
        numbers = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
        side = extent / extent.new_tensor(self.bins[::-1])
        corner = first + numbers * side + offset.movedim(1, -1) * extent
        return torch.cat([corner, corner + side], dim=-1)


class Recorder(TorchFunctionMode):
    """Notes the calls of convolutions with a kernel larger than 1x1 and of RoI poolings while its context lasts.

    It watches the operations, not the modules: those of this library and torchvision's, wherever they are called. What
    a view runs within the context (`undisturbed`) is not noted.

    Parameters
    ----------
    model : torch.nn.Module
        Whose modules give the names.
    image : Tensor [N, C, H, W], optional
        What the grids refer to.
    probe : bool
        Whether every call gets a `Probe`; regular convolutions and RoIAlign then run as deformable ones. Otherwise
        nothing is changed.

    Attributes
    ----------
    calls : list of ConvCall and PoolCall
        In the order in which they were made.
    grids : Grids
    """

    def __init__(self, model: nn.Module, image: Tensor | None = None, probe: bool = False) -> None:
        super().__init__()
        self.model = model
        self.probe = probe
        self.grids = Grids(image)
        self.calls: list[ConvCall | PoolCall] = []
        self._running: list[str] = []
        self._context = ExitStack()
        self._views = 0

    def __enter__(self) -> Recorder:
        self._views = _views.get()
        modules = dict(self.model.named_modules())
        for name, module in modules.items():
            if isinstance(module, torch.jit.ScriptModule):
                raise ArgumentError(f"model must not hold scripted modules, which cannot be watched, {name!r} is one")
        self._context.enter_context(uncompiled())
        for name, module in modules.items():

            def begin(module: nn.Module, args: Any, name: str = name) -> None:
                self._running.append(name)

            def end(module: nn.Module, args: Any, result: Any) -> None:
                self._running.pop()

            self._context.callback(module.register_forward_pre_hook(begin).remove)
            self._context.callback(module.register_forward_hook(end, always_call=True).remove)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._context.close()

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if _views.get() != self._views:
            return function(*args, **(kwargs or {}))
        watch = WATCHED.get(_operation(function))
        if watch is not None:
            return watch(self, function, *args, **(kwargs or {}))
        result = function(*args, **(kwargs or {}))
        self.grids.follow(function, args, kwargs or {}, result)
        return result

    def _conv2d(
        self,
        function: Callable[..., Any],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        strides, dilations, kernel = _pair(stride), _pair(dilation), (weight.shape[2], weight.shape[3])
        sides = _sides(padding, kernel, dilations)

        def regular() -> Tensor:
            result: Tensor = function(input, weight, bias, stride, padding, dilation, groups)
            return result

        sizes = [
            (size + sum(side) - step * (count - 1) - 1) // each + 1
            for size, side, step, count, each in zip(input.shape[2:], sides, dilations, kernel, strides)
        ]
        if kernel == (1, 1) or input.ndim != 4 or min(sizes) < 1:
            result = regular()  # an error where there is no room for the kernel
            self.grids.convolved(input, result, kernel, strides, (sides[0][0], sides[1][0]), dilations)
            return result
        offset = input.new_zeros(1, 1, 1, 1).expand(len(input), 2 * kernel[0] * kernel[1], *sizes)
        return self._convolution(regular, True, input, offset, weight, bias, None, strides, sides, dilations, None)

    def _dcnops_conv2d(
        self,
        function: Callable[..., Any],
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        stride: Any,
        padding: Any,
        dilation: Any,
        precision: str,
    ) -> Tensor:
        sides = padding if len(padding) == 4 else (padding[0], padding[0], padding[1], padding[1])
        return self._convolution(
            lambda: function(input, offset, weight, bias, mask, stride, padding, dilation, precision),
            False,
            input,
            offset,
            weight,
            bias,
            mask,
            _pair(stride),
            ((sides[0], sides[1]), (sides[2], sides[3])),
            _pair(dilation),
            precision,
        )

    def _torchvision_conv2d(
        self,
        function: Callable[..., Any],
        input: Tensor,
        weight: Tensor,
        offset: Tensor,
        mask: Tensor,
        bias: Tensor,
        *rest: Any,
    ) -> Tensor:
        *numbers, _, _, modulated = rest
        stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x = numbers
        return self._convolution(
            lambda: function(input, weight, offset, mask, bias, *rest),
            False,
            input,
            offset,
            weight,
            bias,
            mask if modulated else None,
            (stride_y, stride_x),
            ((pad_y, pad_y), (pad_x, pad_x)),
            (dilation_y, dilation_x),
            None,
        )

    def _convolution(
        self,
        plain: Callable[[], Tensor],
        regular: bool,
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        stride: tuple[int, int],
        sides: tuple[tuple[int, int], tuple[int, int]],
        dilation: tuple[int, int],
        precision: str | None,
    ) -> Tensor:
        """Run a convolution, probed if that is wanted, and note it."""
        kernel, begin = (weight.shape[2], weight.shape[3]), (sides[0][0], sides[1][0])
        probe = None
        if self.probe:
            delta = _zeros_like(offset)
            result = deform_conv2d(
                input, offset + delta, weight, bias, stride, sides, dilation, mask, precision=precision
            )
            probe = Probe(delta, input.grad_fn, result.grad_fn)
        else:
            result = plain()
        self.calls.append(
            ConvCall(
                self._name(),
                regular,
                kernel,
                stride,
                begin,
                dilation,
                (input.shape[2], input.shape[3]),
                offset.detach(),
                None if mask is None else mask.detach(),
                probe,
                self.grids[input],
                self.grids.convolved(input, result, kernel, stride, begin, dilation),
            )
        )
        return result

    def _dcnops_roi_pool(
        self,
        function: Callable[..., Any],
        input: Tensor,
        rois: Tensor,
        offset: Tensor | None,
        mask: Tensor | None,
        size: Any,
        scale: float,
        ratio: int,
        gamma: float,
    ) -> Tensor:
        return self._pool(
            lambda: function(input, rois, offset, mask, size, scale, ratio, gamma),
            input,
            rois * rois.new_tensor([1, scale, scale, scale, scale]),
            None if offset is None else gamma * offset,
            mask,
            _pair(size),
            ratio,
        )

    def _torchvision_roi_align(
        self,
        function: Callable[..., Any],
        input: Tensor,
        rois: Tensor,
        scale: float,
        height: int,
        width: int,
        ratio: int,
        aligned: bool,
    ) -> Tensor:
        scaled = rois * rois.new_tensor([1, scale, scale, scale, scale])
        if not aligned:  # neither the shift by half a pixel nor sides of less than one
            image, x1, y1, x2, y2 = scaled.unbind(1)
            x2, y2 = x1 + (x2 - x1).clamp(min=1), y1 + (y2 - y1).clamp(min=1)
            scaled = torch.stack([image, x1 + 0.5, y1 + 0.5, x2 + 0.5, y2 + 0.5], dim=1)
        return self._pool(
            lambda: function(input, rois, scale, height, width, ratio, aligned),
            input,
            scaled,
            None,
            None,
            (height, width),
            max(ratio, 0),
        )

    def _pool(
        self,
        plain: Callable[[], Tensor],
        input: Tensor,
        rois: Tensor,
        offset: Tensor | None,
        mask: Tensor | None,
        bins: tuple[int, int],
        ratio: int,
    ) -> Tensor:
        """Run a RoI pooling, probed if that is wanted, and note it; `rois` and `offset` are scaled."""
        regular, probe = offset is None, None
        if offset is None:
            offset = input.new_zeros(len(rois), 2, *bins)
        if self.probe and len(rois):
            delta = _zeros_like(offset)
            result = deform_roi_pool(
                input, rois, offset + delta, mask, output_size=bins, sampling_ratio=ratio, gamma=1.0
            )
            probe = Probe(delta, input.grad_fn, result.grad_fn)
        else:
            result = plain()
        if len(rois):
            self.calls.append(
                PoolCall(
                    self._name(),
                    regular,
                    bins,
                    (input.shape[2], input.shape[3]),
                    rois.detach(),
                    offset.detach(),
                    None if mask is None else mask.detach(),
                    probe,
                    self.grids[input],
                )
            )
        return result

    def _name(self) -> str:
        return self._running[-1] if self._running else ""


WATCHED: dict[str, Callable[..., Tensor]] = {
    "conv2d": Recorder._conv2d,
    "dcnops::deform_conv2d": Recorder._dcnops_conv2d,
    "torchvision::deform_conv2d": Recorder._torchvision_conv2d,
    "dcnops::deform_roi_pool": Recorder._dcnops_roi_pool,
    "torchvision::roi_align": Recorder._torchvision_roi_align,
}


def uncompiled() -> AbstractContextManager[object]:
    """What is compiled runs as it was written."""
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and gradients on; afterwards as it was."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        stack.callback(_views.reset, _views.set(_views.get() + 1))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(uncompiled())
        for module, mode in modes:
            stack.callback(setattr, module, "training", mode)
        model.eval()
        yield


def _operation(function: Any) -> str:
    """The name of a custom operation with its library's, or of one of torch's convolutions."""
    if isinstance(function, torch._ops.OpOverload):
        return str(function._schema.name)
    if isinstance(function, torch._ops.OpOverloadPacket):
        return str(function._qualified_op_name)
    return "conv2d" if function is torch.conv2d else ""


def _zeros_like(offset: Tensor) -> Tensor:
    return torch.zeros_like(offset, memory_format=torch.contiguous_format).requires_grad_()


def _steps(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=like.dtype, device=like.device)


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[-1])


def _sides(padding: Any, kernel: tuple[int, int], dilation: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Padding of a convolution as ((top, bottom), (left, right)); torch's "same" adds the odd pixel at the end."""
    if padding == "valid":
        padding = 0
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel)]
        return (total[0] // 2, total[0] - total[0] // 2), (total[1] // 2, total[1] - total[1] // 2)
    vertical, horizontal = _pair(padding)
    return (vertical, vertical), (horizontal, horizontal)
