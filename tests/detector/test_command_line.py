"""The commands as a user types them: what they write, and what they say about mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from examples.detector.__main__ import main
from examples.detector.config import Config
from examples.detector.data import Category
from examples.detector.model import build_detector, load_checkpoint, save_checkpoint

TINY = [
    "network.min_size=64",
    "network.max_size=64",
    "network.anchor_sizes=8,16,32,48,64",
    "network.roi_batch=16",
    "network.proposals_train=50",
    "network.proposals_test=20",
    "network.score_threshold=0",
]
QUICK = ["training.epochs=1", "training.workers=0", "training.warmup_iterations=0", "training.lr=0.001"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "data"
    assert main(["synth", str(folder), "--train", "4", "--val", "3", "--size", "64"]) == 0
    return folder


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    """A trained Mask R-CNN: two iterations."""
    out = data.parent / "run"
    command = ["train", "--data", str(data), "--out", str(out), "--preset", "dcnv2", "--detector", "mask"]
    assert main([*command, "--backbone", "small", "--device", "cpu", "--set", *TINY, *QUICK]) == 0
    return out


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail, and gives the one line that it says."""

    def command(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        return printed.err

    return command


def test_train_writes_a_run(run: Path) -> None:
    assert {"checkpoint.pth", "model.pth", "metrics.json", "tensorboard"} <= {path.name for path in run.iterdir()}
    content = load_checkpoint(run / "model.pth")
    assert content["config"]["network"]["preset"] == "dcnv2"
    assert content["iteration"] == 2
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics) == {"bbox", "segm"}


