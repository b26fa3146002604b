"""Functions of the CPU backend, as `dcnops._dispatch` calls them."""

from dcnops._backends.cpu.arrays import contiguous
from dcnops._backends.cpu.deform_aggregate import deform_aggregate, deform_aggregate_backward
from dcnops._backends.cpu.deform_conv2d import deform_conv2d, deform_conv2d_backward
from dcnops._backends.cpu.deform_roi_pool import deform_roi_pool, deform_roi_pool_backward
from dcnops._backends.cpu.ms_deform_attn import ms_deform_attn, ms_deform_attn_backward

__all__ = [
    "contiguous",
    "deform_aggregate",
    "deform_aggregate_backward",
    "deform_conv2d",
    "deform_conv2d_backward",
    "deform_roi_pool",
    "deform_roi_pool_backward",
    "ms_deform_attn",
    "ms_deform_attn_backward",
]
