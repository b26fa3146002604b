"""Deformable RoI pooling in float64 as a sparse matrix, bins by pixels: what every contender is held against.

It shares no code and no method with a contender. Positions are computed in the contender's precision, because the edge
of the image is where they say it is; everything else is float64.
"""

from __future__ import annotations

import numpy as np

from benchmarks.contenders import Arrays

SPATIAL_SCALE = 1 / 16
SAMPLING_RATIO = 2
GAMMA = 0.1

_CHANNELS_AT_ONCE = 128


def evaluate(arrays: Arrays, coordinates: str = "float32", device: str = "cpu") -> Arrays:
    """Output and gradients of the pooling of one feature map.

    Parameters
    ----------
    arrays : mapping
        input [1, C, H, W], rois [R, 5], grad_out [R, C, P, Q] and, for the modulated operation, offset [R, 2, P, Q]
        and mask [R, P, Q].
    coordinates : str
        Dtype of the sampling positions.
    device : str
        Where torch multiplies the sparse matrices.
    """
    import torch

    _, C, H, W = arrays["input"].shape
    R, _, P, Q = arrays["grad_out"].shape
    modulated = "mask" in arrays
    mask = arrays["mask"].astype(np.float64).reshape(-1, 1) if modulated else np.ones((R * P * Q, 1))
    (rows, heights), (columns, widths) = positions(arrays, coordinates)
    row, weight_y, slope_y = _neighbours(rows, H)
    column, weight_x, slope_x = _neighbours(columns, W)
    pixel = row[:, :, None] * W + column[:, None, :]
    entries = torch.from_numpy(np.stack([np.indices(pixel.shape)[0].ravel(), pixel.ravel()])).to(device)

    def matrix(of_rows: np.ndarray, of_columns: np.ndarray) -> torch.Tensor:
        values = torch.from_numpy(of_rows[:, :, None] * of_columns[:, None, :] / SAMPLING_RATIO**2).ravel()
        return torch.sparse_coo_tensor(entries, values.to(device), (R * P * Q, H * W), check_invariants=True).coalesce()

    pool = matrix(weight_y, weight_x)
    scatter = matrix(mask * weight_y, weight_x).T
    move_x, move_y = matrix(mask * weight_y, slope_x), matrix(mask * slope_y, weight_x)

    results = {"output": np.empty((R, C, P, Q)), "input": np.empty((1, C, H, W))}
    by_mask, by_x, by_y = np.zeros((3, R * P * Q))
    for begin in range(0, C, _CHANNELS_AT_ONCE):
        part = slice(begin, begin + _CHANNELS_AT_ONCE)
        image = torch.from_numpy(arrays["input"][0, part]).to(device).double().flatten(1).T.contiguous()
        grad = torch.from_numpy(arrays["grad_out"][:, part]).to(device).double().movedim(1, -1).flatten(0, 2)
        pooled = pool @ image
        results["output"][:, part] = np.moveaxis((mask * pooled.cpu().numpy()).reshape(R, P, Q, -1), -1, 1)
        results["input"][0, part] = (scatter @ grad).T.reshape(-1, H, W).cpu().numpy()
        if modulated:
            by_mask += (pooled * grad).sum(1).cpu().numpy()
            by_x += ((move_x @ image) * grad).sum(1).cpu().numpy()
            by_y += ((move_y @ image) * grad).sum(1).cpu().numpy()
    if modulated:
        results["mask"] = by_mask.reshape(R, P, Q)
        by_shift = np.stack([by_x.reshape(R, P, Q) * widths, by_y.reshape(R, P, Q) * heights], axis=1)
        results["offset"] = np.float32(GAMMA) * by_shift
    return results


def positions(arrays: Arrays, coordinates: str = "float32") -> list[tuple[np.ndarray, np.ndarray]]:
    """Along y, then x: the positions of the samples [R, P, Q, samples], and the lengths of the regions [R, 1, 1]."""
    rois = arrays["rois"].astype(coordinates)
    R, _, P, Q = arrays["grad_out"].shape
    offset = arrays["offset"].astype(coordinates) if "offset" in arrays else np.zeros((R, 2, P, Q), coordinates)
    samples = np.arange(SAMPLING_RATIO, dtype=coordinates) + 0.5
    axes = []
    for low, bins, bin, channel in ((2, P, np.arange(P)[:, None], 1), (1, Q, np.arange(Q), 0)):
        start = SPATIAL_SCALE * rois[:, low, None, None] - 0.5
        region = (SPATIAL_SCALE * rois[:, low + 2, None, None] - 0.5) - start
        length = region / bins
        first = (start + bin.astype(coordinates) * length) + (GAMMA * region) * offset[:, channel]
        axes.append((first[..., None] + samples * length[..., None] / SAMPLING_RATIO, region.astype(np.float64)))
    return axes


def _neighbours(position: np.ndarray, extent: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels beside the samples along one axis, [bins, 2 * samples]: index, weight and its derivative by position."""
    position = position.astype(np.float64).reshape(-1, SAMPLING_RATIO, 1)
    inside = (position >= -1) & (position <= extent)
    clamped = position.clip(0, extent - 1)
    low = np.floor(clamped)
    fraction = clamped - low
    free = inside & (position >= 0) & (position < extent - 1)
    pixel = np.concatenate([low, (low + 1).clip(max=extent - 1)], axis=2).astype(np.int64)
    weight = np.concatenate([1 - fraction, fraction], axis=2) * inside
    slope = np.concatenate([-1.0 * free, 1.0 * free], axis=2)
    bins = len(position)
    return pixel.reshape(bins, -1), weight.reshape(bins, -1), slope.reshape(bins, -1)
