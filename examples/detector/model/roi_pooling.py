"""RoI pooling of the presets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import RoIAlign, roi_pool

from dcnops.adapters.torch import (
    DeformRoIPool,
    DeformRoIPoolPack,
    ModulatedDeformRoIPoolPack,
    MultiScaleDeformRoIPool,
    mmcv_ops,
)

from ..config import NetworkConfig


class QuantisedRoIPool(nn.Module):
    """RoI pooling of Fast R-CNN: regions and bins rounded to whole pixels, maximum per bin."""

    def __init__(self, output_size: int) -> None:
        super().__init__()
        self.output_size = (output_size, output_size)
        self.spatial_scale = 1.0

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Pool `rois` [R, 5] from `input` [N, C, H, W] to [R, C, P, P]."""
        # float32 under autocast too, as 16-bit coordinates would be off by pixels.
        dtype = torch.promote_types(input.dtype, torch.float32)
        pooled: Tensor = roi_pool(input.to(dtype), rois.to(dtype), self.output_size)
        return pooled.to(input.dtype)


def build_box_pool(network: NetworkConfig, maps: Sequence[str]) -> MultiScaleDeformRoIPool:
    """Build the 7x7 pooling for the box head."""
    return _multi_scale(_pool(network, network.layers.pooling, 7), network, maps)


def build_mask_pool(network: NetworkConfig, maps: Sequence[str]) -> MultiScaleDeformRoIPool:
    """Build the 14x14 pooling for the mask head; deformable only on request, as the paper's cost omits it."""
    pooling: str = network.layers.pooling
    if not network.deform_mask_pool and pooling != "quantised":
        pooling = "aligned"
    return _multi_scale(_pool(network, pooling, 14), network, maps)


def _pool(network: NetworkConfig, pooling: str, output_size: int) -> nn.Module:
    """Build the pooling of one feature map."""
    if pooling == "quantised":
        return QuantisedRoIPool(output_size)
    if not network.aligned:
        return RoIAlign((output_size, output_size), 1.0, network.sampling_ratio, aligned=False)
    options: dict[str, Any] = {"sampling_ratio": network.sampling_ratio, "gamma": network.gamma}
    if pooling == "aligned":
        return DeformRoIPool(output_size, **options)
    widths = (output_size, network.neck_channels, network.head_channels)
    if network.pool_branch == "mmcv":
        kind = mmcv_ops.DeformRoIPoolPack if pooling == "deformable" else mmcv_ops.ModulatedDeformRoIPoolPack
        return kind(*widths, **options)
    if pooling == "deformable":
        return DeformRoIPoolPack(*widths, **options)
    return ModulatedDeformRoIPoolPack(*widths, **options, mask_scale=network.roi_mask_scale)


def _multi_scale(pool: nn.Module, network: NetworkConfig, maps: Sequence[str]) -> MultiScaleDeformRoIPool:
    return MultiScaleDeformRoIPool(maps, pool, network.share_branch)
