"""Multi-scale deformable attention layer: projections, predicted sampling points, and `ms_deform_attn`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from dcnops._arguments import MAX_LEVELS, as_integer, expand_points, shown
from dcnops._errors import ArgumentError, ShapeError

from .attention import ms_deform_attn
from .deform_conv2d_layers import check_divisible
from .zero_layers import Device

SpatialShapes: TypeAlias = "Tensor | Sequence[Sequence[int]]"


class AttentionBase(nn.Module):
    """Parameters and forward pass of multi-scale deformable attention.

    Parameters
    ----------
    channels : int
        C, the channels of queries and output.
    levels, heads : int
        L and M.
    points : int or sequence of L int
        Sampling points of a head on each level.
    value_channels : int
        Channels of the projected values, a multiple of M.
    device, dtype : optional
        Of the parameters.
    """

    def __init__(
        self,
        channels: int,
        levels: int,
        heads: int,
        points: int | Sequence[int],
        value_channels: int,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if as_integer(levels) is None or not 1 <= levels <= MAX_LEVELS:
            raise ArgumentError(f"the number of levels must be an integer from 1 to {MAX_LEVELS}, got {shown(levels)}")
        self._heads = heads
        _, numbers = expand_points(points, levels)
        assert numbers is not None
        self._points = numbers
        total = heads * sum(self._points)
        self.sampling_offsets = nn.Linear(channels, 2 * total, device=device, dtype=dtype)
        self.attention_weights = nn.Linear(channels, total, device=device, dtype=dtype)
        self.value_proj = nn.Linear(channels, value_channels, device=device, dtype=dtype)
        self.output_proj = nn.Linear(value_channels, channels, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as in the Deformable DETR paper.

        Each head looks in one of M directions, 1 to P pixels away, and weights all of its points equally. The
        projections are drawn by Xavier's rule, and their biases are zero.
        """
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        bias = self.sampling_offsets.bias
        angles = torch.arange(self._heads, device=bias.device, dtype=torch.float32) * (2 * math.pi / self._heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        distances = torch.cat([torch.arange(1, n + 1, device=bias.device) for n in self._points])
        with torch.no_grad():
            bias.copy_((directions[:, None] * distances[:, None]).flatten())
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def attend(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        spatial_shapes: SpatialShapes,
        padding_mask: Tensor | None,
    ) -> Tensor:
        self._check_shapes(query, reference_points, value, spatial_shapes, padding_mask)
        values = self.value_proj(value)
        if padding_mask is not None:
            values = values.masked_fill(padding_mask[..., None], 0)
        per_head = (*query.shape[:2], self._heads, sum(self._points))
        offsets = self.sampling_offsets(query).reshape(*per_head, 2)
        weights = self.attention_weights(query).reshape(per_head).softmax(-1)
        locations = sampling_locations(reference_points, offsets, spatial_shapes, self._points)
        values = values.unflatten(-1, (self._heads, -1))
        output = ms_deform_attn(values, spatial_shapes, locations, weights, points=self._points)
        projected: Tensor = self.output_proj(output)
        return projected

    def _check_shapes(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        spatial_shapes: SpatialShapes,
        padding_mask: Tensor | None,
    ) -> None:
        L, C = len(self._points), self.sampling_offsets.in_features
        size = spatial_shapes.shape if isinstance(spatial_shapes, Tensor) else (len(spatial_shapes), 2)
        if size != (L, 2):
            raise ShapeError(f"spatial_shapes must be L={L} pairs (height, width), got {shown(spatial_shapes)}")
        if query.ndim != 3 or query.shape[2] != C:
            raise ShapeError(f"query must be [N, Lq, C={C}], got shape {tuple(query.shape)}")
        N, Lq = query.shape[:2]
        if value.ndim != 3 or value.shape[2] != C or value.shape[0] != N:
            raise ShapeError(f"value must be [N={N}, S, C={C}], got shape {tuple(value.shape)}")
        shape = tuple(reference_points.shape)
        if len(shape) != 4 or any(n not in legal for n, legal in zip(shape, ((1, N), (1, Lq), (1, L), (2, 4)))):
            raise ShapeError(
                f"reference_points must be [N={N}, Lq={Lq}, L={L}, 2 or 4], or with 1 in place of N, Lq or L, "
                f"got shape {shape}"
            )
        if padding_mask is not None and padding_mask.shape != value.shape[:2]:
            needed = f"N={N}, S={value.shape[1]}"
            raise ShapeError(f"the padding mask must be [{needed}], got shape {tuple(padding_mask.shape)}")


class MSDeformAttn(AttentionBase):
    """Multi-scale deformable attention layer of Deformable DETR.

    Each query looks at a few points of every feature map: it predicts their offsets from a reference point and their
    weights. The state dict is that of Deformable DETR and mmcv.

    Parameters
    ----------
    d_model : int
        C, the channels of queries, values and output; a multiple of `n_heads`.
    n_levels : int
        L, the number of feature maps.
    n_heads : int
        M.
    n_points : int or sequence of L int
        Sampling points of a head on each feature map. A sequence gives every map a number of its own, as in RT-DETRv2
        and D-FINE.
    device, dtype : optional
        Of the parameters, as in `torch.nn.Linear`.

    Attributes
    ----------
    sampling_offsets, attention_weights, value_proj, output_proj : torch.nn.Linear

    Raises
    ------
    ArgumentError
        A parameter is out of range.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch import MSDeformAttn
    >>> shapes = [(8, 12), (4, 6)]
    >>> layer = MSDeformAttn(d_model=32, n_levels=2, n_heads=4, n_points=[3, 5])
    >>> value = torch.randn(1, 8 * 12 + 4 * 6, 32)
    >>> query, reference_points = torch.randn(1, 10, 32), torch.rand(1, 10, 1, 2)
    >>> layer(query, reference_points, value, shapes).shape
    torch.Size([1, 10, 32])
    """

    def __init__(
        self,
        d_model: int = 256,
        n_levels: int = 4,
        n_heads: int = 8,
        n_points: int | Sequence[int] = 4,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_divisible("d_model", d_model, "n_heads", n_heads)
        super().__init__(d_model, n_levels, n_heads, n_points, d_model, device, dtype)
        self.d_model = d_model
        self.n_levels = n_levels
        self.n_heads = n_heads
        self.n_points = n_points

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        spatial_shapes: SpatialShapes,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend to the feature maps.

        Parameters
        ----------
        query : Tensor [N, Lq, C]
        reference_points : Tensor [N, Lq, L, 2] or [N, Lq, L, 4]
            Points (x, y), or boxes (x, y, width, height) around (x, y), as fractions of the feature maps. The third
            axis may be 1, for all levels. Offsets are in pixels for points; for boxes, an offset of P is half a width
            or height.
        value : Tensor [N, S, C]
            Pixels of all feature maps, row by row, one map after the other.
        spatial_shapes : sequence of L (h, w), or integer Tensor [L, 2]
            See `ms_deform_attn`.
        padding_mask : Tensor [N, S], bool, optional
            True for pixels to leave out.

        Returns
        -------
        Tensor [N, Lq, C]
        """
        return self.attend(query, reference_points, value, spatial_shapes, padding_mask)

    def extra_repr(self) -> str:
        return f"{self.d_model}, n_levels={self.n_levels}, n_heads={self.n_heads}, n_points={self.n_points}"


def sampling_locations(
    reference_points: Tensor, offsets: Tensor, spatial_shapes: SpatialShapes, points: Sequence[int]
) -> Tensor:
    """Return the locations [N, Lq, M, K, 2] of predicted offsets [N, Lq, M, K, 2], in at least float32."""
    dtype = torch.promote_types(torch.promote_types(offsets.dtype, reference_points.dtype), torch.float32)
    offsets = offsets.to(dtype)
    centers, sizes = reference_points.to(dtype).expand(-1, -1, len(points), -1).tensor_split([2], dim=-1)
    if sizes.shape[-1]:
        half_sizes = torch.stack([0.5 / n * size for n, size in zip(points, sizes.unbind(2))], dim=2)
        offsets = offsets * _per_point(half_sizes, points)[:, :, None]
    else:
        offsets = offsets / _per_point(_extents(spatial_shapes, offsets), points)
    return _per_point(centers, points)[:, :, None] + offsets


def _extents(spatial_shapes: SpatialShapes, like: Tensor) -> Tensor:
    """Return width and height of each feature map [L, 2]."""
    if not isinstance(spatial_shapes, Tensor):
        # Not `new_tensor`, which waits for the device.
        spatial_shapes = torch.tensor([[h, w] for h, w in spatial_shapes])
    return spatial_shapes.flip(1).to(like.device, like.dtype, non_blocking=True)


def _per_point(levels: Tensor, points: Sequence[int]) -> Tensor:
    """Repeat the entries of `levels` [..., L, c] for the points of each level, giving [..., K, c]."""
    return torch.cat([level.expand(*level.shape[:-2], n, -1) for n, level in zip(points, levels.split(1, -2))], dim=-2)
