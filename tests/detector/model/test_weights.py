"""Pretrained weights by name and from files, for networks with and without deformable layers."""

from __future__ import annotations

import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models import ResNet50_Weights
from torchvision.models.resnet import resnet50

from dcnops.detector.config import Config
from dcnops.detector.errors import UserError
from dcnops.detector.model import build_detector, load_backbone


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    plain = resnet50()
    return {name: value.clone() for name, value in plain.state_dict().items()}


@pytest.fixture(scope="module")
def detector():
    return build_detector(Config().network, 3)


def save(state: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **{name: value.half().numpy() for name, value in state.items() if "num_batches" not in name})
    elif path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
def test_files_leave_exactly_the_branches(state, detector, tmp_path, suffix):
    branches = {name: value.clone() for name, value in detector.state_dict().items() if "conv_offset" in name}
    missing = load_backbone(detector, str(save(state, tmp_path / f"weights{suffix}")), "resnet50")
    layers = {2: 4, 3: 6, 4: 3}
    assert missing == [
        f"layer{stage}.{block}.conv2.conv_offset.{leaf}"
        for stage, blocks in layers.items()
        for block in range(blocks)
        for leaf in ("weight", "bias")
    ]
    loaded = detector.backbone.body.state_dict()
    tolerance = 1e-3 if suffix == ".npz" else 0
    for name in ("conv1.weight", "layer1.0.conv2.weight", "layer4.2.conv2.weight", "layer3.5.bn3.running_var"):
        assert torch.allclose(loaded[name], state[name], rtol=tolerance, atol=tolerance)
    assert all(torch.equal(detector.state_dict()[name], value) for name, value in branches.items())


def test_branches_of_a_file_are_loaded(state, detector, tmp_path):
    """Branches with the names of other libraries."""
    branches = {
        f"{name.removesuffix('.weight')}.conv_offset_mask.{leaf}": torch.full(shape, 0.5)
        for name, value in state.items()
        if name.endswith("conv2.weight") and "layer1" not in name
        for leaf, shape in (("weight", (27, value.shape[1], 3, 3)), ("bias", (27,)))
    }
    assert load_backbone(detector, str(save({**state, **branches}, tmp_path / "dcn.pth")), "resnet50") == []
    conv = detector.backbone.body.layer3[1].conv2.conv_offset
    assert (conv.weight == 0.5).all()
    with torch.no_grad():
        for name, value in detector.named_parameters():
            if "conv_offset" in name:
                value.zero_()


@pytest.mark.slow
@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"backbone.{name}",
        lambda name: f"module.backbone.body.{name}",
        lambda name: name.replace("layer1.", "layer1._orig_mod."),
    ],
    ids=["compiled", "compiled and parallel", "backbone", "detector", "compiled part"],
)
def test_prefixes_of_wrappers(state, detector, tmp_path, rename):
    renamed = {rename(name): value for name, value in state.items()}
    if next(iter(renamed)).partition("conv1")[0].endswith(("backbone.", "body.")):
        renamed["roi_head.fc.weight"] = torch.zeros(2)  # other parts of a detector are ignored
    torch.save(renamed, tmp_path / "weights.pth")
    detector.backbone.body.conv1.weight.data.zero_()
    assert all("conv_offset" in name for name in load_backbone(detector, str(tmp_path / "weights.pth"), "resnet50"))
    assert torch.equal(detector.backbone.body.conv1.weight, state["conv1.weight"])


def test_names_of_torchvision(state, detector, monkeypatch):
    asked = []

    def fetch(self: ResNet50_Weights, **options: Any) -> dict[str, Tensor]:
        asked.append(self)
        return state

    monkeypatch.setattr(ResNet50_Weights, "get_state_dict", fetch)
    load_backbone(detector, "imagenet", "resnet50")
    load_backbone(detector, "IMAGENET1K_V2", "resnet50")
    assert asked == [ResNet50_Weights.IMAGENET1K_V1, ResNet50_Weights.IMAGENET1K_V2]


def test_no_network(detector, monkeypatch):
    def fetch(self: ResNet50_Weights, **options: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(ResNet50_Weights, "get_state_dict", fetch)
    with pytest.raises(UserError, match=r"could not be downloaded .*no route to host"):
        load_backbone(detector, "imagenet", "resnet50")


@pytest.mark.slow
def test_wrong_weights(state, detector, tmp_path):
    def message(source: Path | str, backbone: str = "resnet50") -> str:
        with pytest.raises(UserError) as caught:
            load_backbone(detector, str(source), backbone)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    before = {name: value.clone() for name, value in detector.state_dict().items()}
    assert message(tmp_path / "none.pth").startswith("there is no file of weights")
    for suffix in (".pth", ".safetensors", ".npz"):
        (tmp_path / f"bad{suffix}").write_bytes(b"these are no weights")
        assert "cannot be read as weights" in message(tmp_path / f"bad{suffix}")
    assert "one of imagenet, IMAGENET1K_V1" in message("imagenet22k")
    assert "small backbone has no pretrained weights" in message("imagenet", "small")
    for suffix in (".pth", ".npz"):
        path = save(state, tmp_path / f"damaged{suffix}")
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        assert "is damaged" in message(path)
    # Files of a few kilobytes: one value for all elements of a parameter.
    state = {name: value.new_zeros(()).expand(value.shape) for name, value in state.items()}
    less = {name: value for name, value in state.items() if name != "layer2.0.conv1.weight"}
    assert "lacks layer2.0.conv1.weight" in message(save(less, tmp_path / "less.pth"))
    more = {**state, "layer5.weight": torch.zeros(1)}
    assert "has the unknown layer5.weight" in message(save(more, tmp_path / "more.pth"))
    other = {**state, "conv1.weight": torch.zeros(64, 1, 7, 7)}
    assert "conv1.weight has the shape [64, 1, 7, 7]" in message(save(other, tmp_path / "grey.pth"))
    for suffix in (".pth", ".npz"):
        infinite = {**state, "conv1.weight": torch.full((64, 3, 7, 7), float("inf"))}
        assert "not finite" in message(save(infinite, tmp_path / f"infinite{suffix}"))
    torch.save({**state, "conv1.weight": state["conv1.weight"].int()}, tmp_path / "whole.pth")
    assert "conv1.weight has the data type torch.int32" in message(tmp_path / "whole.pth")
    torch.save(dict(enumerate(state.values())), tmp_path / "numbers.pth")
    assert "must hold a state dict" in message(tmp_path / "numbers.pth")
    torch.save({**state, "_orig_mod.conv1.weight": state["conv1.weight"]}, tmp_path / "twice.pth")
    assert "several parameters with the same name" in message(tmp_path / "twice.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    assert "must hold a state dict" in message(tmp_path / "list.pth")
    after = detector.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
