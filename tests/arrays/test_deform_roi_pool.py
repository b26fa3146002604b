"""Results and gradients of deformable RoI pooling on every backend, and all paths of its CUDA kernels."""

from __future__ import annotations

import dataclasses
import time
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dcnops
from dcnops import ArgumentError
from dcnops._backends.cpu import deform_roi_pool as cpu
from dcnops._backends.cuda import backend as cuda
from dcnops._backends.cuda import plans
from dcnops._backends.cuda.plans import deform_roi_pool_common
from dcnops._shapes import DeformRoIPoolGeometry
from tests.cases import DTYPES, RoIPoolCase, assert_close, assert_correct, make_roi_pool, roi_pool_cases
from tests.conftest import EmulatedRunner
from tests.reference import DeformRoIPool


@given(case=roi_pool_cases(dtypes=("float32", "float64"), offset=False, mask=False, rois_dtype="float64"))
def test_without_offset_it_equals_torchvisions_roi_align(run, case: RoIPoolCase):
    torch, ops = pytest.importorskip("torch"), pytest.importorskip("torchvision.ops")
    rois = case.rois.astype(case.input.dtype)
    if case.sampling_ratio == 0:  # torchvision does not support adaptive sampling of inverted regions
        rois[:, 1:3], rois[:, 3:5] = np.sort(rois[:, [[1, 3], [2, 4]]], axis=2).transpose(2, 0, 1)
    case = case.with_arrays(rois=rois)
    image = torch.from_numpy(case.input).requires_grad_()
    P, Q = case.grad_out.shape[2:]
    expected = ops.roi_align(
        image, torch.from_numpy(case.rois), (P, Q), case.spatial_scale, case.sampling_ratio or -1, aligned=True
    )
    assert_close(run.forward(case), expected.detach().numpy().astype(np.float64), case.dtype, slack=4)
    expected.backward(torch.from_numpy(case.grad_out))
    assert image.grad is not None
    gradient = run.backward(case, ("input",))["input"]
    assert_close(gradient, image.grad.numpy().astype(np.float64), case.dtype, "input", slack=4)


@given(case=roi_pool_cases(offset=False, mask=False), gamma=st.sampled_from([0.1, 1.0]))
def test_zero_offsets_and_a_mask_of_ones_equal_roi_align(run, case: RoIPoolCase, gamma: float):
    R, _, P, Q = case.grad_out.shape
    neutral = case.with_arrays(
        offset=np.zeros((R, 2, P, Q), np.float32), mask=np.ones((R, P, Q), np.float32), gamma=gamma
    )
    np.testing.assert_array_equal(run.forward(neutral), run.forward(case))
    gradients = run.backward(neutral)
    assert_close(gradients["input"], run.backward(case)["input"].astype(np.float64), "float32")


@given(case=roi_pool_cases(dtypes=("float32",)), seed=st.integers(0, 2**32 - 1))
def test_results_follow_the_order_of_regions(run, case: RoIPoolCase, seed: int):
    order = np.random.default_rng(seed).permutation(len(case.rois))
    arrays = ("rois", "offset", "mask", "grad_out")
    shuffled = case.with_arrays(
        **{name: None if (array := getattr(case, name)) is None else array[order] for name in arrays}
    )
    np.testing.assert_array_equal(run.forward(shuffled), run.forward(case)[order])
    gradients, expected = run.backward(shuffled), run.backward(case)
    assert_close(gradients["input"], expected["input"].astype(np.float64), "float32")
    for name in ("offset", "mask"):
        if name in expected:
            np.testing.assert_array_equal(gradients[name], expected[name][order])


def distance_to_kinks(case: RoIPoolCase) -> float:
    """Return the smallest distance of a sample coordinate to an integer."""
    pool, distances = DeformRoIPool(**case.arguments()), [1.0]
    for r, p, q in np.ndindex(len(case.rois), pool.P, pool.Q):
        for bin, bins, low, axis in ((p, pool.P, 2, 1), (q, pool.Q, 1, 0)):
            _, positions = pool.positions(r, bin, bins, low, pool.offset[r, axis, p, q])
            distances += list(np.abs(positions - np.round(positions)))
    return min(distances)


