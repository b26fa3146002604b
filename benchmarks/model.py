"""Compare a whole Mask R-CNN with our operations and with torchvision's: `python -m benchmarks.model`.

The preset `dcnv2` on ResNet-50 with FPN, random weights, images of 800x1333: inference, and a training step (losses,
gradients, SGD). In the peer, every modulated deformable convolution calls torchvision's operation with the same
parameters. RoI pooling is ours in both, because torchvision has no deformable form of it. The features of both networks
are compared first.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from dcnops.adapters.torch import ModulatedDeformConv2dPack
from torch import Tensor, nn

from benchmarks import environment, report
from benchmarks.operations import OURS, PEER
from examples.detector.config import NetworkConfig
from examples.detector.network import build_detector

_CATEGORIES = 80
_OBJECTS = 8
_ROUNDS = 7
_AMP = {"float32": None, "float16": torch.float16}
_TOLERANCE = {"float32": 1e-3, "float16": 5e-2}
"""Largest difference of the features, relative to their largest magnitude; TF32 is off."""


class _TorchvisionConv(nn.Module):
    """Torchvision's modulated deformable convolution with the parameters of our layer."""

    def __init__(self, layer: ModulatedDeformConv2dPack) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: Tensor) -> Tensor:
        from torchvision.ops import deform_conv2d

        layer = self.layer
        points = layer.sampling_points
        offset, logits = layer.conv_offset(input).split((2 * points, points), dim=1)
        mask = layer.mask_scale * torch.sigmoid(logits)
        numbers = layer.stride, layer.padding, layer.dilation
        output: Tensor = deform_conv2d(input, offset, layer.weight, layer.bias, *numbers, mask)
        return output


def with_torchvision(model: nn.Module) -> nn.Module:
    """Return a copy of the model with torchvision's modulated deformable convolutions."""
    peer = copy.deepcopy(model)
    for parent in list(peer.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ModulatedDeformConv2dPack):
                setattr(parent, name, _TorchvisionConv(child))
    return peer


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    rehearsal = options.device == "rehearsal"
    if not rehearsal and not torch.cuda.is_available():
        print("the benchmark of the model needs a GPU (or --device rehearsal)", file=sys.stderr)
        return 1
    device = torch.device("cpu" if rehearsal else "cuda")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    sizes: dict[str, Any] = {"min_size": 64, "max_size": 96, "backbone": "small"} if rehearsal else {}
    network = NetworkConfig(preset="dcnv2", detector="mask", **sizes)
    height, width = (64, 80) if rehearsal else (800, 1333)

    torch.manual_seed(0)
    ours = build_detector(network, _CATEGORIES).to(device)
    _move_offsets(ours)
    models = {OURS: ours, PEER: with_torchvision(ours)}
    rows, failures = [], []
    begin = time.monotonic()
    # Torchvision's operation supports autocast only on a GPU, where it computes in float32.
    for N, amp in [(N, amp) for N in (1, 2) for amp in (("float32",) if rehearsal else ("float32", "float16"))]:
        title = f"batch {N}, {amp}"
        if time.monotonic() - begin >= 60 * options.minutes:
            failures.append(f"{title}: not reached in {options.minutes:g} minutes")
            continue
        images = [torch.rand(3, height, width, device=device) for _ in range(N)]
        targets = [_objects(height, width, device) for _ in range(N)]
        difference = _features_differ(models, images, amp, device)
        if not difference <= _TOLERANCE[amp]:
            failures.append(f"{title}: the features differ by {difference:.1e} of at most {_TOLERANCE[amp]:.0e}")
            continue
        row: dict[str, Any] = {"batch": N, "amp": amp, "features_differ_by": difference}
        for step, prepare in (("inference", _inference), ("training", _training)):
            calls = {name: prepare(model, images, targets, amp, device) for name, model in models.items()}
            row[step] = _measure(calls, device)
        rows.append(row)
        print(title, file=sys.stderr, flush=True)

    lines = [["Mask R-CNN, ms", *(f"{step}: {who}" for step in ("inference", "training") for who in (OURS, PEER))]]
    for row in rows:
        medians = [row[step][who]["median_ms"] for step in ("inference", "training") for who in (OURS, PEER)]
        lines.append([f"batch {row['batch']}, {row['amp']}", *(f"{median:.1f}" for median in medians)])
    print(report.markdown(lines))
    for failure in failures:
        print(f"FAILED  {failure}")
    document = {"environment": environment.describe(torch.get_num_threads(), gpu=not rehearsal), "results": rows}
    document["failures"] = failures
    if rehearsal:
        document["rehearsal"] = environment.REHEARSAL
    report.write_json(options.output, document)
    return 1 if failures else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--device", choices=("cuda", "rehearsal"), default="cuda")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no row after that")
    parser.add_argument("--output", type=Path, default=Path("out/model.json"))
    return parser.parse_args(arguments)


