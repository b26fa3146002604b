"""The Python interface: the documented page of code, inputs of every kind, and wrong data sets."""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dcnops.detector import CocoDataset, Detector, UserError, api
from dcnops.detector.data import Category, TorchDataset, as_image

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TINY = {
    "network.min_size": 64,
    "network.max_size": 96,
    "network.anchor_sizes": (8, 16, 32, 48, 64),
    "network.score_threshold": 0,
    "network.max_detections": 5,
}
CATEGORIES = [Category(4, "cat"), Category(8, "dog")]


def sample(**changes: object) -> tuple[object, dict[str, object]]:
    target = {"boxes": torch.tensor([[1, 2, 30, 20], [5, 5, 50, 35]]), "labels": torch.tensor([1, 2])}
    masks = torch.zeros(2, 40, 60, dtype=torch.bool)
    masks[0, 2:20, 1:30] = masks[1, 5:35, 5:50] = True
    return torch.rand(3, 40, 60), {**target, "masks": masks, **changes}


@pytest.fixture(scope="module")
def detector():
    return Detector(["cat", "dog"], detector="mask", backbone="small", options=TINY, device="cpu")


def test_docstring_example():
    assert doctest.testmod(api).failed == 0


def test_start_from_a_detector(detector, tmp_path):
    """A file with a whole detector sets the network, and its heads are used for the same categories only."""
    detector.save(tmp_path / "model.pth")
    same, other = (
        Detector(names, weights=str(tmp_path / "model.pth"), device="cpu") for names in (["cat", "dog"], ["cat"])
    )
    assert same.config.network == other.config.network == detector.config.network
    state = detector.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in same.model.state_dict().items())
    assert "parameters used" in same.report[0] and "as the categories are others" in other.report[0]
    named = Detector.load(tmp_path / "model.pth", categories=["ox", "bee"], device="cpu")
    assert named.categories == ["ox", "bee"] and named.report == []


def test_train_evaluate_and_go_on(tmp_path):
    """Further steps are in docs/detector_api.md, which is run by another test."""
    options = {**TINY, "training.epochs": 1, "training.workers": 1, "training.batch_size": 2}
    detector = Detector(["cat", "dog"], backbone="small", options=options, device="cpu")
    items = [sample() for _ in range(3)]
    metrics = detector.train(items, items, out=tmp_path)  # type: ignore[arg-type]
    assert metrics is not None and detector.evaluate(items) == metrics  # type: ignore[arg-type]
    with pytest.raises(UserError, match="exists: go on with"):
        detector.train(items, out=tmp_path)  # type: ignore[arg-type]
    longer = Detector(["cat", "dog"], backbone="small", options={**options, "training.epochs": 2}, device="cpu")
    assert longer.train(items, out=tmp_path, resume=True) is None  # type: ignore[arg-type]
    assert not longer.model.training


def test_the_import_is_light():
    code = "import sys, dcnops.detector; assert not {'numpy', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_images_of_every_kind_give_the_same_detections(detector, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    images = [
        *(tmp_path / "image.png", str(tmp_path / "image.png"), Image.fromarray(pixels), pixels, tensor),
        *(pixels.astype(np.float64) / 255, tensor.float() / 255),
    ]
    first, *others = detector.predict(images, threshold=0)
    assert len(first["scores"]) == 5 and first["masks"].dtype == torch.bool and first["masks"].shape == (5, 50, 70)
    assert first["names"] == [detector.categories[label - 1] for label in first["labels"]]
    for other in others:
        assert all(torch.equal(first[key], other[key]) for key in ("boxes", "labels", "scores", "masks"))
    grey = pixels[:, :, 0]
    assert torch.equal(as_image(grey, ""), as_image(np.stack([grey] * 3, 2), ""))
    assert detector.predict([]) == []
    detector.save(tmp_path / "model.pth")
    again = Detector.load(tmp_path / "model.pth", device="cpu").predict(images[:1], threshold=0)[0]
    assert torch.equal(again["boxes"], first["boxes"])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (3, "must be a Pillow image, an array [H, W, 3] or a tensor [3, H, W], got a int"),
        (torch.rand(1, 3, 8, 8), "got shape [1, 3, 8, 8]"),
        (torch.rand(8, 8, 3), "must have 1 or 3 channels and at least one pixel, got the shape [8, 8, 3]"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "must be uint8 or floating-point, got torch.int64"),
        (torch.randn(3, 8, 8), "must have values from 0 to 1, as the network normalises them, got -"),
        (torch.full((3, 8, 8), torch.nan), "must have values from 0 to 1"),
    ],
)
def test_wrong_images(detector, image, message):
    with pytest.raises(UserError, match=re.escape(message)):
        detector.predict([torch.rand(3, 8, 8), image])
    with pytest.raises(UserError, match=r"images must be a list of images, got a str: write \[image\]"):
        detector.predict("image.png")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (torch.rand(3, 8, 8), "sample 0 must be (image, target) with a dictionary as target, got tensor"),
        ((torch.rand(4, 8, 8), {}), "sample 0: the image must have 1 or 3 channels"),
        ((torch.rand(3, 8, 8), {"boxes": []}), "sample 0: the target needs 'labels', got 'boxes'"),
        (sample(labels=torch.tensor([0, 1])), "target['labels'] must be between 1 and 2, the number of categories"),
        (sample(labels=torch.tensor([1])), "target['boxes'] must be [1, 4], one row for each label, got torch.int64"),
        (sample(boxes=torch.tensor([[1, 2, 3, 4], [5, 6, 5, 8]])), "x1, y1, x2, y2 with x1 < x2 and y1 < y2, got"),
        (sample(masks=torch.zeros(2, 60, 40)), "target['masks'] must be [2, 40, 60], one mask for each label"),
        (sample(boxes="left"), "target['boxes'] must be a tensor, got 'left'"),
    ],
)
def test_wrong_samples(item, message):
    with pytest.raises(UserError, match=re.escape(message)):
        TorchDataset([item], CATEGORIES, masks=True, evaluated=False)  # type: ignore[arg-type]


