"""NaN, infinite and distant coordinates, NaN and infinite pixels, and tiny images on every backend."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import ConvCase, assert_correct, conv_cases, make_conv

FAR = [np.inf, -np.inf, 1e30, -1e30, 2.0**31, -(2.0**31), 2.0**63, 1e9]


@given(
    case=conv_cases(dtypes=("float32", "float64", "float16", "bfloat16"), spread=0.4),
    values=st.lists(st.sampled_from([np.nan, *FAR]), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_offset_equals_the_reference(run, case: ConvCase, values: list[float], seed: int):
    offset = case.offset.copy()
    for value, at in zip(values, np.random.default_rng(seed).random(len(values))):
        with np.errstate(over="ignore"):
            offset.reshape(-1)[int(at * offset.size) : int(at * offset.size) + 1] = value
    assert_correct(run, case.with_arrays(offset=offset))


def case_with_one_extreme_sample(value: float, axis: int, dtype: str = "float32") -> ConvCase:
    """Return a case in which the middle tap of the middle pixel has an offset of `value` along one axis."""
    case = make_conv(C=2, O=3, H=5, W=5, seed=7, dtype=dtype, spread=0.3)
    offset = case.offset.copy()
    offset[0, 2 * 4 + axis, 2, 2] = value
    return case.with_arrays(offset=offset)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("value", FAR)
def test_distant_samples_are_zero(run, value: float, axis: int):
    case = case_with_one_extreme_sample(value, axis)
    mask = case.mask.copy()
    mask[0, 4, 2, 2] = 0
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(run.forward(case), run.forward(case.with_arrays(mask=mask)))
    gradients = run.backward(case)
    assert (gradients["offset"][0, 8:10, 2, 2] == 0).all() and gradients["mask"][0, 4, 2, 2] == 0
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.parametrize("axis", [0, 1])
def test_nan_coordinates_propagate(run, axis: int):
    case = case_with_one_extreme_sample(np.nan, axis)
    output, gradients = run.forward(case), run.backward(case)
    assert np.isnan(output[0, :, 2, 2]).all() and np.isnan(output).sum() == 3
    assert np.isnan(gradients["offset"][0, 8:10, 2, 2]).all() and np.isnan(gradients["offset"]).sum() == 2
    assert np.isnan(gradients["mask"]).sum() == 1
    assert np.isnan(gradients["weight"][:, :, 1, 1]).all() and np.isnan(gradients["weight"]).sum() == 6
    assert np.isfinite(gradients["input"]).all() and np.isfinite(gradients["bias"]).all()


def test_nan_takes_precedence_over_infinity(run):
    case = case_with_one_extreme_sample(np.nan, 0)
    case.offset[0, 9, 2, 2] = np.inf
    assert np.isnan(run.forward(case)[0, :, 2, 2]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_of_weight_zero_do_not_contribute(run, value: float):
    """With zero offsets a pixel affects the same outputs as in a regular convolution."""
    case = make_conv(C=2, O=1, H=6, W=6, mask=False, spread=0.0)
    image = case.input.copy()
    image[0, 0, 2, 2] = value
    case = case.with_arrays(input=image)
    output = run.forward(case)
    assert not np.isfinite(output[0, 0, 1:4, 1:4]).any()
    output[0, 0, 1:4, 1:4] = 0
    assert np.isfinite(output).all()


def test_a_mask_of_zero_suppresses_infinite_pixels(run):
    case = make_conv(C=2, O=1, H=4, W=4)
    case = case.with_arrays(input=np.full_like(case.input, np.inf), mask=np.zeros_like(case.mask))
    np.testing.assert_array_equal(run.forward(case), np.broadcast_to(case.bias[:, None, None], (1, 1, 4, 4)))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 2)])
def test_tiny_images(run, shape: tuple[int, int]):
    assert_correct(run, make_conv(H=shape[0], W=shape[1], C=3, O=2, spread=1.0, seed=11))
