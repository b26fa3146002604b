"""Detectors of other projects: recognition, conversion, and equality with what the projects compute."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.image_list import ImageList

from dcnops.adapters.torch import deform_roi_pool
from dcnops.detector.config import Config
from dcnops.detector.data import Category
from dcnops.detector.errors import UserError
from dcnops.detector.model import build_detector, load_detector, read_initial_detector
from dcnops.detector.model.foreign_checkpoints import convert_detector
from dcnops.detector.model.mmdetection_config import StoredConfig, read_stored_config
from dcnops.detector.predict.inference import decode_rle, infer, paste_masks
from tests.detector.model.foreign_detectors import DETECTRON2, MMDETECTION, NECK, Body, Reference, detector, paste

CPU = torch.device("cpu")
R50, R101 = (3, 4, 6, 3), (3, 4, 23, 3)
SIZE = (150, 203)  # height and width of an image


def branches(name: str, *widths: int) -> dict[str, Tensor]:
    """Return fully connected layers with the names of mmcv's RoI pooling."""
    return {
        f"roi_head.bbox_roi_extractor.roi_layers.{level}.{name}.{2 * index}.{leaf}": torch.randn(
            (outputs, inputs) if leaf == "weight" else (outputs,)
        )
        / inputs
        for level in range(4)
        for index, (inputs, outputs) in enumerate(pairwise(widths))
        for leaf in ("weight", "bias")
    }


def dpool() -> dict[str, Tensor]:
    return detector(MMDETECTION, masks=False) | branches("offset_fc", 49 * NECK, 16, 16, 98)


def mdpool() -> dict[str, Tensor]:
    return dpool() | branches("mask_fc", 49 * NECK, 16, 49)


def network(state: dict[str, Tensor], **options: Any) -> dict[str, Any]:
    converted = convert_detector({"state_dict": state, **options}, Path("file.pth"))
    assert converted is not None
    found: dict[str, Any] = converted["config"]["network"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (Body(), {"preset": "regular"}),
        (Body(offsets=18), {"preset": "dconv-c3c5"}),
        (Body(R101, offsets=27), {"convolution": "modulated", "backbone": "resnet101", "conv_mask_scale": 1}),
        (Body(offsets=108), {"convolution": "modulated", "stages": "c3c5", "pooling": "aligned", "deform_groups": 4}),
        (Body(R101, 128, 32, 18), {"preset": "dconv-c3c5", "backbone": "resnext101_32x4d"}),
        (Body(R101, 256, 64), {"preset": "regular", "backbone": "resnext101_64x4d"}),
    ],
    ids=["regular", "dconv", "r101 mdconv", "mdconv group4", "x101 dconv", "x101"],
)
@pytest.mark.parametrize("masks", [True, False], ids=["mask", "faster"])
def test_networks_of_mmdetection(body, expected, masks):
    found = network(detector(MMDETECTION, body, masks=masks))
    expected = {"detector": "mask" if masks else "faster-fpn", "sampling_ratio": 0, "aligned": True, **expected}
    assert {name: found[name] for name in expected} == expected
    assert found["exact_anchors"] and found["aligned_masks"] and found["resize"] == "opencv"
    assert found["stride_style"] == "torchvision" and found["norm_eps"] == 1e-5


def test_networks_with_deformable_pooling_of_mmdetection():
    for state, pooling in ((dpool(), "deformable"), (mdpool(), "modulated")):
        found = network(state)
        assert found["pooling"] == pooling and found["pool_branch"] == "mmcv" and not found["share_branch"]
        assert found["convolution"] == "regular" or found["preset"] == "regular"


