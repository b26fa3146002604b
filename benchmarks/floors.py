"""Peak throughput of a device, measured in the same run: matrix products of each kind, and memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_KINDS = {
    "float16": ("float16", False),
    "bfloat16": ("bfloat16", False),
    "float32, tf32": ("float32", True),
    "float32": ("float32", False),
}
_ROUNDS = 7


def measure_floors(device: str, clock: Callable[[Callable[[], object]], float], size: int) -> dict[str, float]:
    """Return operations per second of products of square matrices with `size` rows, and bytes per second of a copy."""
    import torch

    found = {}
    for kind, (dtype, tf32) in _KINDS.items():
        torch.backends.cuda.matmul.allow_tf32 = tf32
        # Not zeros, which draw less power and run faster than real data.
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
        found[kind] = 2.0 * size**3 / _best(lambda a=a, b=b: a @ b, clock)
    source = torch.randn(16 * size, size, device=device)
    target = torch.empty_like(source)
    found["memory"] = 2.0 * source.nbytes / _best(lambda: target.copy_(source), clock)
    return found


def _best(call: Callable[[], object], clock: Callable[[Callable[[], object]], float]) -> float:
    call()
    return min(clock(call) for _ in range(_ROUNDS))


def floor_seconds(row: Mapping[str, Any], floors: Mapping[str, float], direction: str) -> float | None:
    """Return the least time that the products and memory traffic of a row can take; backward has two products."""
    kind = row["dtype"] if row["products"] == "ieee" else f"{row['dtype']}, {row['products']}"
    if row["work"] is None or kind not in floors:
        return None
    operations, size = row["work"]
    factor = 1 if direction == "forward" else 2
    return float(max(factor * operations / floors[kind], factor * size / floors["memory"]))
