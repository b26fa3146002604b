"""Names of categories for detectors that have none, and matching with the categories of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from ..errors import UserError, number_of
from ..json_files import read_json
from .coco_json import Category

# COCO's ids are 1 to 90; the ten that no category has are called N/A.
COCO_WITH_GAPS = [
    Category(number, name)
    for number, name in enumerate(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"])
    if number > 0
]
COCO_CATEGORIES = [category for category in COCO_WITH_GAPS if category.name != "N/A"]


def default_categories(number: int) -> list[Category]:
    """Return COCO's categories if there are 80, or 90 with the gaps between their ids; else numbered names."""
    for categories in (COCO_CATEGORIES, COCO_WITH_GAPS):
        if number == len(categories):
            return categories
    return [Category(index, f"category {index}") for index in range(1, number + 1)]


def named_categories(names: Sequence[str]) -> list[Category]:
    """Give categories the ids 1, 2, and so on, and COCO's their own."""
    if list(names) == [category.name for category in COCO_CATEGORIES]:
        return COCO_CATEGORIES
    return [Category(number, name) for number, name in enumerate(names, 1)]


def read_categories(path: Path) -> list[Category]:
    """Read the names of categories: a JSON file in COCO's format, or a text file with a name per line."""
    if path.suffix != ".json":
        try:
            lines = path.read_text("utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            problem = error.strerror if isinstance(error, OSError) else "it is not text"
            raise UserError(f"{path}: cannot be read ({problem})") from None
        categories = named_categories([line.strip() for line in lines if line.strip()])
    else:
        content = read_json(path)
        try:
            items = content["categories"]
            categories = sorted(Category(int(item["id"]), str(item["name"])) for item in items)
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path}: needs a list 'categories' of objects with an id and a name") from None
    if not categories or any(len(set(values)) < len(categories) for values in zip(*categories)):
        raise UserError(f"{path}: needs categories with different names and ids, got {len(categories)}")
    return categories


def match_categories(own: Sequence[Category], data: Sequence[Category], what: str) -> list[Category | None]:
    """Return for each category of a detector the category of a data set with the same name.

    A category that the data lack is None. Every category of the data must have one of the detector; only if the file of
    the detector has no names, those of equally many categories in the order of their ids are taken.
    """
    unnamed = list(own) == default_categories(len(own)) and len(own) not in (len(COCO_CATEGORIES), len(COCO_WITH_GAPS))
    if list(own) == list(data) or (unnamed and len(own) == len(data)):
        return list(data)
    named = {category.name: category for category in data}
    matched = [named.get(category.name) for category in own]
    if len(named) < len(data) or sum(map(bool, matched)) != len(data):
        wanted, given = (
            "({}{})".format(", ".join(f"{item.id} {item.name}" for item in items[:4]), ", ..." * (len(items) > 4))
            for items in (own, data)
        )
        raise UserError(
            f"{what} must have the detector's {number_of(len(own), 'category')} {wanted} or some of them, "
            f"got {len(data)}: {given}"
        )
    return matched
