"""Images in, detections out: pictures and a json."""

from __future__ import annotations

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
from ..errors import UserError
from .drawing import draw_detections
from .inference import Detections, coco_results, evaluating, infer

LARGEST = 4096  # pixels; images with a longer side are shrunk for the network, and so are the pictures of them


@dataclass(frozen=True)
class Prediction:
    """What was found in an image file.

    Attributes
    ----------
    size
        The (width, height) of the image, upright; boxes and masks refer to it.
    """

    path: Path
    size: tuple[int, int]
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
    """Detect in image files, one after the other.

    Parameters
    ----------
    threshold
        The least score of a detection. The network itself drops those below its ``score_threshold``.
    amp_dtype
        Autocast to this type.

    Raises
    ------
    UserError
        Files could not be read: after all others, each with its reason on stderr; at once if there is only one.
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
            found = infer(model, [image.to(device)], [size], threshold=threshold, amp_dtype=amp_dtype)[0]
            yield Prediction(path, size, found)
    if failed:
        raise UserError(f"{len(failed)} of {len(paths)} images could not be read, the first is {failed[0]}")


def write_predictions(
    predictions: Iterator[Prediction], out: Path, categories: Sequence[Category], *, inputs: Sequence[Path]
) -> int:
    """Write a picture of each prediction, ``out/NAME.png``, and ``out/predictions.json``.

    Images of the same name get a number: ``NAME-2.png``. The json holds

    - ``images``: ``id``, ``file_name`` (the path as it was given), ``width``, ``height``, ``picture`` (in `out`);
    - ``categories``: ``id``, ``name``;
    - ``detections``: entries of a COCO results json (``image_id``, ``category_id``, ``bbox`` as x, y, width, height,
      ``score``, with masks ``segmentation`` as compressed run lengths), and ``category_name``.

    It is written also when an error ends the predictions, with those until then.

    Parameters
    ----------
    inputs
        All images of the predictions; no picture replaces one of them.

    Returns
    -------
    The number of detections.

    Raises
    ------
    UserError
        The folder cannot be written to, or `predictions` raises it.
    """
    names = {category.id: category.name for category in categories}
    taken = {_key(path) for path in inputs}
    images: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        try:
            for number, prediction in enumerate(predictions, 1):
                target = _free(out, prediction.path.stem, taken)
                taken.add(_key(target))
                _draw(prediction, list(names.values())).save(target)
                found = coco_results(prediction.detections, number, categories)
                detections += [{**entry, "category_name": names[entry["category_id"]]} for entry in found]
                width, height = prediction.size
                image = {"id": number, "file_name": str(prediction.path), "width": width, "height": height}
                images.append({**image, "picture": target.name})
        finally:
            listed = [category._asdict() for category in categories]
            write_json(out / "predictions.json", {"images": images, "categories": listed, "detections": detections})
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot be written ({error.strerror})") from None
    return len(detections)


def _key(path: Path) -> str:
    """The same for all names of one file, also where capitals do not matter."""
    return str(path.resolve()).casefold()


def _free(out: Path, stem: str, taken: set[str]) -> Path:
    """``out/STEM.png``, or the first ``out/STEM-2.png`` and so on that is not taken."""
    target, number = out / f"{stem}.png", 1
    while _key(target) in taken:
        number += 1
        target = out / f"{stem}-{number}.png"
    return target


def _draw(prediction: Prediction, names: Sequence[str]) -> Image.Image:
    found = prediction.detections
    picture = to_picture(read_image(prediction.path, LARGEST)[0])
    return draw_detections(picture, found.boxes, found.labels, found.scores, found.masks, names, size=prediction.size)
