"""Measurement of one row (check the contenders, time them in turn, measure their memory) and of peak throughput."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.accounting import H200, account
from benchmarks.correctness import check
from benchmarks.operations import OURS, Case, Operation

DIRECTIONS = ("forward", "backward")

_LEAST_ROUNDS = 3
_FLOOR_ROUNDS = 7


class Meter:
    """Measurement of time and memory on one device. The base class is a wall clock."""

    device = H200
    """Device for which launches are counted."""

    def start(self, case: Case) -> None:
        """Prepare for a case before any part of it runs."""

    def clock(self, call: Callable[[], object]) -> float:
        """Return the seconds that one call takes."""
        begin = time.perf_counter()
        result = call()
        end = time.perf_counter()
        del result
        return end - begin

    def host_seconds(self, call: Callable[[], object]) -> float | None:
        """Return the seconds that a repeated call occupies the CPU, if the device runs asynchronously."""
        return None

    def peak_extra_bytes(
        self, operation: Operation, case: Case, contender: str, direction: str, call: Callable[[], Any]
    ) -> int | None:
        """Return the peak memory of one call beyond its arguments and results, if it can be measured."""
        return None


def cases(operation: Operation, device: str, shapes: Sequence[tuple[int, ...]] | None = None) -> Iterator[Case]:
    """Yield all standard cases, or those of the given shapes: all in the most important variant, then in the next."""
    for variant in [{}] if device == "cpu" else operation.gpu_variants:
        for shape in operation.shapes if shapes is None else shapes:
            yield Case(device, shape, **variant)
    if shapes is None:
        yield from (case for case in operation.other_cases if case.device == device)


def measure(
    operation: Operation, case: Case, meter: Meter, parts: Sequence[str], seconds: float, failures: list[str]
) -> dict[str, Any]:
    """Return a row of results. Contenders with wrong results are added to `failures` and not timed."""
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

    timings, ratios, memory, host, launches = {}, {}, {}, {}, {}
    for direction in [direction for direction in DIRECTIONS if direction in parts]:
        calls = {contender.name: contender.prepare(case, arrays, direction) for contender in correct}
        host[direction] = {name: meter.host_seconds(call) for name, call in calls.items()}
        if case.device != "cpu" and OURS in calls:
            launches[direction] = account(case, direction, meter.device).counts
        timings[direction] = time_in_turn(calls, meter.clock, seconds)
        medians = {name: timing["median_ms"] for name, timing in timings[direction].items()}
        ratios[direction] = {
            f"{a}/{b}": medians[a] / medians[b] for a, b in operation.ratios if a in medians and b in medians
        }
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
        "launches": launches,
        "peak_extra_bytes": memory,
    }


def time_in_turn(
    calls: Mapping[str, Callable[[], object]],
    clock: Callable[[Callable[[], object]], float],
    seconds: float,
    most_rounds: int = 100,
) -> dict[str, dict[str, float]]:
    """Time rounds A B C A B C ... after a warm-up round, at least 3, until `seconds` have passed.

    Background load of the machine then affects all contenders equally.
    """
    durations: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        clock(call)
    gc.collect()
    gc.disable()
    try:
        end = time.monotonic() + seconds
        for done in range(most_rounds):
            if done >= _LEAST_ROUNDS and time.monotonic() >= end:
                break
            for name, call in calls.items():
                durations[name].append(clock(call))
    finally:
        gc.enable()
    return {
        name: {
            "median_ms": 1e3 * statistics.median(samples),
            "min_ms": 1e3 * min(samples),
            "max_ms": 1e3 * max(samples),
            "rounds": len(samples),
        }
        for name, samples in durations.items()
    }


def measure_floors(device: str, clock: Callable[[Callable[[], object]], float], size: int) -> dict[str, float]:
    """Return operations per second of products of square matrices with `size` rows, and bytes per second of a copy."""
    import torch

    def best_seconds(call: Callable[[], object]) -> float:
        call()
        return min(clock(call) for _ in range(_FLOOR_ROUNDS))

    found = {}
    for kind in ("float16", "bfloat16", "float32, tf32", "float32"):
        dtype, _, tf32 = kind.partition(", ")
        torch.backends.cuda.matmul.allow_tf32 = bool(tf32)
        # Not zeros, which draw less power and run faster than real data.
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
        found[kind] = 2.0 * size**3 / best_seconds(lambda a=a, b=b: a @ b)
    source = torch.randn(16 * size, size, device=device)
    target = torch.empty_like(source)
    found["memory"] = 2.0 * source.nbytes / best_seconds(lambda: target.copy_(source))
    return found
