"""Data-parallel test: ``torchrun --nproc-per-node 2 -m tests.detector.engine.two_processes FOLDER``.

Without `torchrun`, it forks the two processes itself.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from dcnops.detector.data import AspectRatioBatches, Batch, load_batches
from dcnops.detector.engine import Interrupted, Trainer, detect, distributed, rank, session, train, world_size
from dcnops.detector.engine.distributed import from_main, gather_lists
from dcnops.detector.engine.trainer import Step
from dcnops.detector.errors import UserError

from .test_training import CPU, EVALUATED, TINY, build, dataset

STEP = Trainer.step
T = TypeVar("T")


def stop_second(self: Trainer, batch: Batch, iteration: int, *rest: Any) -> Step:
    """Send the second process a signal, which the next iteration notices."""
    if rank() == 1 and iteration == 2:
        signal.raise_signal(signal.SIGTERM)
    return STEP(self, batch, iteration, *rest)


def poison_second(self: Trainer, batch: Batch, iteration: int, *rest: Any) -> Step:
    """Put NaN into an image of the second process."""
    if rank() == 1 and iteration == 2:
        batch.images[0][:] = float("nan")
    return STEP(self, batch, iteration, *rest)


def message(function: Callable[[], object]) -> str:
    try:
        function()
    except (Interrupted, UserError) as error:
        return str(error)
    return "no error"


def refusal(folder: Path) -> tuple[str, bool]:
    """Return the error of data that do not exist, and whether another process reports it."""
    with pytest.raises(UserError) as caught:
        from_main(lambda: dataset(folder / "nothing"))
    return str(caught.value), caught.value.reported


def ended() -> str:
    """Return the error of a process that ends after it has written a part of its result."""
    return message(lambda: from_main(lambda: [np.arange(10000.0), lambda: None]))


def share_arrays() -> tuple[list[list[float]], int]:
    """Return arrays of the first process, and the number of bytes that were sent apart from objects."""
    sent, send = [], dist.broadcast

    def counted(values: torch.Tensor, source: int) -> None:
        send(values, source)
        sent.append(values.nbytes)

    def make() -> list[np.ndarray]:
        frozen = np.arange(2.0)
        frozen.flags.writeable = False
        return [np.arange(10000.0), np.arange(6.0)[::2], np.zeros(0), frozen]

    with patch.object(dist, "broadcast", counted):
        arrays = from_main(make)
    arrays[0] += 1  # only in this process
    return [array.tolist() for array in arrays], sum(sent)


def on_another_machine(function: Callable[[], T]) -> T:
    """Call a function while other processes cannot map the files of the first one."""
    with patch.object(distributed, "map_link", lambda link: None):
        return function()


def main(folder: Path) -> None:
    config = TINY.set(EVALUATED)
    with session("cpu") as device:
        images = from_main(lambda: dataset(folder / "data"))
        batches = AspectRatioBatches(images.sizes, 2, seed=0, group=True, rank=rank(), world_size=world_size())
        batch = next(load_batches(images, batches, config, device))
        # The weights differ between the processes; those of the first must be used.
        model = build(config, seed=rank())
        trainer = Trainer(model, config.resolve_training(), device, len(batches))
        step = trainer.step(batch, 0)
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results = detect(build(config), images, CPU, progress=False)
        shares = gather_lists([rank()] * (1 + rank()))

        trained = build(config, seed=rank())
        metrics = train(trained, config, images, dataset(folder / "data", evaluated=True), folder / "out", device)

        Trainer.step = stop_second
        stopped = message(lambda: train(build(config), config, images, None, folder / "stopped", device))
        Trainer.step = poison_second
        poisoned = message(lambda: train(build(config), config, images, None, folder / "poisoned", device))
        Trainer.step = STEP
        resumed = build(config, seed=5)
        train(resumed, config, images, None, folder / "stopped", device, resume=True)
        torch.save(
            {
                "indices": batch.indices,
                "losses": step.losses,
                "gradients": gradients,
                "stepped": model.state_dict(),
                "trained": trained.state_dict(),
                "results": results,
                "shares": shares,
                "arrays": [share_arrays(), on_another_machine(share_arrays)],
                "made": gather_lists([from_main(os.getpid), os.getpid()]),
                "refused": refusal(folder),
                "ended": on_another_machine(ended),
                "evaluated": metrics is not None,
                "stopped": stopped,
                "resumed": resumed.state_dict(),
                "poisoned": poisoned,
            },
            folder / f"process{rank()}.pth",
        )


def start(rank: int, port: int, folder: Path) -> None:
    """Run one process, in the environment that `torchrun` gives it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    main(folder)


if __name__ == "__main__":
    if "RANK" in os.environ:
        main(Path(sys.argv[1]))
    else:
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        torch.multiprocessing.start_processes(start, (store.port, Path(sys.argv[1])), nprocs=2, start_method="fork")
