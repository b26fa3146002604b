"""What every benchmarked operation is made of: cases, contenders, and an evaluation in float64 to hold them against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

__all__ = ["OURS", "PEER", "PLAIN", "Arrays", "Case", "Contender", "Operation"]

OURS, PEER, PLAIN = "dcnops", "torchvision", "conv2d"
"""Names that results are reported under: this library, the one it competes with, and the plain operation."""

Arrays = Mapping[str, np.ndarray]
"""Arguments or results by name. Inputs are float32 arrays of values that the dtype of their case can hold."""


@dataclass(frozen=True)
class Case:
    """One row of a table."""

    device: str
    """cpu or cuda."""
    C: int
    H: int
    W: int
    N: int = 1
    dtype: str = "float32"
    tf32: bool = False
    """Whether the peers may use TF32 in float32 products."""

    @property
    def precision(self) -> str:
        return f"{self.dtype}, peers in TF32" if self.tf32 else self.dtype

    @property
    def title(self) -> str:
        return f"{self.C}x{self.H}x{self.W}, batch {self.N}, {self.precision}, {self.device}"

    def resized(self, C: int, H: int, W: int) -> Case:
        return replace(self, C=C, H=H, W=W)


@dataclass(frozen=True)
class Contender:
    """One implementation.

    Attributes
    ----------
    forward, backward : function of a case and its arrays
        Prepare one direction; what they return is called to be timed. A backward call does not repeat the forward
        pass and returns the gradients by argument name.
    to_numpy : function
        Brings a result to the CPU, float32 or wider.
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
    to_numpy: Callable[[Any], np.ndarray]
    tolerance: float
    unchecked: frozenset[str] = frozenset()
    sees: Callable[[Arrays], Arrays] = lambda arrays: arrays
    coordinates: str = "float32"


@dataclass(frozen=True)
class Operation:
    """One operation and what it is measured with; a module of the benchmark holds it as `OPERATION`.

    Attributes
    ----------
    module : str
        Where it is, so that a fresh process finds it.
    shapes : sequence of (C, H, W), smallest first
    per_image : names of the arguments and results whose first axis is the batch
    inputs : function of a case
        Arguments and `grad_out`, always the same for the same case; a batch begins with the image of a batch of one.
    contenders : function of a case
    evaluate : function of the arrays of a batch of one and the dtype of sampling coordinates
        The output, as `output`, and the gradients in float64, by other means than any contender's.
    column_bytes : function of a case
        Size of the buffer that explicit columns of one image need.
    """

    name: str
    module: str
    shapes: Sequence[tuple[int, int, int]]
    per_image: frozenset[str]
    inputs: Callable[[Case], Arrays]
    contenders: Callable[[Case], list[Contender]]
    evaluate: Callable[[Arrays, str], Arrays]
    column_bytes: Callable[[Case], int]
