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
from torchvision.models.detection.roi_heads import expand_boxes

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
    heads: Any = model.roi_heads
    return [_detections(*item, threshold, heads.aligned_masks) for item in zip(outputs, images, sizes)]


def coco_results(detections: Detections, image_id: int, categories: Sequence[Category | None]) -> list[dict[str, Any]]:
    """Convert the detections in one image to entries of a COCO results file; those of the category None are left out.

    Each float32 becomes the shortest decimal number that rounds to it, so a JSON file preserves the exact values.
    """
    boxes = detections.boxes.clone()
    boxes[:, 2:] -= boxes[:, :2]
    values = torch.cat((boxes, detections.scores[:, None]), 1).numpy()
    numbers = [[float(str(value)) for value in row] for row in values]
    results = []
    for index, (row, label) in enumerate(zip(numbers, detections.labels.tolist())):
        if category := categories[label - 1]:
            result = {"image_id": image_id, "category_id": category.id, "bbox": row[:4], "score": row[4]}
            results.append(result | ({"segmentation": detections.masks[index]} if detections.masks else {}))
    return results


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int], *, aligned: bool = True) -> list[RLE]:
    """Paste the output of a mask head into an image.

    Parameters
    ----------
    masks : Tensor [n, S, S]
        Values in 0..1 at the centres of the S x S cells of each box, 0 around the box.
    boxes : Tensor [n, 4]
        Corners x1, y1, x2, y2 in pixels of the image; parts may lie outside.
    size : tuple
        Width and height of the image.
    aligned : bool
        Pixel centres at half-integer coordinates; otherwise, place the cells like torchvision's `paste_masks_in_image`,
        about half a cell further to the right and below.

    Returns
    -------
    list of RLE
        Run lengths of the pixels where the bilinearly interpolated mask is at least 0.5.
    """
    cells = masks.shape[-1]
    corners = boxes.double() if aligned else _corners_in_torchvision(boxes, cells)
    return [_paste(*item, size) for item in zip(masks.float().numpy(), corners.numpy())]


def encode_rle(mask: NDArray[Any]) -> RLE:
    """Encode a [height, width] mask of zeros and ones as run lengths."""
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode_rle(rle: RLE) -> NDArray[np.uint8]:
    """Decode run lengths to a [height, width] mask of zeros and ones."""
    mask: NDArray[np.uint8] = coco_mask.decode(rle)
    return mask


def _detections(
    output: dict[str, Tensor], image: Tensor, size: tuple[int, int], threshold: float, aligned_masks: bool
) -> Detections:
    width, height = size
    boxes = output["boxes"].float().cpu() * torch.tensor([width / image.shape[2], height / image.shape[1]] * 2)
    inside = torch.minimum(boxes.clamp(min=0), torch.tensor([width, height] * 2))
    scores = output["scores"].float().cpu()
    # Boxes inside the padding are empty after the clipping.
    keep = (scores >= threshold) & (inside[:, 2:] > inside[:, :2]).all(1)
    masks = None
    if "masks" in output:
        masks = paste_masks(output["masks"].float().cpu()[keep, 0], boxes[keep], size, aligned=aligned_masks)
    return Detections(inside[keep], output["labels"].cpu()[keep], scores[keep], masks)


def _corners_in_torchvision(boxes: Tensor, cells: int) -> Tensor:
    """Return the boxes that torchvision's pasting fills.

    It adds a border of one cell to boxes and masks, rounds the corners down, and then counts both of them as pixels.
    """
    corners = expand_boxes(boxes, 1 + 2 / cells).long().double()
    corners[:, 2:] += 1
    sides = (corners[:, 2:] - corners[:, :2]).clamp(min=1)
    corners[:, 2:] = corners[:, :2] + sides
    border = sides / (cells + 2)
    return torch.cat([corners[:, :2] + border, corners[:, 2:] - border], 1)


def _paste(mask: NDArray[np.float32], box: NDArray[np.float64], size: tuple[int, int]) -> RLE:
    """Sample a mask at the pixel centres in and around its box, and encode the pixels of at least `MASK_THRESHOLD`."""
    columns, left = _interpolation(box[0], box[2], mask.shape[1], size[0])
    rows, top = _interpolation(box[1], box[3], mask.shape[0], size[1])
    inside = columns @ mask.T @ rows.T >= MASK_THRESHOLD  # [width, height], as run lengths follow the columns
    return _encode_window(inside, left, top, size)


def _interpolation(begin: float, end: float, cells: int, length: int) -> tuple[NDArray[np.float32], int]:
    """Return the bilinear weights of a box's cells [pixels, cells] for a range of pixels, and the first pixel.

    The range has all pixels of 0 to `length` - 1 with centres less than a cell away from a cell's centre.
    """
    cell = max(end - begin, 1e-6) / cells
    first = int(np.clip(np.floor(begin - cell), 0, length))
    last = int(np.clip(np.ceil(end + cell), first, length))
    positions = (np.arange(first, last) + 0.5 - begin) / cell - 0.5  # 0 is the centre of the first cell
    return np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(cells))).astype(np.float32), first


def _encode_window(inside: NDArray[np.bool_], left: int, top: int, size: tuple[int, int]) -> RLE:
    """Encode a mask that is zero outside of a window; `inside` [columns, rows] is the window at (`left`, `top`)."""
    width, height = size
    columns, rows = inside.shape
    line = np.zeros(columns * (rows + 1) + 1, np.bool_)  # a zero before each column and after the last
    line[1:].reshape(columns, rows + 1)[:, :rows] = inside
    # Alternately the first pixel of a run and the first after it.
    column, row = np.divmod(np.flatnonzero(line[1:] != line[:-1]), rows + 1)
    ends = (column + left) * height + row + top
    # A run to the bottom of the image and a run from the top of the next column are one.
    joined = np.flatnonzero(ends[1:-1:2] == ends[2::2]) * 2 + 1
    ends = np.delete(ends, np.concatenate([joined, joined + 1]))
    counts = np.diff(ends, prepend=0, append=width * height).tolist()
    if counts[-1] == 0 and len(counts) > 1:
        counts.pop()
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}
