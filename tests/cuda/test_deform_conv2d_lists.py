"""Emulated backward kernels of the convolution: lists of any length, chunks, scratch memory, launches."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcnops._backends.cuda.plans.array_jobs import is_channels_last
from dcnops._backends.cuda.plans.deform_conv2d_backward import Divisor, ListLimits, divisor
from tests.cases import DTYPES, ConvCase, assert_close, conv_cases, make_conv
from tests.conftest import EmulatedRunner
from tests.cuda.emulator import HostCompiler, HostKernel, KernelFault, is_sanitized
from tests.cuda.runners import Recorder, allocations, broken, channels_last_of

SHORT = ListLimits(part_entries=7, sorted_entries=5)
"""Limits that turn lists of a few entries into long lists."""

MODES = {"default": False, "deterministic": True}


def runner_of(mode: str, limits: ListLimits = SHORT, **options: Any) -> EmulatedRunner:
    return EmulatedRunner(deterministic=MODES[mode], backward={"limits": limits}, **options)


def assert_gradients(runner: EmulatedRunner, case: ConvCase) -> None:
    gradients, expected = runner.backward(case), case.expected_gradients()
    for name in case.needs:
        assert_close(gradients[name], expected[name], case.dtype, name)


def on_one_pixel(case: ConvCase, y: float = 3.25, x: float = 2.5) -> ConvCase:
    """Move every sampling point of a case with stride 1 and padding 1 to (y, x)."""
    _, channels, oh, ow = case.offset.shape
    a, b = np.indices((oh, ow))
    i, j = np.divmod(np.arange(channels // 2) % 9, 3)
    offset = np.empty(case.offset.shape, np.float32)
    offset[:, 0::2] = y - (a[None] - 1 + i[:, None, None])
    offset[:, 1::2] = x - (b[None] - 1 + j[:, None, None])
    return case.with_arrays(offset=offset.astype(case.offset.dtype))


@pytest.mark.parametrize("mode", MODES)
@given(
    case=conv_cases(dtypes=tuple(DTYPES), max_batch=3, C=64),
    limits=st.builds(ListLimits, st.sampled_from([1, 3, 40, 1024]), st.sampled_from([1, 6, 33, 256])),
    chunk_bytes=st.sampled_from([1, 20_000, 2**20]),
)
def test_equals_the_reference(mode: str, case: ConvCase, limits: ListLimits, chunk_bytes: int):
    assert_gradients(runner_of(mode, limits, chunk_bytes=chunk_bytes), case)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("limits", [SHORT, ListLimits()], ids=["short limits", "default limits"])
@pytest.mark.parametrize("D, dtype", [(1, "float32"), (2, "float16"), (1, "float64")])
def test_all_samples_on_one_pixel(mode: str, limits: ListLimits, D: int, dtype: str):
    # 16 x 10 pixels and 9 taps make four lists of 1440 entries, above both default limits.
    case = on_one_pixel(make_conv(C=64, O=3, H=16, W=10, D=D, dtype=dtype, offset_dtype=dtype, seed=2))
    assert_gradients(runner_of(mode, limits), case)


@pytest.mark.slow
@pytest.mark.parametrize("limits", [SHORT, ListLimits()], ids=["short limits", "default limits"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_deterministic_mode_gives_the_same_bits_under_any_schedule(dtype: str, limits: ListLimits):
    crowded = make_conv(N=2, C=64, O=3, H=8, W=6, D=2, dtype=dtype, spread=3.0, seed=6)
    for case in (crowded, on_one_pixel(crowded)):
        runs = [
            runner_of("deterministic", limits, schedule="random", seed=seed, threads=1 + seed % 2).backward(case)
            for seed in range(3)
        ]
        for run in runs[1:]:
            for name, gradient in run.items():
                np.testing.assert_array_equal(gradient, runs[0][name], err_msg=name)


def test_the_default_mode_does_not_give_the_same_bits():
    case = on_one_pixel(make_conv(C=64, O=3, H=8, W=6, seed=6))
    runs = [runner_of("default", schedule="random", seed=seed).backward(case, ("input",)) for seed in range(6)]
    assert any((run["input"] != runs[0]["input"]).any() for run in runs[1:])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@given(
    case=conv_cases(dtypes=("float32", "float16"), max_batch=2, C=32),
    which=st.sets(st.sampled_from(["input", "grad_out", "offset", "mask"]), min_size=1),
)
def test_memory_orders(mode: str, case: ConvCase, which: set[str]):
    given_arrays = {name: getattr(case, name) for name in which}
    case = case.with_arrays(
        **{name: channels_last_of(array) for name, array in given_arrays.items() if array is not None}
    )
    runner = runner_of(mode)
    assert_gradients(runner, case)
    for name, gradient in runner.backward(case).items():
        if gradient.size and is_channels_last(getattr(case, name)):
            assert is_channels_last(gradient), name


ORDERS = {"NCHW": (), "NHWC": ("input", "offset", "mask", "grad_out")}


def in_order(case: ConvCase, order: str) -> ConvCase:
    return case.with_arrays(**{name: channels_last_of(getattr(case, name)) for name in ORDERS[order]})


def kernels_and_products(runner: Recorder, case: ConvCase, needs: tuple[str, ...] | None = None) -> tuple[list, int]:
    """Run the backward pass, and return the kernels and the number of matrix products."""
    products = []
    multiply = runner.engine._matmul
    runner.engine._matmul = lambda *args: (products.append(1), multiply(*args))  # type: ignore[assignment]
    runner.backward(case, needs)
    return [kernel for _, kernel, *_ in runner.launches], len(products)


PREPARE = ["deform_conv2d_prepare", "deform_conv2d_fill_lists"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_seven_launches_at_most(dtype: str, order: str, mode: str):
    # For columns that fit in one chunk. The matrix products count.
    case = in_order(make_conv(C=32, O=8, H=8, W=8, dtype=dtype), order)
    gather = "deform_conv2d_gather_input" + ("_in_order" if MODES[mode] else "")
    expected = [*PREPARE, gather, "deform_conv2d_grad_samples", "run_array_jobs"], 2
    assert kernels_and_products(Recorder(deterministic=MODES[mode]), case) == expected


@pytest.mark.parametrize(
    "needs, kernels, products",
    [
        ("bias", ["run_array_jobs"] * 2, 0),
        ("weight", ["run_array_jobs", "deform_conv2d_columns", "run_array_jobs"], 1),
        ("offset", ["run_array_jobs", "deform_conv2d_grad_samples"], 1),
        ("input", [*PREPARE, "deform_conv2d_gather_input", "run_array_jobs"], 1),
    ],
)
def test_only_what_is_needed_is_launched(needs: str, kernels: list[str], products: int):
    assert kernels_and_products(Recorder(), make_conv(C=32), (needs,)) == (kernels, products)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("chunk_bytes", [2**15, 2**17, 2**22])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_scratch_memory_keeps_to_the_documented_bound(mode: str, order: str, chunk_bytes: int, dtype: str):
    case = in_order(make_conv(N=3, C=32, O=8, H=16, W=16, D=1, dtype=dtype), order)
    runner = runner_of(mode, ListLimits(), chunk_bytes=chunk_bytes)
    sizes = allocations(runner)
    gradients = runner.backward(case)
    scratch = sum(sizes) - sum(gradient.nbytes for gradient in gradients.values())
    g, s, S = case.geometry(), case.input.itemsize, 4
    together = order == "NHWC"
    weights = g.O * g.C * g.K * (s + S)
    once = weights + g.O * S * g.N + 256
    image = g.H * g.W * (0 if together else g.C * s) + (0 if together and s == S else g.H * g.W * g.C * S)
    image += 8 * g.H * g.W * g.D
    grad_out = 0 if together else g.pixels * g.O * s
    row = g.K * g.C * s + 8 * g.D * g.K * S + g.D * g.K / 16
    assert scratch <= once + max(chunk_bytes, image + grad_out + max(chunk_bytes / 2, row)) + 256
    if chunk_bytes == 2**22:
        assert scratch <= once + chunk_bytes


class Divisions(ctypes.Structure):
    _fields_ = [
        ("by", Divisor),
        ("numbers", ctypes.c_void_p),
        ("quotients", ctypes.c_void_p),
        ("remainders", ctypes.c_void_p),
        ("count", ctypes.c_int),
    ]


@functools.cache
def dividing_kernel() -> HostKernel:
    source = (Path(__file__).parents[2] / "cuda" / "dcn" / "rows.cuh").read_text()
    source += """
    struct Divisions { Divisor by; const unsigned* numbers; unsigned *quotients, *remainders; int count; };
    extern "C" __global__ void __launch_bounds__(256) divide_f32(const Divisions p) {
      for (int i = threadIdx.x; i < p.count; i += blockDim.x) {
        const Division result = divide(p.numbers[i], p.by);
        p.quotients[i] = result.quotient;
        p.remainders[i] = result.remainder;
      }
    }
    """
    return HostCompiler(sanitize=is_sanitized()).compile(source, "divide_f32", ("--std=c++17",))


_DIVISORS = sorted(
    {d for k in range(32) for d in (2**k - 1, 2**k, 2**k + 1) if 1 <= d < 2**31} | {9, 25, 84, 2**31 - 3}
)


def assert_divides(value: int, *more: int) -> None:
    """Check numbers below 2**31: those where the quotient changes, both ends, and `more`."""
    last = (2**31 - 1) // value * value
    edges = {edge + step for edge in (0, value, last // value // 2 * value, last) for step in (-1, 0, 1)}
    numbers = np.array(sorted(n for n in edges | {2**31 - 1, *more} if 0 <= n < 2**31), np.uint32)
    quotients, remainders = np.empty_like(numbers), np.empty_like(numbers)
    addresses = (array.ctypes.data for array in (numbers, quotients, remainders))
    dividing_kernel()(1, (32, 1), 0, Divisions(divisor(value), *addresses, len(numbers)))
    np.testing.assert_array_equal(quotients, numbers // value)
    np.testing.assert_array_equal(remainders, numbers % value)


@pytest.mark.parametrize("value", _DIVISORS)
def test_division_by_multiplication_at_its_edges(value: int):
    assert_divides(value)


@given(value=st.integers(1, 2**31 - 1), numbers=st.lists(st.integers(0, 2**31 - 1), min_size=8, max_size=8))
def test_division_by_multiplication(value: int, numbers: list[int]):
    assert_divides(value, *numbers)


BROKEN = {
    "lists end early": ("p.starts[task], p.starts[task + 1]}", "p.starts[task], max(p.starts[task + 1] - 1, 0)}"),
    "lists start one late": ("int start = total + up_to - sum;", "int start = total + up_to - sum + (warp > 0);"),
    "parts are forgotten": ("p.lists + p.counters->parts", "p.lists"),
    "blocks do not wait for the last": ("return last;", "return blockIdx.x == 0;"),
    "no order": ("order.order[rank] =", "order.order[i] ="),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_planted_bugs_are_caught(name: str):
    deterministic = name == "no order"
    case = on_one_pixel(make_conv(N=2, C=32, O=3, H=9, W=8, seed=1)) if name == "parts are forgotten" else None
    case = case or make_conv(C=32, O=3, H=26, W=21, spread=2.0, seed=1)  # the first warp starts 512 of the lists
    limits = ListLimits() if deterministic else ListLimits(part_entries=100)
    options: dict[str, Any] = {"schedule": "random", "deterministic": deterministic, "backward": {"limits": limits}}
    expected, sums = case.expected_gradients()["input"], []
    for seed, bug in ((0, ("", "")), *((seed, BROKEN[name]) for seed in range(3))):
        runner = broken(*bug, **options, seed=seed, chunk_bytes=150_000)
        try:
            sums.append(runner.backward(case, ("input",))["input"])
            assert_close(sums[-1], expected, "float32")
        except (AssertionError, KernelFault):
            assert bug[0], "the kernels are wrong without the bug"
            return
    # Sums in a different order each time.
    assert deterministic and any((one != sums[1]).any() for one in sums[2:])
