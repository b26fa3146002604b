"""The NHWC layout gives the results of NCHW; and the kernel that transposes, sums and fills, with each of its jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dcnops
from dcnops._arguments import check_layout
from dcnops._backends.cuda.engine import Engine
from dcnops._backends.cuda.plans.array_jobs import (
    RowRange,
    channel_sums_jobs,
    fill_job,
    pixels_to_rows_job,
    rows_to_pixels_job,
    run_array_jobs,
    sum_dtype,
)
from tests.cases import DTYPES, Case, assert_close, conv_cases, make_conv, make_roi_pool, roi_pool_cases
from tests.cuda.emulated_cupy import emulated_cupy
from tests.cuda.emulator import host_engine

# Sizes around the borders of tiles, of 16-byte pieces and of pairs.
EDGES = (1, 2, 3, 4, 6, 8, 9, 16, 31, 32, 33, 40, 63, 64, 65, 72, 127, 128, 129, 136)

IMAGES = {"deform_conv2d": ("input", "offset", "mask", "grad_out"), "deform_roi_pool": ("input", "grad_out")}


def to_nhwc(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1))


@dataclass
class Library:
    """Array library of a call, or its stand-in."""

    asarray: Callable[[np.ndarray], Any]
    exact: bool
    """True if both layouts give the same bits."""


@pytest.fixture(scope="module", params=["numpy", "emulated"])
def library(request: pytest.FixtureRequest) -> Iterator[Library]:
    if request.param == "numpy":
        yield Library(asarray=np.asarray, exact=True)
        return
    with emulated_cupy() as stand_in:
        yield Library(stand_in.asarray, exact=False)


def arguments_of(case: Case, library: Library, layout: str) -> dict[str, Any]:
    images = IMAGES[case.operation]

    def prepared(name: str, value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        return library.asarray(to_nhwc(value) if layout == "NHWC" and name in images else value)

    arguments = {**case.arguments(), "grad_out": case.grad_out}
    return {"layout": layout, **{name: prepared(name, value) for name, value in arguments.items()}}


def both_directions(case: Case, arguments: dict[str, Any]) -> dict[str, Any]:
    forward = {name: value for name, value in arguments.items() if name != "grad_out"}
    output = getattr(dcnops, case.operation)(**forward)
    gradients = getattr(dcnops, f"{case.operation}_backward")(**arguments)
    return {"output": output, **{name: getattr(gradients, name) for name in case.needs}}


def assert_layouts_agree(case: Case, library: Library) -> None:
    images = ("output", *IMAGES[case.operation])
    nhwc = both_directions(case, arguments_of(case, library, "NHWC"))
    nchw = both_directions(case, arguments_of(case, library, "NCHW"))
    expected = {"output": case.expected(), **case.expected_gradients()}
    for name, result in nhwc.items():
        assert result.flags.c_contiguous, name
        assert result.dtype == nchw[name].dtype
        as_nchw = result.transpose(0, 3, 1, 2) if name in images else result
        if library.exact:
            np.testing.assert_array_equal(as_nchw, nchw[name], err_msg=name)
        assert_close(as_nchw, expected[name], case.dtype, name)


@given(case=st.one_of(conv_cases(dtypes=tuple(DTYPES)), roi_pool_cases(dtypes=tuple(DTYPES))))
def test_nhwc_equals_nchw(library: Library, case: Case):
    assert_layouts_agree(case, library)


@pytest.mark.parametrize(
    "case",
    [
        make_conv(N=0),
        make_conv(C=1, O=3),
        make_conv(C=3, O=1, H=1, W=1, kernel=(1, 1), padding=0),
        make_conv(C=2, O=2, H=1, W=1),
        make_roi_pool(R=0),
        make_roi_pool(C=1),
        make_roi_pool(H=1, W=1, output_size=1),
    ],
    ids=["no images", "one channel", "one pixel", "one pixel padded", "no regions", "one plane", "one bin"],
)
def test_shapes_with_the_same_memory_order_in_both_layouts(library: Library, case: Case):
    assert_layouts_agree(case, library)


@pytest.mark.parametrize("case", [make_conv(N=4, C=4, H=8, W=8), make_roi_pool(N=4, C=4)], ids=["conv", "roi"])
@pytest.mark.parametrize(("axis", "step"), [(0, 2), (2, 2), (3, 2), (1, -1)])
def test_strides_do_not_change_the_result(library: Library, case: Case, axis: int, step: int):
    arguments = arguments_of(case, library, "NHWC")
    dense = arguments["input"]
    strided = np.moveaxis(np.moveaxis(dense.repeat(abs(step), axis), axis, 0)[::step], 0, axis)
    strided[...] = dense
    assert strided.strides != dense.strides
    expected = both_directions(case, arguments)
    for name, result in both_directions(case, {**arguments, "input": strided}).items():
        np.testing.assert_allclose(result, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [make_conv, make_roi_pool])
def test_contiguous_nhwc_arrays_of_cupy_are_not_copied(make: Any, dtype: str):
    case = make(N=2, C=8, dtype=dtype)
    with emulated_cupy() as stand_in:
        arguments = arguments_of(case, Library(stand_in.asarray, exact=False), "NHWC")
        if dtype in ("float16", "bfloat16") and "rois" in arguments:
            arguments["rois"] = stand_in.asarray(case.rois.astype(np.float32))
        stand_in.copies = 0
        both_directions(case, arguments)
        assert stand_in.copies == 0


@dataclass(frozen=True)
class Move:
    """Images [N, C, 1, P] in either memory order, and the range of rows to transpose."""

    dtype: str
    N: int
    C: int
    P: int
    first: int
    rows: int
    shift: int  # offset of all arrays from aligned addresses, in elements
    channels_last: bool
    schedule: str

    @property
    def range(self) -> RowRange:
        return RowRange(self.first // self.P, self.first % self.P, self.rows)

    def array(self, engine: Engine, values: np.ndarray) -> np.ndarray:
        """Return a copy of `values` at the shifted address."""
        memory = engine.empty((values.size + self.shift,), values.dtype)[self.shift :]
        memory[:] = values.reshape(-1)
        return memory.reshape(values.shape)

    def images(self, engine: Engine, values: np.ndarray) -> np.ndarray:
        """Return a copy of images at the shifted address, in the memory order of the case."""
        if self.channels_last:
            return self.array(engine, values.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
        return self.array(engine, values)


@st.composite
def moves(draw: st.DrawFn) -> Move:
    N, P = draw(st.integers(1, 3)), draw(st.sampled_from(EDGES))
    first = draw(st.sampled_from([0, 1, 4, 8, P // 2, P, N * P // 2]).filter(lambda first: first < N * P))
    rows = draw(st.sampled_from([N * P - first, 1, 8, 64]).filter(lambda rows: rows <= N * P - first))
    dtype, schedule = draw(st.sampled_from(list(DTYPES))), draw(st.sampled_from(["forward", "reverse", "random"]))
    C, shift = draw(st.sampled_from(EDGES)), draw(st.sampled_from([0, 0, 1, 2]))
    return Move(dtype, N, C, P, first, rows, shift, draw(st.booleans()), schedule)


@given(move=moves(), rounds=st.booleans())
def test_images_become_rows(move: Move, rounds: bool):
    engine = host_engine(schedule=move.schedule, seed=1)
    values = np.random.default_rng(0).standard_normal((move.N, move.C, 1, move.P)).astype(DTYPES[move.dtype])
    rounds = rounds and move.dtype == "float32"
    rows = move.array(engine, np.full((move.rows + 2, move.C), 7, values.dtype))
    images = move.images(engine, values)
    run_array_jobs(
        engine, move.dtype, [pixels_to_rows_job(engine, images, move.C, move.P, move.range, rows[1:], rounds)]
    )
    expected = to_nhwc(values).reshape(-1, move.C)[move.first : move.first + move.rows]
    if rounds:
        expected = to_tf32(expected)
    np.testing.assert_array_equal(rows[1:-1], expected)
    np.testing.assert_array_equal(rows[[0, -1]], 7)


@given(move=moves())
def test_sums_become_images(move: Move):
    engine = host_engine(schedule=move.schedule, seed=1)
    dtype, random = DTYPES[move.dtype], np.random.default_rng(0)
    sums = random.standard_normal((move.rows, move.C)).astype(sum_dtype(engine, dtype))
    images = move.images(engine, np.full((move.N, move.C, 1, move.P), 7, dtype))
    source = move.array(engine, sums)
    run_array_jobs(engine, move.dtype, [rows_to_pixels_job(engine, source, images, move.C, move.P, move.range)])
    rows = np.full((move.N * move.P, move.C), 7, dtype)
    rows[move.first : move.first + move.rows] = sums
    np.testing.assert_array_equal(to_nhwc(images).reshape(-1, move.C), rows)


def channel_sums(engine: Engine, images: np.ndarray, N: int, C: int, P: int) -> np.ndarray:
    """Sum images [N, C, P] to [C]."""
    result = engine.empty((C,), images.dtype)
    first, second, between = channel_sums_jobs(engine, images, N, C, P, result)
    for job in (first, second):
        run_array_jobs(engine, str(images.dtype.name), [job])
    del between
    return result


@given(move=moves())
def test_sums_over_pixels_and_images_of_a_bias(move: Move):
    engine = host_engine(schedule=move.schedule, seed=1)
    N, C, P, dtype = move.N, move.C, move.P, DTYPES[move.dtype]
    values = np.random.default_rng(0).integers(-3, 4, (N, C, 1, P)).astype(dtype)
    images = move.images(engine, values)
    sums = channel_sums(engine, images, N, C, P)
    np.testing.assert_array_equal(sums.astype(np.float64), values.astype(np.float64).sum((0, 2, 3)).astype(dtype))
    bias = np.arange(C).astype(dtype)
    run_array_jobs(engine, move.dtype, [fill_job(engine, bias, images, N, C, P)])
    np.testing.assert_array_equal(images, np.broadcast_to(bias[:, None, None], images.shape))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 3, 1, 5000), (3, 4, 1, 4096), (9, 1000, 1, 1)], ids=str)
def test_more_than_a_tile_of_fillings_and_sums(shape: tuple[int, ...]):
    engine, dtype = host_engine(), DTYPES["float16"]
    N, C, _, P = shape
    images, bias = engine.empty(shape, dtype), np.arange(C).astype(dtype)
    run_array_jobs(engine, "float16", [fill_job(engine, bias, images, N, C, P)])
    np.testing.assert_array_equal(images, np.broadcast_to(bias[:, None, None], shape))
    expected = (N * P * np.arange(C, dtype=np.float32)).astype(dtype)
    np.testing.assert_array_equal(channel_sums(engine, images, N, C, P), expected)


@pytest.mark.parametrize("C, P", [(64, 64), (3, 5), (8, 1)])
def test_rounded_rows_keep_non_finite_values(C: int, P: int):
    engine = host_engine()
    images = engine.empty((1, C, 1, P), np.float32)
    special = np.float32([np.inf, -np.inf, np.nan, 0, -0.0, 1 + 2**-11, 1 + 2**-12, 3e38, 1e-45])
    images.reshape(-1)[:] = np.resize(special, images.size)
    rows = engine.empty((P, C), np.float32)
    run_array_jobs(
        engine, "float32", [pixels_to_rows_job(engine, images, C, P, RowRange(0, 0, P), rows, round_to_tf32=True)]
    )
    np.testing.assert_array_equal(rows, to_tf32(images.reshape(C, P).T))


def test_other_data_is_not_rounded_to_tf32():
    engine = host_engine()
    images, rows = engine.empty((1, 8, 1, 8), np.float64), engine.empty((8, 8), np.float64)
    with pytest.raises(AssertionError):
        pixels_to_rows_job(engine, images, 8, 8, RowRange(0, 0, 8), rows, round_to_tf32=True)


def to_tf32(values: np.ndarray) -> np.ndarray:
    """Round finite values to the nearest TF32 number, ties away from zero."""
    values = np.ascontiguousarray(values)
    rounded = ((values.view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


def test_conversion_between_layouts():
    nhwc = check_layout("NHWC")
    assert nhwc.sizes((2, 5, 6, 4)) == (2, 4, 5, 6)
    assert nhwc.shape(2, 4, 5, 6) == (2, 5, 6, 4)
    assert nhwc.text("N", "C", "H", "W") == "N, H, W, C"
    array = np.random.default_rng(0).random((2, 5, 6, 4))
    assert nhwc.to_nchw(array).shape == (2, 4, 5, 6)
    back = nhwc.from_nchw(nhwc.to_nchw(array), np.ascontiguousarray)
    assert back.flags.c_contiguous
    np.testing.assert_array_equal(back, array)
    nchw = check_layout("NCHW")
    assert nchw.to_nchw(array) is array
    assert nchw.from_nchw(array, lambda images: pytest.fail("NCHW needs no copy")) is array
