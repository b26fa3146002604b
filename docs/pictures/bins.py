"""Draw bins.png: the bins of a region, three of them moved by offsets."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot
from matplotlib.patches import Rectangle

BLUE, ORANGE, GREY = "#0072b2", "#e69f00", "#888888"
X1, Y1, WIDTH, HEIGHT, BINS = 2.5, 1.5, 9.0, 6.0, 3
GAMMA = 0.1
MOVED = {(0, 2): (0.8, -0.6), (1, 1): (-1.2, 0.9), (2, 0): (-0.7, 1.1)}  # (dx, dy)


def main() -> None:
    figure, axes = pyplot.subplots(figsize=(6.4, 4.9), dpi=120)
    for y in range(11):
        for x in range(1, 14):
            axes.plot(x, y, ".", color="#cccccc", markersize=3)
    wide, high = WIDTH / BINS, HEIGHT / BINS
    for p in range(BINS):
        for q in range(BINS):
            x, y = X1 + q * wide, Y1 + p * high
            axes.add_patch(Rectangle((x, y), wide, high, fill=False, edgecolor=GREY, linewidth=1))
            if (p, q) not in MOVED:
                axes.text(
                    x + wide / 2, y + high / 2, f"bin ({p}, {q})", ha="center", va="center", fontsize=8, color=GREY
                )
                continue
            dx, dy = MOVED[p, q]
            shift = GAMMA * WIDTH * dx, GAMMA * HEIGHT * dy
            axes.add_patch(
                Rectangle((x + shift[0], y + shift[1]), wide, high, facecolor=ORANGE, alpha=0.25, edgecolor=ORANGE)
            )
            centre = np.array([x + wide / 2, y + high / 2])
            axes.annotate("", centre + shift, centre, arrowprops={"arrowstyle": "->", "color": ORANGE, "linewidth": 2})
            for i in (0.25, 0.75):
                for j in (0.25, 0.75):
                    axes.plot(x + shift[0] + j * wide, y + shift[1] + i * high, ".", color=ORANGE, markersize=6)
    axes.add_patch(Rectangle((X1, Y1), WIDTH, HEIGHT, fill=False, edgecolor=BLUE, linewidth=2))
    axes.text(X1, Y1 - 0.3, "region: Rw x Rh pixels of the map", color=BLUE, fontsize=9)
    axes.text(
        7.0,
        9.4,
        "a bin moves by\ngamma*Rw*offset[r, 0, p, q] to the right and\ngamma*Rh*offset[r, 1, p, q] down",
        color="#a06a00",
        fontsize=8,
        ha="center",
        va="center",
    )
    axes.set_xlim(0.5, 13.5)
    axes.set_ylim(10.6, -0.5)
    axes.set_aspect("equal")
    axes.axis("off")
    figure.savefig(Path(__file__).with_suffix(".png"), bbox_inches="tight")


if __name__ == "__main__":
    main()
