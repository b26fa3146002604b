"""Signals of terminals and clusters as requests to stop after the current iteration."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ..errors import Interrupted

# Clusters send SIGUSR1 before the end of a job, and a terminal SIGHUP when it is closed. Windows has neither.
NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))
SAME_REQUEST = 1.0  # seconds; launchers forward a signal that the process has already received


class StopRequests:
    """Context that stores the first signal in `received` and raises `Interrupted(text)` at the second.

    Signals that the process ignores, such as SIGHUP under nohup, stay ignored.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.received = 0
        self._since = 0.0
        self._at_once = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequests:
        chosen = [number for number in NUMBERS if signal.getsignal(number) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._handle) for number in chosen}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise `Interrupted` at the first signal in a context, or immediately if one has been received."""
        self._at_once = True
        try:
            if self.received:
                raise Interrupted(self.received, self.text)
            yield
        finally:
            self._at_once = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received and not self._at_once and now - self._since < SAME_REQUEST:
            return
        again = self.received != 0
        self.received, self._since = number, now
        if again or self._at_once:
            raise Interrupted(number, self.text)
        # Not print, which the signal may have interrupted. The terminal may be gone.
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this iteration; once more to stop at once\n")
