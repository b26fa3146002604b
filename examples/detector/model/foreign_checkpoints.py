"""Detectors of torchvision, mmdetection and detectron2: their parameters under this program's names, and their network.

To support another project, add an entry to `PROJECTS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import Config, NetworkConfig
from ..data import default_categories, named_categories
from ..errors import UserError, number_of
from ..presets import PRESETS, STAGES
from .mmdetection_config import StoredConfig, read_stored_config
from .network import build_detector
from .weights import few

Rename = str | Callable[[re.Match[str]], str]

FIRST = "backbone.body.conv1.weight"
SCORES = "roi_heads.box_predictor.cls_score"
BOXES = "roi_heads.box_predictor.bbox_pred"
MASKS = "roi_heads.mask_predictor.mask_fcn_logits"
LAST_LAYERS = (SCORES, BOXES, MASKS)  # with rows for each category
NEEDED = (
    "backbone.body.layer1.0.conv2",
    "backbone.body.layer3.0.conv2",
    "backbone.fpn.inner_blocks.0.0",
    "roi_heads.box_head.fc6",
    SCORES,
    BOXES,
)
# Blocks of conv4, and width and channels per group of the 3x3 convolutions in conv2.
BACKBONES = {
    (6, 64, 64): "resnet50",
    (23, 64, 64): "resnet101",
    (23, 128, 4): "resnext101_32x4d",
    (23, 256, 8): "resnext101_32x8d",
    (23, 256, 4): "resnext101_64x4d",
}
RES = r"backbone\.bottom_up\.res(\d)\.(\d+)\."  # a block in detectron2
DETECTORS = {"faster-fpn": "Faster R-CNN with FPN", "mask": "Mask R-CNN"}
# Networks that are known by a part of a name.
OTHER_NETWORKS = {
    r"(^|\.)(bbox_head|box_predictor)\.[01]\.": "Cascade R-CNN",
    r"^bbox_head\.": "mmdetection 1, which its tools/model_converters/upgrade_model_version.py converts",
}


class UnsupportedDetector(UserError):
    """A detector of a known project that this program cannot build."""


class Project(NamedTuple):
    """Names of the parameters of a project's detectors, and how its networks differ from this program's."""

    name: str
    marks: tuple[str, ...]  # parameters by which its detectors are known
    renames: tuple[tuple[str, Rename], ...]  # the first expression that matches the start of a name replaces it
    unused: str  # names of values that this program computes itself or does not need
    network: dict[str, Any]  # options of `NetworkConfig`
    background_last: bool  # in the rows of the scores; boxes and masks then have no rows for it
    bgr: Collection[str] = ()  # backbones with the colours in the order blue, green, red
    unscaled: Collection[str] = ()  # backbones for images of 0..255 less the mean
    caffe: Collection[str] = ()  # backbones with strides in the 1x1 convolutions


def _shifted(template: str, by: int) -> Callable[[re.Match[str]], str]:
    """Return a replacement with the first group, a number, changed by `by`; the template has the other groups too."""
    return lambda match: template.format(int(match[1]) + by, *match.groups()[1:])


def _pool(match: re.Match[str]) -> str:
    return f"roi_heads.{'box' if match[1] == 'bbox' else 'mask'}_roi_pool.pools."


PROJECTS = (
    Project(
        "torchvision",
        ("rpn.head.cls_logits.weight", "rpn.head.bbox_pred.weight"),
        (
            (r"backbone\.fpn\.(\w+_blocks)\.(\d)\.(?=weight|bias)", r"backbone.fpn.\1.\2.0."),  # before version 0.14
            (r"rpn\.head\.conv\.(?=weight|bias)", "rpn.head.conv.0.0."),
            (r"roi_heads\.mask_head\.mask_fcn(\d)\.", _shifted("roi_heads.mask_head.{}.0.", -1)),
        ),
        r".*\.num_batches_tracked",
        {"aligned": False, "aligned_masks": False, "box_loss_beta": 1 / 9},
        background_last=False,
    ),
    Project(
        "mmdetection",
        ("rpn_head.rpn_cls.weight",),
        (
            (r"backbone\.(.*)\.conv2(_offset|\.conv_offset(_mask)?)\.", r"backbone.body.\1.conv2.conv_offset."),
            (r"backbone\.", "backbone.body."),
            (r"neck\.lateral_convs\.(\d)\.conv\.", r"backbone.fpn.inner_blocks.\1.0."),
            (r"neck\.fpn_convs\.(\d)\.conv\.", r"backbone.fpn.layer_blocks.\1.0."),
            (r"rpn_head\.rpn_conv\.", "rpn.head.conv.0.0."),
            (r"rpn_head\.rpn_cls\.", "rpn.head.cls_logits."),
            (r"rpn_head\.rpn_reg\.", "rpn.head.bbox_pred."),
            (r"roi_head\.(bbox|mask)_roi_extractor\.roi_layers\.", _pool),
            (r"roi_head\.bbox_head\.shared_fcs\.([01])\.", _shifted("roi_heads.box_head.fc{}.", 6)),
            (r"roi_head\.bbox_head\.fc_cls\.", f"{SCORES}."),
            (r"roi_head\.bbox_head\.fc_reg\.", f"{BOXES}."),
            (r"roi_head\.mask_head\.convs\.(\d)\.conv\.", r"roi_heads.mask_head.\1.0."),
            (r"roi_head\.mask_head\.upsample\.", "roi_heads.mask_predictor.conv5_mask."),
            (r"roi_head\.mask_head\.conv_logits\.", f"{MASKS}."),
        ),
        r".*\.num_batches_tracked|data_preprocessor\.(mean|std)",
        {"sampling_ratio": 0, "exact_anchors": True, "resize": "opencv"},
        background_last=True,
        bgr=("resnext101_32x8d",),
    ),
    Project(
        "detectron2",
        ("proposal_generator.rpn_head.objectness_logits.weight",),
        (
            (r"backbone\.bottom_up\.stem\.conv1\.norm\.", "backbone.body.bn1."),
            (r"backbone\.bottom_up\.stem\.conv1\.", "backbone.body.conv1."),
            (RES + r"conv(\d)\.norm\.", _shifted("backbone.body.layer{}.{}.bn{}.", -1)),
            (RES + r"conv2_offset\.", _shifted("backbone.body.layer{}.{}.conv2.conv_offset.", -1)),
            (RES + r"conv(\d)\.", _shifted("backbone.body.layer{}.{}.conv{}.", -1)),
            (RES + r"shortcut\.norm\.", _shifted("backbone.body.layer{}.{}.downsample.1.", -1)),
            (RES + r"shortcut\.", _shifted("backbone.body.layer{}.{}.downsample.0.", -1)),
            (r"backbone\.fpn_lateral(\d)\.", _shifted("backbone.fpn.inner_blocks.{}.0.", -2)),
            (r"backbone\.fpn_output(\d)\.", _shifted("backbone.fpn.layer_blocks.{}.0.", -2)),
            (r"proposal_generator\.rpn_head\.conv\.", "rpn.head.conv.0.0."),
            (r"proposal_generator\.rpn_head\.objectness_logits\.", "rpn.head.cls_logits."),
            (r"proposal_generator\.rpn_head\.anchor_deltas\.", "rpn.head.bbox_pred."),
            (r"roi_heads\.box_head\.fc([12])\.", _shifted("roi_heads.box_head.fc{}.", 5)),
            (r"roi_heads\.mask_head\.mask_fcn(\d)\.", _shifted("roi_heads.mask_head.{}.0.", -1)),
            (r"roi_heads\.mask_head\.deconv\.", "roi_heads.mask_predictor.conv5_mask."),
            (r"roi_heads\.mask_head\.predictor\.", f"{MASKS}."),
        ),
        r"pixel_(mean|std)|.*anchor_generator\.cell_anchors\.\d|.*\.num_batches_tracked",
        {"sampling_ratio": 0, "exact_anchors": True, "resize": "pillow"},
        background_last=True,
        bgr=BACKBONES.values(),
        unscaled=("resnet50", "resnet101"),
        caffe=("resnet50", "resnet101"),
    ),
)  # fmt: skip


def convert_detector(content: object, path: Path) -> dict[str, Any] | None:
    """Convert the content of a file to that of a checkpoint of this program; None if it is no detector of `PROJECTS`.

    The result has the entries of `load_checkpoint`, and "report", a line about the detector and what was left out. The
    file must have exactly the parameters of a network that this program can build.
    """
    state, meta = _state_dict(content)
    known = [project for project in PROJECTS if all(mark in state for mark in project.marks)]
    if not known:
        return None
    if len(known) > 1:
        raise UserError(f"{path}: mixes detectors of {' and '.join(project.name for project in known)}")
    project = known[0]
    what = f"{path}: is a detector of {project.name} that this program cannot build"
    new_names = {name: _rename(name, project) for name in state if not re.fullmatch(project.unused, name)}
    if len(set(new_names.values())) < len(new_names):
        raise UserError(f"{path}: has several parameters with the same meaning")
    parameters = {new: state[old] for old, new in new_names.items()}
    for pattern, description in OTHER_NETWORKS.items():
        if any(re.search(pattern, name) for name in state):
            raise UnsupportedDetector(f"{what}: it is of {description}")
    if lacking := [f"{name}.weight" for name in NEEDED if f"{name}.weight" not in parameters]:
        raise UnsupportedDetector(f"{what}: it has no {few(lacking)}")
    if project.name == "torchvision" and any("conv_offset" in name or "_roi_pool." in name for name in state):
        raise UnsupportedDetector(
            f"{what}: it has deformable layers, which torchvision's detectors do not have; of a detector of this "
            "program, the model.pth is needed, which has the configuration too"
        )
    stored = read_stored_config(meta if project.name == "mmdetection" else {})
    config = _config(parameters, state, stored, project, what)
    number = _convert_last_layers(parameters, project.background_last, what)
    if stored.bgr if stored.bgr is not None else config.network.backbone in project.bgr:
        parameters[FIRST] = parameters[FIRST].flip(1)
    with torch.device("meta"):
        needed = build_detector(config.network, number).state_dict()
    if unknown := [old for old, new in new_names.items() if new not in needed]:
        raise UnsupportedDetector(f"{what}: it has the unknown {few(unknown)}")
    if missing := [name for name in needed if name not in parameters]:
        raise UnsupportedDetector(f"{what}: it has no {few(missing)}")
    categories, naming = default_categories(number), ""
    if len(stored.names) == number:
        categories = named_categories(stored.names)
    else:
        assumed = "numbers" if categories[0].name == "category 1" else "those of COCO"
        naming = f", with names that are not in the file ({assumed} unless --categories gives them)"
    left = sorted({name.rpartition(".")[2] for name in state.keys() - new_names.keys()})
    changed = sum(old != new for old, new in new_names.items())
    return {
        "config": config.to_dict(),
        "categories": categories,
        "model": parameters,
        "iteration": 0,
        "report": f"{path}: {_describe(config.network)} of {project.name} for {number_of(number, 'category')}{naming}"
        f": {number_of(len(new_names), 'parameter')} used, {changed} of them renamed; "
        f"left out: {', '.join(left) or 'nothing'}",
    }


def _state_dict(content: object) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Return the named tensors in a file and its description of itself; no tensors if it has other content."""
    meta: object = {}
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            meta = content.get("meta", meta)
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        return {}, {}
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    for wrapper in ("_orig_mod.", "module."):
        if tensors and all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): value for name, value in tensors.items()}
    return tensors, meta if isinstance(meta, Mapping) else {}


