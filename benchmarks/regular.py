"""Compare a training step of the preset `regular` with torchvision's Mask R-CNN: `python -m benchmarks.regular`.

Both networks have ResNet-50 with FPN and frozen BatchNorm, the same random weights, images, anchors and numbers of
proposals. Our step is that of the detector's trainer; the peer's computes losses and gradients and calls SGD, as in
torchvision's own training program. The features of both networks are compared first.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from benchmarks import environment, report
from benchmarks.measure import time_in_turn
from benchmarks.operations import OURS, PEER
from benchmarks.targets import Target
from dcnops.detector.config import Config, NetworkConfig, TrainingConfig
from dcnops.detector.data import Batch
from dcnops.detector.engine.trainer import build_trainer
from dcnops.detector.model import build_detector
from dcnops.detector.model.foreign_checkpoints import convert_detector

_CATEGORIES = 80
_OBJECTS = 8
_LARGEST_DIFFERENCE = {"none": 1e-3, "float16": 5e-2, "bfloat16": 1e-1}
"""Of the features, relative to their largest magnitude."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("the benchmark of the regular preset needs a GPU (or --device cpu)", file=sys.stderr)
        return 1
    device = torch.device(options.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    config = Config(
        network=NetworkConfig(preset="regular", detector="mask", min_size=options.size),
        # The rate is too small to change the network.
        training=TrainingConfig(batch_size=options.batch, lr=1e-9, amp=options.amp),
    )
    ours, peer = build_models(config, device)
    images, targets = _batch(options.batch, options.size, device)
    dtype = None if options.amp == "none" else getattr(torch, options.amp)
    autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)
    with torch.no_grad(), autocast:
        normalised, _ = ours.transform(images)
        features = [list(model.backbone(normalised.tensors).values()) for model in (ours, peer)]
    difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*features))
    if not difference <= _LARGEST_DIFFERENCE[options.amp]:
        print(f"the features differ by {difference:.1e}", file=sys.stderr)
        return 1

    trainer = build_trainer(ours, config, device, 1)
    steps = {
        OURS: lambda: trainer.step(Batch([], images, targets), 0),
        PEER: _step_of_peer(peer, images, targets, autocast, config.resolve_training()),
    }

    def clock(step: Callable[[], object]) -> float:
        begin = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    timings = time_in_turn(steps, clock, options.seconds)
    ratio = timings[OURS]["median_ms"] / timings[PEER]["median_ms"]
    title = f"batch {options.batch} of {options.size} pixels, {options.device}, amp {options.amp}"
    target = Target(f"step of Mask R-CNN, {title}, {OURS} / {PEER}", ratio, "<=", 1.0)
    for name, timing in timings.items():
        print(f"{name:12} {timing['median_ms']:8.1f} ms ({timing['min_ms']:.1f} to {timing['max_ms']:.1f})")
    print(target)
    document = {
        "environment": environment.describe(torch.get_num_threads(), gpu=device.type == "cuda"),
        "results": [{"title": title, "timings": timings, "ratio": ratio, "features_differ_by": difference}],
        "targets": [target.as_dict()],
    }
    report.write_json(options.output, document)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.regular", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    parser.add_argument("--amp", choices=tuple(_LARGEST_DIFFERENCE), default="none", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=2, help="images; default: %(default)s")
    parser.add_argument("--size", type=int, default=800, help="shorter side of the images; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=20, help="time of the measurement; default: %(default)s")
    output = Path("out/regular.json")
    parser.add_argument("--output", type=Path, default=output, help="JSON file; default: %(default)s")
    return parser.parse_args(arguments)


def build_models(config: Config, device: torch.device) -> tuple[GeneralizedRCNN, MaskRCNN]:
    """Build the network of the preset and torchvision's, with the weights of the latter."""
    network = config.network.resolve()
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=3)
    peer = MaskRCNN(
        backbone,
        _CATEGORIES + 1,
        min_size=network.min_size,
        max_size=network.max_size,
        rpn_pre_nms_top_n_train=network.rpn_candidates_train,
        rpn_post_nms_top_n_train=network.proposals_train,
        box_batch_size_per_image=network.roi_batch,
    )
    content = convert_detector(peer.state_dict(), Path("torchvision"))
    assert content is not None
    ours = build_detector(network, _CATEGORIES)
    ours.load_state_dict(content["model"])
    return ours.to(device), peer.to(device)


def _step_of_peer(
    model: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]], autocast: Any, config: TrainingConfig
) -> Callable[[], None]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, config.lr, config.momentum, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(images[0].device.type, enabled=config.amp == "float16")

    def step() -> None:
        with autocast:
            losses = sum(model(images, targets).values())
        optimizer.zero_grad()
        scaler.scale(losses).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def _batch(N: int, size: int, device: torch.device) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    height, width = size, size * 1333 // 800
    images = [torch.rand(3, height, width, device=device) for _ in range(N)]
    targets = []
    for _ in range(N):
        corners = torch.rand(_OBJECTS, 2) * 0.5
        boxes = torch.cat([corners, corners + 0.1 + 0.4 * torch.rand(_OBJECTS, 2)], 1)
        boxes *= torch.tensor([width, height, width, height])
        masks = torch.zeros(_OBJECTS, height, width, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
            mask[y1:y2, x1:x2] = 1
        target = {"boxes": boxes, "labels": torch.randint(1, _CATEGORIES + 1, (_OBJECTS,)), "masks": masks}
        targets.append({name: value.to(device) for name, value in target.items()})
    return images, targets


if __name__ == "__main__":
    sys.exit(main())
