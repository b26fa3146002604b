"""Plans and emulated CUDA kernels: chunks, grids, schedules, kernels with planted bugs."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcnops._backends.cuda import plans
from dcnops._backends.cuda.kernel_source import kernel_source
from dcnops._backends.cuda.plans.array_jobs import ArrayJobsParams, ArrayTask, is_channels_last
from dcnops._backends.cuda.plans.deform_conv2d_backward import ListLimits
from tests.cases import (
    DTYPES,
    Case,
    RoIPoolCase,
    aggregate_cases,
    assert_correct,
    attention_cases,
    conv_cases,
    make_conv,
    make_roi_pool,
    roi_pool_cases,
)
from tests.conftest import EmulatedRunner, assert_same_bits
from tests.cuda.kernel_matrix import specialisations
from tests.cuda.runners import Recorder, allocations, broken, channels_last_of


@given(
    case=st.one_of(conv_cases(dtypes=("float32",), max_batch=3), roi_pool_cases()),
    chunk_bytes=st.sampled_from([1, 500, 3000, 20_000]),
)
def test_the_chunk_size_does_not_change_results(case: Case, chunk_bytes: int):
    assert_correct(EmulatedRunner(chunk_bytes=chunk_bytes), case)


@pytest.mark.parametrize(
    "options",
    [
        {"single_block": True},
        {"schedule": "reverse"},
        {"schedule": "random", "seed": 1, "single_block": True},
        {"schedule": "random", "seed": 2, "threads": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype, G, D", [("float32", 1, 1), ("float16", 2, 1), ("float64", 1, 2), ("bfloat16", 3, 3)])
def test_grids_and_schedules_do_not_change_results(options: dict[str, Any], dtype: str, G: int, D: int):
    # One block must be able to do the work of all, and no thread may rely on another having run before.
    runner = EmulatedRunner(**options)
    assert_correct(runner, make_conv(N=2, C=96, O=6, H=6, W=7, G=G, D=D, dtype=dtype, spread=0.8, seed=5))
    assert_correct(runner, make_roi_pool(C=96 // D, R=7, dtype=dtype, sampling_ratio=0, seed=5))


@given(
    case=st.one_of(
        conv_cases(dtypes=tuple(DTYPES), max_batch=3),
        roi_pool_cases(dtypes=tuple(DTYPES)),
        attention_cases(dtypes=tuple(DTYPES)),
        aggregate_cases(dtypes=tuple(DTYPES)),
    ),
    chunk_bytes=st.sampled_from([500, 2**20]),
)
def test_the_deterministic_path_equals_the_reference(case: Case, chunk_bytes: int):
    assert_correct(EmulatedRunner(chunk_bytes=chunk_bytes, deterministic=True), case)


@given(
    case=st.one_of(conv_cases(dtypes=tuple(DTYPES), max_batch=3), roi_pool_cases(dtypes=tuple(DTYPES))),
    which=st.sampled_from([("input",), ("grad_out",), ("input", "grad_out")]),
    chunk_bytes=st.sampled_from([500, 2**20]),
)
def test_channels_last_images_keep_their_memory_order(case: Case, which: tuple[str, ...], chunk_bytes: int):
    runner = EmulatedRunner(chunk_bytes=chunk_bytes)
    case = case.with_arrays(**{name: channels_last_of(getattr(case, name)) for name in which})
    assert_correct(runner, case)
    if is_channels_last(case.input):
        output = runner.forward(case)
        _, O, oh, ow = output.shape
        both_orders = output.size == 0 or O == 1 or oh * ow == 1
        assert isinstance(case, RoIPoolCase) or both_orders or is_channels_last(output)
        gradient = runner.backward(case, ("input",))["input"]
        assert gradient.strides == case.input.strides or gradient.size == 0


def test_channels_last_images_are_not_transposed():
    case = make_conv(C=8, O=8, dtype="float16")
    case = case.with_arrays(input=channels_last_of(case.input), grad_out=channels_last_of(case.grad_out))
    runner = Recorder()
    output = runner.forward(case)
    runner.backward(case, ("input", "offset", "mask"))
    assert is_channels_last(output)
    jobs = [job for params in runner.params if isinstance(params, ArrayJobsParams) for job in params.jobs]
    K = 9
    # Only the weights are transposed. Results are rounded as images of one pixel.
    assert {job.P for job in jobs if job.task == ArrayTask.PIXELS_TO_ROWS} == {K}
    assert {job.P for job in jobs if job.task == ArrayTask.ROWS_TO_PIXELS} == {1}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("chunk_bytes", [4000, 2**20])
def test_parts_of_the_output_of_a_branch_are_read_in_place(channels_last: bool, chunk_bytes: int):
    case = make_conv(N=3, C=8, D=2, dtype="float16", seed=2)
    assert case.mask is not None
    branch = np.concatenate([case.offset, case.mask], 1)
    branch = channels_last_of(branch) if channels_last else branch
    channels = case.offset.shape[1]
    parts = case.with_arrays(offset=branch[:, :channels], mask=branch[:, channels:])
    runner = EmulatedRunner(chunk_bytes=chunk_bytes)
    np.testing.assert_array_equal(runner.forward(parts), runner.forward(case))
    wanted, found = runner.backward(case), runner.backward(parts)
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
    assert is_channels_last(found["offset"]) == is_channels_last(found["mask"]) == channels_last


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kernel", [1, 3, 7])  # kernels of few and of many taps are transposed differently
def test_wide_weights_are_rounded_and_their_gradient_is_not(kernel: int, channels_last: bool):
    case = make_conv(C=8, O=4, H=9, W=8, kernel=(kernel, kernel), padding=kernel // 2, dtype="float16", seed=3)
    runner = EmulatedRunner(chunk_bytes=4000)
    wide = np.random.default_rng(0).standard_normal(case.weight.shape).astype(np.float32)
    case = case.with_arrays(weight=wide.astype(np.float16))
    weight = channels_last_of(wide) if channels_last else wide
    output, gradients = runner.forward(case), runner.backward(case)

    arrays = runner._arrays(case)
    arrays[2] = weight
    assert_same_bits(runner._run(plans.deform_conv2d, case.geometry(), arrays, workspace_bytes=4000), output)
    arrays[3:4] = []  # the bias
    options = {"needs": frozenset(case.needs), "workspace_bytes": 4000}
    found = runner._run(plans.deform_conv2d_backward, case.geometry(), [case.grad_out, *arrays], **options)
    assert found["weight"].dtype == np.float32 and found["weight"].strides == weight.strides
    np.testing.assert_array_equal(found["weight"].astype(np.float16), gradients["weight"])
    for name in set(gradients) - {"weight"}:
        np.testing.assert_array_equal(found[name], gradients[name], err_msg=name)


@given(
    case=st.one_of(
        conv_cases(dtypes=tuple(DTYPES)),
        roi_pool_cases(dtypes=tuple(DTYPES)),
        attention_cases(dtypes=tuple(DTYPES)),
        aggregate_cases(dtypes=tuple(DTYPES)),
    ),
    deterministic=st.booleans(),
)
def test_launches_stay_within_the_limits_and_the_compiled_specialisations(case: Case, deterministic: bool):
    runner = Recorder(deterministic=deterministic)
    runner.forward(case)
    runner.backward(case)
    compiled = {(s.unit, s.macros_items) for s in specialisations()}
    for unit, _, macros, grid, block, shared_bytes in runner.launches:
        assert (unit, tuple(macros.items())) in compiled
        assert 0 <= grid < 2**31 and 1 <= block[0] * block[1] <= 256
        assert shared_bytes <= (227 * 1024 if unit == "deform_conv2d_fused" else 48 * 1024)


def test_an_empty_batch_launches_no_sampling():
    runner = Recorder()
    runner.forward(make_conv(N=0))
    assert {unit for unit, *_ in runner.launches} <= {"array_jobs"}


def test_scratch_memory_is_bounded():
    case = make_conv(C=32, O=8, H=64, W=64)
    runner = EmulatedRunner(chunk_bytes=2**16)
    runner.programs = None  # which allocate all scratch memory at once
    sizes: list[int] = []
    empty = runner.engine.empty
    runner.engine.empty = lambda shape, dtype: sizes.append(array := empty(shape, dtype)) or array  # type: ignore
    runner.forward(case)
    columns = [a.nbytes for a in sizes if a.ndim == 3 and a.shape[0] != case.weight.shape[0]]
    assert max(a.nbytes for a in sizes) <= case.input.nbytes
    assert columns and max(columns) <= 2**16


@pytest.mark.parametrize("channels_last", [False, True])
def test_roi_pooling_launches_only_what_it_needs(channels_last: bool):
    case = make_roi_pool(C=8, R=6)
    if channels_last:
        case = case.with_arrays(input=channels_last_of(case.input), grad_out=channels_last_of(case.grad_out))
    transposes = [] if channels_last else ["run_array_jobs"]
    bins, samples = ["deform_roi_pool_backward"], ("offset", "mask")
    collected = ["deform_roi_pool_region_bounds", "deform_roi_pool_grad_input"]

    def launched(deterministic: bool = False, needs: tuple[str, ...] | None = None) -> list[str]:
        runner = Recorder(deterministic=deterministic)
        runner.backward(case, needs)
        return [kernel for _, kernel, *_ in runner.launches]

    runner = Recorder()
    runner.forward(case)
    assert [kernel for _, kernel, *_ in runner.launches] == [*transposes, "deform_roi_pool_forward"]
    # `zeros` fills the sums of the first two in addition.
    assert launched() == [*transposes, *bins, "run_array_jobs"]
    assert launched(needs=("input",)) == [*bins, "run_array_jobs"]
    assert launched(needs=samples) == launched(True, samples) == [*transposes, *bins]
    assert launched(True) == [*transposes, *bins, *(collected[:1]), *transposes, *collected[1:]]
    assert launched(True, ("input",)) == [*(collected[:1]), *transposes, *collected[1:]]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_scratch_memory_of_roi_pooling_is_bounded(channels_last: bool, dtype: str):
    case = make_roi_pool(C=16, H=16, W=16, R=100, output_size=3, dtype=dtype)
    if channels_last:
        case = case.with_arrays(input=channels_last_of(case.input), grad_out=channels_last_of(case.grad_out))
    transpose = 0 if channels_last else case.input.nbytes
    sums = case.input.size * 4
    bounds, chunk_bytes = 20 * 100, 4000
    assert case.grad_out.nbytes > 2 * chunk_bytes

    def scratch(chunk_bytes: int = 2**20, deterministic: bool = False) -> int:
        runner = EmulatedRunner(chunk_bytes=chunk_bytes, deterministic=deterministic)
        sizes = allocations(runner)
        gradients = runner.backward(case)
        return sum(sizes) - sum(gradient.nbytes for gradient in gradients.values())

    runner = EmulatedRunner()
    sizes = allocations(runner)
    output = runner.forward(case)
    assert sum(sizes) == output.nbytes + transpose
    assert scratch() == transpose + sums
    assert scratch(deterministic=True) == transpose + bounds + (0 if channels_last else case.grad_out.nbytes)
    parts = scratch(chunk_bytes, deterministic=True)
    assert parts == transpose + bounds if channels_last else parts <= transpose + bounds + sums + chunk_bytes


@pytest.mark.parametrize("deterministic", [False, True])
def test_arrays_may_change_during_a_call(deterministic: bool):
    """Kernels that read the same values one after the other must stay within their lists and images."""
    rng = np.random.default_rng(0)
    conv = make_conv(N=3, C=32, O=4, H=7, W=6, seed=3)
    pool = make_roi_pool(N=3, C=16, R=9, seed=4)

    def memory(address: int, *shape: int) -> np.ndarray:
        size = 4 * math.prod(shape)
        return np.frombuffer((ctypes.c_char * size).from_address(address), np.float32).reshape(shape)

    def change(params: Any) -> None:
        if hasattr(params, "lengths"):  # samples on many pixels, on one, and on none
            offset = memory(params.offset, params.size.N, *conv.offset.shape[1:])
            offset[...] = rng.choice([4, 0, 1e9]) * rng.standard_normal(offset.shape)
        if hasattr(params, "bins"):
            rois = memory(params.bins.rois, *pool.rois.shape)
            rois[:, 0] = rng.choice([0, 2, -1, 1e9, np.nan], len(rois))
            rois[:, 1:] = rng.choice([5, 1e9]) * rng.standard_normal((len(rois), 4))

    for case, options in ((conv, {"limits": ListLimits(part_entries=7, sorted_entries=40)}), (pool, {})):
        runner = EmulatedRunner(chunk_bytes=20_000, deterministic=deterministic, backward=options)
        runner.programs = None
        compiled = runner.engine.kernel

        def changing(unit: str, kernel: str, macros: Any, compiled: Any = compiled) -> Any:
            def launch(grid: Any, block: Any, shared_bytes: int, params: Any) -> None:
                change(params)
                compiled(unit, kernel, macros)(grid, block, shared_bytes, params)

            return launch

        runner.engine.kernel = changing
        for _ in range(4):
            runner.backward(case)


# Kernels with planted bugs. The emulator must catch each bug: otherwise the tests above would miss such bugs too.


ROI_BARRIERS = {
    "pooled bins are written": (
        "if (p.channels_last) continue;\n    __syncthreads();",
        "if (p.channels_last) continue;",
    ),
    "the next bins are pooled": ("    });\n    __syncthreads();\n  }\n}", "    });\n  }\n}"),
    "gradients are read": (
        "        });\n        __syncthreads();\n      }\n      const int c",
        "        });\n      }\n      const int c",
    ),
    "the next gradients are moved": ("      if (!p.channels_last) __syncthreads();", ""),
    "the pixels of a bin are read": ("        __syncwarp();\n        visit", "        visit"),
    "the rows of a bin are read": ("  __syncwarp();\n  return {__popc", "  return {__popc"),
    "the sums of warps are added": ("    __syncthreads();\n\n    const bool rows", "    const bool rows"),
    "the next sums are written": ("    __syncthreads();\n  }\n}", "  }\n}"),
}


def assert_schedules_are_correct(old: str, new: str) -> None:
    """Pool regions with the first warp ahead, with the last warp ahead, and with all mixed."""
    case = make_roi_pool(N=1, C=140, H=9, W=17, R=9, output_size=(2, 3), sampling_ratio=9, seed=1)
    for schedule in ("forward", "reverse", "random"):
        for deterministic in (False, True):
            runner = broken(old, new, schedule=schedule, single_block=True, deterministic=deterministic)
            assert_correct(runner, case)


@pytest.mark.slow
def test_roi_pooling_with_all_barriers_is_correct():
    assert_schedules_are_correct("not in the source", "")


@pytest.mark.slow
@pytest.mark.parametrize("before", ROI_BARRIERS)
def test_a_missing_barrier_of_roi_pooling_is_caught(before: str):
    old, new = ROI_BARRIERS[before]
    units = ("deform_roi_pool_forward", "deform_roi_pool_backward", "deform_roi_pool_grad_input")
    assert any(old in kernel_source(unit) for unit in units)
    with pytest.raises(AssertionError):
        assert_schedules_are_correct(old, new)


BROKEN = {
    "no barrier before samples are read": (
        "    __syncthreads();\n\n    for (int s = threadIdx.y;",
        "    for (int s = threadIdx.y;",
    ),
    "no barrier before samples are replaced": ("    __syncthreads();\n  }\n}", "  }\n}"),
    "an unwritten output": ("s < tile.samples; s += blockDim.y", "s < tile.samples - 1; s += blockDim.y"),
    "a wrong neighbour": ("point.x0 + 1 < W", "point.x0 + 1 <= W"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_planted_bugs_are_caught(name: str):
    case = make_conv(N=2, C=96, O=2, H=6, W=6, seed=1)
    options = {"schedule": "random", "seed": 3, "single_block": True}
    assert_correct(EmulatedRunner(**options), case)
    with pytest.raises(AssertionError):
        assert_correct(broken(*BROKEN[name], **options), case)
