"""Whole detectors as initial weights: what is used, what is left out, and what the user is told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dcnops.detector.config import Config
from dcnops.detector.data import Category
from dcnops.detector.errors import UserError
from dcnops.detector.model import (
    build_detector,
    load_initial_detector,
    read_initial_detector,
    save_checkpoint,
    starting_config,
)
from tests.detector.configurations import assignments

SMALL = "backbone=small detector=mask preset=regular neck_channels=8 head_channels=16"
CONFIG = Config().set(assignments(network=SMALL))
CATEGORIES = [Category(3, "cat"), Category(7, "dog")]


@pytest.fixture(scope="module")
def initial(tmp_path_factory):
    path = tmp_path_factory.mktemp("initial") / "model.pth"
    torch.manual_seed(0)
    save_checkpoint(path, build_detector(CONFIG.network, 2), CONFIG, CATEGORIES, 5)
    return read_initial_detector(str(path), pytest.fail)


def start(initial: dict[str, Any], categories: list[Category], **network: str) -> tuple[nn.Module, str, set[str]]:
    """Build another network, load the weights, and return it, the printed lines and the parameters that changed."""
    config = starting_config(initial, own_layers="preset" in network)
    assert config is not None
    torch.manual_seed(1)
    model = build_detector(
        config.set([f"network.{name}={value}" for name, value in network.items()]).network, len(categories)
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lines = load_initial_detector(model, initial, categories)
    after = model.state_dict()
    given = {name for name, value in after.items() if torch.equal(value, initial["model"].get(name, before[name] + 1))}
    assert all(torch.equal(value, before[name]) for name, value in after.items() if name not in given)
    return model, "\n".join(lines), given


def test_the_same_categories(initial):
    """Ids may differ, and the network is the checkpoint's."""
    _, lines, given = start(initial, [Category(1, "cat"), Category(2, "dog")])
    assert given == set(initial["model"])
    assert lines == f"{initial['path']}: {len(given)} parameters used"


def test_other_categories(initial):
    _, lines, given = start(initial, [Category(1, "ant"), Category(2, "bee"), Category(3, "cat")])
    heads = (
        "roi_heads.box_predictor.cls_score.",
        "roi_heads.box_predictor.bbox_pred.",
        "roi_heads.mask_predictor.mask_",
    )
    assert set(initial["model"]) - given == {f"{head}{leaf}" for head in (*heads[:2], f"{heads[2]}fcn_logits.")
                                             for leaf in ("weight", "bias")}  # fmt: skip
    assert "the last layers of the heads are left out, as the categories are others" in lines
    assert "kept the initial values of 6 parameters: roi_heads.box_predictor.cls_score.weight, " in lines


def test_another_network(initial):
    _, lines, given = start(initial, CATEGORIES, preset="dconv-c5", detector="faster-fpn")
    assert "left out 12 parameters that the network does not have: roi_heads.mask_head.0.0.weight" in lines
    assert "kept the initial values of 4 parameters: backbone.body.layer4.0.conv2.conv_offset.weight" in lines
    assert {name for name in initial["model"] if "mask" not in name} == given


def test_weights_that_do_not_fit(initial):
    with pytest.raises(UserError, match=r"fc6\.weight has the shape \[16, 392\], but \[32, 392\] is needed"):
        start(initial, CATEGORIES, head_channels="32")
    with pytest.raises(UserError, match="with a feature pyramid, which needs --detector mask or faster-fpn"):
        start(initial, CATEGORIES, detector="faster")
    with pytest.raises(UserError, match=r"it has no backbone\.body\.bn1\.running_mean"):
        start(initial, CATEGORIES, backbone="resnet50")


def test_options_of_the_network(initial):
    """Another preset replaces layers that were chosen apart from the preset of the file."""
    chosen = CONFIG.set(["network.convolution=modulated", "network.stages=c5"])
    content = {**initial, "config": chosen.to_dict()}
    kept, own = (starting_config(content, own_layers) for own_layers in (False, True))
    assert kept is not None and kept.network == chosen.network
    assert own is not None and own.set(["network.preset=dcnv2"]).network.title == "dcnv2"
    assert starting_config(None, own_layers=False) is None


def test_other_sources_are_no_detectors(tmp_path):
    weights = {"conv1.weight": torch.ones(2)}
    torch.save(weights, tmp_path / "zip.pth")
    torch.save(weights, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(weights, tmp_path / "resnet.safetensors")
    np.savez(tmp_path / "resnet.npz", **{name: value.numpy() for name, value in weights.items()})
    files = [str(path) for path in tmp_path.iterdir()]
    assert len(files) == 4
    for source in ("imagenet", str(tmp_path / "absent.pth"), *files):
        assert read_initial_detector(source, pytest.fail) is None
