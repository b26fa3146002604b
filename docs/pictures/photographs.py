"""Draw channels.png and sampling_points.jpg: sampling points of deformable convolutions on a photograph of a cup.

Needs scikit-image and matplotlib.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from skimage import data

import dcnops

HERE = Path(__file__).parent
CUP = (100.0, 283.0)
"""Row and column of the centre of the cup."""


def draw_channels(photo: np.ndarray) -> Figure:
    """Draw the nine taps of one output pixel, their offset channels, and a legend."""
    top, left = 168, 196
    y, x = (4 * (taps - 1) + middle for taps, middle in zip(np.divmod(np.arange(9), 3), (12, 15), strict=True))
    dy = np.array([-1.4, -2.8, -1.7, 1.3, 1.2, -1.2, 2.8, 2.1, 2.6])
    dx = np.array([-4.2, 1.3, 4.3, -4.6, 1.9, 4.4, -3.3, -1.4, 3.7])
    ring = {"color": "white", "markeredgecolor": "black", "markersize": 17}
    point = {"color": "yellow", "markeredgecolor": "black", "markersize": 10}
    label = {"ha": "center", "va": "center", "fontsize": 11}
    box = {"color": "yellow", "bbox": {"boxstyle": "round,pad=0.25", "facecolor": "black", "edgecolor": "none"}}
    frame = {"color": "cyan", "linewidth": 2.5}

    figure, (axes, legend) = pyplot.subplots(1, 2, figsize=(13, 5.8), layout="constrained", width_ratios=(1.2, 1))
    axes.imshow(photo[top : top + 25, left : left + 31])
    axes.set(xticks=[], yticks=[], title="one output pixel of a 3x3 deformable convolution (dilation 4)")
    for k in range(9):
        for colour, width in (("black", 4), ("white", 2)):
            axes.plot([x[k], x[k] + dx[k]], [y[k], y[k] + dy[k]], color=colour, linewidth=width)
        axes.plot(x[k], y[k], "o", **ring)
        axes.text(x[k], y[k], f"{k}", **label)
        axes.plot(x[k] + dx[k], y[k] + dy[k], "o", **point)
        axes.text(x[k] + dx[k], y[k] + dy[k] + np.copysign(1.8, dy[k]), f"{2 * k}, {2 * k + 1}", **label, **box)
    edge_y, edge_x = (np.floor(axis[0]) + np.array([-0.5, 1.5]) for axis in (y + dy, x + dx))
    axes.plot(edge_x[[0, 1, 1, 0, 0]], edge_y[[0, 0, 1, 1, 0]], **frame)

    legend.set(xlim=(0, 1), ylim=(0, 1))
    legend.set_axis_off()
    legend.plot(0.07, 0.9, "o", **ring)
    legend.text(0.07, 0.9, "k", **label)
    legend.plot(0.07, 0.8, "o", **point)
    legend.text(0.07, 0.7, "2k, 2k+1", **label, **box)
    legend.plot([0.05, 0.09, 0.09, 0.05, 0.05], [0.58, 0.58, 0.62, 0.62, 0.58], **frame)
    meanings = (
        "kernel tap k = 3*i + j, in row i and column j",
        "its sampling point, moved by dy rows and dx columns",
        "the offset channels that hold dy and dx",
        "the four pixels that a sample is interpolated from",
    )
    for line, meaning in enumerate(meanings):
        legend.text(0.16, 0.9 - 0.1 * line, meaning, va="center", fontsize=11)
    channels = (
        "offset [N, 2*D*9, oh, ow]\n"
        "  channel 2*(9*d + k)      dy of tap k,\n"
        "  channel 2*(9*d + k) + 1  dx of tap k\n"
        "mask   [N, D*9, oh, ow]\n"
        "  channel 9*d + k          weight of tap k\n"
        "in deformable group d of D"
    )
    legend.text(0.03, 0.44, channels, va="top", fontsize=11, family="monospace", linespacing=1.5)
    return figure


def draw_sampling_points(photo: np.ndarray) -> Figure:
    """Draw the taps of a regular, a deformable and a modulated deformable convolution for pixels around the cup."""
    dilation = 15
    shape = photo.shape[:2]
    gray = np.ascontiguousarray(photo.mean(2)[None, None] / 255, np.float32)
    regular = np.zeros((1, 18, *shape), np.float32)
    turned = turned_grid_offsets(shape, dilation)
    ones = np.ones((1, 9, *shape), np.float32)
    # Filter k copies the sample of tap k. A mask near 1 means that the sample looks like the output pixel.
    copy = np.eye(9, dtype=np.float32).reshape(9, 1, 3, 3)
    samples = dcnops.deform_conv2d(gray, turned, copy, padding=dilation, dilation=dilation)
    similarity = np.exp(-(((samples - gray) / 0.15) ** 2))

    rim = [(108 * np.cos(angle), 82 * np.sin(angle)) for angle in np.arange(0.35, 6, 1.047)]
    saucer = [(-180, 55), (-110, 140), (0, 165), (120, 130), (192, 45)]
    pixels = [(round(CUP[0] + y), round(CUP[1] + x)) for x, y in (*rim, *saucer)]
    figure, panels = pyplot.subplots(1, 3, figsize=(12.6, 3.8), layout="constrained")
    titles = (
        "regular convolution\nthe same nine taps at every pixel",
        "deformable convolution\noffsets move each tap",
        "modulated deformable convolution\na mask also weights each tap",
    )
    settings = ((regular, ones), (turned, ones), (turned, similarity))
    for axes, title, (offset, mask) in zip(panels, titles, settings, strict=True):
        axes.imshow(photo)
        points = draw_points(axes, offset, mask, dilation, pixels)
        axes.set(title=title, xlim=(60, 510), ylim=(340, 0), xticks=[], yticks=[])
    figure.colorbar(points, ax=panels, label="weight of the sample (mask)", shrink=0.8, pad=0.01)
    return figure


def turned_grid_offsets(shape: tuple[int, int], dilation: int) -> np.ndarray:
    """Return offsets [1, 18, H, W] that turn the grid so that its rows run around the cup.

    The grid is larger at a greater distance from the cup.
    """
    row, column = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    dy, dx = row - CUP[0], column - CUP[1]
    distance = np.hypot(dy, dx) + 1e-6
    out_y, out_x = dy / distance, dx / distance
    scale = dilation * (0.5 + distance / 200)
    i, j = (taps[:, None, None] - 1 for taps in np.divmod(np.arange(9), 3))
    offset = np.empty((1, 18, *shape), np.float32)
    offset[0, 0::2] = scale * (j * out_y + i * out_x) - dilation * i
    offset[0, 1::2] = scale * (j * out_x - i * out_y) - dilation * j
    return offset


def draw_points(
    axes: Axes, offset: np.ndarray, mask: np.ndarray, dilation: int, pixels: list[tuple[int, int]]
) -> PathCollection:
    """Draw the sampling points of a 3x3 kernel for some output pixels, coloured by their weights."""
    i, j = np.divmod(np.arange(9), 3)
    for row, column in pixels:
        y = (row + dilation * (i - 1) + offset[0, 0::2, row, column]).reshape(3, 3)
        x = (column + dilation * (j - 1) + offset[0, 1::2, row, column]).reshape(3, 3)
        for lines in ((x, y), (x.T, y.T)):
            axes.plot(*lines, color="white", linewidth=1, zorder=2)
        weights = mask[0, :, row, column]
        axes.scatter(x, y, c="black", s=40, zorder=2)
        points = axes.scatter(
            x, y, c=weights, cmap="plasma", vmin=0, vmax=1, s=26, edgecolors="white", linewidths=1, zorder=3
        )
    return points


def main() -> None:
    photo = data.coffee()
    options = {"dpi": 90, "bbox_inches": "tight", "pad_inches": 0.1}
    draw_channels(photo).savefig(HERE / "channels.png", pil_kwargs={"optimize": True}, **options)
    draw_sampling_points(photo).savefig(HERE / "sampling_points.jpg", pil_kwargs={"quality": 85}, **options)


if __name__ == "__main__":
    main()
