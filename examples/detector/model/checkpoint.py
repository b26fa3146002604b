"""Checkpoints: a detector with its configuration, and the state for resuming the training."""

from __future__ import annotations

import contextlib
import os
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from ..config import Config
from ..data import Category
from ..errors import UserError, cannot_write, number_of
from .foreign_checkpoints import convert_detector
from .network import build_detector
from .state_files import check_archive, read_file, tensor_problem

FORMAT = 1
FIELDS = {"config": dict, "categories": list, "model": dict, "iteration": int}


def save_checkpoint(
    path: Path,
    model: nn.Module,
    config: Config,
    categories: Sequence[Category],
    iteration: int,
    resume: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint; `path` keeps its old content until the new content is complete and on disk.

    `model` comes from `build_detector`, not wrapped for data-parallel training. `resume` holds further plain values and
    tensors for resuming the training.
    """
    content = {
        "format": FORMAT,
        "config": config.to_dict(),
        "categories": [[category.id, category.name] for category in categories],
        "model": model.state_dict(),
        "iteration": iteration,
        **(resume or {}),
    }
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)  # of a save that was killed, or a link
        with partial.open("xb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        # torch hides the error of a full disk behind a RuntimeError.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        if isinstance(cause, OSError):
            raise cannot_write(path, cause) from None
        raise UserError(f"{path}: cannot be written ({cause})") from error


class NotACheckpoint(UserError):
    """A file that is not from this program."""


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a file written by `save_checkpoint`, with tensors on the CPU, without running code from the file."""
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder: give a checkpoint in it, such as the model.pth of a finished training")
    if not os.path.isfile(path):
        raise UserError(f"{path}: there is no such checkpoint")
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise NotACheckpoint(f"{path}: is not a checkpoint of this program, or only a part of one")
        check_archive(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise NotACheckpoint(
            f"{path}: is refused, as a checkpoint holds tensors, numbers, text and lists only, and this has more"
        ) from None
    except Exception:  # damaged archives raise all kinds of errors, and torch's messages advise unsafe loading
        raise NotACheckpoint(f"{path}: is damaged, or not a checkpoint of this program") from None
    if not isinstance(content, dict) or "format" not in content:
        raise NotACheckpoint(f"{path}: is not a checkpoint of this program (has no format number)")
    if content["format"] != FORMAT:
        raise UserError(f"{path}: has the checkpoint format {content['format']!r}, this program reads {FORMAT}")
    for name, kind in FIELDS.items():
        if not isinstance(content.get(name), kind):
            raise UserError(f"{path}: is not a complete checkpoint ({name!r} is missing or no {kind.__name__})")
    if type(content["iteration"]) is bool or content["iteration"] < 0:
        raise UserError(f"{path}: is not a checkpoint of this program (its iteration is {content['iteration']})")
    content["categories"] = _categories(content["categories"], path)
    return content


def restore_model(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load the weights of a checkpoint into a model with the same parameters."""
    own = model.state_dict()
    for name in [*own, *state]:
        if name not in state or name not in own:
            problem = "is missing in the checkpoint" if name in own else "is unknown to the network"
            raise UserError(f"{path}: does not fit the configured network, {name} {problem}")
        if mismatch := tensor_problem(state[name], own[name]):
            raise UserError(f"{path}: does not fit the configured network, {name} {mismatch}")
    model.load_state_dict(state)


def load_detector(
    path: Path,
    device: torch.device,
    assignments: Iterable[str] = (),
    *,
    categories: Sequence[Category] | None = None,
    report: Callable[[str], None] | None = None,
) -> tuple[GeneralizedRCNN, Config, list[Category]]:
    """Load a detector of this program, or one that `convert_detector` knows.

    Parameters
    ----------
    path : Path
    device : torch.device
    assignments : iterable of str
        Changes of the configuration as for `Config.set`.
    categories : sequence of Category, optional
        Replace those of the file.
    report : callable, optional
        Called with a line about a file of another project.

    Returns
    -------
    (model, config, categories)
        The model is on `device` in evaluation mode.

    Raises
    ------
    UserError
        The file does not hold exactly the parameters of a known detector, or `categories` has another length.
    """
    content = read_detector(path)
    found: list[Category] = content["categories"] if categories is None else list(categories)
    if len(found) != len(content["categories"]):
        known = number_of(len(content["categories"]), "category")
        raise UserError(f"{path}: is a detector for {known}, got {number_of(len(found), 'name')}")
    if report and "report" in content:
        report(content["report"])
    config = config_of(content, path).set(assignments)
    model = build_detector(config.network, len(found))
    restore_model(model, content["model"], path)
    model.to(device).eval()
    return model, config, found


def read_detector(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this program or of another project, see `load_checkpoint` and `convert_detector`."""
    try:
        return load_checkpoint(path)
    except NotACheckpoint as error:
        problem = error
    try:
        content = read_file(path)
    except UserError:
        raise problem from None
    if isinstance(content, dict) and "format" in content:
        raise problem
    converted = convert_detector(content, path)
    if converted is None:
        raise UserError(f"{problem}, and no Faster or Mask R-CNN of torchvision, mmdetection or detectron2 either")
    return converted


def config_of(content: Mapping[str, Any], path: Path) -> Config:
    """Return the configuration in a checkpoint; options that an earlier version did not have get their defaults."""
    try:
        return Config.from_dict(content["config"])
    except UserError as error:
        raise UserError(f"{path}: has a configuration that this program cannot use, {error}") from None


def _categories(values: list[Any], path: Path) -> list[Category]:
    categories = []
    for value in values:
        if not (isinstance(value, list) and list(map(type, value)) == [int, str]):
            raise UserError(f"{path}: is not a complete checkpoint (category {value!r:.40} is not [id, name])")
        categories.append(Category(*value))
    if len({category.id for category in categories}) < len(categories):
        raise UserError(f"{path}: is not a checkpoint of this program (has several categories with the same id)")
    return categories


def _sync_folder(folder: Path) -> None:
    """Make a renaming durable on systems that can synchronise folders."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
