"""PyTorch: the operations on tensors, with gradients."""

from .functional import deform_conv2d, deform_roi_pool

__all__ = ["deform_conv2d", "deform_roi_pool"]
