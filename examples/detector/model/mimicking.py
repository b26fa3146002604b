"""R-CNN feature mimicking, section 3.3 of the paper: RoI features learn from those of an R-CNN on the crops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.ops import box_iou, roi_align

from ..config import MimickingConfig
from .network import precise


class MimickingDetector(nn.Module):
    """Detector from `build_detector` in training together with an R-CNN on crops of the image.

    The R-CNN shares the detector's backbone, RoI pooling (with the whole crop as the region) and two fully connected
    layers; only its classifier is separate. The result is the detector's losses and

    - ``loss_mimic``: ``1 - cos(f_RCNN, f_FRCNN)``, summed (or averaged, see `MimickingConfig.reduction`) over the boxes
      of an image, mean over the images, weighted; equation 3;
    - ``loss_crop``: cross-entropy of the classifier on ``f_RCNN``, mean over the boxes, weighted.

    The boxes are sampled from the RoIs in the loss of the head. These consist of proposals and ground truth; the latter
    is left out, unless `MimickingConfig.ground_truth` is set. After the training only the detector is needed.
    """

    def __init__(self, detector: GeneralizedRCNN, config: MimickingConfig) -> None:
        super().__init__()
        self.detector = detector
        self.config = config
        scores = detector.roi_heads.box_predictor.cls_score
        self.classifier = nn.Linear(scores.in_features, scores.out_features, device=scores.weight.device)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: list[Tensor], targets: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Compute the losses of a batch of images and targets as for the detector."""
        with _record(self.detector) as seen:
            losses: dict[str, Tensor] = self.detector(images, targets)
        resized, resized_targets = seen["transform"]
        regions: list[Tensor] = seen["regions"]
        labels = [
            labels_of(boxes, target["boxes"], target["labels"], self.detector.roi_heads.proposal_matcher.high_threshold)
            for boxes, target in zip(regions, resized_targets)
        ]
        rows = [self._choose(item, proposed) for item, proposed in zip(labels, seen["proposed"])]
        numbers = [len(item) for item in rows]
        features = torch.cat(
            [item[chosen] for item, chosen in zip(seen["features"].split([len(boxes) for boxes in regions]), rows)]
        )
        crops = cut_crops(resized.tensors, [boxes[chosen] for boxes, chosen in zip(regions, rows)], self.config.crop)
        crop_features = self._crop_features(crops)
        # Without boxes this yields a zero loss with gradients, which data-parallel training waits for.
        scores = precise(self.classifier(functional.relu(crop_features)))
        classes = torch.cat([item[chosen] for item, chosen in zip(labels, rows)])
        entropy = functional.cross_entropy(scores, classes, reduction="sum") / max(len(classes), 1)
        if self.config.detach:
            crop_features = crop_features.detach()
        if self.config.features == "after":
            features, crop_features = functional.relu(features), functional.relu(crop_features)
        mimic = mimic_loss(crop_features, features, numbers, self.config.reduction)
        return {
            **losses,
            "loss_mimic": self.config.weight * mimic,
            "loss_crop": self.config.classifier_weight * entropy,
        }

    def _choose(self, labels: Tensor, proposed: Tensor) -> Tensor:
        """Sample indices of an image's regions of the configured kind, at most `boxes`.

        `proposed` is False for the regions that are ground truth.
        """
        wanted = {"fg": labels > 0, "bg": labels == 0, "all": labels >= 0}[self.config.regions]
        if not self.config.ground_truth:
            wanted = wanted & proposed
        rows = torch.where(wanted)[0]
        return rows[torch.randperm(len(rows), device=rows.device)[: self.config.boxes]]

    def _crop_features(self, crops: Tensor) -> Tensor:
        """Compute f_RCNN before its last ReLU [n, width] in chunks of crops.

        Only the last chunk keeps its activations; the others are recomputed in the backward pass, one at a time.
        """
        if not len(crops):
            return crops.new_zeros(0, self.classifier.in_features)
        *others, last = crops.split(self.config.chunk)
        features = [precise(checkpoint(self._chunk, chunk, use_reentrant=False)) for chunk in others]
        return torch.cat([*features, precise(self._chunk(last))])

    def _chunk(self, crops: Tensor) -> Tensor:
        heads, side = self.detector.roi_heads, self.config.crop
        whole = torch.tensor([[0.0, 0, side, side]], device=crops.device)
        maps = self.detector.backbone(crops)
        pooled = heads.box_roi_pool(maps, [whole] * len(crops), [(side, side)] * len(crops))
        hidden: Tensor = functional.relu(heads.box_head.fc6(pooled.flatten(1)))
        return heads.box_head.fc7(hidden)


def labels_of(boxes: Tensor, truth: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Return the class of the ground truth [n, 4] that each box [R, 4] overlaps most, or 0 below `threshold`."""
    if not len(truth):
        return labels.new_zeros(len(boxes))
    overlap, index = box_iou(truth, boxes).max(0)
    return torch.where(overlap >= threshold, labels[index], 0)


def cut_crops(images: Tensor, boxes: Sequence[Tensor], side: int) -> Tensor:
    """Crop boxes [R_n, 4] of each of the images [N, 3, H, W] and resize them bilinearly to [3, side, side]."""
    dtype = torch.promote_types(images.dtype, torch.float32)  # 16-bit coordinates would be off by pixels
    regions = [item.to(dtype) for item in boxes]
    crops: Tensor = roi_align(images.to(dtype), regions, (side, side), 1.0, -1, aligned=True)
    return crops.to(images.dtype).detach()


def mimic_loss(crop_features: Tensor, features: Tensor, numbers: Sequence[int], reduction: str) -> Tensor:
    """Compute equation 3: ``1 - cos`` of features [n, width], summed (or averaged) per image; mean over the images.

    `numbers` holds the number of boxes of each image.
    """
    distances = 1 - functional.cosine_similarity(precise(crop_features), precise(features), dim=1)
    per_image = torch.stack([item.sum() for item in distances.split(list(numbers))])
    if reduction == "mean":
        per_image = per_image / per_image.new_tensor(numbers).clamp(min=1)
    return per_image.mean()


@contextmanager
def _record(detector: GeneralizedRCNN) -> Iterator[dict[str, Any]]:
    """Record the transformed batch, the regions, which of them the RPN proposed, and the RoI features in a context."""
    seen: dict[str, Any] = {}
    heads = detector.roi_heads

    def subsample(labels: list[Tensor]) -> list[Tensor]:
        """Sample from the proposals of each image and, appended to them by torchvision, its ground truth."""
        sampled: list[Tensor] = type(heads).subsample(heads, labels)
        seen["proposed"] = [rows < len(boxes) for rows, boxes in zip(sampled, seen["proposals"])]
        return sampled

    hooks = [
        detector.transform.register_forward_hook(lambda module, given, result: seen.update(transform=result)),
        detector.rpn.register_forward_hook(lambda module, given, result: seen.update(proposals=result[0])),
        heads.box_roi_pool.register_forward_hook(lambda module, given, result: seen.update(regions=given[1])),
        heads.box_head.fc7.register_forward_hook(lambda module, given, result: seen.update(features=result)),
    ]
    heads.subsample = subsample
    try:
        yield seen
    finally:
        del heads.subsample
        for hook in hooks:
            hook.remove()