@pytest.mark.parametrize("inside", [True, False], ids=["interior", "border"])
@pytest.mark.parametrize("name", RoIPoolCase.differentiable)
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2])
def test_finite_differences(run, name: str, inside: bool, sampling_ratio: int):
    """Regions lie inside the image or across its border, where samples are clamped."""
    tried = 0
    for seed in range(40):
        case = make_roi_pool(
            C=2, R=1, dtype="float64", inside=inside, sampling_ratio=sampling_ratio, gamma=0.3, spread=0.7, seed=seed
        )
        if distance_to_kinks(case) < 1e-3:
            continue
        tried += 1
        array, step = getattr(case, name), 1e-6
        direction = np.random.default_rng(seed).uniform(-1, 1, array.shape)
        ahead, behind = (run.forward(case.with_arrays(**{name: array + s * step * direction})) for s in (1, -1))
        slope = float(((ahead - behind) * case.grad_out).sum()) / (2 * step)
        derivative = float((run.backward(case, (name,))[name] * direction).sum())
        assert abs(slope - derivative) <= 1e-6 * max(1.0, abs(slope))
        if tried == 10:
            return
    pytest.fail(f"only {tried} cases are away from kinks")


def one_sample(y: float, x: float, image: np.ndarray, gamma: float = 1.0) -> RoIPoolCase:
    """Return a case with one sample at (y, x), the only bin of a 1 x 1 region, so that offsets are in pixels."""
    H, W = image.shape
    return RoIPoolCase(
        input=image.reshape(1, 1, H, W),
        rois=np.array([[0, x, y, x + 1, y + 1]], image.dtype),
        offset=np.zeros((1, 2, 1, 1), image.dtype),
        mask=np.ones((1, 1, 1), image.dtype),
        output_size=1,
        sampling_ratio=1,
        gamma=gamma,
        grad_out=np.ones((1, 1, 1, 1), image.dtype),
    )


@pytest.mark.parametrize(
    ("y", "x", "value", "slope"),
    [
        (1.25, 1.6, 1.25 * 10 + 1.6 * 3, (3, 10)),
        (-0.4, 1.6, 1.6 * 3, (3, 0)),  # clamped to the first row, does not move vertically
        (1.25, -0.4, 12.5, (0, 10)),
        (3.3, 1.6, 30 + 4.8, (3, 0)),
        (-0.4, -0.9, 0.0, (0, 0)),
        (3.9, 3.9, 39.0, (0, 0)),
        (-1.1, 1.6, 0.0, (0, 0)),  # outside
        (1.6, 4.1, 0.0, (0, 0)),
        (0.0, 0.0, 0.0, (3, 10)),  # right derivative at a kink
        (2.0, 3.0, 29.0, (0, 10)),
    ],
)
def test_gradients_are_true_derivatives_even_for_clamped_samples(run, y: float, x: float, value: float, slope: tuple):
    image = np.add.outer(10.0 * np.arange(4), 3.0 * np.arange(4))
    case = one_sample(y, x, image)
    np.testing.assert_allclose(run.forward(case).item(), value, atol=1e-12)
    gradients = run.backward(case)
    np.testing.assert_allclose(gradients["offset"].ravel(), slope, atol=1e-12)
    np.testing.assert_allclose(gradients["mask"].item(), value, atol=1e-12)


@pytest.mark.parametrize("position", [-1.0, 4.0])
def test_the_border_of_the_sampling_area_is_included(run, position: float):
    image = np.full((4, 4), 7.0)
    assert run.forward(one_sample(position, 1.0, image)).item() == 7.0
    beyond = np.nextafter(position, 10 * position)
    assert run.forward(one_sample(beyond, 1.0, image)).item() == 0.0


