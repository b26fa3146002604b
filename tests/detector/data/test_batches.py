"""Training batches: order, grouping, flips, loading."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from contextlib import closing
from multiprocessing.queues import Queue

import pytest
import torch
from torch.utils.data import DataLoader

from dcnops.detector.config import Config
from dcnops.detector.data import (
    AspectRatioBatches,
    Augmentation,
    AugmentedImages,
    load_batches,
    prepare_worker,
    worker_errors,
)
from dcnops.detector.errors import UserError

WIDE, TALL = (64, 48), (48, 64)
MIXED = [WIDE, TALL, WIDE, WIDE, (50, 50), TALL, WIDE, TALL, WIDE, WIDE, WIDE, TALL, WIDE]


class Images:
    """Samples that depend on their index; one may be unreadable."""

    def __init__(self, sizes: list[tuple[int, int]], unreadable: int | None = None) -> None:
        self.sizes = sizes
        self.unreadable = unreadable

    def __getitem__(self, index: int):
        if index == self.unreadable:
            raise UserError(f"{index}.png: cannot be read")
        width, height = self.sizes[index]
        image = torch.arange(3 * height * width).reshape(3, height, width) + 0.5 + index
        masks = torch.zeros(2, height, width, dtype=torch.uint8)
        masks[0, 2:5, 3:10] = masks[1, :, 0] = 1
        boxes = torch.tensor([[3, 2, 10, 5], [0, 0, 1, height]], dtype=torch.float32)
        return image, {"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks, "image_id": index}


class Unsendable:
    """Batch that cannot be passed to another process, as without shared memory."""

    def __reduce__(self):
        raise RuntimeError("no shared memory")


def unsendable(samples):
    return Unsendable()


def make(sizes=MIXED, batch_size=2, *, seed=0, group=True, world_size=1) -> list[AspectRatioBatches]:
    return [
        AspectRatioBatches(sizes, batch_size, seed=seed, group=group, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 20])
@pytest.mark.parametrize("sizes", [MIXED, [WIDE], [TALL] * 7, [TALL] + [WIDE] * 7], ids=len)
def test_batches_cover_all_images_and_ranks_have_equal_numbers(sizes, batch_size, world_size, group):
    ranks = make(sizes, batch_size, group=group, world_size=world_size)
    for epoch in range(3):
        batches = [rank.epoch(epoch) for rank in ranks]
        assert {len(own) for own in batches} == {len(rank) for rank in ranks}
        assert len(ranks[0]) == -(-len(sizes) // (batch_size * world_size))
        counts = Counter(index for own in batches for batch in own for index in batch)
        assert set(counts) == set(range(len(sizes)))
        # Repeated images fill the last batch, as evenly as possible.
        assert sum(counts.values()) == len(ranks[0]) * batch_size * world_size
        assert max(counts.values()) - min(counts.values()) <= 1
        assert all(len(batch) == batch_size for own in batches for batch in own)


@pytest.mark.parametrize("world_size", [1, 2])
def test_grouping(world_size):
    sizes = MIXED * 8
    mixed = {True: 0, False: 0}
    for group in mixed:
        ranks = make(sizes, 2, group=group, world_size=world_size)
        for iteration in zip(*(rank.epoch(1) for rank in ranks)):
            kinds = {sizes[index][0] >= sizes[index][1] for batch in iteration for index in batch}
            mixed[group] += len(kinds) > 1
    assert mixed[True] <= 2 < 5 < mixed[False]


def test_epochs_are_a_function_of_the_seed_and_their_number():
    (batches,) = make()
    later = batches.epoch(7)
    torch.manual_seed(3)
    batches.epoch(0)
    assert batches.epoch(7) == later == make()[0].epoch(7)
    assert later != batches.epoch(8) and later != make(seed=1)[0].epoch(7)
    # Batches of wide and tall images alternate at random.
    (long,) = make(MIXED * 8)
    kinds = [(MIXED * 8)[batch[0]] == TALL for batch in long.epoch(0)]
    assert kinds != sorted(kinds) and kinds != sorted(kinds, reverse=True)


def test_mirroring():
    dataset = Images([WIDE])
    (image, target), (index, mirrored, other) = dataset[0], AugmentedImages(dataset, Augmentation(1), seed=0)[4, 0]
    assert index == 0 and torch.equal(mirrored, image.flip(2)) and torch.equal(other["masks"], target["masks"].flip(2))
    assert other["boxes"].tolist() == [[54, 2, 61, 5], [63, 0, 64, 48]] and other["boxes"].dtype == torch.float32
    assert torch.equal(other["labels"], target["labels"]) and other["image_id"] == 0
    for mask, box in zip(other["masks"], other["boxes"].int().tolist()):
        rows, columns = mask.nonzero().T
        assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == box
    assert target["boxes"].tolist() == [[3, 2, 10, 5], [0, 0, 1, 48]]  # unchanged

    empty = Images([WIDE])
    empty_target = {"boxes": torch.zeros(0, 4), "masks": torch.zeros(0, 48, 64, dtype=torch.uint8)}
    empty.__class__ = type("Empty", (Images,), {"__getitem__": lambda self, index: (image, empty_target)})
    assert AugmentedImages(empty, Augmentation(1), seed=0)[0, 0][2]["boxes"].shape == (0, 4)


def test_mirroring_is_a_function_of_the_seed_the_epoch_and_the_image():
    dataset = Images([WIDE] * 40)

    def drawn(seed: int, epoch: int, flip: float = 0.5) -> list[bool]:
        images = AugmentedImages(dataset, Augmentation(flip), seed=seed)
        return [not torch.equal(images[epoch, index][1], dataset[index][0]) for index in range(40)]

    assert drawn(0, 3) == drawn(0, 3) and 8 < sum(drawn(0, 3)) < 32
    assert drawn(0, 3) != drawn(0, 4) and drawn(0, 3) != drawn(1, 3)
    assert not any(drawn(0, 0, flip=0)) and all(drawn(0, 0, flip=1))


@pytest.mark.parametrize("size", [(3, 1000), (1000, 3)])
def test_elongated_images_are_padded(size):
    dataset = Images([size])
    image, target = dataset[0]
    _, padded, padded_target = AugmentedImages(dataset, Augmentation(0), seed=0)[0, 0]
    assert min(padded.shape[1:]) == 32 and max(padded.shape[1:]) == 1000
    assert torch.equal(padded[:, : size[1], : size[0]], image)
    assert torch.equal(padded[:, -1, -1], image[:, -1, -1])
    masks = padded_target["masks"]
    assert masks.shape[1:] == padded.shape[1:]
    assert torch.equal(masks[:, : size[1], : size[0]], target["masks"])
    assert masks.sum() == target["masks"].sum()
    assert torch.equal(padded_target["boxes"], target["boxes"])


def load(dataset: Images, first: int, **options):
    config = Config().set([f"training.{name}={value}" for name, value in {"epochs": 2, **options}.items()])
    (batches,) = make(dataset.sizes)
    return load_batches(dataset, batches, config, torch.device("cpu"), first)


@pytest.mark.parametrize("first", [0, 2, 7, 9, 14])
@pytest.mark.parametrize("workers", [0, 2])
def test_loading_from_any_iteration(first, workers):
    everything = [batch for epoch in (0, 1) for batch in make()[0].epoch(epoch)]
    torch.manual_seed(5)
    loaded = list(load(Images(MIXED), first, workers=workers))
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(5)))
    assert [batch.indices for batch in loaded] == everything[first:]
    for batch, reference in zip(loaded, list(load(Images(MIXED), 0, workers=0))[first:]):
        assert [target["image_id"] for target in batch.targets] == batch.indices
        assert all(map(torch.equal, batch.images, reference.images))
        assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(batch.targets, reference.targets))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read(workers):
    with pytest.raises(UserError, match=r"^4\.png: cannot be read$"):
        list(load(Images(MIXED, unreadable=4), 0, workers=workers))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_readers_outlive_a_signal_to_all_processes_and_end_with_the_iterator(number):
    before = children()
    with closing(load(Images(MIXED), 0, workers=1)) as batches:
        next(batches)
        (reader,) = children() - before
        os.kill(reader, number)
        time.sleep(0.1)
        assert len(list(batches)) == 13
    for _ in range(100):
        if children() == before:
            break
        time.sleep(0.05)
    assert children() == before


def children() -> set[int]:
    tasks = f"/proc/self/task/{os.getpid()}/children"
    if not os.path.exists(tasks):
        pytest.skip("needs Linux's /proc")
    with open(tasks) as file:
        return set(map(int, file.read().split()))


def test_a_process_that_cannot_pass_on_its_images_is_an_error(capfd):
    loader = DataLoader([1, 2], num_workers=1, collate_fn=unsendable, worker_init_fn=prepare_worker)
    with (
        pytest.raises(UserError, match=r"a data-loading process ended \(.*training\.workers=0") as caught,
        worker_errors(),
    ):
        list(loader)
    assert str(caught.value).isprintable()
    assert "cannot pass on its images: no shared memory" in capfd.readouterr().err


def test_data_loading_processes_survive_the_signals_of_clusters():
    numbers = [signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM]
    before = [signal.getsignal(number) for number in numbers]
    feeder_error = Queue._on_queue_feeder_error
    try:
        prepare_worker(0)
        assert [signal.getsignal(number) for number in numbers[:3]] == [signal.SIG_IGN] * 3
        assert callable(signal.getsignal(signal.SIGTERM))
    finally:
        Queue._on_queue_feeder_error = staticmethod(feeder_error)
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