def _rename(name: str, project: Project) -> str:
    for pattern, replacement in project.renames:
        renamed, number = re.subn(f"^{pattern}", replacement, name)
        if number:
            return renamed
    return name


def _config(
    parameters: Mapping[str, Tensor], state: Mapping[str, Tensor], stored: StoredConfig, project: Project, what: str
) -> Config:
    """Return the configuration that the shapes of the parameters, the project and the stored configuration imply."""
    width = parameters["backbone.body.layer1.0.conv2.weight"].shape[:2]
    blocks = len({name.split(".")[3] for name in parameters if name.startswith("backbone.body.layer3.")})
    backbone = BACKBONES.get((blocks, *width))
    if backbone is None:
        raise UnsupportedDetector(
            f"{what}: its backbone has {blocks} blocks in conv4, and conv2 has convolutions of the shape {list(width)}"
        )
    mean, deviation = list(NetworkConfig.image_mean), list(NetworkConfig.image_std)
    if backbone in project.unscaled:
        deviation = [1 / 255] * 3
    if "pixel_mean" in state and "pixel_std" in state:
        order = -1 if backbone in project.bgr else 1
        mean, deviation = (
            [value / 255 for value in state[name].flatten().tolist()][::order] for name in ("pixel_mean", "pixel_std")
        )
    options: dict[str, Any] = {
        "detector": "mask" if f"{MASKS}.weight" in parameters else "faster-fpn",
        "backbone": backbone,
        "neck_channels": len(parameters["backbone.fpn.inner_blocks.0.0.weight"]),
        "head_channels": len(parameters["roi_heads.box_head.fc6.weight"]),
        "stride_style": "caffe" if backbone in project.caffe else "torchvision",
        "image_mean": mean,
        "image_std": deviation,
        **_deformable_layers(parameters, what),
        **project.network,
    }
    if project.name == "torchvision" and not any(name.endswith("num_batches_tracked") for name in state):
        options["norm_eps"] = 0.0  # as torchvision sets it for its published weights, which have no such values
    try:
        return Config.from_dict({"network": options | stored.options})
    except UserError as error:
        raise UnsupportedDetector(f"{what}: {error}") from None