@pytest.mark.parametrize("sampling_ratio", [0, 2, 9])
@pytest.mark.parametrize(
    "roi",
    [
        (5, 5, 2, 2),  # inverted
        (3, 3, 3, 3),  # empty
        (3, 1, 3, 5),  # empty along one axis
        (100, 100, 120, 120),  # outside
        (-50, -50, -20, -20),
        (-100, -100, 120, 120),  # much larger than the image
        (0.5, 0.5, 0.6, 0.6),  # smaller than a pixel
    ],
)
def test_unusual_regions(run, roi: tuple[float, ...], sampling_ratio: int):
    case = make_roi_pool(R=2, N=1, H=6, W=6, spatial_scale=1.0, sampling_ratio=sampling_ratio)
    case = case.with_arrays(rois=np.array([[0, *roi], [0, 1, 1, 5, 5]], np.float32))
    assert_correct(run, case)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("coordinate", [1, 2, 3, 4])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_regions_make_nan(run, value: float, coordinate: int, sampling_ratio: int):
    case = make_roi_pool(R=2, sampling_ratio=sampling_ratio, inside=True)
    case.rois[0, coordinate] = value
    gradients = run.backward(case)
    for array in (run.forward(case), gradients["offset"], gradients["mask"]):
        assert np.isnan(array[0]).all() and np.isfinite(array[1]).all()
    assert np.isfinite(gradients["input"]).all()
    assert_correct(run, case)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, -1e30])
def test_unusual_offsets(run, value: float):
    case = make_roi_pool(R=2, inside=True)
    case.offset[0, 0, 1, 1] = value
    output = run.forward(case)[0, :, 1, 1]
    assert np.isnan(output).all() if np.isnan(value) else (output == 0).all()
    assert_correct(run, case)


@pytest.mark.parametrize("gamma", [0.0, 0.1, 3e38, -3e38])
@pytest.mark.parametrize("roi", [(1, 1, 3, 3), (1, 1, 1, 1), (3, 1, 1, 1)])
@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_an_infinite_offset_makes_0_in_any_region_and_with_any_gamma(run, value: float, roi: tuple, gamma: float):
    case = make_roi_pool(R=1, N=1, spatial_scale=1.0, gamma=gamma, seed=3)
    case = case.with_arrays(rois=np.array([[0, *roi]], np.float32))
    case.offset[:, 1] = value
    assert (run.forward(case) == 0).all()
    assert all((gradient == 0).all() for gradient in run.backward(case).values())
    assert_correct(run, case)


@pytest.mark.parametrize("zero_offsets", [False, True])
def test_a_huge_gamma_does_not_matter_without_offsets(run, zero_offsets: bool):
    case = make_roi_pool(R=3, spatial_scale=1.0, offset=False, seed=4)
    expected = run.forward(case)
    offset = np.zeros((3, 2, *expected.shape[2:]), np.float32) if zero_offsets else None
    np.testing.assert_array_equal(run.forward(dataclasses.replace(case, offset=offset, gamma=3e38)), expected)


def test_a_region_that_overflows_when_it_is_scaled_is_not_finite(run):
    case = make_roi_pool(R=1, N=1, spatial_scale=3e38, offset=False)
    case = case.with_arrays(rois=np.array([[0, 1, 1, 5, 5]], np.float32))
    assert np.isnan(run.forward(case)).all()
    assert_correct(run, case)


@pytest.mark.parametrize("size", [1e5, 1e20, 3e38])
def test_huge_regions_are_fast(run, size: float):
    """Adaptive sampling has size^2 samples; those outside the image are counted but not visited."""
    case = make_roi_pool(R=1, N=1, output_size=2, spatial_scale=1.0, sampling_ratio=0, offset=False)
    case = case.with_arrays(rois=np.array([[0, -size, -size, size, size]], np.float32))
    small = case.with_arrays(rois=np.array([[0, 1, 1, 5, 5]], np.float32))
    assert_correct(run, small)  # compiles
    start = time.perf_counter()
    output, gradients = run.forward(case), run.backward(case)
    assert time.perf_counter() - start < 5
    if size == 3e38:  # overflows float32
        assert np.isnan(output).all()
    else:
        assert np.abs(output).max() < 1e-3
        assert np.isfinite(gradients["input"]).all()


