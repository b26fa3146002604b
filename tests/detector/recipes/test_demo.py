"""Output of the demo, at a smaller size."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from dcnops.detector.__main__ import main
from dcnops.detector.recipes import demo


def test_other_folders_are_not_touched(tmp_path, capsys):
    precious = tmp_path / "data" / "precious.txt"
    precious.parent.mkdir()
    precious.touch()
    assert main(["demo", "--out", str(tmp_path), "--device", "cpu"]) == 2
    assert "must be an empty or a new folder" in capsys.readouterr().err
    assert precious.exists()


@pytest.mark.slow
def test_demo(tmp_path, monkeypatch, capsys):
    config = demo.demo_config()
    assert (config.network.preset, config.network.backbone) == ("dcnv2", "small")
    monkeypatch.setattr(demo, "TRAIN_IMAGES", 4)
    monkeypatch.setattr(demo, "VAL_IMAGES", 2)
    monkeypatch.setattr(demo, "BUDGET", 10)
    monkeypatch.setattr(demo, "demo_config", lambda: config.set(["training.epochs=1"]))
    out = tmp_path / "out"
    earlier = [out / folder / "of an earlier demo" for folder in ("data", "run", "predictions")]
    for file in (out / ".demo", *earlier):  # a run replaces an earlier one
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert main(["demo", "--out", str(out), "--device", "cpu"]) == 0
    assert not any(file.exists() for file in earlier)
    printed = capsys.readouterr().out
    assert "box AP 0." in printed and "AP50" in printed
    assert str(out / "detections.png") in printed
    sheet = Image.open(out / "detections.png")
    assert sheet.width > 4 * demo.SIZE  # ground truth and detections of two images per row
    folders, pictures = {"data", "run", "predictions"}, {"detections.png", "spatial_support.png", "offsets.png"}
    assert {path.name for path in out.iterdir()} == {".demo"} | folders | pictures
    assert all(str(out / name) in printed for name in pictures)
    assert len(json.loads((out / "predictions" / "predictions.json").read_text())["images"]) == 2
    metrics = json.loads((out / "run" / "metrics.json").read_text())
    assert set(metrics) == {"bbox", "segm"}
