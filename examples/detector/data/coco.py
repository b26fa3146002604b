"""Data sets in COCO's JSON format: validation, and conversion to samples for a detector."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import UserError, printable
from ..json_files import read_json
from .images import open_image, read_image

MIN_SIDE = 0.01  # pixels; float32 still resolves such a box after resizing
MAX_COORDINATE = 1e5  # pixels; pycocotools allocates memory proportional to a polygon's length
MAX_PIXELS = 2**31  # of an image; pycocotools counts in 32 bits


class Category(NamedTuple):
    """Category of a COCO JSON file; its label in the network is 1 + its index in order of `id`."""

    id: int
    name: str


Sample = tuple[Tensor, dict[str, Any]]  # image and target


class CocoDataset(Dataset[Sample]):
    """Images and targets of a COCO JSON file.

    A sample is ``(image, target)``: `image` float32 [3, H, W], RGB in 0..1; `target` holds ``boxes`` float32 [n, 4]
    (x1 y1 x2 y2, pixels), ``labels`` int64 [n], ``image_id`` and optionally ``masks`` uint8 [n, H, W].

    Invalid input is handled by these rules:

    - A file that is unreadable, not in COCO's instance format, or has duplicate ids is an error.
    - An image that is missing, unreadable, outside of the folder `images` (also by a symbolic link), or of another size
      than the JSON file says is left out with its annotations. Only file headers are read for this check. It is an
      error if all images are missing, or if an image turns out to be damaged when it is decoded.
    - As in COCO, annotations refer to the stored pixels: EXIF orientation is ignored. Images of any mode become RGB,
      see `read_image`.
    - ``iscrowd`` must be 0 or 1, also as a boolean or a text. ``area`` must be a number of at least 0; if it is absent
      or NaN, the area of the mask or the box is used. Anything else is an error.
    - An annotation is left out if its image or category is unknown, if its box is not four finite numbers, if it has
      neither a box nor a segmentation to derive one from, or if a side of the box inside the image is shorter than
      0.01 pixels. Boxes are clipped to the image.
    - With `masks`, annotations without a usable segmentation are left out. It must consist of polygons (parts with
      fewer than three points are ignored) or of a run-length code, plain or compressed, of exactly the image's size,
      and cover at least one pixel.
    - Everything left out is excluded from training and evaluation. Crowd regions (``iscrowd``) count in the evaluation
      only.

    Parameters
    ----------
    annotations, images : Path
        The JSON file, and the folder that its file names are relative to; None if only `coco` is needed.
    masks : bool
        Add masks to the targets.
    keep_empty : bool
        Keep images without targets, as an evaluation must count false positives in them.
    negatives : bool
        Without `keep_empty`: keep images that have no annotations in the JSON file, as negative examples. Images that
        have only crowd regions or unusable annotations may show objects, and are left out.
    """

    # Ground truth for the evaluation: the usable part of the JSON file with missing iscrowd, bbox and area filled in.
    # To save memory, segmentations are compressed run-length codes, and absent without `masks`. Pickled copies lack it.
    coco: COCO
    categories: list[Category]  # in order of id
    image_ids: list[int]  # by index, in increasing order
    sizes: list[tuple[int, int]]  # width and height by index
    report: list[str]  # a line for each kind of invalid input, with a count and an example

    def __init__(
        self, annotations: Path, images: Path | None, *, masks: bool, keep_empty: bool, negatives: bool = False
    ) -> None:
        data = _read_instances(annotations)
        self._folder = images
        self._masks = masks
        left_out = _LeftOut()
        self.categories = [Category(item["id"], item["name"]) for item in sorted(data["categories"], key=_id)]
        label_of = {category.id: 1 + index for index, category in enumerate(self.categories)}

        usable = data["images"]
        if images is not None:
            usable = _usable_pictures(usable, images, annotations, left_out)
        known_images = {item["id"] for item in data["images"]}
        image_of = {item["id"]: item for item in usable}
        kept = []
        annotated, crowded = set(), set()  # ids of images with any annotations, and with crowd regions
        targets: dict[int, list[dict[str, Any]]] = {image_id: [] for image_id in image_of}
        for annotation in data["annotations"]:
            problem = None
            annotated.add(annotation["image_id"])
            image = image_of.get(annotation["image_id"])
            if annotation["image_id"] not in known_images:
                problem = "annotations of images that the json does not have"
            elif image is None:
                continue  # reported with its image
            elif annotation["category_id"] not in label_of:
                problem = "annotations of categories that the json does not have"
            else:
                problem = _normalise(annotation, image["width"], image["height"], masks)
            if problem:
                left_out.add(problem, f"id {annotation['id']}")
                continue
            kept.append(annotation)
            if annotation["iscrowd"]:
                crowded.add(annotation["image_id"])
            else:
                targets[annotation["image_id"]].append(annotation)

        if not keep_empty:
            empty = {item["id"] for item in usable if not targets[item["id"]]}
            if negatives and len(empty) < len(usable):  # negative examples alone teach nothing
                empty &= annotated
            for item in usable:
                if item["id"] in crowded & empty:
                    left_out.add("images with crowd regions only, which are not trained on", item["file_name"])
                elif item["id"] in empty:
                    left_out.add("images without annotations to train on", item["file_name"])
            usable = [item for item in usable if item["id"] not in empty]
        self.report = left_out.lines()
        if not usable:
            details = "; ".join(self.report) or "it lists none"
            raise UserError(f"{annotations}: no usable image ({details})")

        usable.sort(key=_id)
        self.image_ids = [item["id"] for item in usable]
        self.sizes = [(item["width"], item["height"]) for item in usable]
        self._names = [item["file_name"] for item in usable]
        # Flat arrays, because reference counts would make data-loading processes copy lists of objects.
        ordered = [annotation for image_id in self.image_ids for annotation in targets[image_id]]
        self._ends = np.cumsum([0] + [len(targets[image_id]) for image_id in self.image_ids])
        self._labels = np.array([label_of[annotation["category_id"]] for annotation in ordered], np.int64)
        sizes = np.repeat(np.array(self.sizes), np.diff(self._ends), axis=0)
        boxes = np.array([annotation["bbox"] for annotation in ordered], np.float64).reshape(-1, 4)
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        self._boxes = np.clip(corners, 0, np.concatenate([sizes, sizes], axis=1)).astype(np.float32)
        codes = [annotation["segmentation"]["counts"].encode() for annotation in ordered] if masks else []
        self._codes = b"".join(codes)
        self._code_ends = np.cumsum([0] + [len(code) for code in codes])

        data["annotations"], data["images"] = kept, list(image_of.values())
        self.coco = COCO()
        self.coco.dataset = data
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco.createIndex()

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        image, _ = read_image(self.path(index), upright=False)
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
        return image, target

    def path(self, index: int) -> Path:
        """Return the image file of a sample."""
        assert self._folder is not None, "the data set was made without pictures"
        return self._folder / self._names[index]

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["coco"]
        return state

    def _decode(self, annotations: Iterable[int], height: int, width: int) -> Tensor:
        ends = self._code_ends
        codes = [{"size": [height, width], "counts": self._codes[ends[i] : ends[i + 1]]} for i in annotations]
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
            f"{what} must have the detector's {len(expected)} categories {wanted}, got {len(found)}: {given}"
        )


def find_data(root: Path, split: Literal["train", "val"]) -> tuple[Path, Path]:
    """Find the JSON file and the image folder of a data set.

    Their names are ``annotations/instances_{split}.json`` and ``images/``, or COCO's own
    ``annotations/instances_{split}2017.json`` and ``{split}2017/``.
    """
    candidates = [
        (root / "annotations" / f"instances_{split}.json", root / "images"),
        (root / "annotations" / f"instances_{split}2017.json", root / f"{split}2017"),
    ]
    for file, folder in candidates:
        if file.is_file() and folder.is_dir():
            return file, folder
    wanted = " or ".join(f"{file.relative_to(root)} with {folder.name}/" for file, folder in candidates)
    raise UserError(f"{root} must have {wanted}")


def load_train_and_val(root: Path, *, masks: bool, negatives: bool = False) -> tuple[CocoDataset, CocoDataset]:
    """Load the training and the validation set of a folder, see `find_data` and `CocoDataset`."""
    return (
        CocoDataset(*find_data(root, "train"), masks=masks, keep_empty=False, negatives=negatives),
        CocoDataset(*find_data(root, "val"), masks=masks, keep_empty=True),
    )


class _LeftOut:
    """Counts of excluded items by kind, with an example."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._examples: dict[str, str] = {}

    def add(self, kind: str, example: str) -> None:
        self._counts[kind] = self._counts.get(kind, 0) + 1
        self._examples.setdefault(kind, example)

    def lines(self) -> list[str]:
        return [
            printable(f"left out {count} {kind}, e.g. {self._examples[kind]}") for kind, count in self._counts.items()
        ]