def test_evaluate_gives_the_numbers_of_training(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(run / "model.pth")
    assert main(["evaluate", "--checkpoint", checkpoint, "--data", str(data), "--out", str(tmp_path)]) == 0
    assert "AP50" in capsys.readouterr().out
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads((run / "metrics.json").read_text())
    annotations = data / "annotations" / "instances_val.json"
    again = tmp_path / "again"
    results = ["--results", str(tmp_path / "detections_segm.json"), "--annotations", str(annotations)]
    assert main(["evaluate", *results, "--out", str(again)]) == 0
    segm = json.loads((again / "metrics.json").read_text())["segm"]
    assert segm == json.loads((run / "metrics.json").read_text())["segm"]


def test_options_of_a_checkpoint_can_be_changed(run: Path, data: Path, tmp_path: Path) -> None:
    command = ["evaluate", "--checkpoint", str(run / "model.pth"), "--data", str(data), "--out", str(tmp_path)]
    assert main([*command, "--set", "network.max_detections=1"]) == 0
    detections = json.loads((tmp_path / "detections_bbox.json").read_text())
    assert 0 < len(detections) <= 3


def test_predict_from_the_checkpoint_alone(run: Path, data: Path, tmp_path: Path) -> None:
    images = sorted((data / "images").glob("val_*"))
    command = ["predict", str(data / "images" / "val_*"), "--checkpoint", str(run / "model.pth")]
    assert main([*command, "--out", str(tmp_path), "--threshold", "0"]) == 0
    written = json.loads((tmp_path / "predictions.json").read_text())
    assert [Path(item["file_name"]) for item in written["images"]] == images
    assert written["detections"]
    for item in written["images"]:
        assert Image.open(tmp_path / item["picture"]).width >= 64


def test_resume_trains_on(run: Path, data: Path) -> None:
    command = ["train", "--data", str(data), "--out", str(run), "--preset", "dcnv2", "--detector", "mask"]
    command += ["--backbone", "small", "--device", "cpu", "--resume", "--set", *TINY, *QUICK]
    assert main([*command, "training.epochs=2"]) == 0
    assert load_checkpoint(run / "model.pth")["iteration"] == 4


def test_flops(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flops"]) == 0
    assert capsys.readouterr().out.count("14,917,618") == 4
    assert main(["flops", "--json", "--set", "network.deform_groups=4"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 18
    assert {row["detector"] for row in rows} == {"faster", "mask"}
    assert main(["flops", "--json", "--set", "network.backbone=small", "network.detector=mask"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(row["detector"], row["backbone"]) for row in rows} == {("mask", "small")}


def test_help_names_every_command_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        [],
        ["train"],
        ["evaluate"],
        ["predict"],
        ["flops"],
        ["synth"],
        ["demo"],
        ["ablate"],
        ["spatial-support"],
    ):
        with pytest.raises(SystemExit) as caught:
            main([*command, "--help"])
        assert caught.value.code == 0
    assert "training.offset_lr_mult=0.1" in capsys.readouterr().out


def test_wrong_commands(fails: Callable[..., str], data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "invalid choice: 'fit'" in fails("fit")
    assert "the following arguments are required" in fails()
    assert "unrecognized arguments: --epoch" in fails("train", "--data", data, "--out", out, "--epoch")
    assert "there is no such option" in fails("train", "--data", data, "--out", out, "--set", "network.depth=50")
    preset = fails("train", "--data", data, "--out", out, "--preset", "dcnv3")
    assert "network.preset must be one of regular-roipool, regular" in preset
    assert "the data are missing: --data FOLDER" in fails("train", "--out", out)
    assert "go together" in fails("train", "--train-annotations", "a.json", "--out", out)
    assert "--device" in fails("train", "--data", data, "--out", out, "--device", "tpu", "--backbone", "small")
    for number in ("0", "a"):
        message = fails("evaluate", "--data", data, "--checkpoint", "x", "--batch-size", number)
        assert "must be a whole number of at least 1" in message
    for share in ("7", "nan", "high"):
        message = fails("predict", "a.png", "--checkpoint", "x", "--out", out, "--threshold", share)
        assert "must be a number between 0 and 1" in message
    assert "must name a file or folder" in fails("train", "--data", data, "--out", "")
    assert "deform_groups=3" in fails("flops", "--set", "network.deform_groups=3")
    assert "exists already" in fails("synth", data)
    file = data / "annotations" / "instances_val.json"
    assert "cannot be made a folder" in fails("evaluate", "--data", data, "--checkpoint", "x", "--out", file)
    assert "not allowed with" in fails("evaluate", "--data", data, "--checkpoint", "x", "--results", "y")
    assert "32 to 4096 pixels" in fails("synth", out, "--size", "8")
    assert not out.exists()


def test_missing_files(fails: Callable[..., str], run: Path, data: Path, tmp_path: Path) -> None:
    out, nothing = tmp_path / "out", tmp_path / "nothing"
    assert str(nothing) in fails("train", "--data", nothing, "--out", out)
    assert "weights" in fails("train", "--data", data, "--out", out, "--weights", tmp_path / "none.pth")
    assert "no such checkpoint" in fails("evaluate", "--checkpoint", nothing, "--data", data)
    assert "no such checkpoint" in fails("predict", data / "images", "--checkpoint", nothing, "--out", out)
    assert "nothing" in fails("predict", nothing, "--checkpoint", run / "model.pth", "--out", out)
    assert "checkpoint" in fails("train", "--data", data, "--out", out, "--backbone", "small", "--resume")
    assert not out.exists() or not any(out.iterdir())


def test_bad_json(fails: Callable[..., str], run: Path, data: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    arguments = ["--train-annotations", bad, "--train-images", data / "images", "--out", tmp_path / "out"]
    for text, message in [("{", "is not json"), ("[]", "COCO"), ('{"images": []}', "annotations")]:
        bad.write_text(text)
        assert message in fails("train", *arguments)
        assert str(bad) in fails("train", *arguments)
    annotations = data / "annotations" / "instances_val.json"
    bad.write_text("{}")
    assert "list of detections" in fails("evaluate", "--results", bad, "--annotations", annotations)


def test_a_run_is_not_overwritten(fails: Callable[..., str], run: Path, data: Path) -> None:
    before = (run / "model.pth").read_bytes()
    message = fails("train", "--data", data, "--out", run, "--backbone", "small", "--set", *TINY, *QUICK)
    assert "--resume" in message
    assert (run / "model.pth").read_bytes() == before


def test_wrong_classes_in_a_checkpoint(fails: Callable[..., str], run: Path, data: Path, tmp_path: Path) -> None:
    """Weights for other numbers of classes than the checkpoint lists, and other classes than the data have."""
    content = load_checkpoint(run / "model.pth")
    content["categories"] = [[1, "one"], [2, "two"]]
    wrong = tmp_path / "wrong.pth"
    torch.save(content, wrong)
    message = fails("evaluate", "--checkpoint", wrong, "--data", data)
    assert "cls_score" in message or "box_predictor" in message
    config = Config().set(["network.backbone=small", *TINY])
    model = build_detector(config.network, 2)
    save_checkpoint(wrong, model, config, [Category(1, "cat"), Category(2, "dog")], 0)
    message = fails("evaluate", "--checkpoint", wrong, "--data", data)
    assert "must have the detector's 2 categories (1 cat, 2 dog)" in message


def test_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.detector", "predict", str(tmp_path), "--checkpoint", "x", "--out", "y"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
