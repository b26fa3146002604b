"""Heads of the detectors in training: the losses of boxes, classes and masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.models.detection.roi_heads import RoIHeads, project_masks_on_boxes
from torchvision.ops import roi_align

MOST_PIXELS = 2**27  # masks converted to float32 at a time


class RegionHeads(RoIHeads):
    """Torchvision's heads with a loss of the boxes and with mask targets of their own.

    Parameters
    ----------
    box_loss_beta : float
        Size of a box delta at which the smooth L1 loss becomes linear: 1 in Detectron, 1/9 in torchvision.
    aligned_masks : bool
        Cut mask targets with pixel centres at half-integer coordinates, from masks of the size of the image file.
        Otherwise, cut them like torchvision from masks of the size of the network's input.
    """

    def __init__(self, *args: Any, box_loss_beta: float, aligned_masks: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.box_loss_beta = box_loss_beta
        self.aligned_masks = aligned_masks

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return the detections of each image, or in training the losses."""
        if not self.training:
            found: tuple[list[dict[str, Tensor]], dict[str, Tensor]] = super().forward(
                features, proposals, image_shapes
            )
            return found
        assert targets is not None
        boxes, matched, labels, deltas = self.select_training_samples(proposals, targets)
        pooled = self.box_roi_pool(features, boxes, image_shapes)
        scores, predicted = self.box_predictor(self.box_head(pooled))
        losses = self._box_losses(scores, predicted, torch.cat(labels), torch.cat(deltas))
        if self.has_mask():
            positive = [torch.where(item > 0)[0] for item in labels]
            boxes, matched, labels = (
                [item[rows] for item, rows in zip(items, positive)] for items in (boxes, matched, labels)
            )
            logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))
            masks = [target["masks"] for target in targets]
            cut = [self._mask_targets(*item, logits.shape[-1]) for item in zip(masks, boxes, matched, image_shapes)]
            losses["loss_mask"] = _mask_loss(logits, torch.cat(labels), torch.cat(cut))
        return [], losses

    def _box_losses(self, scores: Tensor, predicted: Tensor, labels: Tensor, deltas: Tensor) -> dict[str, Tensor]:
        positive = torch.where(labels > 0)[0]
        chosen = predicted.unflatten(1, (-1, 4))[positive, labels[positive]]
        loss = functional.smooth_l1_loss(chosen, deltas[positive], beta=self.box_loss_beta, reduction="sum")
        return {
            "loss_classifier": functional.cross_entropy(scores, labels),
            "loss_box_reg": loss / max(len(labels), 1),
        }

    def _mask_targets(
        self, masks: Tensor, boxes: Tensor, matched: Tensor, image_shape: tuple[int, int], side: int
    ) -> Tensor:
        """Cut the masks [n, H, W] of boxes [m, 4] in pixels of the network's input; the result is [m, side, side]."""
        if not self.aligned_masks:
            cut: Tensor = project_masks_on_boxes(masks.to(boxes.dtype), boxes, matched, side)
            return cut
        (height, width), (input_height, input_width) = masks.shape[1:], image_shape
        scale = boxes.new_tensor([width / input_width, height / input_height] * 2)
        return cut_masks(masks, boxes * scale, matched, side)


def cut_masks(masks: Tensor, boxes: Tensor, matched: Tensor, side: int) -> Tensor:
    """Cut boxes out of masks and resize them, with pixel centres at half-integer coordinates.

    Parameters
    ----------
    masks : Tensor [n, H, W]
        Zeros and ones of any type.
    boxes : Tensor [m, 4]
        Corners x1, y1, x2, y2 in pixels of the masks.
    matched : Tensor [m]
        Index of the mask of each box.
    side : int

    Returns
    -------
    Tensor [m, side, side]
        Mean of the bilinearly interpolated mask over each cell, 0 to 1, in the data type of `boxes`.
    """
    cut = boxes.new_zeros(len(boxes), side, side)
    chunk = max(1, MOST_PIXELS // max(1, masks[0].numel() if len(masks) else 1))
    for first in range(0, len(masks), chunk):
        part = masks[first : first + chunk, None].to(boxes.dtype)
        rows = torch.arange(len(boxes), device=boxes.device)
        if chunk < len(masks):
            rows = torch.where((matched >= first) & (matched < first + chunk))[0]
        regions = torch.cat([(matched[rows] - first)[:, None].to(boxes.dtype), boxes[rows]], 1)
        cut[rows] = roi_align(part, regions, (side, side), 1.0, -1, aligned=True)[:, 0]
    return cut


def _mask_loss(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of the masks [m, classes, S, S] of the boxes' classes; 0 without boxes."""
    if not len(labels):
        return logits.sum() * 0
    chosen = logits[torch.arange(len(labels), device=labels.device), labels]
    return functional.binary_cross_entropy_with_logits(chosen, targets.to(chosen.dtype))
