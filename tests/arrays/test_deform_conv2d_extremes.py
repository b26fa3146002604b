"""NaN, infinities and far-away coordinates: nothing crashes, and what comes out is what the documentation says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import ConvCase, assert_close, conv_cases, make_conv

FAR = [np.inf, -np.inf, 1e30, -1e30, 2.0**31, -(2.0**31), 2.0**63, 1e9]


@given(
    case=conv_cases(dtypes=("float32", "float64", "float16", "bfloat16"), spread=0.4),
    values=st.lists(st.sampled_from([np.nan, *FAR]), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_offset_follows_the_reference(run, case: ConvCase, values: list[float], seed: int):
    offset = case.offset.copy()
    for value, at in zip(values, np.random.default_rng(seed).random(len(values))):
        with np.errstate(over="ignore"):
            offset.reshape(-1)[int(at * offset.size) : int(at * offset.size) + 1] = value
    case = case.with_arrays(offset=offset)
    assert_close(run.forward(case), case.expected(), case.dtype)
    gradients, expected = run.backward(case), case.expected_gradients()
    for name in case.needs:
        assert_close(gradients[name], expected[name], case.dtype, name)


def one_sample(value: float, axis: int, dtype: str = "float32") -> ConvCase:
    """The middle tap of one pixel samples at `value`, along one axis."""
    case = make_conv(C=2, O=3, H=5, W=5, seed=7, dtype=dtype, spread=0.3)
    offset = case.offset.copy()
    offset[0, 2 * 4 + axis, 2, 2] = value
    return case.with_arrays(offset=offset)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("value", FAR)
def test_far_away_samples_count_nothing(run, value: float, axis: int):
    case = one_sample(value, axis)
    silent = case.mask.copy()
    silent[0, 4, 2, 2] = 0
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(run.forward(case), run.forward(case.with_arrays(mask=silent)))
    gradients = run.backward(case)
    assert (gradients["offset"][0, 8:10, 2, 2] == 0).all() and gradients["mask"][0, 4, 2, 2] == 0
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.parametrize("axis", [0, 1])
def test_nan_coordinates_are_seen(run, axis: int):
    case = one_sample(np.nan, axis)
    output, gradients = run.forward(case), run.backward(case)
    assert np.isnan(output[0, :, 2, 2]).all() and np.isnan(output).sum() == 3
    assert np.isnan(gradients["offset"][0, 8:10, 2, 2]).all() and np.isnan(gradients["offset"]).sum() == 2
    assert np.isnan(gradients["mask"]).sum() == 1
    assert np.isnan(gradients["weight"][:, :, 1, 1]).all() and np.isnan(gradients["weight"]).sum() == 6
    assert np.isfinite(gradients["input"]).all() and np.isfinite(gradients["bias"]).all()


def test_nan_beats_infinity(run):
    case = one_sample(np.nan, 0)
    case.offset[0, 9, 2, 2] = np.inf
    assert np.isnan(run.forward(case)[0, :, 2, 2]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_pixel_of_weight_zero_does_not_take_part(run, value: float):
    """With zero offsets only the taps that lie on the bad pixel see it, as in a plain convolution."""
    case = make_conv(C=2, O=1, H=6, W=6, mask=False, spread=0.0)
    image = case.input.copy()
    image[0, 0, 2, 2] = value
    case = case.with_arrays(input=image)
    output = run.forward(case)
    assert not np.isfinite(output[0, 0, 1:4, 1:4]).any()
    output[0, 0, 1:4, 1:4] = 0
    assert np.isfinite(output).all()


def test_a_mask_of_zero_silences_bad_pixels(run):
    case = make_conv(C=2, O=1, H=4, W=4)
    case = case.with_arrays(input=np.full_like(case.input, np.inf), mask=np.zeros_like(case.mask))
    np.testing.assert_array_equal(run.forward(case), np.broadcast_to(case.bias[:, None, None], (1, 1, 4, 4)))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 2)])
def test_images_of_a_pixel_or_two(run, shape: tuple[int, int]):
    case = make_conv(H=shape[0], W=shape[1], C=3, O=2, spread=1.0, seed=11)
    assert_close(run.forward(case), case.expected(), "float32")
    expected = case.expected_gradients()
    for name, gradient in run.backward(case).items():
        assert_close(gradient, expected[name], "float32", name)
