"""Random changes of training images: flips, enlargements with crops, colours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import masks_to_boxes
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as transforms
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from ..config import Config
from .coco import Sample

GREY = 0.5  # around an image that has been shrunk
MIN_SIDE = 1.0  # pixels of an object that is left in a crop


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a sample.

    Parameters
    ----------
    flip : float
        Probability of a horizontal flip.
    scale_jitter : tuple of float
        Smallest and largest factor of a random enlargement (see `rescale`), or nothing.
    color_jitter : float
        Strength of random changes of brightness, contrast, saturation and hue.
    min_size, max_size : int
        Sides that the network resizes an image to, pixels.
    """

    flip: float = 0.0
    scale_jitter: tuple[float, ...] = ()
    color_jitter: float = 0.0
    min_size: int = 800
    max_size: int = 1333

    @staticmethod
    def of(config: Config) -> Augmentation:
        """Return the configured augmentation."""
        training, network = config.training, config.network
        min_size = max(training.min_sizes, default=network.min_size)
        return Augmentation(training.flip, training.scale_jitter, training.color_jitter, min_size, network.max_size)

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        """Change an image [3, H, W] and its target at random."""
        flipped = random.random() < self.flip
        if self.scale_jitter:
            low, high = self.scale_jitter
            factor = random.uniform(low, high)
            sample = rescale(sample, factor, *random.random(2), min_size=self.min_size, max_size=self.max_size)
        if flipped:
            sample = mirror(sample)
        if self.color_jitter:
            image, target = sample
            sample = self._change_colors(image, int(random.integers(2**63))), target
        return sample

    def _change_colors(self, image: Tensor, seed: int) -> Tensor:
        strength = self.color_jitter
        # The transform draws from torch's global generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            changed: Tensor = v2.ColorJitter(strength, strength, strength, strength / 4)(image)
        return changed


def mirror(sample: Sample) -> Sample:
    """Flip a sample horizontally."""
    image, target = sample
    height, width = image.shape[-2:]
    boxes = transforms.horizontal_flip_bounding_boxes(target["boxes"], BoundingBoxFormat.XYXY, (height, width))
    target = {**target, "boxes": boxes}
    if "masks" in target:
        target["masks"] = transforms.horizontal_flip_mask(target["masks"])
    return transforms.horizontal_flip_image(image), target


def rescale(sample: Sample, factor: float, x: float, y: float, *, min_size: int, max_size: int) -> Sample:
    """Make the objects in a sample appear larger by `factor` after the network has resized the image.

    Above 1, a part of the image is cropped. Objects of which less than a pixel is left are dropped, and boxes of
    cropped objects with masks are fitted to their masks. Below 1, the image is surrounded with grey. It is shrunk only
    as far as the network, with its `min_size` and `max_size`, would do so later. `x` and `y` in 0..1 choose the
    position, 0 for the left or the upper border. The aspect ratio stays the same.
    """
    return (_crop if factor > 1 else _surround)(sample, factor, x, y, min_size, max_size)


def _crop(sample: Sample, factor: float, x: float, y: float, *_: int) -> Sample:
    image, target = sample
    old = image.shape[-2:]
    height, width = (max(1, round(side / factor)) for side in old)
    window = round(y * (old[0] - height)), round(x * (old[1] - width)), height, width
    boxes = _tv_boxes(target, image)
    cropped = transforms.crop(boxes, *window)  # clamps the boxes
    changed: dict[str, Any] = {**target, "boxes": cropped.as_subclass(Tensor)}
    _, keep = transforms.sanitize_bounding_boxes(cropped, min_size=MIN_SIDE)
    if "masks" in target:
        masks = changed["masks"] = transforms.crop_mask(target["masks"], *window)
        keep &= masks.flatten(1).bool().any(1)
        cut = keep & (cropped[:, 2:] - cropped[:, :2] != boxes[:, 2:] - boxes[:, :2]).as_subclass(Tensor).any(1)
        changed["boxes"][cut] = masks_to_boxes(masks[cut]) + torch.tensor([0.0, 0, 1, 1])
    kept = {name: value[keep] if isinstance(value, Tensor) else value for name, value in changed.items()}
    return transforms.crop_image(image, *window), kept


def _surround(sample: Sample, factor: float, x: float, y: float, min_size: int, max_size: int) -> Sample:
    image, target = sample
    old = image.shape[-2:]
    # Of the surroundings, relative to the image: at most what the network resizes it to.
    scale = min(1 / factor, min_size / min(old), max_size / max(old))
    outer = [max(1, round(side * scale)) for side in old]
    inner = [min(max(1, round(side * scale * factor)), limit) for side, limit in zip(old, outer)]
    top, left = (round(place * (large - small)) for place, large, small in zip((y, x), outer, inner))
    padding = [left, top, outer[1] - inner[1] - left, outer[0] - inner[0] - top]
    boxes = transforms.pad(transforms.resize(_tv_boxes(target, image), inner), padding)
    target = {**target, "boxes": boxes.as_subclass(Tensor)}
    if "masks" in target:
        # The kernel for masks is half a pixel off.
        masks = transforms.resize_image(target["masks"], inner, interpolation=InterpolationMode.NEAREST_EXACT)
        target["masks"] = transforms.pad_mask(masks, padding)
    return transforms.pad_image(transforms.resize_image(image, inner), padding, fill=GREY), target


def _tv_boxes(target: dict[str, Any], image: Tensor) -> BoundingBoxes:
    height, width = image.shape[-2:]
    return BoundingBoxes(target["boxes"], format=BoundingBoxFormat.XYXY, canvas_size=(height, width))
