"""Prediction on image files: pictures of the detections and a JSON file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..data import Category, prepare_worker, read_image, to_picture, worker_errors
from ..errors import UserError, cannot_write, number_of
from ..json_files import write_json
from .batching import infer_in_batches
from .drawing import draw_detections
from .inference import Detections, coco_results, evaluating

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
    batch_size: int = 1,
    workers: int = 0,
    amp_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Iterator[Prediction]:
    """Detect objects in image files; yield the predictions in the order of `paths`.

    Parameters
    ----------
    model : nn.Module
        Network from `build_detector`.
    paths : sequence of Path
    device : torch.device
        Device of the network.
    threshold : float
        Minimum score of a detection; the network itself drops detections below its ``score_threshold``.
    batch_size : int
        Images per forward pass. Only images that the network pads to the same size share a batch, so that the
        detections are those of single images up to rounding errors.
    workers : int
        Processes that read images while the network runs; 0 reads them in this process.
    amp_dtype : torch.dtype, optional
        Data type of autocast.
    progress : bool
        Show a progress bar on a terminal.

    Raises
    ------
    UserError
        A file is unreadable. If there are several files, the unreadable ones are reported on stderr, and the error
        comes after all other predictions.
    """
    failed: list[Path] = []

    def images(bar: tqdm[Any]) -> Iterator[tuple[Path, Tensor, tuple[int, int]]]:
        for path, read in zip(paths, _read(paths, min(workers, len(paths) - 1), device)):
            if isinstance(read, UserError):
                if len(paths) == 1:
                    raise read
                tqdm.write(f"skipped {read}", file=sys.stderr)
                failed.append(path)
            else:
                yield path, *read
            bar.update()

    quiet = None if progress else True  # None: show it on a terminal
    bar = tqdm(total=len(paths), desc="predicting", unit="image", leave=False, disable=quiet)
    with evaluating(model), worker_errors(), bar:
        options: dict[str, Any] = {"threshold": threshold, "amp_dtype": amp_dtype}
        for path, size, detections in infer_in_batches(model, images(bar), device, batch_size, **options):
            yield Prediction(path, size, detections)
    if failed:
        raise UserError(
            f"{len(failed)} of {number_of(len(paths), 'image')} could not be read, the first is {failed[0]}"
        )


def write_predictions(
    predictions: Iterator[Prediction],
    out: Path,
    categories: Sequence[Category],
    *,
    inputs: Sequence[Path],
    pictures: bool = True,
) -> int:
    """Write a picture of each prediction, ``out/NAME.png``, and ``out/predictions.json``; return the number of boxes.

    Further images of the same name get a number: ``NAME-2.png``. Without `pictures`, only the JSON file is written. It
    holds

    - ``images``: ``id``, ``file_name`` (the given path), ``width``, ``height``, and with `pictures` ``picture`` (the
      name in `out`);
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
                found = coco_results(prediction.detections, number, categories)
                detections += [{**entry, "category_name": names[entry["category_id"]]} for entry in found]
                width, height = prediction.size
                image = {"id": number, "file_name": str(prediction.path), "width": width, "height": height}
                if pictures:
                    target = _available_path(out, prediction.path.stem, taken)
                    taken.add(_normalised(target))
                    _draw(prediction, list(names.values())).save(target, "PNG")  # the name may be "..png"
                    image["picture"] = target.name
                images.append(image)
        finally:
            listed = [category._asdict() for category in categories]
            write_json(out / "predictions.json", {"images": images, "categories": listed, "detections": detections})
    except OSError as error:
        raise cannot_write(error.filename or out, error) from None
    return len(detections)


@dataclass(frozen=True, eq=False)
class _ImageFiles(Dataset[tuple[Tensor, tuple[int, int]] | UserError]):
    """Images of files; the item of an unreadable one is its error, which a DataLoader would turn into a traceback."""

    paths: Sequence[Path]
    largest: int

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, tuple[int, int]] | UserError:
        try:
            return read_image(self.paths[index], self.largest)
        except UserError as error:
            return error


def _read(
    paths: Sequence[Path], workers: int, device: torch.device
) -> Iterable[tuple[Tensor, tuple[int, int]] | UserError]:
    loader: DataLoader[Any] = DataLoader(
        _ImageFiles(paths, LARGEST),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=prepare_worker,
        collate_fn=_unchanged,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
    )
    return loader


def _unchanged(item: Any) -> Any:
    return item


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
