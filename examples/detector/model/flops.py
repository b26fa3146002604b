"""Parameters and multiply-adds of the presets, with those of the paper's Table 1."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from dcnops.adapters.torch import DeformConv2dPack, ModulatedDeformConv2dPack
from dcnops.adapters.torch.zero_layers import ZeroLayer

from ..config import NetworkConfig
from ..presets import PRESETS, Cost
from .network import build_detector

IMAGE = (800, 1333)  # height and width
NUM_ROIS = 1000
NUM_DETECTIONS = 100  # with masks from Mask R-CNN
NUM_CATEGORIES = 80

COUNTED = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, ZeroLayer, DeformConv2dPack, ModulatedDeformConv2dPack)


class Count(NamedTuple):
    """Parameters, and multiply-adds for one image, of convolutions and fully connected layers."""

    parameters: int
    macs: int


def count(network: NetworkConfig) -> Count:
    """Count parameters and multiply-adds for an image of 800x1333 with 1000 RoIs and 80 categories.

    As in the paper's Table 1, only convolutions and fully connected layers count, without bilinear sampling. The
    network runs on the meta device, so nothing is computed.
    """
    with torch.device("meta"):
        detector = build_detector(network, NUM_CATEGORIES).eval()
    layers = [module for module in detector.modules() if isinstance(module, COUNTED)]
    parameters = sum(parameter.numel() for layer in layers for parameter in layer.parameters(recurse=False))
    with _counting(layers) as macs, torch.no_grad():
        _walk(detector)
    return Count(parameters, sum(macs))


def count_presets(network: NetworkConfig) -> dict[str, Count]:
    """Count each preset with the other options of `network`."""
    return {preset: count(dataclasses.replace(network, preset=preset)) for preset in PRESETS}


def cost_rows(network: NetworkConfig) -> list[dict[str, Any]]:
    """Return the exact cost of each preset, its increment over `regular`, and the cost printed in the paper."""
    counts = count_presets(network)
    rows = []
    for preset, counted in counts.items():
        regular = counts["regular"]
        increment = Count(counted.parameters - regular.parameters, counted.macs - regular.macs)
        paper = _paper(preset, network)
        rows.append(
            {
                "detector": network.detector,
                "backbone": network.backbone,
                "preset": preset,
                **counted._asdict(),
                "increment": increment._asdict(),
                "paper": paper._asdict() if paper else None,
            }
        )
    return rows


def cost_table(network: NetworkConfig) -> str:
    """Format `cost_rows` as text in the paper's units."""
    name = {"faster": "Faster R-CNN", "mask": "Mask R-CNN", "faster-fpn": "Faster R-CNN with FPN"}[network.detector]
    masks = f", masks of {NUM_DETECTIONS} detections" if network.has_masks else ""
    lines = [
        f"{name}, {network.backbone}, one image of {IMAGE[0]}x{IMAGE[1]}, {NUM_ROIS} RoIs{masks}",
        f"{'':16}   {'parameters / 2^20':>17}   {'multiply-adds / 2^30':>20}   {'increment over regular':>28}",
        f"{'preset':16}   {'ours':>8} {'paper':>8}   {'ours':>10} {'paper':>9}"
        f"   {'parameters':>12}   {'multiply-adds':>14}",
    ]
    for row in cost_rows(network):
        paper, more = row["paper"] or {"parameters": "-", "macs": "-"}, row["increment"]
        lines.append(
            f"{row['preset']:16}   {row['parameters'] / 2**20:8.1f} {paper['parameters']:>8}"
            f"   {row['macs'] / 2**30:10.1f} {paper['macs']:>9}   {more['parameters']:12,}   {more['macs']:14,}"
        )
    return "\n".join(lines)


def _paper(preset: str, network: NetworkConfig) -> Cost | None:
    """Return the cost printed in the paper, which has ResNet-50 only."""
    if network.backbone != "resnet50" or network.title != network.preset:
        return None
    return {"faster": PRESETS[preset].faster, "mask": PRESETS[preset].mask}.get(network.detector)


def _walk(detector: GeneralizedRCNN) -> None:
    """Run every part once on meta tensors."""
    backbone, heads = detector.backbone, detector.roi_heads
    maps = backbone(torch.empty(1, 3, *IMAGE, device="meta"))
    detector.rpn.head([maps[name] for name in backbone.rpn_maps])
    # Meta regions have no size to choose a level by, but all levels cost the same.
    level = maps[backbone.roi_maps[0]]
    box_features = heads.box_roi_pool.pools[0](level, torch.empty(NUM_ROIS, 5, device="meta"))
    heads.box_predictor(heads.box_head(box_features))
    if heads.has_mask():
        mask_features = heads.mask_roi_pool.pools[0](level, torch.empty(NUM_DETECTIONS, 5, device="meta"))
        heads.mask_predictor(heads.mask_head(mask_features))


@contextmanager
def _counting(layers: list[nn.Module]) -> Iterator[list[int]]:
    """Collect the multiply-adds of every call of the layers in a context."""
    macs: list[int] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # Each weight is used once per position of the output, or of the input of a transposed convolution.
        transposed = isinstance(layer, nn.ConvTranspose2d)
        channels_last = isinstance(layer, nn.Linear)
        values = inputs[0] if transposed else output
        positions = values.numel() // values.shape[-1 if channels_last else 1]
        assert isinstance(layer.weight, Tensor)
        macs.append(layer.weight.numel() * positions)

    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield macs
    finally:
        for hook in hooks:
            hook.remove()
