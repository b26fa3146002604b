"""Overhead of the PyTorch adapter over the array functions: `python -m benchmarks.adapter_overhead`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import dcnops
from benchmarks import environment
from benchmarks.measure import Meter, time_in_turn
from benchmarks.report import write_json
from dcnops.adapters.torch import deform_conv2d


def measure(rounds: int = 1000) -> dict[str, float]:
    """Return the median microseconds of each kind of call on a tiny problem, timed in turn."""
    random = np.random.default_rng(0)
    shapes = {
        "input": (1, 4, 5, 6),
        "offset": (1, 18, 5, 6),
        "weight": (4, 4, 3, 3),
        "bias": (4,),
        "mask": (1, 9, 5, 6),
    }
    arrays = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    grad_out = random.standard_normal((1, 4, 5, 6), np.float32)
    grad_tensor = torch.from_numpy(grad_out)

    def array_forward() -> object:
        return dcnops.deform_conv2d(**arrays, padding=1)

    def adapter_both() -> object:
        return torch.autograd.grad(deform_conv2d(**leaves, padding=1), list(leaves.values()), grad_tensor)

    calls: dict[str, Callable[[], object]] = {
        "arrays, forward": array_forward,
        "adapter, forward": lambda: deform_conv2d(**tensors, padding=1),
        "adapter, forward, recording gradients": lambda: deform_conv2d(**leaves, padding=1),
        "arrays, forward and backward": lambda: (
            array_forward(),
            dcnops.deform_conv2d_backward(grad_out, **arrays, padding=1),
        ),
        "adapter, forward and backward": adapter_both,
    }

    timings = time_in_turn(calls, Meter().clock, seconds=float("inf"), most_rounds=rounds)
    return {name: 1e3 * timing["median_ms"] for name, timing in timings.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.adapter_overhead", description=__doc__.partition(":")[0]
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    output = parser.parse_args().output
    measured = measure()
    for name, microseconds in measured.items():
        base = measured["arrays, forward and backward" if "backward" in name else "arrays, forward"]
        print(f"{name:40} {microseconds:7.0f} us  {microseconds - base:+6.0f} us")
    if output:
        described = environment.describe(environment.usable_cores(), gpu=False)
        write_json(output, {"environment": described, "median_microseconds": measured})
    return 0


if __name__ == "__main__":
    sys.exit(main())
