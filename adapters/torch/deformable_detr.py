"""Replacement for the operations of Deformable DETR, and for the extension that it compiles, under the same names.

Many projects contain a copy: DINO, Mask2Former, MOTR, Grounding DINO and others. Write ``from
dcnops.adapters.torch.deformable_detr import MSDeformAttn`` instead of ``from models.ops.modules import MSDeformAttn``,
or put this module in place of the compiled extension, which leaves the project's own layers as they are::

    import sys
    from dcnops.adapters.torch import deformable_detr

    sys.modules["MultiScaleDeformableAttention"] = deformable_detr

Arguments, defaults, initial weights and state dict keys are those of Deformable DETR. `im2col_step` and
`level_start_index` are accepted and ignored: levels follow one another without gaps. See
`dcnops.adapters.torch.ms_deform_attn` for errors and mixed dtypes.

Examples
--------
>>> import torch
>>> from dcnops.adapters.torch.deformable_detr import MSDeformAttn
>>> layer = MSDeformAttn(d_model=32, n_levels=2, n_heads=4, n_points=4)
>>> shapes = torch.tensor([[8, 12], [4, 6]])
>>> query, reference_points = torch.randn(1, 10, 32), torch.rand(1, 10, 2, 2)
>>> layer(query, reference_points, torch.randn(1, 120, 32), shapes, torch.tensor([0, 96])).shape
torch.Size([1, 10, 32])
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import attention_operators, ms_deform_attn_layers
from .attention import ms_deform_attn
from .functional import promote_dtypes

__all__ = [
    "MSDeformAttn",
    "MSDeformAttnFunction",
    "ms_deform_attn_backward",
    "ms_deform_attn_core_pytorch",
    "ms_deform_attn_forward",
]


class MSDeformAttn(ms_deform_attn_layers.MSDeformAttn):
    """Replacement for ``models.ops.modules.MSDeformAttn``.

    The number of points may also be a sequence; see `dcnops.adapters.torch.MSDeformAttn`.
    """

    def _reset_parameters(self) -> None:
        """Initialise the parameters again. Deformable DETR calls this method."""
        self.reset_parameters()

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Any,
        input_level_start_index: Any = None,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend to the feature maps `input_flatten` [N, S, C], giving [N, Lq, C]."""
        return self.attend(query, reference_points, input_flatten, input_spatial_shapes, input_padding_mask)


class MSDeformAttnFunction:
    """Replacement for ``models.ops.functions.MSDeformAttnFunction``, which is called through `apply`."""

    @staticmethod
    def apply(
        value: Tensor,
        value_spatial_shapes: Any,
        value_level_start_index: Any,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int = 64,
    ) -> Tensor:
        """Compute `ms_deform_attn`."""
        return ms_deform_attn(value, value_spatial_shapes, sampling_locations, attention_weights)


def ms_deform_attn_core_pytorch(
    value: Tensor, value_spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Replace the function of this name, which computes the operation with ``grid_sample``."""
    return ms_deform_attn(value, value_spatial_shapes, sampling_locations, attention_weights)


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    im2col_step: int = 64,
) -> Tensor:
    """Replace the extension's function of this name."""
    return ms_deform_attn(value, spatial_shapes, sampling_loc, attn_weight)


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    grad_output: Tensor,
    im2col_step: int = 64,
) -> list[Tensor]:
    """Replace the extension's function of this name.

    Returns
    -------
    list of Tensor
        Gradients of `value`, `sampling_loc` and `attn_weight`, each in the dtype of its argument.
    """
    arguments = (value, sampling_loc, attn_weight)
    with torch.autocast(value.device.type, enabled=False):
        (data,), sampling = promote_dtypes(arguments[:1], arguments[1:])
    tensors = (grad_output.to(data.dtype), data, spatial_shapes, *sampling)
    gradients = attention_operators.ms_deform_attn_backward(*tensors, [], [], False, [True] * 3)
    return [gradient.to(argument.dtype) for gradient, argument in zip(gradients, arguments)]
