"""Properties that all operations share, on every backend."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import (
    DTYPES,
    AggregateCase,
    AttentionCase,
    Case,
    ConvCase,
    RoIPoolCase,
    aggregate_cases,
    assert_close,
    assert_correct,
    attention_cases,
    conv_cases,
    make_aggregate,
    make_attention,
    make_conv,
    make_roi_pool,
    roi_pool_cases,
)
from tests.conftest import share_of_examples

CASES: dict[str, Any] = {
    "deform_conv2d": conv_cases,
    "deform_roi_pool": roi_pool_cases,
    "ms_deform_attn": attention_cases,
    "deform_aggregate": aggregate_cases,
}
MAKE: dict[str, Any] = {
    "deform_conv2d": make_conv,
    "deform_roi_pool": make_roi_pool,
    "ms_deform_attn": make_attention,
    "deform_aggregate": make_aggregate,
}

each_operation = pytest.mark.parametrize("operation", CASES)


@each_operation
@given(data=st.data())
def test_equals_the_reference(run, operation: str, data: st.DataObject):
    assert_correct(run, data.draw(CASES[operation](dtypes=("float32", "float64"))))


@pytest.mark.slow
@each_operation
@share_of_examples(1 / 2)
@given(data=st.data())
def test_equals_the_reference_in_16_bits(run, operation: str, data: st.DataObject):
    case = data.draw(CASES[operation](dtypes=("float16", "bfloat16")))
    if operation == "deform_conv2d":
        assert_close(run.forward(case), case.expected(), case.dtype)
        # The tolerance for gradients holds for small offsets only.
        case = data.draw(conv_cases(dtypes=("float16", "bfloat16"), spread=0.4))
    assert_correct(run, case)


def draw_linear_case(data: st.DataObject, operation: str) -> tuple[Case, str]:
    """Draw a case and the name of an argument in which the operation is linear."""
    options: dict[str, Any] = {"bias": False} if operation == "deform_conv2d" else {}
    case = data.draw(CASES[operation](dtypes=("float64",), **options))
    linear = ("input", "value", "weight", "mask", "attention_weights")
    return case, data.draw(st.sampled_from([name for name in linear if name in case.needs]))


@each_operation
@given(data=st.data())
def test_linearity(run, operation: str, data: st.DataObject):
    case, name = draw_linear_case(data, operation)
    array = getattr(case, name)
    other = np.random.default_rng(1).standard_normal(array.shape)
    combined = run.forward(case.with_arrays(**{name: 2 * array - 3 * other}))
    separate = 2 * run.forward(case) - 3 * run.forward(case.with_arrays(**{name: other}))
    assert_close(combined, separate, "float64", slack=10)


@each_operation
@given(data=st.data())
def test_backward_is_the_adjoint_of_forward(run, operation: str, data: st.DataObject):
    case, name = draw_linear_case(data, operation)
    forward = float((run.forward(case) * case.grad_out).sum())
    backward = float((run.backward(case, (name,))[name] * getattr(case, name)).sum())
    assert abs(forward - backward) <= 1e-10 * max(1.0, np.abs(case.grad_out).sum())


NEEDS = [
    (case.operation, needs)
    for case in (ConvCase, RoIPoolCase, AttentionCase, AggregateCase)
    for count in range(1, len(case.differentiable) + 1)
    for needs in itertools.combinations(case.differentiable, count)
]


@pytest.mark.parametrize(("operation", "needs"), NEEDS, ids=[f"{name}-{'+'.join(needs)}" for name, needs in NEEDS])
def test_only_needed_gradients_are_computed(run, operation: str, needs: tuple[str, ...]):
    options: dict[str, Any] = {"C": 6, "G": 2, "D": 3} if operation == "deform_conv2d" else {}
    case = MAKE[operation](seed=3, **options)
    gradients, everything = run.backward(case, needs), run.backward(case)
    assert set(gradients) == set(needs)
    for name in needs:
        assert_close(gradients[name], everything[name].astype(np.float64), "float32", name)


def restride(array: np.ndarray, kind: str) -> np.ndarray:
    """Return an array of equal values with other strides or flags."""
    if kind == "Fortran":
        return np.asfortranarray(array)
    if kind == "reversed":
        return array[..., ::-1].copy()[..., ::-1]
    if kind == "every other":
        return np.repeat(array, 2, axis=-1)[..., ::2]
    copy = array.copy()
    copy.flags.writeable = kind != "read-only"
    return copy


@each_operation
@share_of_examples(1 / 2)
@given(data=st.data())
def test_strides_do_not_change_the_result(run, operation: str, data: st.DataObject):
    case = data.draw(CASES[operation](dtypes=("float32", "float16")))
    kinds = st.sampled_from(["unchanged", "Fortran", "reversed", "every other", "read-only"])
    arrays = {name: getattr(case, name) for name in (*case.arrays, "grad_out")}
    changed = case.with_arrays(
        **{name: restride(array, data.draw(kinds)) for name, array in arrays.items() if array is not None}
    )
    np.testing.assert_array_equal(run.forward(changed), run.forward(case))
    contiguous, restrided = run.backward(case), run.backward(changed)
    for name in case.needs:
        assert_close(restrided[name], contiguous[name].astype(np.float64), case.dtype, name)


@each_operation
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_new_contiguous_arrays(run, operation: str, dtype: str):
    offset_dtype = "float32" if dtype in ("float16", "bfloat16") else dtype
    channels = {"C" if operation in ("deform_conv2d", "deform_roi_pool") else "D": 8}
    case = MAKE[operation](N=2, dtype=dtype, offset_dtype=offset_dtype, **channels)
    output, gradients = run.forward(case), run.backward(case)
    assert (output.dtype, output.shape) == (case.grad_out.dtype, case.grad_out.shape)
    for name, gradient in gradients.items():
        argument = getattr(case, name)
        assert (gradient.dtype, gradient.shape) == (argument.dtype, argument.shape)
    for result in (output, *gradients.values()):
        assert result.flags.c_contiguous and result.flags.writeable
        assert all(not np.shares_memory(result, getattr(case, name)) for name in case.needs)
