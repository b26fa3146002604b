"""Base class of the layers that predict offsets, which start at zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn import functional

Device: TypeAlias = "torch.device | str | int | None"


class ZeroLayer(nn.Module):
    """Layer that starts at zero, and that the initialisers of networks and frameworks leave at zero.

    Initialisers select layers with ``isinstance(layer, nn.Conv2d)`` or by words such as "Conv" and "Linear" in the
    names of a class and its bases. Subclasses match neither. `torch.nn.Module.apply` on a network leaves them at zero
    in any case, and so does leaving the meta device. Use `torch.nn.init` on the parameters to set other values.
    """

    weight: Tensor
    bias: Tensor | None

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def apply(self, fn: Callable[[nn.Module], Any]) -> ZeroLayer:
        has_values = not self.weight.is_meta and not is_fake(self.weight)
        was_zero = has_values and not any(bool(values.any()) for values in self.parameters())
        super().apply(fn)
        if was_zero:
            self.reset_parameters()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ZeroLayer:
        was_meta = self.weight.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.weight.is_meta:  # `to_empty` and `skip_init` leave memory as it is
            self.reset_parameters()
        return self


class OffsetProjection(ZeroLayer):
    """Fully connected layer at the end of the branch of a RoI pooling layer: zero, so that pooling starts as RoIAlign.

    Parameters and state dict are those of `torch.nn.Linear`.
    """

    def __init__(
        self, in_features: int, out_features: int, *, device: Device = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        self.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        """Map `input` [R, in_features] to [R, out_features]."""
        return functional.linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
