"""Conversion of existing models to deformable layers, and parameter groups for training them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import nn

from dcnops._errors import ArgumentError

from .deform_conv2d_layers import DeformConv2dPack, ModulatedDeformConv2dPack
from .deform_roi_pool_layers import RoIPoolBase
from .functional import named_padding, type_name
from .zero_layers import OffsetProjection, ZeroLayer

_DEFORMABLE = {"DeformConvBase", "DeformConv2d", "ModulatedDeformConv2d", "DeformConv", "ModulatedDeformConv", "DCNv2"}

LayerSelector: TypeAlias = str | Sequence[str] | Callable[[str, nn.Conv2d], bool]


def convert_to_deformable(
    model: nn.Module,
    where: LayerSelector,
    modulated: bool = True,
    deform_groups: int = 1,
    mask_scale: float = 2.0,
) -> list[str]:
    """Replace convolutions of a model with deformable convolutions, in place.

    The new layers take over the parameter objects of the old layers, so state dicts of the plain model still load, with
    only the ``conv_offset`` keys missing. Their branches start at zero and are trainable even if the convolution is
    frozen. By default, the model gives the same output as before until it is trained. The function draws no random
    numbers.

    Parameters
    ----------
    model : torch.nn.Module
    where : str, sequence of str, or function (name, convolution) -> bool
        The convolutions to replace. Strings are shell-style patterns for the names in ``model.named_modules()``; ``*``
        matches dots too. A function is called for every `torch.nn.Conv2d`.
    modulated : bool
        Use `ModulatedDeformConv2dPack` (v2) layers instead of `DeformConv2dPack` (v1).
    deform_groups : int
        D, the number of deformable groups of each layer.
    mask_scale : float
        Masks are ``mask_scale * sigmoid(logits)``. With 2 they start at 1, which keeps the features of a pretrained
        model; the authors' published code does the same. With 1, as in the text of the paper and in mmcv, they start at
        1/2, and each layer halves its output, apart from the bias. Checkpoints of mmcv, detectron2 and the DCNv2
        extension need 1: they do not record the scale.

    Returns
    -------
    list of str
        The names of the new layers.

    Raises
    ------
    ArgumentError
        A pattern or the function matches nothing, or it matches a layer that cannot be replaced: anything other than a
        plain `torch.nn.Conv2d`, or one with hooks, with a padding mode other than zeros, or with asymmetric padding.
        The model is not changed then.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch import convert_to_deformable
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, padding=1))
    >>> convert_to_deformable(model, lambda name, conv: conv.kernel_size == (3, 3))
    ['2']
    >>> model(torch.randn(1, 3, 6, 6)).shape
    torch.Size([1, 8, 6, 6])

    The ResNets of torchvision, as in Deformable ConvNets v2::

        convert_to_deformable(resnet, ["layer2.*.conv2", "layer3.*.conv2", "layer4.*.conv2"])
    """
    matches = _find_matches(model, where)
    # A convolution that is used in several places has several names. It becomes one layer.
    layers = {conv: _replacement(name, conv, modulated, deform_groups, mask_scale) for conv, name in matches.items()}
    names = [name for name, module in model.named_modules(remove_duplicate=False) if module in layers]
    for name in names:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, layers[getattr(owner, child)])
    return names


def param_groups(
    model: nn.Module,
    lr: float,
    offset_lr_mult: float = 0.1,
    weight_decay: float | None = None,
    *,
    roi_offset_lr_mult: float = 1.0,
    pattern: str | Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Return parameter groups for an optimiser, with a lower learning rate for the offset branches of convolutions.

    Branches are recognised in the layers of this package, and by name in others: modules named with "offset" and
    "conv", such as ``conv_offset``, ``conv_offset_mask``, ``offset_conv`` and ``conv2_offset``, and with "offset" alone
    next to a deformable convolution, inside it, or one level above. `pattern` names others.

    Parameters
    ----------
    model : torch.nn.Module
    lr : float
        The learning rate.
    offset_lr_mult : float
        Learning rate multiplier of the branches of convolutions; 0.1 in the papers.
    weight_decay : float, optional
        Weight decay of all groups; by default the optimiser's own.
    roi_offset_lr_mult : float
        Learning rate multiplier of the branches of deformable RoI pooling; 1 in the papers. These branches form a
        separate group only if it is not 1.
    pattern : str or sequence of str
        Shell-style patterns for the names in ``model.named_modules()`` of further branches, such as ``"*.p_conv"``.

    Returns
    -------
    list of dict
        The groups of parameters that require a gradient: branches of RoI pooling last, branches of convolutions before
        them, everything else first. Empty groups are left out.

    Raises
    ------
    ArgumentError
        `lr` or a factor is negative, or nothing in the model has a name of `pattern`.

    Warns
    -----
    UserWarning
        `offset_lr_mult` is not 1, and the model has no branch that is recognised, or a deformable convolution without
        one. Its branch then has the full learning rate.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch import DeformConv2dPack, param_groups
    >>> model = torch.nn.Sequential(DeformConv2dPack(3, 8, 3), torch.nn.Conv2d(8, 8, 1))
    >>> optimiser = torch.optim.SGD(param_groups(model, lr=0.02), momentum=0.9)
    >>> [(len(group["params"]), group["lr"]) for group in optimiser.param_groups]
    [(4, 0.02), (2, 0.002)]
    """
    factors = {"lr": lr, "offset_lr_mult": offset_lr_mult, "roi_offset_lr_mult": roi_offset_lr_mult}
    for name, value in factors.items():
        if value < 0:
            raise ArgumentError(f"{name} must not be negative, got {value}")
    branches = _find_branches(model, [pattern] if isinstance(pattern, str) else pattern, offset_lr_mult != 1)
    # All parameters of a pooling layer belong to its branches.
    poolings = [module for module in model.modules() if isinstance(module, RoIPoolBase) and roi_offset_lr_mult != 1]
    conv_parameters, pool_parameters = (
        {parameter for module in modules for parameter in module.parameters()} for modules in (branches, poolings)
    )
    groups: list[dict[str, Any]] = [
        {"params": [], "lr": lr * factor} for factor in (1, offset_lr_mult, roi_offset_lr_mult)
    ]
    for parameter in model.parameters():
        if parameter.requires_grad:
            index = 1 if parameter in conv_parameters else 2 if parameter in pool_parameters else 0
            groups[index]["params"].append(parameter)
    if weight_decay is not None:
        for group in groups:
            group["weight_decay"] = weight_decay
    return [group for group in groups if group["params"]]


