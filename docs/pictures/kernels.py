"""Draw fused.svg and lists.svg: the data flow of the forward and the backward kernels."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

HERE = Path(__file__).parent
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#e69f00", "#009e73", "#777777"


def box(axes: Axes, x: float, y: float, wide: float, high: float, text: str, colour: str) -> None:
    style = "round,pad=0.02,rounding_size=0.12"
    axes.add_patch(
        FancyBboxPatch((x, y), wide, high, boxstyle=style, facecolor="white", edgecolor=colour, linewidth=1.6)
    )
    axes.text(x + wide / 2, y + high / 2, text, ha="center", va="center", fontsize=8.5)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": GREY, "linewidth": 1.3})
    if text:
        axes.text((start[0] + end[0]) / 2, max(start[1], end[1]) + 0.12, text, ha="center", fontsize=7.5, color=GREY)


def canvas(wide: float, high: float) -> Axes:
    figure = pyplot.figure(figsize=(wide, high))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, wide)
    axes.set_ylim(0, high)
    axes.axis("off")
    return axes


def fused() -> None:
    axes = canvas(9.4, 3.6)
    box(axes, 0.2, 2.1, 1.7, 1.1, "image\n[N, H, W, C]\nglobal memory", BLUE)
    box(axes, 0.2, 0.4, 1.7, 1.1, "weights\n[O, K, C/G]\nglobal memory", BLUE)
    box(axes, 2.9, 2.1, 2.2, 1.1, "A: 128 pixels x 128 bytes\nof channels of one tap\nshared memory, twice", ORANGE)
    box(axes, 2.9, 0.4, 2.2, 1.1, "B: 64 to 256 outputs\nx 128 bytes\nshared memory, twice", ORANGE)
    box(axes, 6.0, 1.2, 1.6, 1.2, "sums\n128 x outputs\nregisters", GREEN)
    box(axes, 8.2, 1.2, 1.0, 1.2, "output\n[N, O, oh, ow]", BLUE)
    arrow(axes, (1.95, 2.65), (2.85, 2.65), "4 neighbours,\ninterpolate")
    arrow(axes, (1.95, 0.95), (2.85, 0.95), "asynchronous\ncopy")
    arrow(axes, (5.15, 2.65), (5.95, 2.1))
    arrow(axes, (5.15, 0.95), (5.95, 1.5))
    axes.text(5.68, 1.72, "mma or\nwgmma", fontsize=7.5, color=GREY, ha="center", va="center")
    arrow(axes, (7.65, 1.8), (8.15, 1.8), "+ bias")
    axes.text(4.7, 0.08, "steps: taps, and 128 bytes of channels of each; the next is loaded while one is multiplied",
              ha="center", fontsize=8, color=GREY)  # fmt: skip
    axes.figure.savefig(HERE / "fused.svg", metadata={"Date": None})


def lists() -> None:
    axes = canvas(9.4, 3.4)
    box(axes, 0.2, 1.2, 1.9, 1.2, "columns' gradient\n[pixels, K, C/G]\n= grad_out x weights", BLUE)
    for k, (row, label) in enumerate(((2.55, "point 0"), (1.75, "point 1"), (0.95, "point 2"), (0.15, "point 3"))):
        box(axes, 3.1, row, 1.0, 0.55, label, ORANGE)
        targets = ((2.45, 1.6), (2.45, 0.75), (1.6, 0.75), (0.75, 1.6))[k]
        for target in targets:
            arrow(axes, (4.15, row + 0.28), (5.75, target))
    for row, entries in ((2.2, "0, 1"), (1.35, "0, 2, 3"), (0.5, "1, 2, 3")):
        box(axes, 5.8, row, 1.5, 0.5, f"pixel's list: {entries}", GREEN)
        arrow(axes, (7.35, row + 0.25), (8.1, row + 0.25))
        box(axes, 8.15, row, 1.05, 0.5, "a warp sums", GREEN)
    arrow(axes, (2.15, 1.8), (3.05, 1.8))
    axes.text(4.95, 3.15, "each point belongs to at most four pixels", ha="center", fontsize=8, color=GREY)
    axes.text(6.6, 0.08, "count, prefix sum, fill: no floating-point atomics", ha="center", fontsize=8, color=GREY)
    axes.figure.savefig(HERE / "lists.svg", metadata={"Date": None})


if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "dcnops"
    fused()
    lists()
