"""Configuration: defaults, assignments, JSON."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from dcnops.detector.command_options import COMMANDS
from dcnops.detector.config import SECTIONS, Config, NetworkConfig, describe_options
from dcnops.detector.errors import UserError
from dcnops.detector.presets import PRESETS


def test_the_papers_numbers():
    network, training = Config().network.resolve(), Config().training
    assert (network.min_size, network.max_size) == (800, 1333)
    assert (network.rpn_batch, network.rpn_positive_fraction, network.rpn_nms) == (256, 0.5, 0.7)
    assert (network.proposals_train, network.proposals_test) == (2000, 1000)
    assert (network.roi_batch, network.roi_positive_fraction) == (512, 0.25)
    assert (network.score_threshold, network.detection_nms, network.max_detections) == (0.05, 0.5, 100)
    assert (network.gamma, network.conv_mask_scale, network.roi_mask_scale, network.deform_groups) == (0.1, 2.0, 1.0, 1)
    assert (network.frozen_stages, network.neck_channels, network.head_channels) == (2, 256, 1024)
    assert (training.lr, training.lr_batch, training.momentum, training.weight_decay) == (0.02, 16, 0.9, 1e-4)
    assert (training.epochs, training.lr_steps) == (16, (10, 14))
    assert (network.box_loss_beta, network.aligned_masks) == (1, True)


def test_numbers_that_depend_on_backbone_and_detector():
    small = Config().set(["network.backbone=small"]).network.resolve()
    assert (small.frozen_stages, small.neck_channels, small.head_channels) == (0, 64, 256)
    assert (small.rpn_candidates_train, small.rpn_candidates_test) == (12000, 6000)
    pyramid = Config().set(["network.detector=mask", "network.frozen_stages=0"]).network.resolve()
    assert (pyramid.rpn_candidates_train, pyramid.rpn_candidates_test, pyramid.frozen_stages) == (2000, 1000, 0)
    assert pyramid.resolve() == pyramid
    assert Config().set(["network.detector=faster-fpn"]).network.resolve().rpn_candidates_test == 1000


def test_layers_that_differ_from_the_preset():
    network = Config().set(["network.preset=dcnv2"]).network
    assert network.layers == PRESETS["dcnv2"] and network.title == "dcnv2"
    network = Config().set(["network.preset=regular", "network.convolution=modulated", "network.stages=c2c5"]).network
    assert network.layers[:3] == ("modulated", ("layer1", "layer2", "layer3", "layer4"), "aligned")
    assert network.title == "regular-modulated-c2c5"
    network = Config().set(["network.convolution=regular", "network.pooling=quantised"]).network
    assert network.layers[:3] == ("regular", (), "quantised")


def test_assignments():
    assignments = "network.gamma=1 network.share_branch=no training.lr_steps=2,3.5 network.backbone=small"
    config = Config().set([*assignments.split(), "training.epochs = 4"])
    assert config.network.gamma == 1.0 and isinstance(config.network.gamma, float)
    assert config.network.share_branch is False
    assert config.training.lr_steps == (2.0, 3.5)
    assert config.training.epochs == 4
    assert Config().set(["training.lr_steps="]).training.lr_steps == ()
    assert Config() == Config().set([])


@pytest.mark.parametrize(
    "assignment, message",
    [
        ("gamma", "--set needs section.option=value, got 'gamma'"),
        ("gamma=1", "--set gamma: there is no such option"),
        ("network.gama=1", "--set network.gama: there is no such option"),
        ("network.gamma=wide", "network.gamma must be a number, got 'wide'"),
        ("network.gamma=nan", "network.gamma must be finite, got nan"),
        ("network.deform_groups=1.5", "network.deform_groups must be a whole number, got '1.5'"),
        ("network.deform_groups=0", "network.deform_groups must be between 1 and 64, got 0"),
        ("network.rpn_nms=1.5", "network.rpn_nms must be between 0 and 1, got 1.5"),
        ("network.share_branch=perhaps", "network.share_branch must be true or false, got 'perhaps'"),
        ("network.preset=dcnv3", "network.preset must be one of regular-roipool, regular, dconv-c5"),
        ("network.backbone=vgg16", "network.backbone must be one of resnet50, resnet101"),
        ("network.anchor_sizes=", "network.anchor_sizes must have at least one number"),
        ("network.anchor_sizes=32,x", "network.anchor_sizes must be a number, got 'x'"),
        ("network.anchor_sizes=0", "network.anchor_sizes must be between 1 and 100000, got 0.0"),
        ("network.max_size=500", "network.max_size must be at least min_size=800, got 500"),
        ("network.rpn_negative_iou=0.8", "network.rpn_negative_iou must be at most rpn_positive_iou=0.7, got 0.8"),
        ("training.seed=99999999999999999999", "training.seed must be between 0 and"),
        ("training.lr=-1", "training.lr must be between 0 and 1000, got -1.0"),
        ("training.workers=99999", "training.workers must be between 0 and 256, got 99999"),
        ("network.deform_groups=" + "9" * 5000, "network.deform_groups must be a whole number, got '9999"),
        ("training.lr=1e400", "training.lr must be finite, got inf"),
        ("network.anchor_sizes=" + "8," * 1000, "network.anchor_sizes must have at most 100 numbers, got 1000"),
        ("training.min_sizes=640,1400", "training.min_sizes must be at most network.max_size=1333, got 1400"),
        ("training.min_sizes=640.5", "training.min_sizes must be a whole number, got '640.5'"),
        ("training.scale_jitter=2", "training.scale_jitter must be a smallest and a largest factor, got 2"),
        ("training.scale_jitter=2,0.5", "training.scale_jitter must be a smallest and a largest factor, got 2,0.5"),
        ("training.best_by=mask", "training.best_by=mask needs network.detector=mask"),
        ("network.convolution=modulated network.preset=regular", "network.convolution and network.stages go together"),
        ("network.stages=c5 network.preset=regular", "network.convolution and network.stages go together"),
        ("network.image_mean=0.5", "network.image_mean must be 3 numbers, for red, green and blue, got 1"),
        ("network.aligned=false", "network.aligned=false needs network.pooling=aligned, got modulated"),
        ("training.amp=half", "training.amp must be one of none, float16, bfloat16, got 'half'"),
    ],
)
def test_wrong_assignments(assignment, message):
    with pytest.raises(UserError) as caught:
        Config().set(assignment.split(" ") if " network." in assignment else [assignment])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_pyramid_needs_five_anchor_sizes():
    for detector in ("mask", "faster-fpn"):
        with pytest.raises(UserError, match="anchor_sizes must be 5 numbers with FPN, got 3"):
            Config().set([f"network.detector={detector}", "network.anchor_sizes=8,16,32"])
    Config().set(["network.anchor_sizes=8,16,32"])


def test_patience_needs_evaluations():
    with pytest.raises(UserError, match=r"training\.patience=2 needs training\.evaluate_every of at least 1"):
        Config().set(["training.patience=2", "training.evaluate_every=0"])


def test_json_round_trip():
    config = Config().set(
        ["network.anchor_sizes=8,16", "training.min_sizes=640,800", "training.lr_steps=1", "network.share_branch=false"]
    )
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "values",
    [
        [],
        {"network": {}, "other": {}},
        {"network": {"color": 1}},
        {"network": {"gamma": "1"}},
        {"network": {"gamma": True}},
        {"network": {"share_branch": 1}},
        {"training": {"epochs": 2.0}},
        {"network": {"anchor_sizes": 3}},
        {"network": {"preset": ["dcnv2"]}},
        {"training": {"lr": 10**400}},
        {"training": {"seed": 10**5000}},
        {"network": 3},
    ],
)
def test_wrong_dictionaries(values):
    with pytest.raises(UserError):
        Config.from_dict(values)  # type: ignore[arg-type]


def test_every_number_has_bounds():
    """Also on the command line."""
    for kind in [*SECTIONS.values(), *COMMANDS.values()]:
        for item in dataclasses.fields(kind):
            numbers = re.fullmatch(r"(int|float|tuple\[(float|int), \.\.\.\])( \| None)?", str(item.type))
            if numbers and "numbers" not in item.metadata:
                low, high = item.metadata["minimum"], item.metadata["maximum"]
                assert low is not None and high is not None and low < high, (kind, item.name)


def test_every_option_is_described():
    text = describe_options()
    for item in dataclasses.fields(NetworkConfig):
        assert f"network.{item.name}=" in text
    assert "training.lr_steps=10,14" in text and "faster|mask" in text


@pytest.mark.parametrize(
    ("preset", "factors"),
    [
        ("dcnv2", (0.1, 1)),  # Deformable ConvNets v2
        ("dconv-c5", (1, 1)),  # Deformable ConvNets (v1)
        ("dcnv1", (1, 0.01)),
    ],
)
def test_learning_rates_of_offsets_are_those_of_the_paper_of_the_preset(preset, factors):
    config = Config().set([f"network.preset={preset}"])
    training = config.resolve_training()
    assert (training.offset_lr_mult, training.roi_offset_lr_mult) == factors
    training = config.set(["training.offset_lr_mult=0", "training.roi_offset_lr_mult=0.5"]).resolve_training()
    assert (training.offset_lr_mult, training.roi_offset_lr_mult) == (0, 0.5)


def test_a_configuration_of_version_0_1_keeps_its_meaning():
    values = Config().to_dict()
    network = values["network"]
    for name in ("conv_mask_scale", "roi_mask_scale", "aligned_masks", "box_loss_beta"):
        del network[name]
    network["mask_scale"] = 1.5
    del values["mimicking"]["ground_truth"]
    assert Config.from_dict(values).mimicking.ground_truth
    upgraded = Config.from_dict(values).network
    assert (upgraded.conv_mask_scale, upgraded.roi_mask_scale) == (1.5, 1.5)
    assert not upgraded.aligned_masks and upgraded.box_loss_beta == 1 / 9
