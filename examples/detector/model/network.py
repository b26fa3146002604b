"""Detectors: torchvision's region proposal network and heads with the backbone and pooling of a preset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes

from dcnops import ArgumentError

from ..config import NetworkConfig
from ..errors import UserError
from .backbones import DilatedBackbone, PyramidBackbone, build_backbone
from .heads import RegionHeads
from .roi_pooling import build_box_pool, build_mask_pool


def build_detector(network: NetworkConfig, num_categories: int) -> GeneralizedRCNN:
    """Build the Faster R-CNN or Mask R-CNN of section 5.1 of the paper with random weights.

    In training it maps images and targets to losses, otherwise images to detections, like torchvision's detectors.
    Masks have the size of the mask head, [n, 1, 28, 28]; `predict.infer` pastes them. `num_categories` excludes the
    background.
    """
    network = network.resolve()
    try:
        backbone = build_backbone(network)
    except ArgumentError as error:
        raise UserError(f"the network cannot be built: {error}") from None
    transform = DetectorTransform(network)
    return GeneralizedRCNN(
        backbone, _proposal_network(network, backbone), _roi_heads(network, backbone, num_categories + 1), transform
    )


class DetectorTransform(GeneralizedRCNNTransform):
    """Transform that resizes and normalises images, scales boxes back, and does not paste masks.

    Torchvision's transform pastes each mask into a float image of full size: 432 MB per mask at 12000x9000. The masks
    of targets keep the size of the image file if `network.aligned_masks` is true.
    """

    train_sizes: tuple[int, ...] = ()  # shorter sides in training, chosen at random; else `min_size`

    def __init__(self, network: NetworkConfig) -> None:
        super().__init__(network.min_size, network.max_size, list(network.image_mean), list(network.image_std))
        self.resize_masks = not network.aligned_masks
        self.library = network.resize

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Resize a normalised image [3, H, W] and its target."""
        height, width = image.shape[1:]
        if self.library != "torchvision":
            size = self.torch_choice(self.min_size) if self.training else self.min_size[-1]
            scale = min(size / min(height, width), self.max_size / max(height, width))
            self.fixed_size = (int(width * scale + 0.5), int(height * scale + 0.5))
        if target is None or self.resize_masks:
            resized, target = super().resize(image, target)
        else:
            resized, others = super().resize(image, {name: value for name, value in target.items() if name != "masks"})
            target = {**target, **others}
        if self.library == "torchvision":
            return resized, target
        if self.library == "pillow":
            resized = functional.interpolate(image[None], resized.shape[1:], mode="bilinear", antialias=True)[0]
        mean, std = (resized.new_tensor(values)[:, None, None] for values in (self.image_mean, self.image_std))
        return self.normalize(((resized * std + mean) * 255).round() / 255), target

    def torch_choice(self, k: list[int]) -> int:
        """Choose a size in training."""
        size: int = super().torch_choice(list(self.train_sizes) or k)
        return size

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        for item, shape, original in zip(result, image_shapes, original_image_sizes):
            item["boxes"] = resize_boxes(item["boxes"], shape, original)
        return result


class PreciseAnchorGenerator(AnchorGenerator):
    """Anchor generator that computes in float32 for 16-bit maps; bfloat16 would move anchors by pixels.

    Torchvision rounds the sides of anchors, and divides the size of the image by that of the map to get their distance:
    61 instead of 64 pixels in the last of 13 rows of a padded image of 800 rows. With `exact` neither is done.
    """

    def __init__(self, sizes: Any, ratios: Any, exact: bool) -> None:
        self.exact = exact  # first, as the constructor calls `generate_anchors`
        super().__init__(sizes, ratios)

    def generate_anchors(self, scales: Any, aspect_ratios: Any, *args: Any, **kwargs: Any) -> Tensor:
        if not self.exact:
            rounded: Tensor = super().generate_anchors(scales, aspect_ratios, *args, **kwargs)
            return rounded
        heights = torch.tensor(aspect_ratios).sqrt()
        sides = torch.stack([1 / heights, heights], 1)[:, None] * torch.tensor(scales)[:, None]
        return torch.cat([-sides, sides], -1).flatten(0, 1) / 2

    def grid_anchors(self, grid_sizes: list[list[int]], strides: list[list[Tensor]]) -> list[Tensor]:
        if self.exact:
            strides = [[2 ** stride.log2().round() for stride in pair] for pair in strides]
        anchors: list[Tensor] = super().grid_anchors(grid_sizes, strides)
        return anchors

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        super().set_cell_anchors(torch.promote_types(dtype, torch.float32), device)