def _id(item: dict[str, Any]) -> int:
    number: int = item["id"]
    return number


def _is_whole(value: object) -> bool:
    # The range of pycocotools' ids.
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def is_finite(value: object) -> bool:
    """Check that a value from a JSON file is a finite number."""
    # Integers in JSON may be too large for a float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def _read_instances(path: Path) -> dict[str, Any]:
    """Read the JSON file and check the fields that the rest of the module relies on."""
    data = read_json(path)

    def refuse(problem: str) -> UserError:
        return UserError(f"{path} is not COCO's instance format: {problem}")

    if not isinstance(data, dict):
        raise refuse(f"it must be an object with images, annotations and categories, got a {type(data).__name__}")
    needs: dict[str, dict[str, str]] = {
        "images": {"id": "whole", "file_name": "text", "width": "size", "height": "size"},
        "annotations": {
            "id": "whole",
            "image_id": "whole",
            "category_id": "whole",
            "iscrowd": "flag",
            "area": "area",
        },
        "categories": {"id": "whole", "name": "text"},
    }
    tests = {
        "whole": ("a whole number", _is_whole),
        "size": ("a positive whole number", lambda value: _is_whole(value) and value > 0),
        "text": ("a text", lambda value: isinstance(value, str) and value != ""),
        "flag": ("0 or 1", lambda value: _flag(value) is not None),
        "area": ("a number of at least 0", lambda value: _is_missing(value) or (is_finite(value) and value >= 0)),
    }
    for section, fields in needs.items():
        items = data.get(section)
        if not isinstance(items, list):
            raise refuse(f"it needs a list {section!r}")
        checks = [(field, *tests[kind]) for field, kind in fields.items()]
        ids: set[int] = set()
        for index, item in enumerate(items):
            if not isinstance(item, dict):
                raise refuse(f"{section}[{index}] must be an object, got {item!r:.40}")
            for field, words, test in checks:
                if not test(item.get(field)):
                    raise refuse(f"{section}[{index}] needs {words} as {field!r}, got {item.get(field)!r:.40}")
            if item["id"] in ids:
                raise refuse(f"{section} has id {item['id']} more than once")
            ids.add(item["id"])
    for index, item in enumerate(data["images"]):
        if item["width"] * item["height"] >= MAX_PIXELS:
            size = f"{item['width']}x{item['height']}"
            raise refuse(f"images[{index}] needs less than {MAX_PIXELS} pixels, got {size:.40}")
    if not data["categories"]:
        raise refuse("it has no categories")
    return data


