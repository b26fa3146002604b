"""How far the sampling points of each layer have moved, and what its masks are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dcnops._errors import ArgumentError

from .nodes import as_image, is_detector
from .recording import ConvCall, PoolCall, Recorder, undisturbed


@dataclass(frozen=True)
class LayerStatistics:
    """The offsets and masks of a deformable layer, of all images, regions, taps and pixels.

    Attributes
    ----------
    name : str
        As in ``model.named_modules()``.
    unit : "pixels" or "regions"
        Of the offsets: pixels of the layer's input map, or sides of the region in RoI pooling, gamma being applied.
    offsets : Tensor [n, 2], float32, on the CPU
        (dy, dx).
    masks : Tensor [n], float32, on the CPU, or None for v1
    outside : float
        Share of the sampling points, or of the centres of the bins, that lie off the map and see nothing of it. With
        padding some do at the start too.
    """

    name: str
    unit: str
    offsets: Tensor
    masks: Tensor | None
    outside: float

    @property
    def lengths(self) -> Tensor:
        """The lengths of the offsets [n]."""
        lengths: Tensor = torch.linalg.vector_norm(self.offsets, dim=1)
        return lengths


def offset_statistics(model: nn.Module, images: Tensor | Sequence[Tensor]) -> dict[str, LayerStatistics]:
    """The offsets and masks of every deformable layer of a model, by the layers' names, in the order of the calls.

    Parameters
    ----------
    model : torch.nn.Module
    images : Tensor [C, H, W] or [1, C, H, W], or a sequence of them
        What the model is given, one at a time. A detector of torchvision's kind is given lists, as it expects, and so
        pools the regions that it proposes.

    Returns
    -------
    dict of str to LayerStatistics
        Empty if no layer is deformable.

    Raises
    ------
    ArgumentError
        There are no images.
    ShapeError
        Something is no image.

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
    with undisturbed(model), torch.no_grad(), Recorder(model) as recorder:
        for batch in [as_image(image) for image in each]:
            model([batch[0]] if is_detector(model) else batch)
    return _summarise(recorder.calls)


class OffsetObserver:
    """Notes the offsets and masks of whatever a model runs while the context lasts, in training too.

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
        """The statistics of the deformable layers that have run, by name; all calls of a layer together."""
        return _summarise(self._recorder.calls)


def _summarise(calls: Iterable[ConvCall | PoolCall]) -> dict[str, LayerStatistics]:
    by_name: dict[str, list[ConvCall | PoolCall]] = {}
    for call in calls:
        if not call.regular:
            by_name.setdefault(call.name, []).append(call)
    return {name: _of_layer(name, found) for name, found in by_name.items()}


def _of_layer(name: str, calls: Sequence[ConvCall | PoolCall]) -> LayerStatistics:
    offsets, masks, outside = [], [], []
    for call in calls:
        if isinstance(call, ConvCall):
            offset = call.offset.unflatten(1, (-1, 2)).movedim(2, -1)
            points = call.positions()
        else:
            offset = call.offset.flip(1).movedim(1, -1)  # (dx, dy) as the operation takes it
            boxes = call.boxes()
            points = (boxes[..., :2] + boxes[..., 2:]).flip(-1) / 2 - 0.5
        size = points.new_tensor(call.input_size)
        offsets.append(offset.reshape(-1, 2).float().cpu())
        if call.mask is not None:
            masks.append(call.mask.flatten().float().cpu())
        outside.append(~((points > -1) & (points < size)).all(-1).flatten().cpu())
    unit = "pixels" if isinstance(calls[0], ConvCall) else "regions"
    share = float(torch.cat(outside).float().mean()) if sum(map(len, outside)) else 0.0
    return LayerStatistics(name, unit, torch.cat(offsets), torch.cat(masks) if masks else None, share)
