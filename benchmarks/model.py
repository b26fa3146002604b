"""Compare a whole Mask R-CNN with our operations and with torchvision's: `python -m benchmarks.model`.

The preset `dcnv2` on ResNet-50 with FPN, random weights, images of 800x1333: inference, and a training step (losses,
gradients, SGD). In the peer, every modulated deformable convolution calls torchvision's operation with the same
parameters. RoI pooling is ours in both, because torchvision has no deformable form of it. The features of both networks
are compared first.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks import environment, report
from benchmarks.operations import OURS, PEER
from dcnops.adapters.torch import ModulatedDeformConv2dPack
from examples.detector.config import NetworkConfig
from examples.detector.model import build_detector

_CATEGORIES = 80
_OBJECTS = 8
_ROUNDS = 7
_STEPS = ("inference", "training")
_TOLERANCE = {"float32": 1e-3, "float16": 5e-2}
"""Largest difference of the features by type of autocast, relative to their largest magnitude; TF32 is off."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    rehearsal = options.device == "rehearsal"
    if not rehearsal and not torch.cuda.is_available():
        print("the benchmark of the model needs a GPU (or --device rehearsal)", file=sys.stderr)
        return 1
    device = torch.device("cpu" if rehearsal else "cuda")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    sizes: dict[str, Any] = {"min_size": 64, "max_size": 96, "backbone": "small"} if rehearsal else {}
    height, width = (64, 80) if rehearsal else (800, 1333)
    torch.manual_seed(0)
    model = build_detector(NetworkConfig(preset="dcnv2", detector="mask", **sizes), _CATEGORIES).to(device)
    for layer in model.modules():
        if isinstance(layer, ModulatedDeformConv2dPack):
            # Offsets of about a pixel and various masks: those of a new layer are all zero and all equal.
            nn.init.normal_(layer.conv_offset.bias)

    rows, failures = [], []
    begin = time.monotonic()
    # Torchvision's operation supports autocast only on a GPU, where it computes in float32.
    for N, amp in [(N, amp) for N in (1, 2) for amp in (("float32",) if rehearsal else ("float32", "float16"))]:
        title = f"batch {N}, {amp}"
        if time.monotonic() - begin >= 60 * options.minutes:
            failures.append(f"{title}: not reached in {options.minutes:g} minutes")
            continue
        images = [torch.rand(3, height, width, device=device) for _ in range(N)]
        objects = [_objects(height, width, device) for _ in range(N)]
        difference = _features_differ(model, images, amp, device)
        if not difference <= _TOLERANCE[amp]:
            failures.append(f"{title}: the features differ by {difference:.1e} of at most {_TOLERANCE[amp]:.0e}")
            continue
        row: dict[str, Any] = {"batch": N, "amp": amp, "features_differ_by": difference}
        rows.append(row | {step: _measure(_step(step, model, images, objects, amp, device), device) for step in _STEPS})
        print(title, file=sys.stderr, flush=True)

    lines = [["Mask R-CNN, ms", *(f"{step}: {name}" for step in _STEPS for name in (OURS, PEER))]]
    for row in rows:
        medians = [row[step][name]["median_ms"] for step in _STEPS for name in (OURS, PEER)]
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
    parser.add_argument("--device", choices=("cuda", "rehearsal"), default="cuda", help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no row after this time")
    parser.add_argument("--output", type=Path, default=Path("out/model.json"), help="JSON file; default: %(default)s")
    return parser.parse_args(arguments)


def operation_of(name: str) -> AbstractContextManager[object]:
    """Run all modulated deformable convolutions with the operation of `OURS` or `PEER` within the context."""
    if name == OURS:
        return nullcontext()
    return mock.patch.object(ModulatedDeformConv2dPack, "forward", _torchvision_forward)


def _torchvision_forward(layer: ModulatedDeformConv2dPack, input: Tensor) -> Tensor:
    from torchvision.ops import deform_conv2d

    points = layer.sampling_points
    offset, logits = layer.conv_offset(input).split((2 * points, points), dim=1)
    mask = layer.mask_scale * torch.sigmoid(logits)
    numbers = layer.stride, layer.padding, layer.dilation
    output: Tensor = deform_conv2d(input, offset, layer.weight, layer.bias, *numbers, mask)
    return output


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


def _autocast(amp: str, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.float16, enabled=amp == "float16")


def _features_differ(model: Any, images: list[Tensor], amp: str, device: torch.device) -> float:
    model.eval()
    features = []
    for name in (OURS, PEER):
        with operation_of(name), torch.no_grad(), _autocast(amp, device):
            batch, _ = model.transform(images)
            features.append([level.float() for level in model.backbone(batch.tensors).values()])
    return max(float((ours - peer).abs().max() / peer.abs().max()) for ours, peer in zip(*features))


def _step(
    step: str, model: Any, images: list[Tensor], objects: list[dict[str, Tensor]], amp: str, device: torch.device
) -> Callable[[], None]:
    # The rate is too small to change the network.
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-9, momentum=0.9)

    def infer() -> None:
        model.eval()
        with torch.no_grad(), _autocast(amp, device):
            model(images)

    def train() -> None:
        model.train()
        with _autocast(amp, device):
            loss = sum(model(images, objects).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return infer if step == "inference" else train


def _measure(call: Callable[[], None], device: torch.device) -> dict[str, dict[str, float]]:
    """Return the times of alternating rounds and the peak memory. The number of proposals depends on random weights."""
    seconds: dict[str, list[float]] = {OURS: [], PEER: []}
    memory = dict.fromkeys(seconds, 0.0)
    on_gpu = device.type == "cuda"
    for name in seconds:
        with operation_of(name):
            call()
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            call()
        if on_gpu:
            memory[name] = float(torch.cuda.max_memory_allocated())
    for _ in range(_ROUNDS if on_gpu else 1):
        for name, times in seconds.items():
            with operation_of(name):
                _synchronize(device)
                begin = time.perf_counter()
                call()
                _synchronize(device)
                times.append(time.perf_counter() - begin)
    return {
        name: {"median_ms": 1e3 * statistics.median(times), "min_ms": 1e3 * min(times), "peak_bytes": memory[name]}
        for name, times in seconds.items()
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