def _usable_pictures(
    items: list[dict[str, Any]], folder: Path, annotations: Path, left_out: _LeftOut
) -> list[dict[str, Any]]:
    root = os.path.realpath(folder)

    def problem_of(item: dict[str, Any]) -> tuple[str, str] | None:
        name, wanted = item["file_name"], (item["width"], item["height"])
        turned = False
        try:
            if not Path(real := os.path.realpath(folder / name)).is_relative_to(root):
                return "pictures outside of the folder of images", f"{name} ({real})"
            with open_image(folder / name) as image:
                size = image.size
                if size == wanted[::-1] != wanted:
                    turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # by a quarter
        except FileNotFoundError:
            return "missing pictures", name
        except Exception as error:  # decoders raise all kinds of errors on damaged files
            return "unreadable pictures", f"{name} ({error})"
        if size != wanted:
            sizes = f"{name} ({size[0]}x{size[1]}, json {wanted[0]}x{wanted[1]})"
            if turned:
                return "pictures that their EXIF orientation turns, while the json must describe stored pixels", sizes
            return "pictures of another size than the json says", sizes
        return None

    if not folder.is_dir():
        raise UserError(f"{folder}, the folder of the images of {annotations}, does not exist")
    usable, missing = [], 0
    with ThreadPoolExecutor(8) as pool:  # hides the latency of network drives
        for item, problem in zip(items, pool.map(problem_of, items)):
            if problem is None:
                usable.append(item)
            else:
                left_out.add(*problem)
                missing += problem[0] == "missing pictures"
    if items and missing == len(items):
        raise UserError(f"{folder} has none of the {missing} images of {annotations}, e.g. {items[0]['file_name']}")
    return usable


