"""Plans and emulated kernels of attention and aggregation: launches, replays, shapes on the device, planted bugs."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import dcnops
from dcnops._backends.cuda import backend, plans
from dcnops._backends.cuda.engine import Device, Engine
from dcnops._backends.cuda.programs import ArrayForm, Fill, Launch, Program, Recorder
from tests.cases import AttentionCase, Case, assert_close, assert_correct, make_aggregate, make_attention
from tests.conftest import EmulatedRunner, assert_same_bits
from tests.cuda.emulated_cupy import cupy_arguments, emulated_cupy
from tests.cuda.emulator import reports_of_each, run_each
from tests.cuda.emulator.host_engine import HOPPER, matmul
from tests.cuda.runners import broken

ENCODER = ((100, 167), (50, 84), (25, 42), (13, 21))
"""Levels of Deformable-DETR for an image of 800x1333 pixels."""


def record(N: int, Lq: int, dtype: str, direction: str, **options: Any) -> tuple[Program, list[str]]:
    """Return the program of an attention with 8 heads of 32 channels on 132 multiprocessors, and its kernels."""
    S, kernels = sum(height * width for height, width in ENCODER), []
    value, output = ArrayForm((N, S, 8, 32), np.dtype(dtype)), ArrayForm((N, Lq, 256), np.dtype(dtype))
    locations, weights = (ArrayForm((N, Lq, 8, 4, 4, *two), np.dtype("float32")) for two in ((2,), ()))
    geometry = AttentionCase.geometry_type.of(value, ENCODER, locations, weights)

    def compile(source: str, kernel: str, options: Any) -> Any:
        kernels.append(kernel.rpartition("_")[0])
        return kernels[-1]

    engine = Engine(np, compile, matmul, lambda: Device(0, 90, 132, 227 * 1024), lambda array: 0)
    recorder = Recorder(engine)
    if direction == "forward":
        program, _ = recorder.record(plans.ms_deform_attn, geometry, [value, None, locations, weights], ())
    else:
        needs = frozenset(options.pop("needs", AttentionCase.differentiable))
        forms = [output, value, None, locations, weights]
        program, _ = recorder.record(plans.ms_deform_attn_backward, geometry, forms, (needs, *options.values()))
    return program, [step.launcher for step in program.steps if isinstance(step, Launch)]  # type: ignore[misc]


def test_calls_launch_only_what_they_need():
    scatter, gather = ["deform_attention_backward"], ["deform_attention_mark_strips", "deform_attention_grad_value"]
    for dtype, rounding in (("float32", []), ("float16", ["run_array_jobs"])):
        program, kernels = record(2, 22_223, dtype, "forward")
        assert kernels == ["deform_attention_forward"] and len(program.steps) == 1 and not program.scratch_bytes
        program, kernels = record(2, 22_223, dtype, "backward")
        assert kernels == scatter + rounding and len(program.steps) == len(kernels) + 1
        assert record(2, 22_223, dtype, "backward", needs=["value"])[1] == scatter + rounding
        sampled = {"needs": ["sampling_locations", "attention_weights"]}
        for deterministic in (False, True):
            program, kernels = record(2, 22_223, dtype, "backward", **sampled, deterministic=deterministic)
            assert kernels == scatter and len(program.steps) == 1 and not program.scratch_bytes
        program, kernels = record(2, 300, dtype, "backward", deterministic=True)
        assert kernels == scatter + gather and sum(isinstance(step, Fill) for step in program.steps) == 1
        # The marks of an encoder exceed the limit: heads take turns, and below that the queries of a head.
        program, kernels = record(2, 22_223, dtype, "backward", deterministic=True, workspace=2**24)
        assert kernels == [*scatter, *gather * (len(kernels) // 2)] and len(kernels) > 3
        assert program.scratch_bytes <= 2**24 + 2**16
        program, kernels = record(1, 22_223, dtype, "backward", deterministic=True, workspace=2**20)
        assert kernels == [*scatter, *gather * ((len(kernels) - 1) // 2), *rounding] and len(kernels) > 2 * 8 + 1


def test_few_rows_have_their_points_on_more_lanes():
    """A decoder has 2400 rows of 4 lanes of 8 channels; an encoder fills the device with those lanes alone."""
    lanes = []
    for Lq in (300, 22_223):
        program, _ = record(1, Lq, "float16", "forward")
        launch = program.steps[0]
        struct = launch.kind.from_buffer_copy(program.params, launch.params)  # type: ignore[union-attr]
        lanes.append(1 << struct.lanes.row_bits)
        assert 1 << struct.lanes.lane_bits == 4
        assert 8 * launch.grid >= Lq * 8 * lanes[-1] / 32  # type: ignore[union-attr]
    assert lanes == [32, 4]


CASES: dict[str, Case] = {
    "attention": make_attention(N=2, M=3, D=24, Lq=7, points=(3, 6), spread=0.6, seed=1),
    "more channels than a warp": make_attention(N=1, M=2, D=140, Lq=3, points=(1, 40), spread=0.6, seed=2),
    "aggregation": make_aggregate(N=2, G=3, D=24, packed=True, offset_scale=0.5, remove_center=True, seed=3),
}


@pytest.mark.parametrize("multiprocessors", [0, 132], ids=["least lanes", "most lanes"])
@pytest.mark.parametrize("name", CASES)
def test_grids_schedules_and_lanes_do_not_change_results(name: str, multiprocessors: int):
    device = HOPPER._replace(multiprocessors=multiprocessors)
    for options in ({"schedule": "reverse"}, {"schedule": "random", "seed": 1, "single_block": True}):
        for deterministic in (False, True):
            assert_correct(EmulatedRunner(device=device, deterministic=deterministic, **options), CASES[name])


@pytest.mark.parametrize("chunk_bytes", [1, 2**20])
def test_deterministic_gradients_have_the_same_bits_in_any_order(chunk_bytes: int):
    case = make_attention(N=2, M=2, D=4, Lq=60, points=9, spread=0.1)
    results = []
    for options in ({"schedule": "forward"}, {"schedule": "reverse"}, {"schedule": "random", "seed": 3}):
        runner = EmulatedRunner(deterministic=True, chunk_bytes=chunk_bytes, **options)
        results.append(runner.backward(case, ("value",)))
        assert_same_bits(results[-1], results[0])
    scattered = [
        EmulatedRunner(schedule=schedule).backward(case, ("value",))["value"] for schedule in ("forward", "reverse")
    ]
    assert (scattered[0] != scattered[1]).any()  # the order of the additions would show
    assert_close(scattered[0], results[0]["value"].astype(np.float64), "float32")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_arrays_that_are_not_aligned(dtype: str):
    case = make_attention(D=16, dtype=dtype, seed=1)
    runner = EmulatedRunner()

    def shifted(array: np.ndarray) -> np.ndarray:
        memory = runner.engine.empty((array.size + 1,), array.dtype)[1:]
        memory[...] = array.ravel()
        return memory.reshape(array.shape)

    arrays = [array if array is None else shifted(array) for array in runner._arrays(case)]
    assert_close(plans.ms_deform_attn(runner.engine, case.geometry(), *arrays), case.expected(), dtype)
    needs, expected = frozenset(case.needs), case.expected_gradients()
    for deterministic in (False, True):
        gradients = plans.ms_deform_attn_backward(
            runner.engine, case.geometry(), shifted(case.grad_out), *arrays, needs, deterministic
        )
        for name in needs:
            assert_close(gradients[name], expected[name], dtype, name)


def run_on_device(case: AttentionCase, shapes: Any, dtype: str, **options: Any) -> list[np.ndarray]:
    """Return the output and the gradients of the public functions with the shapes in the memory of the device."""
    with emulated_cupy() as stand_in:
        arguments = cupy_arguments(stand_in, case)
        arguments["spatial_shapes"] = stand_in.asarray(np.array(shapes, dtype))
        gradients = dcnops.ms_deform_attn_backward(**arguments, **options)
        del arguments["grad_out"]
        return [np.asarray(array) for array in (dcnops.ms_deform_attn(**arguments), *gradients)]


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_shapes_on_the_device_are_cut_off(dtype: str, deterministic: bool):
    case = make_attention(N=2, points=(2, 3), Lq=9, spread=0.6)
    last = np.iinfo(dtype).max
    for given, used in (
        (((6, 4), (3, 2)), ((6, 4), (3, 2))),
        (((6, 4), (5, 2)), ((6, 4), (3, 2))),
        (((100, 4), (3, 2)), ((7, 4), (1, 2))),
        (((last, 4), (last, 2)), ((7, 4), (1, 2))),
    ):
        host = case.with_arrays(spatial_shapes=used)
        found = run_on_device(case, given, dtype, deterministic=deterministic)
        expected = host.expected_gradients()
        assert_close(found[0], host.expected(), "float32")
        for name, gradient in zip(case.needs, found[1:], strict=True):
            assert_close(gradient, expected[name], "float32", name)
    # Levels without pixels contribute nothing.
    for given in (
        ((-1, 4), (-last - 1, -last - 1)),
        ((0, 4), (6, 0)),
        ((-6, -4), (0, 0)),
    ):
        assert not any(array.any() for array in run_on_device(case, given, dtype, deterministic=deterministic))
    for given in (((last, last), (last, last)), ((-1, last), (3, 2)), ((1, 1), (1, 1))):
        for array in run_on_device(case, given, dtype, deterministic=deterministic):
            assert np.isfinite(array).all()


@pytest.mark.parametrize("make", [make_attention, make_aggregate])
def test_a_signature_that_comes_again_plans_nothing(make: Any, monkeypatch: pytest.MonkeyPatch):
    case = make(D=4, dtype="float16", offset_dtype="float32")
    expected, expected_gradients = case.expected(), case.expected_gradients()
    with emulated_cupy() as stand_in:
        arguments = cupy_arguments(stand_in, case)
        for call in range(3):
            if call == 2:  # a plan would ask for its kernels
                monkeypatch.setattr(backend.ENGINE, "kernel", None)
            gradients = getattr(dcnops, f"{case.operation}_backward")(**arguments)
            output = getattr(dcnops, case.operation)(**{k: v for k, v in arguments.items() if k != "grad_out"})
            assert_close(np.asarray(output), expected, "float16")
            for name in case.needs:
                assert_close(np.asarray(getattr(gradients, name)), expected_gradients[name], "float16", name)
        assert len(backend.PROGRAMS.replays) == 2


def test_strided_arrays_are_copied():
    case = make_aggregate(N=2, D=4, seed=1)
    arrays = {name: getattr(case, name) for name in (*case.arrays, "grad_out")}
    strided = case.with_arrays(**{name: array.swapaxes(1, 2).copy().swapaxes(1, 2) for name, array in arrays.items()})
    with emulated_cupy() as stand_in:
        arguments = cupy_arguments(stand_in, strided)
        gradients = dcnops.deform_aggregate_backward(**arguments)
        assert stand_in.copies == 4
    for name, expected in case.expected_gradients().items():
        assert_close(np.asarray(getattr(gradients, name)), expected, "float32", name)


# Kernels with planted bugs. The emulator must catch each: otherwise the tests above would miss such bugs too.

BARRIERS = {
    "the samples are read": ("      __syncwarp();\n      if (has_channels) {", "      if (has_channels) {"),
    "the next samples are written": ("      __syncwarp();\n    }\n    for (int step", "    }\n    for (int step"),
    "the samples are differentiated": ("      __syncwarp();\n      // All lanes", "      // All lanes"),
    "the dot products are read": ("      __syncwarp();\n      if (!is_sampled)", "      if (!is_sampled)"),
    "the levels are added up": ("  __syncthreads();\n  if (thread_of_block()", "  if (thread_of_block()"),
    "the levels are read": (
        "    }\n  }\n  __syncthreads();\n}\n\nstruct QueryHead",
        "    }\n  }\n}\n\nstruct QueryHead",
    ),
    "the sums of warps are added": ("partial);\n    __syncthreads();\n", "partial);\n"),
    "the next sums are written": ("    __syncthreads();\n  }\n}", "  }\n}"),
}


@pytest.mark.slow
def test_a_missing_barrier_is_caught():
    # In other processes, because memory that has not been written yet leads kernels out of their arrays.
    command = [sys.executable, "-m", "tests.cuda.test_deform_attention"]
    result = subprocess.run(command, timeout=600, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    reports = reports_of_each(result.stderr)
    assert set(reports) == set(BARRIERS)
    for name, (status, report) in reports.items():
        assert status != 0 and "KernelCompileError" not in report, f"{name}: {report[-3000:]}"


def _run_without_barrier(old: str, new: str) -> None:
    case = make_attention(N=2, M=3, D=24, Lq=3, points=(30, 50), spread=0.6, seed=1)
    for schedule in ("forward", "reverse", "random"):
        for deterministic in (False, True):
            runner = broken(old, new, schedule=schedule, single_block=True, deterministic=deterministic)
            assert_correct(runner, case)


if __name__ == "__main__":
    _run_without_barrier("not in the source", "")
    run_each(BARRIERS, lambda name: _run_without_barrier(*BARRIERS[name]))
