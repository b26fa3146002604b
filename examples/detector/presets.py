"""The rows of the paper's Table 1: what is deformable in each, and what the paper prints about its cost."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Cost(NamedTuple):
    """Parameters / 2^20 and multiply-adds / 2^30, rounded as the paper prints them."""

    parameters: float
    macs: float


class Preset(NamedTuple):
    """One row of Table 1."""

    convolution: Literal["regular", "deformable", "modulated"]  # of the 3x3 layers of `stages`
    stages: tuple[str, ...]  # by the names of torchvision's ResNets: layer2 is the paper's conv3
    pooling: Literal["quantised", "aligned", "deformable", "modulated"]
    mimic: bool  # whether it is trained with R-CNN feature mimicking, which is gone afterwards
    faster: Cost  # of Faster R-CNN
    mask: Cost | None  # of Mask R-CNN, which the paper does not print for the first row


C5, C4C5, C3C5 = ("layer4",), ("layer3", "layer4"), ("layer2", "layer3", "layer4")

PRESETS = {
    "regular-roipool": Preset("regular", (), "quantised", False, Cost(51.3, 196.8), None),
    "regular": Preset("regular", (), "aligned", False, Cost(51.3, 196.8), Cost(39.5, 303.5)),
    "dconv-c5": Preset("deformable", C5, "aligned", False, Cost(51.5, 197.7), Cost(39.8, 303.7)),
    "dcnv1": Preset("deformable", C5, "deformable", False, Cost(52.7, 198.9), Cost(40.9, 304.9)),
    "dconv-c4c5": Preset("deformable", C4C5, "aligned", False, Cost(51.7, 198.7), Cost(40.0, 304.7)),
    "dconv-c3c5": Preset("deformable", C3C5, "aligned", False, Cost(51.8, 200.0), Cost(40.1, 306.0)),
    "dconv-c3c5-dpool": Preset("deformable", C3C5, "deformable", False, Cost(53.0, 201.2), Cost(41.3, 307.2)),
    "dcnv2": Preset("modulated", C3C5, "modulated", False, Cost(65.5, 214.7), Cost(53.8, 320.3)),
    "dcnv2-mimic": Preset("modulated", C3C5, "modulated", True, Cost(65.5, 214.7), Cost(53.8, 320.3)),
}
