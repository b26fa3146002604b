"""Contenders and float64 results of multi-scale deformable attention and deformable aggregation.

Both are weighted sums of samples, which users without a compiled extension compute with `grid_sample` of PyTorch. With
16-bit data, offsets and weights are float32, and `grid_sample` runs in float32 as under autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import numpy as np

from benchmarks.contenders import ON_DEVICE, deterministic_if_wanted, prepare_torch
from benchmarks.operations import GRID, OURS, Arrays, Case, Contender

if TYPE_CHECKING:
    import torch

LEVELS = "levels"
"""Name of an array in the inputs that is no argument: the level of each point."""

_LEAST_DISTANCE = 1e-3
"""Minimum distance of a sample from a whole pixel, in pixels. The gradients of positions jump there."""

# Float32 positions of grid_sample differ from ours by a few roundings, which the gradients of positions multiply.
_TOLERANCE = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 2e-2}
_GRID_TOLERANCE = {**_TOLERANCE, "float32": 2e-4}


class Level(NamedTuple):
    """Feature map of a sample: height, width and first pixel."""

    height: int
    width: int
    start: int


Options: TypeAlias = Callable[[Case], dict[str, Any]]
"""Arguments other than arrays, for a case."""


def contenders(
    operation: str, data: frozenset[str], options: Options, grid: Callable[..., Any], grid_options: Options, case: Case
) -> list[Contender]:
    """Return dcnops and `grid`, a function of tensors; `data` names the arrays in the dtype of the case."""
    ours = partial(_prepare_tensors if case.device == "cuda" else _prepare_arrays, operation, data, options)
    return [
        Contender(OURS, ours, _TOLERANCE[case.dtype]),
        Contender(GRID, partial(_prepare_grid, grid, data, grid_options), _GRID_TOLERANCE[case.dtype]),
    ]


def _to_torch(case: Case, data: frozenset[str], arrays: Arrays) -> dict[str, torch.Tensor]:
    import torch

    device = "cuda" if case.device == "cuda" else "cpu"
    return {
        name: torch.from_numpy(array).to(device, getattr(torch, case.dtype if name in data else "float32"))
        for name, array in arrays.items()
        if name != LEVELS
    }


def _prepare_tensors(
    operation: str, data: frozenset[str], options: Options, case: Case, arrays: Arrays, direction: str
) -> Callable[[], Any]:
    from dcnops.adapters import torch as adapter

    tensors = _to_torch(case, data, arrays)
    grad_out = tensors.pop("grad_out")
    call = prepare_torch(partial(getattr(adapter, operation), **options(case)), tensors, grad_out, direction)
    return deterministic_if_wanted(call, case, direction)


def _prepare_arrays(
    operation: str, data: frozenset[str], options: Options, case: Case, arrays: Arrays, direction: str
) -> Callable[[], Any]:
    import dcnops

    arguments: dict[str, Any] = {name: array for name, array in arrays.items() if name != LEVELS}
    if case.device != "cpu":
        from dcnops.adapters.torch.arrays import as_array

        tensors = _to_torch(case, data, arrays)
        arguments = {name: ON_DEVICE[case.device](as_array(tensor)) for name, tensor in tensors.items()}
    if direction == "forward":
        del arguments["grad_out"]
        return partial(getattr(dcnops, operation), **arguments, **options(case))
    backward = partial(
        getattr(dcnops, f"{operation}_backward"), **arguments, **options(case), deterministic=case.deterministic
    )
    return lambda: {name: gradient for name, gradient in backward()._asdict().items() if gradient is not None}


def _prepare_grid(
    function: Callable[..., Any], data: frozenset[str], options: Options, case: Case, arrays: Arrays, direction: str
) -> Callable[[], Any]:
    tensors = _to_torch(case, data, arrays)
    grad_out, settings = tensors.pop("grad_out"), options(case)

    def call(**tensors: torch.Tensor) -> torch.Tensor:
        exact = {name: tensor.float() for name, tensor in tensors.items()}
        return cast("torch.Tensor", function(**exact, **settings).to(grad_out.dtype))

    return prepare_torch(call, tensors, grad_out, direction)


def near_whole_pixels(positions: np.ndarray) -> np.ndarray:
    """Mark the positions that are close to a whole pixel."""
    return np.asarray(np.abs(positions - positions.round()) < _LEAST_DISTANCE)


def expected_sums(
    value: np.ndarray,
    offset: np.ndarray,
    weight: np.ndarray,
    grad_out: np.ndarray,
    levels: Sequence[Level],
    positions: Callable[[np.ndarray], np.ndarray],
    slopes: np.ndarray,
    device: str,
) -> tuple[np.ndarray, ...]:
    """Return the sums and the gradients of value, offset and weight in float64, differentiated by autograd.

    Parameters
    ----------
    value : array [S, M, D]
    offset : array [Q, M, K, 2], weight : array [Q, M, K], grad_out : array [Q, M, D]
    levels : sequence of Level
        The level of each of the K points.
    positions : function
        Returns the positions (x, y) in pixels [Q, K, 2] of the offsets of a head. Positions are computed in float32,
        because that decides on which side of a border they are.
    slopes : array [K, 2]
        Change of the positions per change of the offset.
    device : str
        Torch device.
    """
    import torch
    from torch.nn.functional import embedding_bag

    def exact(array: Any) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device).double()

    height, width, start = (torch.tensor(column, device=device) for column in zip(*levels, strict=True))
    parts = []
    for head in range(value.shape[1]):
        table, factor = exact(value[:, head]).requires_grad_(), exact(weight[:, head]).requires_grad_()
        # Zero: the positions contain the offsets already.
        moved = torch.zeros(offset[:, head].shape, dtype=torch.float64, device=device, requires_grad=True)
        x, y = (exact(positions(offset[:, head])) + exact(slopes) * moved).unbind(-1)
        pixels, weights = [], []
        for corner in range(4):
            row, column = y.detach().floor() + corner // 2, x.detach().floor() + corner % 2
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            pixels.append(torch.where(inside, start + row * width + column, 0).long())
            weights.append((1 - (y - row).abs()) * (1 - (x - column).abs()) * factor * inside)
        output = embedding_bag(torch.cat(pixels, 1), table, mode="sum", per_sample_weights=torch.cat(weights, 1))
        gradients = torch.autograd.grad(output, (table, moved, factor), exact(grad_out[:, head]))
        parts.append([tensor.detach().cpu().numpy() for tensor in (output, *gradients)])
    return tuple(np.stack(heads, axis=1) for heads in zip(*parts, strict=True))
