"""The demo, at a size for tests: what it writes and prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from examples.detector import demo
from examples.detector.__main__ import main


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    config = demo.demo_config()
    assert (config.network.preset, config.network.backbone) == ("dcnv2", "small")
    monkeypatch.setattr(demo, "TRAIN_IMAGES", 4)
    monkeypatch.setattr(demo, "VAL_IMAGES", 2)
    monkeypatch.setattr(demo, "demo_config", lambda: config.set(["training.epochs=1"]))
    for _ in range(2):  # the second replaces the first
        assert main(["demo", "--out", str(tmp_path), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "box AP 0." in printed and "AP50" in printed
    assert str(tmp_path / "detections.png") in printed
    sheet = Image.open(tmp_path / "detections.png")
    assert sheet.width > 4 * demo.SIZE  # truth and detections of two images in a row
    assert {path.name for path in tmp_path.iterdir()} == {"data", "run", "predictions", "detections.png"}
    assert len(json.loads((tmp_path / "predictions" / "predictions.json").read_text())["images"]) == 2
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert set(metrics) == {"bbox", "segm"}