def _move_offsets(model: nn.Module) -> None:
    """Draw offsets of about a pixel and various masks; those of new layers are all zero and all equal."""
    for layer in model.modules():
        if isinstance(layer, ModulatedDeformConv2dPack):
            nn.init.normal_(layer.conv_offset.bias)


def _objects(height: int, width: int, device: torch.device) -> dict[str, Tensor]:
    corners = torch.rand(_OBJECTS, 2, device=device) * 0.5
    sides = 0.1 + 0.4 * torch.rand(_OBJECTS, 2, device=device)
    scale = torch.tensor([width, height], device=device)
    masks = torch.zeros(_OBJECTS, height, width, dtype=torch.uint8, device=device)
    masks[:, height // 4 : height // 2, width // 4 : width // 2] = 1
    return {
        "boxes": torch.cat([corners * scale, (corners + sides) * scale], dim=1),
        "labels": torch.randint(1, _CATEGORIES + 1, (_OBJECTS,), device=device),
        "masks": masks,
    }


def _features_differ(models: dict[str, Any], images: list[Tensor], amp: str, device: torch.device) -> float:
    features = {}
    for name, model in models.items():
        model.eval()
        with torch.no_grad(), _autocast(amp, device):
            batch, _ = model.transform(images)
            features[name] = [level.float() for level in model.backbone(batch.tensors).values()]
    return max(
        float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in zip(features[OURS], features[PEER])
    )


def _autocast(amp: str, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, _AMP[amp], enabled=_AMP[amp] is not None)


def _inference(
    model: Any, images: list[Tensor], targets: list[dict[str, Tensor]], amp: str, device: torch.device
) -> Callable[[], object]:
    def run() -> object:
        model.eval()
        with torch.no_grad(), _autocast(amp, device):
            return model(images)

    return run


def _training(
    model: Any, images: list[Tensor], targets: list[dict[str, Tensor]], amp: str, device: torch.device
) -> Callable[[], object]:
    # The rate is too small to change the network.
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-9, momentum=0.9)

    def run() -> object:
        model.train()
        with _autocast(amp, device):
            loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return None

    return run


def _measure(calls: dict[str, Callable[[], object]], device: torch.device) -> dict[str, dict[str, float]]:
    """Return the times of alternating rounds and the peak memory. The number of proposals depends on random weights."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    memory = {}
    for name, call in calls.items():
        call()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        call()
        memory[name] = float(torch.cuda.max_memory_allocated()) if device.type == "cuda" else 0.0
    for _ in range(_ROUNDS if device.type == "cuda" else 1):
        for name, call in calls.items():
            _synchronize(device)
            begin = time.perf_counter()
            call()
            _synchronize(device)
            seconds[name].append(time.perf_counter() - begin)
    return {
        name: {"median_ms": 1e3 * statistics.median(times), "min_ms": 1e3 * min(times), "peak_bytes": memory[name]}
        for name, times in seconds.items()
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
