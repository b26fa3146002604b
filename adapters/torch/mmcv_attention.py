"""Multi-scale deformable attention under the names of ``mmcv.ops``; part of `mmcv_ops`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dcnops._errors import ArgumentError

from .attention import ms_deform_attn
from .deform_conv2d_layers import check_divisible
from .deformable_detr import MSDeformAttnFunction
from .ms_deform_attn_layers import AttentionBase


class MultiScaleDeformableAttnFunction(MSDeformAttnFunction):
    """Replacement for ``mmcv.ops.multi_scale_deform_attn.MultiScaleDeformableAttnFunction``, called through `apply`.

    Unlike mmcv's function, it does not round locations to the dtype of 16-bit values.
    """


def multi_scale_deformable_attn_pytorch(
    value: Tensor, value_spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Replace the function of this name, which computes the operation with ``grid_sample``."""
    return ms_deform_attn(value, value_spatial_shapes, sampling_locations, attention_weights)


class MultiScaleDeformableAttention(AttentionBase):
    """Replacement for ``mmcv.ops.MultiScaleDeformableAttention``.

    `im2col_step`, `norm_cfg` and `init_cfg` are accepted and ignored. `num_points` may also be a sequence, with one
    number per level.
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        im2col_step: int = 64,
        dropout: float = 0.1,
        batch_first: bool = False,
        norm_cfg: Any = None,
        init_cfg: Any = None,
        value_proj_ratio: float = 1.0,
    ) -> None:
        value_channels = int(embed_dims * value_proj_ratio)
        check_divisible("embed_dims", embed_dims, "num_heads", num_heads)
        check_divisible("embed_dims*value_proj_ratio", value_channels, "num_heads", num_heads)
        super().__init__(embed_dims, num_levels, num_heads, num_points, value_channels)
        self.embed_dims = embed_dims
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        self.im2col_step = im2col_step
        self.norm_cfg = norm_cfg
        self.init_cfg = init_cfg
        self.batch_first = batch_first
        self.dropout = nn.Dropout(dropout)

    def init_weights(self) -> None:
        """Initialise all parameters again. mmengine calls this method."""
        self.reset_parameters()

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Any = None,
        level_start_index: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend to `value` and add the result, after dropout, to `identity`.

        Queries and values are [Lq, N, C] and [S, N, C], or with `batch_first` [N, Lq, C] and [N, S, C]. By default
        `value` and `identity` are `query`.
        """
        if reference_points is None or spatial_shapes is None:
            raise ArgumentError("reference_points and spatial_shapes must be given, got None")
        identity = query if identity is None else identity
        value = query if value is None else value
        if query_pos is not None:
            query = query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)
        output = self.attend(query, reference_points, value, spatial_shapes, key_padding_mask)
        if not self.batch_first:
            output = output.transpose(0, 1)
        result: Tensor = self.dropout(output) + identity
        return result
