"""Benchmark of the network without deformable layers: both contenders compute the same."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import regular
from benchmarks.operations import OURS, PEER


@pytest.mark.slow
def test_both_networks_take_a_training_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    torch.set_num_threads(1)
    few = {"proposals_train": 20, "roi_batch": 8}
    monkeypatch.setattr(regular, "NetworkConfig", functools.partial(regular.NetworkConfig, **few))
    models: list[Any] = []
    build = regular.build_models
    monkeypatch.setattr(regular, "build_models", lambda *arguments: models.extend(build(*arguments)) or models)
    output = tmp_path / "regular.json"
    options = ["--device", "cpu", "--size", "32", "--batch", "1", "--seconds", "0", "--output", str(output)]
    assert regular.main(options) == 0
    (row,) = json.loads(output.read_text())["results"]
    assert row["features_differ_by"] < 1e-3
    assert row["ratio"] == row["timings"][OURS]["median_ms"] / row["timings"][PEER]["median_ms"]
    proposals = [(model.rpn._pre_nms_top_n["training"], model.rpn._post_nms_top_n["training"]) for model in models]
    assert proposals == [(2000, 20)] * 2
    assert [model.roi_heads.fg_bg_sampler.batch_size_per_image for model in models] == [8, 8]


def test_other_features_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    class Network(torch.nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.backbone = lambda images: {"0": torch.full((1, 1), value)}
            self.transform = lambda images: (type("Images", (), {"tensors": images[0]}), None)

    monkeypatch.setattr(regular, "build_models", lambda config, device: (Network(1.0), Network(2.0)))
    output = tmp_path / "regular.json"
    assert regular.main(["--device", "cpu", "--size", "8", "--output", str(output)]) == 1
    assert "the features differ by 5.0e-01" in capsys.readouterr().err and not output.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_is_named_if_there_is_none(capsys: pytest.CaptureFixture[str]):
    assert regular.main([]) == 1
    assert "needs a GPU (or --device cpu)" in capsys.readouterr().err
