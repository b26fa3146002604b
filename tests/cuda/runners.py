"""Emulated runners that record launches and allocations or plant bugs, and images in channels-last order."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.conftest import EmulatedRunner


class Recorder(EmulatedRunner):
    """Runner that records every launch. Nothing is compiled or computed, and results are undefined."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.launches: list[tuple[Any, ...]] = []
        self.params: list[Any] = []
        _compute_nothing(self)

        def recorded(unit, kernel, macros):
            def launch(grid, block, shared_bytes, params):
                self.launches.append((unit, kernel, dict(macros), grid, block, shared_bytes))
                self.params.append(type(params).from_buffer_copy(params))

            return launch

        self.engine.kernel = recorded


def allocations(runner: EmulatedRunner) -> list[int]:
    """Return a list that receives the bytes of each allocation of the runner's engine, which computes nothing."""
    sizes: list[int] = []
    _compute_nothing(runner)
    empty = runner.engine.xp.empty

    def record(shape: Any, dtype: Any = float) -> np.ndarray:
        array = empty(shape, dtype)
        sizes.append(array.nbytes)
        return array

    runner.engine.xp.empty = record
    return sizes


def _compute_nothing(runner: EmulatedRunner) -> None:
    runner.programs = None  # every launch once
    runner.engine._compile = lambda *options: lambda *launch: None
    runner.engine._matmul = lambda *matrices: None


def broken(old: str, new: str, **options: Any) -> EmulatedRunner:
    """Return a runner with `old` replaced by `new` in the source of every kernel."""
    runner = EmulatedRunner(**options)
    runner.programs = None
    compile = runner.engine._compile

    def compile_broken(source: str, kernel: str, compile_options: tuple[str, ...]) -> Any:
        return compile(source.replace(old, new), kernel, compile_options)

    runner.engine._compile = compile_broken
    return runner


def channels_last_of(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
