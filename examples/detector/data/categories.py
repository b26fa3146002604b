"""Categories of other projects' detectors, and which categories of a data set they are."""

from __future__ import annotations

from collections.abc import Sequence

from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from ..errors import UserError
from .coco_json import Category

# COCO's ids are 1 to 90; the ten that no category has are called N/A.
COCO_WITH_GAPS = [
    Category(number, name)
    for number, name in enumerate(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"])
    if number > 0
]
COCO_CATEGORIES = [category for category in COCO_WITH_GAPS if category.name != "N/A"]


def numbered_categories(number: int) -> list[Category]:
    """Return categories with the names "category 1" and so on, for files that have no names."""
    return [Category(index, f"category {index}") for index in range(1, number + 1)]


def match_categories(own: Sequence[Category], data: Sequence[Category], what: str) -> list[Category | None]:
    """Return for each category of a detector the category of a data set with the same name, or None.

    Numbered categories match in the order of the ids. There must be a match.
    """
    if list(own) == list(data) or (len(own) == len(data) and list(own) == numbered_categories(len(own))):
        return list(data)
    named = {category.name: category for category in data}
    matched = [named.get(category.name) for category in own]
    if len(named) < len(data) or not any(matched) or len({item for item in matched if item}) < sum(map(bool, matched)):
        wanted, given = (
            f"{', '.join(item.name for item in items[:4])}{', ...' * (len(items) > 4)}" for items in (own, data)
        )
        raise UserError(
            f"{what} must have categories with the names of the detector's {len(own)} ({wanted}), "
            f"got {len(data)}: {given}"
        )
    return matched
