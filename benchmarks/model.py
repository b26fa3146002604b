"""Compare a whole Mask R-CNN with our operations and with torchvision's: `python -m benchmarks.model`.

The preset `dcnv2` on ResNet-50 with FPN, random weights, images of 800x1333: inference, and a training step (losses,
gradients, SGD). In the peer, every modulated deformable convolution calls torchvision's operation with the same
parameters. RoI pooling is ours in both, because torchvision has no deformable form of it. The features of both networks
are compared first.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile
from torchvision import ops

from benchmarks import environment, report, targets
from benchmarks.measure import time_in_turn
from benchmarks.operations import OURS, PEER
from dcnops.adapters.torch import ModulatedDeformConv2dPack, deform_conv2d_layers, deform_roi_pool_layers
from dcnops.detector.config import NetworkConfig
from dcnops.detector.model import build_detector

_CATEGORIES = 80
_OBJECTS = 8
_SECONDS_PER_ROW = 5.0
_MOST_ROUNDS = 9
_PROFILE_ENTRIES = 15
_SHARE_OF_ROWS = 0.85
"""Share of the time after which no row starts: the profiles come last, because the profiler slows down later calls."""

_COMPILE_OPTIONS: dict[str, dict[str, Any]] = {"compile": {}, "graphs": {"mode": "reduce-overhead"}}
"""Arguments of `torch.compile` by mode. Only the backbone and its FPN are compiled: the heads have dynamic shapes."""

_TOLERANCE = {"float32": 1e-3, "tf32": 2e-2, "float16": 5e-2, "bfloat16": 1e-1}
"""Largest difference of the features, relative to their largest magnitude."""


@dataclass(frozen=True)
class Row:
    """One comparison."""

    mode: str
    """eager, compile, or graphs for CUDA graphs."""
    batch: int
    dtype: str
    """tf32, or the dtype of autocast; float32 in a rehearsal."""
    step: str
    """inference or training."""

    @property
    def title(self) -> str:
        return f"{self.mode}, batch {self.batch}, {self.dtype}, {self.step}"


def rows_by_worth() -> list[Row]:
    """Return all rows, the most important first."""

    train, infer = "training", "inference"

    def eager(*dtypes: str) -> list[Row]:
        order = ((2, train), (8, train), (1, train), (1, infer), (2, infer), (8, infer))
        return [Row("eager", N, dtype, step) for N, step in order for dtype in dtypes]

    def compiled(*dtypes: str) -> list[Row]:
        order = ((2, train), (1, infer), (8, train), (2, infer), (1, train), (8, infer))
        return [Row(mode, N, dtype, step) for dtype in dtypes for N, step in order for mode in ("graphs", "compile")]

    return [
        *eager("float16", "tf32"),
        *compiled("float16")[:2],
        *eager("bfloat16"),
        *compiled("float16")[2:],
        *compiled("tf32", "bfloat16"),
    ]


# Torchvision's operation supports autocast only on a GPU.
_REHEARSED_ROWS = [Row("eager", 2, "float32", "training"), Row("graphs", 1, "float32", "inference")]
_REHEARSED_SIZES: dict[str, Any] = {
    "min_size": 64, "max_size": 96, "backbone": "small", "roi_batch": 8, "proposals_train": 20, "proposals_test": 20
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    rehearsal = options.device == "rehearsal"
    if not rehearsal and not torch.cuda.is_available():
        print("the benchmark of the model needs a GPU (or --device rehearsal)", file=sys.stderr)
        return 1
    # Our convolutions follow the switch for convolutions, torchvision's the one for matrix products.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if rehearsal:
        torch.set_num_threads(1)
    run = Run(rehearsal, 60 * options.minutes, options.output)
    for row in _REHEARSED_ROWS if rehearsal else rows_by_worth():
        run.measure(row)
    run.print_report()
    run.profile()
    print(f"\nwritten to {options.output}")
    return 1 if run.failures else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--device", choices=("cuda", "rehearsal"), default="cuda", help="default: %(default)s")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="start no row after this time; important rows come first"
    )
    parser.add_argument("--output", type=Path, default=Path("out/model.json"), help="JSON file; default: %(default)s")
    return parser.parse_args(arguments)


class TorchvisionPack(ModulatedDeformConv2dPack):
    """Layer that calls torchvision's operation."""

    def forward(self, input: Tensor) -> Tensor:
        points = self.sampling_points
        offset, logits = self.conv_offset(input).split((2 * points, points), dim=1)
        mask = torch.sigmoid(logits)
        mask = mask if self.mask_scale == 1 else self.mask_scale * mask
        numbers = self.stride, self.padding, self.dilation
        output: Tensor = ops.deform_conv2d(input, offset, self.weight, self.bias, *numbers, mask)
        return output


