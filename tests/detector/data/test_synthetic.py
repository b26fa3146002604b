"""Synthetic data set: reproducibility, annotations, variation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from dcnops.detector.data import CocoDataset, find_data, write_synthetic
from dcnops.detector.data.synthetic import CATEGORIES
from dcnops.detector.errors import UserError


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.*"))}


def load(folder: Path, split: Any = "train") -> CocoDataset:
    return CocoDataset(*find_data(folder, split), masks=True, keep_empty=True)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "new" / "folder"
    write_synthetic(folder, train=40, val=3, size=96, seed=5)
    return folder


def test_files(written):
    images = [
        f"images/{split}_{index:06}.jpg" for split, count in (("train", 40), ("val", 3)) for index in range(count)
    ]
    assert list(contents(written)) == ["annotations/instances_train.json", "annotations/instances_val.json", *images]


def test_the_same_arguments_give_the_same_files(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_synthetic(tmp_path / name, train=3, val=2, size=64, seed=seed)
    first, again, other = (contents(tmp_path / name) for name in "abc")
    assert first == again
    assert all(first[name] != other[name] for name in first)


def test_a_longer_set_begins_with_the_shorter(written, tmp_path):
    write_synthetic(tmp_path, train=4, val=1, size=96, seed=5)
    short, long = contents(tmp_path), contents(written)
    for name, content in short.items():
        if name.endswith(".jpg"):
            assert content == long[name]
        else:
            few, many = json.loads(content), json.loads(long[name])
            assert few["categories"] == many["categories"]
            assert few["images"] == many["images"][: len(few["images"])]
            assert few["annotations"] == many["annotations"][: len(few["annotations"])]


def test_splits_differ(written):
    train, val = ((written / "images" / f"{split}_000000.jpg").read_bytes() for split in ("train", "val"))
    assert train != val


def test_pycocotools_reads_it(written):
    coco = COCO(str(written / "annotations" / "instances_train.json"))
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list(CATEGORIES)
    assert {annotation["category_id"] for annotation in coco.anns.values()} == set(coco.getCatIds())
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        x, y = columns[0], rows[0]
        assert annotation["bbox"] == [x, y, columns[-1] + 1 - x, rows[-1] + 1 - y]
        assert annotation["area"] == mask.sum() > 20
        assert annotation["iscrowd"] == 0


def test_samples(written):
    data = load(written)
    assert len(data) == 40 and data.report == []
    for image, target in data:
        assert image.shape == (3, 96, 96)
        assert 1 <= len(target["boxes"]) <= 4
        assert target["masks"].sum(0).max() == 1  # masks do not overlap
    assert len(load(written, "val")) == 3


def test_objects_contrast_with_the_background(written):
    contrasts = []
    for image, target in load(written):
        background = image[:, target["masks"].sum(0) == 0].mean(1)
        contrasts += [float((image[:, mask > 0].mean(1) - background).norm()) for mask in target["masks"]]
    assert np.median(contrasts) > 0.25


@pytest.mark.parametrize("size", [32, (120, 50), (33, 200)])
def test_sizes(tmp_path, size):
    write_synthetic(tmp_path, train=6, val=0, size=size)
    wanted = (size, size) if isinstance(size, int) else size
    data = load(tmp_path)
    assert data.sizes == [wanted] * 6
    assert Image.open(data.path(0)).size == wanted
    assert all(len(target["boxes"]) for _, target in data)
    assert json.loads((tmp_path / "annotations" / "instances_val.json").read_text())["images"] == []


def test_the_number_of_objects(tmp_path):
    write_synthetic(tmp_path, train=20, val=0, size=64, objects=(1, 1))
    assert [len(target["boxes"]) for _, target in load(tmp_path)] == [1] * 20
    write_synthetic(tmp_path, train=5, val=0, size=160, objects=(6, 9))
    numbers = [len(target["boxes"]) for _, target in load(tmp_path)]
    assert max(numbers) >= 6 and min(numbers) >= 4


def extents(folder: Path, deformation: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return label, sqrt(width * height) and width / height of all boxes."""
    write_synthetic(folder, train=40, val=0, size=96, objects=(1, 1), deformation=deformation)
    targets = [target for _, target in load(folder)]
    boxes = np.concatenate([target["boxes"].numpy() for target in targets])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    return np.concatenate([target["labels"] for target in targets]), np.sqrt(width * height), width / height


@pytest.mark.slow
def test_deformation(tmp_path):
    labels, sizes, ratios = extents(tmp_path / "0", 0)
    assert set(labels) == {1, 2, 3, 4, 5}
    for label in set(labels):
        # Up to a tenth is outside of the image.
        assert sizes[labels == label].max() < 1.25 * sizes[labels == label].min()
        assert ratios[labels == label].max() < 1.35 * ratios[labels == label].min()
    assert ratios[labels == 1 + list(CATEGORIES).index("dumbbell")].max() < 0.6
    _, sizes, ratios = extents(tmp_path / "1", 1)
    assert sizes.max() > 2.5 * sizes.min()
    assert ratios.min() < 0.6 and ratios.max() > 1.6


@pytest.mark.parametrize("deformation", [0, 2])
def test_the_smallest_images_at_the_ends_of_the_range(tmp_path, deformation):
    write_synthetic(tmp_path, train=30, val=0, size=32, deformation=deformation)
    data = load(tmp_path)
    assert data.report == [] and all(len(target["boxes"]) for _, target in data)


@pytest.mark.parametrize(
    "arguments, problem",
    [
        ({"size": 31}, "32 to 4096 pixels at each side, got 31x31"),
        ({"size": (500, 0)}, "32 to 4096 pixels at each side, got 500x0"),
        ({"size": 100_000}, "32 to 4096 pixels at each side, got 100000x100000"),
        ({"train": -1}, "must not be negative, got -1 and 1"),
        ({"val": -1}, "must not be negative, got 1 and -1"),
        ({"objects": (0, 3)}, "at least 1, got 0 to 3"),
        ({"objects": (3, 2)}, "at least 1, got 3 to 2"),
        ({"deformation": -0.1}, r"between 0 and 2, got -0\.1"),
        ({"deformation": float("nan")}, "between 0 and 2, got nan"),
        ({"seed": -1}, "seed must not be negative, got -1"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, problem):
    with pytest.raises(UserError, match=problem):
        write_synthetic(tmp_path / "new", **({"train": 1, "val": 1} | arguments))
    assert not (tmp_path / "new").exists()


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file.*: cannot be written"):
        write_synthetic(tmp_path / "file", train=1, val=1)
