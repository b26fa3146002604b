"""Spatial support: the parts of an image that a network samples and responds to (Deformable ConvNets v2, section 2).

Models are not modified. The plots are in `dcnops.adapters.torch.spatial_support.plots`, which needs matplotlib.
"""

from .locations import (
    Bins,
    SamplingPoints,
    effective_bin_locations,
    effective_sampling_locations,
    sampling_locations,
)
from .nodes import LayerNode, Node, RoINode
from .saliency import SaliencyRegion, effective_receptive_field, error_bounded_saliency_region
from .statistics import LayerStatistics, OffsetObserver, offset_statistics

__all__ = [
    "Bins",
    "LayerNode",
    "LayerStatistics",
    "Node",
    "OffsetObserver",
    "RoINode",
    "SaliencyRegion",
    "SamplingPoints",
    "effective_bin_locations",
    "effective_receptive_field",
    "effective_sampling_locations",
    "error_bounded_saliency_region",
    "offset_statistics",
    "sampling_locations",
]
