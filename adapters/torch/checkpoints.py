"""Checkpoints of other libraries."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor, nn

from dcnops._errors import ArgumentError

from .deform_conv2d_layers import OffsetBranchConv


def rename_state_dict(state_dict: Mapping[str, Tensor], model: nn.Module) -> OrderedDict[str, Tensor]:
    """A checkpoint with the offset branches under the names that the layers of `model` have.

    The branch of a layer ``conv2`` is found as ``conv2.conv_offset`` (here and in mmcv), ``conv2.conv_offset_mask``
    (the DCNv2 extension and its many ports) or ``conv2_offset`` (detectron2 and early versions of mmcv). All of them
    have one order of channels. Weights and biases have the same names everywhere, also those of plain convolutions,
    which lack nothing but the branch.

    Parameters
    ----------
    state_dict : mapping of str to Tensor
        The checkpoint; it is left as it is.
    model : torch.nn.Module
        The model that shall load it, with `DeformConv2dPack` or `ModulatedDeformConv2dPack` layers.

    Returns
    -------
    OrderedDict of str to Tensor
        The same tensors, for ``model.load_state_dict``. In a checkpoint of plain convolutions the ``conv_offset`` keys
        are missing: load it with ``strict=False``, which leaves the branches as they are.

    Raises
    ------
    ArgumentError
        The checkpoint has the branch of a layer under several names.

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
        if not isinstance(module, OffsetBranchConv):
            continue
        prefix = f"{layer}." if layer else ""
        for leaf in ("weight", "bias"):
            name = f"{prefix}conv_offset.{leaf}"
            foreign = {f"{prefix}conv_offset_mask.{leaf}", f"{layer}_offset.{leaf}"} - own
            found = sorted({name, *foreign} & state_dict.keys())
            if len(found) > 1:
                raise ArgumentError(f"state_dict must have the branch of a layer under one name, got {found}")
            new_names.update(dict.fromkeys(found, name))
    renamed = OrderedDict((new_names.get(key, key), tensor) for key, tensor in state_dict.items())
    if hasattr(state_dict, "_metadata"):  # the versions of the modules, by which some adapt old checkpoints
        renamed._metadata = state_dict._metadata  # type: ignore[attr-defined]
    return renamed
