"""Output of results as Markdown tables and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.operations import Operation


def tables(rows: Sequence[Mapping[str, Any]], operations: Iterable[Operation]) -> str:
    """Return one table for each operation, device, batch and direction."""
    parts = []
    for operation in operations:
        ordered = sorted((row for row in rows if row["operation"] == operation.name), key=_table_of)
        for (device, N), group in groupby(ordered, key=_table_of):
            members = list(group)
            for direction in ("forward", "backward"):
                if any(direction in row["timings"] for row in members):
                    figures = "median ms, extra memory in MiB"
                    if device != "cpu":
                        figures += ", CPU time to enqueue a call in us, our launches as kernels+products+fills"
                    title = f"{operation.name} {direction}, {device}, batch {N}: {figures}"
                    parts.append(f"{title}\n\n{_table(operation, members, direction)}\n")
    return "\n".join(parts)


def first_call_table(first_call: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    lines = [["first call, s", "import", "first forward", "first backward"]]
    for device, states in first_call.items():
        for state, steps in states.items():
            lines.append([f"{device}, {state}", *(f"{steps[step]:.2f}" for step in ("import", "forward", "backward"))])
    return markdown(lines)


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Write one line per key, and one per element of a list of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [f"{json.dumps(name)}: {_lines(value)}" for name, value in report.items()]
    # A rename is atomic: a reader never sees half a file, even after an interruption.
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text("{\n" + ",\n".join(entries) + "\n}\n")
    unfinished.replace(path)


def _lines(value: Any) -> str:
    if isinstance(value, list) and any(isinstance(element, Mapping) for element in value):
        return "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"
    return json.dumps(value)


def _table_of(row: Mapping[str, Any]) -> tuple[str, int]:
    return row["device"], row["N"]


def _table(operation: Operation, rows: Sequence[Mapping[str, Any]], direction: str) -> str:
    titles = [f"{a} / {b}" for a, b in operation.ratios] + [f"{name} extra" for name in operation.with_memory]
    lines = [[operation.sizes, "data", *operation.columns, *titles, "column buffer"]]
    # On a CPU, the time of the CPU is the time.
    is_asynchronous = rows[0]["device"] != "cpu"
    if is_asynchronous:
        lines[0] += [*(f"{name} host" for name in operation.columns), "launches"]
    for row in rows:
        timings, ratios = row["timings"].get(direction, {}), row["ratios"].get(direction, {})
        extra = row["peak_extra_bytes"].get(direction, {})
        figures = [timings.get(name, {}).get("median_ms") for name in operation.columns]
        figures += [ratios.get(f"{a}/{b}") for a, b in operation.ratios]
        sizes = [*(extra.get(name) for name in operation.with_memory), row["column_bytes"]]
        line = [row["shape"], row["data"], *map(_number, figures), *map(_mebibytes, sizes)]
        if is_asynchronous:
            seconds = map(row["host_seconds"].get(direction, {}).get, operation.columns)
            line += (_number(None if value is None else 1e6 * value) for value in seconds)
            line.append("+".join(map(str, row["launches"].get(direction, {}).values())) or "-")
        lines.append(line)
    return markdown(lines)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.1f}"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return the lines as a Markdown table; the first one is the header."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = [[cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    rule = [f"{'-' * (width - 1)}:" for width in widths]
    return "\n".join(f"| {' | '.join(line)} |" for line in [padded[0], rule, *padded[1:]])
