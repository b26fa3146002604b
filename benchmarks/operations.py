"""Definitions of a case, a contender and a benchmarked operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

OURS, PEER, PLAIN, MODULATED, GRID = "dcnops", "torchvision", "conv2d", "dcnops modulated", "grid_sample"
"""Names of the contenders in tables and files.

`PLAIN` is the ordinary convolution that the deformable one extends. `MODULATED` is RoI pooling with offset and mask;
without them the operation is RoIAlign, which torchvision has too. `GRID` computes attention and aggregation with
PyTorch's `grid_sample`.
"""

Arrays = Mapping[str, np.ndarray]
"""Arguments or results by name. Inputs are float32 arrays of values that the dtype of their case can represent."""


@dataclass(frozen=True)
class Case:
    """One row of a table."""

    device: str
    """cpu, cuda, or rehearsal for emulated kernels on a CPU."""
    shape: tuple[int, ...]
    """Sizes, explained by `Operation.sizes`."""
    N: int = 1
    dtype: str = "float32"
    products: str = "ieee"
    """Precision of float32 products: ieee, tf32 or 3xtf32."""
    layout: str = "NCHW"
    spread: float = 1.0
    """Standard deviation of the offsets, in their unit."""
    deterministic: bool = False
    """Compute our gradients deterministically."""
    groups: int = 1
    """Weight groups of a convolution."""
    deformable_groups: int = 1

    @property
    def label(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def data(self) -> str:
        """Everything but shape, batch and device."""
        parts = [
            self.dtype,
            self.products if self.products != "ieee" else "",
            self.layout if self.layout != "NCHW" else "",
            f"spread {self.spread:g}" if self.spread != 1 else "",
            "deterministic" if self.deterministic else "",
            self.grouping,
        ]
        return ", ".join(filter(None, parts))

    @property
    def grouping(self) -> str:
        """Groups of a convolution, if there are several."""
        kinds = {"weight": self.groups, "deformable": self.deformable_groups}
        return ", ".join(f"{count} {kind} groups" for kind, count in kinds.items() if count != 1)

    @property
    def title(self) -> str:
        return f"{self.label}, batch {self.N}, {self.data}, {self.device}"


@dataclass(frozen=True)
class Contender:
    """One implementation."""

    name: str
    prepare: Callable[[Case, Arrays, str], Callable[[], Any]]
    """Return the call to time for a case, its arrays and a direction.

    A forward call returns the output. A backward call returns the gradients by argument name without repeating the
    forward pass. Results are NumPy or CuPy arrays or torch tensors.
    """
    tolerance: float
    """Largest accepted error, relative to the largest magnitude of the exact result."""
    unchecked: frozenset[str] = frozenset()
    """Names of results that the contender is known to compute differently."""
    effective_inputs: Callable[[Arrays], Arrays] = lambda arrays: arrays
    """Return the arrays that the results belong to: a plain convolution ignores offsets."""
    coordinates: str = "float32"
    """Dtype of the sampling coordinates."""


@dataclass(frozen=True, eq=False)
class Operation:
    """One benchmarked operation; the module of the same name holds it as `OPERATION`."""

    name: str
    sizes: str
    """Meaning of the numbers in a shape."""
    shapes: Sequence[tuple[int, ...]]
    gpu_variants: Sequence[Mapping[str, Any]]
    """Further fields of the cases on a GPU, the most important first; the CPU takes the defaults."""
    per_image: frozenset[str]
    """Names of the arguments and results with one item per image of the batch."""
    inputs: Callable[[Case], Arrays]
    """Return the arguments and `grad_out`, deterministically; a batch begins with the image of a batch of one."""
    contenders: Callable[[Case], list[Contender]]
    expected: Callable[[Arrays, str, str], Arrays]
    """Return `output` and the gradients of one image in float64, independently of every contender.

    Takes the arrays, the dtype of sampling coordinates and a torch device.
    """
    columns: Sequence[str]
    """Names of all contenders, in the order of the table."""
    other_cases: Sequence[Case] = ()
    """Cases on a CPU or GPU besides those of `shapes`."""
    column_bytes: Callable[[Case], int | None] = lambda case: None
    """Return the size of an im2col buffer of one image, if the operation has one."""
    work: Callable[[Case], tuple[float, float] | None] = lambda case: None
    """Return the floating-point operations of the forward products and the bytes of arguments and results, if any."""

    @property
    def ratios(self) -> list[tuple[str, str]]:
        """Pairs of contenders to compare."""
        return [pair for pair in ((PEER, OURS), (GRID, OURS), (OURS, PLAIN)) if set(pair) <= set(self.columns)]

    @property
    def with_memory(self) -> list[str]:
        """Contenders to measure the peak extra memory of."""
        return [name for name in self.columns if name != PLAIN]


def load(name: str) -> Operation:
    operation: Operation = import_module(f"benchmarks.{name}").OPERATION
    return operation
