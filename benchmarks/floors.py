"""What a device can do at best, measured in the same run: products of each kind, and memory."""

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
    """Operations per second of a product of large square matrices of each kind, bytes per second of a large copy.

    Parameters
    ----------
    device : str
        Where torch computes.
    clock : function of a call
        Seconds that it takes.
    size : int
        Rows of the matrices.
    """
    import torch

    found = {}
    for kind, (dtype, tf32) in _KINDS.items():
        torch.backends.cuda.matmul.allow_tf32 = tf32
        # Random numbers: zeros draw less power and run faster than real data.
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
    """The least time that a row's products and its traffic with memory can take; backward has two products."""
    kind = f"{row['dtype']}, tf32" if row["products"] == "tf32" else row["dtype"]
    if row["work"] is None or kind not in floors:
        return None
    operations, size = row["work"]
    factor = 1 if direction == "forward" else 2
    return float(max(factor * operations / floors[kind], factor * size / floors["memory"]))
