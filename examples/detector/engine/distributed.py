"""Processes under `torchrun`: ranks, process group, device, and objects that they share."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UserError, number_of
from ..processes import link_to, map_file, map_link, packed_in_background, unpack

T = TypeVar("T")
TIMEOUT = timedelta(hours=1)  # the other processes wait while the first one computes the metrics
ADVICE = "start several processes with torchrun, or unset WORLD_SIZE for one"


def rank() -> int:
    """Return the index of this process; 0 without a process group."""
    return dist.get_rank() if _active() else 0


def world_size() -> int:
    """Return the number of processes; 1 without a process group."""
    return dist.get_world_size() if _active() else 1


def is_main() -> bool:
    """Return True in the process that prints and writes files."""
    return rank() == 0


def gather_lists(items: list[T]) -> list[T]:
    """Gather the items of all processes in order of rank. Every process must call it and gets the result."""
    if world_size() == 1:
        return list(items)
    gathered: list[list[T]] = [[] for _ in range(world_size())]
    dist.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]


def from_main(make: Callable[[], T]) -> T:
    """Call `make` for the main process and return its result, or raise its `UserError` or `OSError`, in all processes.

    With several processes, it is called in the background, see `in_background`. Those on the machine of the main
    process share the memory of the arrays, those on other machines get copies. Changes of an array stay in one process.
    """
    if world_size() == 1:
        return make()
    memory: mmap.mmap | bytearray | None = None
    shared: list[Any] = [None, None]
    with ExitStack() as stack:
        if is_main():
            spans, file = stack.enter_context(packed_in_background(make))()
            memory, shared = map_file(file), [spans, link_to(file)]
        dist.broadcast_object_list(shared)
        spans, link = shared
        if not is_main():
            memory = map_link(link)
        everywhere = all(gather_lists([memory is not None]))
    if not everywhere:
        size = spans[-1][1]  # the file is longer if a process that ended has written a part
        memory = memory if is_main() else bytearray(size)
        _broadcast(torch.frombuffer(memory, dtype=torch.uint8, count=size))
    assert memory is not None
    try:
        return cast("T", unpack(spans, memory))
    except UserError as error:
        error.reported = not is_main()
        raise


def _broadcast(values: Tensor) -> None:
    """Send a tensor on the CPU from the main process to the others, in place."""
    on_gpu = dist.get_backend() == "nccl"
    sent = values.cuda() if on_gpu else values
    dist.broadcast(sent, 0)
    if on_gpu and not is_main():
        values.copy_(sent)


@contextmanager
def session(device: str | torch.device = "auto") -> Iterator[torch.device]:
    """Open the device of this process and, under `torchrun`, the process group for the time of a context.

    `device` is ``cpu``, ``cuda``, ``cuda:1``, or ``auto`` for a GPU if there is one; under `torchrun`, GPU LOCAL_RANK.
    """
    processes = _number("WORLD_SIZE", 1)
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if processes <= 1:
        yield chosen
        return
    if chosen.type == "cuda":
        dist.init_process_group("nccl", device_id=chosen, timeout=TIMEOUT)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield chosen
    finally:
        dist.destroy_process_group()


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device that `session` opens."""
    processes = _number("WORLD_SIZE", 1)
    if processes > 1:
        _check_variables(processes)
    return _choose(device, _number("LOCAL_RANK", 0) if processes > 1 else None)


def _number(name: str, default: int) -> int:
    """Read a whole number from an environment variable; notebooks and clusters may export an empty one."""
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UserError(f"the environment variable {name} must be a whole number, got {text!r:.60}: {ADVICE}")
    return int(text)


def _check_variables(processes: int) -> None:
    """Check the variables of `torchrun`; clusters may export some of them for each job."""
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(f"WORLD_SIZE is {processes}, but {', '.join(missing)} not set: {ADVICE}")
    if _number("RANK", 0) >= processes:
        raise UserError(f"RANK must be less than WORLD_SIZE={processes}, got {_number('RANK', 0)}: {ADVICE}")


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def _choose(device: str | torch.device, local_rank: int | None) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu, cuda or cuda:NUMBER, got {str(device)!r}")
    if chosen.type == "cpu":
        return chosen
    index = local_rank if local_rank is not None else chosen.index or 0
    if index >= torch.cuda.device_count():
        seen = number_of(torch.cuda.device_count(), "GPU")
        raise UserError(f"--device {device} needs GPU number {index}, counted from 0, but PyTorch sees {seen}")
    return torch.device("cuda", index)