def test_networks_of_detectron2():
    found = network(detector(DETECTRON2, Body(offsets=18)))
    assert found["preset"] == "dconv-c3c5" and found["detector"] == "mask" and found["stride_style"] == "caffe"
    assert found["resize"] == "pillow" and found["image_std"] == [1 / 255] * 3
    found = network(detector(DETECTRON2, Body(R101, 256, 32), masks=False))
    assert found["backbone"] == "resnext101_32x8d" and found["stride_style"] == "torchvision"
    assert found["detector"] == "faster-fpn" and found["image_std"] == [0.229, 0.224, 0.225]
    older = {"pixel_mean": torch.tensor([25.5, 51, 102]).view(3, 1, 1), "pixel_std": torch.full((3, 1, 1), 51.0)}
    found = network(detector(DETECTRON2) | older)  # blue, green, red
    assert found["image_mean"] == [0.4, 0.2, 0.1] and found["image_std"] == [0.2] * 3


CONFIG_2 = """
model = dict(type='MaskRCNN', backbone=dict(type='ResNet', style='caffe', norm_cfg=dict(requires_grad=False)),
    rpn_head=dict(anchor_generator=dict(scales=[4], ratios=[0.5, 1.0], strides=[4, 8, 16, 32, 64])),
    test_cfg=dict(rcnn=dict(score_thr=0.1, nms=dict(type='nms', iou_threshold=0.6), max_per_img=50)))
img_norm_cfg = dict(mean=[25.5, 51.0, 102.0], std=[51.0, 51.0, 25.5], to_rgb=False)
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='MultiScaleFlipAug', img_scale=(640, 480), flip=False)]
work_dir = open('file')
"""
CONFIG_3 = """
model = dict(data_preprocessor=dict(bgr_to_rgb=True, mean=[102.0, 51.0, 25.5], std=[51.0, 51.0, 51.0]))
test_pipeline = [dict(backend_args=None, type='LoadImageFromFile'), dict(scale=(640, 480), type='Resize')]
"""


def test_stored_configuration_of_mmdetection():
    state = detector(MMDETECTION, masks=False)
    state["rpn_head.rpn_cls.weight"], state["rpn_head.rpn_cls.bias"] = torch.zeros(2, NECK, 1, 1), torch.zeros(2)
    state["rpn_head.rpn_reg.weight"], state["rpn_head.rpn_reg.bias"] = torch.zeros(8, NECK, 1, 1), torch.zeros(8)
    meta = {"config": CONFIG_2, "CLASSES": ("ant", "bee", "cat")}
    converted = convert_detector({"state_dict": state, "meta": meta}, Path("file.pth"))
    assert converted is not None
    assert converted["categories"] == [Category(1, "ant"), Category(2, "bee"), Category(3, "cat")]
    found = converted["config"]["network"]
    assert found["stride_style"] == "caffe" and found["anchor_sizes"] == [16, 32, 64, 128, 256]
    assert found["anchor_ratios"] == [0.5, 1] and (found["min_size"], found["max_size"]) == (480, 640)
    assert found["image_mean"] == [0.4, 0.2, 0.1] and found["image_std"] == [0.1, 0.2, 0.2]
    assert (found["score_threshold"], found["detection_nms"], found["max_detections"]) == (0.1, 0.6, 50)
    assert torch.equal(converted["model"]["backbone.body.conv1.weight"], state["backbone.conv1.weight"].flip(1))
    state = detector(MMDETECTION, categories=80)
    meta = {"cfg": CONFIG_3, "dataset_meta": {"classes": tuple("abc")}}  # of other data: not its names
    converted = convert_detector({"state_dict": state, "meta": meta}, Path("file.pth"))
    assert converted is not None and converted["categories"][79] == Category(90, "toothbrush")
    found = converted["config"]["network"]
    assert found["min_size"] == 480 and found["image_mean"] == [0.4, 0.2, 0.1]
    assert torch.equal(converted["model"]["backbone.body.conv1.weight"], state["backbone.conv1.weight"])


