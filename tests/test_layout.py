"""NHWC is NCHW with its axes in another order: every operation, gradient, dtype, and error; natively on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dcnops
from dcnops._layout import check_layout
from tests.cases import DTYPES, Case, assert_close, conv_cases, make_conv, make_roi_pool, roi_pool_cases
from tests.emulated_cupy import StandIn, emulated_cupy

IMAGES = {"deform_conv2d": ("input", "offset", "mask", "grad_out"), "deform_roi_pool": ("input", "grad_out")}


def to_nhwc(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1))


class NumPy:
    """Where arrays of NumPy are computed; `Emulated` is the same for those of CuPy."""

    exact = True

    @staticmethod
    def asarray(array: np.ndarray) -> Any:
        return array


class Emulated:
    exact = False

    def __init__(self, stand_in: StandIn) -> None:
        self.stand_in = stand_in
        self.asarray = stand_in.asarray


@pytest.fixture(scope="module", params=["numpy", "emulated"])
def place(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "numpy":
        yield NumPy()
        return
    with emulated_cupy() as stand_in:
        yield Emulated(stand_in)


def arguments_of(case: Case, place: Any, layout: str) -> dict[str, Any]:
    images = IMAGES[case.operation]

    def prepared(name: str, value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        return place.asarray(to_nhwc(value) if layout == "NHWC" and name in images else value)

    given_arguments = {**case.arguments(), "grad_out": case.grad_out}
    return {"layout": layout, **{name: prepared(name, value) for name, value in given_arguments.items()}}


def both_directions(case: Case, arguments: dict[str, Any]) -> dict[str, Any]:
    forward = {name: value for name, value in arguments.items() if name != "grad_out"}
    output = getattr(dcnops, case.operation)(**forward)
    gradients = getattr(dcnops, f"{case.operation}_backward")(**arguments)
    return {"output": output, **{name: getattr(gradients, name) for name in case.needs}}


def assert_layouts_agree(case: Case, place: Any) -> None:
    images = ("output", *IMAGES[case.operation])
    ours = both_directions(case, arguments_of(case, place, "NHWC"))
    theirs = both_directions(case, arguments_of(case, place, "NCHW"))
    expected = {"output": case.expected(), **case.expected_gradients()}
    for name, result in ours.items():
        assert result.flags.c_contiguous, name
        assert result.dtype == theirs[name].dtype
        as_nchw = result.transpose(0, 3, 1, 2) if name in images else result
        if place.exact:
            np.testing.assert_array_equal(as_nchw, theirs[name], err_msg=name)
        assert_close(as_nchw, expected[name], case.dtype, name)


@given(case=st.one_of(conv_cases(dtypes=tuple(DTYPES)), roi_pool_cases(dtypes=tuple(DTYPES))))
def test_nhwc_computes_what_nchw_does(place: Any, case: Case):
    assert_layouts_agree(case, place)


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
def test_shapes_that_lie_in_memory_in_both_orders_at_once(place: Any, case: Case):
    assert_layouts_agree(case, place)


@pytest.mark.parametrize("case", [make_conv(N=4, C=4, H=8, W=8), make_roi_pool(N=4, C=4)], ids=["conv", "roi"])
@pytest.mark.parametrize("view", [np.s_[::2], np.s_[:, :, ::2], np.s_[..., ::2], np.s_[:, ::-1]], ids=str)
def test_strides_do_not_matter(place: Any, case: Case, view: Any):
    arguments = arguments_of(case, place, "NHWC")
    arguments["input"] = arguments["input"].repeat(2, 0).repeat(2, 1).repeat(2, 2).repeat(2, 3)[:4, :8, :8, :8][view]
    plain = place.asarray(np.ascontiguousarray(arguments["input"]))
    # Whatever the shape now is, the regions or offsets fit it: only the first image, row and channels are compared.
    if case.operation == "deform_conv2d":
        n, h, w, c = plain.shape
        fitting = make_conv(N=n, C=c, H=h, W=w)
        arguments = {**arguments_of(fitting, place, "NHWC"), "input": arguments["input"]}
    else:
        n, _, _, c = plain.shape
        rois = np.array(arguments["rois"])
        rois[:, 0] %= n
        arguments |= {"rois": place.asarray(rois), "grad_out": place.asarray(np.ones((5, 3, 2, c), np.float32))}
    strided = both_directions(case, arguments)
    dense = both_directions(case, {**arguments, "input": plain})
    for name, result in strided.items():
        np.testing.assert_allclose(result, dense[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [make_conv, make_roi_pool])
def test_contiguous_nhwc_arrays_of_cupy_are_not_copied(make: Any, dtype: str):
    case = make(N=2, C=8, dtype=dtype)
    with emulated_cupy() as stand_in:
        arguments = arguments_of(case, Emulated(stand_in), "NHWC")
        if dtype in ("float16", "bfloat16") and "rois" in arguments:
            arguments["rois"] = stand_in.asarray(case.rois.astype(np.float32))
        stand_in.copies = 0
        both_directions(case, arguments)
        assert stand_in.copies == 0


def test_a_layout_turns_shapes_and_back():
    nhwc = check_layout("NHWC")
    assert nhwc.sizes((2, 5, 6, 4)) == (2, 4, 5, 6)
    assert nhwc.shape(2, 4, 5, 6) == (2, 5, 6, 4)
    assert nhwc.text("N", "C", "H", "W") == "N, H, W, C"
    array = np.empty((2, 5, 6, 4))
    assert nhwc.images(array).shape == (2, 4, 5, 6)
    assert nhwc.array(nhwc.images(array), np.ascontiguousarray) is not None
    nchw = check_layout("NCHW")
    assert nchw.images(array) is array
    assert nchw.array(array, lambda images: pytest.fail("NCHW keeps its strides")) is array