def test_samples_become_targets_and_ground_truth():
    empty = {"boxes": [], "labels": [], "masks": torch.zeros(0, 40, 60)}
    items = [sample(iscrowd=[0, 1]), (Image.new("L", (60, 40)), empty)]
    data = TorchDataset(items, CATEGORIES, masks=True, evaluated=True)  # type: ignore[arg-type]
    image, target = data[0]
    assert image.shape == (3, 40, 60) and data.sizes == [(60, 40)] * 2
    assert target["boxes"].tolist() == [[1, 2, 30, 20]] and target["labels"].tolist() == [1]
    assert target["masks"].dtype == torch.uint8 and target["masks"].sum() == 18 * 29
    assert data[1][1]["boxes"].shape == (0, 4) and data[-1][1]["image_id"] == data.image_ids[1]
    first, second = data.coco.dataset["annotations"]
    assert (first["category_id"], first["bbox"], first["iscrowd"]) == (4, [1, 2, 29, 18], 0)
    assert (second["category_id"], second["iscrowd"], second["area"]) == (8, 1, 30 * 45)

    class Sized(list):  # type: ignore[type-arg]
        def get_height_and_width(self, index: int) -> tuple[int, int]:
            return 40, 60 + index

        def __getitem__(self, index):
            raise AssertionError("a sample is read at the start")

    assert TorchDataset(Sized(items), CATEGORIES, masks=True, evaluated=False).sizes == [(60, 40), (61, 40)]  # type: ignore[arg-type]


def test_a_perfect_detector_has_the_precision_one(detector, monkeypatch):
    """The labels, ids, boxes and masks of ground truth and detections correspond."""
    items = [sample()]
    data = TorchDataset(items, detector._categories, masks=True, evaluated=True)  # type: ignore[arg-type]
    truth = [{**item, "score": 1.0} for item in data.coco.dataset["annotations"]]
    monkeypatch.setattr(api, "detect", lambda *_, **__: truth)
    metrics = detector.evaluate(items)
    assert metrics["bbox"].AP == metrics["segm"].AP == 1
    assert metrics["bbox"].per_category == {1: 1, 2: 1}


def test_wrong_detectors(detector, tmp_path):
    for categories in ("cat", [], ["cat", "cat"], [3]):
        with pytest.raises(UserError, match="categories must"):
            Detector(categories, backbone="small")
    with pytest.raises(UserError, match=r"network\.preset must be one of regular-roipool"):
        Detector(["cat"], preset="dcnv3")
    with pytest.raises(UserError, match=r"network\.depth: there is no such option"):
        Detector(["cat"], options={"network.depth": 50})
    with pytest.raises(UserError, match="no such checkpoint"):
        Detector.load(tmp_path / "model.pth")
    with pytest.raises(UserError, match="a data set must have __len__, got a int"):
        detector.evaluate(3)  # type: ignore[arg-type]
    (tmp_path / "data.json").write_text(
        '{"images": [{"id": 1, "file_name": "a", "width": 8, "height": 8}], "annotations": [], '
        '"categories": [{"id": 1, "name": "cow"}]}'
    )
    data = CocoDataset(tmp_path / "data.json", None, masks=True, keep_empty=True)
    with pytest.raises(UserError, match="train_set must have the detector's 2 categories"):
        detector.train(data, out=tmp_path)