def _find_branches(model: nn.Module, patterns: Sequence[str], warn: bool) -> list[nn.Module]:
    """Return the offset branches of convolutions, and warn about deformable convolutions that seem to have none."""
    modules = dict(model.named_modules(remove_duplicate=False))
    parents = {name: name.rpartition(".")[0] for name in modules}
    deformable = {name for name, module in modules.items() if _is_deformable(module)}
    # The scope of a layer: itself, its siblings, and those of its parent.
    scopes = {name: (name, parents[name], parents[parents[name]]) for name in deformable}
    nearby = {scope for names in scopes.values() for scope in names}
    branches = {
        name: module for name, module in modules.items() if name and _is_branch(name, module, parents[name] in nearby)
    }
    for each in patterns:
        matches = {name: module for name, module in modules.items() if name and fnmatchcase(name, each)}
        if not matches:
            raise ArgumentError(f"pattern must match a module of the model, but nothing is named {each!r}")
        branches.update(matches)
    owners = {parents[name] for name in branches}
    without = [repr(name) for name, names in scopes.items() if owners.isdisjoint(names)]
    if without and warn:
        layers = f"{', '.join(without[:3])}{' ...' if len(without) > 3 else ''}"
        text = f"param_groups recognises no offset branch of the deformable convolutions {layers}"
        warnings.warn(f"{text}; name the branches with pattern=", stacklevel=3)
    elif warn and not branches and not any(isinstance(module, RoIPoolBase) for module in modules.values()):
        text = "param_groups recognises no offset branch in the model, so that offset_lr_mult changes nothing"
        warnings.warn(f"{text}; name the branches with pattern=", stacklevel=3)
    return list(branches.values())


