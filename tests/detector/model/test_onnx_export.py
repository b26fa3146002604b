"""ONNX files of whole detectors give the network's detections in onnxruntime."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from dcnops.detector.__main__ import main
from dcnops.detector.config import Config
from dcnops.detector.data import Category
from dcnops.detector.errors import UserError
from dcnops.detector.model import build_detector, export_onnx, save_checkpoint
from dcnops.detector.model.onnx_export import FixedSizeDetector
from tests.detector.configurations import assignments

pytestmark = pytest.mark.slow

SIZE = (50, 70)
CATEGORIES = [Category(3, "cat"), Category(7, "dog")]


def configure(*options: str) -> Config:
    tiny = assignments(
        network="backbone=small min_size=64 max_size=96 anchor_sizes=8,16,32,48,64 rpn_candidates_test=100 "
        "proposals_test=60 max_detections=20 score_threshold=0.3 neck_channels=32 head_channels=64"
    )
    return Config().set([*tiny, *(f"network.{option}" for option in options)])


def network(config: Config) -> nn.Module:
    """Return a network with random offsets and masks, and with scores and boxes that differ."""
    torch.manual_seed(0)
    model = build_detector(config.network, 2).eval()
    for name, parameter in model.named_parameters():
        if "offset" in name:
            nn.init.normal_(parameter, std=0.02)
        elif "predictor" in name and name.endswith("weight"):
            nn.init.normal_(parameter, std=0.1)
    return model


def images() -> Iterator[Tensor]:
    torch.manual_seed(1)
    yield from (torch.rand(3, *SIZE), torch.zeros(3, *SIZE), torch.rand(3, *SIZE) ** 3)


def assert_equal(found: Sequence[Tensor], model: nn.Module, image: Tensor) -> int:
    with torch.no_grad():
        expected = model([image])[0]
    if "masks" in expected:
        expected["masks"] = expected["masks"][:, 0]
    for name, values in zip(("boxes", "labels", "scores", "masks"), found):
        torch.testing.assert_close(values, expected[name], rtol=1e-4, atol=1e-4)
    assert len(found) == len(expected)
    return len(expected["scores"])


@pytest.mark.parametrize("detector", ["faster", "mask"])
def test_tensors_of_fixed_size_change_no_detection(detector):
    """Also with fewer proposals and detections than the limits, with as many, and without any."""
    options = [("score_threshold=0.3",), ("score_threshold=0.99",), ("rpn_nms=0.05", "score_threshold=0")]
    counts = []
    for option in (*options, ("max_detections=1000", "detection_nms=0.2", "score_threshold=0")):
        model = network(configure("preset=dcnv2", f"detector={detector}", *option))
        for image in images():
            with torch.no_grad():
                counts.append(assert_equal(FixedSizeDetector(model)(image[None]), model, image))
    assert 0 in counts and 20 in counts and any(20 < count < 120 for count in counts)


PRESETS = ("dcnv2", "dcnv1", "regular", "regular-roipool")
ALL = [(detector, preset) for detector in ("faster", "mask") for preset in PRESETS]


@pytest.mark.parametrize(
    ("detector", "preset"),
    # The time grows with the operators: few deformable layers and one level, then all.
    [("faster", "dcnv2 stages=c5"), *(pytest.param(*item, marks=pytest.mark.exhaustive) for item in ALL)],
)
def test_detections_in_onnxruntime(tmp_path, capsys, detector, preset):
    config = configure(f"detector={detector}", *f"preset={preset}".split())
    model = network(config)
    checkpoint, file = tmp_path / "model.pth", tmp_path / "new" / "model.onnx"
    save_checkpoint(checkpoint, model, config, CATEGORIES, 0)
    command = ["export", "--checkpoint", str(checkpoint), "--out", str(file), "--size", "50x70"]
    assert main(command) == 0
    assert "for images of 50x70 pixels" in capsys.readouterr().out
    assert {item.domain for item in onnx.load(file).opset_import} <= {"", "ai.onnx"}
    session = onnxruntime.InferenceSession(file)
    found = [len(session.run(None, {"image": image[None].numpy()})[2]) for image in images()]
    assert min(found) > 0
    for image in images():
        outputs = session.run(None, {"image": image[None].numpy()})
        assert_equal([torch.from_numpy(output) for output in outputs], model, image)
        assert all(first >= second for first, second in pairwise(outputs[2]))
    names = json.loads(session.get_modelmeta().custom_metadata_map["categories"])
    assert names == [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]


def test_wrong_exports(tmp_path, capsys):
    model = network(configure("preset=dcnv1", "sampling_ratio=0"))
    with pytest.raises(UserError, match=r"needs network\.sampling_ratio greater than 0"):
        export_onnx(model, tmp_path / "model.onnx", SIZE, CATEGORIES)
    with pytest.raises(UserError, match="longer side of the image must be at most 32 times"):
        export_onnx(model, tmp_path / "model.onnx", (10, 330), CATEGORIES)
    assert not any(tmp_path.iterdir())
    for size in ("800", "0x5", "800x1333x3", "axb"):
        assert main(["export", "--checkpoint", "x", "--out", "y", "--size", size]) == 2
        assert "--size must be HEIGHTxWIDTH in pixels, such as 800x1333, got" in capsys.readouterr().err
