"""COCO JSON files: checked and read into flat columns, which stay small with a million annotations."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import UserError, printable
from ..json_files import (
    MAX_NUMBER,
    flag,
    is_finite,
    is_missing,
    read_json_lists,
    whole_number,
)
from .segmentations import append_polygons

MAX_PIXELS = 2**31  # of an image; pycocotools counts in 32 bits
NO_BOX = (np.nan,) * 4
NO_ID = -(2**63)
FIELDS = ("id", "image_id", "category_id", "iscrowd", "area", "bbox")  # of annotations, apart from the segmentation
MISSING_IDS = "numbered the annotations 1, 2, ..., because of {} without a usable id"
REPEATED_IDS = "numbered the annotations 1, 2, ..., because of {} repeated id{s}"

Whole = npt.NDArray[np.int64]


class Category(NamedTuple):
    """Category of a COCO JSON file; its label in the network is 1 + its index in order of `id`."""

    id: int
    name: str


class Picture(NamedTuple):
    """Image of a COCO JSON file."""

    id: int
    name: str
    width: int  # 0 if the file does not say it
    height: int
    folder: int = 0  # index of the JSON file


class Notes:
    """Counts of unusual items by kind, with an example."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._examples: dict[str, str] = {}

    def add(self, kind: str, example: str, count: int = 1) -> None:
        """Count items; `kind` is a sentence with ``{}`` for their number and ``{s}`` for the ending of a plural."""
        self._counts[kind] = self._counts.get(kind, 0) + count
        self._examples.setdefault(kind, example)

    def lines(self) -> list[str]:
        """Return a line for each kind."""
        return [
            printable(f"{kind.format(count, s='' if count == 1 else 's')}, e.g. {self._examples[kind]}")
            for kind, count in self._counts.items()
        ]


