"""Labels in the format of YOLO, as Ultralytics, Roboflow, Label Studio, LabelImg and others write them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from .annotation_import import SPLITS, ImportedData, LabelledImage, LabelledObject, split_of, upright_size
from .coco import Split
from .images import SUFFIXES

CLASS_FILES = ("classes.txt", "obj.names", "labels/classes.txt", "data/obj.names")
TOLERANCE = 0.05  # coordinates may lie this far outside 0..1; they are clipped


def read_yolo(source: Path) -> ImportedData:
    """Read label files with lines ``class x y width height`` or ``class x1 y1 x2 y2 x3 y3 ...``, relative to the image.

    - ``data.yaml`` (or another YAML file with ``names``) gives the names and the splits; otherwise ``classes.txt`` or
      ``obj.names`` gives the names, and folders called train, val, valid or test the splits.
    - The labels of ``images/.../NAME.jpg`` are in ``labels/.../NAME.txt``, or next to the image. An image without a
      label file has no objects.
    - A line with three or more points is a polygon, which becomes the object's mask.
    """
    settings = _settings(source)
    names = _names(source, settings)
    data = ImportedData(names)
    for image, split in _images(source, settings):
        labels = _label_file(image, source)
        try:
            size = upright_size(image)
        except Exception as error:  # decoders raise all kinds of errors on damaged files
            data.leave_out("image", "without a readable header", f"{image} ({error})")
            continue
        objects = _objects(labels, size, data) if labels else []
        data.images.append(LabelledImage(image, size, objects, split))
    return data


def _settings(source: Path) -> dict[str, Any]:
    """Return the content of the YAML file that has names, or nothing."""
    import yaml

    files = sorted([*source.glob("*.yaml"), *source.glob("*.yml")], key=lambda path: path.stem != "data")
    for file in files:
        try:
            content = yaml.safe_load(file.read_text("utf-8-sig"))
        except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: cannot be read as YAML ({' '.join(str(error).split())})") from None
        if isinstance(content, dict) and "names" in content:
            return content
    return {}


def _names(source: Path, settings: dict[str, Any]) -> list[str]:
    names = settings.get("names")
    if names is None:
        file = next((source / name for name in CLASS_FILES if (source / name).is_file()), None)
        if file is None:
            raise UserError(
                f"{source} must have data.yaml with names, {', '.join(CLASS_FILES[:-1])} or {CLASS_FILES[-1]}"
            )
        names = [line.strip() for line in file.read_text("utf-8-sig").splitlines() if line.strip()]
    elif isinstance(names, dict):  # of numbers and names
        if sorted(names) != list(range(len(names))):
            raise UserError(
                f"{source}: names in the YAML file must have the numbers 0 to {len(names) - 1}, got {names!r:.80}"
            )
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names or len(set(map(str, names))) < len(names):
        raise UserError(f"{source}: the names of the classes must be a list of different names, got {names!r:.80}")
    return [str(name) for name in names]


def _images(source: Path, settings: dict[str, Any]) -> Iterator[tuple[Path, Split | None]]:
    """Yield the image files with their splits."""
    given = {name: settings[name] for name in SPLITS if settings.get(name)}
    if not given:
        root = source / "images" if (source / "images").is_dir() else source
        for path in _in_folder(root):
            yield path, split_of(path, source)
        return
    base = source / str(settings.get("path") or "")
    taken: set[Path] = set()
    for name, places in given.items():
        for place in places if isinstance(places, list) else [places]:
            for path in _in_place(str(place), source, base):
                if path not in taken:  # some use the same images in several splits
                    taken.add(path)
                    yield path, SPLITS[name]


def _in_place(place: str, source: Path, base: Path) -> Iterator[Path]:
    """Yield the images of a folder or of a list, which the YAML file names relative to one of several folders."""
    inner = place.replace("\\", "/").removeprefix("./")
    while inner.startswith("../"):  # Roboflow writes ../train/images for train/images
        inner = inner[3:]
    found = next((path for path in (base / place, source / place, source / inner) if path.exists()), None)
    if found is None:
        raise UserError(f"{source / inner}: there is no such folder or list of images, which the YAML file names")
    if found.is_dir():
        yield from _in_folder(found)
        return
    for line in found.read_text("utf-8-sig").splitlines():
        if line.strip():
            candidates = [folder / line.strip() for folder in (found.parent, source, base)]
            image = next((path for path in candidates if path.is_file()), None)
            if image is None:
                raise UserError(f"{found}: the image {line.strip()!r:.80} does not exist")
            yield image


def _in_folder(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES and path.is_file())


def _label_file(image: Path, source: Path) -> Path | None:
    parts = list(image.with_suffix(".txt").parts)
    candidates = [image.with_suffix(".txt")]
    places = [index for index, part in enumerate(parts[:-1]) if part == "images"]
    if places:  # the last one
        parts[places[-1]] = "labels"
        candidates.insert(0, Path(*parts))
    candidates.append(source / "labels" / image.with_suffix(".txt").name)
    return next((path for path in candidates if path.is_file()), None)


def _objects(file: Path, size: tuple[int, int], data: ImportedData) -> list[LabelledObject]:
    objects = []
    for number, line in enumerate(file.read_text("utf-8-sig").splitlines(), 1):
        try:
            kind, *values = map(float, line.split())
        except ValueError:
            if not line.split():
                continue
            kind, values = math.nan, []
        if len(values) == 5:  # a box with its score
            values.pop()
        is_box = len(values) == 4
        if not (is_box or (len(values) >= 6 and len(values) % 2 == 0)) or kind != kind:
            need = "a class and 4 numbers of a box or the points of a polygon"
            raise UserError(f"{file}, line {number}: must be {need}, got {line!r:.60}")
        if kind not in range(len(data.categories)):
            raise UserError(f"{file}, line {number}: the class must be 0 to {len(data.categories) - 1}, got {kind:g}")
        if not all(-TOLERANCE <= value <= 1 + TOLERANCE for value in values):
            need = "relative to the image, from 0 to 1"
            raise UserError(f"{file}, line {number}: coordinates must be {need}, got {line!r:.60}")
        if is_box:
            x, y, width, height = values
            values = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        points = [min(max(value, 0), 1) * size[index % 2] for index, value in enumerate(values)]
        box = min(points[::2]), min(points[1::2]), max(points[::2]), max(points[1::2])
        if not (box[0] < box[2] and box[1] < box[3]):
            data.leave_out("object", "without width or height", f"{file}, line {number}")
            continue
        polygons = () if is_box else (tuple(points),)
        objects.append(LabelledObject(data.categories[int(kind)], box, polygons))
    return objects