def build_models(rehearsal: bool) -> dict[str, Any]:
    """Build the network of both contenders, which share all parameters."""
    sizes = _REHEARSED_SIZES if rehearsal else {}
    torch.manual_seed(0)
    ours = build_detector(NetworkConfig(preset="dcnv2", detector="mask", **sizes), _CATEGORIES)
    ours.to("cpu" if rehearsal else "cuda")
    for layer in ours.modules():
        if isinstance(layer, ModulatedDeformConv2dPack):
            # Offsets of about a pixel and various masks: those of a new layer are all zero and all equal.
            nn.init.normal_(layer.conv_offset.bias)
    peer = copy.deepcopy(ours, {id(tensor): tensor for tensor in (*ours.parameters(), *ours.buffers())})
    for layer in peer.modules():
        if isinstance(layer, ModulatedDeformConv2dPack):
            layer.__class__ = TorchvisionPack
    return {OURS: ours, PEER: peer}


@dataclass
class Run:
    """Networks, and results so far."""

    rehearsal: bool
    seconds: float
    output: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    profiles: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    peer_failures: list[str] = field(default_factory=list)
    """Failures of torchvision's operation in compiled networks, which do not fail the run."""
    not_reached: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._begin = time.monotonic()
        self._longest: dict[str, float] = {}
        self._device = torch.device("cpu" if self.rehearsal else "cuda")
        self._models = build_models(self.rehearsal)
        self._backbones = {name: model.backbone for name, model in self._models.items()}
        self._state = copy.deepcopy(self._models[OURS].state_dict())
        parameters = [parameter for parameter in self._models[OURS].parameters() if parameter.requires_grad]
        # The rate is too small to change the network.
        self._optimizer = torch.optim.SGD(parameters, lr=1e-9, momentum=0.9)
        self._environment = environment.describe(torch.get_num_threads(), gpu=not self.rehearsal)

    def measure(self, row: Row) -> None:
        """Measure a row if there is time for it, and save all results."""
        begin = time.monotonic()
        if begin - self._begin + self._longest.get(row.mode, 0.0) >= _SHARE_OF_ROWS * self.seconds:
            self.not_reached.append(row.title)
            return
        print(row.title, file=sys.stderr, flush=True)
        try:
            with self._compiled(row):
                self.rows.append(self._measured(row))
        except Exception as error:
            # Continue with the other rows.
            traceback.print_exc()
            self.failures.append(f"{row.title}: {_in_a_line(error)}")
        self._longest[row.mode] = max(self._longest.get(row.mode, 0.0), time.monotonic() - begin)
        self.save()

    def profile(self) -> None:
        """Profile one training step of each contender and dtype in eager mode."""
        for result in [result for result in self.rows if result["mode"] == "eager" and result["step"] == "training"]:
            row = Row(*(result[name] for name in ("mode", "batch", "dtype", "step")))
            if row.batch != 2 or time.monotonic() - self._begin >= self.seconds:
                continue
            with self._compiled(row):
                batch = _Batch(row.batch, self.rehearsal)
                for name in result["timings"]:
                    step = self._step(name, row, batch)
                    step()
                    self.profiles.append({"title": row.title, "contender": name, **_profile(step, self._device)})
        self.save()

    def print_report(self) -> None:
        print(_table(self.rows))
        for target in self._targets():
            print(target)
        for failure in [*self.failures, *self.peer_failures]:
            print(f"FAILED  {failure}")
        if self.not_reached:
            print(f"{len(self.not_reached)} rows were not reached in time: {self.not_reached[0]}, ...")

    def save(self) -> None:
        document = {
            "environment": self._environment,
            "results": self.rows,
            "profiles": self.profiles,
            "targets": [target.as_dict() for target in self._targets()],
            "failures": self.failures,
            "peer_failures": self.peer_failures,
            "not_reached": self.not_reached,
        }
        if self.rehearsal:
            document["rehearsal"] = environment.REHEARSAL
        report.write_json(self.output, document)

    def _targets(self) -> list[targets.Target]:
        return [] if self.rehearsal else targets.evaluate_model(self.rows)

    @contextmanager
    def _compiled(self, row: Row) -> Iterator[None]:
        """Prepare both networks for a row."""
        self._models[OURS].load_state_dict(self._state)
        for name, model in self._models.items():
            model.train(row.step == "training")
            if row.mode != "eager":
                options = {"backend": "aot_eager"} if self.rehearsal else _COMPILE_OPTIONS[row.mode]
                model.backbone = torch.compile(self._backbones[name], dynamic=False, **options)
        try:
            yield
        finally:
            for name, model in self._models.items():
                model.backbone = self._backbones[name]
            self._optimizer.zero_grad()
            if row.mode != "eager":
                torch._dynamo.reset()
            gc.collect()
            if not self.rehearsal:
                torch.cuda.empty_cache()

    def _measured(self, row: Row) -> dict[str, Any]:
        batch, other = (_Batch(row.batch, self.rehearsal) for _ in range(2))
        expected = self._features(self._backbones[OURS], other, row)
        differences: dict[str, float] = {}
        steps: dict[str, Callable[[], None]] = {}
        for name in (OURS, PEER):
            # Not every operation can be compiled or captured.
            failures = self.peer_failures if name == PEER and row.mode != "eager" else self.failures
            try:
                difference = differences[name] = self._difference(name, row, batch, other, expected)
                if difference <= _TOLERANCE[row.dtype]:
                    step = self._step(name, row, batch)
                    step()
                    steps[name] = step
                else:
                    limit = f"{difference:.1e} of at most {_TOLERANCE[row.dtype]:.0e}"
                    failures.append(f"{row.title}: the features of {name} differ by {limit}")
            except Exception as error:
                traceback.print_exc()
                failures.append(f"{row.title}: {name}: {_in_a_line(error)}")
        peak_bytes, host = {}, {}
        if row.mode == "eager":
            peak_bytes = {name: self._peak_bytes(step) for name, step in steps.items()}
            host = {name: _host_times(step) for name, step in steps.items()}
        timings = time_in_turn(steps, self._clock, 0.0 if self.rehearsal else _SECONDS_PER_ROW, _MOST_ROUNDS)
        medians = [timings[name]["median_ms"] for name in (OURS, PEER) if name in timings]
        return {
            **asdict(row),
            "title": row.title,
            "features_differ_by": differences,
            "timings": timings,
            "ratio": medians[0] / medians[1] if len(medians) == 2 else None,
            "peak_bytes": peak_bytes,
            "host_microseconds": host,
        }

    def _difference(self, name: str, row: Row, batch: _Batch, other: _Batch, expected: list[Tensor]) -> float:
        """Compare features with those of our network in eager mode.

        A captured network is compared on other images than it was captured with, because kernels outside of the graph
        would run only once.
        """
        backbone = self._models[name].backbone
        if row.mode == "graphs":
            for _ in range(3):  # warm up, capture, replay
                self._features(backbone, batch, row)
        found = self._features(backbone, other, row)
        differences = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)]
        # NaN would be lost in a maximum.
        return max(differences) if all(value == value for value in differences) else float("nan")

    def _features(self, backbone: Any, batch: _Batch, row: Row) -> list[Tensor]:
        images, _ = self._models[OURS].transform(batch.images)
        trains = row.step == "training"
        with self._autocast(row), torch.set_grad_enabled(trains):
            self._begin_step(row)
            levels = list(backbone(images.tensors).values())
            # Copies: the next replay of a graph overwrites its results.
            features = [level.detach().float().clone() for level in levels]
        if trains:
            torch.stack([level.float().mean() for level in levels]).sum().backward()
            self._optimizer.zero_grad()
        return features

    def _step(self, name: str, row: Row, batch: _Batch) -> Callable[[], None]:
        model = self._models[name]

        def infer() -> None:
            self._begin_step(row)
            with torch.no_grad(), self._autocast(row):
                model(batch.images)

        def train() -> None:
            self._begin_step(row)
            with self._autocast(row):
                loss = sum(model(batch.images, batch.objects).values())
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()

        return infer if row.step == "inference" else train

    def _begin_step(self, row: Row) -> None:
        if row.mode == "graphs":
            torch.compiler.cudagraph_mark_step_begin()

    def _autocast(self, row: Row) -> torch.autocast:
        is_enabled = row.dtype in ("float16", "bfloat16")
        return torch.autocast(self._device.type, getattr(torch, row.dtype) if is_enabled else None, enabled=is_enabled)

    def _clock(self, call: Callable[[], object]) -> float:
        _synchronize(self._device)
        begin = time.perf_counter()
        call()
        _synchronize(self._device)
        return time.perf_counter() - begin

    def _peak_bytes(self, call: Callable[[], object]) -> int | None:
        if self.rehearsal:
            return None
        torch.cuda.reset_peak_memory_stats()
        call()
        return int(torch.cuda.max_memory_allocated())


