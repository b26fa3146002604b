"""Multi-scale deformable attention for models of Hugging Face transformers.

`replace_attention` puts it into a model. `MultiScaleDeformableAttention` is the layer for the mapping of the package
kernels, and `LAYER` its entry.

Examples
--------
::

    from transformers import AutoModelForObjectDetection
    from dcnops.adapters.torch.transformers_attention import replace_attention

    model = AutoModelForObjectDetection.from_pretrained("SenseTime/deformable-detr")
    replace_attention(model)

or, with the package kernels::

    from kernels import register_kernel_mapping
    from dcnops.adapters.torch.transformers_attention import LAYER

    register_kernel_mapping({"MultiScaleDeformableAttention": {"cuda": LAYER, "cpu": LAYER}})
    model = AutoModelForObjectDetection.from_pretrained("SenseTime/deformable-detr", use_kernels=True)
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor, nn

from dcnops._errors import ArgumentError

from .attention import ms_deform_attn

__all__ = ["LAYER", "MultiScaleDeformableAttention", "replace_attention"]


class MultiScaleDeformableAttention(nn.Module):
    """Layer without parameters, with the interface of transformers' class of this name.

    The package kernels accepts only classes without a constructor, methods or attributes other than these.
    """

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: Sequence[tuple[int, int]] | None,
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """Compute `ms_deform_attn`.

        The list of shapes is preferred to the tensor; `level_start_index` and `im2col_step` are ignored.
        """
        shapes = value_spatial_shapes if value_spatial_shapes_list is None else value_spatial_shapes_list
        return ms_deform_attn(value, shapes, sampling_locations, attention_weights)


@dataclass(frozen=True)
class InstalledLayer:
    """Entry of a mapping of the package kernels that is installed already, instead of a repository to download."""

    layer_name: str

    def load(self) -> type[nn.Module]:
        """Return the class."""
        layer: type[nn.Module] = globals()[self.layer_name]
        return layer


LAYER = InstalledLayer("MultiScaleDeformableAttention")
"""The layer for ``kernels.register_kernel_mapping`` and ``kernels.use_kernel_mapping``."""


def replace_attention(model: nn.Module) -> None:
    """Make a model of transformers compute its deformable attention with `ms_deform_attn`.

    It knows the layer ``MultiScaleDeformableAttention`` (Deformable DETR, Grounding DINO, RT-DETR, RF-DETR and others)
    and the functions of Mask2Former, OneFormer, RT-DETRv2, D-FINE and DEIMv2. Layers are replaced in this model,
    functions in the modules that define them, and so for all models of a kind. Sampling with the method "discrete"
    stays as it is.

    Parameters
    ----------
    model : torch.nn.Module
        The model. Its parameters are not changed.

    Raises
    ------
    ArgumentError
        The model contains none of these layers and functions.
    """
    is_found = False
    for module in model.modules():
        # The module of a class made by exec, or in a notebook that was restarted, may not be there.
        namespace: dict[str, Any] = getattr(sys.modules.get(type(module).__module__), "__dict__", {})
        if type(module) is namespace.get("MultiScaleDeformableAttention"):
            module.forward = MethodType(MultiScaleDeformableAttention.forward, module)
            is_found = True
        for name, wrap in _FUNCTIONS.items():
            if name in namespace:
                namespace[name] = wrap(namespace[name])
                is_found = True
        # Some models keep the function as an attribute.
        core: Any = getattr(module, "ms_deformable_attn_core", None)
        wrap_core = _FUNCTIONS.get(getattr(core, "__name__", ""))
        if wrap_core is not None:
            module.ms_deformable_attn_core = wrap_core(core)  # type: ignore[assignment]
            is_found = True
    if not is_found:
        raise ArgumentError(
            f"model must have a multi-scale deformable attention of transformers, got {type(model).__qualname__}"
        )


def _with_equal_points(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    if hasattr(original, "__wrapped__"):  # replaced already
        return original

    @functools.wraps(original)
    def compute(
        value: Tensor, value_spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor
    ) -> Tensor:
        return ms_deform_attn(value, value_spatial_shapes, sampling_locations, attention_weights)

    return compute


def _with_points_per_level(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    if hasattr(original, "__wrapped__"):
        return original

    @functools.wraps(original)
    def compute(
        value: Tensor,
        value_spatial_shapes: Any,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        num_points_list: Sequence[int],
        method: str = "default",
    ) -> Tensor:
        arguments = (value, value_spatial_shapes, sampling_locations, attention_weights)
        if method != "default":
            return original(*arguments, num_points_list, method)
        return ms_deform_attn(*arguments, points=list(num_points_list))

    return compute


_FUNCTIONS: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Tensor]]] = {
    "multi_scale_deformable_attention": _with_equal_points,
    "multi_scale_deformable_attention_v2": _with_points_per_level,
}
