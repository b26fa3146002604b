"""RoIAlign and modulated deformable RoI pooling of one feature map of stride 16, two samples per bin and axis."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from benchmarks.contenders import POOLING, pool_contenders, rounded
from benchmarks.operations import MODULATED, OURS, PEER, Arrays, Case, Operation

if TYPE_CHECKING:
    import torch

_SCALE, _SAMPLES, _GAMMA = POOLING["spatial_scale"], int(POOLING["sampling_ratio"]), POOLING["gamma"]
_LEAST_DISTANCE = 1e-3
"""Minimum distance of a sample from a whole pixel, in pixels."""
_CHANNELS_AT_ONCE = 128


def _inputs(case: Case) -> Arrays:
    C, H, W, R, P = case.shape
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rounded(random.standard_normal(shape, np.float32), case.dtype)

    arrays = {
        "input": normal(1, C, H, W),
        "rois": _proposals(random, R, H / _SCALE, W / _SCALE),
        "offset": normal(R, 2, P, P),
        "mask": rounded(random.random((R, P, P), np.float32), case.dtype),
        # By far the largest array; uniform numbers are much faster to draw.
        "grad_out": rounded(random.random((R, C, P, P), np.float32) - np.float32(0.5), case.dtype),
    }
    # The offset gradient jumps at whole pixels, where the last bit of a position would decide.
    while (near := _near_whole_pixels(arrays)).any():
        arrays["offset"] = rounded(arrays["offset"] + np.float32(0.125) * near, case.dtype)
    return arrays


def _proposals(random: np.random.Generator, R: int, height: float, width: float) -> np.ndarray:
    """Return regions of various sizes and aspect ratios, centred anywhere in the image; some cross its border."""
    size = (height * width) ** 0.5 * np.exp(random.uniform(np.log(1 / 40), np.log(1 / 2), R))
    stretch = np.exp(random.uniform(-0.6, 0.6, R))
    half = np.stack([size * stretch, size / stretch], axis=1) / 2
    centre = random.random((R, 2)) * [width, height]
    return np.concatenate([np.zeros((R, 1)), centre - half, centre + half], axis=1).astype(np.float32)


def _near_whole_pixels(arrays: Arrays) -> np.ndarray:
    """Mark the offsets that move a sample of their bin close to a whole pixel."""
    (rows, _), (columns, _) = positions(arrays)
    return np.stack([(np.abs(at - at.round()) < _LEAST_DISTANCE).any(axis=-1) for at in (columns, rows)], axis=1)


def positions(arrays: Arrays, coordinates: str = "float32") -> list[tuple[np.ndarray, np.ndarray]]:
    """Return, along y and x, the positions of the samples [R, P, Q, samples] and the lengths of the regions [R, 1, 1].

    Positions are computed in the precision of the contender, because it decides on which side of the border they are.
    """
    rois = arrays["rois"].astype(coordinates)
    R, _, P, Q = arrays["grad_out"].shape
    offset = arrays["offset"].astype(coordinates) if "offset" in arrays else np.zeros((R, 2, P, Q), coordinates)
    samples = np.arange(_SAMPLES, dtype=coordinates) + 0.5
    axes = []
    for low, bins, bin, channel in ((2, P, np.arange(P)[:, None], 1), (1, Q, np.arange(Q), 0)):
        start = _SCALE * rois[:, low, None, None] - 0.5
        region = (_SCALE * rois[:, low + 2, None, None] - 0.5) - start
        length = region / bins
        first = (start + bin.astype(coordinates) * length) + (_GAMMA * region) * offset[:, channel]
        axes.append((first[..., None] + samples * length[..., None] / _SAMPLES, region.astype(np.float64)))
    return axes


def expected(arrays: Arrays, coordinates: str = "float32", device: str = "cpu") -> Arrays:
    """Return the output and gradients in float64: each bin is a weighted sum of pixels, differentiated by autograd.

    `adapters.torch.differentiable` gathers every pixel of every channel, which takes ten times as long here.
    """
    import torch
    from torch.nn.functional import embedding_bag

    _, C, H, W = arrays["input"].shape
    R, _, P, Q = arrays["grad_out"].shape

    def exact(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device).double()

    mask = exact(arrays.get("mask", np.ones((R, P, Q)))).requires_grad_()
    # Zero: the positions contain the offsets already.
    moved = torch.zeros(R, 2, P, Q, dtype=torch.float64, device=device, requires_grad=True)
    neighbours = []
    for channel, extent, (at, region) in zip((1, 0), (H, W), positions(arrays, coordinates), strict=True):
        motion = float(np.float32(_GAMMA)) * exact(region) * moved[:, channel]
        neighbours.append(_neighbours(exact(at) + motion[..., None], extent))
    (rows, weight_y), (columns, weight_x) = neighbours
    pixels = (rows[:, :, None] * W + columns[:, None]).flatten(1)
    weights = (weight_y[:, :, None] * weight_x[:, None]).flatten(1) / _SAMPLES**2

    results = {"output": np.empty((R, C, P, Q)), "input": np.empty((1, C, H, W))}
    grad_weights, grad_mask = torch.zeros_like(weights), torch.zeros_like(mask)
    for begin in range(0, C, _CHANNELS_AT_ONCE):
        part = slice(begin, begin + _CHANNELS_AT_ONCE)
        image = exact(arrays["input"][0, part]).flatten(1).T.contiguous().requires_grad_()
        leaf = weights.detach().requires_grad_()
        output = embedding_bag(pixels, image, mode="sum", per_sample_weights=leaf) * mask.reshape(-1, 1)
        grad_out = exact(arrays["grad_out"][:, part]).movedim(1, -1).flatten(0, 2)
        grad_image, by_weights, by_mask = torch.autograd.grad(output, (image, leaf, mask), grad_out)
        grad_weights += by_weights
        grad_mask += by_mask
        results["output"][:, part] = output.detach().reshape(R, P, Q, -1).movedim(-1, 1).cpu().numpy()
        results["input"][0, part] = grad_image.T.reshape(-1, H, W).cpu().numpy()
    if "mask" in arrays:
        results["mask"] = grad_mask.cpu().numpy()
        results["offset"] = torch.autograd.grad(weights, moved, grad_weights)[0].cpu().numpy()
    return results


def _neighbours(at: torch.Tensor, extent: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pixels around the samples along one axis, and their bilinear weights, as [bins, 2 * samples]."""
    import torch

    at = at.reshape(-1, _SAMPLES, 1)
    inside = (at >= -1) & (at <= extent)
    at = at.clamp(0, extent - 1)
    low = at.detach().floor()
    pixel = torch.cat([low, (low + 1).clamp(max=extent - 1)], dim=2).long()
    weight = torch.cat([1 + low - at, at - low], dim=2) * inside
    return pixel.flatten(1), weight.flatten(1)


OPERATION = Operation(
    name="deform_roi_pool",
    sizes="C x H x W x R x P=Q",
    shapes=((256, 50, 84, 512, 7), (256, 50, 84, 512, 14), (1024, 50, 84, 512, 7), (1024, 50, 84, 512, 14)),
    gpu_variants=[
        {"dtype": "float16"},
        {},
        {"deterministic": True},
        {"dtype": "bfloat16"},
        {"dtype": "float16", "layout": "NHWC"},
    ],
    per_image=frozenset(),  # the regions of one image take the place of a batch
    inputs=_inputs,
    contenders=pool_contenders,
    expected=expected,
    columns=(OURS, PEER, MODULATED),
)
