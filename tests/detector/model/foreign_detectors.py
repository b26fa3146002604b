"""State dicts with the names and shapes of mmdetection's and detectron2's detectors, and what these compute.

The formulas are those of both projects, written for one image: unrounded anchors around (x, y) * stride, RoIAlign with
half pixels and an adaptive number of samples, the background as the last score, and boxes and masks without it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.ops import batched_nms, roi_align

STRIDES = (4, 8, 16, 32, 64)
STDS = torch.tensor([0.1, 0.1, 0.2, 0.2])
NECK, HEAD = 8, 16  # channels

MMDETECTION = {
    "lateral": "neck.lateral_convs.{}.conv",
    "output": "neck.fpn_convs.{}.conv",
    "rpn": "rpn_head.rpn_conv",
    "objectness": "rpn_head.rpn_cls",
    "anchor deltas": "rpn_head.rpn_reg",
    "fc": "roi_head.bbox_head.shared_fcs.{}",
    "scores": "roi_head.bbox_head.fc_cls",
    "deltas": "roi_head.bbox_head.fc_reg",
    "mask conv": "roi_head.mask_head.convs.{}.conv",
    "mask deconv": "roi_head.mask_head.upsample",
    "mask logits": "roi_head.mask_head.conv_logits",
}
DETECTRON2 = {
    "lateral": "backbone.fpn_lateral{}",
    "output": "backbone.fpn_output{}",
    "rpn": "proposal_generator.rpn_head.conv",
    "objectness": "proposal_generator.rpn_head.objectness_logits",
    "anchor deltas": "proposal_generator.rpn_head.anchor_deltas",
    "fc": "roi_heads.box_head.fc{}",
    "scores": "roi_heads.box_predictor.cls_score",
    "deltas": "roi_heads.box_predictor.bbox_pred",
    "mask conv": "roi_heads.mask_head.mask_fcn{}",
    "mask deconv": "roi_heads.mask_head.deconv",
    "mask logits": "roi_heads.mask_head.predictor",
}
NORM = ("weight", "bias", "running_mean", "running_var")


class Body(NamedTuple):
    """Sizes of a ResNet."""

    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)
    width: int = 64
    groups: int = 1
    offsets: int = 0  # channels of the offset branches in conv3 to conv5


R50 = Body()


def tensor(*shape: int) -> Tensor:
    """Return a random number in the shape, which takes no memory; maps stay small."""
    return ((torch.rand(1) + 0.5) / (4 * math.prod(shape[1:]) if len(shape) > 1 else 1)).expand(shape)


def mmdetection_body(body: Body, branch: str = "conv2.conv_offset") -> Iterator[tuple[str, Tensor]]:
    yield "backbone.conv1.weight", torch.randn(64, 3, 7, 7)
    yield from ((f"backbone.bn1.{leaf}", tensor(64)) for leaf in (*NORM, "num_batches_tracked"))
    inputs = 64
    for stage, blocks in enumerate(body.blocks):
        width, outputs = body.width << stage, 256 << stage
        for block in range(blocks):
            name = f"backbone.layer{stage + 1}.{block}"
            yield f"{name}.conv1.weight", tensor(width, inputs, 1, 1)
            yield f"{name}.conv2.weight", tensor(width, width // body.groups, 3, 3)
            yield f"{name}.conv3.weight", tensor(outputs, width, 1, 1)
            for number, channels in enumerate((width, width, outputs), 1):
                yield from ((f"{name}.bn{number}.{leaf}", tensor(channels)) for leaf in NORM)
            if block == 0:
                yield f"{name}.downsample.0.weight", tensor(outputs, inputs, 1, 1)
                yield from ((f"{name}.downsample.1.{leaf}", tensor(outputs)) for leaf in NORM)
            if body.offsets and stage:
                yield f"{name}.{branch}.weight", tensor(body.offsets, width, 3, 3)
                yield f"{name}.{branch}.bias", tensor(body.offsets)
            inputs = outputs


def detectron2_body(body: Body) -> Iterator[tuple[str, Tensor]]:
    for name, value in mmdetection_body(body, "conv2_offset"):
        if name.endswith("num_batches_tracked"):
            continue
        name = name.replace("backbone.", "backbone.bottom_up.").replace("bottom_up.conv1", "bottom_up.stem.conv1")
        name = name.replace("bottom_up.bn1", "bottom_up.stem.conv1.norm").replace("downsample.0", "shortcut")
        name = name.replace("downsample.1", "shortcut.norm")
        for number in range(4, 0, -1):
            name = name.replace(f"layer{number}", f"res{number + 1}").replace(f".bn{number}.", f".conv{number}.norm.")
        yield name, value


def heads(names: dict[str, str], categories: int, masks: bool) -> dict[str, Tensor]:
    """Return the parameters of the neck and the heads, random so that there are detections of every category."""
    first = {"lateral": 0, "output": 0, "fc": 0, "mask conv": 0}
    if names is DETECTRON2:
        first = {"lateral": 2, "output": 2, "fc": 1, "mask conv": 1}
    shapes: dict[str, tuple[tuple[int, ...], ...]] = {
        "lateral": tuple((NECK, 256 << level, 1, 1) for level in range(4)),
        "output": ((NECK, NECK, 3, 3),) * 4,
        "rpn": ((NECK, NECK, 3, 3),),
        "objectness": ((3, NECK, 1, 1),),
        "anchor deltas": ((12, NECK, 1, 1),),
        "fc": ((HEAD, NECK * 49), (HEAD, HEAD)),
        "scores": ((categories + 1, HEAD),),
        "deltas": ((4 * categories, HEAD),),
    }
    if masks:
        shapes |= {
            "mask conv": ((NECK, NECK, 3, 3),) * 4,
            "mask deconv": ((NECK, NECK, 2, 2),),
            "mask logits": ((categories, NECK, 1, 1),),
        }
    torch.manual_seed(0)
    state = {}
    for part, several in shapes.items():
        for index, shape in enumerate(several):
            name = names[part].format(index + first.get(part, 0))
            state[f"{name}.weight"] = torch.randn(shape) / math.sqrt(math.prod(shape[1:]))
            state[f"{name}.bias"] = torch.randn(shape[1] if part == "mask deconv" else shape[0]) / 10
            if part == "scores":
                state[f"{name}.weight"] -= state[f"{name}.weight"].mean(1, keepdim=True)  # no category dominates
    return state


def detector(names: dict[str, str], body: Body = R50, categories: int = 3, masks: bool = True) -> dict[str, Tensor]:
    """Return the state dict of a detector."""
    torch.manual_seed(0)
    build = detectron2_body if names is DETECTRON2 else mmdetection_body
    return {**dict(build(body)), **heads(names, categories, masks)}


class Reference:
    """Heads of mmdetection and detectron2 on the maps [1, C, H, W] of an image."""

    def __init__(self, state: dict[str, Tensor], names: dict[str, str], maps: list[Tensor], size: tuple[int, int]):
        self.state, self.names, self.maps = {name: value.double() for name, value in state.items()}, names, maps
        self.limits = torch.tensor([size[1], size[0]] * 2)
        self.first = 1 if names is DETECTRON2 else 0

    def parameters(self, part: str, index: int = 0) -> tuple[Tensor, Tensor]:
        name = self.names[part].format(index + self.first)
        return self.state[f"{name}.weight"], self.state[f"{name}.bias"]

    def decode(self, boxes: Tensor, deltas: Tensor) -> Tensor:
        size = boxes[..., 2:] - boxes[..., :2]
        centre = boxes[..., :2] + size / 2 + deltas[..., :2] * size
        half = size * deltas[..., 2:].clamp(max=math.log(1000 / 16)).exp() / 2
        return torch.cat([centre - half, centre + half], -1).clamp(min=0).minimum(self.limits)

    def proposals(self) -> Tensor:
        boxes: Any
        boxes, scores, levels = [], [], []
        for level, (x, stride) in enumerate(zip(self.maps, STRIDES)):
            hidden = functional.conv2d(x, *self.parameters("rpn"), padding=1).relu()
            logits = functional.conv2d(hidden, *self.parameters("objectness"))[0].permute(1, 2, 0).flatten()
            deltas = functional.conv2d(hidden, *self.parameters("anchor deltas"))[0].permute(1, 2, 0).reshape(-1, 4)
            rows, columns = torch.meshgrid(*map(torch.arange, x.shape[2:]), indexing="ij")
            corners = torch.tensor(
                [
                    [sign * 4 * stride * ratio**power for sign in (-1, 1) for power in (-0.5, 0.5)]
                    for ratio in (0.5, 1, 2)
                ]
            )
            anchors = torch.stack([columns, rows, columns, rows], -1)[:, :, None] * stride + corners
            best = logits.sigmoid().topk(min(1000, len(logits)))
            boxes.append(self.decode(anchors.reshape(-1, 4)[best.indices], deltas[best.indices]))
            scores.append(best.values)
            levels.append(torch.full_like(best.indices, level))
        boxes, scores, levels = (torch.cat(parts) for parts in (boxes, scores, levels))
        filled = (boxes[:, 2:] - boxes[:, :2] >= 1e-3).all(1)  # more than 0 in the projects, 1e-3 in torchvision
        return boxes[filled][batched_nms(boxes[filled], scores[filled], levels[filled], 0.7)[:1000]]

    def pool(self, boxes: Tensor, size: int) -> Tensor:
        scale = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        levels = (scale / 56 + 1e-6).log2().floor().clamp(0, 3).long()
        pooled = torch.zeros(len(boxes), NECK, size, size, dtype=boxes.dtype)
        for level in range(4):
            rows = levels == level
            pooled[rows] = roi_align(self.maps[level], [boxes[rows]], size, 1 / STRIDES[level], 0, aligned=True)
        return pooled

    def detections(self, proposals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the boxes, scores and labels (from 0) after NMS."""
        x = self.pool(proposals, 7).flatten(1)
        for index in range(2):
            x = functional.linear(x, *self.parameters("fc", index)).relu()
        scores = functional.linear(x, *self.parameters("scores")).softmax(1)[:, :-1]
        deltas = functional.linear(x, *self.parameters("deltas")).unflatten(1, (-1, 4)) * STDS
        boxes = self.decode(proposals[:, None], deltas)
        # Torchvision also drops boxes with sides of less than 0.01 pixels.
        rows, labels = torch.where((scores > 0.05) & (boxes[..., 2:] - boxes[..., :2] >= 0.01).all(-1))
        keep = batched_nms(boxes[rows, labels], scores[rows, labels], labels, 0.5)[:100]
        rows, labels = rows[keep], labels[keep]
        return boxes[rows, labels], scores[rows, labels], labels

    def masks(self, boxes: Tensor, labels: Tensor) -> Tensor:
        x = self.pool(boxes, 14)
        for index in range(4):
            x = functional.conv2d(x, *self.parameters("mask conv", index), padding=1).relu()
        x = functional.conv_transpose2d(x, *self.parameters("mask deconv"), stride=2).relu()
        logits = functional.conv2d(x, *self.parameters("mask logits"))
        return logits[torch.arange(len(labels)), labels].sigmoid()


def paste(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Sample masks [n, S, S] at the centres of the pixels of an image of (height, width)."""
    y, x = (torch.arange(length).double() + 0.5 for length in size)
    x = (x - boxes[:, :1]) / (boxes[:, 2:3] - boxes[:, :1]) * 2 - 1
    y = (y - boxes[:, 1:2]) / (boxes[:, 3:] - boxes[:, 1:2]) * 2 - 1
    grid = torch.stack([x[:, None].expand(-1, size[0], -1), y[:, :, None].expand(-1, -1, size[1])], -1)
    return functional.grid_sample(masks[:, None], grid, align_corners=False)[:, 0] >= 0.5
