"""Benchmark of a whole network: order of its rows, and contenders that fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import ops

from benchmarks.model import Row, Run, rows_by_worth
from benchmarks.operations import OURS, PEER
from dcnops.adapters.torch import deform_conv2d_layers

EAGER, CAPTURED = (Row(mode, 1, "float32", "inference") for mode in ("eager", "graphs"))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    torch.set_num_threads(1)
    return Run(rehearsal=True, seconds=600, output=tmp_path / "model.json")


def compile_by(monkeypatch: pytest.MonkeyPatch, compile: Callable[[nn.Module], Callable[..., Any]]) -> None:
    class Compiled(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.call = compile(module)

        def forward(self, images: torch.Tensor) -> Any:
            return self.call(images)

    monkeypatch.setattr(torch, "compile", lambda module, **_: Compiled(module))


def test_training_in_eager_mode_comes_first():
    rows = rows_by_worth()
    assert len(set(rows)) == len(rows) == 3 * 3 * 3 * 2
    assert rows[0] == Row("eager", 2, "float16", "training")
    assert {(row.mode, row.step) for row in rows[:6]} == {("eager", "training")}
    assert {row.mode for row in rows[:12]} == {"eager"}


@pytest.mark.slow
def test_results_of_both_contenders(run: Run):
    run.measure(Row("eager", 2, "float32", "training"))
    (row,) = run.rows
    assert row["ratio"] == row["timings"][OURS]["median_ms"] / row["timings"][PEER]["median_ms"]
    assert row["features_differ_by"][OURS] == 0 < row["features_differ_by"][PEER] < 1e-3
    for name in (OURS, PEER):
        for direction in ("forward", "backward"):
            assert row["host_microseconds"][name][f"conv, {direction}"]["calls"] == 6
    assert not run.failures + run.peer_failures + run.not_reached


@pytest.mark.slow
def test_a_peer_that_fails_in_a_compiled_network_is_reported_and_left_out(run: Run, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    compile_by(monkeypatch, lambda module: module.__call__)
    monkeypatch.setattr(ops, "deform_conv2d", fail)
    run.measure(CAPTURED)
    (row,) = run.rows
    assert set(row["timings"]) == {OURS} and row["ratio"] is None
    assert run.peer_failures == [
        f"{CAPTURED.title}: torchvision: RuntimeError: operation not permitted when stream is capturing"
    ]
    assert not run.failures
    run.measure(EAGER)
    assert len(run.failures) == 1 and run.failures[0].startswith(f"{EAGER.title}: torchvision: RuntimeError")


@pytest.mark.slow
def test_a_replay_that_ignores_its_images_is_not_timed(run: Run, monkeypatch: pytest.MonkeyPatch):
    def capture(module: nn.Module) -> Callable[..., Any]:
        recorded: list[Any] = []

        def call(images: torch.Tensor) -> Any:
            recorded[:] = recorded or [module(images)]
            return recorded[0]

        return call

    compile_by(monkeypatch, capture)
    run.measure(CAPTURED)
    assert not run.rows[0]["timings"]
    assert f"{CAPTURED.title}: the features of dcnops differ by" in run.failures[0]
    assert f"{CAPTURED.title}: the features of torchvision differ by" in run.peer_failures[0]


@pytest.mark.slow
def test_our_failure_does_not_stop_the_other_rows(run: Run, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(deform_conv2d_layers, "deform_conv2d", lambda *_, **__: 1 / 0)
        run.measure(EAGER)
    assert run.failures == [f"{EAGER.title}: ZeroDivisionError: division by zero"] and not run.rows
    run.measure(EAGER)
    assert len(run.rows) == 1


def test_rows_without_time_are_not_reached(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    late = Run(rehearsal=True, seconds=0, output=tmp_path / "model.json")
    for row in (EAGER, CAPTURED):
        late.measure(row)
    late.print_report()
    assert late.not_reached == [EAGER.title, CAPTURED.title]
    assert f"2 rows were not reached in time: {EAGER.title}, ..." in capsys.readouterr().out