def check_body_of_detectron2(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Images are blue, green, red in 0..255 less the mean, and strides are in the 1x1 convolutions."""
    image = torch.rand(3, 20, 30)
    bgr = image.flip(0) * 255 - torch.tensor([103.53, 116.28, 123.675])[:, None, None]
    weight = state["backbone.bottom_up.stem.conv1.weight"]
    expected = nn.functional.conv2d(bgr[None], weight, stride=2, padding=3)
    body = model.backbone.body
    with torch.no_grad():
        assert torch.allclose(body.conv1(model.transform.normalize(image)[None]), expected, rtol=1e-4, atol=0.05)
    for layer in (body.layer2, body.layer3, body.layer4):
        assert layer[0].conv1.stride == (2, 2) and layer[0].conv2.stride == (1, 1)
    for own, given in (
        ("layer4.2.bn3.running_var", "res5.2.conv3.norm.running_var"),
        ("layer2.0.conv2.conv_offset.bias", "res3.0.conv2_offset.bias"),
        ("layer1.0.downsample.0.weight", "res2.0.shortcut.weight"),
        ("layer3.0.downsample.1.bias", "res4.0.shortcut.norm.bias"),
    ):
        assert torch.equal(body.state_dict()[own], state[f"backbone.bottom_up.{given}"])
    assert torch.equal(model.backbone.fpn.inner_blocks[3][0].weight, state["backbone.fpn_lateral5.weight"])


@pytest.mark.parametrize(
    "config",
    [
        "model = dict(rpn_head=dict(anchor_generator=[8]), test_cfg=3)\nimg_norm_cfg = [1]\ntest_pipeline = steps",
        "test_pipeline = [None, dict(scale=None), dict(img_scale=[(640, 480), (800, 600)])]\n(a, b) = {[1]: 2}, {**c}",
        "img_norm_cfg = dict(mean=[None], std='a', to_rgb=1)\nmodel = dict(**base, rpn_head=dict(anchor_generator=dict("
        "scales=['a'], strides=[(4, 4), (8, 8)], ratios=True)))",
        "model = dict(",
        "(" * 1000,
        "\0",
        5,
    ],
)
def test_a_stored_configuration_that_says_nothing(config):
    for meta in ({"cfg": config, "dataset_meta": 3}, {"config": config, "CLASSES": None}):
        assert read_stored_config(meta) == StoredConfig({}, [], None)


@pytest.mark.slow
@pytest.mark.parametrize("names", [MMDETECTION, DETECTRON2], ids=["mmdetection", "detectron2"])
def test_heads_compute_what_the_projects_compute(names, tmp_path):
    state = detector(names, Body(offsets=27 if names is MMDETECTION else 18))
    torch.save({"state_dict" if names is MMDETECTION else "model": state}, tmp_path / "model.pth")
    lines: list[str] = []
    model, config, categories = load_detector(tmp_path / "model.pth", CPU, report=lines.append)
    if names is DETECTRON2:
        check_body_of_detectron2(model, state)
    assert len(lines) == 1 and "3 categories, with names that are not in the file" in lines[0]
    assert [category.name for category in categories] == ["category 1", "category 2", "category 3"]
    torch.manual_seed(1)
    model.double()  # rounding could change which boxes are kept
    maps = [
        6 * torch.randn(1, NECK, -(-SIZE[0] // stride), -(-SIZE[1] // stride)).double() for stride in (4, 8, 16, 32, 64)
    ]
    reference = Reference(state, names, maps, SIZE)
    features = dict(zip(("0", "1", "2", "3", "pool"), maps))
    padded = ImageList(torch.zeros(1, 3, 160, 224).double(), [SIZE])
    with torch.no_grad():
        proposals, _ = model.rpn(padded, features)
        expected = reference.proposals()
        assert proposals[0].shape == expected.shape and torch.allclose(proposals[0], expected, atol=1e-3)
        (found,), _ = model.roi_heads(features, [expected], [SIZE])
        boxes, scores, labels = reference.detections(expected)
        assert len(boxes) == 100 and set(labels.tolist()) == {0, 1, 2}
        assert torch.equal(found["labels"], labels + 1)
        assert torch.allclose(found["boxes"], boxes, atol=1e-3) and torch.allclose(found["scores"], scores, atol=1e-5)
        masks = reference.masks(boxes, labels)
        assert torch.allclose(found["masks"][:, 0], masks, atol=1e-4)
    pasted = paste_masks(masks[:10], boxes[:10], SIZE[::-1], aligned=config.network.aligned_masks)
    drawn = torch.from_numpy(np.stack([decode_rle(mask) for mask in pasted]))
    assert (drawn.bool() != paste(masks[:10], boxes[:10], SIZE)).float().mean() < 1e-4  # ties of rounding


@pytest.mark.slow
def test_modulated_pooling_of_mmdetection_has_a_branch_per_level(tmp_path):
    state = mdpool()
    torch.save({"state_dict": state}, tmp_path / "model.pth")
    model, _, _ = load_detector(tmp_path / "model.pth", CPU)
    maps = {str(level): torch.randn(1, NECK, 320 >> level, 320 >> level) for level in range(4)}
    sides = torch.tensor([50.0, 150, 300, 500])  # one box per level
    boxes = torch.cat([torch.full((4, 2), 3.3), 3.3 + sides[:, None].expand(4, 2)], 1)
    pooled = model.roi_heads.box_roi_pool(maps, [boxes], [(1280, 1280)])

    def branch(level: int, name: str, x: Tensor) -> Tensor:
        prefix = f"roi_head.bbox_roi_extractor.roi_layers.{level}.{name}"
        for index in range(3 if name == "offset_fc" else 2):
            x = x.relu() if index else x
            x = nn.functional.linear(x, *(state[f"{prefix}.{2 * index}.{leaf}"] for leaf in ("weight", "bias")))
        return x

    for level in range(4):
        box = torch.cat([torch.zeros(1, 1), boxes[level : level + 1]], 1)
        options: dict[str, Any] = {
            "output_size": 7,
            "spatial_scale": 0.25 / 2**level,
            "sampling_ratio": 0,
            "gamma": 0.1,
        }
        plain = deform_roi_pool(maps[str(level)], box, None, **options).flatten(1)
        offset = branch(level, "offset_fc", plain).view(1, 2, 7, 7)
        mask = branch(level, "mask_fc", plain).sigmoid().view(1, 7, 7)
        expected = deform_roi_pool(maps[str(level)], box, offset, mask=mask, **options)
        assert torch.allclose(pooled[level], expected[0], atol=1e-5)
        assert not torch.allclose(mask, torch.tensor(0.5), atol=1e-3)


@pytest.mark.slow
def test_detections_of_torchvision(tmp_path):
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_classes": 5, "min_size": 64, "max_size": 96, "box_detections_per_img": 20}
    options["rpn_post_nms_top_n_test"] = 50
    theirs = detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, **options).eval()
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if name.endswith(("cls_score.weight", "mask_fcn_logits.weight")):
                value.normal_(std=0.3)
    state = theirs.state_dict()
    older = {  # names before torchvision 0.14
        name.replace("_blocks.0.0.", "_blocks.0.").replace("rpn.head.conv.0.0.", "rpn.head.conv."): value
        for name, value in state.items()
    }
    torch.save(older, tmp_path / "model.pth")
    changes = ["network.min_size=64", "network.max_size=96", "network.max_detections=20", "network.proposals_test=50"]
    lines: list[str] = []
    ours, config, _ = load_detector(tmp_path / "model.pth", CPU, changes, report=lines.append)
    parameters = sum("num_batches_tracked" not in name for name in state)
    assert f"{parameters} parameters used, 6 of them renamed; left out: num_batches_tracked" in lines[0]
    assert config.network.norm_eps == 1e-5
    image = torch.rand(3, 80, 61)
    with torch.no_grad():
        (expected,) = theirs([image])
    (found,) = infer(ours, [image], [(61, 80)])
    assert len(expected["boxes"]) == 20 and torch.equal(found.labels, expected["labels"])
    assert torch.allclose(found.boxes, expected["boxes"], atol=1e-4)
    assert torch.allclose(found.scores, expected["scores"], atol=1e-4)
    assert found.masks is not None
    drawn = torch.from_numpy(np.stack([decode_rle(mask) for mask in found.masks]))
    assert (drawn.bool() != (expected["masks"][:, 0] >= 0.5)).float().mean() < 1e-3
    frozen = {name: value for name, value in state.items() if "num_batches_tracked" not in name}
    assert network(frozen)["norm_eps"] == 0  # of the published weights
    boxes_only = {name: value for name, value in state.items() if ".mask_" not in name}
    found_network = network(boxes_only)
    assert found_network["detector"] == "faster-fpn" and not found_network["aligned"]


@pytest.mark.slow
def test_files_that_are_refused(tmp_path):
    path = tmp_path / "model.pth"

    def message(state: object) -> str:
        with pytest.raises(UserError) as caught:
            convert_detector(state, path)
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
        return str(caught.value)

    state = detector(MMDETECTION)
    assert "mixes detectors of mmdetection and detectron2" in message(state | detector(DETECTRON2))
    less = {name: value for name, value in state.items() if name != "backbone.layer3.4.bn2.bias"}
    assert "it has no backbone.body.layer3.4.bn2.bias" in message(less)
    assert "it has the unknown neck.gates.0.weight" in message(state | {"neck.gates.0.weight": torch.ones(1)})
    cascade = {name.replace("bbox_head.", "bbox_head.0."): value for name, value in state.items()}
    assert "is a detector of mmdetection that this program cannot build: it is of Cascade R-CNN" in message(cascade)
    first = {name.replace("roi_head.", ""): value for name, value in state.items()}
    assert "it is of mmdetection 1, which" in message(first)
    agnostic = state | {f"roi_head.bbox_head.fc_reg.{leaf}": torch.ones(4, *more) for leaf, more in
                        (("weight", (16,)), ("bias", ()))}  # fmt: skip
    assert "has 4 rows, needs 12 for 3 categories" in message(agnostic)
    assert "its backbone has 8 blocks in conv4" in message(detector(MMDETECTION, Body((3, 4, 8, 3))))
    with torch.device("meta"):
        own = build_detector(Config().set(["network.detector=mask"]).network, 3).state_dict()
    assert "it has deformable layers, which torchvision's detectors do not have; of a detector of this" in message(own)
    stage = {name: value for name, value in detector(MMDETECTION, Body(offsets=27)).items()
             if "conv_offset" not in name or "layer3" in name}  # fmt: skip
    assert "its deformable convolutions are in layer3" in message(stage)
    torch.save({"weight": torch.ones(2)}, path)
    with pytest.raises(UserError, match="no Faster or Mask R-CNN of torchvision, mmdetection or detectron2"):
        load_detector(path, CPU)
    torch.save(state | {"rpn_head.rpn_cls.bias": torch.full((3,), float("nan"))}, path)
    with pytest.raises(UserError, match=r"rpn\.head\.cls_logits\.bias has values that are not finite"):
        load_detector(path, CPU)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="or only a part of one"):
        load_detector(path, CPU)
    torch.save(state, path)
    with pytest.raises(UserError, match="is a detector for 3 categories, got 2 names"):
        load_detector(path, CPU, categories=[Category(1, "a"), Category(2, "b")])


def test_only_the_backbone_of_another_network_starts_a_training(tmp_path):
    cascade = {name.replace("bbox_head.", "bbox_head.0."): value for name, value in detector(MMDETECTION).items()}
    torch.save(cascade, tmp_path / "model.pth")
    lines: list[str] = []
    assert read_initial_detector(str(tmp_path / "model.pth"), lines.append) is None
    assert "it is of Cascade R-CNN; only its backbone is used" in lines[0]
