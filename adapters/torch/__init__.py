"""PyTorch adapter: the operations on tensors, with gradients, and layers built on them."""

from .. import name_extra

with name_extra("torch", "torch"):
    import torch as _torch  # noqa: F401 -- first, for the error without PyTorch

from .attention import deform_aggregate, ms_deform_attn
from .checkpoints import rename_state_dict
from .convert import convert_to_deformable, param_groups
from .deform_aggregate_layers import DCNv3, DCNv4
from .deform_conv2d_layers import DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack
from .deform_roi_pool_layers import (
    DeformRoIPool,
    DeformRoIPoolPack,
    ModulatedDeformRoIPoolPack,
    MultiScaleDeformRoIPool,
)
from .functional import deform_conv2d, deform_roi_pool
from .ms_deform_attn_layers import MSDeformAttn
from .precision import set_float32_precision

__all__ = [
    "DCNv3",
    "DCNv4",
    "DeformConv2d",
    "DeformConv2dPack",
    "DeformRoIPool",
    "DeformRoIPoolPack",
    "MSDeformAttn",
    "ModulatedDeformConv2dPack",
    "ModulatedDeformRoIPoolPack",
    "MultiScaleDeformRoIPool",
    "convert_to_deformable",
    "deform_aggregate",
    "deform_conv2d",
    "deform_roi_pool",
    "ms_deform_attn",
    "param_groups",
    "rename_state_dict",
    "set_float32_precision",
]
