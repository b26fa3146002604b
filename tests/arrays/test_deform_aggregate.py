"""Results and gradients of deformable aggregation on every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given

from tests.cases import (
    AggregateCase,
    ConvCase,
    aggregate_cases,
    assert_close,
    assert_correct,
    make_aggregate,
)
from tests.conftest import share_of_examples
from tests.reference_attention import DeformAggregate


def as_convolution(case: AggregateCase) -> tuple[ConvCase, DeformAggregate]:
    """Return a depthwise convolution with unit weights and the same samples, and the parts of the aggregation."""
    call = DeformAggregate(**case.arguments())
    N, oh, ow, C = case.grad_out.shape
    G, K = call.weight.shape[2:]
    kh, kw = case.kernel_size
    taps, s = kh * kw, case.offset_scale
    offset, mask = np.zeros((N, oh, ow, G, taps, 2)), np.zeros((N, oh, ow, G, taps))
    given, weight = call.offset.reshape(N, oh, ow, G, K, 2), call.weight.reshape(N, oh, ow, G, K)
    for k, (i, j) in enumerate(call.taps):
        for axis, tap in enumerate((i, j)):
            distance = tap * call.dilation[axis] - call.center[axis]
            offset[..., i * kw + j, axis] = (s - 1) * distance + s * given[..., k, 1 - axis]
        mask[..., i * kw + j] = weight[..., k]
    convolution = ConvCase(
        input=case.input.transpose(0, 3, 1, 2),
        offset=offset.reshape(N, oh, ow, -1).transpose(0, 3, 1, 2),
        weight=np.ones((C, 1, kh, kw)),
        bias=None,
        mask=mask.reshape(N, oh, ow, -1).transpose(0, 3, 1, 2),
        stride=case.stride,
        padding=case.padding,
        dilation=case.dilation,
        grad_out=case.grad_out.transpose(0, 3, 1, 2),
    )
    return convolution, call


@pytest.mark.slow
@given(case=aggregate_cases(dtypes=("float64",), N=1))
def test_it_equals_a_depthwise_convolution_with_unit_weights(run, case: AggregateCase):
    if case.offset_scale != 1:  # other rounding could cross a kink
        case = case.with_arrays(offset=case.offset + 1e-3)
    convolution, call = as_convolution(case)
    np.testing.assert_allclose(run.forward(case).transpose(0, 3, 1, 2), run.forward(convolution), rtol=0, atol=1e-12)
    gradients, expected = run.backward(case), run.backward(convolution)
    assert_close(gradients["input"].transpose(0, 3, 1, 2), expected["input"], "float64", "input")
    if case.mask is not None:
        found = gradients["mask"].reshape(call.weight.shape)
        N, _, oh, ow = convolution.mask.shape
        by_tap = expected["mask"].reshape(N, call.weight.shape[2], *case.kernel_size, oh * ow)
        for k, (i, j) in enumerate(call.taps):
            assert_close(found[..., k], by_tap[:, :, i, j].transpose(0, 2, 1), "float64", "mask")


@share_of_examples(1 / 2)
@given(case=aggregate_cases(dtypes=("float32", "bfloat16"), packed=True))
def test_a_packed_array_equals_two_arrays(run, case: AggregateCase):
    call = DeformAggregate(**case.arguments())
    size, kind, (G, K) = case.offset.shape[:3], case.offset.dtype, call.weight.shape[2:]
    separate = case.with_arrays(
        offset=call.offset.astype(kind).reshape(*size, 2 * G * K), mask=call.weight.astype(kind).reshape(*size, G * K)
    )
    np.testing.assert_array_equal(run.forward(case), run.forward(separate))
    packed, gradients = run.backward(case), run.backward(separate)
    assert set(packed) == {"input", "offset"}
    np.testing.assert_array_equal(packed["input"], gradients["input"])
    both = (gradients["offset"].reshape(call.offset.shape), gradients["mask"].reshape(call.weight.shape))
    expected = call.pack(*(array.astype(np.float64) for array in both)).reshape(case.offset.shape)
    np.testing.assert_array_equal(packed["offset"].astype(np.float64), expected)


@pytest.mark.parametrize(
    ("packed", "name"),
    [*((False, name) for name in AggregateCase.differentiable), (True, "input"), (True, "offset")],
)
def test_finite_differences(run, packed: bool, name: str):
    case = make_aggregate(D=3, packed=packed, offset_scale=0.5, dilation=2, stride=2, padding=(2, 1), dtype="float64")
    random = np.random.default_rng(1)
    whole = random.integers(-4, 4, case.offset.shape)
    offset = (2 * whole + 2 * random.uniform(0.1, 0.9, whole.shape)).reshape(*case.offset.shape[:3], -1)
    case = case.with_arrays(offset=offset)  # with dilation 2 and scale 1/2, all bases are integers
    array, step = getattr(case, name), 1e-6
    direction = random.uniform(-1, 1, array.shape)
    ahead, behind = (run.forward(case.with_arrays(**{name: array + s * step * direction})) for s in (1, -1))
    slope = float(((ahead - behind) * case.grad_out).sum()) / (2 * step)
    assert abs(slope) > 0.1
    assert float((run.backward(case, (name,))[name] * direction).sum()) == pytest.approx(slope, rel=1e-7)


@pytest.mark.parametrize(
    ("remove_center", "weights"), [(False, (1, 2, 3, 4, 5, 6, 7, 8, 9)), (np.True_, (1, 2, 3, 4, 6, 7, 8, 9))]
)
def test_taps_run_down_the_columns(run, remove_center: bool, weights: Any):
    """The weights pick the pixels of a 3 x 3 image that holds the number of the tap."""
    case = make_aggregate(
        G=1, D=1, H=3, W=3, padding=0, remove_center=remove_center, spread=0.0, dtype="float64"
    ).with_arrays(input=np.arange(1.0, 10).reshape(3, 3).T.reshape(1, 3, 3, 1))
    for k, tap in enumerate(weights):
        mask = np.zeros((1, 1, 1, len(weights)))
        mask[..., k] = 1
        assert run.forward(case.with_arrays(mask=mask)).item() == tap


@pytest.mark.parametrize("sizes", [{"N": 0}, {"D": 0}], ids=["no images", "no channels"])
@pytest.mark.parametrize("packed", [False, True], ids=["DCNv3", "DCNv4"])
def test_empty_arrays(run, sizes: dict[str, int], packed: bool):
    assert_correct(run, make_aggregate(**sizes, packed=packed))


@pytest.mark.parametrize("offset_scale", [1.0, 0.0])
@pytest.mark.parametrize("lost", [np.nan, np.inf])
def test_nan_and_infinite_offsets(run, lost: float, offset_scale: float):
    case = make_aggregate(N=1, G=2, D=2, H=3, W=3, dtype="float64", offset_scale=offset_scale)
    case.offset[0, 1, 1, 5] = lost  # y of tap 2 in group 0
    assert_correct(run, case)
    is_nan = bool(np.isnan(lost + offset_scale * lost))
    assert np.isnan(run.forward(case)[0, 1, 1]).tolist() == [is_nan] * 2 + [False] * 2
    gradients = run.backward(case)
    assert np.isfinite(gradients["input"]).all()
    assert np.isnan(gradients["offset"][0, 1, 1, 4:6]).tolist() == [is_nan] * 2
