"""Recorder of the sampling operations that a network runs. It does not modify the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node as GradFn
from torch.overrides import TorchFunctionMode

from dcnops._errors import ArgumentError

from ..functional import deform_conv2d, deform_roi_pool
from .grids import Grid, Grids

_inspections: ContextVar[int] = ContextVar("inspections", default=0)  # nesting depth

IntPair = tuple[int, int]
Sides = tuple[IntPair, IntPair]
"""Padding ((top, bottom), (left, right))."""


@dataclass(frozen=True, kw_only=True)
class SamplingCall:
    """Recorded call of an operation that samples a map."""

    regular: bool  # an operation without offsets, recorded as a deformable one with offsets of zero
    input_size: IntPair
    offset: Tensor
    mask: Tensor | None
    name: str = ""  # of the innermost running module, as in `model.named_modules()`
    from_image: bool = False  # the input was computed from the image, even if its location is lost
    input_grid: Grid | None = None
    # Only a probing recorder sets the following; any other must not keep autograd's graph alive.
    delta: Tensor | None = None  # zeros that were added to the offsets, to differentiate with respect to them
    input_grad_fn: GradFn | None = None
    result_grad_fn: GradFn | None = None


@dataclass(frozen=True, kw_only=True)
class ConvCall(SamplingCall):
    """Recorded convolution: `offset` is [N, 2*D*kh*kw, oh, ow], `mask` [N, D*kh*kw, oh, ow]."""

    kernel: IntPair
    stride: IntPair
    padding: IntPair  # at the top and left
    dilation: IntPair
    output_grid: Grid | None = None

    def positions(self) -> Tensor:
        """Return the sampling positions (y, x) in the input map, [N, D, kh*kw, oh, ow, 2], float64."""
        taps = self.kernel[0] * self.kernel[1]
        height, width = self.offset.shape[2:]
        offset = self.offset.double().reshape(len(self.offset), -1, taps, 2, height, width)
        y, x = (
            _range(count, offset) * stride - padding
            for count, stride, padding in zip((height, width), self.stride, self.padding)
        )
        i, j = (_range(count, offset) * step for count, step in zip(self.kernel, self.dilation))
        taps_y, taps_x = i.repeat_interleave(self.kernel[1]), j.repeat(self.kernel[0])
        return torch.stack(
            [
                offset[:, :, :, 0] + y[:, None] + taps_y[:, None, None],
                offset[:, :, :, 1] + x + taps_x[:, None, None],
            ],
            dim=-1,
        )


@dataclass(frozen=True, kw_only=True)
class PoolCall(SamplingCall):
    """Recorded RoI pooling: `offset` is [R, 2, P, Q], in sides of the region with gamma applied, `mask` [R, P, Q]."""

    bins: IntPair  # (P, Q)
    rois: Tensor  # [R, 5]: index of the map, x1, y1, x2, y2 in pixels of the map; the corner of the map is 0

    def boxes(self) -> Tensor:
        """Return the bins x1, y1, x2, y2 in pixels of the map, [R, P, Q, 4], float64; the corner of the map is 0."""
        rois, offset = self.rois.double(), self.offset.double()
        first, extent = rois[:, None, None, 1:3], rois[:, None, None, 3:] - rois[:, None, None, 1:3]
        rows, columns = (_range(count, rois) for count in self.bins)
        numbers = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
        side = extent / extent.new_tensor(self.bins[::-1])
        corner = first + numbers * side + offset.movedim(1, -1) * extent
        return torch.cat([corner, corner + side], dim=-1)


class Recorder(TorchFunctionMode):
    """Context that records calls of RoI pooling and of convolutions, except regular 1x1 convolutions.

    It intercepts operations, not modules, and knows those of this library, PyTorch and torchvision. Operations of
    another view that runs within the context (`inspection`) are ignored.

    Parameters
    ----------
    model : torch.nn.Module
        Model that provides the names of the modules.
    image : Tensor [N, C, H, W], optional
        Image that the grids refer to.
    probe : bool
        Run every recorded operation as a deformable one and add a `delta` to its offsets. By default the recorder
        changes nothing.

    Attributes
    ----------
    calls : list of ConvCall and PoolCall
        In the order of execution.
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
        self._inspections = 0

    def __enter__(self) -> Recorder:
        self._inspections = _inspections.get()
        modules = dict(self.model.named_modules())
        for name, module in modules.items():
            if isinstance(module, torch.jit.ScriptModule):
                raise ArgumentError(f"model must not hold scripted modules, which cannot be watched, {name!r} is one")
        self._context.enter_context(_eager())
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
        kwargs = kwargs or {}
        inspected = _inspections.get() == self._inspections
        read = READERS.get(_operation(function)) if inspected else None
        if read is not None:
            return self._record(read(*args, **kwargs), lambda: function(*args, **kwargs))
        result = function(*args, **kwargs)
        if inspected:
            self.grids.follow(function, args, kwargs, result)
        return result

    def _record(self, operation: Operation, run_unchanged: Callable[[], Tensor]) -> Tensor:
        """Run an operation and record the call and its grids."""
        call, input, run = operation
        changes: dict[str, Any] = {}
        if run is None or not self.probe:
            result = run_unchanged()
        else:
            delta = torch.zeros_like(call.offset, memory_format=torch.contiguous_format).requires_grad_()
            result = run(delta)
            changes = {"delta": delta, "input_grad_fn": input.grad_fn, "result_grad_fn": result.grad_fn}
        if isinstance(call, ConvCall):
            window = call.kernel, call.stride, call.padding, call.dilation
            changes["output_grid"] = self.grids.convolve(input, result, *window)
        if run is not None:
            changes |= {"input_grid": self.grids[input], "from_image": input in self.grids}
            self.calls.append(replace(call, name=self._running[-1] if self._running else "", **changes))
        return result


