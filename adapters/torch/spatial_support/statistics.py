"""Statistics of the offsets and masks of deformable layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dcnops._errors import ArgumentError

from .nodes import as_image, is_detector
from .recording import ConvCall, PoolCall, Recorder, inspection


@dataclass(frozen=True)
class LayerStatistics:
    """Offsets and masks of a deformable layer, for all images, regions, taps and pixels.

    Attributes
    ----------
    name : str
        Name of the layer, as in ``model.named_modules()``.
    unit : "pixels" or "regions"
        Unit of the offsets: pixels of the layer's input map, or sides of the region in RoI pooling with gamma applied.
    offsets : Tensor [n, 2], float32, on the CPU
        (dy, dx).
    masks : Tensor [n], float32, on the CPU, or None for v1
    outside : float
        Fraction of the sampling points, or of the centres of the bins, that lie outside the map and read only zeros.
        With padding it is above zero even without offsets.
    """

    name: str
    unit: str
    offsets: Tensor
    masks: Tensor | None
    outside: float

    @property
    def lengths(self) -> Tensor:
        """Lengths of the offsets [n]."""
        lengths: Tensor = torch.linalg.vector_norm(self.offsets, dim=1)
        return lengths


def offset_statistics(model: nn.Module, images: Tensor | Sequence[Tensor]) -> dict[str, LayerStatistics]:
    """Collect the offsets and masks of every deformable layer of a model.

    Parameters
    ----------
    model : torch.nn.Module
    images : Tensor [C, H, W] or [1, C, H, W], or a sequence of them
        Inputs of the model, passed one at a time. A torchvision detector receives them in a list, as it expects, and
        pools the regions that it proposes.

    Returns
    -------
    dict of str to LayerStatistics
        By the names of the layers, in the order of execution; empty if no layer is deformable.

    Raises
    ------
    ArgumentError
        There are no images.
    ShapeError
        An item is not an image.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch import ModulatedDeformConv2dPack
    >>> from dcnops.adapters.torch.spatial_support import offset_statistics
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), ModulatedDeformConv2dPack(4, 8, 3, padding=1))
    >>> statistics = offset_statistics(network, torch.rand(3, 8, 8))["1"]
    >>> statistics.offsets.shape, statistics.lengths.max().item(), statistics.masks.mean().item()
    (torch.Size([576, 2]), 0.0, 0.5)
    """
    if not isinstance(images, (Tensor, Sequence)) or isinstance(images, str):
        raise ArgumentError(f"images must be an image or a sequence of images, got {type(images).__name__}")
    each = [images] if isinstance(images, Tensor) else images
    if not each:
        raise ArgumentError("images must hold at least one image")
    with inspection(model), torch.no_grad(), Recorder(model) as recorder:
        for batch in [as_image(image) for image in each]:
            model([batch[0]] if is_detector(model) else batch)
    return _summarise(recorder.calls)


class OffsetObserver:
    """Context that collects the offsets and masks of everything that a model runs, also during training.

    Parameters
    ----------
    model : torch.nn.Module

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch import DeformConv2dPack
    >>> from dcnops.adapters.torch.spatial_support import OffsetObserver
    >>> network = DeformConv2dPack(3, 8, 3)
    >>> with OffsetObserver(network) as observer:
    ...     loss = network(torch.rand(2, 3, 8, 8)).sum()
    >>> observer.statistics()[""].offsets.shape
    torch.Size([648, 2])
    """

    def __init__(self, model: nn.Module) -> None:
        self._recorder = Recorder(model)

    def __enter__(self) -> OffsetObserver:
        self._recorder.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._recorder.__exit__(*error)

    def statistics(self) -> dict[str, LayerStatistics]:
        """Return the statistics of the deformable layers that have run, by name, over all calls of a layer."""
        return _summarise(self._recorder.calls)


def _summarise(calls: Iterable[ConvCall | PoolCall]) -> dict[str, LayerStatistics]:
    by_name: dict[str, list[ConvCall | PoolCall]] = {}
    for call in calls:
        if not call.regular:
            by_name.setdefault(call.name, []).append(call)
    return {name: _layer_statistics(name, found) for name, found in by_name.items()}


def _layer_statistics(name: str, calls: Sequence[ConvCall | PoolCall]) -> LayerStatistics:
    offsets, masks, outside = [], [], []
    for call in calls:
        if isinstance(call, ConvCall):
            offset = call.offset.unflatten(1, (-1, 2)).movedim(2, -1)
            points = call.positions()
        else:
            offset = call.offset.flip(1).movedim(1, -1)  # the operation takes (dx, dy)
            boxes = call.boxes()
            points = (boxes[..., :2] + boxes[..., 2:]).flip(-1) / 2 - 0.5
        size = points.new_tensor(call.input_size)
        offsets.append(offset.reshape(-1, 2).float().cpu())
        if call.mask is not None:
            masks.append(call.mask.flatten().float().cpu())
        outside.append(~((points > -1) & (points < size)).all(-1).flatten().cpu())
    unit = "pixels" if isinstance(calls[0], ConvCall) else "regions"
    fraction = float(torch.cat(outside).float().mean()) if sum(map(len, outside)) else 0.0
    return LayerStatistics(name, unit, torch.cat(offsets), torch.cat(masks) if masks else None, fraction)
