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
from datetime import datetime, timezone
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import environment

if TYPE_CHECKING:
    from benchmarks.contenders import Operation

__all__ = ["OPERATIONS", "main"]

OPERATIONS = ("deform_conv2d", "deform_roi_pool")
PARTS = ("forward", "backward", "memory", "first-call")
_SECONDS = {"cpu": 8.0, "cuda": 2.0}
_ROOT = Path(__file__).parents[1]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    environment.limit_threads(options.threads)
    missing = [package for package in ("torch", "torchvision") if util.find_spec(package) is None]
    if missing:
        print(f"the benchmark needs {' and '.join(missing)}: pip install 'dcnops[detector]'", file=sys.stderr)
        return 1
    import torch

    from benchmarks import report, targets
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

    description = environment.describe(options.threads, gpu="cuda" in devices)
    rows: list[dict[str, Any]] = []
    first_call: dict[str, dict[str, dict[str, float]]] = {}
    failures: list[str] = []
    for device in devices:
        try:
            _run(device, operations, options, rows, first_call, failures)
        except Exception:
            # What was measured before is still reported.
            traceback.print_exc()
            failures.append(f"{device}: stopped by an exception")

    reached = targets.evaluate(rows, first_call)
    print(" ".join(f"{name} {value};" for name, value in description.items() if value is not None), end="\n\n")
    print(report.tables(rows, operations))
    if first_call:
        print(report.first_call_table(first_call), end="\n\n")
    for target in reached:
        print(target)
    for failure in failures:
        print(f"FAILED  {failure}")

    now = datetime.now(timezone.utc)
    path = options.output or _ROOT / "out" / "benchmark.json"
    if options.save:
        path = _ROOT / "benchmarks" / "results" / f"{'-'.join(devices)}-{now:%Y-%m-%d}.json"
    document = {
        "date": now.isoformat(timespec="seconds"),
        "environment": description,
        "results": rows,
        "first_call_seconds": first_call,
        "targets": [target.as_dict() for target in reached],
        "failures": failures,
    }
    report.write_json(path, document)
    print(f"\nwritten to {path}")
    missed = options.check_targets and not all(target.holds for target in reached)
    return 1 if failures or missed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--device", choices=("all", "cpu", "cuda"), default="all", help="default: all that is there")
    parser.add_argument("--operations", choices=OPERATIONS, nargs="+", default=OPERATIONS, help="default: all")
    parser.add_argument("--threads", type=int, default=environment.usable_cores(), help="default: all cores")
    parser.add_argument(
        "--seconds", type=float, help="time for one row and direction, at least 3 rounds; default: CPU 8, GPU 2"
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


def _run(
    device: str,
    operations: Sequence[Operation],
    options: argparse.Namespace,
    rows: list[dict[str, Any]],
    first_call: dict[str, dict[str, dict[str, float]]],
    failures: list[str],
) -> None:
    """Measure on one device; what is found is appended as soon as it is known."""
    from benchmarks import first_call as first
    from benchmarks.cpu import CpuMeter
    from benchmarks.measure import DIRECTIONS, Meter, cases, measure

    seconds = options.seconds or _SECONDS[device]
    with ExitStack() as stack:
        meter: Meter = CpuMeter()
        if device == "cuda":
            from benchmarks import cuda

            stack.enter_context(cuda.stream())
            meter = cuda.CudaMeter()
        if set(options.parts) & set(DIRECTIONS):
            for operation in operations:
                shapes = [shape for shape in options.shapes or [] if len(shape) == len(operation.shapes[0])]
                for case in cases(operation, device, shapes if options.shapes else operation.shapes):
                    print(f"{operation.name} {case.title}", file=sys.stderr)
                    rows.append(measure(operation, case, meter, options.parts, seconds, failures))
    if "first-call" in options.parts and first.OPERATION in options.operations:
        print(f"first calls, {device}", file=sys.stderr)
        first_call[device] = first.first_call_seconds(device)


if __name__ == "__main__":
    sys.exit(main())
