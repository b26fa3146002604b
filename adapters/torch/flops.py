"""Formulas for `torch.utils.flop_counter.FlopCounterMode`.

As for regular convolutions, only the products with the weights count. The formulas are registered when a call finds
the counter imported: importing it here would also import Triton.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def _conv_flops(input: Sequence[int], offset: Sequence[int], weight: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * input[0] * math.prod(offset[2:]) * math.prod(weight)


def _conv_backward_flops(grad_out: Sequence[int], *args: Any, **kwargs: Any) -> int:
    input, offset, weight, _, mask = args[-1]
    # The gradient of the columns, which those of input, offset and mask are made of, and that of the weights.
    products = int(input or offset or mask) + int(weight)
    return products * _conv_flops(*args[:3])


_FORMULAS: dict[str, Callable[..., int]] = {
    "deform_conv2d": _conv_flops,
    "deform_conv2d_backward": _conv_backward_flops,
}


def register_formulas() -> None:
    """Make the counter count the operators, also a counter that is active already."""
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None:
        return
    for name, formula in _FORMULAS.items():
        operator = getattr(torch.ops.dcnops, name)
        if operator not in counter.flop_registry:
            counter.register_flop_formula(operator)(formula)
        for mode in _get_current_dispatch_mode_stack():
            active = getattr(mode, "counter", None)
            if isinstance(active, counter.FlopCounterMode):
                active.flop_registry.setdefault(operator, counter.flop_registry[operator])
