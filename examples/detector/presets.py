"""Presets: the rows of the paper's Table 1. A new entry in `PRESETS` is all that a new preset needs."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Cost(NamedTuple):
    """Parameters / 2^20 and multiply-adds / 2^30 with the paper's rounding."""

    parameters: float
    macs: float


class Preset(NamedTuple):
    """Deformable parts of a detector, and its cost in the paper's Table 1 if it has a row there."""

    convolution: Literal["regular", "deformable", "modulated"]  # type of the 3x3 layers in `stages`
    stages: tuple[str, ...]  # torchvision's names: layer2 is the paper's conv3
    pooling: Literal["quantised", "aligned", "deformable", "modulated"]
    mimic: bool = False  # train with R-CNN feature mimicking
    faster: Cost | None = None  # printed cost of Faster R-CNN
    mask: Cost | None = None  # printed cost of Mask R-CNN


C5, C4C5, C3C5 = ("layer4",), ("layer3", "layer4"), ("layer2", "layer3", "layer4")
STAGES = {"c5": C5, "c4c5": C4C5, "c3c5": C3C5, "c2c5": ("layer1", *C3C5)}  # values of network.stages

PRESETS = {
    "regular-roipool": Preset("regular", (), "quantised", faster=Cost(51.3, 196.8)),
    "regular": Preset("regular", (), "aligned", False, Cost(51.3, 196.8), Cost(39.5, 303.5)),
    "dconv-c5": Preset("deformable", C5, "aligned", False, Cost(51.5, 197.7), Cost(39.8, 303.7)),
    "dcnv1": Preset("deformable", C5, "deformable", False, Cost(52.7, 198.9), Cost(40.9, 304.9)),
    "dconv-c4c5": Preset("deformable", C4C5, "aligned", False, Cost(51.7, 198.7), Cost(40.0, 304.7)),
    "dconv-c3c5": Preset("deformable", C3C5, "aligned", False, Cost(51.8, 200.0), Cost(40.1, 306.0)),
    "dconv-c3c5-dpool": Preset("deformable", C3C5, "deformable", False, Cost(53.0, 201.2), Cost(41.3, 307.2)),
    "dcnv2": Preset("modulated", C3C5, "modulated", False, Cost(65.5, 214.7), Cost(53.8, 320.3)),
    "dcnv2-mimic": Preset("modulated", C3C5, "modulated", True, Cost(65.5, 214.7), Cost(53.8, 320.3)),
}
