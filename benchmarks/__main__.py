"""Measure dcnops beside torchvision and a plain convolution: `python -m benchmarks`.

Every contender's output and gradients are first checked against a float64 evaluation of the same inputs. One that is
wrong is not timed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import util
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import environment

if TYPE_CHECKING:
    from benchmarks.contenders import Operation
    from benchmarks.measure import Meter
    from benchmarks.target import Target

OPERATIONS = ("deform_conv2d", "deform_roi_pool")
DEVICES = ("all", "cpu", "cuda", "rehearsal")
PARTS = ("forward", "backward", "memory", "first-call")
_SECONDS = {"cpu": 8.0, "cuda": 0.3, "rehearsal": 0.0}
_ROOT = Path(__file__).parents[1]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    environment.limit_threads(options.threads)
    missing = [package for package in ("torch", "torchvision") if util.find_spec(package) is None]
    if missing:
        print(f"the benchmark needs {' and '.join(missing)}: pip install 'dcnops[detector]'", file=sys.stderr)
        return 1
    import torch

    from benchmarks import report
    from benchmarks.contenders import load

    torch.set_num_threads(options.threads)
    gpu_is_there = _gpu_is_there()
    if options.device == "cuda" and not gpu_is_there:
        print("--device cuda needs a CUDA GPU, and CuPy and torch that can use it", file=sys.stderr)
        return 1
    operations = [load(name) for name in options.operations]
    for shape in options.shapes or []:
        if not any(len(shape) == len(operation.shapes[0]) for operation in operations):
            print(f"--shapes: no operation has {len(shape)} sizes", file=sys.stderr)
            return 1
    devices = {"all": ["cpu", "cuda"] if gpu_is_there else ["cpu"]}.get(options.device, [options.device])
    run = _Run(options, devices, environment.describe(options.threads, gpu="cuda" in devices))
    for device in devices:
        try:
            _measure(run, device, operations)
        except Exception:
            # What was measured before is still reported.
            traceback.print_exc()
            run.failures.append(f"{device}: stopped by an exception")

    print(" ".join(f"{name} {value};" for name, value in run.description.items() if value is not None), end="\n\n")
    print(report.tables(run.rows, operations))
    if run.first_call:
        print(report.first_call_table(run.first_call), end="\n\n")
    reached = run.targets()
    for target in reached:
        print(target)
    for failure in run.failures:
        print(f"FAILED  {failure}")
    if run.not_reached:
        print(f"{len(run.not_reached)} rows were not reached in {options.minutes:g} minutes: {run.not_reached[0]}, ...")
    if "rehearsal" in devices:
        print("REHEARSAL: made without a GPU, no figure is a measurement")
    run.save()
    print(f"\nwritten to {run.path}")
    missed = options.check_targets and not all(target.holds for target in reached)
    return 1 if run.failures or missed else 0


@dataclass
class _Run:
    """What a run has found so far."""

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
            return _ROOT / "benchmarks" / "results" / f"{'-'.join(self.devices)}-{self.begin:%Y-%m-%d}.json"
        return self.options.output or _ROOT / "out" / "benchmark.json"

    @property
    def is_over(self) -> bool:
        """Whether no further row is to be begun."""
        return (datetime.now(timezone.utc) - self.begin).total_seconds() >= 60 * self.options.minutes

    def targets(self) -> list[Target]:
        from benchmarks import targets

        return targets.evaluate(self.rows, self.first_call, self.floors.get("cuda", {}))

    def save(self) -> None:
        """Write what there is: a run that is killed leaves the rows before."""
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
            document["rehearsal"] = "made without a GPU: no figure is a measurement"
        report.write_json(self.path, document)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--device", choices=DEVICES, default="all", help="default: all that is there")
    parser.add_argument("--operations", choices=OPERATIONS, nargs="+", default=OPERATIONS, help="default: all")
    parser.add_argument("--threads", type=int, default=environment.usable_cores(), help="default: all cores")
    parser.add_argument(
        "--seconds", type=float, help="time for one row and direction, at least 3 rounds; default: CPU 8, GPU 0.3"
    )
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin no row after that, the most important come first"
    )
    parser.add_argument(
        "--shapes",
        type=_shape,
        nargs="+",
        metavar="CxHxW",
        help="instead of the standard ones, as in the tables: CxHxW for a convolution, CxHxWxRxP for a RoI pooling",
    )
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS, help="what to measure; default: everything")
    destination = parser.add_mutually_exclusive_group()
    destination.add_argument("--output", type=Path, help="JSON file; default: out/benchmark.json")
    destination.add_argument("--save", action="store_true", help="keep it as benchmarks/results/<device>-<date>.json")
    parser.add_argument("--check-targets", action="store_true", help="exit with status 1 when a target is missed")
    return parser.parse_args(arguments)


def _shape(text: str) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in text.split("x"))
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"sizes are positive, got {text!r}")
    return sizes


def _gpu_is_there() -> bool:
    if util.find_spec("cupy") is None:
        return False
    try:
        from benchmarks import cuda
    except ImportError:
        return False
    return cuda.is_available()


def _measure(run: _Run, device: str, operations: Sequence[Operation]) -> None:
    """Measure on one device; what is found is kept as soon as it is known."""
    from benchmarks import first_call as first
    from benchmarks.floors import measure_floors
    from benchmarks.measure import DIRECTIONS, cases, measure

    options = run.options
    seconds = options.seconds or _SECONDS[device]
    with ExitStack() as stack:
        meter = _meter(device, stack)
        if device != "cpu":
            size = 8192 if device == "cuda" else 64
            run.floors[device] = measure_floors("cuda" if device == "cuda" else "cpu", meter.clock, size)
        planned = []
        if set(options.parts) & set(DIRECTIONS):
            for operation in operations:
                shapes = _shapes(operation, options, device)
                planned.append([(operation, case) for case in cases(operation, device, shapes)])
        # In turn, so that each operation's most important rows come before another's least.
        for operation, case in (row for turn in zip_longest(*planned) for row in turn if row is not None):
            title = f"{operation.name} {case.title}"
            if run.is_over:
                run.not_reached.append(title)
                continue
            print(title, file=sys.stderr, flush=True)
            try:
                run.rows.append(measure(operation, case, meter, options.parts, seconds, run.failures))
            except Exception as error:
                # The other rows are still measured.
                traceback.print_exc()
                run.failures.append(f"{title}: {type(error).__name__}: {error}")
            run.save()
    if "first-call" in options.parts and first.OPERATION in options.operations and device != "rehearsal":
        print(f"first calls, {device}", file=sys.stderr)
        run.first_call[device] = first.first_call_seconds(device)


def _meter(device: str, stack: ExitStack) -> Meter:
    if device == "cpu":
        from benchmarks.cpu import CpuMeter

        return CpuMeter()
    if device == "rehearsal":
        from benchmarks.rehearsal import RehearsalMeter, rehearse

        stack.enter_context(rehearse())
        return RehearsalMeter()
    from benchmarks import cuda

    return cuda.CudaMeter()


def _shapes(operation: Operation, options: argparse.Namespace, device: str) -> Sequence[tuple[int, ...]]:
    """The standard ones unless others are asked for, of as many sizes as the operation's."""
    shapes = options.shapes
    if shapes is None and device == "rehearsal":
        from benchmarks.rehearsal import SHAPES

        shapes = SHAPES
    if shapes is None:
        return operation.shapes
    return [shape for shape in shapes if len(shape) == len(operation.shapes[0])]


if __name__ == "__main__":
    sys.exit(main())