class Operation(NamedTuple):
    """Sampling operation in a common form. `run` adds a delta to the offsets; it is None if nothing is recorded."""

    call: ConvCall | PoolCall
    input: Tensor
    run: Callable[[Tensor], Tensor] | None


def _read_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Operation:
    kernel, stride, dilation = _pair(weight.shape[2:]), _pair(stride), _pair(dilation)
    sides = _padding_sides(padding, kernel, dilation)
    sizes = [
        (size + sum(side) - step * (count - 1) - 1) // each + 1
        for size, side, step, count, each in zip(input.shape[2:], sides, dilation, kernel, stride)
    ]
    if kernel == (1, 1) or input.ndim != 4 or min(sizes) < 1:  # no room for the kernel: the convolution raises
        return _convolution(input, None, weight, bias, None, stride, sides, dilation)
    offset = input.new_zeros(1, 1, 1, 1).expand(len(input), 2 * kernel[0] * kernel[1], *sizes)
    return _convolution(input, offset, weight, bias, None, stride, sides, dilation, regular=True)


def _read_dcnops_conv2d(*args: Any) -> Operation:
    input, offset, weight, bias, mask, stride, padding, dilation, precision = args
    top, bottom, left, right = padding if len(padding) == 4 else [side for side in padding for _ in range(2)]
    sides = (top, bottom), (left, right)
    return _convolution(input, offset, weight, bias, mask, _pair(stride), sides, _pair(dilation), precision)


def _read_torchvision_conv2d(*args: Any) -> Operation:
    input, weight, offset, mask, bias, *numbers, _, _, modulated = args
    stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x = numbers
    sides = (pad_y, pad_y), (pad_x, pad_x)
    given = mask if modulated else None
    return _convolution(input, offset, weight, bias, given, (stride_y, stride_x), sides, (dilation_y, dilation_x))


def _convolution(
    input: Tensor,
    offset: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: IntPair,
    sides: Sides,
    dilation: IntPair,
    precision: str | None = None,
    regular: bool = False,
) -> Operation:
    def run(delta: Tensor) -> Tensor:
        assert offset is not None
        return deform_conv2d(input, offset + delta, weight, bias, stride, sides, dilation, mask, precision=precision)

    call = ConvCall(
        regular=regular,
        input_size=_pair(input.shape[-2:]),
        offset=input.new_empty(0) if offset is None else offset.detach(),
        mask=None if mask is None else mask.detach(),
        kernel=_pair(weight.shape[2:]),
        stride=stride,
        padding=(sides[0][0], sides[1][0]),
        dilation=dilation,
    )
    return Operation(call, input, None if offset is None else run)


