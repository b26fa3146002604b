"""Duration of the very first call in a fresh process: with nothing compiled, and with compiled code on disk."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks.environment import run_module

OPERATION = "deform_conv2d"


def first_call_seconds(device: str) -> dict[str, dict[str, float]]:
    """Return the seconds of `import`, `forward` and `backward` in float32, cold and warm, as medians."""
    rounds = [_first_calls(device) for _ in range(1 if device == "cuda" else 5)]
    return {
        state: {part: statistics.median(each[state][part] for each in rounds) for part in rounds[0][state]}
        for state in rounds[0]
    }


def _first_calls(device: str) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory(prefix="dcnops-cache-") as cache:
        variables = {"NUMBA_CACHE_DIR": cache, "CUPY_CACHE_DIR": cache}
        return {state: run_module("benchmarks.first_call", device, variables=variables) for state in ("cold", "warm")}


def _measure(device: str) -> dict[str, float]:
    C, H, W = 64, 56, 56
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "input": (1, C, H, W),
        "offset": (1, 18, H, W),
        "weight": (C, C, 3, 3),
        "bias": (C,),
        "mask": (1, 9, H, W),
    }
    arrays: dict[str, Any] = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    if device == "cuda":
        import cupy

        arrays = {name: cupy.asarray(array) for name, array in arrays.items()}

    def synchronized_time() -> float:
        if device == "cuda":
            cupy.cuda.runtime.deviceSynchronize()
        return time.perf_counter()

    times = [synchronized_time()]
    import dcnops

    times.append(synchronized_time())
    output = dcnops.deform_conv2d(**arrays, padding=1)
    times.append(synchronized_time())
    dcnops.deform_conv2d_backward(output, **arrays, padding=1)
    times.append(synchronized_time())
    return dict(zip(("import", "forward", "backward"), np.diff(times).tolist(), strict=True))


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1])))
