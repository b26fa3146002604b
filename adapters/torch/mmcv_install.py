"""Installation of the replacements of `mmcv_ops` into mmcv, with a stand-in for mmcv's compiled operations."""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dcnops._arguments import Pair

EXTENSION = "mmcv._ext"


def install_into_mmcv(replacements: Mapping[str, Any], layers: Mapping[str, type]) -> None:
    """Put `replacements` in place of what mmcv has under these names, and register `layers` by their types.

    If mmcv has no working compiled operations, a stand-in takes their place.
    """
    try:
        mmcv = importlib.import_module("mmcv")
        registry = importlib.import_module("mmengine.registry").MODELS
    except ModuleNotFoundError as error:
        if error.name not in ("mmcv", "mmengine"):
            raise
        raise ImportError(
            f"mmcv_ops.install needs mmcv 2 and mmengine, and {error.name} is not installed: "
            "pip install mmcv-lite mmengine",
            name=error.name,
        ) from error
    found = dict(replacements)
    try:
        importlib.import_module(EXTENSION)
    except ImportError:  # mmcv-lite, or a library that does not fit the installed PyTorch
        mmcv._ext = _import_stand_in()  # type: ignore[attr-defined]
        found.update(roi_align=roi_align, roi_pool=roi_pool, sigmoid_focal_loss=sigmoid_focal_loss)
    operations = importlib.import_module("mmcv.ops")
    # The functions of this module are not in mmcv.ops.
    attention = sys.modules.get("mmcv.ops.multi_scale_deform_attn")
    _replace({name: (getattr(operations, name, getattr(attention, name, None)), new) for name, new in found.items()})
    for name, layer in layers.items():
        registry.register_module(name, force=True, module=layer)


def _replace(objects: Mapping[str, tuple[Any, Any]]) -> None:
    """Replace objects, given as old and new by name, in every module that has the old one under this name.

    After an earlier installation, the old ones are those of this library. Its modules keep them.
    """
    others = [module for name, module in sys.modules.items() if name.partition(".")[0] != "dcnops"]
    for module in others:
        names: dict[str, Any] = getattr(module, "__dict__", {})
        for name, (old, new) in objects.items():
            if old is not None and names.get(name) is old:
                setattr(module, name, new)


class StandIn(ModuleType):
    """Module in place of ``mmcv._ext``: everything exists, and most of it raises an error when it is called."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

        def call(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(
                f"{name} is a compiled operation of mmcv that dcnops does not replace; it needs the full package mmcv"
            )

        return call

    @staticmethod
    def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
        """Return the indices of the boxes that remain, by falling score; `offset` is 1 if boxes include their end."""
        kept: Tensor = _torchvision_ops().nms(boxes + boxes.new_tensor([0, 0, offset, offset]), scores, iou_threshold)
        return kept

    @staticmethod
    def get_compiler_version() -> str:
        """Return a text for the versions that mmcv lists."""
        return "n/a"

    get_compiling_cuda_version = get_compiler_version


class _StandInLoader(importlib.abc.Loader):
    """Loader of `StandIn`. mmengine asks for one to find out whether mmcv has its operations."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def _import_stand_in() -> ModuleType:
    _torchvision_ops()
    module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(EXTENSION, _StandInLoader()))
    sys.modules[EXTENSION] = module
    return module


@functools.cache
def _torchvision_ops() -> Any:
    try:
        return importlib.import_module("torchvision.ops")
    except ModuleNotFoundError as error:
        raise ImportError(
            "mmcv_ops.install needs torchvision for an mmcv without compiled operations: pip install torchvision",
            name=error.name,
        ) from error


def roi_align(
    input: Tensor,
    rois: Tensor,
    output_size: Pair,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    pool_mode: str = "avg",
    aligned: bool = True,
) -> Tensor:
    """Replace ``mmcv.ops.roi_align`` by torchvision's function, which has no maximum over samples."""
    if pool_mode != "avg":
        raise NotImplementedError(f"pool_mode must be 'avg' without mmcv's compiled operations, got {pool_mode!r}")
    ratio = sampling_ratio if sampling_ratio > 0 else -1
    pooled: Tensor = _torchvision_ops().roi_align(input, rois, output_size, spatial_scale, ratio, aligned)
    return pooled


def roi_pool(input: Tensor, rois: Tensor, output_size: Pair, spatial_scale: float = 1.0) -> Tensor:
    """Replace ``mmcv.ops.roi_pool`` by torchvision's function, which rounds regions to whole pixels; mmcv does not."""
    pooled: Tensor = _torchvision_ops().roi_pool(input, rois, output_size, spatial_scale)
    return pooled


def sigmoid_focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    alpha: float = 0.25,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Replace ``mmcv.ops.sigmoid_focal_loss``.

    Parameters
    ----------
    input : Tensor [n, classes]
        Logits.
    target : Tensor [n], int64
        Classes; the number of classes stands for the background.
    """
    if weight is not None:
        raise NotImplementedError("weight must be None without mmcv's compiled operations")
    matches = target[:, None] == torch.arange(input.shape[1], device=input.device)
    probability = torch.sigmoid(input)
    positive = alpha * (1 - probability) ** gamma * functional.logsigmoid(input)
    negative = (1 - alpha) * probability**gamma * functional.logsigmoid(-input)
    loss = -torch.where(matches, positive, negative)
    if reduction == "none":
        return loss
    return loss.sum() / (len(input) if reduction == "mean" else 1)
