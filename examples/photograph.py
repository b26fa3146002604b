"""What deformable convolution does, shown on photographs: `python examples/photograph.py` writes five pictures.

1. Which channel of offset and mask belongs to which sampling point.
2. Where a 3x3 convolution takes its samples: on a regular grid, on a grid moved by offsets, weighted by a mask.
3. What offsets are good for: a Sobel filter that turns with the cup finds the whole rim.
4. What the mask is good for: smoothing that stops at edges.
5. Offsets as an image warp, and the backward pass: it finds the swirl in a photograph and undoes it.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

import dcnops

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection
    from matplotlib.figure import Figure
    from skimage import data
except ImportError as error:
    sys.exit(f"This example needs scikit-image and matplotlib ({error}): pip install scikit-image matplotlib")

CUP = (100.0, 283.0)
"""Row and column of the middle of the cup in the photograph."""


def grid_offsets(moved_y: np.ndarray, moved_x: np.ndarray, reach: int, dilation: int) -> np.ndarray:
    """Offsets [1, 2*K, H, W] that move the taps of a square kernel to given places.

    Parameters
    ----------
    moved_y, moved_x : array [K, H, W], in pixels
        Where tap k is to sample, relative to the output pixel.
    reach : int
        Taps on each side of the middle one: 1 for 3x3.
    dilation : int
        Distance of the taps before they are moved.
    """
    size = 2 * reach + 1
    i, j = np.divmod(np.arange(size * size), size)
    offset = np.empty((1, 2 * size * size, *moved_y.shape[1:]), np.float32)
    offset[0, 0::2] = moved_y - dilation * (i - reach)[:, None, None]
    offset[0, 1::2] = moved_x - dilation * (j - reach)[:, None, None]
    return offset


def turned_grid(shape: tuple[int, int], dilation: float, growth: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Places [9, H, W] of 3x3 taps whose rows run around the cup and whose columns point away from it.

    The grid grows by the factor `growth` for every 100 pixels of distance from the cup.
    """
    row, column = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    dy, dx = row - CUP[0], column - CUP[1]
    distance = np.hypot(dy, dx) + 1e-6
    out_y, out_x = dy / distance, dx / distance
    scale = dilation * (1 + growth * (distance / 100 - 1))
    i, j = (taps[:, None, None] - 1 for taps in np.divmod(np.arange(9), 3))
    return scale * (j * out_y + i * out_x), scale * (j * out_x - i * out_y)


def similarity(image: np.ndarray, offset: np.ndarray, reach: int, dilation: int, tolerance: float) -> np.ndarray:
    """Mask [1, K, H, W]: 1 where the photograph [1, 1, H, W] looks like the output pixel, near 0 where it does not.

    The samples come from a deformable convolution themselves: filter k picks tap k.
    """
    size = 2 * reach + 1
    pick = np.eye(size * size, dtype=np.float32).reshape(size * size, 1, size, size)
    samples = dcnops.deform_conv2d(image, offset, pick, padding=reach * dilation, dilation=dilation)
    return np.exp(-(((samples - image) / tolerance) ** 2))


