"""Reference implementation of deformable attention and aggregation, as `tests.reference` for the other operations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isnan
from typing import Any

import numpy as np

from tests.reference import bilinear_corners, expand_pair, times


@dataclass
class Point:
    """Sampling point `k` of head `m` for query `q` of image `n`, on a level of H x W pixels from pixel `start` on."""

    index: tuple[int, int, int, int]
    H: int
    W: int
    start: int
    y: float
    x: float
    scale: tuple[float, float]
    """Change of (x, y) in pixels per change of the offset."""

    @property
    def is_nan(self) -> bool:
        return isnan(self.y) or isnan(self.x)

    def corners(self) -> Iterator[tuple[int, float, float, float]]:
        """Yield (pixel, weight, d weight / dy, d weight / dx) of the neighbours inside the level."""
        for row, column, *weights in bilinear_corners(self.y, self.x, self.H, self.W):
            yield (self.start + row * self.W + column, *weights)


class WeightedSamples:
    """Sums over the points of each query and head. Subclasses set the arrays and locate the points."""

    value: np.ndarray  # [N, S, M, D]
    offset: np.ndarray  # [N, Lq, M, K, 2], (x, y)
    weight: np.ndarray  # [N, Lq, M, K]

    def set_arrays(self, value: Any, offset: Any, weight: Any) -> None:
        self.coordinate = np.float64 if value.dtype == np.float64 else np.float32
        self.value = np.asarray(value).astype(np.float64)
        self.offset = np.asarray(offset).astype(self.coordinate)
        self.weight = np.asarray(weight).astype(np.float64)

    def points(self) -> Iterator[Point]:
        raise NotImplementedError

    def sums(self) -> np.ndarray:
        N, _, M, D = self.value.shape
        output = np.zeros((N, self.offset.shape[1], M, D))
        for p in self.points():
            n, q, m, _ = p.index
            for pixel, weight, _, _ in p.corners():
                factor = 0.0 if weight == 0 else weight * self.weight[p.index]
                output[n, q, m] += times(factor, self.value[n, pixel, m])
            if p.is_nan:
                output[n, q, m] = np.nan
        return output

    def gradients(self, grad_out: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the gradients of the three arrays."""
        N, _, M, D = self.value.shape
        grad_out = np.asarray(grad_out).astype(np.float64).reshape(N, self.offset.shape[1], M, D)
        grad_value, grad_offset = np.zeros(self.value.shape), np.zeros(self.offset.shape)
        grad_weight = np.zeros(self.weight.shape)
        for p in self.points():
            n, q, m, _ = p.index
            t, modulation = grad_out[n, q, m], self.weight[p.index]
            d_y = d_x = d_weight = np.nan if p.is_nan else 0.0
            for pixel, weight, weight_y, weight_x in p.corners():
                value = self.value[n, pixel, m]
                grad_value[n, pixel, m] += times(0.0 if weight == 0 else weight * modulation, t)
                d_weight += times(weight, value * t).sum()
                d_y += times(modulation * weight_y, value * t).sum()
                d_x += times(modulation * weight_x, value * t).sum()
            grad_weight[p.index] = d_weight
            grad_offset[p.index] = p.scale[0] * d_x, p.scale[1] * d_y
        return grad_value, grad_offset, grad_weight


class MSDeformAttn(WeightedSamples):
    """One call of multi-scale deformable attention."""

    def __init__(self, value, spatial_shapes, sampling_locations, attention_weights, points=None):
        N, Lq, M = sampling_locations.shape[:3]
        counts = points if isinstance(points, (tuple, list)) else [sampling_locations.shape[4]] * len(spatial_shapes)
        K = sum(counts)
        self.set_arrays(value, sampling_locations.reshape(N, Lq, M, K, 2), attention_weights.reshape(N, Lq, M, K))
        starts = np.cumsum([0, *(height * width for height, width in spatial_shapes)])
        levels = [(*shape, int(start)) for shape, start in zip(spatial_shapes, starts)]
        self.levels = [level for level, count in zip(levels, counts) for _ in range(count)]

    def points(self) -> Iterator[Point]:
        for index in np.ndindex(self.weight.shape):
            H, W, start = self.levels[index[3]]
            with np.errstate(invalid="ignore", over="ignore"):
                x, y = self.offset[index] * self.coordinate([W, H]) - self.coordinate(0.5)
            yield Point(index, H, W, start, float(y), float(x), (W, H))


