"""Inference in batches of images that the network pads to the same size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..data import pad_elongated
from .inference import Detections, infer

MOST_WAITING = 4  # batches of images that wait for others of their size

Key = TypeVar("Key")


def infer_in_batches(
    model: nn.Module,
    images: Iterable[tuple[Key, Tensor, tuple[int, int]]],
    device: torch.device,
    batch_size: int,
    *,
    threshold: float = 0,
    amp_dtype: torch.dtype | None = None,
) -> Iterator[tuple[Key, tuple[int, int], Detections]]:
    """Run a network on a stream of (key, image, size); yield (key, size, detections) in the same order.

    For `image`, `size` and the options see `infer`. The network pads an image to a multiple of 32 pixels. A batch
    consists of images that have the same size then, as further padding would affect the detections.
    """
    waiting: dict[tuple[int, int], list[tuple[int, Tensor, tuple[int, int]]]] = {}
    keys: dict[int, tuple[Key, tuple[int, int]]] = {}
    found: dict[int, Detections] = {}
    next_number = 0

    def run(shape: tuple[int, int]) -> None:
        numbers, tensors, sizes = zip(*waiting.pop(shape))
        results = infer(
            model, [tensor.to(device) for tensor in tensors], sizes, threshold=threshold, amp_dtype=amp_dtype
        )
        found.update(zip(numbers, results))

    def finished() -> Iterator[tuple[Key, tuple[int, int], Detections]]:
        nonlocal next_number
        while next_number in found:
            yield *keys.pop(next_number), found.pop(next_number)
            next_number += 1

    for number, (key, image, size) in enumerate(images):
        keys[number] = key, size
        shape = padded_shape(model, *pad_elongated(image).shape[1:])
        waiting.setdefault(shape, []).append((number, image, size))
        if len(waiting[shape]) == batch_size:
            run(shape)
        elif sum(map(len, waiting.values())) > MOST_WAITING * batch_size:
            run(min(waiting, key=lambda item: waiting[item][0][0]))  # with the image that has waited longest
        yield from finished()
    for shape in list(waiting):
        run(shape)
    yield from finished()


def padded_shape(model: Any, height: int, width: int) -> tuple[int, int]:
    """Return the height and width of an image after the network's resizing and padding."""
    # Not a call of the module, so that its hooks see images only.
    prepared, _ = model.transform.forward([torch.empty(3, height, width, device="meta")])
    high, wide = prepared.tensors.shape[2:]
    return high, wide