def _scale_rois(rois: Tensor, scale: float) -> Tensor:
    """Convert regions [R, 5] to pixels of the map, in at least float32."""
    precise = rois.to(torch.promote_types(rois.dtype, torch.float32))
    return precise * precise.new_tensor([1, scale, scale, scale, scale])


def _read_dcnops_roi_pool(*args: Any) -> Operation:
    input, rois, offset, mask, size, scale, ratio, gamma = args
    return _pooling(
        input, _scale_rois(rois, scale), None if offset is None else gamma * offset, mask, _pair(size), ratio
    )


def _read_torchvision_roi_align(
    input: Tensor, rois: Tensor, scale: float, height: int, width: int, ratio: int, aligned: bool
) -> Operation:
    scaled = _scale_rois(rois, scale)
    if not aligned:  # no shift by half a pixel, and sides of at least one pixel
        image, x1, y1, x2, y2 = scaled.unbind(1)
        x2, y2 = x1 + (x2 - x1).clamp(min=1), y1 + (y2 - y1).clamp(min=1)
        scaled = torch.stack([image, x1 + 0.5, y1 + 0.5, x2 + 0.5, y2 + 0.5], dim=1)
    return _pooling(input, scaled, None, None, (height, width), max(ratio, 0))


def _pooling(
    input: Tensor, rois: Tensor, offset: Tensor | None, mask: Tensor | None, bins: IntPair, ratio: int
) -> Operation:
    given = input.new_zeros(len(rois), 2, *bins) if offset is None else offset

    def run(delta: Tensor) -> Tensor:
        return deform_roi_pool(input, rois, given + delta, mask, output_size=bins, sampling_ratio=ratio, gamma=1.0)

    call = PoolCall(
        regular=offset is None,
        input_size=_pair(input.shape[-2:]),
        offset=given.detach(),
        mask=None if mask is None else mask.detach(),
        bins=bins,
        rois=rois.detach(),
    )
    return Operation(call, input, run if len(rois) else None)


READERS: dict[str, Callable[..., Operation]] = {
    "conv2d": _read_conv2d,
    "dcnops::deform_conv2d": _read_dcnops_conv2d,
    "torchvision::deform_conv2d": _read_torchvision_conv2d,
    "dcnops::deform_roi_pool": _read_dcnops_roi_pool,
    "torchvision::roi_align": _read_torchvision_roi_align,
}
"""Functions that read the arguments of the watched operations."""


@contextmanager
def inspection(model: nn.Module) -> Iterator[None]:
    """Enable gradients and the model's evaluation mode, uncompiled; restore the modes at the end."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        stack.callback(_inspections.reset, _inspections.set(_inspections.get() + 1))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_eager())
        for module, mode in modes:
            stack.callback(setattr, module, "training", mode)
        model.eval()
        yield


def _eager() -> AbstractContextManager[object]:
    """Return a context in which compiled functions run as ordinary Python."""
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def _operation(function: Any) -> str:
    """Return the qualified name of a custom operation, "conv2d" for PyTorch's convolution, or an empty string."""
    if isinstance(function, torch._ops.OpOverload):
        return str(function._schema.name)
    if isinstance(function, torch._ops.OpOverloadPacket):
        return str(function._qualified_op_name)
    return "conv2d" if function is torch.conv2d else ""


def _range(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=like.dtype, device=like.device)


def _pair(value: Any) -> IntPair:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _padding_sides(padding: Any, kernel: IntPair, dilation: IntPair) -> Sides:
    """Return the padding on each side; PyTorch's "same" adds an odd pixel at the end."""
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel)]
        return (total[0] // 2, total[0] - total[0] // 2), (total[1] // 2, total[1] - total[1] // 2)
    vertical, horizontal = _pair(0 if padding == "valid" else padding)
    return (vertical, vertical), (horizontal, horizontal)
