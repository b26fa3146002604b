"""Ablation at a smaller size: results, continuation after an interruption, errors."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
from PIL import Image

from dcnops.detector.__main__ import main
from dcnops.detector.config import Config
from dcnops.detector.engine import SUMMARY, training
from dcnops.detector.model import Count
from dcnops.detector.recipes import ablation
from dcnops.detector.recipes.ablation import Row, ablation_config, table
from dcnops.detector.variants import Variant
from tests.detector.configurations import assignments

TINY = assignments(
    training="epochs=1 batch_size=2",
    network="min_size=64 max_size=64 roi_batch=16 rpn_candidates_train=100 rpn_candidates_test=100 proposals_train=50 "
    "proposals_test=20 neck_channels=16 head_channels=32",
)


@pytest.fixture
def command(tmp_path, monkeypatch):
    for name, value in (("ABLATION_IMAGES", (4, 2)), ("SIZE", 64), ("TIMED_ITERATIONS", 1)):
        monkeypatch.setattr(ablation, name, value)
    out = str(tmp_path / "out")
    return ["ablate", "--out", out, "--device", "cpu", "--variants", "regular", "dcnv2:fg", "--set", *TINY]


def runs_of(monkeypatch: pytest.MonkeyPatch, failing: list[int]) -> list[tuple[str, int, bool]]:
    """List preset, seed and `resume` of each training; those numbered in `failing` stop after an iteration."""
    begun: list[tuple[str, int, bool]] = []
    train = training.train

    def noting(model: Any, config: Config, *args: Any, resume: bool, **options: Any) -> Any:
        begun.append((config.network.preset, config.training.seed, resume))
        if len(begun) - 1 not in failing:
            return train(model, config, *args, resume=resume, **options)
        step = training.Trainer.step
        with monkeypatch.context() as patch:
            patch.setattr(training.Trainer, "step", lambda *a: step(*a)._replace(stop=2))
            return train(model, config, *args, resume=resume, **options)

    monkeypatch.setattr(training, "train", noting)
    return begun


@pytest.mark.slow
def test_ablation_continues_after_an_interruption(command, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    failing = [1]
    begun = runs_of(monkeypatch, failing)
    assert main([*command, "--seeds", "1"]) == 130
    assert begun == [("regular", 0, False), ("dcnv2", 0, False)]
    assert [row["variant"] for row in json.loads((out / "results.json").read_text())["rows"]] == ["regular"]

    begun.clear()
    failing.clear()
    assert main([*command, "--seeds", "2"]) == 0
    assert begun == [("dcnv2", 0, True), ("regular", 1, False), ("dcnv2", 1, False)]
    document = json.loads((out / "results.json").read_text())
    assert [(row["variant"], row["seeds"]) for row in document["rows"]] == [("regular", [0, 1]), ("dcnv2:fg", [0, 1])]
    for row in document["rows"]:
        for seed, metrics in zip(row["seeds"], row["metrics"]):
            folder = Variant.parse(row["variant"]).folder
            written = json.loads((out / "runs" / folder / f"seed{seed}" / "metrics.json").read_text())
            assert all(metrics[kind][name] == written[kind][name] for kind in ("bbox", "segm") for name in SUMMARY)
        assert row["seconds_per_iteration"] > 0 and row["macs"] > 1e9
    text = (out / "table.md").read_text()
    assert text.count("| `regular` |  |") == 2 and text.count("| `dcnv2` | fg |") == 2  # boxes and masks
    assert Image.open(out / "plot.png").width > 600
    assert not list(out.rglob("checkpoint.pth"))

    begun.clear()
    assert main([*command, "--seeds", "2"]) == 0
    assert begun == []  # everything was finished
    assert text.strip() in capsys.readouterr().out

    assert main([*command, "training.lr=0.5"]) == 2
    assert "has an experiment with other options or data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        (["dcnv3"], "a variant must be one of regular-roipool, "),
        (["dcnv2:most"], "stands fg, bg, all or none, got 'dcnv2:most'"),
        (["dcnv2", "dcnv2"], "each variant can be there once"),
    ],
)
def test_wrong_variants(variants, message, tmp_path, capsys):
    assert main(["ablate", "--out", str(tmp_path / "out"), "--device", "cpu", "--variants", *variants]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_variants_change_only_preset_mimicking_and_seed():
    config = ablation_config("reduced")
    assert Variant.parse("regular").configure(config, 0).mimics() is None
    mimics = Variant.parse("dcnv2-mimic").configure(config, 3).mimics()
    assert mimics is not None and mimics.regions == "fg" and mimics.boxes == 8
    assert Variant.parse("dcnv2-mimic:none").configure(config, 3).mimics() is None
    changed = Variant.parse("regular:bg").configure(config, 3)
    found = changed.mimics()
    assert found is not None and found.regions == "bg"
    assert changed == config.set(["network.preset=regular", "mimicking.regions=bg", "training.seed=3"])


def test_full_scale_has_the_numbers_of_the_paper():
    config = ablation_config("full")
    assert config.network.backbone == "resnet50" and config.network.min_size == 800
    assert config.mimicking.boxes == 32 and config.training.epochs == 16


def test_table():
    def run(ap: float) -> dict[str, dict[str, Any]]:
        return {"bbox": {**dict.fromkeys(SUMMARY, ap), "APl": None}}

    rows = [
        Row(Variant("regular", None), (0, 1), (run(0.25), run(0.35)), Count(5 * 2**19, 17 * 2**30), 0.25),
        Row(Variant("dcnv2-mimic", None), (0,), (run(0.5),), Count(3 * 2**20, 18 * 2**30), 1.5),
    ]
    lines = table(rows).splitlines()
    assert len(lines) == 4
    spread = f"30.0 ± {100 * math.sqrt(2 * 0.05**2):.1f}"
    assert lines[2] == (
        f"| `regular` |  | {spread} | {spread} | {spread} | {spread} | {spread} | - | 2 | 2.50 | 17.0 | 0.25 |"
    )
    assert lines[3] == "| `dcnv2-mimic` | fg | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 | - | 1 | 3.00 | 18.0 | 1.50 |"
    assert re.fullmatch(r"\| preset \| mimics \| box AP \| AP50 .*", lines[0])
