"""Data sets in COCO's JSON format: samples for a detector and ground truth for an evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import UserError, number_of
from .coco_json import Category, Notes, read_coco
from .ground_truth import GroundTruth
from .images import read_image
from .picture_files import Headers, check_pictures
from .segmentations import encode_polygons

Sample = tuple[Tensor, dict[str, Any]]  # image and target
Split = Literal["train", "val", "test"]


class CocoDataset(Dataset[Sample]):
    """Images and targets of a COCO JSON file.

    A sample is ``(image, target)``: `image` float32 [3, H, W], RGB in 0..1; `target` holds ``boxes`` float32 [n, 4]
    (x1 y1 x2 y2, pixels), ``labels`` int64 [n], ``image_id`` and optionally ``masks`` uint8 [n, H, W].

    Rules for unusual input:

    - A file that is unreadable, not in COCO's instance format, or repeats ids of images or categories is an error.
      Whole numbers may also be floats or texts. Annotations are numbered again if ids are missing or repeated.
      Without annotations, the data set has images and categories only.
    - An image that is missing, unreadable, outside of the folder `images` (also by a symbolic link), or of another size
      than the JSON file says is left out with its annotations. Only file headers are read for this check, also for
      sizes that the JSON file does not say. It is an error if all images are missing, or if an image turns out to be
      damaged when it is decoded.
    - An image with an EXIF orientation is turned upright, as annotation tools show it, unless the size in the JSON file
      is that of the stored pixels. If both sizes are equal, as in a square image, it follows the other images with an
      orientation in the data set. Images of any mode become RGB, see `read_image`.
    - ``iscrowd`` must be 0 or 1, also as a boolean or a text. ``area`` must be a number of at least 0; if it is absent
      or NaN, the area of the mask or the box is used. Anything else is an error.
    - A box that is absent or not four finite numbers is derived from the segmentation.
    - An annotation is left out if its image or category is unknown, or if it has neither a usable box nor a usable
      segmentation. A usable segmentation consists of polygons (parts with fewer than three points are ignored) or of a
      run-length code, plain or compressed, of exactly the image's size.

    All other annotations are in `coco` and count in the evaluation as in COCO's own program; with `masks`, an unusable
    segmentation counts as an empty mask. The targets contain only those that a detector can learn:

    - Crowd regions (``iscrowd``) are not in the targets.
    - Boxes are clipped to the image. A side inside the image must have at least 0.01 pixels.
    - With `masks`, the segmentation must be usable and cover at least one pixel.

    Parameters
    ----------
    annotations, images : Path or sequence of Path
        The JSON file, and the folder that its file names are relative to; None if only `coco` is needed. Several files
        and their folders are read as one data set, see `read_coco`.
    masks : bool
        Add masks to the targets. For training, at least one annotation must have a segmentation.
    keep_empty : bool
        Make a data set for evaluation: keep images without targets, as an evaluation must count false positives in
        them, and keep what `coco` is built from.
    negatives : bool
        Without `keep_empty`: keep images that have no annotations in the JSON file, as negative examples. Images that
        have only crowd regions or unusable annotations may show objects, and are left out.
    """

    name: str  # paths of the JSON files
    categories: list[Category]  # in order of id
    image_ids: list[int]  # by index, in increasing order
    sizes: list[tuple[int, int]]  # width and height by index
    report: list[str]  # a line for each kind of unusual input, with a count and an example
    annotated: bool  # the JSON file has annotations
    counted: int  # number of annotations that count in an evaluation
    boxes_only: bool  # `masks` was asked for, but no annotation has a segmentation
    unusable_images: list[str]  # the lines of `report` about image files that are missing or unusable

    def __init__(
        self,
        annotations: Path | Sequence[Path],
        images: Path | Sequence[Path] | None,
        *,
        masks: bool,
        keep_empty: bool,
        negatives: bool = False,
    ) -> None:
        files = [annotations] if isinstance(annotations, Path) else list(annotations)
        folders = [images] if isinstance(images, Path) else list(images or ())
        if len(folders) == 1:
            folders *= len(files)
        notes = Notes()
        self.name = name = ", ".join(map(str, files))
        with Headers(folders, files) as headers:
            content = read_coco(
                files,
                notes,
                polygons=masks and not keep_empty,
                keep=masks and keep_empty,
                listed=headers.add if folders else None,
            )
            self.boxes_only = masks and content.annotated and not content.segmented
            if self.boxes_only and not keep_empty:
                raise UserError(
                    f"{name}: no annotation has a segmentation, which --detector mask needs; train on boxes alone with "
                    "--detector faster or faster-fpn"
                )
            pictures = content.images
            turns = [False] * len(pictures)
            if folders:
                pictures, turns = check_pictures(pictures, headers, notes)
            elif not all(picture.width for picture in pictures):
                raise UserError(
                    f"{name}: width and height of images are missing, and there is no folder to read them from"
                )
        self.categories = content.categories
        self.annotated = content.annotated
        self._folders = folders
        self._masks = masks
        self.unusable_images = [line for line in notes.lines() if line.startswith("left out")]  # nothing else so far

        order = sorted(range(len(pictures)), key=lambda index: pictures[index].id)
        pictures = [pictures[index] for index in order]
        truth = GroundTruth(content, pictures, notes, masks=masks, evaluated=keep_empty)
        self._truth = truth if keep_empty else None
        self._coco: COCO | None = None
        self.counted = int(truth.counted.sum())
        kept = list(range(len(pictures))) if keep_empty else truth.pictures_to_train_on(negatives=negatives)
        self.report = notes.lines()
        if not kept:
            raise UserError(f"{name}: no usable image ({'; '.join(self.report) or 'it lists none'})")
        self.image_ids = [pictures[index].id for index in kept]
        shared: dict[tuple[int, int], tuple[int, int]] = {}  # images have few sizes
        self.sizes = [shared.setdefault(size, size) for size in (pictures[index][2:4] for index in kept)]
        self._names = [pictures[index].name for index in kept]
        # Flat arrays, because reference counts would make data-loading processes copy lists of objects.
        self._folder_of = np.array([pictures[index].folder for index in kept])
        self._upright = np.array([turns[order[index]] for index in kept], bool)
        targets = np.flatnonzero(truth.trainable)
        targets = targets[np.argsort(truth.image[targets], kind="stable")]
        numbers = np.bincount(truth.image[targets], minlength=len(pictures))
        labels, boxes, every_code = truth.label, truth.corners.astype(np.float32), truth.codes
        points, spans = content.points, content.spans
        del content, truth  # for training, this frees as much memory as the arrays below take
        self._ends = np.concatenate([[0], np.cumsum(numbers[kept])])
        self._labels = labels[targets]
        self._boxes = boxes[targets]
        self._points = points
        self._point_spans = spans[targets]
        codes = [every_code.get(index, b"") for index in targets.tolist()] if masks else []
        self._codes = np.frombuffer(bytearray().join(codes), np.uint8)
        self._code_ends = np.concatenate([[0], np.cumsum(np.fromiter(map(len, codes), np.int64))])

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        image, _ = read_image(self.path(index), upright=bool(self._upright[index]))
        width, height = self.sizes[index]
        if image.shape != (3, height, width):
            raise UserError(f"{self.path(index)} must have {width}x{height} pixels: it changed while it was in use")
        chosen = slice(self._ends[index], self._ends[index + 1])
        target: dict[str, Any] = {
            "boxes": torch.from_numpy(self._boxes[chosen].copy()),
            "labels": torch.from_numpy(self._labels[chosen].copy()),
            "image_id": self.image_ids[index],
        }
        if self._masks:
            target["masks"] = self._decode(range(chosen.start, chosen.stop), height, width)
            drawn = target["masks"].flatten(1).amax(1) > 0
            if not drawn.all():  # polygons without an area, see `GroundTruth`
                target |= {key: target[key][drawn] for key in ("boxes", "labels", "masks")}
        return image, target

    @property
    def coco(self) -> COCO:
        """Ground truth for the evaluation, only with `keep_empty`.

        Segmentations are compressed run-length codes, and absent without `masks`.
        """
        if self._truth is None:
            raise UserError("the data set to evaluate on must be made with keep_empty=True")
        self._coco = self._coco or self._truth.coco()  # only when it is used: it takes several times the memory
        return self._coco

    def path(self, index: int) -> Path:
        """Return the image file of a sample."""
        assert self._folders, "the data set was made without pictures"
        return self._folders[self._folder_of[index]] / self._names[index]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_coco": None}

    def _decode(self, annotations: Iterable[int], height: int, width: int) -> Tensor:
        codes = []
        for index in annotations:
            start, end = self._point_spans[index]
            if end > start:
                codes.append(encode_polygons(self._points[start:end], height, width))
            else:
                counts = self._codes[self._code_ends[index] : self._code_ends[index + 1]].tobytes()
                codes.append({"size": [height, width], "counts": counts})
        if not codes:
            return torch.zeros(0, height, width, dtype=torch.uint8)
        masks: npt.NDArray[np.uint8] = rle_tools.decode(codes)  # [H, W, n]
        return torch.from_numpy(np.ascontiguousarray(masks.transpose(2, 0, 1)))


def check_categories(expected: Sequence[Category], found: Sequence[Category], what: str) -> None:
    """Check that data has the categories of a detector."""
    if list(expected) != list(found):
        wanted, given = (
            "({}{})".format(", ".join(f"{item.id} {item.name}" for item in items[:4]), ", ..." * (len(items) > 4))
            for items in (expected, found)
        )
        raise UserError(
            f"{what} must have the detector's {number_of(len(expected), 'category')} {wanted}, "
            f"got {len(found)}: {given}"
        )


def find_data(root: Path, split: Split) -> tuple[Path, Path]:
    """Find the JSON file and the image folder of a data set.

    Their names are ``annotations/instances_{split}.json`` and ``images/``, or COCO's own
    ``annotations/instances_{split}2017.json`` and ``{split}2017/``. Test sets may have COCO's
    ``image_info_test*.json``, which list images without annotations.
    """
    if root.is_file():
        raise UserError(
            f"{root} must be a folder with a data set, got a file; train and evaluate have options for JSON files"
        )
    candidates = _candidates(root, split)
    for file, folder in candidates:
        if file.is_file() and folder.is_dir():
            return file, folder
    wanted = " or ".join(f"{file.relative_to(root)} with {folder.name}/" for file, folder in candidates)
    raise UserError(f"{root} must have {wanted}")


def has_split(root: Path, split: Split) -> bool:
    """Return True if a data set has a JSON file for the split."""
    return any(file.is_file() for file, _ in _candidates(root, split))


def _candidates(root: Path, split: Split) -> list[tuple[Path, Path]]:
    names = [(f"instances_{split}", "images"), (f"instances_{split}2017", f"{split}2017")]
    if split == "test":
        names += [("image_info_test", "images"), ("image_info_test-dev2017", "test2017")]
        names.append(("image_info_test2017", "test2017"))
    return [(root / "annotations" / f"{file}.json", root / folder) for file, folder in names]


def load_train_and_val(root: Path, *, masks: bool, negatives: bool = False) -> tuple[CocoDataset, CocoDataset]:
    """Load the training and the validation set of a folder, see `find_data` and `CocoDataset`."""
    return (
        CocoDataset(*find_data(root, "train"), masks=masks, keep_empty=False, negatives=negatives),
        CocoDataset(*find_data(root, "val"), masks=masks, keep_empty=True),
    )
