"""Gradients of deformable convolution on every backend."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import ConvCase, assert_correct, away_from_kinks, conv_cases, make_conv


@given(
    case=conv_cases(dtypes=("float64",)), name=st.sampled_from(ConvCase.differentiable), seed=st.integers(0, 2**32 - 1)
)
def test_finite_differences(run, case: ConvCase, name: str, seed: int):
    case = away_from_kinks(case, seed)
    if name not in case.needs:
        name = "offset"
    array, step = getattr(case, name), 1e-6
    direction = np.random.default_rng(seed + 1).uniform(-1, 1, array.shape)

    def value(sign: int) -> float:
        return float((run.forward(case.with_arrays(**{name: array + sign * step * direction})) * case.grad_out).sum())

    slope = (value(1) - value(-1)) / (2 * step)
    derivative = float((run.backward(case, (name,))[name] * direction).sum())
    assert abs(slope - derivative) <= 1e-6 * max(1.0, abs(slope), np.abs(case.grad_out).sum())


@pytest.mark.parametrize("axis", [0, 1], ids=["vertical", "horizontal"])
@pytest.mark.parametrize("position", [-1, 0, 1, 2, 3, 4])
def test_one_sided_derivative_at_integers(run, axis: int, position: int):
    """The right derivative applies at a kink; on the edge of the open box, at -1 and 4, the derivative is 0."""
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


def test_all_offsets_on_one_pixel(run):
    case = make_conv(C=4, H=8, W=8, seed=4)
    a, b = np.indices((8, 8))
    i, j = np.divmod(np.arange(9), 3)
    offset = np.empty((1, 18, 8, 8), np.float32)
    offset[0, 0::2] = 3.25 - (a[None] - 1 + i[:, None, None])
    offset[0, 1::2] = 4.5 - (b[None] - 1 + j[:, None, None])
    assert_correct(run, case.with_arrays(offset=offset))


def test_weight_gradient_is_summed_in_float32(run):
    """A float16 sum of 2500 ones would stop growing at 2048."""
    case = make_conv(C=1, O=1, H=50, W=50, kernel=(1, 1), padding=0, mask=False, dtype="float16", spread=0.0)
    ones = {name: np.ones_like(getattr(case, name)) for name in ("input", "grad_out")}
    gradients = run.backward(case.with_arrays(**ones), ("weight", "bias"))
    assert gradients["weight"].item() == 2500 and gradients["bias"].item() == 2500
