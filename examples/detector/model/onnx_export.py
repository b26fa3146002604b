"""Export of whole detectors to ONNX for images of a fixed size."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import boxes as box_ops

from dcnops.adapters.torch import DeformRoIPoolPack, ModulatedDeformRoIPoolPack, mmcv_ops, onnx

from ..data import Category
from ..errors import UserError, cannot_write

POOLS = (DeformRoIPoolPack, ModulatedDeformRoIPoolPack, mmcv_ops.DeformRoIPoolPack)
LARGEST_ASPECT = 32  # the network pads images that are more elongated
REJECTED = -1.0  # score of an entry that is no detection; tensors of a fixed size are filled up with such entries


def export_onnx(model: GeneralizedRCNN, path: Path, size: tuple[int, int], categories: Sequence[Category]) -> None:
    """Write a detector from `build_detector` as an ONNX file for images of one size.

    The file has standard operators only. Input:

    - ``image``: float32 [1, 3, height, width], RGB in 0..1. The file resizes, normalises and pads it.

    Outputs, in order of decreasing score:

    - ``boxes``: float32 [n, 4], x1, y1, x2, y2 in pixels of the image;
    - ``labels``: int64 [n], 1 for the first category;
    - ``scores``: float32 [n] in 0..1;
    - ``masks``, from Mask R-CNN: float32 [n, 28, 28], the probability of the object in each cell of the box.

    The metadata ``categories`` is a JSON list of the categories: ``id`` and ``name``.

    Parameters
    ----------
    model : GeneralizedRCNN
        On the CPU; it is not modified.
    path : Path
        Weights of more than 2 GB go to a second file next to it.
    size : (height, width)
    categories : sequence of Category

    Raises
    ------
    UserError
        The image is too elongated, the network pools with offsets and an adaptive number of samples, or the file
        cannot be written.
    """
    if max(size) > LARGEST_ASPECT * min(size):
        raise UserError(f"the longer side of the image must be at most {LARGEST_ASPECT} times the shorter, got {size}")
    if any(isinstance(layer, POOLS) and layer.sampling_ratio == 0 for layer in model.modules()):
        raise UserError(
            "an ONNX file of deformable RoI pooling needs network.sampling_ratio greater than 0, got 0: set "
            "network.sampling_ratio=2, best in training already"
        )
    names = ["boxes", "labels", "scores", *(["masks"] if model.roi_heads.has_mask() else [])]
    program = onnx.export(
        FixedSizeDetector(model),
        (torch.rand(1, 3, *size),),
        custom_translation_table={
            torch.ops.dcnops_detector.keep_by_nms.default: _translate_nms,
            torch.ops.torchvision.roi_pool.default: _translate_roi_pool,
        },
        input_names=["image"],
        output_names=names,
        verbose=False,
    )
    program.model.metadata_props["categories"] = json.dumps([category._asdict() for category in categories])
    try:
        program.save(path)
    except OSError as error:
        raise cannot_write(path, error) from None


class FixedSizeDetector(nn.Module):
    """Copy of a detector in which every tensor up to the last step has a fixed size, as the exporter needs it."""

    def __init__(self, model: GeneralizedRCNN) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self.eval()
        self.model.rpn.filter_proposals = MethodType(filter_proposals, self.model.rpn)
        self.model.roi_heads.postprocess_detections = MethodType(postprocess_detections, self.model.roi_heads)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Map an image [1, 3, H, W] to boxes [n, 4], labels [n], scores [n] and, from Mask R-CNN, masks [n, 28, 28]."""
        found = self.model([image[0]])[0]
        keep = torch.where(found["scores"] > REJECTED)[0]
        names = ("boxes", "labels", "scores")
        masks = (found["masks"][:, 0][keep],) if "masks" in found else ()
        return (*(found[name][keep] for name in names), *masks)


