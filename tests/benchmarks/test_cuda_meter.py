"""Host time of calls on a GPU, on an invented GPU with its own clock."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

QUEUE = 1024
"""Launches that the driver accepts before it waits for the GPU."""


class InventedGpu:
    """Clock, `torch.cuda` and a call that occupies the CPU and enqueues launches."""

    def __init__(self, seconds: float, launches: int, waits: bool = False) -> None:
        self.now = self.awake = 0.0
        self.queued = 0
        self.seconds, self.launches, self.waits = seconds, launches, waits

    def perf_counter(self) -> float:
        return self.now

    def synchronize(self) -> None:
        self.now, self.queued = max(self.now, self.awake), 0

    def _sleep(self, cycles: int) -> None:
        self.awake = self.now + cycles / 2e9

    def Event(self) -> SimpleNamespace:
        return SimpleNamespace(record=lambda: None, query=lambda: self.now >= self.awake)

    def call(self) -> None:
        self.now += self.seconds
        self.queued += self.launches
        if self.waits or self.queued > QUEUE:
            self.synchronize()


def host_seconds(monkeypatch: pytest.MonkeyPatch, gpu: InventedGpu) -> float | None:
    pytest.importorskip("cupy")
    from benchmarks import cuda_meter

    monkeypatch.setattr(cuda_meter, "time", gpu)
    monkeypatch.setattr(cuda_meter, "torch", SimpleNamespace(cuda=gpu))
    meter = object.__new__(cuda_meter.CudaMeter)
    meter._head_starts = {}
    return meter.host_seconds(gpu.call)


@pytest.mark.parametrize("launches", [1, 3, 60, QUEUE])
def test_time_to_enqueue_does_not_include_a_wait_for_the_gpu(monkeypatch: pytest.MonkeyPatch, launches: int):
    assert host_seconds(monkeypatch, InventedGpu(5e-5, launches)) == pytest.approx(5e-5)


def test_calls_that_wait_for_the_gpu_have_no_host_time(monkeypatch: pytest.MonkeyPatch):
    assert host_seconds(monkeypatch, InventedGpu(5e-5, 1, waits=True)) is None
