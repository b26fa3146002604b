"""Deformable RoI pooling layers for one feature map and for the levels of a pyramid."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dcnops._arguments import Pair, expand_pair
from dcnops._errors import ArgumentError, ShapeError

from .deform_conv2d_layers import scaled_masks
from .functional import deform_roi_pool
from .zero_layers import Device, OffsetProjection


class RoIPoolBase(nn.Module):
    """Numeric parameters that every deformable RoI pooling layer has."""

    def __init__(
        self, output_size: Pair, spatial_scale: float = 1.0, sampling_ratio: int = 2, gamma: float = 0.1
    ) -> None:
        super().__init__()
        self.output_size = expand_pair("output_size", output_size)
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.gamma = gamma

    def pool(self, input: Tensor, rois: Tensor, offset: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return deform_roi_pool(
            input,
            rois,
            offset,
            mask,
            output_size=self.output_size,
            spatial_scale=self.spatial_scale,
            sampling_ratio=self.sampling_ratio,
            gamma=self.gamma,
        )

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, gamma={self.gamma}"
        )


class DeformRoIPool(RoIPoolBase):
    """Deformable RoI pooling layer that takes offsets and masks as arguments of `forward`.

    See `deform_roi_pool` for the operation. Without offsets and masks it is RoIAlign (``aligned=True``).

    Parameters
    ----------
    output_size : int or (P, Q)
        Bins of a region, vertical and horizontal.
    spatial_scale : float
        Pixels of the feature map per unit of the regions, such as 1/16.
    sampling_ratio : int
        Samples of a bin along each axis; with 0, one for each pixel of the bin.
    gamma : float
        Factor of the offsets.

    Raises
    ------
    ArgumentError
        `output_size` is not a positive integer or a pair of them.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch import DeformRoIPool
    >>> pool = DeformRoIPool(7, spatial_scale=1 / 16)
    >>> rois = torch.tensor([[0, 32.0, 16.0, 320.0, 240.0]])  # image, x1, y1, x2, y2
    >>> pool(torch.randn(1, 4, 25, 40), rois).shape
    torch.Size([1, 4, 7, 7])
    """

    def forward(self, input: Tensor, rois: Tensor, offset: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Pool `rois` [R, 5] from `input` [N, C, H, W], giving [R, C, P, Q]. See `deform_roi_pool`."""
        return self.pool(input, rois, offset, mask)


class HiddenLinear(nn.Linear):
    """Hidden layer of an offset branch: weights from N(0, 0.01), bias zero."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)


class OffsetBranchRoIPool(RoIPoolBase):
    """RoI pooling with a branch `offset_fc` that predicts `values_per_bin` values from the RoIAlign features."""

    values_per_bin: int

    def __init__(
        self,
        output_size: Pair,
        output_channels: int,
        deform_fc_channels: int = 1024,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 2,
        gamma: float = 0.1,
        *,
        num_fcs: int = 1,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(output_size, spatial_scale, sampling_ratio, gamma)
        sizes = {"output_channels": output_channels, "deform_fc_channels": deform_fc_channels, "num_fcs": num_fcs}
        for name, size in sizes.items():
            if size < 1:
                raise ArgumentError(f"{name} must be at least 1, got {size}")
        self.output_channels = output_channels
        self.deform_fc_channels = deform_fc_channels
        bins = math.prod(self.output_size)
        layers: list[nn.Module] = []
        features = output_channels * bins
        for _ in range(num_fcs - 1):
            hidden = HiddenLinear(features, deform_fc_channels, device=device, dtype=dtype)
            layers += [hidden, nn.ReLU(inplace=True)]
            features = deform_fc_channels
        layers.append(OffsetProjection(features, self.values_per_bin * bins, device=device, dtype=dtype))
        self.offset_fc = nn.Sequential(*layers)

    def run_branch(self, input: Tensor, rois: Tensor) -> Tensor:
        """Return the values [R, values_per_bin, P, Q] that the branch predicts."""
        if isinstance(input, Tensor) and input.ndim == 4 and input.shape[1] != self.output_channels:
            raise ShapeError(f"input must be [N, C={self.output_channels}, H, W], got shape {tuple(input.shape)}")
        values: Tensor = self.offset_fc(self.pool(input, rois).flatten(1))
        return values.reshape(-1, self.values_per_bin, *self.output_size)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, output_channels={self.output_channels}"


class DeformRoIPoolPack(OffsetBranchRoIPool):
    """Deformable RoI pooling layer (v1) that predicts its offsets. It starts as RoIAlign (``aligned=True``).

    The layer pools the regions by RoIAlign, turns these features into offsets with fully connected layers, and pools
    the regions again with the offsets.

    Parameters
    ----------
    output_size, spatial_scale, sampling_ratio, gamma
        See `DeformRoIPool`.
    output_channels : int
        C, the channels of the feature map.
    deform_fc_channels : int
        Width of the branch's hidden layers, if it has any.
    num_fcs : int
        Fully connected layers of the branch: one in the paper, three in mmcv.
    device, dtype : optional
        Of the parameters, as in `torch.nn.Linear`.

    Attributes
    ----------
    offset_fc : torch.nn.Sequential, C*P*Q to 2*P*Q features
        The branch. Weights of hidden layers start as N(0, 0.01), the last layer starts at zero.

    Raises
    ------
    ArgumentError
        `output_size` is not a positive integer or a pair of them, or another size is below 1.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch import DeformRoIPoolPack
    >>> pool = DeformRoIPoolPack(7, 4, spatial_scale=1 / 16)
    >>> rois = torch.tensor([[0, 32.0, 16.0, 320.0, 240.0]])  # image, x1, y1, x2, y2
    >>> pool(torch.randn(1, 4, 25, 40), rois).shape
    torch.Size([1, 4, 7, 7])
    >>> pool.offset_fc[-1].weight.shape
    torch.Size([98, 196])
    """

    values_per_bin = 2

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Pool `rois` [R, 5] from `input` [N, C, H, W], giving [R, C, P, Q]. See `deform_roi_pool`."""
        return self.pool(input, rois, self.run_branch(input, rois))


