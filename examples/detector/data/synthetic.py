"""Synthetic COCO data set: categories that differ only in shape, under strong geometric variation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter
from pycocotools import mask as rle_tools
from tqdm import tqdm

from ..errors import UserError, cannot_write

Array = npt.NDArray[np.float64]


class Parts(NamedTuple):
    """Parts of a category: arms from its centre, or a ring, and balls on the tips of the first arms."""

    arms: int
    balls: int


CATEGORIES = {
    "club": Parts(arms=2, balls=1),
    "dumbbell": Parts(arms=2, balls=2),
    "tripod": Parts(arms=3, balls=0),
    "cross": Parts(arms=4, balls=0),
    "ring": Parts(arms=0, balls=0),
}

TUBE, BALL, RING = 0.25, 0.5, 0.7  # radii, in units of an arm's length

MIN_SIDE = 32  # pixels; the smallest objects in it have a few pixels
LARGEST, SMALLEST = 0.255, 0.085  # length of an arm / shorter side of the image
MIN_INSIDE, MIN_VISIBLE = 0.9, 0.75  # fractions of an object's area: in the image, and not occluded
MIN_PIXELS = 16  # area of an object before occlusion
MAX_SIDE = 4096
SUPERSAMPLING = 2


def _palette(colours: str) -> Array:
    return np.array([list(bytes.fromhex(colour)) for colour in colours.split()]) / 255


COLOURS = _palette("ff635c ffaa3d f7d548 58c96e 30bed6 547aff a076fa f466a0")
BACKGROUNDS = _palette("1a223a 2d3a4a 3a2c46 1e4246 544a42 c4ccd2 ded2be beccb8")
LIGHT = np.array([-0.48, -0.62, 0.62])  # direction of the lamp: left, up, towards the viewer


def write_synthetic(
    folder: Path,
    *,
    train: int,
    val: int,
    size: int | tuple[int, int] = 160,
    objects: tuple[int, int] = (1, 4),
    deformation: float = 1.0,
    seed: int = 0,
) -> None:
    """Write a COCO data set: ``annotations/instances_{train,val}.json`` and ``images/*.jpg``.

    The objects consist of glossy tubes and balls. Categories share colours, textures and parts; they differ in the
    number of parts and how these are joined. Loose parts lie in the background. Each object is rotated, scaled, sheared
    and stretched at random, its arms are bent, and up to a quarter of it is occluded. Annotations describe the visible
    pixels: masks as compressed run-length codes, and tight boxes.

    Equal arguments give equal files, and a longer set starts with the shorter one.

    Parameters
    ----------
    folder : Path
        Created if needed; existing files of the same names are replaced.
    train, val : int
        Numbers of images.
    size : int or (int, int)
        Width and height of the images in pixels, at least 32; an int for square images. Objects scale with it.
    objects : (int, int)
        Least and largest number of objects per image. An object is skipped if too little of it or of another would be
        visible, but every image has at least one.
    deformation : float
        Strength of the geometric variation, 0 to 2. 0: upright objects of equal size and shape. 1: all angles, a
        threefold range of sizes, and arms bent by up to 50 degrees.
    seed : int
        Seed of all random numbers.
    """
    width, height = (size, size) if isinstance(size, int) else size
    if not MIN_SIDE <= min(width, height) <= max(width, height) <= MAX_SIDE:
        sides = f"{MIN_SIDE} to {MAX_SIDE} pixels"
        raise UserError(f"the size of synthetic images must be {sides} at each side, got {width}x{height}")
    if min(train, val) < 0:
        raise UserError(f"the numbers of synthetic images must not be negative, got {train} and {val}")
    if not 1 <= objects[0] <= objects[1]:
        raise UserError(f"the numbers of objects must be a range from at least 1, got {objects[0]} to {objects[1]}")
    if not 0 <= deformation <= 2:
        raise UserError(f"the deformation must be between 0 and 2, got {deformation}")
    if seed < 0:
        raise UserError(f"the seed must not be negative, got {seed}")
    try:
        for name in ("annotations", "images"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for number, (split, count) in enumerate([("train", train), ("val", val)]):
            data: dict[str, Any] = {
                "images": [],
                "annotations": [],
                "categories": [{"id": 1 + index, "name": name} for index, name in enumerate(CATEGORIES)],
            }
            for index in tqdm(range(count), desc=split, unit="image", leave=False, disable=None):
                scene = _Scene(np.random.default_rng([seed, number, index]), width, height, deformation)
                scene.fill(objects)
                name = f"{split}_{index:06}.jpg"
                scene.picture().save(folder / "images" / name, quality=95, subsampling=0)
                data["images"].append({"id": 1 + index, "file_name": name, "width": width, "height": height})
                for annotation in scene.annotations():
                    annotation |= {"id": 1 + len(data["annotations"]), "image_id": 1 + index, "iscrowd": 0}
                    data["annotations"].append(annotation)
            (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(data))
    except OSError as error:
        raise cannot_write(error.filename or folder, error) from None


class Stroke(NamedTuple):
    """Tube around a line, or ball around a point."""

    points: Array  # [k, 2]
    along: Array  # [k], position along the line, for the texture
    radius: float


class Sprite(NamedTuple):
    """Drawn object without background."""

    colour: Array  # [h, w, 3], multiplied by `cover`
    cover: Array  # [h, w], 0..1


class _Scene:
    """Image with a background and objects on top of each other."""

    def __init__(self, rng: np.random.Generator, width: int, height: int, deformation: float) -> None:
        self._rng = rng
        self._width, self._height, self._side = width, height, min(width, height)
        self._deformation = deformation
        self._owner = np.full((height, width), -1)  # index of the visible object
        self._labels: list[int] = []
        self._areas: list[int] = []  # of the objects without occlusion
        self._canvas = self._background()
        for _ in range(rng.integers(2, 6)):
            self._clutter()

    def fill(self, objects: tuple[int, int]) -> None:
        left = int(self._rng.integers(objects[0], objects[1] + 1))
        while left > 0 or not self._labels:
            left -= 1
            label = int(self._rng.integers(len(CATEGORIES)))
            sprite = self._object(list(CATEGORIES.values())[label])
            for _ in range(30):
                if self._place(sprite, label):
                    break

    def picture(self) -> Image.Image:
        pixels = self._canvas + self._rng.normal(0, 0.012, self._canvas.shape)
        return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))

    def annotations(self) -> list[dict[str, Any]]:
        found = []
        for index, label in enumerate(self._labels):
            code = rle_tools.encode(np.asfortranarray(self._owner == index, np.uint8))
            found.append(
                {
                    "category_id": 1 + label,
                    "bbox": rle_tools.toBbox(code).tolist(),
                    "area": int(rle_tools.area(code)),
                    "segmentation": {"size": code["size"], "counts": code["counts"].decode()},
                }
            )
        return found

    def _background(self) -> Array:
        """Draw a gradient between two tones with soft stains."""
        rng = self._rng
        first, second = BACKGROUNDS[rng.integers(len(BACKGROUNDS))] * rng.uniform(0.8, 1.15, (2, 1))
        angle = rng.uniform(0, 2 * math.pi)
        y, x = np.mgrid[-1 : 1 : self._height * 1j, -1 : 1 : self._width * 1j]
        share = 0.5 + 0.35 * (x * math.cos(angle) + y * math.sin(angle))
        canvas: Array = first + (second - first) * share[..., None]
        for cells, strength in ((4, 0.05), (16, 0.025), (48, 0.015)):
            noise = Image.fromarray(rng.normal(0, strength, (cells, cells)).astype(np.float32))
            canvas += np.asarray(noise.resize((self._width, self._height), Image.Resampling.BICUBIC))[..., None]
        return canvas

    def _clutter(self) -> None:
        """Draw a loose part, small and pale."""
        rng = self._rng
        scale = rng.uniform(0.04, 0.085) * self._side
        arm = _arm(rng.uniform(0, 2 * math.pi), 1.6, rng.normal(0, 1), 0.27)
        ball = Stroke(np.zeros((1, 2)), np.zeros(1), 0.45)
        sprite = _draw([ball if rng.random() < 0.4 else arm], np.eye(2) * scale, *self._paint())
        y, x = (int(rng.integers(-4, n)) for n in (self._height, self._width))
        target, patch = _overlap(self._canvas.shape, sprite.cover.shape, y, x)
        cover = 0.45 * sprite.cover[patch][..., None]
        self._canvas[target] += 0.45 * sprite.colour[patch] - cover * self._canvas[target]

    def _paint(self) -> tuple[Array, Array, int]:
        """Choose two colours and a texture: plain, bands, or a gradient between the colours."""
        rng = self._rng
        hue = rng.integers(len(COLOURS))
        first, second = COLOURS[[hue, (hue + rng.choice([-1, 1])) % len(COLOURS)]] * rng.uniform(0.85, 1.05, (2, 1))
        return first, second, int(rng.integers(3))

    def _object(self, parts: Parts) -> Sprite:
        rng, strength = self._rng, self._deformation
        spread = strength * rng.uniform(-1, 1)
        scale = self._side * math.sqrt(LARGEST * SMALLEST) * (LARGEST / SMALLEST) ** (spread / 2)
        scale = min(scale, 0.45 * self._side)
        angle = min(strength, 1) * rng.uniform(-math.pi, math.pi)
        shear, aspect = strength * rng.uniform(-0.35, 0.35), math.exp(strength * rng.uniform(-0.2, 0.2))
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        matrix = scale * turn @ np.array([[aspect, shear], [0, 1 / aspect]])

        if not parts.arms:
            return _draw([_ring(strength * rng.normal(0, 0.12, 2))], matrix, *self._paint())
        strokes = []
        for index in range(parts.arms):
            to = math.pi * (2 * index / parts.arms - 0.5) + strength * rng.uniform(-0.2, 0.2)
            length = 1 + strength * rng.uniform(-0.15, 0.15)
            arm = _arm(to, length, strength * rng.uniform(-0.9, 0.9), TUBE)
            strokes.append(arm)
            if index < parts.balls:
                radius = BALL * (1 + strength * rng.uniform(-0.15, 0.15))
                strokes.append(Stroke(arm.points[-1:], arm.along[-1:], radius))
        return _draw(strokes, matrix, *self._paint())

    def _place(self, sprite: Sprite, label: int) -> bool:
        """Put an object at a random position; return False if too little of it or of another would be visible."""
        rng = self._rng
        height, width = sprite.cover.shape
        # The centre keeps a distance from the border, so that even the longest object fits.
        y, x = (int(rng.uniform(0.1, 0.9) * n - k / 2) for n, k in ((self._height, height), (self._width, width)))
        target, patch = _overlap(self._canvas.shape, sprite.cover.shape, y, x)
        solid = sprite.cover >= 0.5
        inside = solid[patch]
        if inside.sum() < max(MIN_INSIDE * solid.sum(), MIN_PIXELS):
            return False
        owner = self._owner.copy()
        owner[target][inside] = len(self._labels)
        visible = np.bincount(owner[owner >= 0], minlength=len(self._labels) + 1)
        areas = [*self._areas, int(solid.sum())]
        if (visible < MIN_VISIBLE * np.array(areas)).any():
            return False
        self._owner, self._areas = owner, areas
        self._labels.append(label)
        self._shade(sprite.cover, y, x)
        self._canvas[target] += sprite.colour[patch] - sprite.cover[patch][..., None] * self._canvas[target]
        return True

    def _shade(self, cover: Array, y: int, x: int) -> None:
        """Draw the soft shadow of an object."""
        blur = 0.022 * self._side
        margin = math.ceil(3 * blur)
        dark = Image.fromarray((np.pad(cover, margin) * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(blur))
        shift = round(0.025 * self._side)
        target, patch = _overlap(self._canvas.shape, dark.size[::-1], y - margin + shift, x - margin + shift)
        self._canvas[target] *= 1 - 0.5 / 255 * np.asarray(dark, np.float64)[patch][..., None]


def _arm(angle: float, length: float, bend: float, radius: float) -> Stroke:
    """Build a tube that leaves (0, 0) in the direction `angle` and turns by `bend` up to its tip; radians."""
    along = np.linspace(0, length, 13)
    angles = angle + bend * along / length
    steps = np.stack([np.cos(angles), np.sin(angles)], 1) * along[1]
    points = np.cumsum((steps[:-1] + steps[1:]) / 2, 0)
    return Stroke(np.concatenate([np.zeros((1, 2)), points]), along, radius)


def _ring(dents: Array) -> Stroke:
    """Build a closed tube around (0, 0); `dents` are the strengths of its oval and its triangular deformation."""
    around = np.linspace(0, 2 * math.pi, 33)
    distance = RING * (1 + dents[0] * np.cos(2 * around) + dents[1] * np.cos(3 * around))
    points = distance[:, None] * np.stack([np.cos(around), np.sin(around)], 1)
    return Stroke(points, np.abs(around - math.pi) * RING, TUBE)


def _draw(strokes: list[Stroke], matrix: Array, first: Array, second: Array, texture: int) -> Sprite:
    """Render solid strokes under a lamp; `matrix` [2, 2] maps their coordinates to pixels."""
    fine = matrix * SUPERSAMPLING
    reach = np.linalg.norm(fine, axis=1)  # half the box around a circle of radius 1
    low = np.min([(s.points @ fine.T - s.radius * reach).min(0) for s in strokes], axis=0)
    high = np.max([(s.points @ fine.T + s.radius * reach).max(0) for s in strokes], axis=0)
    origin = np.floor(low) - SUPERSAMPLING
    cells = np.ceil((high - origin) / SUPERSAMPLING).astype(int) + 1
    shape = (cells[1] * SUPERSAMPLING, cells[0] * SUPERSAMPLING)
    # Pixel centres in the coordinates of the strokes.
    inverse = np.linalg.inv(fine)
    column, row = np.arange(shape[1]) + 0.5 + origin[0], np.arange(shape[0])[:, None] + 0.5 + origin[1]
    x, y = ((inverse[i, 0] * column + inverse[i, 1] * row).astype(np.float32) for i in (0, 1))

    rise = np.zeros(shape, np.float32)  # squared height of the solid above the canvas
    along = np.zeros(shape, np.float32)
    for stroke in strokes:
        points, position = stroke.points.astype(np.float32), stroke.along.astype(np.float32)
        for i in range(max(len(points) - 1, 1)):
            j = min(i + 1, len(points) - 1)
            ends = points[[i, j]] @ fine.T - origin
            x0, y0 = np.floor(ends.min(0) - stroke.radius * reach).astype(int)
            x1, y1 = np.ceil(ends.max(0) + stroke.radius * reach).astype(int) + 1
            window = np.s_[y0:y1, x0:x1]
            dx, dy = x[window] - points[i, 0], y[window] - points[i, 1]
            step = points[j] - points[i]
            share = ((dx * step[0] + dy * step[1]) / max(step @ step, np.float32(1e-12))).clip(0, 1)
            new = np.float32(stroke.radius**2) - (dx - share * step[0]) ** 2 - (dy - share * step[1]) ** 2
            higher = new > rise[window]
            np.copyto(rise[window], new, where=higher)
            np.copyto(along[window], position[i] + share * (position[j] - position[i]), where=higher)

    inside = rise > 0
    slope_y, slope_x = np.gradient(np.sqrt(rise) * math.sqrt(abs(np.linalg.det(fine))))
    norm = np.sqrt(slope_x**2 + slope_y**2 + 1)
    lit = ((LIGHT[2] - slope_x * LIGHT[0] - slope_y * LIGHT[1]) / norm).clip(0, None)
    half = LIGHT + np.array([0, 0, np.linalg.norm(LIGHT)])
    half /= np.linalg.norm(half)
    shine = ((half[2] - slope_x * half[0] - slope_y * half[1]) / norm).clip(0, None) ** 30
    mix = [np.zeros(shape), (0.5 + 3 * np.sin(9 * along)).clip(0, 1), (0.5 + 0.5 * along).clip(0, 1)][texture]
    colour = first + mix[..., None] * (second - first)
    colour = colour * (0.42 + 0.66 * lit)[..., None] + 0.45 * shine[..., None]
    colour = np.minimum(colour, 1) * inside[..., None]
    tiles = (cells[1], SUPERSAMPLING, cells[0], SUPERSAMPLING)
    return Sprite(colour.reshape(*tiles, 3).mean((1, 3)), inside.reshape(tiles).mean((1, 3)))


def _overlap(
    canvas: tuple[int, ...], patch: tuple[int, ...], y: int, x: int
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Return the overlap of a canvas and a patch with its corner at (y, x), in the coordinates of each."""
    on_canvas, on_patch = [], []
    for start, large, small in ((y, canvas[0], patch[0]), (x, canvas[1], patch[1])):
        first, last = max(start, 0), max(min(start + small, large), max(start, 0))
        on_canvas.append(slice(first, last))
        on_patch.append(slice(first - start, last - start))
    return (on_canvas[0], on_canvas[1]), (on_patch[0], on_patch[1])
