"""Targets: the figures that the library should reach, in one table, and their evaluation for the rows of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from benchmarks.operations import GRID, OURS, PEER, PLAIN

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """One figure and its limit."""

    name: str
    value: float
    relation: str
    limit: float

    @property
    def holds(self) -> bool:
        return self.value >= self.limit if self.relation == ">=" else self.value <= self.limit

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds}

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "MISSED"
        return f"{verdict:6}  {self.name}: {self.value:.3g} (target {self.relation} {self.limit:g})"


class _Run(NamedTuple):
    rows: Sequence[Row]
    floors: Mapping[str, float]


class _Figure(NamedTuple):
    """A figure of a row in one direction; its value is None if it was not measured."""

    name: str
    value: Callable[[Row, str, _Run], float | None]


def _ratio(a: str, b: str) -> _Figure:
    return _Figure(f"{a} / {b}", lambda row, direction, run: row["ratios"].get(direction, {}).get(f"{a}/{b}"))


def _error_ratio(result: str) -> _Figure:
    def value(row: Row, direction: str, run: _Run) -> float | None:
        return _quotient(*(row["errors"].get(name, {}).get(result) for name in (OURS, PEER)))

    return _Figure(f"error of {result} / torchvision's", value)


def _host_microseconds(row: Row, direction: str, run: _Run) -> float | None:
    seconds: float | None = row.get("host_seconds", {}).get(direction, {}).get(OURS)
    return None if seconds is None else 1e6 * seconds


def _extra_memory(row: Row, direction: str) -> Mapping[str, int | None]:
    extra: Mapping[str, int | None] = row["peak_extra_bytes"].get(direction, {})
    return extra


def _share_of_floor(row: Row, direction: str, run: _Run) -> float | None:
    milliseconds, floor = _median(row, direction), floor_seconds(row, run.floors, direction)
    return floor / (1e-3 * milliseconds) if milliseconds and floor is not None else None


def _cost_of_determinism(row: Row, direction: str, run: _Run) -> float | None:
    fields = ("operation", "device", "shape", "N", "dtype", "products", "layout", "spread")
    for other in run.rows:
        if not other["deterministic"] and all(other[field] == row[field] for field in fields):
            return _quotient(_median(row, direction), _median(other, direction))
    return None


def _median(row: Row, direction: str) -> float | None:
    median: float | None = row["timings"].get(direction, {}).get(OURS, {}).get("median_ms")
    return median


def _quotient(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _kind(row: Row) -> str:
    """Return the dtype, with the precision of products if that is not the dtype's own."""
    return str(row["dtype"] if row["products"] == "ieee" else f"{row['dtype']}, {row['products']}")


def floor_seconds(row: Row, floors: Mapping[str, float], direction: str) -> float | None:
    """Return the least time that the products and memory traffic of a row can take; backward has two products."""
    if row["work"] is None or _kind(row) not in floors:
        return None
    operations, size = row["work"]
    factor = 1 if direction == "forward" else 2
    return float(max(factor * operations / floors[_kind(row)], factor * size / floors["memory"]))


_SPEEDUP, _TO_PLAIN = _ratio(PEER, OURS), _ratio(OURS, PLAIN)
_TO_COLUMNS = _Figure(
    "extra memory / column buffer",
    lambda row, way, run: _quotient(_extra_memory(row, way).get(OURS), row["column_bytes"]),
)
_TO_PEER = _Figure(
    "extra memory / torchvision's", lambda row, way, run: _quotient(*map(_extra_memory(row, way).get, (OURS, PEER)))
)
_OVER_GRID = _ratio(GRID, OURS)
_TO_GRID = _Figure(
    "extra memory / grid_sample's", lambda row, way, run: _quotient(*map(_extra_memory(row, way).get, (OURS, GRID)))
)
_FLOOR = _Figure("share of the floor", _share_of_floor)
_HOST = _Figure("CPU time, us", _host_microseconds)
_DETERMINISM = _Figure("deterministic / default", _cost_of_determinism)