def _deformable_layers(parameters: Mapping[str, Tensor], what: str) -> dict[str, Any]:
    """Return the options of deformable convolutions and RoI pooling that the names and shapes imply."""
    options: dict[str, Any] = {}
    convolution, pooling = "regular", "aligned"
    stages: tuple[str, ...] = ()
    found = {name: len(value) for name, value in parameters.items() if name.endswith("conv2.conv_offset.weight")}
    if found:
        stages = tuple(sorted({name.split(".")[2] for name in found}))
        channels = next(iter(found.values()))
        # 18 or 27 for each deformable group, the number of which is a power of two.
        taps = 27 if channels % 27 == 0 else 18
        convolution = "modulated" if taps == 27 else "deformable"
        options |= {"conv_mask_scale": 1.0, "deform_groups": max(1, channels // taps)}
    for part in ("box", "mask"):
        prefix = f"roi_heads.{part}_roi_pool.pools."
        if any(name.startswith(prefix) for name in parameters):
            pooling = (
                "modulated" if any(name.startswith(f"{prefix}0.mask_fc.") for name in parameters) else "deformable"
            )
            options |= {"pool_branch": "mmcv", "share_branch": False}
            options["deform_mask_pool"] = part == "mask"
    layers = (convolution, stages, pooling)
    for name, preset in PRESETS.items():
        if preset[:4] == (*layers, False):
            return {**options, "preset": name}
    chosen = next((name for name, value in STAGES.items() if value == stages), "preset")
    if stages and chosen == "preset":
        raise UnsupportedDetector(f"{what}: its deformable convolutions are in {', '.join(stages)}")
    return {**options, "preset": "regular", "convolution": convolution, "stages": chosen, "pooling": pooling}


def _convert_last_layers(parameters: dict[str, Tensor], background_last: bool, what: str) -> int:
    """Give the last layers the rows of this program, in place: the background is the first category.

    Return the number of categories without the background.
    """
    number = len(parameters[f"{SCORES}.weight"]) - 1
    rows = {SCORES: number + 1, BOXES: 4 * (number + 1), MASKS: number + 1}
    for layer, wanted in rows.items():
        for name in (f"{layer}.weight", f"{layer}.bias"):
            if name not in parameters:
                continue
            values = parameters[name]
            if background_last and layer == SCORES:
                parameters[name] = values.roll(1, 0)
                continue
            background = wanted // (number + 1) if background_last else 0
            if len(values) + background != wanted:
                raise UnsupportedDetector(
                    f"{what}: {name} has {number_of(len(values), 'row')}, needs {wanted - background} "
                    f"for {number_of(number, 'category')}"
                )
            parameters[name] = torch.cat([values.new_zeros(background, *values.shape[1:]), values])
    return number


def _describe(network: NetworkConfig) -> str:
    return f"{DETECTORS[network.detector]} ({network.backbone}, {network.title})"
