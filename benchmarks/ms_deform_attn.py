"""Multi-scale deformable attention with 8 heads of 32 channels: encoder and decoder of Deformable DETR, RT-DETRv2.

Each level has half the height and width of the one before. Reference points are the centers of all pixels if there is
one query for each, as in an encoder, else random. Points lie around them, some pixels away.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.contenders import rounded
from benchmarks.operations import GRID, OURS, Arrays, Case, Contender, Operation
from benchmarks.weighted_samples import LEVELS, Level, contenders, expected_sums, near_whole_pixels
from dcnops._dtypes import DTYPES

if TYPE_CHECKING:
    import torch

HEADS, CHANNELS = 8, 32
_DISTANCE = 2.0
"""Standard deviation of the distance between points and reference points in pixels, for a case of spread 1."""


def levels_and_points(shape: tuple[int, ...]) -> tuple[list[tuple[int, int]], tuple[int, ...]]:
    """Return the size and the number of points of each level."""
    H, W, _, L, P, P2 = shape
    sizes = [(-(-H // 2**level), -(-W // 2**level)) for level in range(L)]
    return sizes, tuple(P2 if level == 1 else P for level in range(L))


def _levels(sizes: list[tuple[int, int]], points: tuple[int, ...]) -> list[Level]:
    """Return the level of each point."""
    starts = np.cumsum([0, *(height * width for height, width in sizes)]).tolist()
    return [
        Level(*size, start) for size, start, count in zip(sizes, starts, points, strict=False) for _ in range(count)
    ]


def _inputs(case: Case) -> Arrays:
    images = [_image(case, np.random.default_rng(image)) for image in range(case.N)]
    arrays = {name: np.stack([image[name] for image in images]) for name in images[0]}
    return {**arrays, LEVELS: np.array(_levels(*levels_and_points(case.shape)))}


def _image(case: Case, random: np.random.Generator) -> Arrays:
    sizes, points = levels_and_points(case.shape)
    S, Lq, K = sum(height * width for height, width in sizes), case.shape[2], sum(points)
    extent = np.array([(level.width, level.height) for level in _levels(sizes, points)], np.float32)
    if Lq == S:
        centers = [(np.indices(size)[::-1].reshape(2, -1).T + 0.5) / size[::-1] for size in sizes]
        reference = np.concatenate(centers).astype(np.float32)
    else:
        reference = random.random((Lq, 2), np.float32)
    distance = _DISTANCE * case.spread * random.standard_normal((Lq, HEADS, K, 2), np.float32)
    locations = reference[:, None, None] + distance / extent
    while (near := near_whole_pixels(_positions(extent, locations))).any():
        locations += np.float32(0.125) / extent * near
    weights = random.random((Lq, HEADS, K), np.float32)
    return {
        "value": rounded(random.standard_normal((S, HEADS, CHANNELS), np.float32), case.dtype),
        "sampling_locations": locations,
        "attention_weights": weights / weights.sum(axis=2, keepdims=True),
        "grad_out": rounded(random.standard_normal((Lq, HEADS * CHANNELS), np.float32), case.dtype),
    }


def _positions(extent: np.ndarray, locations: np.ndarray) -> np.ndarray:
    """Return the positions (x, y) in pixels, in float32."""
    return locations * extent - np.float32(0.5)


def grid_sample_attention(
    value: torch.Tensor,
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
    spatial_shapes: list[tuple[int, int]],
    points: tuple[int, ...],
) -> torch.Tensor:
    """Compute the operation as the fallback of Deformable DETR, mmcv and transformers does."""
    import torch

    N, _, M, D = value.shape
    Lq = sampling_locations.shape[1]
    maps = value.split([height * width for height, width in spatial_shapes], dim=1)
    grids = (2 * sampling_locations - 1).transpose(1, 2).flatten(0, 1).split(points, dim=2)
    samples = [
        torch.nn.functional.grid_sample(
            level.flatten(2).transpose(1, 2).reshape(N * M, D, *size), grid, padding_mode="zeros", align_corners=False
        )
        for level, size, grid in zip(maps, spatial_shapes, grids, strict=True)
    ]
    factors = attention_weights.transpose(1, 2).reshape(N * M, 1, Lq, -1)
    return (torch.cat(samples, dim=3) * factors).sum(dim=3).view(N, M * D, Lq).transpose(1, 2).contiguous()


def _contenders(case: Case) -> list[Contender]:
    def options(case: Case) -> dict[str, Any]:
        sizes, points = levels_and_points(case.shape)
        return {"spatial_shapes": sizes, "points": points}

    data = frozenset({"value", "grad_out"})
    return contenders("ms_deform_attn", data, options, grid_sample_attention, options, case)


def expected(arrays: Arrays, coordinates: str = "float32", device: str = "cpu") -> Arrays:
    """Return the output and gradients in float64."""
    levels = [Level(*level) for level in arrays[LEVELS].tolist()]
    extent = np.array([(level.width, level.height) for level in levels], np.float32)
    names = ("value", "sampling_locations", "attention_weights")
    value, offset, weight = (arrays[name][0] for name in names)
    grad_out = arrays["grad_out"].reshape(*offset.shape[:2], -1)
    sampling = levels, partial(_positions, extent), extent
    output, *gradients = expected_sums(value, offset, weight, grad_out, *sampling, device)
    results = dict(zip(names, gradients, strict=True))
    return {
        "output": output.reshape(arrays["grad_out"].shape),
        **{name: array[None] for name, array in results.items()},
    }


def _work(case: Case) -> tuple[float, float]:
    sizes, points = levels_and_points(case.shape)
    S, Lq = sum(height * width for height, width in sizes), case.shape[2]
    data = DTYPES[case.dtype].itemsize * HEADS * CHANNELS * (S + Lq)
    return 0.0, float(case.N * (data + 3 * 4 * Lq * HEADS * sum(points)))


OPERATION = Operation(
    name="ms_deform_attn",
    sizes="H x W x queries x levels x points x points of level 2",
    shapes=((100, 167, 22223, 4, 4, 4), (100, 167, 300, 4, 4, 4), (80, 80, 300, 3, 3, 6)),
    gpu_variants=[{}, {"dtype": "bfloat16"}, {"deterministic": True}, {"dtype": "float16"}],
    per_image=frozenset({"value", "sampling_locations", "attention_weights", "grad_out", "output"}),
    inputs=_inputs,
    contenders=_contenders,
    expected=expected,
    columns=(OURS, GRID),
    work=_work,
)
