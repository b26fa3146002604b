"""Prediction on image files: pictures of the detections and a JSON file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from ..data import Category, read_image, to_picture, write_json
from ..errors import UserError, cannot_write
from .drawing import draw_detections
from .inference import Detections, coco_results, evaluating, infer

LARGEST = 4096  # pixels; larger images are shrunk before the network and in the pictures
LONGEST_NAME = 240  # bytes; file systems allow 255, including a number and the suffix


@dataclass(frozen=True)
class Prediction:
    """Detections in an image file."""

    path: Path
    size: tuple[int, int]  # width and height of the upright image, which boxes and masks refer to
    detections: Detections


def predict(
    model: nn.Module,
    paths: Sequence[Path],
    device: torch.device,
    *,
    threshold: float = 0.5,
    amp_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Iterator[Prediction]:
    """Detect objects in image files one after the other.

    `threshold` is the least score of a detection; the network itself drops detections below its ``score_threshold``.
    Unreadable files are reported on stderr, and raise an error after all other files.
    """
    failed: list[Path] = []
    with evaluating(model):
        for path in tqdm(paths, desc="predicting", unit="image", leave=False, disable=None if progress else True):
            try:
                image, size = read_image(path, LARGEST)
            except UserError as error:
                if len(paths) == 1:
                    raise
                tqdm.write(f"skipped {error}", file=sys.stderr)
                failed.append(path)
                continue
            detections = infer(model, [image.to(device)], [size], threshold=threshold, amp_dtype=amp_dtype)[0]
            yield Prediction(path, size, detections)
    if failed:
        raise UserError(f"{len(failed)} of {len(paths)} images could not be read, the first is {failed[0]}")


def write_predictions(
    predictions: Iterator[Prediction], out: Path, categories: Sequence[Category], *, inputs: Sequence[Path]
) -> int:
    """Write a picture of each prediction, ``out/NAME.png``, and ``out/predictions.json``; return the number of boxes.

    Further images of the same name get a number: ``NAME-2.png``. The JSON file holds

    - ``images``: ``id``, ``file_name`` (the given path), ``width``, ``height``, ``picture`` (in `out`);
    - ``categories``: ``id``, ``name``;
    - ``detections``: entries of a COCO results file (``image_id``, ``category_id``, ``bbox`` as x, y, width, height,
      ``score``, with masks ``segmentation`` as compressed run lengths), and ``category_name``.

    If `predictions` raises an error, the file holds the predictions up to there. The pictures never overwrite one of
    `inputs`, which are all images of the predictions.
    """
    names = {category.id: category.name for category in categories}
    taken = {_normalised(path) for path in inputs}
    images: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        try:
            for number, prediction in enumerate(predictions, 1):
                target = _available_path(out, prediction.path.stem, taken)
                taken.add(_normalised(target))
                _draw(prediction, list(names.values())).save(target, "PNG")  # the name may be "..png"
                found = coco_results(prediction.detections, number, categories)
                detections += [{**entry, "category_name": names[entry["category_id"]]} for entry in found]
                width, height = prediction.size
                image = {"id": number, "file_name": str(prediction.path), "width": width, "height": height}
                images.append({**image, "picture": target.name})
        finally:
            listed = [category._asdict() for category in categories]
            write_json(out / "predictions.json", {"images": images, "categories": listed, "detections": detections})
    except OSError as error:
        raise cannot_write(error.filename or out, error) from None
    return len(detections)


def _normalised(path: Path) -> str:
    """Return the same text for all names of a file, also on file systems that ignore case."""
    return str(path.resolve()).casefold()


def _available_path(out: Path, stem: str, taken: set[str]) -> Path:
    """Return ``out/STEM.png``, or if that is taken the first available of ``out/STEM-2.png`` and so on."""
    stem = os.fsdecode(os.fsencode(stem)[:LONGEST_NAME])
    target, number = out / f"{stem}.png", 1
    while _normalised(target) in taken:
        number += 1
        target = out / f"{stem}-{number}.png"
    return target


def _draw(prediction: Prediction, names: Sequence[str]) -> Image.Image:
    detections = prediction.detections
    picture = to_picture(read_image(prediction.path, LARGEST)[0])
    return draw_detections(
        picture,
        detections.boxes,
        detections.labels,
        detections.scores,
        detections.masks,
        names,
        size=prediction.size,
    )