class CocoJson:
    """Content of a COCO JSON file. Annotations are columns: one array per field, in the order of the file.

    Parameters
    ----------
    path
        The file. Images, categories and annotations that lack a needed field are errors.
    polygons
        Read the polygons of annotations that are not crowd regions into `points`. Other segmentations are kept in
        `segmentations`.
    keep
        Keep all segmentations in `segmentations`, whatever `polygons` says.
    notes
        Receives a line for each kind of value that is read leniently.
    listed
        Receives the images, some at a time, as they are read.
    """

    def __init__(
        self,
        path: Path,
        notes: Notes,
        *,
        polygons: bool,
        keep: bool,
        listed: Callable[[list[Picture]], None] | None = None,
    ) -> None:
        self.path = path
        self._notes = notes
        self._polygons = polygons
        self._keep = keep
        self._listed = listed
        self.images: list[Picture] = []
        self.categories: list[Category] = []  # in order of id
        self.segmentations: dict[int, Any] = {}  # by index of the annotation
        self.segmented = 0  # number of annotations with any segmentation
        ids, images, categories, ends = (array("q") for _ in range(4))
        crowds, areas, boxes, points = array("b"), array("d"), array("d"), array("f")
        self._columns: tuple[array[Any], ...] = ids, images, categories, crowds, areas, boxes, points, ends
        handlers = {"images": self._read_images, "annotations": self._read_annotations}
        handlers["categories"] = self._read_categories
        lengths = read_json_lists(path, handlers)
        for section in ("images", "categories"):
            if section not in lengths:
                raise self._refuse(f"it needs a list {section!r}")
        if not self.categories:
            raise self._refuse("it has no categories")
        self.annotated = lengths.get("annotations", 0) > 0
        self.categories.sort()
        for section, numbers in (("images", self.images), ("categories", self.categories)):
            repeated = _repeated(np.array([item.id for item in numbers], np.int64))
            if repeated is not None:
                raise self._refuse(f"{section} has id {repeated} more than once")
        self.ids = _numbered(_column(ids), notes)
        self.image_ids: Whole = _column(images)
        self.category_ids: Whole = _column(categories)
        self.crowds = _column(crowds).astype(bool)
        self.areas = _column(areas)  # NaN if absent
        self.boxes = _column(boxes).reshape(-1, 4)  # x, y, width and height; NaN if absent or invalid
        self.points = _column(points).reshape(-1, 2)  # see `Points`
        ends_of = _column(ends) // 2
        self.spans = np.stack([np.concatenate([[0], ends_of[:-1]])[: len(ends)], ends_of], 1)  # rows of `points`
        del self._columns, self._listed

    def _refuse(self, problem: str) -> UserError:
        return UserError(f"{self.path} is not COCO's instance format: {problem}")

    def _object(self, section: str, index: int, item: object) -> dict[str, Any]:
        if not isinstance(item, dict):
            raise self._refuse(f"{section}[{index}] must be an object, got {item!r:.40}")
        return item

    def _need(self, section: str, index: int, item: dict[str, Any], field: str, need: str) -> UserError:
        return self._refuse(f"{section}[{index}] needs {need} as {field!r}, got {item.get(field)!r:.40}")

    def _whole(self, section: str, index: int, item: dict[str, Any], field: str, minimum: int = -(2**63)) -> int:
        value = item.get(field)
        number = value if type(value) is int and abs(value) < 2**63 else whole_number(value)
        if number is None or number < minimum:
            raise self._need(section, index, item, field, f"a {'positive ' if minimum == 1 else ''}whole number")
        if type(value) is not int:
            self._notes.add(f"read {{}} {field} of {section} as whole number{{s}}", repr(value))
        return number

    def _name(self, section: str, index: int, item: dict[str, Any], field: str) -> str:
        value = item.get(field)
        if not isinstance(value, str) or not value:
            raise self._need(section, index, item, field, "a text")
        return value

    def _read_images(self, first: int, values: list[Any]) -> None:
        for index, value in enumerate(values, first):
            item = self._object("images", index, value)
            width = height = 0
            if item.get("width") and item.get("height"):  # some tools write zeros
                width, height = (self._whole("images", index, item, field, 1) for field in ("width", "height"))
            if width * height >= MAX_PIXELS:
                size = f"{f'{width}x{height}':.40}"
                raise self._refuse(f"images[{index}] needs less than {MAX_PIXELS} pixels, got {size}")
            number = self._whole("images", index, item, "id")
            self.images.append(Picture(number, self._name("images", index, item, "file_name"), width, height))
        if self._listed:
            self._listed(self.images[first:])

    def _read_categories(self, first: int, values: list[Any]) -> None:
        for index, value in enumerate(values, first):
            item = self._object("categories", index, value)
            number = self._whole("categories", index, item, "id")
            self.categories.append(Category(number, self._name("categories", index, item, "name")))

    def _read_annotations(self, first: int, values: list[Any]) -> None:
        if not self._read_usual(first, values):
            for index, value in enumerate(values, first):
                self._annotation(index, value)

    def _read_usual(self, first: int, values: list[Any]) -> bool:
        """Read annotations together, which is faster, if they have all fields with numbers of the usual types."""
        ids, images, categories, crowds, areas, boxes = self._columns[:-2]
        try:
            *whole, flags, sizes, corners = (list(map(itemgetter(field), values)) for field in FIELDS)
            sides = list(chain.from_iterable(corners))
            numbers, floats = np.array(whole, np.int64), np.array([*sizes, *sides], np.float64)
        except (KeyError, OverflowError, TypeError, ValueError):
            return False
        usual = (
            set(map(type, chain(flags, *whole))) == {int}
            and {float, int}.issuperset(map(type, chain(sizes, sides)))
            and {0, 1}.issuperset(flags)
            and {(type(box), len(box)) for box in corners} == {(list, 4)}
            and bool((abs(floats) < MAX_NUMBER).all() and (floats[: len(sizes)] >= 0).all())
        )
        if not usual:
            return False
        for column, row in zip((ids, images, categories), numbers):
            column.frombytes(row.tobytes())
        crowds.fromlist(flags)
        areas.fromlist(sizes)
        boxes.fromlist(sides)
        for index, (item, crowd) in enumerate(zip(values, flags), first):
            self._segmentation(index, item.get("segmentation"), bool(crowd), False)
        return True

    def _segmentation(self, index: int, segmentation: Any, crowd: bool, needed: bool) -> None:
        """Read a segmentation; `needed` for the box."""
        points, ends = self._columns[-2:]
        self.segmented += bool(segmentation)
        polygons = self._polygons and isinstance(segmentation, list)
        if self._keep or needed or (self._polygons and not polygons and not crowd):
            self.segmentations[index] = segmentation
        elif polygons and not crowd:
            append_polygons(points, segmentation)
        ends.append(len(points))

    def _annotation(self, index: int, value: object) -> None:
        item = self._object("annotations", index, value)
        ids, images, categories, crowds, areas, boxes = self._columns[:-2]
        number = item.get("id")
        if type(number) is not int or abs(number) >= 2**63:
            usable = whole_number(number)
            kind = "read {} id of annotations as whole number{s}" if usable is not None else MISSING_IDS
            self._notes.add(kind, repr(number) if usable is not None else f"annotations[{index}]")
            number = NO_ID if usable is None else usable
        ids.append(number)
        for field, column in (("image_id", images), ("category_id", categories)):
            number = item.get(field)
            if type(number) is not int or abs(number) >= 2**63:
                number = self._whole("annotations", index, item, field)
            column.append(number)
        crowd = flag(item.get("iscrowd"))
        if crowd is None:
            raise self._need("annotations", index, item, "iscrowd", "0 or 1")
        crowds.append(crowd)
        area: Any = item.get("area")
        if is_missing(area):
            area = np.nan
        elif not is_finite(area) or area < 0:
            raise self._need("annotations", index, item, "area", "a number of at least 0")
        areas.append(area)
        box = item.get("bbox")
        if not (isinstance(box, list) and len(box) == 4 and all(map(is_finite, box))):
            if box is not None:
                self._notes.add("ignored {} bbox without four finite numbers", f"{box!r:.40}")
            box = None
        boxes.extend(box or NO_BOX)
        self._segmentation(index, item.get("segmentation"), bool(crowd), box is None)


