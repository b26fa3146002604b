"""Deformable convolution, RoI pooling, attention and aggregation on NumPy and CuPy arrays."""

import os

from dcnops._backends.cuda.workspace import get_workspace, set_workspace
from dcnops._errors import (
    ArgumentError,
    DcnError,
    DeviceError,
    DtypeError,
    KernelCompileError,
    ShapeError,
)
from dcnops._prefetch import prefetch
from dcnops._threads import get_num_threads, set_num_threads
from dcnops.deform_aggregate import DeformAggregateGradients, deform_aggregate, deform_aggregate_backward
from dcnops.deform_conv2d import DeformConv2dGradients, deform_conv2d, deform_conv2d_backward
from dcnops.deform_roi_pool import DeformRoIPoolGradients, deform_roi_pool, deform_roi_pool_backward
from dcnops.ms_deform_attn import MSDeformAttnGradients, ms_deform_attn, ms_deform_attn_backward

__version__ = "0.1.0"

# An installed package contains the adapters, the CUDA sources and the detector; in a checkout they lie elsewhere.
if not os.path.isdir(os.path.join(__path__[0], "adapters")):
    _checkout = os.path.dirname(__path__[0])
    __path__ += [_checkout, os.path.join(_checkout, "examples")]

__all__ = [
    "ArgumentError",
    "DcnError",
    "DeformAggregateGradients",
    "DeformConv2dGradients",
    "DeformRoIPoolGradients",
    "DeviceError",
    "DtypeError",
    "KernelCompileError",
    "MSDeformAttnGradients",
    "ShapeError",
    "deform_aggregate",
    "deform_aggregate_backward",
    "deform_conv2d",
    "deform_conv2d_backward",
    "deform_roi_pool",
    "deform_roi_pool_backward",
    "get_num_threads",
    "get_workspace",
    "ms_deform_attn",
    "ms_deform_attn_backward",
    "prefetch",
    "set_num_threads",
    "set_workspace",
]
