"""Conversion of checkpoints from other libraries."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor, nn

from dcnops._errors import ArgumentError

from .zero_layers import ZeroLayer

BRANCH_NAMES = ("conv_offset", "conv_offset_mask")


def rename_state_dict(state_dict: Mapping[str, Tensor], model: nn.Module) -> OrderedDict[str, Tensor]:
    """Rename the offset branches of a checkpoint to the names that the layers of `model` use.

    The branch of a layer ``conv2`` is called ``conv2.conv_offset`` here and in mmcv, ``conv2.conv_offset_mask`` in the
    DCNv2 extension, its many ports and `dcn_v2.DCN`, and ``conv2_offset`` in detectron2 and early versions of mmcv. All
    of them use the same order of channels. The names of weight and bias are the same everywhere, including plain
    convolutions, which only lack the branch.

    Parameters
    ----------
    state_dict : mapping of str to Tensor
        The checkpoint. It is not changed.
    model : torch.nn.Module
        The model that will load it, with layers such as `DeformConv2dPack`, `ModulatedDeformConv2dPack` or
        `dcn_v2.DCN`. Checkpoints of other libraries need ``mask_scale=1``, as their masks have no scale.

    Returns
    -------
    OrderedDict of str to Tensor
        The same tensors, for ``model.load_state_dict``. A checkpoint of plain convolutions has no ``conv_offset`` keys:
        load it with ``strict=False``, which leaves the branches unchanged.

    Raises
    ------
    ArgumentError
        The checkpoint contains the branch of a layer under several names.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch import DeformConv2dPack, rename_state_dict
    >>> model = torch.nn.ModuleDict({"conv2": DeformConv2dPack(4, 4, 3, bias=False)})
    >>> checkpoint = {
    ...     "conv2.weight": torch.randn(4, 4, 3, 3),
    ...     "conv2_offset.weight": torch.randn(18, 4, 3, 3),
    ...     "conv2_offset.bias": torch.randn(18),
    ... }
    >>> renamed = rename_state_dict(checkpoint, model)
    >>> list(renamed)
    ['conv2.weight', 'conv2.conv_offset.weight', 'conv2.conv_offset.bias']
    >>> model.load_state_dict(renamed)
    <All keys matched successfully>
    """
    own = model.state_dict().keys()
    new_names: dict[str, str] = {}
    for layer, module in model.named_modules(remove_duplicate=False):
        prefix = f"{layer}." if layer else ""
        for child, branch in module.named_children():
            if not isinstance(branch, ZeroLayer) or child not in BRANCH_NAMES:
                continue
            for leaf in ("weight", "bias"):
                name = f"{prefix}{child}.{leaf}"
                foreign = {*(f"{prefix}{other}.{leaf}" for other in BRANCH_NAMES), f"{layer}_offset.{leaf}"} - own
                found = sorted({name, *foreign} & state_dict.keys())
                if len(found) > 1:
                    raise ArgumentError(f"state_dict must have the branch of a layer under one name, got {found}")
                new_names.update(dict.fromkeys(found, name))
    renamed = OrderedDict((new_names.get(key, key), tensor) for key, tensor in state_dict.items())
    if hasattr(state_dict, "_metadata"):  # module versions, which some modules use to adapt old checkpoints
        renamed._metadata = state_dict._metadata  # type: ignore[attr-defined]
    return renamed
