"""Deformable aggregation with a 3x3 kernel and padding 1, as in DCNv3: two stages of InternImage-T."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.contenders import rounded
from benchmarks.operations import GRID, OURS, Arrays, Case, Contender, Operation
from benchmarks.weighted_samples import Level, contenders, expected_sums, near_whole_pixels

if TYPE_CHECKING:
    import torch

_TAPS = np.array([(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)], np.float32)
"""Distance (x, y) of each tap from the output pixel."""


def _inputs(case: Case) -> Arrays:
    images = [_image(case, np.random.default_rng(image)) for image in range(case.N)]
    return {name: np.stack([image[name] for image in images]) for name in images[0]}


def _image(case: Case, random: np.random.Generator) -> Arrays:
    G, D, H, W = case.shape
    offset = case.spread * random.standard_normal((H * W, G, len(_TAPS), 2), np.float32)
    while (near := near_whole_pixels(_positions((H, W), offset))).any():
        offset += np.float32(0.125) * near
    mask = random.random((H, W, G, len(_TAPS)), np.float32)
    return {
        "input": rounded(random.standard_normal((H, W, G * D), np.float32), case.dtype),
        "offset": offset.reshape(H, W, -1),
        "mask": (mask / mask.sum(axis=3, keepdims=True)).reshape(H, W, -1),
        "grad_out": rounded(random.standard_normal((H, W, G * D), np.float32), case.dtype),
    }


def _positions(size: tuple[int, int], offset: np.ndarray) -> np.ndarray:
    """Return the positions (x, y) in float32 of offsets [H*W, ..., taps, 2]."""
    pixels = np.indices(size, np.float32)[::-1].reshape(2, -1).T
    return pixels.reshape(-1, *[1] * (offset.ndim - 2), 2) + (_TAPS + offset)


def grid_sample_aggregation(input: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, groups: int) -> torch.Tensor:
    """Compute the operation as InternImage does without its extension."""
    import torch

    N, H, W, C = input.shape
    rows, columns = (torch.arange(size, dtype=input.dtype, device=input.device) for size in (H, W))
    pixels = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).reshape(H * W, 1, 1, 2)
    taps = torch.from_numpy(_TAPS).to(input.device)
    extent = torch.tensor([W, H], dtype=input.dtype, device=input.device)
    positions = pixels + taps + offset.reshape(N, H * W, groups, -1, 2)
    grid = ((2 * positions + 1) / extent - 1).transpose(1, 2).flatten(0, 1)
    maps = input.reshape(N, H * W, groups, -1).permute(0, 2, 3, 1).reshape(N * groups, -1, H, W)
    samples = torch.nn.functional.grid_sample(maps, grid, padding_mode="zeros", align_corners=False)
    factors = mask.reshape(N, H * W, groups, -1).transpose(1, 2).reshape(N * groups, 1, H * W, -1)
    return (samples * factors).sum(dim=3).reshape(N, C, H, W).permute(0, 2, 3, 1).contiguous()


def _contenders(case: Case) -> list[Contender]:
    def options(case: Case) -> dict[str, Any]:
        return {"groups": case.shape[0], "kernel_size": 3, "padding": 1}

    def grid_options(case: Case) -> dict[str, Any]:
        return {"groups": case.shape[0]}

    data = frozenset({"input", "grad_out"})
    return contenders("deform_aggregate", data, options, grid_sample_aggregation, grid_options, case)


def expected(arrays: Arrays, coordinates: str = "float32", device: str = "cpu") -> Arrays:
    """Return the output and gradients in float64."""
    _, H, W, C = arrays["input"].shape
    K = len(_TAPS)
    G = arrays["mask"].shape[3] // K
    output, grad_input, grad_offset, grad_mask = expected_sums(
        arrays["input"].reshape(H * W, G, C // G),
        arrays["offset"].reshape(H * W, G, K, 2),
        arrays["mask"].reshape(H * W, G, K),
        arrays["grad_out"].reshape(H * W, G, C // G),
        [Level(H, W, 0)] * K,
        partial(_positions, (H, W)),
        np.ones((K, 2)),
        device,
    )
    results = {"output": output, "input": grad_input, "offset": grad_offset, "mask": grad_mask}
    return {name: array.reshape(1, H, W, -1) for name, array in results.items()}


OPERATION = Operation(
    name="deform_aggregate",
    sizes="groups x channels per group x H x W",
    shapes=((4, 16, 200, 336), (16, 16, 50, 84)),
    gpu_variants=[{}, {"dtype": "bfloat16"}, {"deterministic": True}, {"dtype": "float16"}],
    per_image=frozenset({"input", "offset", "mask", "grad_out", "output"}),
    inputs=_inputs,
    contenders=_contenders,
    expected=expected,
    columns=(OURS, GRID),
)