def _is_deformable(module: nn.Module) -> bool:
    """Return True for the deformable convolutions of this package, torchvision, mmcv, detectron2 and the extension."""
    names = {kind.__name__ for kind in type(module).__mro__}
    return not isinstance(module, ZeroLayer) and not names.isdisjoint(_DEFORMABLE)


def _is_branch(name: str, module: nn.Module, near_deformable: bool) -> bool:
    """Return True if a module is the offset branch of a convolution, by its type or its name."""
    last = name.rpartition(".")[2]
    if any(isinstance(part, (nn.Linear, OffsetProjection)) for part in module.modules()):
        return False  # a branch of RoI pooling
    words = re.split(r"[_\d]+", last.lower())
    named = not {"offset", "offsets"}.isdisjoint(words)
    return isinstance(module, ZeroLayer) or (named and ("conv" in words or near_deformable))


def _find_matches(model: nn.Module, where: LayerSelector) -> dict[nn.Module, str]:
    """Return the modules to replace, each with one of its names."""
    modules = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if name]
    found: dict[nn.Module, str] = {}
    if callable(where):
        for name, module in modules:
            if isinstance(module, nn.Conv2d) and not isinstance(module, ZeroLayer) and where(name, module):
                found[module] = name
        if not found:
            raise ArgumentError("where must match a convolution of the model, but the function is true for none")
        return found
    for pattern in [where] if isinstance(where, str) else where:
        matches = {module: name for name, module in modules if fnmatchcase(name, pattern)}
        if not matches:
            raise ArgumentError(f"where must match a convolution of the model, but nothing is named {pattern!r}")
        found.update(matches)
    return found


def _replacement(
    name: str, conv: nn.Module, modulated: bool, deform_groups: int, mask_scale: float
) -> DeformConv2dPack | ModulatedDeformConv2dPack:
    if type(conv) is not nn.Conv2d:
        raise ArgumentError(f"where must match plain torch.nn.Conv2d layers, but {name} is a {type_name(conv)}")
    if conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks or conv._backward_pre_hooks:
        raise ArgumentError(f"where must match layers without hooks, which would be lost, but {name} has some")
    if conv.padding_mode != "zeros":
        raise ArgumentError(f"where must match layers with padding_mode='zeros', but {name} has {conv.padding_mode!r}")
    channels, padding = (conv.in_channels, conv.out_channels), _symmetric_padding(name, conv)
    geometry = (*channels, conv.kernel_size, conv.stride, padding, conv.dilation, conv.groups, deform_groups)
    bias = conv.bias is not None
    layer: DeformConv2dPack | ModulatedDeformConv2dPack
    # The meta device needs no memory and no random numbers: the weight is replaced below and the branch is zero.
    with torch.device("meta"):
        if modulated:
            layer = ModulatedDeformConv2dPack(*geometry, bias, mask_scale=mask_scale)
        else:
            layer = DeformConv2dPack(*geometry, bias)
    layer.weight, layer.bias = conv.weight, conv.bias
    layer.conv_offset.to_empty(device=conv.weight.device).to(conv.weight.dtype).reset_parameters()
    return layer.train(conv.training)


def _symmetric_padding(name: str, conv: nn.Conv2d) -> tuple[int, int]:
    """Return the (vertical, horizontal) padding of a convolution, resolving "same" and "valid"."""
    if isinstance(conv.padding, str):
        (top, bottom), (left, right) = named_padding(conv.padding, conv.kernel_size, conv.stride, conv.dilation)
        if top != bottom or left != right:
            raise ArgumentError(
                f"where must match layers that pad both sides alike, but {name} has padding='same' "
                f"with kernel_size={conv.kernel_size}"
            )
        return top, left
    return conv.padding  # type: ignore[return-value]
