"""Average precision compared with pycocotools, detections in several processes, results files."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pycocotools.coco
import pycocotools.cocoeval
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image

from dcnops.detector.data import CocoDataset, find_data, write_synthetic
from dcnops.detector.engine import Kind, coco_metrics, detect, distributed, load_results, metrics_table, write_results
from dcnops.detector.engine.evaluation import RECALL, SUMMARY
from dcnops.detector.errors import UserError
from dcnops.detector.predict import decode_rle, encode_rle

CATEGORIES = [{"id": 3, "name": "disc"}, {"id": 7, "name": "bar"}, {"id": 9, "name": "never seen"}]
SIZE = 200


class Spots(nn.Module):
    """Network with three detections that the first pixels of the image determine."""

    roi_heads = SimpleNamespace(aligned_masks=False)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        assert not self.training
        return [self.look(image) for image in images]

    def look(self, image: Tensor) -> dict[str, Tensor]:
        corners = 10 + 20 * image[:, 0, :6].T.reshape(-1, 2, 3)[:, :, :2].reshape(-1, 4)[:3].abs()
        boxes = torch.cat((corners[:, :2], corners[:, :2] + corners[:, 2:]), 1)
        masks = torch.full((3, 1, 28, 28), 0.7)
        return {"boxes": boxes, "labels": torch.tensor([1, 2, 1]), "scores": image[0, 1, :3], "masks": masks}


def index(dataset: dict[str, Any]) -> pycocotools.coco.COCO:
    coco = pycocotools.coco.COCO()
    coco.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def blob(box: list[float]) -> dict[str, Any]:
    """Return the ellipse in a box."""
    x, y, w, h = box
    rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
    distance = ((columns - x - w / 2) / (w / 2)) ** 2 + ((rows - y - h / 2) / (h / 2)) ** 2
    return encode_rle((distance <= 1).astype(np.uint8))


@pytest.fixture(scope="module")
def example():
    """Objects of all sizes, crowds, inaccurate and duplicate detections; images without objects or without hits."""
    random = np.random.default_rng(0)
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image_id in range(1, 9):
        for number in range(0 if image_id == 1 else 9):
            side = random.choice([20, 60, 150])
            box = [*(random.random(2) * (SIZE - side)), *(side * random.uniform(0.7, 1, 2))]
            box = [round(float(value), 2) for value in box]
            category = int(random.choice([3, 7]))
            mask = blob(box)
            area = float(decode_rle(mask).sum())
            annotation = {"image_id": image_id, "category_id": category, "bbox": box, "area": area}
            annotation |= {"segmentation": mask, "id": len(annotations) + 1, "iscrowd": int(number == 4)}
            annotations.append(annotation)
            for _ in range(int(random.integers(0, 3)) if image_id < 8 else 0):
                moved = (np.array(box) + random.normal(0, 0.06 * side, 4)).clip(1, SIZE).round(3).tolist()
                found = {"image_id": image_id, "category_id": category if random.random() < 0.9 else 9, "bbox": moved}
                found |= {"segmentation": blob(moved), "score": round(float(random.random()), 2)}
                results.append(found)
    images = [{"id": n, "file_name": f"{n}.png", "width": SIZE, "height": SIZE} for n in range(1, 9)]
    return index({"images": images, "annotations": annotations, "categories": CATEGORIES}), results


FIELDS: dict[Kind, str] = {"bbox": "bbox", "segm": "segmentation"}


def official(truth: pycocotools.coco.COCO, results: list[dict[str, Any]], kind: Kind) -> Any:
    """Return the evaluation by COCO's own program."""
    alone = [{key: entry[key] for key in ("image_id", "category_id", "score", FIELDS[kind])} for entry in results]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = pycocotools.cocoeval.COCOeval(truth, truth.loadRes(alone), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("package", ["pycocotools", "faster-coco-eval"])
def test_equal_to_pycocotools(example, package):
    coco, results = example
    before = copy.deepcopy((coco.dataset, results))
    metrics = coco_metrics(coco, results, coco.imgs, ("bbox", "segm"), package=package)
    assert (coco.dataset, results) == before

    for kind in FIELDS:
        evaluation = official(index(copy.deepcopy(before[0])), before[1], kind)
        scores = metrics[kind]
        ours = [getattr(scores, name) for name in (*SUMMARY, *RECALL)]
        assert ours == pytest.approx(evaluation.stats.tolist(), abs=1e-6)
        assert 0.05 < scores.AP < 0.95
        assert len({round(value, 6) for value in ours}) >= 11  # AR10 and AR100 are equal with few detections
        for position, category in enumerate((3, 7)):
            precision = evaluation.eval["precision"][:, :, position, 0, 2]
            assert scores.per_category[category] == pytest.approx(precision.mean(), abs=1e-6)
            assert scores.per_category_AP50[category] == pytest.approx(precision[0].mean(), abs=1e-6)
        assert math.isnan(scores.per_category[9])
    assert metrics["bbox"].AP != metrics["segm"].AP


@pytest.mark.parametrize("package", ["pycocotools", "faster-coco-eval"])
def test_nothing_detected_and_nothing_to_detect(example, package, capsys):
    coco, results = example
    kinds: tuple[Kind, ...] = ("bbox", "segm")
    for kind in kinds:
        scores = coco_metrics(coco, [], coco.imgs, (kind,), package=package)[kind]
        assert (scores.AP, scores.AP50, scores.APs, scores.per_category[3]) == (0, 0, 0, 0)
        assert math.isnan(scores.per_category[9])
        scores = coco_metrics(coco, results, [1], (kind,), package=package)[kind]
        assert all(math.isnan(value) for value in (scores.AP, scores.APl, *scores.per_category.values()))
    assert capsys.readouterr().out == ""


def test_only_the_given_images_count(example):
    coco, results = example
    truth = copy.deepcopy(coco.dataset)
    truth["images"] = [image for image in truth["images"] if image["id"] in (3, 4)]
    truth["annotations"] = [annotation for annotation in truth["annotations"] if annotation["image_id"] in (3, 4)]
    expected = coco_metrics(index(truth), results, [3, 4])
    assert repr(coco_metrics(coco, results, [4, 3])) == repr(expected)


@pytest.mark.parametrize("package", ["pycocotools", "faster-coco-eval"])
def test_ground_truth_that_cannot_be_trained_on_counts(example, tmp_path, package):
    """COCO's own program reads the original file; only boxes count where a segmentation is missing."""
    coco, results = example
    content = copy.deepcopy(coco.dataset)
    speck = [[50.2, 50.2, 50.4, 50.2, 50.4, 50.4]]  # covers no pixel
    line = {"bbox": [20, 30, 0, 40], "area": 0, "segmentation": [[20, 30, 20, 70, 20, 30]]}
    outside = {"bbox": [300, 20, 40, 40], "area": 1600, "segmentation": [[300, 20, 340, 20, 340, 60]]}
    odd = [{"bbox": [50.2, 50.2, 0.2, 0.2], "area": 0.02, "segmentation": speck}, line, outside]
    odd.append({"bbox": [9, 9, 60, 60], "area": 2000, "segmentation": speck})
    for image_id in (1, 2, 3):
        for fields in copy.deepcopy(odd):
            fields |= {"id": len(content["annotations"]) + 1, "image_id": image_id, "category_id": 3, "iscrowd": 0}
            content["annotations"].append(fields)
    kinds: dict[Kind, float] = {"bbox": 0.0, "segm": 0.0}
    for kind in ("segm", "bbox"):
        if kind == "bbox":
            content["annotations"][0].pop("segmentation")
            content["annotations"].append({**content["annotations"][0], "id": 999, "bbox": [9, 9, 90, 90]})
        (tmp_path / "odd.json").write_text(json.dumps(content))
        with contextlib.redirect_stdout(io.StringIO()):
            expected = official(pycocotools.coco.COCO(tmp_path / "odd.json"), results, kind).stats[:6]
        dataset = CocoDataset(tmp_path / "odd.json", None, masks=kind == "segm", keep_empty=True)
        scores = coco_metrics(dataset.coco, results, dataset.image_ids, (kind,), package=package)[kind]
        found = [scores.AP, scores.AP50, scores.AP75, scores.APs, scores.APm, scores.APl]
        assert found == pytest.approx(expected.tolist(), abs=1e-6)
        kinds[kind] = scores.AP
    before = coco_metrics(coco, results, coco.imgs, ("bbox", "segm"))
    assert kinds["bbox"] < before["bbox"].AP - 0.01 and kinds["segm"] < before["segm"].AP - 0.01


def test_absent_fields_and_id_zero_change_nothing(example, tmp_path):
    coco, results = example
    expected = coco_metrics(coco, results, coco.imgs, ("bbox", "segm"))
    bare = copy.deepcopy(coco.dataset)
    for annotation in bare["annotations"]:
        annotation["id"] -= 1
        del annotation["area"]
        if not annotation["iscrowd"]:
            del annotation["iscrowd"]
    (tmp_path / "bare.json").write_text(json.dumps(bare))
    completed = CocoDataset(tmp_path / "bare.json", None, masks=True, keep_empty=True).coco
    assert repr(coco_metrics(completed, results, coco.imgs, ("bbox", "segm"))) == repr(expected)
    boxes_only = CocoDataset(tmp_path / "bare.json", None, masks=False, keep_empty=True).coco
    assert coco_metrics(boxes_only, results, coco.imgs)["bbox"].AP == expected["bbox"].AP
    with pytest.raises(UserError, match="some detections have no segmentation"):
        boxes = [{key: value for key, value in entry.items() if key != "segmentation"} for entry in results]
        coco_metrics(coco, boxes, coco.imgs, ("segm",))
    with pytest.raises(UserError, match="made with masks=True"):
        coco_metrics(boxes_only, results, coco.imgs, ("segm",))


def test_results_files_and_table(example, tmp_path):
    coco, results = example
    metrics = coco_metrics(coco, results, coco.imgs, ("bbox", "segm"))
    categories: Any = [type("Category", (), entry) for entry in CATEGORIES]
    write_results(tmp_path / "new", results, metrics, categories)
    for kind in metrics:
        read, kinds = load_results(tmp_path / "new" / f"detections_{kind}.json", coco)
        assert kinds == (kind,)
        assert repr(coco_metrics(coco, read, coco.imgs, kinds)[kind]) == repr(metrics[kind])
    written = json.loads((tmp_path / "new" / "metrics.json").read_text())
    assert written["segm"]["AP75"] == metrics["segm"].AP75
    assert written["segm"]["AR100"] == metrics["segm"].AR100
    assert written["bbox"]["per_category"][2] == {"id": 9, "name": "never seen", "AP": None, "AP50": None}
    assert written["bbox"]["per_category"][0]["AP50"] == metrics["bbox"].per_category_AP50[3]
    names = ["detections_bbox.json", "detections_segm.json", "metrics.json"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == names
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: cannot be written"):
        write_results(tmp_path / "file", results, metrics, categories)

    table = metrics_table(metrics, categories).splitlines()
    assert table[0].split() == ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    assert table[1].split()[:2] == ["box", f"{metrics['bbox'].AP:.3f}"]
    assert table[2].split()[-1] == f"{metrics['segm'].APl:.3f}"
    assert table[-1].split() == ["never", "seen", "-", "-"]
    odd: Any = [type("Category", (), entry | {"name": f"\x1b[31m\n{entry['id']}"}) for entry in CATEGORIES]
    assert metrics_table(metrics, odd).splitlines()[-1].startswith(r"\x1b[31m\n9 ")
    assert len({len(line) for line in table[:3]}) == 1


WITHOUT_BOX = {"image_id": 2, "category_id": 3, "score": 0.5}
GOOD = {**WITHOUT_BOX, "bbox": [1, 2, 3, 4]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not json"),
        ("{}", "must hold a list of detections.*got an object"),
        (["x"], "number 1 must be an object, got a string"),
        ([GOOD, {**GOOD, "image_id": 99}], "number 2 has the image_id 99, which is not in the annotations"),
        ([{**GOOD, "image_id": [1]}], r"has the image_id \[1\]"),
        ([{**GOOD, "image_id": True}], "has the image_id True"),
        ([{**GOOD, "image_id": 2.0}], "has the image_id 2.0"),
        ([{**GOOD, "image_id": "2"}], "has the image_id '2'"),
        ([{**GOOD, "category_id": 1}], "has the category_id 1"),
        ([{"image_id": 2, "category_id": 3, "bbox": [1, 2, 3, 4]}], "has no score"),
        ([{**GOOD, "score": "high"}], "has the score 'high'"),
        ("[" + json.dumps(GOOD).replace("0.5", "NaN") + "]", "has the score nan"),
        ([{**GOOD, "bbox": [1, 2, 3]}], r"has the bbox \[1, 2, 3\]"),
        ([{**GOOD, "bbox": [1, 2, -3, 4]}], "which is not"),
        ([WITHOUT_BOX], "has neither bbox nor segmentation"),
        ([{**GOOD, "segmentation": {"size": [5, 5], "counts": "o0"}}], "no mask of 200x200 pixels"),
        ([{**GOOD, "segmentation": {"size": [200, 200], "counts": "garbage"}}], "no mask of 200x200 pixels"),
        ([GOOD, {**WITHOUT_BOX, "segmentation": blob([5, 5, 20, 20])}], "all need the same"),
    ],
)
def test_errors_name_the_wrong_entry(example, tmp_path, content, message):
    path = tmp_path / "results.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        load_results(path, example[0])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_masks_of_results_are_encoded(example, tmp_path):
    """Polygons and plain run lengths give the same numbers as compressed ones."""
    coco, _ = example
    path = tmp_path / "results.json"
    plain = {"size": [float(SIZE)] * 2, "counts": [0, SIZE * 5, SIZE * (SIZE - 5)]}
    polygon = [[0, 0, 5, 0, 5, SIZE, 0, SIZE]]
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[:, :5] = 1
    path.write_text(json.dumps([{**WITHOUT_BOX, "segmentation": item} for item in (plain, polygon, encode_rle(mask))]))
    results, kinds = load_results(path, coco)
    assert kinds == ("segm",) and [entry["segmentation"] for entry in results] == [encode_rle(mask)] * 3
    assert coco_metrics(coco, results, coco.imgs, kinds)["segm"].AP == 0


@pytest.mark.parametrize("package", ["pycocotools", "faster-coco-eval"])
def test_all_ids_can_be_evaluated(example, package):
    coco, results = example
    expected = coco_metrics(coco, results, coco.imgs, ("bbox", "segm"), package=package)
    truth, moved = copy.deepcopy((coco.dataset, results))
    for entry in [*truth["annotations"], *moved]:
        entry["image_id"] -= 5
    for image in truth["images"]:
        image["id"] -= 5
    found = coco_metrics(index(truth), moved, range(-4, 4), ("bbox", "segm"), package=package)
    assert repr(found) == repr(expected)


def test_results_that_are_missing_or_empty(example, tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.json: cannot be read"):
        load_results(tmp_path / "nowhere.json", example[0])
    (tmp_path / "empty.json").write_text("[]")
    assert load_results(tmp_path / "empty.json", example[0]) == ([], ("bbox",))


def make_dataset(folder: Path, count: int = 5) -> None:
    """Write random images of several sizes with one object each and ids out of order."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(1)
    images, annotations = [], []
    for number in range(count):
        name, image_id = f"{number}.png", 50 - 7 * number
        pixels = random.integers(0, 256, (60 + number, 80 - number, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
        images.append({"id": image_id, "file_name": name, "width": 80 - number, "height": 60 + number})
        box = [5, 6, 20, 20]
        annotations.append({"id": number + 1, "image_id": image_id, "category_id": 7, "bbox": box, "area": 400})
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (folder / "annotations.json").write_text(json.dumps(content))


def run_detect(folder: Path, batch_size: int = 1) -> list[dict[str, Any]]:
    dataset = CocoDataset(folder / "annotations.json", folder, masks=False, keep_empty=True)
    return detect(Spots(), dataset, torch.device("cpu"), batch_size=batch_size, progress=False)


def test_detect(tmp_path):
    make_dataset(tmp_path)
    dataset = CocoDataset(tmp_path / "annotations.json", tmp_path, masks=False, keep_empty=True)
    results = run_detect(tmp_path)
    assert [entry["image_id"] for entry in results] == [image_id for image_id in dataset.image_ids for _ in range(3)]
    assert [entry["category_id"] for entry in results[:3]] == [3, 7, 3]
    image = dataset[2][0]
    expected = Spots().eval()([image])[0]
    masks = paste_masks_in_image(expected["masks"], expected["boxes"], (image.shape[1], image.shape[2]))
    for row, entry in enumerate(results[6:9]):
        x1, y1, x2, y2 = expected["boxes"][row]
        assert torch.equal(torch.tensor(entry["bbox"]), torch.stack((x1, y1, x2 - x1, y2 - y1)))
        assert torch.equal(torch.tensor(entry["score"]), expected["scores"][row])
        assert np.array_equal(decode_rle(entry["segmentation"]), masks[row, 0] > 0.5)
    assert json.loads(json.dumps(results)) == results
    assert all(len(str(entry["score"])) <= 12 for entry in results)
    assert run_detect(tmp_path, batch_size=3) == results


def test_detect_restores_the_mode_of_every_module(tmp_path):
    make_dataset(tmp_path, 1)
    dataset = CocoDataset(tmp_path / "annotations.json", tmp_path, masks=False, keep_empty=True)
    model = Spots()
    model.free, model.frozen = nn.Dropout(), nn.Dropout()
    model.train()
    model.frozen.eval()
    detect(model, dataset, torch.device("cpu"), progress=False)
    assert (model.training, model.free.training, model.frozen.training) == (True, True, False)
    with pytest.raises(IndexError):  # raised in the network
        model.look = lambda image: [][0]  # type: ignore[method-assign]
        detect(model, dataset, torch.device("cpu"), progress=False)
    assert (model.training, model.free.training, model.frozen.training) == (True, True, False)


PROCESS = """
import json, sys
from pathlib import Path
from dcnops.detector.engine import distributed
from tests.detector.engine.test_evaluation import run_detect

with distributed.session("cpu"):
    results = run_detect(Path(sys.argv[1]))
    shares = distributed.gather_lists([distributed.rank()] * (1 + distributed.rank()))
    report = [distributed.rank(), distributed.world_size(), distributed.is_main(), shares, results]
    Path(sys.argv[1], f"report-{distributed.rank()}.json").write_text(json.dumps(report))
"""


@pytest.mark.exhaustive  # test_training.py has another test with two processes
def test_two_processes_give_the_result_of_one(tmp_path):
    make_dataset(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path)],
            cwd=Path(__file__).parents[3],
            env={**common, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in ("0", "1")
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    expected = run_detect(tmp_path)
    for rank in (0, 1):
        report = json.loads((tmp_path / f"report-{rank}.json").read_text())
        assert report == [rank, 2, rank == 0, [0, 1, 1], expected]


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with distributed.session("cpu") as device:
        assert device == torch.device("cpu")
        assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
        assert distributed.gather_lists([1, 2]) == [1, 2]
    for name in ("meta", "gpu", "cuda:99"):
        with pytest.raises(UserError, match=f"--device.*{name}"), distributed.session(name):
            pass


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT not set: start .* torchrun"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number, got 'two': .* unset WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "RANK": "-1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK must be a whole number"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "RANK must be less than WORLD_SIZE=2",
        ),
    ],
)
def test_variables_of_clusters(monkeypatch, variables, message):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, variables.get(name, ""))
    with pytest.raises(UserError, match=message), distributed.session("cpu"):
        pass
    monkeypatch.setenv("WORLD_SIZE", "")
    with distributed.session("cpu"):
        assert distributed.world_size() == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_is_named_in_one_sentence(tmp_path, workers):
    write_synthetic(tmp_path, train=2, val=0, size=64)
    dataset = CocoDataset(*find_data(tmp_path, "train"), masks=False, keep_empty=True)
    picture = dataset.path(1)
    picture.write_bytes(picture.read_bytes()[:600])
    with pytest.raises(UserError) as caught:
        detect(Spots(), dataset, torch.device("cpu"), workers=workers, progress=False)
    assert str(caught.value).startswith(f"{picture}: cannot be read")
    assert "\n" not in str(caught.value)
