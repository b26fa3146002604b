"""Vocabulary of the benchmark: a case, a contender, and an operation with everything that it is measured with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

OURS, PEER, PLAIN, MODULATED = "dcnops", "torchvision", "conv2d", "dcnops modulated"
"""Names of the contenders in tables and files.

`PLAIN` is the ordinary convolution that the deformable one extends. `MODULATED` is RoI pooling with offset and mask;
without them the operation is RoIAlign, which torchvision has too.
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
        ]
        return ", ".join(filter(None, parts))

    @property
    def title(self) -> str:
        return f"{self.label}, batch {self.N}, {self.data}, {self.device}"


@dataclass(frozen=True)
class Contender:
    """One implementation.

    Attributes
    ----------
    prepare : function of a case, its arrays and a direction
        Return the call to time. A forward call returns the output. A backward call returns the gradients by argument
        name without repeating the forward pass. Results are NumPy or CuPy arrays or torch tensors.
    tolerance : float
        Largest accepted error, relative to the largest magnitude of the exact result.
    unchecked : names of results that the contender is known to compute differently
    sees : function of the arrays
        Return the arrays that the contender's results are exact for: a plain convolution ignores offsets.
    coordinates : str
        Dtype in which the contender computes sampling coordinates.
    """

    name: str
    prepare: Callable[[Case, Arrays, str], Callable[[], Any]]
    tolerance: float
    unchecked: frozenset[str] = frozenset()
    sees: Callable[[Arrays], Arrays] = lambda arrays: arrays
    coordinates: str = "float32"


@dataclass(frozen=True, eq=False)
class Operation:
    """One benchmarked operation; the module of the same name holds it as `OPERATION`.

    Attributes
    ----------
    sizes : str
        Meaning of the numbers in a shape.
    shapes : sequence of tuple, smallest first
    variants : mapping
        By device, the further fields of a `Case` that every shape is measured with, the most important first.
    per_image : names of the arguments and results whose first axis is the batch
    inputs : function of a case
        Return the arguments and `grad_out`. The result is deterministic, and a batch begins with the image of a batch
        of one.
    contenders : function of a case
    expected : function of the arrays of a batch of one, the dtype of sampling coordinates and a torch device
        Return the output, as `output`, and the gradients, computed in float64 independently of every contender.
    columns : names of all contenders, in the order of the table
    ratios : pairs of contenders to compare
    with_memory : names of the contenders to measure the peak extra memory of
    column_bytes : function of a case
        Return the size of an im2col buffer of one image, if the operation has one.
    work : function of a case
        Return the floating-point operations of the forward products and the bytes of arguments and results, if there
        are products.
    """

    name: str
    sizes: str
    shapes: Sequence[tuple[int, ...]]
    variants: Mapping[str, Sequence[Mapping[str, Any]]]
    per_image: frozenset[str]
    inputs: Callable[[Case], Arrays]
    contenders: Callable[[Case], list[Contender]]
    expected: Callable[[Arrays, str, str], Arrays]
    columns: Sequence[str]
    ratios: Sequence[tuple[str, str]]
    with_memory: Sequence[str]
    column_bytes: Callable[[Case], int | None] = lambda case: None
    work: Callable[[Case], tuple[float, float] | None] = lambda case: None


def load(name: str) -> Operation:
    operation: Operation = import_module(f"benchmarks.{name}").OPERATION
    return operation
