"""Which images make a batch, in which order, and which of them are mirrored: functions of the seed alone."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as transforms
from torchvision.tv_tensors import BoundingBoxFormat

from ..config import TrainingConfig
from ..errors import UserError
from .coco import CocoDataset
from .images import pad_elongated

WORKER_GRACE = 600  # seconds that a process reading images lives on after SIGTERM


class Batch(NamedTuple):
    """The images of one iteration and process."""

    indices: list[int]
    images: list[Tensor]
    targets: list[dict[str, Any]]


class AspectRatioBatches:
    """The batches of each epoch, one after another for a single process or shared out among several.

    Every image is in at least one batch of an epoch. The iterations' images, those of all processes together, are all
    wide (or square) or all tall, but for at most two iterations an epoch that hold what is left over. Where the number
    of images is no multiple, the first images of the epoch's order come once more.

    Parameters
    ----------
    sizes : sequence of (width, height)
        Of each image.
    batch_size : int
        Images of a batch.
    seed : int
    group : bool
        Keep wide and tall images apart.
    rank, world_size : int
        Number of this process and of all.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        batch_size: int,
        *,
        seed: int,
        group: bool,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.wide = np.array([width >= height for width, height in sizes])
        self.batch_size = batch_size
        self.seed = seed
        self.group = group
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        """Iterations of an epoch, the same for all processes."""
        return -(-len(self.wide) // (self.batch_size * self.world_size))

    def epoch(self, epoch: int) -> list[list[int]]:
        """Indices of the images in each of this process's batches; a function of the seed and `epoch` alone."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.wide))
        together = self.batch_size * self.world_size
        if self.group:
            wide, tall = order[self.wide[order]], order[~self.wide[order]]
            whole_wide, rest_wide = np.split(wide, [len(wide) // together * together])
            whole_tall, rest_tall = np.split(tall, [len(tall) // together * together])
            # The wide ones last, as the first, which are repeated, are wide too.
            order = np.concatenate([whole_wide, whole_tall, rest_tall, rest_wide])
        batches = np.resize(order, (len(self), self.world_size, self.batch_size))
        chosen: list[list[int]] = random.permutation(batches)[:, self.rank].tolist()
        return chosen


class MirroredImages(Dataset[tuple[int, Tensor, dict[str, Any]] | UserError]):
    """The samples of a data set, a share of them mirrored from left to right.

    The key of a sample is (epoch, index); whether it is mirrored depends on them and the seed alone. A sample is
    (index, image, target), or the error that reading it raised: a DataLoader would wrap it in a traceback's text.
    """

    def __init__(self, dataset: CocoDataset, *, flip: float, seed: int) -> None:
        self.dataset = dataset
        self.flip = flip
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Tensor, dict[str, Any]] | UserError:
        epoch, index = key
        try:
            image, target = self.dataset[index]
        except UserError as error:
            return error
        if np.random.default_rng((self.seed, epoch, index)).random() < self.flip:
            image, target = mirror(image, target)
        padded = pad_elongated(image)
        if "masks" in target and padded.shape != image.shape:
            rows, columns = (new - old for new, old in zip(padded.shape[1:], image.shape[1:]))
            target = {**target, "masks": functional.pad(target["masks"], (0, columns, 0, rows))}
        return index, padded, target


def mirror(image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """A sample with left and right exchanged."""
    height, width = image.shape[-2:]
    boxes = transforms.horizontal_flip_bounding_boxes(target["boxes"], BoundingBoxFormat.XYXY, (height, width))
    target = {**target, "boxes": boxes}
    if "masks" in target:
        target["masks"] = transforms.horizontal_flip_mask(target["masks"])
    return transforms.horizontal_flip_image(image), target


def load_batches(
    dataset: CocoDataset, batches: AspectRatioBatches, config: TrainingConfig, device: torch.device, first: int = 0
) -> Generator[Batch]:
    """The batches of all epochs from iteration `first` on, as tensors on `device`.

    Closing the iterator ends the processes that read the images.

    Raises
    ------
    UserError
        An image cannot be read.
    """
    # One loader for all epochs, so that reading goes on across their ends. Its generator is never used for anything
    # but the seeds of the processes, and keeps the loader from drawing them from the global one.
    loader: DataLoader[Any] = DataLoader(
        MirroredImages(dataset, flip=config.flip, seed=config.seed),
        batch_sampler=_keys(batches, config.epochs, first),
        num_workers=config.workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator(),
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield Batch(
            batch.indices,
            [image.to(device, non_blocking=True) for image in batch.images],
            [
                {
                    name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
                    for name, value in target.items()
                }
                for target in batch.targets
            ],
        )


def _keys(batches: AspectRatioBatches, epochs: int, first: int) -> Iterator[list[tuple[int, int]]]:
    for epoch in range(first // len(batches), epochs):
        start = first % len(batches) if epoch == first // len(batches) else 0
        for batch in batches.epoch(epoch)[start:]:
            yield [(epoch, index) for index in batch]


def _collate(samples: list[tuple[int, Tensor, dict[str, Any]] | UserError]) -> Batch | UserError:
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
    indices, images, targets = zip(*samples)
    return Batch(list(indices), list(images), list(targets))


def _ignore_interrupts(worker: int) -> None:
    """Let a reading process outlive the signals that a terminal or a cluster sends to all processes at once.

    The main process finishes its iteration and saves, for which it may still need images. It ends the readers itself;
    should it not, SIGTERM works after a while.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE))
