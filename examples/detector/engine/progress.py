"""Progress of the training: a bar or lines of text, and TensorBoard."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from tqdm import tqdm

from dcnops.adapters.torch.spatial_support import LayerStatistics

from ..errors import UserError, cannot_write

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

LOG_EVERY = 20  # iterations averaged in a line of text and a point in TensorBoard


class Progress:
    """Progress bar on a terminal, else regular lines of text, on stderr; scalars and histograms for TensorBoard.

    `first` of `total` iterations are finished; later entries of an earlier run in TensorBoard are purged. The reported
    memory is the peak of the GPU's allocations, or of the process on the CPU.
    """

    def __init__(self, folder: Path, device: torch.device, *, first: int, total: int, per_epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.device = device
        self.first, self.total, self.per_epoch = first, total, per_epoch
        self.folder = folder
        # TensorBoard writes in a thread, which prints a traceback if it fails; the next call raises the error again.
        self.report_thread, threading.excepthook = threading.excepthook, self._thread_failed
        try:
            with self._writing():
                self.writer = SummaryWriter(str(folder), purge_step=first + 1)
        except UnicodeEncodeError:
            raise UserError(f"{folder}: TensorBoard needs a name in UTF-8, give --out another folder") from None
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=first, unit="it", dynamic_ncols=True, disable=not self.terminal)
        self.sums: dict[str, float] = {}
        self.count = 0
        self.seconds = 0.0  # of all iterations of this run
        self.seconds_logged = 0.0
        self.clock = time.perf_counter()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: object, error: object, _: object) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            self.bar.close()
        try:
            with self._writing():
                self.writer.close()
        except UserError:
            if error is None:
                raise
        finally:
            threading.excepthook = self.report_thread

    def iteration(self, done: int, losses: Mapping[str, float], lr: float, gradient_norm: float) -> None:
        """Record iteration number `done`, counted from 1; its time starts at the previous call."""
        now = time.perf_counter()
        self.seconds += now - self.clock
        self.clock = now
        for name, value in {"loss": sum(losses.values()), **losses}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1
        if self.terminal:
            self.bar.set_postfix_str(f"{_describe(losses)}, lr {lr:.3g}{self._memory()}", refresh=False)
            self.bar.update()
        if done % LOG_EVERY and done != self.total:
            return
        means = {name: value / self.count for name, value in self.sums.items()}
        each = (self.seconds - self.seconds_logged) / self.count
        self.sums, self.count, self.seconds_logged = {}, 0, self.seconds
        scalars = {f"train/{name}": value for name, value in means.items()}
        scalars |= {"train/lr": lr, "train/seconds_per_iteration": each}
        if math.isfinite(gradient_norm):  # float16 gradients may overflow
            scalars["train/gradient_norm"] = gradient_norm
        self.scalars(done, scalars)
        if not self.terminal:
            del means["loss"]
            epoch = f"{(done - 1) // self.per_epoch + 1}/{self.total // self.per_epoch}"
            remaining = timedelta(seconds=round((self.total - done) * self.seconds / (done - self.first)))
            print(
                f"iteration {done}/{self.total}, epoch {epoch}: {_describe(means)}, lr {lr:.3g}, "
                f"{each:.3g} s/iteration, ETA {remaining}{self._memory()}",
                file=sys.stderr,
                flush=True,
            )

    def scalars(self, done: int, values: Mapping[str, float]) -> None:
        """Add scalars to TensorBoard, except NaN."""
        with self._writing():
            for name, value in values.items():
                if not math.isnan(value):
                    self.writer.add_scalar(name, value, done)
            self.writer.flush()

    def offsets(self, done: int, statistics: Mapping[str, LayerStatistics]) -> None:
        """Add histograms of each deformable layer's offsets and masks, and the share of samples off the map."""
        with self._writing():
            for name, layer in statistics.items():
                for kind, values in (("offsets", layer.lengths), ("masks", layer.masks)):
                    if values is not None and (finite := values[values.isfinite()]).numel():
                        self.writer.add_histogram(f"{kind}/{name}", finite, done)
                        self.writer.add_scalar(f"{kind}_mean/{name}", finite.mean(), done)
                self.writer.add_scalar(f"off_the_map/{name}", layer.outside, done)

    def say(self, text: str) -> None:
        """Print on stdout without breaking the bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def resume_clock(self) -> None:
        """Exclude the time since the last iteration from the rates."""
        self.bar.unpause()
        self.clock = time.perf_counter()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Name the folder in an error of TensorBoard."""
        try:
            yield
        except OSError as error:
            raise cannot_write(error.filename or self.folder, error) from None

    def _thread_failed(self, arguments: threading.ExceptHookArgs) -> None:
        if not isinstance(arguments.exc_value, OSError):
            self.report_thread(arguments)

    def _memory(self) -> str:
        if self.device.type == "cuda":
            size = torch.cuda.max_memory_allocated(self.device)
        elif resource is None:
            return ""
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return f", {size / 2**20:.0f} MiB"


def _describe(losses: Mapping[str, float]) -> str:
    parts = ", ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in losses.items())
    return f"loss {sum(losses.values()):.3f} ({parts})"
