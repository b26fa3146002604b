"""Pretrained weights of the backbones."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor
from torchvision.models import get_model_weights
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from dcnops.adapters.torch import rename_state_dict

from ..config import WEIGHT_FILES
from ..errors import UserError
from .state_files import read_file, tensor_problem

FIRST = "conv1.weight"  # first parameter of every backbone
# Prefixes of the names in a wrapped network, and in a larger network that has other parts too.
WRAPPERS, PARTS = {"module", "model"}, {"backbone", "body", "encoder"}


def load_backbone(detector: GeneralizedRCNN, source: str, backbone: str) -> list[str]:
    """Load the weights of a classification network into the backbone of a detector.

    `source` is "imagenet" or the name of torchvision weights for `backbone` (IMAGENET1K_V1, IMAGENET1K_V2), downloaded
    on first use; or a file with torchvision's parameter names: .pth or .pt, .safetensors, .npz, .pkl. The names may
    have prefixes of wrappers, such as ``module.`` or ``_orig_mod.``. Of a detector, its ``backbone.`` is taken. Return
    the missing parameters, which all belong to offset branches.
    """
    path = Path(source)
    if path.suffix in WEIGHT_FILES:
        state = _read(path)
    elif backbone == "small":
        raise UserError(f"--weights {source}: the small backbone has no pretrained weights, use --weights none")
    else:
        state = _download(source, backbone)
    body = detector.backbone.body
    state = _unwrap(state, source)
    state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    own = body.state_dict()
    state = dict(rename_state_dict(state, body))
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own and not name.endswith("num_batches_tracked")]
    lost = [name for name in missing if "conv_offset" not in name]
    if lost or unexpected:
        kind, names = ("lacks", lost) if lost else ("has the unknown", unexpected)
        raise UserError(f"{source} {kind} {few(names)}: no weights of {backbone}")
    for name, value in state.items():
        if name in own and (problem := tensor_problem(value, own[name])):
            raise UserError(f"{source} does not fit {backbone}, {name} {problem}")
    body.load_state_dict(state, strict=False)
    return missing


def few(names: Sequence[str]) -> str:
    """List the first names."""
    return f"{', '.join(names[:3])}{', ...' * (len(names) > 3)}"


def _unwrap(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Remove the prefixes of wrappers from the names in a state dict."""
    names = {name: name.replace("_orig_mod.", "") for name in state}  # compiled modules may be anywhere in the network
    starts = (name.removesuffix(FIRST) for name in names.values() if name.endswith(FIRST))
    prefix = min((start for start in starts if set(start.split(".")) <= WRAPPERS | PARTS | {""}), key=len, default="")
    if PARTS & set(prefix.split(".")):
        names = {old: new for old, new in names.items() if new.startswith(prefix)}
    unwrapped = {new.removeprefix(prefix): state[old] for old, new in names.items()}
    if len(unwrapped) < len(names):
        raise UserError(f"{source} has several parameters with the same name, in different wrappers")
    return unwrapped


def _read(path: Path) -> Mapping[str, Tensor]:
    loaded = read_file(path)
    for key in ("model", "state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in loaded.items()
    ):
        raise UserError(f"{path} must hold a state dict of tensors")
    return loaded


def _download(source: str, backbone: str) -> Mapping[str, Tensor]:
    choices = get_model_weights(backbone)
    name = "IMAGENET1K_V1" if source == "imagenet" else source
    if name not in choices.__members__:
        names = ", ".join(["imagenet", *choices.__members__])
        raise UserError(
            f"--weights must be none, a .pth, .safetensors, .npz or .pkl file, or one of {names}; got {source!r}"
        )
    try:
        state: Mapping[str, Tensor] = choices[name].get_state_dict(progress=True, check_hash=True)
    # A truncated download or a damaged file in the cache raises other errors than OSError.
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"the weights {name} of {backbone} could not be downloaded ({error}); give a file by --weights, or none"
        ) from error
    return state