def filter_proposals(
    self: RegionProposalNetwork,
    proposals: Tensor,
    objectness: Tensor,
    image_shapes: list[tuple[int, int]],
    num_anchors_per_level: list[int],
) -> tuple[list[Tensor], list[Tensor]]:
    """Replace `RegionProposalNetwork.filter_proposals`, for one image: missing proposals are zeros."""
    logits = objectness.reshape(1, -1)
    chosen = self._get_top_n_idx(logits, num_anchors_per_level)[0]
    boxes = box_ops.clip_boxes_to_image(proposals[0, chosen], image_shapes[0])
    scores = torch.sigmoid(logits[0, chosen])
    usable = (scores >= self.score_thresh) & _have_sides(boxes, self.min_size)
    scores = torch.where(usable, scores, REJECTED)
    counts = [min(count, self.pre_nms_top_n()) for count in num_anchors_per_level]
    kept = [
        keep_by_nms(some[None], values[None], self.nms_thresh)[0]
        for some, values in zip(boxes.split(counts), scores.split(counts))
    ]
    scores, best = torch.where(torch.cat(kept), scores, REJECTED).topk(min(self.post_nms_top_n(), sum(counts)))
    return [torch.where((scores > REJECTED)[:, None], boxes[best], 0.0)], [scores]


def postprocess_detections(
    self: RoIHeads,
    class_logits: Tensor,
    box_regression: Tensor,
    proposals: list[Tensor],
    image_shapes: list[tuple[int, int]],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Replace `RoIHeads.postprocess_detections`, for one image: missing detections have the score `REJECTED`."""
    boxes = box_ops.clip_boxes_to_image(self.box_coder.decode(box_regression, proposals), image_shapes[0])
    boxes = boxes[:, 1:].transpose(0, 1)  # [categories, proposals, 4]
    scores = torch.softmax(class_logits, -1)[:, 1:].transpose(0, 1)
    usable = (scores > self.score_thresh) & _have_sides(boxes, 1e-2) & (proposals[0] != 0).any(1)
    scores = torch.where(usable, scores, REJECTED)
    scores = torch.where(keep_by_nms(boxes, scores, self.nms_thresh), scores, REJECTED).flatten()
    best_scores, best = scores.topk(min(self.detections_per_img, scores.numel()))
    labels = 1 + torch.div(best, boxes.shape[1], rounding_mode="floor")
    return [boxes.reshape(-1, 4)[best]], [best_scores], [labels]


def _have_sides(boxes: Tensor, minimum: float) -> Tensor:
    return ((boxes[..., 2:] - boxes[..., :2]) >= minimum).all(-1)


@torch.library.custom_op("dcnops_detector::keep_by_nms", mutates_args=())
def keep_by_nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Return a mask [B, N] of the `boxes` [B, N, 4] that NMS keeps in each batch, of those that are not `REJECTED`."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for some, values, mask in zip(boxes, scores, kept):
        usable = torch.where(values > REJECTED)[0]
        mask[usable[box_ops.nms(some[usable], values[usable], threshold)]] = True
    return kept


@keep_by_nms.register_fake
def _(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def _translate_roi_pool(
    input: Any, rois: Any, spatial_scale: float, pooled_height: int, pooled_width: int
) -> tuple[Any, Any]:
    import onnx_ir
    import onnxscript

    op: Any = onnxscript.opset19
    pooled = op.MaxRoiPool(input, rois, pooled_shape=[pooled_height, pooled_width], spatial_scale=spatial_scale)
    return pooled, op.Cast(pooled, to=int(onnx_ir.DataType.INT32))  # the second output, for gradients, is not used


def _translate_nms(boxes: Any, scores: Any, threshold: float) -> Any:
    import onnx_ir
    import onnxscript

    op: Any = onnxscript.opset19
    types = onnx_ir.DataType

    def constant(values: list[Any], dtype: Any) -> Any:
        return op.Constant(value=onnx_ir.tensor(values, dtype))

    everything = op.Cast(op.Shape(boxes, start=1, end=2), to=int(types.INT64))
    numbers = [constant([threshold], types.FLOAT), constant([REJECTED / 2], types.FLOAT)]
    chosen = op.NonMaxSuppression(boxes, op.Unsqueeze(scores, constant([1], types.INT64)), everything, *numbers)
    places = op.Gather(chosen, constant([0, 2], types.INT64), axis=1)  # batch and box; each batch has one class here
    ones = op.Expand(constant([1], types.INT32), op.Shape(places, start=0, end=1))
    zeros = op.Expand(constant([0], types.INT32), op.Shape(scores))
    return op.Cast(op.ScatterND(zeros, places, ones), to=int(types.BOOL))
