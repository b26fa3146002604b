"""What every benchmarked operation is made of: cases, contenders, and an evaluation in float64 to hold them against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

OURS, PEER = "dcnops", "torchvision"
"""Names that results are reported under: this library, and the one it competes with."""

Arrays = Mapping[str, np.ndarray]
"""Arguments or results by name. Inputs are float32 arrays of values that the dtype of their case can hold."""


@dataclass(frozen=True)
class Case:
    """One row of a table."""

    device: str
    """cpu, cuda, or rehearsal: what a GPU would run, on a CPU."""
    shape: tuple[int, ...]
    """Sizes, of which the operation says what they are."""
    N: int = 1
    dtype: str = "float32"
    products: str = "ieee"
    """How float32 products are computed: ieee, tf32 or 3xtf32."""
    layout: str = "NCHW"
    """Order of the axes of images."""
    spread: float = 1.0
    """Standard deviation of offsets, in their unit."""
    deterministic: bool = False
    """Whether our gradients are."""

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
    forward, backward : function of a case and its arrays
        Prepare one direction; what they return is called to be timed. A backward call does not repeat the forward
        pass and returns the gradients by argument name. Results are NumPy or CuPy arrays or torch tensors.
    tolerance : float
        Largest accepted error, over the largest magnitude of the exact result.
    unchecked : names of results that the contender is known to compute in another way
    sees : function of the arrays
        The arrays that its results are exact for: a plain convolution knows no offsets.
    coordinates : str
        Dtype that it computes sampling coordinates in.
    """

    name: str
    forward: Callable[[Case, Arrays], Callable[[], Any]]
    backward: Callable[[Case, Arrays], Callable[[], Mapping[str, Any]]]
    tolerance: float
    unchecked: frozenset[str] = frozenset()
    sees: Callable[[Arrays], Arrays] = lambda arrays: arrays
    coordinates: str = "float32"


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation and what it is measured with; the module of the benchmark named like it holds it as `OPERATION`.

    Attributes
    ----------
    sizes : str
        What the numbers of a shape are.
    shapes : sequence of tuple, smallest first
    variants : mapping
        Device to what every shape is measured with, the most important first: further fields of a `Case`.
    per_image : names of the arguments and results whose first axis is the batch
    inputs : function of a case
        Arguments and `grad_out`, always the same for the same case; a batch begins with the image of a batch of one.
    contenders : function of a case
    evaluate : function of the arrays of a batch of one, the dtype of sampling coordinates and torch's device
        The output, as `output`, and the gradients in float64, by other means than any contender's.
    columns : names of all contenders, in the order of the table
    ratios : pairs of contenders whose times are compared
    with_memory : names of the contenders whose peak extra memory is measured
    column_bytes : function of a case
        Size of the buffer that explicit columns of one image need, where the operation has columns.
    work : function of a case
        Floating-point operations of the forward pass's products and bytes of its arguments and results, where there
        are products.
    """

    name: str
    sizes: str
    shapes: Sequence[tuple[int, ...]]
    variants: Mapping[str, Sequence[Mapping[str, Any]]]
    per_image: frozenset[str]
    inputs: Callable[[Case], Arrays]
    contenders: Callable[[Case], list[Contender]]
    evaluate: Callable[[Arrays, str, str], Arrays]
    columns: Sequence[str]
    ratios: Sequence[tuple[str, str]]
    with_memory: Sequence[str]
    column_bytes: Callable[[Case], int | None] = lambda case: None
    work: Callable[[Case], tuple[float, float] | None] = lambda case: None


def load(name: str) -> Operation:
    operation: Operation = import_module(f"benchmarks.{name}").OPERATION
    return operation