def test_pixels_of_weight_zero_do_not_contribute(run):
    image = np.array([[1.0, np.inf], [np.nan, 2.0]])
    assert run.forward(one_sample(0.0, 0.0, image)).item() == 1.0
    assert run.forward(one_sample(5.0, 5.0, image)).item() == 0.0
    assert np.isnan(run.forward(one_sample(0.5, 0.5, image)).item())


@pytest.mark.parametrize("R", [0, 1, 31, 33, 64, 97])
def test_regions_are_independent(run, R: int):
    case = make_roi_pool(R=R, C=3, output_size=(2, 3), seed=R)
    output = run.forward(case)
    assert output.shape == (R, 3, 2, 3)
    gradients = run.backward(case)
    for r in range(R):
        names = ("rois", "offset", "mask", "grad_out")
        region = case.with_arrays(**{name: getattr(case, name)[r : r + 1] for name in names})
        np.testing.assert_array_equal(output[r : r + 1], run.forward(region))
        np.testing.assert_array_equal(gradients["mask"][r : r + 1], run.backward(region, ("mask",))["mask"])


def test_no_images_and_no_regions(run):
    assert_correct(run, make_roi_pool(N=0, R=0))


@pytest.mark.parametrize("index", [-1, 2, 1e9, np.nan, np.inf, 0.5])
def test_numpy_regions_of_nonexistent_feature_maps_are_an_error(index: float):
    case = make_roi_pool(N=2, R=4)
    case.rois[3, 0] = index
    match = r"rois must hold indices of feature maps from 0 to N-1=1 in column 0, got .* in row 3"
    with pytest.raises(ArgumentError, match=match):
        dcnops.deform_roi_pool(**case.arguments())
    with pytest.raises(ArgumentError, match=match):
        dcnops.deform_roi_pool_backward(case.grad_out, **case.arguments())


def test_numpy_indices_of_feature_maps_beyond_2_to_the_24_are_exact():
    geometry = DeformRoIPoolGeometry(2**24 + 4, 1, 1, 1, 3, 1, 1, 1, 1.0, 0.1)
    rois = np.array([[2.0**24 + 3, 0, 0, 1, 1], [2.0**24 + 1, 0, 0, 1, 1], [0, 0, 0, 1, 1]])
    assert cpu._image_indices(geometry, rois).tolist() == [2**24 + 3, 2**24 + 1, 0]


def test_kernels_refuse_more_images_than_their_indices_can_hold():
    many = SimpleNamespace(shape=(2**24 + 1, 1, 1, 1), dtype=np.dtype(np.float16))
    with pytest.raises(ArgumentError, match=r"input must have at most 16777216 images .*, got 16777217"):
        cuda.deform_roi_pool(None, many, None, None, None)
    with pytest.raises(ArgumentError, match=r"input must have at most 16777216 images .*, got 16777217"):
        cuda.deform_roi_pool_backward(None, None, many, None, None, None, frozenset(), False)


def test_numpy_regions_may_change_during_a_call(monkeypatch: pytest.MonkeyPatch):
    """Another thread may write to an array after it was checked; the loops must not read or write out of range."""
    case = make_roi_pool(N=2, R=9, C=17, sampling_ratio=0, dtype="float32", seed=5)
    original = case.rois.copy()
    expected = [dcnops.deform_roi_pool(**case.arguments())]
    expected += dcnops.deform_roi_pool_backward(case.grad_out, **case.arguments())
    parallel = cpu.parallel

    for column, values in ((0, [1e9, -5, np.nan]), (slice(1, 5), [3e38, -1e9, np.inf])):
        for value in values:

            def change(*args: Any, column: Any = column, value: float = value, **options: Any) -> None:
                case.rois[:, column] = value
                parallel(*args, **options)

            case.rois[...] = original
            monkeypatch.setattr(cpu, "parallel", change)
            output = dcnops.deform_roi_pool(**case.arguments())
            case.rois[...] = original
            gradients = dcnops.deform_roi_pool_backward(case.grad_out, **case.arguments())
            if column == 0:
                for array, reference in zip([output, *gradients], expected, strict=True):
                    np.testing.assert_array_equal(array, reference)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("index", [-1, 2, 1e9, np.nan, np.inf])
