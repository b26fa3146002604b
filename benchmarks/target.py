"""A figure and the limit that it is to keep."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


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