def ms_deform_attn(*args: Any, **kwargs: Any) -> np.ndarray:
    """Compute `dcnops.ms_deform_attn` in float64."""
    sums = MSDeformAttn(*args, **kwargs).sums()
    N, Lq, M, D = sums.shape
    return sums.reshape(N, Lq, M * D)


def ms_deform_attn_backward(grad_out, value, spatial_shapes, sampling_locations, attention_weights, points=None):
    """Compute `dcnops.ms_deform_attn_backward` in float64."""
    call = MSDeformAttn(value, spatial_shapes, sampling_locations, attention_weights, points)
    grad_value, grad_locations, grad_weights = call.gradients(grad_out)
    return {
        "value": grad_value,
        "sampling_locations": grad_locations.reshape(sampling_locations.shape),
        "attention_weights": grad_weights.reshape(attention_weights.shape),
    }


class DeformAggregate(WeightedSamples):
    """One call of deformable aggregation."""

    def __init__(
        self, input, offset, mask, groups, kernel_size, stride=1, padding=0, dilation=1, offset_scale=1.0,
        remove_center=False,
    ):  # fmt: skip
        kh, kw = expand_pair(kernel_size)
        taps = [(i, j) for j in range(kw) for i in range(kh)]
        self.taps = [tap for tap in taps if not (remove_center and tap == (kh // 2, kw // 2))]
        self.step, self.pad, self.dilation = expand_pair(stride), expand_pair(padding), expand_pair(dilation)
        self.center = [d * (k - 1) // 2 for d, k in zip(self.dilation, (kh, kw))]
        N, self.H, self.W, C = input.shape
        _, _, self.ow, channels = offset.shape
        queries, K = offset.shape[1] * self.ow, len(self.taps)
        self.packed_channels = channels
        if mask is None:
            by_group = offset.reshape(N, queries, channels)[..., : 3 * groups * K].reshape(N, queries, groups, 3 * K)
            offset, mask = by_group[..., : 2 * K], by_group[..., 2 * K :]
        self.set_arrays(
            input.reshape(N, self.H * self.W, groups, C // groups),
            offset.reshape(N, queries, groups, K, 2),
            mask.reshape(N, queries, groups, K),
        )
        self.scale = self.coordinate(offset_scale)

    def position(self, axis: int, q: int, tap: int, offset: Any) -> float:
        origin = self.coordinate(q * self.step[axis] - self.pad[axis] + self.center[axis])
        base = self.coordinate(tap * self.dilation[axis] - self.center[axis])
        with np.errstate(invalid="ignore", over="ignore"):
            return float(origin + self.scale * (base + offset))

    def points(self) -> Iterator[Point]:
        for index in np.ndindex(self.weight.shape):
            (a, b), (i, j) = divmod(index[1], self.ow), self.taps[index[3]]
            x, y = self.offset[index]
            y, x = self.position(0, a, i, y), self.position(1, b, j, x)
            yield Point(index, self.H, self.W, 0, y, x, (float(self.scale), float(self.scale)))

    def pack(self, offset: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Return gradients in the form of the packed argument."""
        N, queries, groups, K = weight.shape
        packed = np.zeros((N, queries, self.packed_channels))
        by_group = packed[..., : 3 * groups * K].reshape(N, queries, groups, 3 * K)
        by_group[..., : 2 * K] = offset.reshape(N, queries, groups, 2 * K)
        by_group[..., 2 * K :] = weight
        packed[..., : 3 * groups * K] = by_group.reshape(N, queries, 3 * groups * K)
        return packed


def deform_aggregate(input, offset, mask, groups, *args: Any, **kwargs: Any) -> np.ndarray:
    """Compute `dcnops.deform_aggregate` in float64."""
    sums = DeformAggregate(input, offset, mask, groups, *args, **kwargs).sums()
    return sums.reshape(*offset.shape[:3], input.shape[3])


def deform_aggregate_backward(grad_out, input, offset, mask, *args: Any, **kwargs: Any) -> dict[str, np.ndarray]:
    """Compute `dcnops.deform_aggregate_backward` in float64, for all given arguments."""
    call = DeformAggregate(input, offset, mask, *args, **kwargs)
    grad_value, grad_offset, grad_weight = call.gradients(grad_out)
    gradients = {"input": grad_value.reshape(input.shape)}
    if mask is None:
        return {**gradients, "offset": call.pack(grad_offset, grad_weight).reshape(offset.shape)}
    return {**gradients, "offset": grad_offset.reshape(offset.shape), "mask": grad_weight.reshape(mask.shape)}