_TF32 = "float32, tf32"
_CPU = {"device": "cpu", "kind": "float32", "N": 1}
_CPU_CONV = {**_CPU, "operation": "deform_conv2d", "groups": 1, "deformable_groups": 1}
_CPU_WEIGHT_GROUPS = {**_CPU_CONV, "shape": "256x50x84", "groups": 32}
_CPU_POOL = {
    **_CPU,
    "operation": "deform_roi_pool",
    "shape": ("256x50x84x512x7", "256x50x84x512x14", "1024x50x84x512x7", "1024x50x84x512x14"),
}
_CPU_LARGE = {**_CPU_CONV, "shape": ("128x100x168", "256x50x84", "512x50x84")}
_ENCODER, _DECODERS = "100x167x22223x4x4x4", ("100x167x300x4x4x4", "80x80x300x3x3x6")
_CPU_ENCODER = {**_CPU, "operation": "ms_deform_attn", "shape": _ENCODER}
_CPU_DECODERS = {**_CPU_ENCODER, "shape": _DECODERS}
_CPU_AGGREGATE = {**_CPU, "operation": "deform_aggregate"}
_GPU_ATTENTION = {"device": "cuda", "operation": "ms_deform_attn", "deterministic": False}
_GPU_ENCODER = {**_GPU_ATTENTION, "shape": _ENCODER}
_GPU_POOL = {"device": "cuda", "operation": "deform_roi_pool", "layout": "NCHW", "deterministic": False}
_GPU_ANY = {"device": "cuda", "operation": "deform_conv2d", "layout": "NCHW", "spread": 2.0}
_GPU = {**_GPU_ANY, "deterministic": False, "kind": ("float16", "bfloat16", _TF32, "float32")}
_GPU_LARGE = {**_GPU, "N": (8, 16)}

TABLE: tuple[tuple[Mapping[str, Any], str, _Figure, str, float], ...] = (
    # Fields of the row (a tuple lists alternatives), direction, figure, relation, limit.
    ({**_CPU_CONV, "shape": "128x100x168"}, "forward", _SPEEDUP, ">=", 6.0),
    ({**_CPU_CONV, "shape": ("256x50x84", "512x50x84")}, "forward", _SPEEDUP, ">=", 2.5),
    ({**_CPU_CONV, "shape": "64x56x56"}, "forward", _SPEEDUP, ">=", 6.0),
    ({**_CPU_CONV, "shape": "64x56x56"}, "backward", _SPEEDUP, ">=", 16.0),
    ({**_CPU_CONV, "shape": "256x14x14"}, "forward", _SPEEDUP, ">=", 3.5),
    ({**_CPU_CONV, "shape": "256x14x14"}, "backward", _SPEEDUP, ">=", 8.0),
    ({**_CPU_CONV, "shape": "512x25x42", "N": 8}, "forward", _SPEEDUP, ">=", 3.2),
    ({**_CPU_CONV, "shape": "512x25x42", "N": 8}, "backward", _SPEEDUP, ">=", 5.5),
    (_CPU_WEIGHT_GROUPS, "forward", _SPEEDUP, ">=", 12.0),
    (_CPU_WEIGHT_GROUPS, "backward", _SPEEDUP, ">=", 16.0),
    ({**_CPU_CONV, "deformable_groups": 8}, "forward", _SPEEDUP, ">=", 10.0),
    ({**_CPU_CONV, "deformable_groups": 8}, "backward", _SPEEDUP, ">=", 14.0),
    ({**_CPU_CONV, "deformable_groups": 16}, "forward", _SPEEDUP, ">=", 8.0),
    ({**_CPU_CONV, "deformable_groups": 16}, "backward", _SPEEDUP, ">=", 12.0),
    ({**_CPU_CONV, "deformable_groups": 128}, "forward", _SPEEDUP, ">=", 2.5),
    ({**_CPU_CONV, "deformable_groups": 128}, "backward", _SPEEDUP, ">=", 2.5),
    (_CPU_LARGE, "forward", _TO_PLAIN, "<=", 2.0),
    (_CPU_LARGE, "backward", _SPEEDUP, ">=", 7.0),
    (_CPU_LARGE, "backward", _TO_PLAIN, "<=", 2.5),
    (_CPU_LARGE, "forward", _TO_COLUMNS, "<=", 1 / 8),  # copies below 2 MiB contain all channels
    (_CPU_POOL, "forward", _SPEEDUP, ">=", 1.0),
    (_CPU_POOL, "backward", _SPEEDUP, ">=", 2.0),
    (_CPU_ENCODER, "forward", _OVER_GRID, ">=", 4.0),
    (_CPU_ENCODER, "backward", _OVER_GRID, ">=", 6.0),
    (_CPU_ENCODER, "forward", _TO_GRID, "<=", 0.1),
    (_CPU_ENCODER, "backward", _TO_GRID, "<=", 0.1),
    (_CPU_DECODERS, "forward", _OVER_GRID, ">=", 2.0),
    (_CPU_DECODERS, "backward", _OVER_GRID, ">=", 2.0),
    (_CPU_AGGREGATE, "forward", _OVER_GRID, ">=", 2.0),
    (_CPU_AGGREGATE, "backward", _OVER_GRID, ">=", 2.0),
    ({**_GPU_LARGE, "kind": "float16"}, "forward", _SPEEDUP, ">=", 4.0),
    ({**_GPU_LARGE, "kind": _TF32}, "forward", _SPEEDUP, ">=", 2.5),
    ({**_GPU_LARGE, "kind": "float32"}, "forward", _SPEEDUP, ">=", 1.3),
    ({**_GPU, "N": 1, "kind": "float16"}, "forward", _SPEEDUP, ">=", 2.0),
    (_GPU_LARGE, "backward", _SPEEDUP, ">=", 8.0),
    ({**_GPU, "N": 1}, "backward", _SPEEDUP, ">=", 5.0),
    (_GPU, "forward", _HOST, "<=", 45.0),
    ({**_GPU, "N": 1}, "backward", _HOST, "<=", 200.0),
    ({**_GPU, "N": 16, "kind": ("float16", "bfloat16")}, "forward", _TO_PLAIN, "<=", 2.0),
    ({**_GPU, "N": 16, "kind": "bfloat16"}, "forward", _FLOOR, ">=", 0.4),
    (_GPU, "forward", _TO_PEER, "<=", 1 / 8),
    (_GPU, "backward", _TO_PEER, "<=", 1 / 8),
    ({**_GPU, "kind": "float32"}, "", _error_ratio("output"), "<=", 1.0),
    ({**_GPU, "kind": "float32"}, "", _error_ratio("input"), "<=", 1.0),
    ({**_GPU, "kind": "float32"}, "", _error_ratio("weight"), "<=", 1.0),
    ({**_GPU_ANY, "deterministic": True}, "backward", _DETERMINISM, "<=", 1.3),
    (_GPU_POOL, "forward", _SPEEDUP, ">=", 1.0),
    (_GPU_POOL, "backward", _SPEEDUP, ">=", 3.0),
    (_GPU_ENCODER, "forward", _OVER_GRID, ">=", 3.0),
    (_GPU_ENCODER, "backward", _OVER_GRID, ">=", 4.0),
    (_GPU_ENCODER, "forward", _FLOOR, ">=", 1 / 1.5),
    (_GPU_ATTENTION, "forward", _HOST, "<=", 45.0),
    (_GPU_ATTENTION, "backward", _HOST, "<=", 200.0),
)

