"""Import of labelled images from other formats into a folder that ``--data`` reads."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError, cannot_write, number_of
from ..json_files import write_json
from .coco import Split
from .images import open_image, orientation

SPLITS: dict[str, Split] = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class LabelledObject:
    """Object in an image."""

    category: str
    box: tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels
    polygons: tuple[tuple[float, ...], ...] = ()  # x1, y1, x2, y2, ... in pixels
    ignored: bool = False  # neither trained on nor counted in the evaluation


@dataclass(frozen=True)
class LabelledImage:
    """Image file with its objects."""

    path: Path
    size: tuple[int, int]  # width and height that the objects refer to
    objects: list[LabelledObject]
    split: Split | None  # None: not given by the source


@dataclass
class ImportedData:
    """Labelled images of a source; `notes` count what was left out."""

    categories: list[str]
    images: list[LabelledImage] = field(default_factory=list)
    notes: dict[tuple[str, str], list[str]] = field(default_factory=dict)  # noun and problem: where it was found

    def leave_out(self, noun: str, problem: str, place: object) -> None:
        """Record a part of the source, such as an image, that is not imported."""
        self.notes.setdefault((noun, problem), []).append(str(place))

    def report(self) -> list[str]:
        """Return a line for each kind of problem, with a count and an example."""
        return [
            f"left out {number_of(len(places), noun)} {problem}, e.g. {places[0]}"
            for (noun, problem), places in self.notes.items()
        ]


def import_annotations(
    read: Callable[[Path], ImportedData], source: Path, out: Path, *, val_share: float
) -> tuple[dict[Split, int], list[str]]:
    """Copy labelled images to ``out/images`` and write ``out/annotations/instances_SPLIT.json``.

    Parameters
    ----------
    read
        `read_voc` or `read_yolo`.
    source
        Folder with the images and their labels.
    out
        New folder, or one without data.
    val_share
        Part of the images to use for validation if the source does not say which.

    Returns
    -------
    The number of images of each split, and a line for each kind of problem.
    """
    if not source.is_dir():
        raise UserError(f"{source}: there is no such folder")
    for name in ("annotations", "images"):
        if (out / name).exists():
            raise UserError(f"{out / name} exists already: give another folder")
    data = read(source)
    if not any(image.objects for image in data.images):
        details = "; ".join(data.report()) or "it has no labels"
        raise UserError(f"{source}: no labelled image was found ({details})")
    splits = _splits(data.images, val_share)
    try:
        (out / "annotations").mkdir(parents=True)
        for split, images in splits.items():
            content = _coco(images, data.categories, out / "images" / split)
            write_json(out / "annotations" / f"instances_{split}.json", content)
    except OSError as error:
        raise cannot_write(error.filename or out, error) from None
    return {split: len(images) for split, images in splits.items()}, data.report()


def upright_size(path: Path) -> tuple[int, int]:
    """Return width and height of an image file, turned according to EXIF as annotation tools show it."""
    with open_image(path) as image:
        turned = orientation(image) >= 5  # by a quarter
        return (image.height, image.width) if turned else (image.width, image.height)


def split_of(path: Path, root: Path) -> Split | None:
    """Return the split that a folder between `root` and a file is named after."""
    names = [part.lower() for part in path.relative_to(root).parts[:-1]]
    return next((SPLITS[name] for name in names if name in SPLITS), None)


def _splits(images: Sequence[LabelledImage], val_share: float) -> dict[Split, list[LabelledImage]]:
    splits: dict[Split, list[LabelledImage]] = {"train": [], "val": [], "test": []}
    for image in images:
        splits[image.split or "train"].append(image)
    if not splits["val"] and splits["test"] and splits["train"]:
        splits["val"], splits["test"] = splits["test"], []
    if not splits["val"]:
        # The same images in every import: no random numbers, but a checksum of the names.
        order = sorted(splits["train"], key=lambda image: (zlib.crc32(image.path.name.encode()), image.path))
        number = max(round(val_share * len(order)), int(val_share > 0 and len(order) > 1))
        chosen = {id(image) for image in order[:number]}
        splits["val"] = [image for image in splits["train"] if id(image) in chosen]
        splits["train"] = [image for image in splits["train"] if id(image) not in chosen]
    return {split: found for split, found in splits.items() if found}


def _coco(images: Sequence[LabelledImage], names: Sequence[str], folder: Path) -> dict[str, Any]:
    """Copy the images of a split, and return its COCO file."""
    folder.mkdir(parents=True)
    ids = {name: number for number, name in enumerate(names, 1)}
    taken: set[str] = set()
    items: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, image in enumerate(images, 1):
        name, number = image.path.name, 1
        while name.casefold() in taken:
            number += 1
            name = f"{image.path.stem}-{number}{image.path.suffix}"
        taken.add(name.casefold())
        shutil.copyfile(image.path, folder / name)
        width, height = image.size
        items.append({"id": image_id, "file_name": f"{folder.name}/{name}", "width": width, "height": height})
        for item in image.objects:
            x1, y1, x2, y2 = item.box
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": ids[item.category],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": sum(map(_area, item.polygons)) if item.polygons else (x2 - x1) * (y2 - y1),
                "iscrowd": int(item.ignored),
            }
            if item.polygons:
                annotation["segmentation"] = [list(polygon) for polygon in item.polygons]
            annotations.append(annotation)
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return {"images": items, "annotations": annotations, "categories": categories}


def _area(polygon: Sequence[float]) -> float:
    xs, ys = polygon[::2], polygon[1::2]
    return abs(sum(xs[i - 1] * ys[i] - xs[i] * ys[i - 1] for i in range(len(xs)))) / 2
