"""Emulated fused kernel of the forward convolution: tensor cores, tiles, split sums, choice of the algorithm."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcnops._backends.cuda import heuristics
from dcnops._backends.cuda.engine import Device
from dcnops._backends.cuda.heuristics import (
    FUSED_NEEDS,
    FUSED_PAYS,
    ForwardProblem,
    choose_path,
    choose_splits,
    choose_tiles,
)
from dcnops._backends.cuda.plans.array_jobs import is_channels_last
from tests.arrays.test_deform_conv2d import FAR
from tests.cases import ConvCase, assert_close, conv_cases, make_conv
from tests.conftest import EmulatedRunner, share_of_examples
from tests.cuda.emulator import HOPPER, KernelFault
from tests.cuda.runners import broken, channels_last_of

PRECISIONS = {
    "float16": ("ieee",),
    "bfloat16": ("ieee",),
    "float32": ("ieee", "tf32", "3xtf32"),
}
KINDS = [(dtype, precision) for dtype, precisions in PRECISIONS.items() for precision in precisions]
KIND_NAMES = [dtype if precision == "ieee" else precision for dtype, precision in KINDS]
KINDS_IN_DETAIL = [
    pytest.param(*kind, marks=pytest.mark.exhaustive) if kind[0] == "bfloat16" else kind for kind in KINDS
]
"""Parameters of slow tests, in which bfloat16 repeats the cases of float16."""

# TF32 has the 10 bits of float16.
TOLERANCE_OF = {"tf32": "float16"}

SINGLE = Device(0, 90, 1, 227 * 1024)
"""A device that a few blocks fill."""

MANY = Device(0, 90, 132, 227 * 1024)
"""A device with enough multiprocessors for sums to be split."""

AMPERE = Device(0, 80, 4, 163 * 1024)
"""A device without the instructions of warpgroups."""

SMALL_MEMORY = Device(0, 89, 1, 99 * 1024)


def fused(precision: str = "ieee", device: Device = HOPPER, **options: Any) -> EmulatedRunner:
    return EmulatedRunner(forward={"path": "fused", "precision": precision}, device=device, **options)


def assert_fused(runner: EmulatedRunner, case: ConvCase) -> None:
    precision = runner.forward_options["precision"]
    assert_close(runner.forward(case), case.expected(), TOLERANCE_OF.get(precision, case.dtype))


@st.composite
def fused_cases(draw: st.DrawFn, dtype: str, **fixed: Any) -> ConvCase:
    """Draw calls that the fused kernel can run."""
    vector = 4 if dtype == "float32" else 8
    segment = vector * draw(st.sampled_from([1, 2, 3, 5, 9, 17]))
    small, large = draw(st.sampled_from([(1, 1), (1, 2), (1, 3), (2, 2), (2, 4)]))
    G, D = (small, large) if draw(st.booleans()) else (large, small)
    outputs = [1, 5, 33]
    if dtype == "float16":  # each number of outputs and type of offsets is another kernel
        outputs.append(65)
    if dtype == "bfloat16":
        fixed = {"offset_dtype": "float32", **fixed}
    return draw(conv_cases(dtypes=(dtype,), C=segment * large, G=G, D=D, O=G * draw(st.sampled_from(outputs)), **fixed))


@pytest.mark.parametrize("dtype, precision", KINDS, ids=KIND_NAMES)
@given(data=st.data())
def test_equals_the_reference(dtype: str, precision: str, data: st.DataObject):
    device = data.draw(st.sampled_from([HOPPER, MANY, AMPERE]))
    assert_fused(fused(precision, device), data.draw(fused_cases(dtype, max_batch=3)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype, precision", KINDS_IN_DETAIL, ids=KIND_NAMES)
@pytest.mark.parametrize(
    "outputs, device",
    [
        (60, HOPPER),
        (130, HOPPER),
        (300, HOPPER),
        (60, AMPERE),
        (130, AMPERE),
        (300, AMPERE),
        (130, SMALL_MEMORY),
    ],
)
def test_tiles_of_every_width(dtype: str, precision: str, outputs: int, device: Device):
    # More pixels than a tile has, bands of different heights, and a last tile that is partly empty.
    case = make_conv(N=2, C=72, O=outputs, H=11, W=13, dtype=dtype, kernel=(2, 1), padding=0, seed=3)
    problem = ForwardProblem(case.geometry(), dtype, precision, device)
    wide = outputs > 128 and device is not SMALL_MEMORY and problem.has_tensor_product and precision != "3xtf32"
    middle = outputs > 64 and precision != "3xtf32"
    assert choose_tiles(problem).outputs == (256 if wide else 128 if middle else 64)
    assert_fused(fused(precision, device), case)


@pytest.mark.slow
@share_of_examples(1 / 2)
@given(data=st.data(), which=st.sets(st.sampled_from(["input", "offset", "mask"]), min_size=1))
def test_memory_orders(data: st.DataObject, which: set[str]):
    dtype = data.draw(st.sampled_from(["float16", "float32"]))
    case = data.draw(fused_cases(dtype, mask=True))
    case = case.with_arrays(**{name: channels_last_of(getattr(case, name)) for name in which})
    runner = fused(device=data.draw(st.sampled_from([HOPPER, MANY])))
    assert_fused(runner, case)
    output = runner.forward(case)
    if is_channels_last(case.input) and output.size:
        assert is_channels_last(output) or (output.flags.c_contiguous and 1 in (output.shape[1], output[0, 0].size))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype, precision", KINDS, ids=KIND_NAMES)
def test_split_sums(dtype: str, precision: str, layout: str):
    case = make_conv(N=2, C=96, O=70, H=9, W=8, dtype=dtype, seed=4)
    if layout == "NHWC":
        case = case.with_arrays(input=channels_last_of(case.input))
    problem = ForwardProblem(case.geometry(), dtype, precision, MANY)
    assert choose_splits(problem, choose_tiles(problem), 2**20) > 1
    assert_fused(fused(precision, MANY), case)


@pytest.mark.slow
@share_of_examples(1 / 4)
@given(data=st.data(), chunk_bytes=st.sampled_from([1, 2000, 20_000]))
def test_groups_of_images_do_not_change_results(data: st.DataObject, chunk_bytes: int):
    case = data.draw(fused_cases("float16", max_batch=5))
    whole = fused().forward(case)
    np.testing.assert_array_equal(fused(chunk_bytes=chunk_bytes).forward(case), whole)


@pytest.mark.slow
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
@pytest.mark.parametrize("device", [HOPPER, MANY], ids=["whole", "split"])
@pytest.mark.parametrize("dtype, precision", KINDS_IN_DETAIL, ids=KIND_NAMES)
def test_grids_and_schedules_do_not_change_results(dtype: str, precision: str, device: Device, options: dict[str, Any]):
    case = make_conv(N=2, C=80, O=66, H=9, W=8, G=2, dtype=dtype, kernel=(2, 2), seed=5)
    first = fused(precision, device).forward(case)
    np.testing.assert_array_equal(fused(precision, device, **options).forward(case), first)


@pytest.mark.parametrize("dtype, precision", KINDS, ids=KIND_NAMES)
@share_of_examples(1 / 2)
@given(values=st.lists(st.sampled_from([np.nan, *FAR]), min_size=1, max_size=4), seed=st.integers(0, 2**32 - 1))
def test_any_offset_follows_the_reference(dtype: str, precision: str, values: list[float], seed: int):
    case = make_conv(C=8, O=3, H=5, W=6, dtype=dtype, spread=0.4, seed=seed)
    offset = case.offset.copy()
    for value, at in zip(values, np.random.default_rng(seed).random(len(values))):
        with np.errstate(over="ignore"):
            offset.reshape(-1)[int(at * offset.size) : int(at * offset.size) + 1] = value
    assert_fused(fused(precision), case.with_arrays(offset=offset))


@pytest.mark.parametrize("dtype, precision", KINDS, ids=KIND_NAMES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_bad_pixels_and_weights_follow_the_reference(dtype: str, precision: str, value: float):
    # Infinity stays infinity, even if three products replace one. A pixel of weight 0 is ignored.
    case = make_conv(C=8, O=3, H=6, W=6, mask=False, spread=0.0, dtype=dtype)
    image, weight = case.input.copy(), case.weight.copy()
    image[0, 3, 2, 2] = value
    assert_fused(fused(precision), case.with_arrays(input=image))
    weight[1, 3, 0, 2] = value
    image = (np.abs(image) + 1).astype(case.input.dtype)  # NumPy 2.0 would make float32 of bfloat16
    image[0, 3, 2, 2] = 1
    inside = case.with_arrays(input=image, weight=weight, padding=0, offset=case.offset[:, :, 1:-1, 1:-1])
    assert_fused(fused(precision), inside)


def test_three_products_are_nearly_as_accurate_as_float32():
    case = make_conv(N=1, C=256, O=32, H=6, W=6, seed=8)
    expected = case.expected()
    errors = {p: np.abs(fused(p).forward(case) - expected).max() for p in ("ieee", "tf32", "3xtf32")}
    assert errors["3xtf32"] <= 4 * errors["ieee"] + 1e-7
    assert errors["tf32"] >= 20 * errors["3xtf32"]


# ---- the choice of the algorithm


def problem_of(dtype: str = "float16", precision: str = "ieee", device: Device = MANY, **sizes: Any) -> ForwardProblem:
    case = make_conv(**{"C": 128, "O": 128, "H": 6, "W": 6, **sizes})
    return ForwardProblem(case.geometry(), dtype, precision, device)


@pytest.mark.parametrize(
    "problem, reason",
    [
        (problem_of(device=Device(0, 75, 40, 64 * 1024)), "compute capability 8.0"),
        (problem_of("float64"), "float64 goes through columns"),
        (problem_of(C=68), "16 bytes at a time"),
        (problem_of(C=96, G=2, D=3), "one contains the other"),
        (problem_of(device=SINGLE._replace(shared_bytes=48 * 1024)), "fit into shared memory"),
        (problem_of(C=64, D=4), "less than half"),
        (problem_of(O=16), "64 outputs"),
        (problem_of("float32", N=9, device=SINGLE), "without tensor cores"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_reasons_for_columns(problem: ForwardProblem, reason: str):
    reasons = heuristics.reasons_against(FUSED_NEEDS, problem) + heuristics.reasons_against(FUSED_PAYS, problem)
    assert len(reasons) == 1 and reason in reasons[0]
    assert choose_path(problem) == "columns"


def test_choices_of_the_fused_kernel():
    assert choose_path(problem_of()) == "fused"
    assert choose_path(problem_of("float32")) == "fused"
    for precision in ("tf32", "3xtf32"):
        assert choose_path(problem_of("float32", precision, SINGLE, N=9)) == "fused"
    assert choose_path(problem_of(C=32, D=32, device=HOPPER)) == "columns"


def test_an_impossible_path_is_an_error():
    with pytest.raises(ValueError, match="float64 goes through columns; channels move 16 bytes at a time"):
        fused().forward(make_conv(C=1, dtype="float64"))


@given(
    N=st.integers(1, 40),
    C=st.sampled_from([32, 64, 128, 512]),
    O=st.sampled_from([32, 64, 128, 192, 512]),
    side=st.integers(1, 60),
    K=st.sampled_from([1, 3, 5]),
    G=st.sampled_from([1, 2, 4]),
    multiprocessors=st.integers(1, 200),
    dtype=st.sampled_from(KINDS),
)
def test_choices_are_legal_for_all_shapes(
    N: int, C: int, O: int, side: int, K: int, G: int, multiprocessors: int, dtype: tuple[str, str]
):
    geometry = make_conv(N=1, C=C, O=O, H=1, W=1, kernel=(K, K), padding=K // 2, G=G).geometry()
    geometry = replace(geometry, N=N, H=side, W=side, oh=side, ow=side)
    problem = ForwardProblem(geometry, *dtype, Device(0, 90, multiprocessors, 227 * 1024))
    tiles = choose_tiles(problem)
    budget = 2**25
    splits = choose_splits(problem, tiles, budget)
    assert 1 <= splits <= problem.steps
    if splits > 1:
        assert splits * N * side * side * O * 4 <= budget
        assert problem.blocks(tiles.outputs) * splits <= multiprocessors
    assert tiles.shared_bytes <= problem.device.shared_bytes
    assert tiles.outputs in (64, 128, 256)


@pytest.mark.parametrize("path", ["fused", "columns"])
@pytest.mark.parametrize("G, D", [(1, 1), (2, 1), (1, 2), (4, 4)])
@pytest.mark.parametrize("N, chunk_bytes", [(3, 2**20), (3, 9000), (3, 1000)])
def test_both_paths_equal_the_reference(path: str, G: int, D: int, N: int, chunk_bytes: int):
    # Chunks of columns have whole images, or parts of one, or an image per weight group.
    case = make_conv(N=N, C=32, O=12, H=6, W=5, G=G, D=D, seed=10)
    runner = EmulatedRunner(forward={"path": path}, chunk_bytes=chunk_bytes)
    assert_close(runner.forward(case), case.expected(), "float32")


# ---- planted bugs

BROKEN = {
    "no barrier before a step": (
        AMPERE,
        "    wait_for_copies<0>();\n    __syncthreads();",
        "    wait_for_copies<0>();",
    ),
    "no barrier before a step of warpgroups": (
        HOPPER,
        "    show_to_products();\n    __syncthreads();",
        "    show_to_products();",
    ),
    "no wait for the filters": (AMPERE, "    wait_for_copies<0>();\n", ""),
    "no wait for the filters of warpgroups": (HOPPER, "    wait_for_copies<0>();\n", ""),
    "no wait for the products": (HOPPER, "    product.finish();\n", ""),
    "a tile that is still multiplied": (HOPPER, "shared.a[tiles ^ 1]", "shared.a[tiles]"),
    "weights of the wrong side": (AMPERE, "      side ^= 1;\n", ""),
    "weights of the wrong side for warpgroups": (
        HOPPER,
        "const int next_side = side",
        "const int next_side = side ^ 1",
    ),
    "a pixel in another's place": (HOPPER, "row * p.size.ow + column}", "row * p.size.ow + column / 2}"),
}


def break_fused(old: str, new: str, **options: Any) -> EmulatedRunner:
    runner = broken(old, new, **options)
    runner.forward_options = {"path": "fused", "precision": "ieee"}
    return runner


BROKEN_CASE = make_conv(N=1, C=136, O=66, H=11, W=7, dtype="float16", seed=1)
SCHEDULES = [{"schedule": "random", "seed": seed, "single_block": True} for seed in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize("device", [AMPERE, HOPPER], ids=["ampere", "hopper"])
def test_no_schedule_changes_a_correct_kernel(device: Device):
    for options in SCHEDULES:
        assert_fused(fused(device=device, **options), BROKEN_CASE)


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_planted_bugs_are_caught(name: str):
    device, old, new = BROKEN[name]
    for options in SCHEDULES:
        try:
            assert_fused(break_fused(old, new, device=device, **options), BROKEN_CASE)
        except (AssertionError, KernelFault):
            return
    pytest.fail("no schedule shows the bug")