_FIRST_CALL_SECONDS = {"cold": {"forward": 2.0, "backward": 3.0}, "warm": {"forward": 1.0, "backward": 1.0}}
_MODEL_RATIO = 1.0
"""Largest time of a row of the benchmark of the model, in that of torchvision's operation."""


def evaluate(
    rows: Sequence[Row],
    first_call: Mapping[str, Mapping[str, Mapping[str, float]]],
    floors: Mapping[str, float] | None = None,
) -> list[Target]:
    """Return the targets that these results contain figures for.

    `rows` come from `benchmarks.measure`, `first_call` maps device, state and step to seconds, and `floors` are those
    of the GPU.
    """
    run = _Run(rows, floors or {})
    targets = [target for row in rows for target in _of_row(row, run)]
    for state, limits in _FIRST_CALL_SECONDS.items():
        if state in first_call.get("cpu", {}):
            steps = first_call["cpu"][state]
            targets.append(Target(f"first forward call {state}, s", steps["forward"], "<=", limits["forward"]))
            targets.append(Target(f"first backward call {state}, s", steps["backward"], "<=", limits["backward"]))
    return targets


def evaluate_model(rows: Sequence[Row]) -> list[Target]:
    """Return the targets of the rows of `benchmarks.model` in which both contenders were timed."""
    return [
        Target(f"Mask R-CNN, {row['title']}, {OURS} / {PEER}", row["ratio"], "<=", _MODEL_RATIO)
        for row in rows
        if row["ratio"] is not None
    ]


def _of_row(row: Row, run: _Run) -> Iterator[Target]:
    kind = _kind(row)
    fields = {**row, "kind": kind}
    name = f"{row['shape']}, batch {row['N']}, {row['data'] if row['device'] == 'cpu' else kind}"
    for conditions, direction, figure, relation, limit in TABLE:
        if all(_matches(fields[field], wanted) for field, wanted in conditions.items()):
            value = figure.value(row, direction, run)
            if value is not None:
                yield Target(f"{name} {direction}".rstrip() + f", {figure.name}", value, relation, limit)


def _matches(value: object, wanted: object) -> bool:
    return value in wanted if isinstance(wanted, tuple) else value == wanted
