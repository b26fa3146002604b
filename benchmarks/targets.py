"""What the library has set itself to reach, and whether a run reached it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.contenders import OURS, PEER, PLAIN

__all__ = ["Target", "evaluate"]

Results = Sequence[Mapping[str, Any]]

_SHAPES = {(64, 56, 56), (128, 100, 168), (256, 50, 84), (512, 50, 84)}
_LARGER = _SHAPES - {(64, 56, 56)}
_FASTER_FORWARD = {(128, 100, 168): 6.0}


@dataclass(frozen=True)
class Target:
    """One figure and its limit; `relation` is ">=" or "<="."""

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
        return f"{verdict:6}  {self.name}: {self.value:.3g} (to be {self.relation} {self.limit:g})"


def evaluate(results: Results, first_call: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[Target]:
    """The targets that these results say something about.

    Parameters
    ----------
    results : sequence of mapping
        Rows of the report, see `benchmarks.__main__`.
    first_call : mapping
        Device to state (cold, warm) to step to seconds.
    """
    targets = [target for row in results for target in _of_row(row)]
    for state, limit in (("cold", 15.0), ("warm", 1.0)):
        if state in first_call.get("cpu", {}):
            steps = first_call["cpu"][state]
            seconds = steps["import"] + steps["forward"]
            targets.append(Target(f"first call {state}, import and forward, s", seconds, "<=", limit))
            targets.append(Target(f"first backward call {state}, s", steps["backward"], "<=", limit))
    return targets


def _of_row(row: Mapping[str, Any]) -> Iterator[Target]:
    shape = (row["C"], row["H"], row["W"])
    measured = (row["operation"], row["device"], row["dtype"], row["N"])
    if measured != ("deform_conv2d", "cpu", "float32", 1) or shape not in _SHAPES:
        return
    at = "x".join(map(str, shape))
    faster = {"forward": _FASTER_FORWARD.get(shape, 2.5), "backward": 7.0}
    for direction, plain_limit in (("forward", 2.0), ("backward", 2.5)):
        ratios = row["ratios"].get(direction, {})
        if f"{PEER}/{OURS}" in ratios:
            yield Target(f"{at} {direction}, {PEER} / {OURS}", ratios[f"{PEER}/{OURS}"], ">=", faster[direction])
        if f"{OURS}/{PLAIN}" in ratios and shape in _LARGER:
            yield Target(f"{at} {direction}, {OURS} / {PLAIN}", ratios[f"{OURS}/{PLAIN}"], "<=", plain_limit)
    extra = row["peak_extra_bytes"].get("forward", {}).get(OURS)
    if extra is not None:
        name = f"{at} forward, extra memory / column buffer"
        yield Target(name, extra / row["column_bytes"], "<=", 1 / 8)
