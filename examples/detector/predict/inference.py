"""Inference: detections of a network, with masks as run lengths to save memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import expand_boxes, expand_masks, paste_mask_in_image

from ..data import Category, pad_elongated

RLE = dict[str, Any]  # COCO's compressed run lengths: {"size": [height, width], "counts": str}

AMP_TYPES = {"none": None, "float16": torch.float16, "bfloat16": torch.bfloat16}
MASK_THRESHOLD = 0.5


@dataclass(frozen=True)
class Detections:
    """Detections in one image, in order of decreasing score."""

    boxes: Tensor  # float32 [n, 4], x1 y1 x2 y2 in pixels, inside the image
    labels: Tensor  # int64 [n], 1 for the first category
    scores: Tensor  # float32 [n] in 0..1
    masks: list[RLE] | None  # run lengths of the image's size; None from a network without masks


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch a model to evaluation mode in a context, and restore the mode of every module afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def infer(
    model: nn.Module,
    images: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    *,
    threshold: float = 0,
    amp_dtype: torch.dtype | None = None,
) -> list[Detections]:
    """Run a network from `build_detector` in evaluation mode (see `evaluating`) without gradients.

    `images` are float32 [3, H, W] in 0..1 on the network's device. `sizes` are the (width, height) that boxes and masks
    refer to: the image's, or the original's of a shrunk image. `threshold` is the least score of a detection.
    """
    padded = [pad_elongated(image) for image in images]
    autocast = torch.autocast(images[0].device.type, dtype=amp_dtype, enabled=amp_dtype is not None)
    # Not inference mode, as tensors that a module caches in this call must remain usable in training.
    with torch.no_grad(), autocast:
        outputs = model(padded)
    return [_detections(*item, threshold) for item in zip(outputs, images, sizes)]


def coco_results(detections: Detections, image_id: int, categories: Sequence[Category]) -> list[dict[str, Any]]:
    """Convert the detections in one image to entries of a COCO results file.

    Each float32 becomes the shortest decimal number that rounds to it, so a JSON file preserves the exact values.
    """
    boxes = detections.boxes.clone()
    boxes[:, 2:] -= boxes[:, :2]
    values = torch.cat((boxes, detections.scores[:, None]), 1).numpy()
    numbers = [[float(str(value)) for value in row] for row in values]
    results: list[dict[str, Any]] = [
        {"image_id": image_id, "category_id": categories[label - 1].id, "bbox": row[:4], "score": row[4]}
        for row, label in zip(numbers, detections.labels.tolist())
    ]
    for result, mask in zip(results, detections.masks or []):
        result["segmentation"] = mask
    return results


def encode_rle(mask: NDArray[Any]) -> RLE:
    """Encode a [height, width] mask of zeros and ones as run lengths."""
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode_rle(rle: RLE) -> NDArray[np.uint8]:
    """Decode run lengths to a [height, width] mask of zeros and ones."""
    mask: NDArray[np.uint8] = coco_mask.decode(rle)
    return mask


def _detections(output: dict[str, Tensor], image: Tensor, size: tuple[int, int], threshold: float) -> Detections:
    width, height = size
    boxes = output["boxes"].float().cpu() * torch.tensor([width / image.shape[2], height / image.shape[1]] * 2)
    inside = torch.minimum(boxes.clamp(min=0), torch.tensor([width, height] * 2))
    scores = output["scores"].float().cpu()
    # Boxes inside the padding are empty after the clipping.
    keep = (scores >= threshold) & (inside[:, 2:] > inside[:, :2]).all(1)
    masks = _paste(output["masks"].float().cpu()[keep], boxes[keep], size) if "masks" in output else None
    return Detections(inside[keep], output["labels"].cpu()[keep], scores[keep], masks)


def _paste(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[RLE]:
    """Paste masks like torchvision's `paste_masks_in_image`, but one at a time and only within the box."""
    width, height = size
    padded, scale = expand_masks(masks, 1)
    pasted = []
    for mask, corners in zip(padded[:, 0], expand_boxes(boxes, scale).long()):
        x1, y1, x2, y2 = corners.tolist()
        left, top, right, bottom = max(x1, 0), max(y1, 0), min(x2 + 1, width), min(y2 + 1, height)
        whole = np.zeros((height, width), np.uint8, order="F")
        if left < right and top < bottom:
            corners = corners - torch.tensor([left, top, left, top])
            window = paste_mask_in_image(mask, corners, bottom - top, right - left)
            whole[top:bottom, left:right] = (window > MASK_THRESHOLD).numpy()
        pasted.append(encode_rle(whole))
    return pasted
