"""Overhead of the PyTorch adapter over the array functions: `python -m benchmarks.adapter_overhead`."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from dcnops.adapters.torch import deform_conv2d

import dcnops

_NAMES = ("input", "offset", "weight", "bias", "mask")


def measure(rounds: int = 1000) -> dict[str, float]:
    """Return the median microseconds of each kind of call on a tiny problem, timed in turn."""
    random = np.random.default_rng(0)
    shapes = ((1, 4, 5, 6), (1, 18, 5, 6), (4, 4, 3, 3), (4,), (1, 9, 5, 6))
    arrays = {name: random.standard_normal(shape, np.float32) for name, shape in zip(_NAMES, shapes)}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    grad_out = random.standard_normal((1, 4, 5, 6), np.float32)
    grad_tensor = torch.from_numpy(grad_out)

    def array_forward() -> object:
        return dcnops.deform_conv2d(**arrays, padding=1)

    def array_both() -> object:
        return array_forward(), dcnops.deform_conv2d_backward(grad_out, **arrays, padding=1)

    def adapter_both() -> object:
        output = deform_conv2d(**leaves, padding=1)
        return torch.autograd.grad(output, list(leaves.values()), grad_tensor)

    calls: dict[str, Callable[[], object]] = {
        "arrays, forward": array_forward,
        "adapter, forward": lambda: deform_conv2d(**tensors, padding=1),
        "adapter, forward, recording gradients": lambda: deform_conv2d(**leaves, padding=1),
        "arrays, forward and backward": array_both,
        "adapter, forward and backward": adapter_both,
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: 1e6 * median(values[rounds // 10 :]) for name, values in times.items()}


if __name__ == "__main__":
    measured = measure()
    forward, both = measured["arrays, forward"], measured["arrays, forward and backward"]
    for name, microseconds in measured.items():
        base = both if "backward" in name else forward
        print(f"{name:40} {microseconds:7.0f} us  {microseconds - base:+6.0f} us")
