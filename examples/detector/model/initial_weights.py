"""Whole detectors as initial weights of a training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..config import WEIGHT_FILES, Config
from ..data import Category
from ..errors import UserError, number_of
from .checkpoint import NotACheckpoint, config_of, load_checkpoint
from .foreign_checkpoints import LAST_LAYERS, UnsupportedDetector, convert_detector
from .state_files import read_file, tensor_problem
from .weights import few


def read_initial_detector(source: str, report: Callable[[str], None]) -> dict[str, Any] | None:
    """Read a whole detector to start a training from; None if `source` has or names other weights.

    The result is as from `read_detector`, with "path". Of a detector that this program cannot build, `load_backbone`
    may still take the backbone: the result is None, and `report` is called with a line that says so.
    """
    path = Path(source)
    if path.suffix not in WEIGHT_FILES or not path.is_file():
        return None
    try:
        return {"path": path, **load_checkpoint(path)}
    except NotACheckpoint:
        pass
    try:
        converted = convert_detector(read_file(path), path)
    except UnsupportedDetector as error:
        report(f"{error}; only its backbone is used")
        return None
    return converted and {"path": path, **converted}


def starting_config(content: Mapping[str, Any] | None, own_layers: bool) -> Config | None:
    """Return the configuration to start from with the result of `read_initial_detector`: that of its network.

    With `own_layers`, options that replace a part of the preset are dropped, as another preset follows.
    """
    if content is None:
        return None
    network = config_of(content, content["path"]).network
    if own_layers:
        network = dataclasses.replace(network, convolution="preset", stages="preset", pooling="preset")
    return Config(network=network)


def load_initial_detector(model: nn.Module, content: Mapping[str, Any], categories: Sequence[Category]) -> list[str]:
    """Load the result of `read_initial_detector` into a model that may have other categories, layers and heads.

    The last layers of the heads are left out if the names of the categories differ. Return lines for the user about the
    parameters that were left out and those that keep their initial values.
    """
    path, own = content["path"], model.state_dict()
    given: dict[str, Tensor] = dict(content["model"])
    lines = [content["report"]] if "report" in content else []
    if [category.name for category in content["categories"]] != [category.name for category in categories]:
        lines.append(f"{path}: the last layers of the heads are left out, as the categories are others")
        given = {name: value for name, value in given.items() if not name.startswith(LAST_LAYERS)}
    given_fpn, own_fpn = (any(name.startswith("backbone.fpn.") for name in names) for names in (given, own))
    if given_fpn != own_fpn:
        kind, needed = ("with", "mask or faster-fpn") if given_fpn else ("without", "faster")
        raise UserError(f"{path}: is a detector {kind} a feature pyramid, which needs --detector {needed}")
    missing = [name for name in own if name not in given]
    if lost := [name for name in missing if name.startswith("backbone.body.") and "conv_offset" not in name]:
        raise UserError(f"{path}: does not fit the configured network, it has no {few(lost)}")
    unused = [name for name in given if name not in own]
    for name in own:
        if name in given and (problem := tensor_problem(given[name], own[name])):
            raise UserError(f"{path}: does not fit the configured network, {name} {problem}")
    lines.append(f"{path}: {number_of(len(given) - len(unused), 'parameter')} used")
    if unused:
        lines.append(
            f"{path}: left out {number_of(len(unused), 'parameter')} that the network does not have: {few(unused)}"
        )
    if missing:
        lines.append(f"{path}: kept the initial values of {number_of(len(missing), 'parameter')}: {few(missing)}")
    model.load_state_dict({name: value for name, value in given.items() if name in own}, strict=False)
    return lines
