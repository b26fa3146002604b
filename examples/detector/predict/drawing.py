"""Pictures of detections."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from ..errors import printable
from .inference import RLE, decode_rle

Colour = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]

# Okabe and Ito's palette for all kinds of colour vision, the most striking colours first
COLOURS: tuple[Colour, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (204, 121, 167),
    (213, 94, 0),
    (240, 228, 66),
    (0, 114, 178),
)
DARK, LIGHT = (20, 20, 20), (255, 255, 255)
MASK_OPACITY = 0.45
HIDDEN = 0.3  # largest fraction of an object that a label may cover


def draw_detections(
    image: Image.Image | Tensor,
    boxes: Tensor,
    labels: Sequence[int] | Tensor,
    scores: Sequence[float] | Tensor | None,
    masks: Sequence[RLE] | None,
    names: Sequence[str],
    *,
    size: tuple[int, int] | None = None,
    side: int = 800,
) -> Image.Image:
    """Draw boxes, masks and labels, small objects on top of large ones.

    With masks, neighbouring objects differ in colour; with boxes only, each category has a colour. A label that would
    cover another label or too much of an object is shortened to its score, or omitted.

    Parameters
    ----------
    image
        RGB: a picture, or uint8 [3, H, W].
    boxes
        float [n, 4], x1 y1 x2 y2 in pixels.
    labels
        n numbers; 1 is the first of `names`.
    scores
        n numbers in 0..1, shown in per cent; None for ground truth.
    masks
        n run lengths, or None.
    size
        The (width, height) that boxes and masks refer to, if the image has been shrunk.
    side
        Small images are enlarged by the largest integer factor that keeps their sides within this number of pixels,
        so that lines and labels do not cover them.

    Returns
    -------
    A new picture.
    """
    if isinstance(image, Tensor):
        image = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    factor = max(1, side // max(image.size))
    width, height = factor * image.width, factor * image.height
    picture = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    across, down = size or image.size
    corners = boxes.cpu().double().numpy().reshape(-1, 4) * np.array([width / across, height / down] * 2)
    corners = corners.clip(0, [width, height, width, height])
    classes = [int(label) - 1 for label in labels]
    order = np.argsort(-_areas(corners), kind="stable").tolist()
    colours = _by_neighbours(corners, order) if masks is not None else [COLOURS[k % len(COLOURS)] for k in classes]

    line = max(2, round(max(width, height) / 400))
    if masks is not None:
        for index in order:
            _draw_mask(picture, masks[index], colours[index], line)
    draw = ImageDraw.Draw(picture)
    for index in order:
        draw.rectangle(_inside(corners[index], width, height), outline=colours[index], width=1 if masks else line)
    shares = ["" if scores is None else f"{100 * float(scores[index]):.0f}%" for index in range(len(classes))]
    texts = [(f"{printable(names[label])} {share}".strip(), share) for label, share in zip(classes, shares)]
    _draw_tags(draw, (width, height), corners, texts, colours)
    return picture


def contact_sheet(images: Sequence[Image.Image], columns: int, titles: Sequence[str] = ()) -> Image.Image:
    """Arrange pictures in rows of `columns`, with titles above the columns."""
    gap = 12
    cell = (max(image.width for image in images), max(image.height for image in images))
    text_size = max(14, round(cell[0] / 28))
    font = ImageFont.load_default(text_size)
    head = 2 * gap + text_size if titles else gap
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (cell[0] + gap) + gap, rows * (cell[1] + gap) + head), LIGHT)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((gap + column * (cell[0] + gap) + cell[0] / 2, head / 2), title, DARK, font, anchor="mm")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        left, top = gap + column * (cell[0] + gap), head + row * (cell[1] + gap)
        sheet.paste(image, (left + (cell[0] - image.width) // 2, top + (cell[1] - image.height) // 2))
    return sheet


def _areas(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    areas: NDArray[np.float64] = np.prod(corners[:, 2:] - corners[:, :2], axis=1)
    return areas


def _by_neighbours(corners: NDArray[np.float64], order: list[int]) -> list[Colour]:
    """Choose for each box the colour that is rarest among its neighbours, then among all boxes."""
    margin = 0.25 * (corners[:, 2:] - corners[:, :2])
    grown = np.hstack((corners[:, :2] - margin, corners[:, 2:] + margin))
    chosen = np.full(len(corners), -1)
    for index in order:
        nearby = (grown[:, :2] <= grown[index, 2:]).all(1) & (grown[:, 2:] >= grown[index, :2]).all(1)
        counts = [((chosen[nearby] == k).sum(), (chosen == k).sum(), k) for k in range(len(COLOURS))]
        chosen[index] = min(counts)[2]
    return [COLOURS[k] for k in chosen]


def _draw_mask(picture: Image.Image, rle: RLE, colour: Colour, line: int) -> None:
    """Tint a mask and outline it; works on its part of the picture only."""
    mask = decode_rle(rle)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return
    # One pixel of background around the mask closes the outline.
    top, bottom = max(rows[0] - 1, 0), min(rows[-1] + 2, mask.shape[0])
    left, right = max(columns[0] - 1, 0), min(columns[-1] + 2, mask.shape[1])
    scale_x, scale_y = picture.width / mask.shape[1], picture.height / mask.shape[0]
    window = (round(left * scale_x), round(top * scale_y), round(right * scale_x), round(bottom * scale_y))
    extent = (max(window[2] - window[0], 1), max(window[3] - window[1], 1))
    shape = Image.fromarray(255 * mask[top:bottom, left:right]).resize(extent, Image.Resampling.BICUBIC)
    if scale_x > 1:
        shape = shape.filter(ImageFilter.GaussianBlur(scale_x / 2))  # hides the corners of enlarged pixels
    shape = shape.point(lambda value: min(max(4 * (value - 128) + 128, 0), 255))  # sharp but smooth edge
    inner = shape.filter(ImageFilter.MinFilter(2 * line + 1))
    opacity = ImageChops.subtract(shape, inner.point(lambda value: round(value * (1 - MASK_OPACITY))))
    picture.paste(colour, window[:2], opacity)


def _inside(box: NDArray[np.float64], width: int, height: int) -> Rectangle:
    """Round a box to whole pixels of the picture, at least one."""
    x1, y1 = min(round(box[0]), width - 1), min(round(box[1]), height - 1)
    return x1, y1, max(x1, min(round(box[2]), width) - 1), max(y1, min(round(box[3]), height) - 1)


def _draw_tags(
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    corners: NDArray[np.float64],
    texts: Sequence[tuple[str, str]],
    colours: Sequence[Colour],
) -> None:
    """Write each text or its shorter form next to its box, inside the picture, where it covers nothing."""
    text_size = max(12, round(max(size) / 55))
    font = ImageFont.load_default(text_size)
    high = math.ceil(1.2 * text_size)
    placed = np.empty((0, 4))
    allowed = HIDDEN * _areas(corners)
    for box, forms, colour in zip(corners, texts, colours):
        places = (
            (text, place)
            for text in forms
            for place in _places(box, math.ceil(draw.textlength(text, font)) + 6, high, size)
            if text and not _overlap(place, placed).any() and (_overlap(place, corners) <= allowed).all()
        )
        text, place = next(places, ("", None))
        if place is None:
            continue
        placed = np.vstack((placed, place))
        left, top, right, bottom = place.tolist()
        draw.rounded_rectangle((left, top, right - 1, bottom - 1), high // 5, fill=colour)
        bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 120
        draw.text((left + 3, top + high / 2), text, DARK if bright else LIGHT, font, anchor="lm")


def _places(box: NDArray[np.float64], wide: int, high: int, size: tuple[int, int]) -> Iterator[NDArray[np.float64]]:
    """Yield places for a text, best first: above the box, below it, in its corners."""
    if wide > size[0] or high > size[1]:
        return
    x1, y1, x2, y2 = box
    for y in (y1 - high, y2, y1, y2 - high):
        for x in (x1, x2 - wide):
            left, top = round(min(max(x, 0), size[0] - wide)), round(min(max(y, 0), size[1] - high))
            yield np.array([left, top, left + wide, top + high], np.float64)


def _overlap(one: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the number of pixels that a rectangle shares with each of the others."""
    sides = np.minimum(one[2:], others[:, 2:]) - np.maximum(one[:2], others[:, :2])
    shared: NDArray[np.float64] = np.prod(sides.clip(0), axis=1)
    return shared
