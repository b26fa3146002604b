"""PyTorch adapter: the operations on tensors, with gradients, and layers built on them."""

from .. import name_extra

with name_extra("torch", "torch"):
    import torch as _torch  # noqa: F401 -- first, for the error without PyTorch

from .checkpoints import rename_state_dict
from .convert import convert_to_deformable, param_groups
from .deform_conv2d_layers import DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack
from .deform_roi_pool_layers import (
    DeformRoIPool,
    DeformRoIPoolPack,
    ModulatedDeformRoIPoolPack,
    MultiScaleDeformRoIPool,
)
from .functional import deform_conv2d, deform_roi_pool
from .precision import set_float32_precision

__all__ = [
    "DeformConv2d",
    "DeformConv2dPack",
    "DeformRoIPool",
    "DeformRoIPoolPack",
    "ModulatedDeformConv2dPack",
    "ModulatedDeformRoIPoolPack",
    "MultiScaleDeformRoIPool",
    "convert_to_deformable",
    "deform_conv2d",
    "deform_roi_pool",
    "param_groups",
    "rename_state_dict",
    "set_float32_precision",
]