def test_regions_of_nonexistent_feature_maps_are_nan_in_the_kernels(index: float, deterministic: bool):
    run = EmulatedRunner(deterministic=deterministic)
    case = make_roi_pool(N=2, R=4)
    case.rois[3, 0] = index
    assert np.isnan(run.forward(case)[3]).all()
    assert_correct(run, case)


def test_the_input_gradient_is_deterministic_on_the_cpu():
    case = make_roi_pool(R=200, C=17, H=20, W=20, seed=8)
    first = dcnops.deform_roi_pool_backward(case.grad_out, **case.arguments())
    for _ in range(5):
        for a, b in zip(first, dcnops.deform_roi_pool_backward(case.grad_out, **case.arguments())):
            np.testing.assert_array_equal(a, b)


# Tests of the emulated kernels: every path of the plans, every memory order and schedule.

SCHEDULES: list[dict[str, Any]] = [
    {},
    {"schedule": "reverse"},
    {"single_block": True},
    {"schedule": "random", "seed": 1, "single_block": True},
    {"schedule": "random", "seed": 2, "threads": 2},
]


def in_memory_order(images: np.ndarray, channels_last: bool) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) if channels_last else images


def make_unusual(case: RoIPoolCase, part: str) -> None:
    """Change the first region or its first offset in place."""
    if len(case.rois) == 0:
        return
    if part == "offset" and case.offset is not None:
        case.offset[0, 0, 0, 0] = np.nan
        case.offset[0, 1, -1, -1] = np.inf
    elif part == "image":
        case.rois[0, 0] = len(case.input)
    elif part == "coordinate":
        case.rois[0, 3] = np.nan
    elif part == "inverted":
        case.rois[0, 1:] = case.rois[0, [3, 4, 1, 2]]


@given(
    case=roi_pool_cases(dtypes=tuple(DTYPES), R=7),
    sampling_ratio=st.sampled_from([0, 1, 2, 3, 9, 17]),
    unusual=st.sampled_from(["nothing", "offset", "image", "coordinate", "inverted"]),
    channels_last=st.tuples(st.booleans(), st.booleans()),
    deterministic=st.booleans(),
    chunk_bytes=st.sampled_from([1, 300, 2**20]),
    enough_blocks=st.sampled_from([0, 512]),
    schedule=st.sampled_from(SCHEDULES),
)
def test_every_path_of_the_kernels(
    case: RoIPoolCase,
    sampling_ratio: int,
    unusual: str,
    channels_last: tuple[bool, bool],
    deterministic: bool,
    chunk_bytes: int,
    enough_blocks: int,
    schedule: dict[str, Any],
):
    make_unusual(case, unusual)
    case = case.with_arrays(
        input=in_memory_order(case.input, channels_last[0]),
        grad_out=in_memory_order(case.grad_out, channels_last[1]),
        sampling_ratio=sampling_ratio,
    )
    with mock.patch.object(deform_roi_pool_common, "_ENOUGH_BLOCKS", enough_blocks):  # 0: whole tiles even for few bins
        assert_correct(EmulatedRunner(chunk_bytes=chunk_bytes, deterministic=deterministic, **schedule), case)


