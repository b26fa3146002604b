"""History of a run: the losses and metrics of each epoch as lines of JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError, cannot_write
from ..json_files import is_finite, replace_text
from .distributed import gather_lists, is_main
from .evaluation import SUMMARY, Kind, Metrics

Entry = dict[str, Any]


class History:
    """Losses and metrics by epoch, equal in all processes; the main process writes them to a file.

    An entry has ``iteration``, ``epoch``, ``lr`` (of its last iteration), ``losses`` (means over the iterations of the
    epoch) and ``metrics`` (by kind and name, null without ground truth), which is null without an evaluation.

    Parameters
    ----------
    path : Path
    kind : str
        The average precision that counts: ``bbox`` or ``segm``.
    per_epoch : int
        Iterations per epoch.
    """

    def __init__(self, path: Path, kind: Kind, per_epoch: int) -> None:
        self._path = path
        self._kind = kind
        self._per_epoch = per_epoch
        self._entries: list[Entry] = []
        self._sums: dict[str, float] = {}  # of the losses in this epoch
        self._count = 0
        self._lr = 0.0

    def add(self, done: int, losses: Mapping[str, float], lr: float) -> None:
        """Add the losses of iteration number `done`, counted from 1."""
        if (done - 1) % self._per_epoch == 0:
            self._sums, self._count = {}, 0
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1
        self._lr = lr

    def record(self, done: int, metrics: Metrics | None) -> None:
        """Write the line of an epoch that ends with iteration `done`; `metrics` are those of the main process.

        Every process must call it.
        """
        values = None
        if metrics:
            values = {
                kind: {name: _null(getattr(scores, name)) for name in SUMMARY} for kind, scores in metrics.items()
            }
        entry = {
            "iteration": done,
            "epoch": done // self._per_epoch,
            "lr": self._lr,
            "losses": {name: total / self._count for name, total in self._sums.items()},
            "metrics": values,
        }
        self._entries = [item for item in self._entries if item["iteration"] < done]
        self._entries += gather_lists([entry] if is_main() else [])
        self._write()

    def entry(self, done: int) -> Entry | None:
        """Return the entry of an iteration if there is one."""
        return next((item for item in self._entries if item["iteration"] == done), None)

    def improved(self, metrics: Metrics) -> bool:
        """Return True if the average precision of an evaluation is better than all recorded ones."""
        value = metrics[self._kind].AP
        return all(value > other for other in [-1.0, *self._values()])

    def without_improvement(self) -> int:
        """Return the number of evaluations since the best."""
        values = self._values()
        return len(values) - 1 - values.index(max(values)) if values else 0

    def best(self) -> tuple[float, int]:
        """Return the best average precision and its epoch."""
        evaluated = [item for item in self._entries if item["metrics"]]
        values = self._values()
        return max(values), evaluated[values.index(max(values))]["epoch"]

    def state(self) -> dict[str, Any]:
        """Return the losses of the unfinished epoch, which a checkpoint holds."""
        return {"sums": dict(self._sums), "count": self._count, "lr": self._lr}

    def restore(self, state: Mapping[str, Any], done: int) -> None:
        """Restore the history of the first `done` iterations from the file and the result of `state`."""
        self._sums, self._count, self._lr = dict(state["sums"]), state["count"], state["lr"]
        if not all(map(is_finite, (*self._sums.values(), self._count, self._lr))):
            raise ValueError("the losses are wrong")
        entries = gather_lists(self._read() if is_main() else [])
        self._entries = [item for item in entries if item["iteration"] <= done]
        self._write()

    def clear(self) -> None:
        """Remove the lines of an earlier run."""
        self._write()

    def _values(self) -> list[float]:
        values = [item["metrics"][self._kind]["AP"] for item in self._entries if item["metrics"]]
        return [-1.0 if value is None else value for value in values]

    def _read(self) -> list[Entry]:
        try:
            lines = self._path.read_text("utf-8").splitlines()
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self._path}: cannot be read ({error})") from None
        entries = []
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                numbers = [entry["iteration"], entry["epoch"]]
                if entry["metrics"]:
                    numbers.append(entry["metrics"][self._kind]["AP"] or 0)
            except (ValueError, LookupError, TypeError, RecursionError):
                numbers = [None]
            if not all(map(is_finite, numbers)):
                raise UserError(f"{self._path}: line {number} is not one of this program; remove the file to go on")
            entries.append(entry)
        return entries

    def _write(self) -> None:
        if not is_main():
            return
        try:
            replace_text(self._path, "".join(f"{json.dumps(item, allow_nan=False)}\n" for item in self._entries))
        except OSError as error:
            raise cannot_write(self._path, error) from None


def _null(value: float) -> float | None:
    return None if math.isnan(value) else value
