"""What the very first call costs, in fresh processes: with nothing compiled, then with what the first left on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

OPERATION = "deform_conv2d"


def first_call_seconds(device: str) -> dict[str, dict[str, float]]:
    """Seconds of `import`, `forward` and `backward`, cold and warm, of the operation in float32."""
    with tempfile.TemporaryDirectory(prefix="dcnops-cache-") as cache:
        environment = {**os.environ, "NUMBA_CACHE_DIR": cache, "CUPY_CACHE_DIR": cache}
        return {state: _in_fresh_process(device, environment) for state in ("cold", "warm")}


def _in_fresh_process(device: str, environment: dict[str, str]) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.first_call", device]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    seconds: dict[str, float] = json.loads(done.stdout)
    return seconds


def _main() -> None:
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
    synchronize = None
    if sys.argv[1] == "cuda":
        import cupy

        arrays = {name: cupy.asarray(array) for name, array in arrays.items()}
        synchronize = cupy.cuda.runtime.deviceSynchronize
        synchronize()

    times = [time.perf_counter()]
    import dcnops

    times.append(time.perf_counter())
    output = dcnops.deform_conv2d(**arrays, padding=1)
    if synchronize:
        synchronize()
    times.append(time.perf_counter())
    dcnops.deform_conv2d_backward(output, **arrays, padding=1)
    if synchronize:
        synchronize()
    times.append(time.perf_counter())
    steps = ("import", "forward", "backward")
    print(json.dumps(dict(zip(steps, np.diff(times).tolist(), strict=True))))


if __name__ == "__main__":
    _main()