def swirl_offsets(shape: tuple[int, int], strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Offsets [1, 2, H, W] of a 1x1 kernel that turn the picture's middle by `strength` radians; their derivative."""
    row, column = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    dy, dx = row - (shape[0] - 1) / 2, column - (shape[1] - 1) / 2
    profile = np.clip(1 - (dy**2 + dx**2) / (0.5 * min(shape)) ** 2, 0, None) ** 2
    sine, cosine = np.sin(strength * profile), np.cos(strength * profile)
    offset = np.stack([cosine * dy + sine * dx - dy, cosine * dx - sine * dy - dx])
    slope = profile * np.stack([-sine * dy + cosine * dx, -sine * dx - cosine * dy])
    return offset[None].astype(np.float32), slope[None].astype(np.float32)


def draw_points(
    axes: Axes, offset: np.ndarray, mask: np.ndarray, dilation: int, places: list[tuple[int, int]]
) -> PathCollection:
    """Sampling points of a 3x3 kernel for some output pixels, coloured by their weights."""
    i, j = np.divmod(np.arange(9), 3)
    for row, column in places:
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


def picture_channels(photo: np.ndarray) -> Figure:
    top, left = 168, 196
    y, x = (4 * (taps - 1) + middle for taps, middle in zip(np.divmod(np.arange(9), 3), (12, 15), strict=True))
    dy = np.array([-1.4, -2.8, -1.7, 1.3, 1.2, -1.2, 2.8, 2.1, 2.6])
    dx = np.array([-4.2, 1.3, 4.3, -4.6, 1.9, 4.4, -3.3, -1.4, 3.7])
    ring = {"color": "white", "markeredgecolor": "black", "markersize": 17}
    point = {"color": "yellow", "markeredgecolor": "black", "markersize": 10}
    label = {"ha": "center", "va": "center", "fontsize": 11}
    box = {"color": "yellow", "bbox": {"boxstyle": "round,pad=0.25", "facecolor": "black", "edgecolor": "none"}}
    frame = {"color": "cyan", "linewidth": 2.5}

    figure, (axes, legend) = plt.subplots(1, 2, figsize=(13, 5.8), layout="constrained", width_ratios=(1.2, 1))
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
        "tap k = 3*i + j of the kernel, in row i and column j",
        "where its sample is taken, dy pixels down and dx right",
        "the channels of offset that hold dy and dx",
        "the four pixels that a sample is interpolated from",
    )
    for line, meaning in enumerate(meanings):
        legend.text(0.16, 0.9 - 0.1 * line, meaning, va="center", fontsize=11)
    layout = (
        "offset [N, 2*D*9, oh, ow]\n"
        "  channel 2*(9*d + k)      dy of tap k,\n"
        "  channel 2*(9*d + k) + 1  dx of tap k\n"
        "mask   [N, D*9, oh, ow]\n"
        "  channel 9*d + k          weight of tap k\n"
        "in deformable group d of D"
    )
    legend.text(0.03, 0.44, layout, va="top", fontsize=11, family="monospace", linespacing=1.5)
    return figure


def picture_sampling_points(photo: np.ndarray, gray: np.ndarray) -> Figure:
    dilation = 15
    shape = gray.shape[2:]
    straight = np.zeros((1, 18, *shape), np.float32)
    turned = grid_offsets(*turned_grid(shape, dilation, growth=0.5), reach=1, dilation=dilation)
    ones = np.ones((1, 9, *shape), np.float32)
    alike = similarity(gray, turned, 1, dilation, tolerance=0.15)
    rim = [(108 * np.cos(angle), 82 * np.sin(angle)) for angle in np.arange(0.35, 6, 1.047)]
    saucer = [(-180, 55), (-110, 140), (0, 165), (120, 130), (192, 45)]
    places = [(round(CUP[0] + y), round(CUP[1] + x)) for x, y in (*rim, *saucer)]
    figure, panels = plt.subplots(1, 3, figsize=(12.6, 3.8), layout="constrained")
    titles = (
        "ordinary convolution\nthe same nine points everywhere",
        "deformable convolution\noffsets move each of the nine points",
        "modulated deformable convolution\na mask weights each of them as well",
    )
    settings = ((straight, ones), (turned, ones), (turned, alike))
    for axes, title, (offset, mask) in zip(panels, titles, settings, strict=True):
        axes.imshow(photo)
        points = draw_points(axes, offset, mask, dilation, places)
        axes.set(title=title, xlim=(60, 510), ylim=(340, 0), xticks=[], yticks=[])
    figure.colorbar(points, ax=panels, label="weight of the point (mask)", shrink=0.8, pad=0.01)
    return figure