class ModulatedDeformRoIPoolPack(OffsetBranchRoIPool):
    """Modulated deformable RoI pooling layer (v2) that predicts its offsets and masks.

    Like `DeformRoIPoolPack`, with masks. Initially its output is `mask_scale` / 2 times that of RoIAlign.

    Parameters
    ----------
    output_size, output_channels, deform_fc_channels, spatial_scale, sampling_ratio, gamma, num_fcs, device, dtype
        See `DeformRoIPoolPack`; `num_fcs` is 3 by default.
    mask_scale : float
        The masks are ``mask_scale * sigmoid(logits)``: 1 as in the paper, 2 to start as RoIAlign.

    Attributes
    ----------
    offset_fc : torch.nn.Sequential, C*P*Q to 3*P*Q features
        The branch: first the horizontal offsets of all bins, then the vertical ones, then the logits of the masks.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch import ModulatedDeformRoIPoolPack
    >>> pool = ModulatedDeformRoIPoolPack(7, 4, spatial_scale=1 / 16)
    >>> [layer.out_features for layer in pool.offset_fc[::2]]
    [1024, 1024, 147]
    """

    values_per_bin = 3

    def __init__(
        self,
        output_size: Pair,
        output_channels: int,
        deform_fc_channels: int = 1024,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 2,
        gamma: float = 0.1,
        *,
        num_fcs: int = 3,
        mask_scale: float = 1.0,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = (output_size, output_channels, deform_fc_channels)
        numbers = (spatial_scale, sampling_ratio, gamma)
        super().__init__(*sizes, *numbers, num_fcs=num_fcs, device=device, dtype=dtype)
        self.mask_scale = mask_scale

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Pool `rois` [R, 5] from `input` [N, C, H, W], giving [R, C, P, Q]. See `deform_roi_pool`."""
        values = self.run_branch(input, rois)
        return self.pool(input, rois, values[:, :2], scaled_masks(values[:, 2], self.mask_scale))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mask_scale={self.mask_scale}"


class MultiScaleDeformRoIPool(nn.Module):
    """Pooling layer that pools each box from the level of a feature pyramid that suits its size.

    It is called like ``torchvision.ops.MultiScaleRoIAlign`` and picks levels by the same rule, equation 1 of the
    Feature Pyramid Network paper. Unlike that layer, it shifts regions by half a pixel (``aligned=True``).

    Parameters
    ----------
    featmap_names : sequence of str
        The feature maps to use, fine to coarse; each is half as large as the previous one.
    pool : DeformRoIPool, DeformRoIPoolPack or ModulatedDeformRoIPoolPack
        The layer that pools from a level, with `spatial_scale` 1. Any other module (input, rois) -> [R, C, P, Q] with
        attributes `spatial_scale` and `output_size` works too.
    share_branch : bool
        Use `pool`, and with it one offset branch, for all levels, as in the paper. If False, each level has a copy.
    canonical_scale : int
        Size of a box, in pixels of the image, that is pooled from `canonical_level`.
    canonical_level : int
        Base-2 logarithm of a level's stride: 4 means stride 16.

    Attributes
    ----------
    pools : torch.nn.ModuleList
        Only `pool` if the branch is shared, otherwise one module for each of `featmap_names`.
    output_size : (P, Q)

    Raises
    ------
    ArgumentError
        `featmap_names` is empty, or the `spatial_scale` of `pool` is not 1.

    Notes
    -----
    To use it in a detector of torchvision, assign it after construction:
    ``detector.roi_heads.box_roi_pool = MultiScaleDeformRoIPool(...)``.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch import ModulatedDeformRoIPoolPack, MultiScaleDeformRoIPool
    >>> pool = MultiScaleDeformRoIPool(["0", "1"], ModulatedDeformRoIPoolPack(7, 4))
    >>> features = {"0": torch.randn(1, 4, 64, 64), "1": torch.randn(1, 4, 32, 32)}
    >>> boxes = torch.tensor([[0.0, 0, 40, 30], [10, 0, 250, 200]])  # x1, y1, x2, y2
    >>> pool(features, [boxes], [(256, 256)]).shape
    torch.Size([2, 4, 7, 7])
    """

    def __init__(
        self,
        featmap_names: Sequence[str],
        pool: nn.Module,
        share_branch: bool = True,
        *,
        canonical_scale: int = 224,
        canonical_level: int = 4,
    ) -> None:
        super().__init__()
        if not featmap_names:
            raise ArgumentError("featmap_names must name at least one feature map")
        if pool.spatial_scale != 1:
            raise ArgumentError(f"pool must have spatial_scale=1, levels bring their own, got {pool.spatial_scale}")
        self.featmap_names = list(featmap_names)
        self.output_size = pool.output_size
        self.canonical_scale = canonical_scale
        self.canonical_level = canonical_level
        copies = [] if share_branch else [copy.deepcopy(pool) for _ in self.featmap_names[1:]]
        self.pools = nn.ModuleList([pool, *copies])

    def forward(
        self, features: Mapping[str, Tensor], boxes: Sequence[Tensor], image_shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Pool the boxes of all images.

        Parameters
        ----------
        features : mapping of str to Tensor [N, C, H, W]
            The feature maps. Names that are not in `featmap_names` are ignored.
        boxes : sequence of N Tensors [R_n, 4], in pixels of the image
            Boxes (x1, y1, x2, y2) of each image, of any dtype. They are converted to at least float32.
        image_shapes : sequence of N (height, width)
            Sizes of the images before they were padded to a batch. The scale of a level is its longer side divided by
            that of the largest image, rounded to the nearest power of two.

        Returns
        -------
        Tensor [R_0 + R_1 + ..., C, P, Q]

        Raises
        ------
        ArgumentError
            A feature map is missing or has the wrong size, or `boxes` and `image_shapes` differ in length or are empty.
        ShapeError, DtypeError, DeviceError
            See `deform_roi_pool`.
        """
        missing = [name for name in self.featmap_names if name not in features]
        if missing:
            raise ArgumentError(f"features must hold {missing}, got {list(features)}")
        if not boxes or len(boxes) != len(image_shapes):
            raise ArgumentError(
                f"boxes and image_shapes must have one entry for each image, got {len(boxes)} and {len(image_shapes)}"
            )
        maps = [features[name] for name in self.featmap_names]
        # A 16-bit number cannot hold the index of every image, nor every coordinate.
        precise = [item.to(torch.promote_types(item.dtype, torch.float32)) for item in boxes]
        rois = torch.cat([nn.functional.pad(item, (1, 0), value=image) for image, item in enumerate(precise)])
        height, width = (max(sizes) for sizes in zip(*image_shapes))
        # The padding of the batch distorts the scale least along the longer side.
        extent, axis = max((height, -2), (width, -1))
        exponents = [round(math.log2(extent / level.shape[axis])) for level in maps]
        if exponents != list(range(exponents[0], exponents[0] + len(exponents))):
            sizes = [tuple(level.shape[-2:]) for level in maps]
            raise ArgumentError(
                f"features must halve in size from each of {self.featmap_names} to the next, got {sizes}"
            )
        level_of = self._levels(rois[:, 1:], exponents)

        pooled, order = [], []
        for index, (level, exponent) in enumerate(zip(maps, exponents)):
            pool = self.pools[index if len(self.pools) > 1 else 0]
            rows = torch.where(level_of == index)[0]
            # A power of two: the division is exact.
            scale = rois.new_tensor([1, *[2.0**-exponent] * 4])
            # Run levels without boxes too: data-parallel training expects a gradient for every parameter.
            pooled.append(pool(level, rois[rows] * scale))
            order.append(rows)
        return torch.cat(pooled)[torch.argsort(torch.cat(order))]

    def _levels(self, boxes: Tensor, exponents: Sequence[int]) -> Tensor:
        """Return an index into `featmap_names` for each of `boxes` [R, 4]; level k has stride ``2**exponents[k]``."""
        x1, y1, x2, y2 = boxes.unbind(1)
        size = torch.sqrt((x2 - x1) * (y2 - y1))
        level = torch.floor(self.canonical_level + torch.log2(size / self.canonical_scale) + 1e-6)
        # Inverted and NaN boxes have a NaN size. They go to the finest level.
        level = level.nan_to_num(nan=exponents[0]).clamp(exponents[0], exponents[-1])
        return level.to(torch.int64) - exponents[0]

    def extra_repr(self) -> str:
        return f"featmap_names={self.featmap_names}, share_branch={len(self.pools) == 1}"
