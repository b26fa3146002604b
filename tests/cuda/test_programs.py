"""Recorded programs give what their plans give, bit for bit."""

from __future__ import annotations

from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings

from dcnops._backends.cuda import cupy_programs, plans
from dcnops._backends.cuda.engine import Device, Engine
from dcnops._backends.cuda.programs import ArrayForm, Fill, Launch, Product, Program, ProgramCache, Recorder
from dcnops._shapes import DeformConvGeometry
from tests.cases import Case, conv_cases, make_conv
from tests.conftest import EmulatedRunner, assert_same_bits
from tests.cuda.emulator.host_engine import matmul, prepare_program

BRIEF = settings(settings.get_profile("brief"))


@pytest.mark.parametrize("direction", ["forward", "backward"])
@given(case=conv_cases())
@BRIEF
def test_a_signature_that_comes_again_is_replayed(case: Case, direction: str):
    runner = EmulatedRunner(chunk_bytes=40_000)
    cache = runner.programs
    arrays, options = runner._arrays(case, without="" if direction == "forward" else "bias"), ("ieee", 40_000)
    if direction == "backward":
        arrays, options = [case.grad_out, *arrays], (frozenset(case.needs), False, *options)
    plan = plans.deform_conv2d if direction == "forward" else plans.deform_conv2d_backward
    first, second, third = (cache.run(plan, case.geometry(), arrays, *options) for _ in range(3))
    assert len(cache.replays) == 1
    assert_same_bits(second, first)
    assert_same_bits(third, first)


HOPPER = Device(0, 90, 132, 227 * 1024)
LAYERS = [(128, 100, 168), (256, 50, 84), (512, 50, 84), (64, 200, 336)]


def record(layer: tuple[int, int, int], N: int, dtype: str, direction: str, workspace: int) -> Program:
    """The program of a modulated 3x3 convolution of a ResNet-50 on 132 multiprocessors; nothing is compiled or run."""
    C, H, W = layer
    images = {"input": C, "offset": 18, "mask": 9, "grad_out": C}
    forms = {name: ArrayForm((N, channels, H, W), np.dtype(dtype)) for name, channels in images.items()}
    forms |= {
        "weight": ArrayForm((C, C, 3, 3), np.dtype(dtype)),
        "bias": ArrayForm((C,), np.dtype(dtype)),
    }
    names = ("input", "offset", "weight", "bias", "mask")
    geometry = DeformConvGeometry.of(*(forms[name] for name in names), stride=1, padding=1, dilation=1)
    engine = Engine(np, lambda *_: lambda *_: None, matmul, lambda: HOPPER, lambda array: 0)
    recorder = Recorder(engine)
    if direction == "forward":
        arguments, options = [forms[name] for name in names], ("ieee", workspace)
        return recorder.record(plans.deform_conv2d, geometry, arguments, options)[0]
    arguments = [forms[name] for name in ("grad_out", "input", "offset", "weight", "mask")]
    options = (frozenset(names), False, "ieee", workspace)
    return recorder.record(plans.deform_conv2d_backward, geometry, arguments, options)[0]


def counts(program: Program) -> tuple[int, ...]:
    return tuple(sum(isinstance(step, kind) for step in program.steps) for kind in (Launch, Product, Fill))


@pytest.mark.parametrize("N", [1, 16])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("layer", LAYERS)
def test_one_chunk_takes_few_steps(layer: tuple[int, int, int], dtype: str, N: int):
    launches, products, fills = counts(record(layer, N, dtype, "forward", 2**50))
    assert launches + products <= 3 and fills == 0
    launches, products, fills = counts(record(layer, N, dtype, "backward", 2**50))
    assert (launches, products) == (5, 2) and fills <= 1


@pytest.mark.parametrize("workspace, chunks", [(2**25, 16), (2**27, 4), (2**29, 1)])
def test_a_larger_workspace_means_fewer_chunks(workspace: int, chunks: int):
    launches, products, fills = counts(record((256, 50, 84), 16, "float16", "backward", workspace))
    assert products <= 2 * chunks and launches <= 5 * chunks and fills == 1


def test_scratch_memory_that_a_plan_releases_is_used_again():
    """The images of a large batch are convolved in groups, each with its own columns."""
    C = 128
    program = record((C, 100, 168), 16, "float32", "forward", 2**27)
    assert counts(program)[1] > 8
    assert program.scratch_bytes <= 2**27 + 4 * 9 * C * C


def test_a_signature_is_recorded_at_its_second_sight_and_dropped_when_memory_is_short():
    runner = EmulatedRunner()
    case = make_conv()
    cache = ProgramCache(runner.engine, prepare_program, max_bytes=5000)
    sizes = []
    for H in (5, 5, 5, 6, 6):
        case = make_conv(H=H)
        cache.run(plans.deform_conv2d, case.geometry(), runner._arrays(case), "ieee")
        sizes.append(len(cache.replays))
    assert sizes[:3] == [0, 1, 1] and cache.replays.nbytes <= 5000


def test_the_runtime_gives_a_thread_a_context_before_its_first_launch(monkeypatch: pytest.MonkeyPatch):
    """Autograd's threads start without one, and torch's allocator may have no reason to ask the runtime for it."""
    order: list[str] = []
    driver = SimpleNamespace(launchKernel=lambda *arguments: order.append("launch"))
    runtime = SimpleNamespace(
        getDevice=lambda: 3, setDevice=lambda device: order.append(f"device {device}"), memsetAsync=None
    )
    monkeypatch.setattr(cupy_programs, "driver", driver)
    monkeypatch.setattr(cupy_programs, "runtime", runtime)

    def run() -> None:
        for _ in range(2):
            cupy_programs.issue([(0, 0, 1, 32, 1, 0, 0)], [0], 0, 0)

    for _ in range(2):
        thread = Thread(target=run)
        thread.start()
        thread.join()
    assert order == ["device 3", "launch", "launch"] * 2