def picture_edges(photo: np.ndarray, gray: np.ndarray) -> Figure:
    dilation = 2
    sobel = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], np.float32)[None, None] / 8
    straight = np.zeros((1, 18, *gray.shape[2:]), np.float32)
    turned = grid_offsets(*turned_grid(gray.shape[2:], dilation), reach=1, dilation=dilation)
    figure, panels = plt.subplots(1, 3, figsize=(12.6, 3.5), layout="constrained")
    panels[0].imshow(photo)
    panels[0].plot(CUP[1], CUP[0], "+", color="white", markersize=14, markeredgewidth=2)
    panels[0].set_title("the photograph\n+ the point that the filter turns around")
    titles = (
        "Sobel filter, ordinary convolution\nedges from left to right: the rim has gaps",
        "the same filter, deformable\nedges from the cup outwards: the whole rim",
    )
    for axes, title, offset in zip(panels[1:], titles, (straight, turned), strict=True):
        edges = dcnops.deform_conv2d(gray, offset, sobel, padding=dilation, dilation=dilation)[0, 0]
        drawn = axes.imshow(edges, cmap="RdBu_r", vmin=-0.25, vmax=0.25)
        axes.set_title(title)
    bar = figure.colorbar(drawn, ax=panels, shrink=0.8, pad=0.01, ticks=[-0.25, 0, 0.25])
    bar.ax.set_yticklabels(["darker", "same", "brighter"])
    for axes in panels:
        # Without the outermost pixels, where the zeros around the photograph are an edge.
        axes.set(xlim=(5, gray.shape[3] - 6), ylim=(gray.shape[2] - 6, 5), xticks=[], yticks=[])
    return figure


def picture_smoothing(photo: np.ndarray) -> tuple[Figure, str]:
    reach, dilation, noise = 4, 1, 0.12
    clean = to_channels(photo)[:, :, 150:370, 130:430]
    noisy = clean + np.float32(noise) * np.random.default_rng(0).standard_normal(clean.shape, np.float32)
    distance = np.hypot(*np.mgrid[-reach : reach + 1, -reach : reach + 1])
    bell = np.exp(-((distance / 2.5) ** 2) / 2).astype(np.float32)[None, None]
    each_colour = np.repeat(bell, 3, axis=0)

    offset = np.zeros((1, 2 * bell.size, *noisy.shape[2:]), np.float32)
    options = {"padding": reach * dilation, "dilation": dilation}
    small = np.exp(-(distance**2) / 2).astype(np.float32)[None, None]
    guide = dcnops.deform_conv2d(noisy.mean(1, keepdims=True), offset, small / small.sum(), **options)
    mask = similarity(guide, offset, reach, dilation, tolerance=0.09)
    ones = np.ones_like(guide)
    plain = dcnops.deform_conv2d(noisy, offset, each_colour, **options)
    plain /= dcnops.deform_conv2d(ones, offset, bell, **options)
    masked = dcnops.deform_conv2d(noisy, offset, each_colour, mask=mask, **options)
    masked /= dcnops.deform_conv2d(ones, offset, bell, mask=mask, **options)

    errors = [np.sqrt(np.mean((image - clean) ** 2)) for image in (noisy, plain, masked)]
    titles = ("noisy photograph", "9x9 Gaussian, ordinary convolution", "the same with a mask: edges stay")
    figure, panels = plt.subplots(1, 3, figsize=(12.6, 3.7), layout="constrained")
    for axes, title, image, error in zip(panels, titles, (noisy, plain, masked), errors, strict=True):
        axes.imshow(to_picture(image))
        axes.set(title=f"{title}\nerror {error:.3f}", xticks=[], yticks=[])
    return figure, f"error {errors[0]:.3f}, smoothed {errors[1]:.3f}, smoothed with the mask {errors[2]:.3f}"


