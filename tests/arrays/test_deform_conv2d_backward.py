"""The gradients of deformable convolution, wherever it runs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import DTYPES, ConvCase, assert_close, away_from_kinks, conv_cases, make_conv

NAMES = ("input", "offset", "weight", "bias", "mask")


@given(case=conv_cases(dtypes=("float32", "float64")))
def test_equals_the_reference(run, case: ConvCase):
    gradients, expected = run.backward(case), case.expected_gradients()
    assert set(gradients) == set(case.needs)
    for name in case.needs:
        assert_close(gradients[name], expected[name], case.dtype, name)


@given(case=conv_cases(dtypes=("float16", "bfloat16"), spread=0.4))
def test_equals_the_reference_in_16_bits(run, case: ConvCase):
    gradients, expected = run.backward(case), case.expected_gradients()
    for name in case.needs:
        assert gradients[name].dtype == getattr(case, name).dtype
        assert_close(gradients[name], expected[name], case.dtype, name)


@given(case=conv_cases(dtypes=("float64",)), which=st.sampled_from(NAMES), seed=st.integers(0, 2**32 - 1))
def test_finite_differences(run, case: ConvCase, which: str, seed: int):
    case = away_from_kinks(case, seed)
    if which not in case.needs:
        which = "offset"
    array, step = getattr(case, which), 1e-6
    direction = np.random.default_rng(seed + 1).uniform(-1, 1, array.shape)

    def value(sign: int) -> float:
        return float((run.forward(case.with_arrays(**{which: array + sign * step * direction})) * case.grad_out).sum())

    slope = (value(1) - value(-1)) / (2 * step)
    derivative = float((run.backward(case, (which,))[which] * direction).sum())
    assert abs(slope - derivative) <= 1e-6 * max(1.0, abs(slope), np.abs(case.grad_out).sum())


@given(case=conv_cases(dtypes=("float64",), bias=False), which=st.sampled_from(["input", "weight", "mask"]))
def test_adjoint(run, case: ConvCase, which: str):
    """<g, f(x)> = <f^T(g), x> for the arguments in which the operation is linear."""
    if which not in case.needs:
        which = "input"
    forward = float((run.forward(case) * case.grad_out).sum())
    backward = float((run.backward(case, (which,))[which] * getattr(case, which)).sum())
    assert abs(forward - backward) <= 1e-10 * max(1.0, np.abs(case.grad_out).sum())


@pytest.mark.parametrize("axis", [0, 1], ids=["vertical", "horizontal"])
@pytest.mark.parametrize("position", [-1, 0, 1, 2, 3, 4])
def test_one_sided_derivative_at_integers(run, axis: int, position: int):
    """The right derivative at a kink; exactly 0 on the edge of the open box, at -1 and at the extent."""
    column = np.array([3.0, -2.0, 5.0, 11.0])
    right = {-1: 0.0, 0: -5.0, 1: 7.0, 2: 6.0, 3: -11.0, 4: 0.0}[position]
    image = column.reshape((1, 1, 4, 1) if axis == 0 else (1, 1, 1, 4))
    case = make_conv(C=1, O=1, H=1, W=1, kernel=(1, 1), padding=0, mask=True, dtype="float64", spread=0.0)
    offset = np.zeros(image.shape, np.float64).repeat(2, axis=1)
    at = (0, axis, 0, 0)
    offset[at] = position
    case = case.with_arrays(
        input=image,
        offset=offset,
        mask=np.full(image.shape, 0.5),
        weight=np.full((1, 1, 1, 1), 2.0),
        grad_out=np.eye(1, 4).reshape(image.shape),
    )
    gradients = run.backward(case)
    assert gradients["offset"][at] == right
    value = column[position] if 0 <= position < 4 else 0.0
    assert gradients["mask"][0, 0, 0, 0] == 2.0 * value
    assert gradients["input"].sum() == (1.0 if 0 <= position < 4 else 0.0)
    if 0 <= position < 4:
        step = 1e-6
        moved = offset.copy()
        moved[at] += step
        slope = (run.forward(case.with_arrays(offset=moved)) - run.forward(case))[0, 0, 0, 0] / step
        assert abs(slope - right) < 1e-6


@pytest.mark.parametrize("needs", [c for r in range(1, 6) for c in itertools.combinations(NAMES, r)], ids="+".join)
def test_only_what_is_needed(run, needs: tuple[str, ...]):
    case = make_conv(C=6, O=4, G=2, D=3, seed=3)
    gradients, everything = run.backward(case, needs), run.backward(case)
    assert set(gradients) == set(needs)
    for name in needs:
        assert_close(gradients[name], everything[name].astype(np.float64), "float32", name)


def test_all_offsets_on_one_pixel(run):
    """Many samples that scatter to the same address."""
    case = make_conv(C=4, H=8, W=8, seed=4)
    a, b = np.indices((8, 8))
    i, j = np.divmod(np.arange(9), 3)
    offset = np.empty((1, 18, 8, 8), np.float32)
    offset[0, 0::2] = 3.25 - (a[None] - 1 + i[:, None, None])
    offset[0, 1::2] = 4.5 - (b[None] - 1 + j[:, None, None])
    case = case.with_arrays(offset=offset)
    expected = case.expected_gradients()
    for name, gradient in run.backward(case).items():
        assert_close(gradient, expected[name], "float32", name)


def test_weight_gradient_is_summed_in_float32(run):
    """A sum of 2500 halves: float16 sums would stop growing at 2048."""
    case = make_conv(C=1, O=1, H=50, W=50, kernel=(1, 1), padding=0, mask=False, dtype="float16", spread=0.0)
    ones = {name: np.ones_like(getattr(case, name)) for name in ("input", "grad_out")}
    gradients = run.backward(case.with_arrays(**ones), ("weight", "bias"))
    assert gradients["weight"].item() == 2500 and gradients["bias"].item() == 2500


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_dtype_and_shape_of_their_arguments(run, dtype: str):
    offset_dtype = "float32" if dtype in ("float16", "bfloat16") else dtype
    case = make_conv(N=2, dtype=dtype, offset_dtype=offset_dtype)
    for name, gradient in run.backward(case).items():
        argument = getattr(case, name)
        assert (gradient.dtype, gradient.shape) == (argument.dtype, argument.shape)
        assert gradient.flags.c_contiguous
