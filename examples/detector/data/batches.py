"""Training batches: their images, order and random changes depend on the seed only."""

from __future__ import annotations

import multiprocessing.queues
import os
import signal
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from ..config import Config
from ..errors import UserError
from .augmentation import Augmentation
from .coco import CocoDataset
from .images import pad_elongated

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

MOST_FILES = 65536
WORKER_GRACE = 600  # seconds that a data-loading process continues after SIGTERM


class Batch(NamedTuple):
    """Images and targets of one process in one iteration."""

    indices: list[int]
    images: list[Tensor]
    targets: list[dict[str, Any]]


@dataclass(frozen=True)
class AspectRatioBatches:
    """Batch sampler that separates wide and tall images and divides the batches among the processes.

    Every image is in at least one batch of an epoch. All images of an iteration, over all processes, are wide (or
    square) or all are tall, except in at most two iterations per epoch with the remaining images. To fill the last
    batch, the first images of the epoch are repeated.
    """

    sizes: Sequence[tuple[int, int]]  # width and height of each image
    batch_size: int  # images per process and iteration
    _: KW_ONLY
    seed: int
    group: bool  # separate wide and tall images
    rank: int = 0
    world_size: int = 1

    def __len__(self) -> int:
        """Return the number of iterations per epoch, equal in all processes."""
        return -(-len(self.sizes) // (self.batch_size * self.world_size))

    def epoch(self, epoch: int) -> list[list[int]]:
        """Return the image indices of each batch of this process; they depend on the seed and `epoch` only."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.sizes))
        together = self.batch_size * self.world_size
        if self.group:
            is_wide = np.array([width >= height for width, height in self.sizes])[order]
            wide, tall = order[is_wide], order[~is_wide]
            whole_wide, rest_wide = np.split(wide, [len(wide) // together * together])
            whole_tall, rest_tall = np.split(tall, [len(tall) // together * together])
            # Wide images last, because the first ones, which fill the last batch, are wide.
            order = np.concatenate([whole_wide, whole_tall, rest_tall, rest_wide])
        batches = np.resize(order, (len(self), self.world_size, self.batch_size))
        chosen: list[list[int]] = random.permutation(batches)[:, self.rank].tolist()
        return chosen


@dataclass(frozen=True, eq=False)
class AugmentedImages(Dataset[tuple[int, Tensor, dict[str, Any]] | UserError]):
    """Samples (index, image, target) of a data set, changed at random.

    The key of a sample is (epoch, index); together with the seed it determines the changes. The sample of an unreadable
    image is its `UserError`, because a DataLoader would turn a raised error into the text of a traceback.
    """

    dataset: CocoDataset
    augmentation: Augmentation
    _: KW_ONLY
    seed: int

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Tensor, dict[str, Any]] | UserError:
        epoch, index = key
        try:
            sample = self.dataset[index]
        except UserError as error:
            return error
        image, target = self.augmentation(sample, np.random.default_rng((self.seed, epoch, index)))
        padded = pad_elongated(image)
        if "masks" in target and padded.shape != image.shape:
            rows, columns = (new - old for new, old in zip(padded.shape[1:], image.shape[1:]))
            target = {**target, "masks": functional.pad(target["masks"], (0, columns, 0, rows))}
        return index, padded, target


def load_batches(
    dataset: CocoDataset, batches: AspectRatioBatches, config: Config, device: torch.device, first: int = 0
) -> Generator[Batch]:
    """Yield the batches of all epochs from iteration `first` on, as tensors on `device`.

    Closing the iterator ends the data-loading processes.
    """
    options = config.training
    _allow_many_files()
    # A single loader for all epochs prefetches across their ends. The explicit generator keeps the loader from
    # drawing the seeds of its processes from the global one.
    loader: DataLoader[Any] = DataLoader(
        AugmentedImages(dataset, Augmentation.of(config), seed=options.seed),
        batch_sampler=_keys(batches, options.epochs, first),
        num_workers=options.workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=prepare_worker,
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


def _allow_many_files() -> None:
    """Raise the limit of open files: each tensor that a data-loading process has finished is one."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


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


def prepare_worker(worker: int) -> None:
    """Prepare a data-loading process, as ``worker_init_fn``.

    It must survive when a terminal or a cluster sends a signal to all processes, because the main process may still
    need images to finish its iteration. The main process ends these processes itself; if it fails to, SIGTERM takes
    effect after a while.

    The process ends if it cannot pass on its images, for example without shared memory. By default Python drops them,
    and the main process would wait for ever.
    """
    for name in ("SIGINT", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE))

    def stop(error: Exception, item: object) -> None:
        print(f"a data-loading process cannot pass on its images: {error}", file=sys.stderr, flush=True)
        os._exit(1)

    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(stop)  # type: ignore[attr-defined]


@contextmanager
def worker_errors() -> Iterator[None]:
    """Turn the end of a data-loading process into a `UserError`; it may be noticed anywhere in the main process."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a data-loading process ended ({str(error).splitlines()[0]}): give the program more memory, more shared "
            "memory (/dev/shm; docker run --shm-size=8g), or set training.workers=0"
        ) from None
