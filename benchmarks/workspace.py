"""Compare limits of the scratch memory on a GPU: `python -m benchmarks.workspace`.

The backward pass of the deformable layers of a ResNet-50, and their float32 forward pass without TF32, process columns
(im2col) in chunks that fit the limit of `dcnops.set_workspace`. For each limit: the time on the GPU, the CPU time to
enqueue a call, and the extra memory. The results are first compared with those at the default limit.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import dcnops
from benchmarks import environment, report
from benchmarks.accounting import LAYERS, account
from benchmarks.contenders import to_numpy
from benchmarks.measure import Meter, time_in_turn
from benchmarks.operations import OURS, Case, load

if TYPE_CHECKING:
    from collections.abc import Iterator

_LIMITS = [size * 2**20 for size in (32, 64, 128, 256, 512)]
_SECONDS_PER_ROW = 0.5
_TOLERANCE = {"float32": 1e-5, "tf32": 1e-2, "float16": 1e-2}
"""Largest difference from the results at the default limit, relative to their largest magnitude."""


def cases_by_worth() -> list[tuple[Case, str]]:
    """Return cases and directions, the most important first: large batches, where the limit matters most."""
    half, tf32 = {"dtype": "float16"}, {"products": "tf32"}
    kinds: tuple[tuple[dict[str, str], str], ...] = ((half, "backward"), (tf32, "backward"), ({}, "forward"))
    return [
        (Case("cuda", shape, N, spread=2.0, **kind), direction)  # type: ignore[arg-type]
        for N in (16, 2, 8, 1)
        for shape in LAYERS.values()
        for kind, direction in kinds
    ]


def main(arguments: Sequence[str] | None = None, rehearsal: Any = None) -> int:
    """Run the benchmark, with the meter `rehearsal` if it is given, and return the exit status."""
    options = _parse(arguments)
    if rehearsal:
        meter, limits = rehearsal, rehearsal.workspaces
        planned = [
            (Case("rehearsal", rehearsal.shapes[0], 2, spread=2.0, **kind), direction)
            for kind, direction in (({"dtype": "float16"}, "backward"), ({}, "forward"))
        ]
    elif torch.cuda.is_available():
        from benchmarks.cuda_meter import CudaMeter

        meter, limits, planned = CudaMeter(), _LIMITS, cases_by_worth()
    else:
        print(
            "the benchmark of the workspace needs a GPU (or python -m tests.benchmarks.rehearse workspace)",
            file=sys.stderr,
        )
        return 1
    rows: list[dict[str, Any]] = []
    document: dict[str, Any] = {
        "environment": environment.describe(torch.get_num_threads(), gpu=not rehearsal),
        "results": rows,
        "failures": [],
        "not_reached": [],
    }
    if rehearsal:
        document["rehearsal"] = environment.REHEARSAL
    begin = time.monotonic()
    for case, direction in planned:
        title = f"{case.title}, {direction}"
        if time.monotonic() - begin >= 60 * options.minutes:
            document["not_reached"].append(title)
            continue
        print(title, file=sys.stderr, flush=True)
        try:
            rows.append(measure(case, direction, meter, limits, 0.0 if rehearsal else _SECONDS_PER_ROW))
        except Exception as error:
            # Continue with the other rows.
            traceback.print_exc()
            document["failures"].append(f"{title}: {type(error).__name__}: {error}")
        report.write_json(options.output, document)
    report.write_json(options.output, document)
    print(_table(rows, limits))
    for failure in document["failures"]:
        print(f"FAILED  {failure}")
    if document["not_reached"]:
        print(f"{len(document['not_reached'])} rows were not reached: {document['not_reached'][0]}, ...")
    print(f"\nwritten to {options.output}")
    return 1 if document["failures"] else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.workspace", description=(__doc__ or "").partition(":")[0]
    )
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="start no row after this time; important rows come first"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("out/workspace.json"), help="JSON file; default: %(default)s"
    )
    return parser.parse_args(arguments)


def measure(case: Case, direction: str, meter: Meter, limits: Sequence[int], seconds: float) -> dict[str, Any]:
    """Return the figures of one call at each limit; the limits are timed in turn."""
    meter.start(case)
    operation = load("deform_conv2d")
    arrays = operation.inputs(case)
    prepare = next(contender.prepare for contender in operation.contenders(case) if contender.name == OURS)
    expected = _results(prepare(case, arrays, direction))
    calls: dict[int, Callable[[], object]] = {}
    figures: dict[int, dict[str, Any]] = {}
    for limit in limits:
        with _workspace(limit):
            # A backward call keeps the limit under which its forward call ran.
            call = calls[limit] = prepare(case, arrays, direction)
            difference = _difference(_results(call), expected)
            allowed = _TOLERANCE[case.dtype if case.products == "ieee" else case.products]
            if not difference <= allowed:
                raise AssertionError(f"results at {_title(limit)} differ by {difference:.1e} of at most {allowed:.0e}")
            figures[limit] = {
                "host_seconds": meter.host_seconds(call),
                "peak_extra_bytes": meter.peak_extra_bytes(operation, case, OURS, direction, call),
                **account(case, direction, meter.device).counts,
            }
    limit_of = {call: limit for limit, call in calls.items()}

    def clock(call: Callable[[], object]) -> float:
        with _workspace(limit_of[call]):
            return meter.clock(call)

    timings = time_in_turn({str(limit): call for limit, call in calls.items()}, clock, seconds)
    return {
        **asdict(case),
        "shape": case.label,
        "data": case.data,
        "direction": direction,
        "limits": [{"limit": limit, **timings[str(limit)], **figures[limit]} for limit in limits],
    }


@contextmanager
def _workspace(limit: int) -> Iterator[None]:
    dcnops.set_workspace(limit)
    try:
        yield
    finally:
        dcnops.set_workspace(None)


def _results(call: Callable[[], Any]) -> dict[str, Tensor]:
    results = call()
    return {
        name: result.float() if isinstance(result, Tensor) else torch.from_numpy(to_numpy(result))
        for name, result in (results if isinstance(results, dict) else {"output": results}).items()
    }


def _difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest difference, relative to the largest magnitude of its tensor; NaN if there is one."""
    differences = [(found[name] - tensor).abs().max() / tensor.abs().max() for name, tensor in expected.items()]
    return float(torch.stack(differences).max())


def _title(limit: int) -> str:
    return f"{limit / 2**20:.3g} MiB"


def _table(rows: Sequence[dict[str, Any]], limits: Sequence[int]) -> str:
    """Return one line per row and limit, with the times in microseconds."""
    lines = [["C=O x H x W", "batch", "data", "direction", *map(_title, limits)]]
    for row in rows:
        name = [row["shape"], str(row["N"]), row["data"], row["direction"]]
        for figure, cell in (
            ("GPU, us", lambda found: f"{1e3 * found['median_ms']:.0f}"),
            ("CPU, us", lambda found: _or_dash(found["host_seconds"], 1e6)),
            ("extra, MiB", lambda found: _or_dash(found["peak_extra_bytes"], 2**-20)),
            ("launches", lambda found: "+".join(str(found[kind]) for kind in ("kernels", "products", "fills"))),
        ):
            lines.append([*name[:3], f"{name[3]}: {figure}", *(cell(found) for found in row["limits"])])
    return report.markdown(lines)


def _or_dash(value: float | None, factor: float) -> str:
    return "-" if value is None else f"{factor * value:.0f}"


if __name__ == "__main__":
    sys.exit(main())
