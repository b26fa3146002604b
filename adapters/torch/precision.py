"""Arithmetic of float32 convolutions on a GPU: who chooses it, and when."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dcnops._arguments import check_precision

AT_RUN_TIME = "default"
"""Precision of an operator in a compiled graph: torch's switch is read when the graph runs, as by torch's own
convolutions."""

_chosen: str | None = None


class set_float32_precision:  # lower case like torch.set_grad_enabled
    """Set the precision of float32 convolutions on a GPU for all calls that do not name one.

    Call it to change the setting of the process, or use it as a context manager. It covers the backward passes of the
    convolutions that were computed under it.

    Parameters
    ----------
    precision : "ieee", "tf32", "3xtf32" or None
        None follows torch's switch for convolutions, see `deform_conv2d`.

    Raises
    ------
    ArgumentError
        `precision` is something else.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch import DeformConv2d, set_float32_precision
    >>> layer, image = DeformConv2d(4, 8, kernel_size=3, padding=1), torch.randn(1, 4, 5, 6)
    >>> with set_float32_precision("ieee"):  # no TF32 within
    ...     output = layer(image, torch.zeros(1, 18, 5, 6))
    """

    def __init__(self, precision: str | None) -> None:
        global _chosen
        check_precision(precision)
        self._before = _chosen
        _chosen = precision

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        global _chosen
        _chosen = self._before


def operator_precision(precision: str | None, input: Tensor) -> str:
    """Return the precision to pass to the operator: "ieee" unless `input` is float32 on a GPU."""
    if input.device.type != "cuda" or input.dtype != torch.float32:
        return "ieee"
    if precision is None:
        precision = _chosen
    if precision is not None:
        return precision
    return AT_RUN_TIME if torch.compiler.is_compiling() else convolution_precision()


def precision_now(precision: str) -> str:
    """Return the precision of a call of an operator."""
    return convolution_precision() if precision == AT_RUN_TIME else precision


def convolution_precision() -> str:
    """Return the precision of torch's own float32 convolutions on a GPU: "tf32", unless the user says otherwise."""
    cudnn = torch.backends.cudnn
    # torch 2.9 added a switch for convolutions alone. Reading the old one may raise an error after it has been set.
    tf32 = cudnn.conv.fp32_precision == "tf32" if hasattr(cudnn, "conv") else cudnn.allow_tf32
    return "tf32" if tf32 else "ieee"
