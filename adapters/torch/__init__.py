"""PyTorch: the operations on tensors, with gradients, and layers made of them."""

from .checkpoints import rename_state_dict
from .conv_modules import DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack
from .convert import convert_to_deformable, param_groups
from .functional import deform_conv2d, deform_roi_pool
from .roi_modules import DeformRoIPool, DeformRoIPoolPack, ModulatedDeformRoIPoolPack, MultiScaleDeformRoIPool

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
]
