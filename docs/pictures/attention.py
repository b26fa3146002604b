"""Draw attention.jpg: the points at which the heads of a layer of deformable attention look, before and after training.

A small network learns the boxes of the coins in one photograph. This takes about a minute. Needs PyTorch, scikit-image
and matplotlib.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from skimage import data, filters, measure, morphology
from torch import Tensor, nn
from torch.nn.functional import grid_sample, l1_loss

from dcnops.adapters.torch import MSDeformAttn

HERE = Path(__file__).parent
CHANNELS, HEADS, POINTS = 32, 4, 3
STEPS, QUERIES = 600, 64
UNIT = 30
"""Pixels per unit of the network's output."""
COLOURS = ("#56b4e9", "#e69f00", "#cc79a7", "#009e73")


def convolution(channels: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, CHANNELS, 3, stride, 1), nn.ReLU()]


class CoinBoxes(nn.Module):
    """Predict the box of the coin at each query point with one layer of deformable attention."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(*convolution(1, 2), *convolution(CHANNELS, 2))
        self.coarse = nn.Sequential(*convolution(CHANNELS, 2))
        self.context = nn.Sequential(*convolution(CHANNELS, 2), *convolution(CHANNELS, 1))
        self.norm = nn.LayerNorm(CHANNELS)
        self.attention = MSDeformAttn(CHANNELS, n_levels=2, n_heads=HEADS, n_points=POINTS)
        self.head = nn.Sequential(nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, 64), nn.ReLU(), nn.Linear(64, 4))

    def forward(self, image: Tensor, reference: Tensor) -> Tensor:
        """Return the distances [Lq, 4] from the points `reference` [Lq, 2] to the left, top, right and bottom sides."""
        fine = self.fine(image)
        coarse = self.coarse(fine)
        maps = (fine, coarse)
        self.shapes = [features.shape[2:] for features in maps]
        value = torch.cat([features.flatten(2) for features in maps], dim=2).transpose(1, 2)
        at_points = grid_sample(self.context(coarse), 2 * reference[None, :, None] - 1, align_corners=False)
        query = self.norm(at_points.squeeze(3).transpose(1, 2))
        seen = self.attention(query, reference[None, :, None], value, self.shapes)
        distances: Tensor = UNIT * self.head(query + seen)[0]
        return distances

    @torch.no_grad()
    def looks(self, image: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the distances, and the locations [Lq, HEADS, K, 2] and weights [Lq, HEADS, K] of the attention."""
        layer, seen = self.attention, {}
        hooks = [
            getattr(layer, name).register_forward_hook(lambda _, __, output, name=name: seen.update({name: output[0]}))
            for name in ("sampling_offsets", "attention_weights")
        ]
        distances = self(image, reference)
        for hook in hooks:
            hook.remove()
        size = torch.tensor(self.shapes).flip(1).repeat_interleave(POINTS, 0)  # (width, height) for each point
        offsets = seen["sampling_offsets"].reshape(-1, HEADS, len(size), 2)
        weights = seen["attention_weights"].reshape(-1, HEADS, len(size)).softmax(-1)
        return distances, reference[:, None, None] + offsets / size, weights


def coin_boxes(photo: np.ndarray) -> Tensor:
    """Return the boxes (left, top, right, bottom) of the coins in pixels."""
    bright = photo - filters.gaussian(photo, 50, preserve_range=True)
    smooth = filters.gaussian(bright, 1)
    coins = morphology.closing(smooth > filters.threshold_otsu(bright), morphology.disk(2))
    coins = morphology.opening(morphology.remove_small_holes(coins, max_size=2000), morphology.disk(5))
    regions = [region for region in measure.regionprops(measure.label(coins)) if region.area > 700]
    return torch.tensor([[*region.bbox[1::-1], *region.bbox[:1:-1]] for region in regions], dtype=torch.float32)


def train(network: CoinBoxes, image: Tensor, boxes: Tensor) -> float:
    """Train on random points of the coins and return the last mean error in pixels."""
    size = torch.tensor(image.shape[:1:-1])
    optimizer = torch.optim.AdamW(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, STEPS)
    error = torch.tensor(0.0)
    for _ in range(STEPS):
        box = boxes[torch.randint(len(boxes), (QUERIES,))]
        point = box[:, :2] + (0.25 + 0.5 * torch.rand(QUERIES, 2)) * (box[:, 2:] - box[:, :2])
        error = l1_loss(network(image, point / size), torch.cat([point - box[:, :2], box[:, 2:] - point], 1))
        optimizer.zero_grad()
        (error / UNIT).backward()
        optimizer.step()
        schedule.step()
    return error.item()


def draw(axes: Axes, network: CoinBoxes, image: Tensor, points: Tensor, has_boxes: bool) -> None:
    """Draw the sampling points of all heads, larger with a larger weight."""
    size = torch.tensor(image.shape[:1:-1])
    distances, locations, weights = network.looks(image, points / size)
    locations = locations * size - 0.5
    for point, distance, places, shares in zip(points, distances, locations, weights, strict=True):
        for place, share, colour in zip(places, shares, COLOURS, strict=True):
            axes.scatter(*place.T, s=250 * share + 8, color=colour, edgecolors="white", linewidths=0.8, zorder=3)
        axes.plot(*point, "+", color="white", markersize=13, markeredgewidth=3, zorder=4)
        axes.plot(*point, "+", color="red", markersize=12, markeredgewidth=1.5, zorder=4)
        if has_boxes:
            corner, extent = point - distance[:2], distance[:2] + distance[2:]
            axes.add_patch(Rectangle(corner.tolist(), *extent.tolist(), fill=False, color="yellow"))


def main() -> None:
    torch.manual_seed(0)
    photo = data.coins()
    image = torch.tensor(photo, dtype=torch.float32)[None, None] / 64 - 2
    boxes = coin_boxes(photo)
    network = CoinBoxes()
    shown = boxes[(boxes[:, 0] > 215) & (boxes[:, 3] < 205)]  # four coins
    shares = torch.tensor([(0.3, 0.6), (0.6, 0.35), (0.45, 0.4), (0.6, 0.65)])
    points = shown[:, :2] + shares * (shown[:, 2:] - shown[:, :2])
    figure, panels = pyplot.subplots(1, 2, figsize=(9.4, 6.2), layout="constrained")
    titles = (
        "before training\neach head looks in one direction",
        "after training on boxes\nthe points and their weights depend on the coin",
    )
    for axes, title in zip(panels, titles, strict=True):
        if axes is panels[1]:
            print(f"mean error {train(network, image, boxes):.2f} pixels")
        axes.imshow(photo, cmap="gray")
        draw(axes, network, image, points, has_boxes=axes is panels[1])
        axes.set(title=title, xlim=(215, 383), ylim=(205, 10), xticks=[], yticks=[])
    heads = [Line2D([], [], linestyle="", marker="o", color=colour) for colour in COLOURS]
    figure.legend(heads, [f"head {m}" for m in range(HEADS)], loc="outside lower center", ncols=HEADS)
    figure.savefig(HERE / "attention.jpg", dpi=90, bbox_inches="tight", pad_inches=0.1, pil_kwargs={"quality": 85})


if __name__ == "__main__":
    main()
