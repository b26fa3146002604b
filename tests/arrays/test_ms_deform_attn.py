"""Results and gradients of multi-scale deformable attention on every backend."""

from __future__ import annotations

import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dcnops
from tests.cases import AttentionCase, assert_close, assert_correct, attention_cases, make_attention


def grid_sample_attention(torch: Any, value: Any, shapes: Any, locations: Any, weights: Any) -> Any:
    """Compute the operation of [N, Lq, M, L, P, 2] locations as the projects do that have no kernel of their own."""
    N, _, M, D = value.shape
    Lq = locations.shape[1]
    samples = []
    for level, (height, width) in enumerate(shapes):
        image, value = value[:, : height * width], value[:, height * width :]
        samples.append(
            torch.nn.functional.grid_sample(
                image.permute(0, 2, 3, 1).reshape(N * M, D, height, width),
                2 * locations[:, :, :, level].permute(0, 2, 1, 3, 4).reshape(N * M, Lq, -1, 2) - 1,
                padding_mode="zeros",
                align_corners=False,
            )
        )
    factors = weights.permute(0, 2, 1, 3, 4).reshape(N * M, 1, Lq, -1)
    return (torch.cat(samples, 3) * factors).sum(3).reshape(N, M * D, Lq).permute(0, 2, 1)