class _Batch:
    """Random images and their objects. The number of proposals depends on random weights."""

    def __init__(self, N: int, rehearsal: bool) -> None:
        device = "cpu" if rehearsal else "cuda"
        height, width = (64, 80) if rehearsal else (800, 1333)
        self.images = [torch.rand(3, height, width, device=device) for _ in range(N)]
        self.objects = [_objects(height, width, device) for _ in range(N)]


def _objects(height: int, width: int, device: str) -> dict[str, Tensor]:
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


def _host_times(step: Callable[[], None]) -> dict[str, dict[str, float]]:
    """Return the CPU time of the calls of each operation in one step, forward and backward.

    The calls are those of a network: caches are cold, and the GPU is busy. If the GPU is so far behind that the
    driver's queue is full, the times include waiting.
    """
    seconds: dict[str, list[float]] = {}

    def timed(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            begin = time.perf_counter()
            output = function(*args, **kwargs)
            seconds.setdefault(f"{name}, forward", []).append(time.perf_counter() - begin)
            _time_backward(output, seconds.setdefault(f"{name}, backward", []))
            return output

        return call

    with (
        mock.patch.object(deform_conv2d_layers, "deform_conv2d", timed("conv", deform_conv2d_layers.deform_conv2d)),
        mock.patch.object(ops, "deform_conv2d", timed("conv", ops.deform_conv2d)),
        mock.patch.object(
            deform_roi_pool_layers, "deform_roi_pool", timed("pooling", deform_roi_pool_layers.deform_roi_pool)
        ),
    ):
        step()
    return {
        name: {"median": 1e6 * statistics.median(values), "min": 1e6 * min(values), "calls": len(values)}
        for name, values in seconds.items()
        if values
    }


def _time_backward(output: Tensor, seconds: list[float]) -> None:
    """Append the time of the backward pass of the operation that computed `output`."""
    node = output.grad_fn
    # Under autocast, torchvision's operation converts its result.
    while node is not None and "Copy" in node.name():
        node = node.next_functions[0][0]
    if node is not None:
        begins: list[float] = []
        node.register_prehook(lambda _: begins.append(time.perf_counter()))
        node.register_hook(lambda *_: seconds.append(time.perf_counter() - begins.pop()))


def _profile(step: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """Return the operations of one step that take the most time on the GPU and on the CPU.

    The profiler only sees operators, so that our calls take a slower path than without it.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch_profile(activities=activities) as profiler:
        step()
        _synchronize(device)
    averages: Any = profiler.key_averages()

    def top(time_of: str) -> list[dict[str, Any]]:
        ordered = sorted(averages, key=lambda entry: getattr(entry, time_of), reverse=True)
        return [
            {"name": entry.key, "calls": entry.count, "microseconds": getattr(entry, time_of)}
            for entry in ordered[:_PROFILE_ENTRIES]
        ]

    return {"by_gpu_time": top("self_device_time_total"), "by_cpu_time": top("self_cpu_time_total")}


def _table(rows: Sequence[dict[str, Any]]) -> str:
    host = [f"{name} {direction}, us" for name in (OURS, PEER) for direction in ("forward", "backward")]
    peaks = [f"{name} peak, GiB" for name in (OURS, PEER)]
    lines = [["Mask R-CNN", *(f"{name}, ms" for name in (OURS, PEER)), f"{OURS} / {PEER}", *peaks, *host]]
    for row in rows:
        figures = [row["timings"].get(name, {}).get("median_ms") for name in (OURS, PEER)]
        cells = [*(_cell(value, ".1f") for value in figures), _cell(row["ratio"], ".3f")]
        sizes = [row["peak_bytes"].get(name) for name in (OURS, PEER)]
        cells += [_cell(None if size is None else size / 2**30, ".2f") for size in sizes]
        for name in (OURS, PEER):
            times = row["host_microseconds"].get(name, {})
            cells += [_cell(times.get(f"conv, {way}", {}).get("median"), ".0f") for way in ("forward", "backward")]
        lines.append([row["title"], *cells])
    return report.markdown(lines)


def _cell(value: float | None, format: str) -> str:
    return "-" if value is None else f"{value:{format}}"


def _in_a_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text:.200}"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