def _normalise(annotation: dict[str, Any], width: int, height: int, masks: bool) -> str | None:
    """Complete an annotation in place; return the problem if it is unusable."""
    segmentation = annotation.pop("segmentation", None)
    box, area, code = annotation.get("bbox"), annotation.get("area"), None
    if box is not None and not (isinstance(box, list) and len(box) == 4 and all(map(is_finite, box))):
        return "annotations whose bbox is not four finite numbers"
    if masks or box is None:
        code = encode_segmentation(segmentation, height, width)
        if code is None:
            return "annotations without a usable " + ("segmentation" if masks else "bbox or segmentation")
        if rle_tools.area(code) == 0:
            return "annotations with an empty mask"
        if box is None:
            box = rle_tools.toBbox(code).tolist()
        if masks:
            annotation["segmentation"] = {"size": code["size"], "counts": code["counts"].decode()}
    x, y, w, h = box
    if min(w, h, min(x + w, width) - max(x, 0), min(y + h, height) - max(y, 0)) < MIN_SIDE:
        return f"annotations whose box has less than {MIN_SIDE} pixels on a side inside the image"
    if _is_missing(area):
        area = w * h if code is None else float(rle_tools.area(code))
    annotation.update(bbox=box, area=area, iscrowd=_flag(annotation.get("iscrowd")))
    return None


def _flag(value: object) -> int | None:
    """Return the meaning of a flag in a JSON file; None if it has none. An absent flag is 0."""
    if value is None:
        return 0
    if isinstance(value, str):
        return {"0": 0, "false": 0, "1": 1, "true": 1}.get(value.lower())
    return int(value) if isinstance(value, (int, float)) and value in (0, 1) else None


def _is_missing(value: object) -> bool:
    """Check that a number in a JSON file is absent, null or NaN."""
    return value is None or value != value


def encode_segmentation(segmentation: object, height: int, width: int) -> dict[str, Any] | None:
    """Convert a segmentation to a compressed run-length code; None if it is invalid or of another size."""
    code: dict[str, Any]
    if isinstance(segmentation, list):
        parts = [part for part in map(_polygon, segmentation) if part is not None]
        if not parts:
            return None
        code = rle_tools.merge(rle_tools.frPyObjects(parts, height, width))
        return code
    if not isinstance(segmentation, dict) or segmentation.get("size") != [height, width]:
        return None
    counts = segmentation.get("counts")
    if isinstance(counts, list):
        if not all(_is_whole(run) and run >= 0 for run in counts) or sum(counts) != height * width:
            return None
        code = rle_tools.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        return code
    if isinstance(counts, str) and counts.isascii() and _covered(counts.encode()) == height * width:
        return {"size": [height, width], "counts": counts.encode()}
    return None


def _polygon(points: object) -> npt.NDArray[np.float64] | None:
    if not isinstance(points, list) or len(points) < 6 or len(points) % 2:
        return None
    try:
        array = np.array(points, np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    # NaN fails the comparison too.
    return array if array.ndim == 1 and bool((np.abs(array) < MAX_COORDINATE).all()) else None


def _covered(counts: bytes) -> int:
    """Count the pixels of a compressed run-length code; -1 if it is malformed.

    pycocotools hardly checks codes: a wrong length makes it return uninitialised memory or write out of bounds.
    """
    characters = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if not len(characters) or characters.min() < 0 or characters.max() > 63 or characters[-1] & 32:
        return -1
    # A number is a group of 5-bit digits, lowest first. Bit 5 means that another digit follows; bit 4 of the last digit
    # is the sign.
    last = (characters & 32) == 0
    starts = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
    digits = np.diff(np.concatenate([starts, [len(characters)]]))
    if digits.max() > 7:  # more than 32 bits
        return -1
    place = 5 * (np.arange(len(characters)) - np.repeat(starts, digits))
    runs = np.add.reduceat((characters & 31) << place, starts)
    runs -= np.where(characters[last] & 16, np.int64(1) << (5 * digits), 0)
    # From the fourth on, each number is stored as the difference from the number two places before.
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return int(runs.sum()) if bool((runs >= 0).all()) else -1
