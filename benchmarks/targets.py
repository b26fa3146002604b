"""What the library has set itself to reach, and whether a run reached it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.contenders import OURS, PEER
from benchmarks.deform_conv2d import PLAIN
from benchmarks.gpu_targets import gpu_targets
from benchmarks.target import Target

Results = Sequence[Mapping[str, Any]]

# By operation and shape: least torchvision / dcnops, forward and backward; most dcnops / conv2d, forward and backward;
# most extra memory / column buffer, forward.
_FASTER = {
    "deform_conv2d": {
        "64x56x56": (2.5, 7.0),
        "128x100x168": (6.0, 7.0),
        "256x50x84": (2.5, 7.0),
        "512x50x84": (2.5, 7.0),
    },
    "deform_roi_pool": {
        "256x50x84x512x7": (1.0, 2.0),
        "256x50x84x512x14": (1.0, 2.0),
        "1024x50x84x512x7": (1.0, 2.0),
        "1024x50x84x512x14": (1.0, 2.0),
    },
}
_BESIDE_PLAIN = {"deform_conv2d": dict.fromkeys(("128x100x168", "256x50x84", "512x50x84"), (2.0, 2.5))}
_MEMORY = {"deform_conv2d": dict.fromkeys(_FASTER["deform_conv2d"], 1 / 8)}


def evaluate(
    results: Results,
    first_call: Mapping[str, Mapping[str, Mapping[str, float]]],
    floors: Mapping[str, float] | None = None,
) -> list[Target]:
    """The targets that these results say something about.

    Parameters
    ----------
    results : sequence of mapping
        Rows of the report, see `benchmarks.measure`.
    first_call : mapping
        Device to state (cold, warm) to step to seconds.
    floors : mapping, optional
        What the GPU can do at best, see `benchmarks.floors`.
    """
    targets = [target for row in results for target in _of_row(row)]
    targets += gpu_targets(results, floors or {})
    for state, limit in (("cold", 15.0), ("warm", 1.0)):
        if state in first_call.get("cpu", {}):
            steps = first_call["cpu"][state]
            seconds = steps["import"] + steps["forward"]
            targets.append(Target(f"first call {state}, import and forward, s", seconds, "<=", limit))
            targets.append(Target(f"first backward call {state}, s", steps["backward"], "<=", limit))
    return targets


def _of_row(row: Mapping[str, Any]) -> Iterator[Target]:
    if (row["device"], row["dtype"], row["N"]) != ("cpu", "float32", 1):
        return
    operation, shape = row["operation"], row["shape"]
    for i, direction in enumerate(("forward", "backward")):
        ratios = row["ratios"].get(direction, {})
        for a, b, relation, limits in ((PEER, OURS, ">=", _FASTER), (OURS, PLAIN, "<=", _BESIDE_PLAIN)):
            limit = limits.get(operation, {}).get(shape)
            if limit and f"{a}/{b}" in ratios:
                yield Target(f"{shape} {direction}, {a} / {b}", ratios[f"{a}/{b}"], relation, limit[i])
    most = _MEMORY.get(operation, {}).get(shape)
    extra = row["peak_extra_bytes"].get("forward", {}).get(OURS)
    if most and extra is not None:
        yield Target(f"{shape} forward, extra memory / column buffer", extra / row["column_bytes"], "<=", most)
