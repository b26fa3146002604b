"""What the library has set itself to reach on a GPU, from the rows of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.contenders import OURS, PEER
from benchmarks.deform_conv2d import PLAIN
from benchmarks.floors import floor_seconds
from benchmarks.target import Target

Row = Mapping[str, Any]

# Data to the least torchvision / dcnops of a forward pass, at batches of 8 and 16.
_FORWARD = {"float16": 4.0, "float32, tf32": 2.5, "float32": 1.3}
_TYPICAL_SPREAD = 2.0


def gpu_targets(rows: Sequence[Row], floors: Mapping[str, float]) -> Iterator[Target]:
    """The targets that these rows say something about.

    Parameters
    ----------
    rows : sequence of mapping
        Rows of the report, see `benchmarks.measure`.
    floors : mapping
        What the device can do at best, see `benchmarks.floors`.
    """
    for row in rows:
        if row["device"] != "cuda":
            continue
        if row["operation"] == "deform_roi_pool":
            yield from _of_pooling(row)
        elif row["spread"] == _TYPICAL_SPREAD and row["layout"] == "NCHW":
            if row["deterministic"]:
                yield from _of_determinism(row, rows)
            else:
                yield from _of_convolution(row, floors)


def _of_convolution(row: Row, floors: Mapping[str, float]) -> Iterator[Target]:
    kind = "float32, tf32" if row["products"] == "tf32" else row["dtype"]
    name = f"{row['shape']}, batch {row['N']}, {kind}"
    forward, backward = (row["ratios"].get(direction, {}) for direction in ("forward", "backward"))
    faster, beside_plain = f"{PEER}/{OURS}", f"{OURS}/{PLAIN}"
    large = row["N"] in (8, 16)
    if row["products"] == "3xtf32":
        return
    if faster in forward and kind in _FORWARD and (large or (row["N"] == 1 and kind == "float16")):
        limit = _FORWARD[kind] if large else 2.0
        yield Target(f"{name} forward, {faster}", forward[faster], ">=", limit)
    if faster in backward and row["N"] in (1, 8, 16):
        yield Target(f"{name} backward, {faster}", backward[faster], ">=", 8.0 if large else 5.0)
    if beside_plain in forward and row["N"] == 16 and kind in ("float16", "bfloat16"):
        yield Target(f"{name} forward, {beside_plain}", forward[beside_plain], "<=", 2.0)
    ours = row["timings"].get("forward", {}).get(OURS)
    floor = floor_seconds(row, floors, "forward")
    if ours and floor is not None and row["N"] == 16 and kind == "bfloat16":
        yield Target(f"{name} forward, share of the floor", floor / (1e-3 * ours["median_ms"]), ">=", 0.4)
    for direction, extra in row["peak_extra_bytes"].items():
        if extra.get(PEER) and extra.get(OURS) is not None:
            yield Target(f"{name} {direction}, extra memory / torchvision's", extra[OURS] / extra[PEER], "<=", 1 / 8)
    if kind == "float32" and {OURS, PEER} <= set(row["errors"]):
        for result in ("output", "input", "weight"):
            ours_error, theirs = (row["errors"][who].get(result) for who in (OURS, PEER))
            if ours_error is not None and theirs:
                yield Target(f"{name}, error of {result} / torchvision's", ours_error / theirs, "<=", 1.0)


def _of_determinism(row: Row, rows: Sequence[Row]) -> Iterator[Target]:
    same = ("operation", "device", "shape", "N", "dtype", "products", "layout", "spread")
    others = [other for other in rows if not other["deterministic"] and all(other[key] == row[key] for key in same)]
    for other in others:
        medians = [r["timings"].get("backward", {}).get(OURS, {}).get("median_ms") for r in (row, other)]
        if None not in medians:
            name = f"{row['shape']}, batch {row['N']}, {row['dtype']} backward, deterministic / default"
            yield Target(name, medians[0] / medians[1], "<=", 1.3)


def _of_pooling(row: Row) -> Iterator[Target]:
    if row["layout"] != "NCHW" or row["deterministic"]:
        return
    for direction, limit in (("forward", 1.0), ("backward", 3.0)):
        ratio = row["ratios"].get(direction, {}).get(f"{PEER}/{OURS}")
        if ratio is not None:
            yield Target(f"{row['shape']}, {row['dtype']} {direction}, {PEER} / {OURS}", ratio, ">=", limit)
