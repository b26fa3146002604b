"""One row after the other: check, then time, then measure memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from benchmarks.contenders import Case, Operation
from benchmarks.correctness import check
from benchmarks.timing import interleave

DIRECTIONS = ("forward", "backward")


class Meter(Protocol):
    """How time and memory are measured on a device."""

    def start(self, case: Case) -> None:
        """Called before anything of a case runs."""

    def clock(self, call: Callable[[], object]) -> float:
        """Seconds that one call takes."""
        ...

    def host_seconds(self, call: Callable[[], object]) -> float | None:
        """Seconds that a call keeps the CPU, where the device works by itself."""
        ...

    def peak_extra_bytes(
        self, operation: Operation, case: Case, contender: str, direction: str, call: Callable[[], Any]
    ) -> int | None:
        """Most memory that one call needs beside its arguments and results."""
        ...


def cases(operation: Operation, device: str, shapes: Iterable[tuple[int, ...]]) -> Iterator[Case]:
    """The most important first: every shape in one way, then in the next."""
    shapes = list(shapes)
    for variant in operation.variants[device]:
        for shape in shapes:
            yield Case(device, shape, **variant)


def measure(
    operation: Operation, case: Case, meter: Meter, parts: Sequence[str], seconds: float, failures: list[str]
) -> dict[str, Any]:
    """A row of results; contenders that are wrong are named in `failures` and not timed."""
    meter.start(case)
    arrays = operation.inputs(case)
    contenders = operation.contenders(case)
    errors = check(operation, case, arrays, contenders)
    correct = []
    for contender in contenders:
        limit = contender.tolerance
        wrong = {name: error for name, error in errors[contender.name].items() if error > limit}
        for name, error in wrong.items():
            failures.append(
                f"{case.title}: {contender.name} is wrong: {name} is off by {error:.1e} of at most {limit:.0e}"
            )
        if not wrong:
            correct.append(contender)

    timings, ratios, memory, host = {}, {}, {}, {}
    for direction in DIRECTIONS:
        if direction not in parts:
            continue
        calls = {contender.name: getattr(contender, direction)(case, arrays) for contender in correct}
        host[direction] = {name: meter.host_seconds(call) for name, call in calls.items()}
        timings[direction] = {
            name: timing.summary() for name, timing in interleave(calls, meter.clock, seconds).items()
        }
        ratios[direction] = _ratios(operation, timings[direction])
        if "memory" in parts:
            memory[direction] = {
                name: meter.peak_extra_bytes(operation, case, name, direction, call)
                for name, call in calls.items()
                if name in operation.with_memory
            }
    return {
        "operation": operation.name,
        **asdict(case),
        "shape": case.label,
        "data": case.data,
        "column_bytes": operation.column_bytes(case),
        "work": operation.work(case),
        "errors": errors,
        "timings": timings,
        "ratios": ratios,
        "host_seconds": host,
        "peak_extra_bytes": memory,
    }


def _ratios(operation: Operation, timings: dict[str, dict[str, float]]) -> dict[str, float]:
    return {
        f"{a}/{b}": timings[a]["median_ms"] / timings[b]["median_ms"]
        for a, b in operation.ratios
        if a in timings and b in timings
    }