@given(case=attention_cases(dtypes=("float64",), N=2, Lq=4, points=2), whole=st.booleans())
def test_it_equals_grid_sample_inside_at_borders_and_outside(run, case: AttentionCase, whole: bool):
    torch = pytest.importorskip("torch")
    if whole:  # centers of pixels, edges and the box around them, where gradients have kinks
        locations = np.random.default_rng(0).integers(-1, 18, case.sampling_locations.shape) / 16
        case = case.with_arrays(sampling_locations=locations)
    value, locations, weights = (
        torch.from_numpy(array).requires_grad_()
        for array in (case.value, case.sampling_locations, case.attention_weights)
    )
    expected = grid_sample_attention(torch, value, case.spatial_shapes, locations, weights)
    np.testing.assert_allclose(run.forward(case), expected.detach(), rtol=0, atol=1e-12)
    expected.backward(torch.from_numpy(case.grad_out))
    gradients = run.backward(case)
    np.testing.assert_allclose(gradients["value"], value.grad, rtol=0, atol=1e-12)
    np.testing.assert_allclose(gradients["attention_weights"], weights.grad, rtol=0, atol=1e-12)
    if not whole:  # grid_sample computes the left or the right derivative at a kink, depending on rounding
        np.testing.assert_allclose(gradients["sampling_locations"], locations.grad, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", AttentionCase.differentiable)
def test_finite_differences(run, name: str):
    case = make_attention(N=2, D=3, points=(1, 3), dtype="float64")
    random = np.random.default_rng(1)
    sizes = np.repeat([[4.0, 6.0], [2.0, 3.0]], [1, 3], axis=0)  # (width, height) of the level of each point
    whole = random.integers(-2, sizes + 1, case.sampling_locations.shape)
    locations = (whole + random.uniform(0.1, 0.9, whole.shape) + 0.5) / sizes
    case = case.with_arrays(sampling_locations=locations)
    array, step = getattr(case, name), 1e-6
    direction = random.uniform(-1, 1, array.shape)
    ahead, behind = (run.forward(case.with_arrays(**{name: array + s * step * direction})) for s in (1, -1))
    slope = float(((ahead - behind) * case.grad_out).sum()) / (2 * step)
    assert abs(slope) > 0.1
    assert float((run.backward(case, (name,))[name] * direction).sum()) == pytest.approx(slope, rel=1e-7)


@pytest.mark.parametrize("D", [1, 3, 16, 30, 32, 64, 71, 256, 1025])
def test_any_number_of_channels(run, D: int):
    assert_correct(run, make_attention(M=2, D=D, Lq=3, seed=D))


@pytest.mark.parametrize(
    "sizes", [{"N": 0}, {"Lq": 0}, {"M": 0}, {"D": 0}], ids=["no images", "no queries", "no heads", "no channels"]
)
def test_empty_arrays(run, sizes: dict[str, int]):
    assert_correct(run, make_attention(**sizes))


def test_more_points_and_levels_than_usual(run):
    shapes = tuple((1 + level % 3, 2) for level in range(20))
    assert_correct(run, make_attention(spatial_shapes=shapes, points=(50, *range(1, 20)), Lq=2, M=1, D=1))


def test_unequal_points_are_the_sum_over_levels(run):
    case = make_attention(points=(3, 1), dtype="float64")
    sum_of_levels = 0
    for first, last, pixels, shape in ((0, 3, slice(0, 24), (6, 4)), (3, 4, slice(24, 30), (3, 2))):
        level = case.with_arrays(
            value=case.value[:, pixels],
            spatial_shapes=(shape,),
            sampling_locations=case.sampling_locations[..., first:last, :],
            attention_weights=case.attention_weights[..., first:last],
            points=(last - first,),
        )
        sum_of_levels = sum_of_levels + run.forward(level)
    np.testing.assert_allclose(run.forward(case), sum_of_levels, rtol=1e-13)


def one_point(x: float, y: float, weight: float = 1.0, value: Any = None, dtype: str = "float64") -> AttentionCase:
    """Return a case with one channel, query and point at pixel (x, y) of a level of 4 x 8 pixels."""
    value = np.arange(32.0) + 1 if value is None else value
    return AttentionCase(
        value=value.reshape(1, 32, 1, 1).astype(dtype),
        spatial_shapes=((4, 8),),
        sampling_locations=np.array([(x + 0.5) / 8, (y + 0.5) / 4], dtype).reshape(1, 1, 1, 1, 1, 2),
        attention_weights=np.full((1, 1, 1, 1, 1), weight, dtype),
        grad_out=np.ones((1, 1, 1), dtype),
    )


NAN = float("nan")


@pytest.mark.parametrize(
    ("x", "y", "output", "slope"),
    [
        (2, 1, 11.0, (1, 8)),  # the right derivative at the center of a pixel
        (-0.5, 0, 0.5, (1, 4)),
        (7.5, 3, 16.0, (-32, -16)),
        (-1, 0, 0.0, (0, 0)),  # the edge of the open box
        (8, 0, 0.0, (0, 0)),
        (0, -1, 0.0, (0, 0)),
        (0, 4, 0.0, (0, 0)),
        (1e30, 0, 0.0, (0, 0)),
        (0, -np.inf, 0.0, (0, 0)),
        (2, NAN, NAN, (NAN, NAN)),
        (NAN, np.inf, NAN, (NAN, NAN)),
    ],
)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_borders_nan_and_far_away_locations(run, x: float, y: float, output: float, slope: Any, dtype: str):
    case = one_point(x, y, dtype=dtype)
    np.testing.assert_equal(run.forward(case).item(), output)
    gradients = run.backward(case)
    np.testing.assert_equal(gradients["sampling_locations"].ravel() / [8, 4], slope)
    np.testing.assert_equal(gradients["attention_weights"].item(), output)
    total = gradients["value"].sum()
    inside = output if np.isnan(output) else (min(x + 1, 1, 8 - x) if -1 < x < 8 and -1 < y < 4 else 0)
    assert total == (0 if np.isnan(inside) else inside)


@pytest.mark.parametrize("lost", [np.inf, NAN])
def test_pixels_without_weight_do_not_contribute(run, lost: float):
    value = np.full(32, lost)
    value[[10, 18]] = 2.0, 4.0
    on_a_column = one_point(2, 1.25, value=value)
    assert run.forward(on_a_column).item() == 2.5
    assert run.backward(on_a_column)["attention_weights"].item() == 2.5
    infinite = one_point(2, 1, weight=lost)
    np.testing.assert_equal(run.forward(infinite).item(), lost)
    gradient = run.backward(infinite)["value"].ravel()
    assert np.flatnonzero(gradient).tolist() == [10] and not np.isfinite(gradient[10])
    without_weight = one_point(5.5, 2.5, weight=0.0, value=value)
    assert run.forward(without_weight).item() == 0.0
    assert not run.backward(without_weight, ("sampling_locations",))["sampling_locations"].any()
    outside = one_point(9, 9, weight=np.inf, value=value)
    assert run.forward(outside).item() == 0.0
    assert not any(gradient.any() for gradient in run.backward(outside).values())


def test_float32_locations_of_bfloat16_values_keep_their_position(run):
    """The value is the column, so the output is the position; bfloat16 would round 289.3 to 290."""
    width = 304
    value = np.repeat(np.eye(width)[:, :, None, None], 1, axis=2).reshape(1, width, 1, width)
    x = np.linspace(1.3, width - 2.6, 40)
    locations = np.stack([(x + 0.5) / width, np.full(40, 0.5)], 1).astype(np.float32)
    case = AttentionCase(
        value=value.astype(ml_dtypes.bfloat16),
        spatial_shapes=((1, width),),
        sampling_locations=locations.reshape(1, 40, 1, 1, 1, 2),
        attention_weights=np.ones((1, 40, 1, 1, 1), np.float32),
        grad_out=np.ones((1, 40, width), ml_dtypes.bfloat16),
    )
    weights = run.forward(case)[0].astype(np.float64)  # the interpolation weights, rounded to bfloat16
    column = weights.argmax(1)
    for row, position in enumerate(x):
        neighbours = weights[row].nonzero()[0]
        assert set(neighbours) <= {int(position), int(position) + 1}
        assert weights[row, int(position)] == pytest.approx(1 - position % 1, abs=2e-3), column[row]


def test_spatial_shapes_may_be_any_host_integers():
    case = make_attention()
    legal = case.arguments()
    expected = dcnops.ms_deform_attn(**legal)
    for shapes in ([[6, 4], [3, 2]], np.array([[6, 4], [3, 2]], np.int32), (np.array([6, 4]), [np.int64(3), 2])):
        np.testing.assert_array_equal(dcnops.ms_deform_attn(**{**legal, "spatial_shapes": shapes}), expected)


def test_results_do_not_depend_on_the_number_of_threads():
    case = make_attention(N=1, M=1, D=70, Lq=300, spatial_shapes=((20, 30),), points=8, spread=0.2)
    results = []
    for threads in (1, 3):
        before = dcnops.get_num_threads()
        dcnops.set_num_threads(threads)
        try:
            gradients = dcnops.ms_deform_attn_backward(case.grad_out, **case.arguments())
            results.append((dcnops.ms_deform_attn(**case.arguments()), *gradients))
        finally:
            dcnops.set_num_threads(before)
    for first, second in zip(*results):
        np.testing.assert_array_equal(first, second)


def test_a_cpu_computes_few_queries_like_many():
    """The pixels of few queries on a large map are loaded early."""
    case = make_attention(Lq=160, spatial_shapes=((20, 30),))
    few = {name: getattr(case, name)[:, :40] for name in ("sampling_locations", "attention_weights")}
    expected = dcnops.ms_deform_attn(**case.arguments())[:, :40]
    np.testing.assert_array_equal(dcnops.ms_deform_attn(**{**case.arguments(), **few}), expected)


def test_a_cpu_needs_no_memory_for_samples():
    """The samples of a formulation by grid_sample would take 16 times the memory of the output."""
    case = make_attention(M=4, D=16, Lq=2000, spatial_shapes=((40, 30), (20, 15)), points=8)
    dcnops.ms_deform_attn(**case.arguments())
    dcnops.ms_deform_attn_backward(case.grad_out, **case.arguments())
    results = case.grad_out.nbytes, sum(getattr(case, name).nbytes for name in case.needs)
    calls = (
        lambda: dcnops.ms_deform_attn(**case.arguments()),
        lambda: dcnops.ms_deform_attn_backward(case.grad_out, **case.arguments()),
    )
    for size, call in zip(results, calls):
        tracemalloc.start()
        try:
            call()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < size + 100_000


@given(case=attention_cases(dtypes=("float32",), N=2), seed=st.integers(0, 2**32 - 1))
def test_results_follow_the_order_of_queries(run, case: AttentionCase, seed: int):
    order = np.random.default_rng(seed).permutation(case.grad_out.shape[1])
    names = ("sampling_locations", "attention_weights", "grad_out")
    shuffled = case.with_arrays(**{name: getattr(case, name)[:, order] for name in names})
    np.testing.assert_array_equal(run.forward(shuffled), run.forward(case)[:, order])
    gradients, expected = run.backward(shuffled), run.backward(case)
    assert_close(gradients["value"], expected["value"].astype(np.float64), "float32", "value")
    for name in names[:2]:
        np.testing.assert_array_equal(gradients[name], expected[name][:, order])
