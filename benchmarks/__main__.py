"""Compare dcnops with torchvision, a plain convolution and grid_sample: `python -m benchmarks`.

The output and gradients of every contender are first compared with float64 results for the same inputs. A contender
with wrong results is not timed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import util
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import environment

if TYPE_CHECKING:
    from benchmarks.measure import Meter
    from benchmarks.operations import Operation
    from benchmarks.targets import Target

OPERATIONS = ("deform_conv2d", "deform_roi_pool", "ms_deform_attn", "deform_aggregate")
DEVICES = ("all", "cpu", "cuda")
PARTS = ("forward", "backward", "memory", "first-call")
_SECONDS = {"cpu": 8.0, "cuda": 0.3, "rehearsal": 0.0}
_FLOOR_SIZE = {"cuda": 8192, "rehearsal": 64}


def main(arguments: Sequence[str] | None = None, rehearsal: Any = None) -> int:
    """Run the benchmark, on the device `rehearsal` if that meter is given, and return the exit status."""
    options = _parse(arguments)
    environment.limit_threads(options.threads)
    missing = [package for package in ("torch", "torchvision") if util.find_spec(package) is None]
    if missing:
        print(f"the benchmark needs {' and '.join(missing)}: pip install 'dcnops[detector]'", file=sys.stderr)
        return 1
    import torch

    from benchmarks.operations import load

    torch.set_num_threads(options.threads)
    has_gpu = not rehearsal and _has_gpu()
    if options.device == "cuda" and not has_gpu:
        print("--device cuda needs a CUDA GPU, and CuPy and torch that can use it", file=sys.stderr)
        return 1
    operations = [load(name) for name in options.operations]
    for shape in options.shapes or []:
        if not any(len(shape) == len(operation.shapes[0]) for operation in operations):
            print(f"--shapes: no operation has {len(shape)} sizes", file=sys.stderr)
            return 1
    if rehearsal:
        devices, options.shapes = ["rehearsal"], options.shapes or rehearsal.shapes
    else:
        devices = {"all": ["cpu", "cuda"] if has_gpu else ["cpu"]}.get(options.device, [options.device])
    run = _Run(options, devices, environment.describe(options.threads, gpu="cuda" in devices))
    for device in devices:
        try:
            _measure(run, device, rehearsal or _meter(device), operations)
        except Exception:
            # Report what was measured before.
            traceback.print_exc()
            run.failures.append(f"{device}: stopped by an exception")
    run.print_report(operations)
    run.save()
    print(f"\nwritten to {run.path}")
    missed = options.check_targets and not all(target.holds for target in run.targets())
    return 1 if run.failures or missed else 0


@dataclass
class _Run:
    """Results of a run so far."""

    options: argparse.Namespace
    devices: Sequence[str]
    description: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    first_call: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    floors: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    not_reached: list[str] = field(default_factory=list)
    begin: datetime = field(default_factory=lambda: datetime.now(timezone.utc))

    @property
    def path(self) -> Path:
        if self.options.save:
            name = f"{'-'.join(self.devices)}-{self.begin:%Y-%m-%d}.json"
            return environment.ROOT / "benchmarks" / "results" / name
        return self.options.output or environment.ROOT / "out" / "benchmark.json"

    @property
    def time_is_up(self) -> bool:
        return (datetime.now(timezone.utc) - self.begin).total_seconds() >= 60 * self.options.minutes

    def targets(self) -> list[Target]:
        from benchmarks import targets

        return targets.evaluate(self.rows, self.first_call, self.floors.get("cuda", {}))

    def print_report(self, operations: Sequence[Operation]) -> None:
        from benchmarks import report

        print(" ".join(f"{name} {value};" for name, value in self.description.items() if value is not None), end="\n\n")
        print(report.tables(self.rows, operations))
        if self.first_call:
            print(report.first_call_table(self.first_call), end="\n\n")
        for target in self.targets():
            print(target)
        for failure in self.failures:
            print(f"FAILED  {failure}")
        if self.not_reached:
            count, minutes = len(self.not_reached), self.options.minutes
            print(f"{count} rows were not reached in {minutes:g} minutes: {self.not_reached[0]}, ...")
        if "rehearsal" in self.devices:
            print(f"REHEARSAL: {environment.REHEARSAL}")

    def save(self) -> None:
        """Write all results so far, so that a killed run leaves its completed rows."""
        from benchmarks import report

        document = {
            "date": self.begin.isoformat(timespec="seconds"),
            "environment": self.description,
            "results": self.rows,
            "first_call_seconds": self.first_call,
            "targets": [target.as_dict() for target in self.targets()],
            "failures": self.failures,
            "floors": self.floors,
            "not_reached": self.not_reached,
        }
        if "rehearsal" in self.devices:
            document["rehearsal"] = environment.REHEARSAL
        report.write_json(self.path, document)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--device", choices=DEVICES, default="all", help="default: all that are available")
    parser.add_argument("--operations", choices=OPERATIONS, nargs="+", default=OPERATIONS, help="default: all")
    parser.add_argument("--threads", type=int, default=environment.usable_cores(), help="default: all cores")
    parser.add_argument(
        "--seconds", type=float, help="time per row and direction, with at least 3 rounds; default: 8 (CPU), 0.3 (GPU)"
    )
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="start no row after this time; important rows come first"
    )
    parser.add_argument(
        "--shapes",
        type=_shape,
        nargs="+",
        metavar="CxHxW...",
        help="replace the standard shapes: those with the number of sizes of an operation, as in its tables",
    )
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS, help="figures to measure; default: all")
    destination = parser.add_mutually_exclusive_group()
    destination.add_argument("--output", type=Path, help="JSON file; default: out/benchmark.json")
    destination.add_argument("--save", action="store_true", help="write benchmarks/results/<device>-<date>.json")
    parser.add_argument("--check-targets", action="store_true", help="exit with status 1 if a target is missed")
    return parser.parse_args(arguments)


def _shape(text: str) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in text.split("x"))
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"sizes are positive, got {text!r}")
    return sizes


def _has_gpu() -> bool:
    try:
        from benchmarks.cuda_meter import is_available
    except ImportError:
        return False
    return is_available()


def _meter(device: str) -> Meter:
    if device == "cpu":
        from benchmarks.cpu_meter import CpuMeter

        return CpuMeter()
    from benchmarks.cuda_meter import CudaMeter

    return CudaMeter()


def _measure(run: _Run, device: str, meter: Meter, operations: Sequence[Operation]) -> None:
    """Measure on one device and add each result to `run` immediately."""
    from benchmarks import first_call
    from benchmarks.measure import DIRECTIONS, cases, measure, measure_floors

    options = run.options
    if device != "cpu":
        run.floors[device] = measure_floors("cuda" if device == "cuda" else "cpu", meter.clock, _FLOOR_SIZE[device])
    planned = []
    if set(options.parts) & set(DIRECTIONS):
        for operation in operations:
            shapes = options.shapes and [shape for shape in options.shapes if len(shape) == len(operation.shapes[0])]
            planned.append([(operation, case) for case in cases(operation, device, shapes)])
    # Alternate between the operations, so that the important rows of both come first.
    for operation, case in (row for turn in zip_longest(*planned) for row in turn if row is not None):
        title = f"{operation.name} {case.title}"
        if run.time_is_up:
            run.not_reached.append(title)
            continue
        print(title, file=sys.stderr, flush=True)
        try:
            seconds = options.seconds or _SECONDS[device]
            run.rows.append(measure(operation, case, meter, options.parts, seconds, run.failures))
        except Exception as error:
            # Continue with the other rows.
            traceback.print_exc()
            run.failures.append(f"{title}: {type(error).__name__}: {error}")
        run.save()
    if "first-call" in options.parts and first_call.OPERATION in options.operations and device != "rehearsal":
        print(f"first calls, {device}", file=sys.stderr)
        run.first_call[device] = first_call.first_call_seconds(device)


if __name__ == "__main__":
    sys.exit(main())