def picture_swirl(photo: np.ndarray) -> tuple[Figure, str]:
    true_strength = 2.5
    image = to_channels(photo)[:, :, :300, :450]
    shape = image.shape[2:]
    swirled = warp(image, swirl_offsets(shape, true_strength)[0])
    strength, history = find_swirl(shrink(swirled, 10), shrink(image, 10))
    offset, _ = swirl_offsets(shape, -strength)
    restored = warp(swirled, offset)

    figure, panels = plt.subplots(1, 4, figsize=(14.6, 3.1), layout="constrained", width_ratios=(1, 1, 1, 0.8))
    titles = ("a swirled photograph", "where the offsets take the samples", "the same, fetched from there (1x1 kernel)")
    for axes, title, picture in zip(panels, titles, (swirled, swirled, restored), strict=False):
        axes.imshow(to_picture(picture))
        axes.set(title=title, xlim=(0, 449), ylim=(299, 0), xticks=[], yticks=[])
    row, column = np.mgrid[: shape[0], : shape[1]] + offset[0]
    for lines in ((column[::15].T, row[::15].T), (column[:, ::15], row[:, ::15])):
        panels[1].plot(*lines, color="white", linewidth=0.7, alpha=0.8)
    strengths, losses = np.transpose(history)
    panels[3].axhline(true_strength, color="gray", linestyle=":")
    panels[3].plot(strengths, label="swirl found so far, radians")
    panels[3].plot(losses / losses[0], label="squared error, first = 1")
    panels[3].set(title="found by gradient descent on offsets", xlabel="step", ylim=(0, 3.2))
    panels[3].legend(loc="center right", frameon=False)
    error = np.abs(restored - image).mean() * 255
    return figure, f"swirled by {true_strength} rad, found {strength:.3f}; restored to {error:.1f} of 255 on average"


def find_swirl(swirled: np.ndarray, image: np.ndarray) -> tuple[float, list[tuple[float, float]]]:
    """Strength of the swirl between two pictures, and (strength, squared error) at each step on the way to it."""
    copy = np.eye(3, dtype=np.float32)[:, :, None, None]
    strength, speed, history = 0.0, 0.0, []
    for _ in range(60):
        offset, slope = swirl_offsets(image.shape[2:], -strength)
        difference = warp(swirled, offset) - image
        gradients = dcnops.deform_conv2d_backward(2 * difference / image.size, swirled, offset, copy, needs=["offset"])
        assert gradients.offset is not None
        history.append((strength, float(np.mean(difference**2))))
        # The offsets belong to -strength: a step down the error is a step up in strength.
        speed = 0.7 * speed + 30 * float(np.vdot(gradients.offset, slope))
        strength += speed
    return strength, history


def warp(image: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Each pixel of a colour picture fetched from where its offset points: a deformable convolution of size 1x1."""
    return dcnops.deform_conv2d(image, offset, np.eye(3, dtype=np.float32)[:, :, None, None])


def shrink(image: np.ndarray, factor: int) -> np.ndarray:
    N, C, H, W = image.shape
    return image.reshape(N, C, H // factor, factor, W // factor, factor).mean((3, 5))


def to_channels(photo: np.ndarray) -> np.ndarray:
    """Photograph [H, W, 3] of bytes as an array [1, 3, H, W] between 0 and 1."""
    return np.ascontiguousarray(photo.transpose(2, 0, 1)[None], np.float32) / 255


def to_picture(image: np.ndarray) -> np.ndarray:
    return image[0].transpose(1, 2, 0).clip(0, 1)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG without margins."""
    figure.savefig(path, dpi=90, bbox_inches="tight", pad_inches=0.1, pil_kwargs={"optimize": True})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    default = Path(__file__).parents[1] / "out" / "photograph"
    parser.add_argument("--out", type=Path, default=default, help="folder for the pictures; default: %(default)s")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    coffee, cat = data.coffee(), data.chelsea()
    gray = to_channels(coffee).mean(1, keepdims=True)
    begin = time.perf_counter()
    pictures = {
        "1_channels": lambda: (picture_channels(coffee), "the channels of offset and mask"),
        "2_sampling_points": lambda: (picture_sampling_points(coffee, gray), "where nine samples are taken"),
        "3_edges": lambda: (picture_edges(coffee, gray), "a Sobel filter, ordinary and deformable"),
        "4_smoothing": lambda: picture_smoothing(coffee),
        "5_swirl": lambda: picture_swirl(cat),
    }
    for name, make in pictures.items():
        figure, text = make()
        save(figure, out / f"{name}.png")
        print(f"{time.perf_counter() - begin:5.1f} s  {out / name}.png: {text}")


if __name__ == "__main__":
    main()