def _column(values: array[Any]) -> npt.NDArray[Any]:
    """Return an array with the memory of `values`."""
    return np.frombuffer(values, values.typecode) if values else np.zeros(0, values.typecode)


def read_coco(
    paths: Sequence[Path],
    notes: Notes,
    *,
    polygons: bool,
    keep: bool,
    listed: Callable[[int, list[Picture]], None] | None = None,
) -> CocoJson:
    """Read one or several COCO JSON files as one, see `CocoJson`.

    The files must have the same categories. If only the ids differ, those of the first file count. If several files
    use the same image ids, the images are numbered 1, 2, ... in the order of the files and their ids. `listed` also
    receives the index of the file.
    """
    files = [
        CocoJson(path, notes, polygons=polygons, keep=keep, listed=partial(listed, number) if listed else None)
        for number, path in enumerate(paths)
    ]
    first = files[0]
    if len(files) == 1:
        return first
    for number, file in enumerate(files):
        file.images = [image._replace(folder=number) for image in file.images]
        if file.categories != first.categories:
            _translate_categories(file, first)
    numbers = [image.id for file in files for image in file.images]
    if len(set(numbers)) < len(numbers):
        notes.add(
            "numbered the {} images 1, 2, ..., as the files use the same ids", str(_repeated(numbers)), len(numbers)
        )
        start = 1
        for file in files:
            known = np.array(sorted(image.id for image in file.images), np.int64)
            file.images = [
                image._replace(id=start + int(number))
                for image, number in zip(file.images, positions(known, [image.id for image in file.images]))
            ]
            index = positions(known, file.image_ids)
            file.image_ids = np.where(index < 0, NO_ID, start + index)
            start += len(known)
    offset = points = 0
    segmentations: dict[int, Any] = {}
    for file in files:
        segmentations |= {offset + index: value for index, value in file.segmentations.items()}
        file.spans += points
        offset, points = offset + len(file.ids), points + len(file.points)
    first.segmentations = segmentations
    first.images = [image for file in files for image in file.images]
    first.annotated = any(file.annotated for file in files)
    first.segmented = sum(file.segmented for file in files)
    for name in ("ids", "image_ids", "category_ids", "crowds", "areas", "boxes", "points", "spans"):
        setattr(first, name, np.concatenate([getattr(file, name) for file in files]))
    if _repeated(first.ids) is not None:
        first.ids = np.arange(1, len(first.ids) + 1)
    return first


def positions(known: Whole, wanted: npt.ArrayLike) -> Whole:
    """Return the index in `known`, which is sorted, of each number in `wanted`; -1 if it is not there."""
    numbers = np.asarray(wanted, np.int64)
    if not len(known):
        return np.full(len(numbers), -1)
    index = np.minimum(np.searchsorted(known, numbers), len(known) - 1)
    return np.where(known[index] == numbers, index, -1)


def _translate_categories(file: CocoJson, first: CocoJson) -> None:
    """Give the categories of `file` the ids of the categories with the same names in `first`."""
    wanted = {category.name: category.id for category in first.categories}
    names = {category.name for category in file.categories}
    if names != set(wanted) or not len(names) == len(file.categories) == len(first.categories):
        differing = sorted(names ^ set(wanted)) or ["names that are repeated"]
        raise UserError(
            f"{file.path} must have the same categories as {first.path}: they differ in "
            f"{', '.join(differing[:4])}{', ...' * (len(differing) > 4)}"
        )
    index = positions(np.array([category.id for category in file.categories], np.int64), file.category_ids)
    translated = np.array([wanted[category.name] for category in file.categories], np.int64)
    file.category_ids = np.where(index < 0, NO_ID, translated[index])
    file.categories = first.categories


def _numbered(ids: Whole, notes: Notes) -> Whole:
    """Return the ids of annotations, or 1, 2, ... if some are missing or repeated."""
    if (ids == NO_ID).any():
        return np.arange(1, len(ids) + 1)
    repeated = _repeated(ids)
    if repeated is not None:
        notes.add(REPEATED_IDS, str(repeated), len(ids) - len(np.unique(ids)))
        return np.arange(1, len(ids) + 1)
    return ids


def _repeated(ids: npt.ArrayLike) -> int | None:
    """Return an id that occurs more than once."""
    ordered = np.sort(np.asarray(ids, np.int64))
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    return int(repeated[0]) if len(repeated) else None
