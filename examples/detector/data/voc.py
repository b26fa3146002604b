"""Labels in the format of PASCAL VOC, as LabelImg, CVAT and others write them."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

from ..errors import UserError
from .annotation_import import ImportedData, LabelledImage, LabelledObject, split_of, upright_size
from .coco import Split
from .images import SUFFIXES

IMAGE_FOLDERS = ("JPEGImages", "images", "Images", "")
LISTS: dict[Split, tuple[str, ...]] = {"train": ("train", "trainval"), "val": ("val", "valid"), "test": ("test",)}


def read_voc(source: Path) -> ImportedData:
    """Read XML files in ``Annotations``, or anywhere in `source`, and find their images.

    - The image of ``Annotations/NAME.xml`` is ``NAME`` with any suffix in ``JPEGImages``, ``images`` or next to the XML
      file, or else the file that the XML names.
    - VOC counts pixels from 1 and includes the last one: xmin becomes xmin - 1, and xmax stays.
    - Difficult objects are ignored: they become crowd regions, which are neither trained on nor counted in the
      evaluation. This is VOC's own rule for the evaluation.
    - Masks, the pictures in ``SegmentationObject``, are not read.
    - ``ImageSets/Main/train.txt``, ``val.txt``, ``trainval.txt`` and ``test.txt`` give the splits, or folders of these
      names.
    """
    root = source / "Annotations"
    files = sorted((root if root.is_dir() else source).rglob("*.xml"))
    if not files:
        inner = [path.parent.name for path in sorted(source.glob("*/Annotations"))]
        hint = f"; give one of its folders: {', '.join(inner)}" if inner else ""
        raise UserError(f"{source} must have XML files in Annotations/ or elsewhere{hint}")
    lists = _lists(source / "ImageSets" / "Main")
    data = ImportedData([])
    if (masks := source / "SegmentationObject").is_dir():
        data.leave_out("folder", "with masks, as only boxes are imported from VOC", masks)
    for file in files:
        try:
            tree = ElementTree.parse(file).getroot()
        except (ElementTree.ParseError, OSError, ValueError) as error:
            raise UserError(f"{file}: cannot be read as XML ({error})") from None
        if tree.tag != "annotation":
            data.leave_out("XML file", "in another format than VOC's", file)
            continue
        if lists and file.stem not in lists:
            data.leave_out("image", "that no list in ImageSets/Main has", file.stem)
            continue
        image = _find_image(source, file, (tree.findtext("filename") or "").strip())
        if image is None:
            data.leave_out("XML file", "without an image", file)
            continue
        try:
            size = _size(tree) or upright_size(image)
        except Exception as error:  # decoders raise all kinds of errors on damaged files
            data.leave_out("image", "without a readable header", f"{image} ({error})")
            continue
        objects = _objects(tree, file, data)
        data.images.append(LabelledImage(image, size, objects, lists.get(file.stem) or split_of(file, source)))
    data.categories = sorted({item.category for image in data.images for item in image.objects})
    return data


def _lists(folder: Path) -> dict[str, Split]:
    """Return the split of each name in the lists; the first list of a split that exists counts."""
    found: dict[str, Split] = {}
    for split, names in LISTS.items():
        file = next((folder / f"{name}.txt" for name in names if (folder / f"{name}.txt").is_file()), None)
        if file:
            found |= {line.split()[0]: split for line in file.read_text("utf-8-sig").splitlines() if line.split()}
    return found


def _find_image(source: Path, file: Path, name: str) -> Path | None:
    folders = [file.parent, *(source / folder for folder in IMAGE_FOLDERS)]
    suffixes = [*SUFFIXES, *(suffix.upper() for suffix in SUFFIXES)]
    candidates = [folder / f"{file.stem}{suffix}" for folder in folders for suffix in suffixes]
    if name:  # some tools write a path, possibly of another system
        candidates += [folder / name.replace("\\", "/").rpartition("/")[2] for folder in folders]
    return next((path for path in candidates if path.is_file()), None)


def _size(tree: ElementTree.Element) -> tuple[int, int] | None:
    """Return the width and height in the file; some tools write zeros or nothing."""
    try:
        width, height = (round(float(tree.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
    except (ValueError, OverflowError):
        return None
    return (width, height) if width > 0 and height > 0 else None


def _objects(tree: ElementTree.Element, file: Path, data: ImportedData) -> list[LabelledObject]:
    objects = []
    for item in tree.iter("object"):
        name = (item.findtext("name") or "").strip()
        try:
            left, top, right, bottom = (
                float(item.findtext(f"bndbox/{side}") or "") for side in ("xmin", "ymin", "xmax", "ymax")
            )
        except ValueError:
            left = math.nan
        if not name or not all(map(math.isfinite, (left, top, right, bottom))):
            data.leave_out("object", "without a name or a usable bndbox", file)
            continue
        left, right = sorted((left, right))
        top, bottom = sorted((top, bottom))
        box = (max(left - 1, 0), max(top - 1, 0), right, bottom)
        difficult = (item.findtext("difficult") or "0").strip().lower() not in ("0", "false", "unspecified", "")
        objects.append(LabelledObject(name, box, ignored=difficult))
    return objects