LARGE = [
    ("float32", 260, (8, 9)),
    ("float16", 520, 2),
    ("bfloat16", 264, 1),
    ("float64", 131, (3, 5)),
    ("float16", 66, 7),
]


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("dtype", "C", "output_size", "schedule"),
    [
        pytest.param(
            *sizes,
            schedule,
            id=f"{sizes[0]}-{sizes[1]}-{schedule}",
            marks=pytest.mark.exhaustive if schedule and sizes != LARGE[0] else (),
        )
        for sizes in LARGE
        for schedule in SCHEDULES
    ],
)
def test_more_channels_than_a_warp_and_more_bins_than_a_tile(
    dtype: str, C: int, output_size: Any, schedule: dict[str, Any], deterministic: bool
):
    case = make_roi_pool(N=1, C=C, H=5, W=13, R=3, output_size=output_size, dtype=dtype, seed=C)
    with mock.patch.object(deform_roi_pool_common, "_ENOUGH_BLOCKS", 0):
        assert_correct(EmulatedRunner(deterministic=deterministic, **schedule), case)


@given(case=roi_pool_cases(dtypes=tuple(DTYPES)), channels_last_input=st.booleans())
def test_the_output_may_be_channels_last(case: RoIPoolCase, channels_last_input: bool):
    case = case.with_arrays(input=in_memory_order(case.input, channels_last_input))
    runner = EmulatedRunner()
    arrays = EmulatedRunner._arrays(case)
    output = plans.deform_roi_pool(runner.engine, case.geometry(), *arrays, channels_last=True)
    assert output.shape == case.grad_out.shape
    assert output.transpose(0, 2, 3, 1).flags.c_contiguous
    np.testing.assert_array_equal(output, runner.forward(case))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_deterministic_input_gradient_does_not_depend_on_the_schedule(dtype: str):
    """The memory order does not matter either, but the size of the chunks does."""
    case = make_roi_pool(N=2, C=12, H=6, W=11, R=40, dtype=dtype, spread=2.0, sampling_ratio=0, seed=4)
    for chunk_bytes in (2**20, 1500):
        gradients = [
            EmulatedRunner(chunk_bytes=chunk_bytes, deterministic=True, schedule="random", seed=seed).backward(
                case.with_arrays(input=in_memory_order(case.input, bool(seed & 1))), ("input",)
            )["input"]
            for seed in range(6)
        ]
        for other in gradients[1:]:
            np.testing.assert_array_equal(other, gradients[0])


def test_the_default_input_gradient_depends_on_the_schedule():
    case = make_roi_pool(C=8, R=20, seed=6)
    runs = [EmulatedRunner(schedule="random", seed=seed).backward(case, ("input",)) for seed in range(4)]
    assert any((run["input"] != runs[0]["input"]).any() for run in runs[1:])


def test_output_offset_and_mask_gradients_do_not_depend_on_the_schedule():
    case = make_roi_pool(C=12, R=9, spread=2.0, sampling_ratio=3, seed=4)
    runs = [EmulatedRunner(schedule="random", seed=seed) for seed in range(3)]
    results = [(run.forward(case), *run.backward(case, ("offset", "mask")).values()) for run in runs]
    for result in results[1:]:
        for found, expected in zip(result, results[0]):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1000, 2**20])
def test_hundreds_of_equal_regions(deterministic: bool, chunk_bytes: int):
    case = make_roi_pool(N=2, C=6, H=7, W=17, R=300, output_size=1, dtype="float64", spatial_scale=1.0, seed=7)
    case.rois[:] = [1, 9.2, 3.1, 10.4, 4.0]
    assert_correct(EmulatedRunner(deterministic=deterministic, chunk_bytes=chunk_bytes), case, slack=10)


@pytest.mark.parametrize("size", [1e5, 1e20])
def test_huge_regions_on_the_deterministic_path(size: float):
    case = make_roi_pool(R=1, N=1, output_size=2, spatial_scale=1.0, sampling_ratio=0, offset=False, dtype="float64")
    case = case.with_arrays(rois=np.array([[0, -size, -size, size, size]]))
    expected, gradient = (
        EmulatedRunner(deterministic=deterministic).backward(case, ("input",))["input"]
        for deterministic in (False, True)
    )
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-30)
