"""Names of categories for detectors without them, and matching with data."""

from __future__ import annotations

import json

import pytest

from dcnops.detector.data import Category, default_categories, match_categories, named_categories, read_categories
from dcnops.detector.errors import UserError

CAT, DOG, OX = Category(1, "cat"), Category(2, "dog"), Category(3, "ox")


def test_categories_of_coco():
    coco = default_categories(80)
    assert len(coco) == 80 and coco[0] == Category(1, "person") and coco[-1] == Category(90, "toothbrush")
    assert named_categories([category.name for category in coco]) == coco
    assert default_categories(90)[11] == Category(12, "N/A") and default_categories(90)[89] == coco[-1]
    assert default_categories(2) == [Category(1, "category 1"), Category(2, "category 2")]


def test_files_with_names(tmp_path):
    text, file = tmp_path / "names.txt", tmp_path / "names.json"
    text.write_text("cat\n dog \n\nox\n")
    file.write_text(json.dumps({"categories": [{"id": 3, "name": "ox"}, {"id": 1, "name": "cat"}], "images": []}))
    assert read_categories(text) == [CAT, DOG, OX] and read_categories(file) == [CAT, OX]
    for path, content, message in (
        (text, "cat\ncat", "different names and ids, got 2"),
        (text, " ", "different names and ids, got 0"),
        (file, "[1]", "needs a list 'categories'"),
        (file, '{"categories": [{"id": 1}]}', "needs a list 'categories'"),
        (tmp_path / "absent.txt", None, "No such file"),
    ):
        if content is not None:
            path.write_text(content)
        with pytest.raises(UserError, match=message):
            read_categories(path)


def test_matching():
    assert match_categories([CAT, DOG, OX], [CAT, DOG, OX], "data") == [CAT, DOG, OX]
    few = [Category(5, "ox"), Category(9, "cat")]  # other ids, and fewer
    assert match_categories([CAT, DOG, OX], few, "data") == [few[1], None, few[0]]
    assert match_categories(default_categories(2), few, "data") == few
    coco = default_categories(80)
    assert match_categories(default_categories(90), coco, "data") == [
        category if category in coco else None for category in default_categories(90)
    ]
    for own, data in (([CAT, DOG], [CAT, OX]), ([CAT, CAT], [CAT]), (default_categories(3), few), ([CAT], [CAT, CAT])):
        number = f"{len(own)} categories" if len(own) > 1 else "1 category"
        with pytest.raises(UserError, match=rf"data must have the detector's {number} \("):
            match_categories(own, data, "data")