class SelectiveProposalNetwork(RegionProposalNetwork):
    """Region proposal network on a subset of the backbone's maps.

    With a `border` of at least 0 pixels, the loss leaves out anchors that reach farther out of the image.
    """

    def __init__(self, maps: Sequence[str], border: float, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.maps = list(maps)
        self.border = border
        self._image_sizes: list[tuple[int, int]] = []

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        self._image_sizes = images.image_sizes
        proposals: tuple[list[Tensor], dict[str, Tensor]] = super().forward(
            images, {name: features[name] for name in self.maps}, targets
        )
        return proposals

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return labels [n] of 1, 0 and -1 (left out), and boxes of the ground truth [n, 4] of each image's anchors."""
        if self.border < 0:
            assigned: tuple[list[Tensor], list[Tensor]] = super().assign_targets_to_anchors(anchors, targets)
            return assigned
        inside = [_inside(boxes, size, self.border) for boxes, size in zip(anchors, self._image_sizes)]
        chosen = [boxes[rows] for boxes, rows in zip(anchors, inside)]
        labels = [boxes.new_full((len(boxes),), -1) for boxes in anchors]
        matched = [torch.zeros_like(boxes) for boxes in anchors]
        for rows, *filled, found in zip(
            inside, labels, matched, zip(*super().assign_targets_to_anchors(chosen, targets))
        ):
            for values, part in zip(filled, found):
                values[rows] = part
        return labels, matched


def _inside(boxes: Tensor, size: tuple[int, int], border: float) -> Tensor:
    """Return the indices of the boxes [n, 4] that reach at most `border` pixels out of the image, or else of all."""
    limits = boxes.new_tensor(size[::-1]) + border
    rows = torch.where((boxes[:, :2] >= -border).all(1) & (boxes[:, 2:] <= limits).all(1))[0]
    return rows if len(rows) else torch.arange(len(boxes), device=boxes.device)


class PreciseRPNHead(RPNHead):
    """RPN head with float32 results under autocast; torchvision rounds boxes to the dtype of their deltas."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [precise(item) for item in logits], [precise(item) for item in deltas]


class PreciseBoxPredictor(FastRCNNPredictor):
    """Box predictor with float32 results under autocast, for the same reason."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, deltas = super().forward(x)
        return precise(scores), precise(deltas)


class PreciseMaskPredictor(MaskRCNNPredictor):
    """Mask predictor with float32 results under autocast, as needed for the loss and for pasting."""

    def forward(self, x: Tensor) -> Tensor:
        return precise(super().forward(x))


def precise(values: Tensor) -> Tensor:
    """Convert 16-bit values to float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _proposal_network(network: NetworkConfig, backbone: DilatedBackbone | PyramidBackbone) -> SelectiveProposalNetwork:
    sizes = tuple((size,) for size in network.anchor_sizes) if network.has_pyramid else (network.anchor_sizes,)
    anchors = PreciseAnchorGenerator(sizes, (network.anchor_ratios,) * len(sizes), network.exact_anchors)
    return SelectiveProposalNetwork(
        backbone.rpn_maps,
        network.rpn_border,
        anchors,
        PreciseRPNHead(backbone.rpn_channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=network.rpn_positive_iou,
        bg_iou_thresh=network.rpn_negative_iou,
        batch_size_per_image=network.rpn_batch,
        positive_fraction=network.rpn_positive_fraction,
        pre_nms_top_n={"training": network.rpn_candidates_train, "testing": network.rpn_candidates_test},
        post_nms_top_n={"training": network.proposals_train, "testing": network.proposals_test},
        nms_thresh=network.rpn_nms,
    )


def _roi_heads(network: NetworkConfig, backbone: DilatedBackbone | PyramidBackbone, num_classes: int) -> RegionHeads:
    box_pool = build_box_pool(network, backbone.roi_maps)
    height, width = box_pool.output_size
    heads = RegionHeads(
        box_pool,
        TwoMLPHead(backbone.out_channels * height * width, network.head_channels),
        PreciseBoxPredictor(network.head_channels, num_classes),
        fg_iou_thresh=network.roi_positive_iou,
        bg_iou_thresh=network.roi_positive_iou,
        batch_size_per_image=network.roi_batch,
        positive_fraction=network.roi_positive_fraction,
        bbox_reg_weights=None,
        score_thresh=network.score_threshold,
        nms_thresh=network.detection_nms,
        detections_per_img=network.max_detections,
        box_loss_beta=network.box_loss_beta,
        aligned_masks=network.aligned_masks,
    )
    if network.has_masks:
        channels = backbone.out_channels
        heads.mask_roi_pool = build_mask_pool(network, backbone.roi_maps)
        heads.mask_head = MaskRCNNHeads(channels, [channels] * 4, dilation=1)
        heads.mask_predictor = PreciseMaskPredictor(channels, channels, num_classes)
    _initialise(heads)
    return heads


def _initialise(heads: RegionHeads) -> None:
    """Initialise the heads as in detectron2: nearly uniform scores, box deltas and mask logits near zero."""
    for layer in (heads.box_head.fc6, heads.box_head.fc7):
        nn.init.kaiming_uniform_(layer.weight, a=1)  # Caffe2's XavierFill
        nn.init.zeros_(layer.bias)
    last = [(heads.box_predictor.cls_score, 0.01), (heads.box_predictor.bbox_pred, 0.001)]
    if heads.has_mask():
        last.append((heads.mask_predictor.mask_fcn_logits, 0.001))
    for layer, deviation in last:
        nn.init.normal_(layer.weight, std=deviation)
        nn.init.zeros_(layer.bias)
