"""Accesses outside of arrays: emulated kernels under AddressSanitizer and UBSan, and planted bugs that these find."""

from __future__ import annotations

import numpy as np
import pytest

from dcnops._backends.cuda import plans
from tests.cases import make_aggregate, make_attention, make_conv, make_roi_pool
from tests.conftest import EmulatedRunner
from tests.cuda.emulator import reports_of_each, run_each, run_sanitized
from tests.cuda.runners import broken

BROKEN = {
    "no bottom border": ("deform_conv2d", "point.y0 + 1 < H", "true"),
    "no far border": ("deform_conv2d", "y < A(H)", "true"),
    "rows beyond the last": ("deform_conv2d", "min(tile_rows, range.rows - tile.first_row)", "tile_rows"),
    "a row too far": ("deform_conv2d_backward", "(i & 2 ? lower : 0)", "(i & 2 ? 3 * lower : 0)"),
    "a clamp forgotten": ("deform_roi_pool", "min(at.low + 1, extent - 1)", "at.low + 1"),
    "an image that does not exist": ("deform_roi_pool", "image < static_cast<Sum>(bins.size.N)", "true"),
    "bins beyond the last": ("deform_roi_pool", "min(static_cast<long long>(tile_rows), rest)", "tile_rows"),
    "channels beyond the last": ("deform_roi_pool", "min(lanes, (size.C - first_channel) / DCN_VEC)", "lanes"),
    "pixels beyond the border": ("deform_roi_pool_backward", "k >= size.W - strip.x || ", ""),
    "bins beyond the part": ("deform_roi_pool_backward", "min(static_cast<long long>(bins), last_bin - from)", "bins"),
    "levels beyond the pixels": ("attention", "min(levels[l].H, rest / W)", "levels[l].H"),
    "queries beyond the last": ("attention", "row < rows", "true"),
    "pixels beyond the last": ("attention", "k >= p.points.S - first_pixel || ", ""),
    "points beyond the last": ("attention", "if (i >= points) continue;", ""),
}
"""Calls that show planted bugs, and the bugs."""


@pytest.mark.slow
def test_planted_bugs_are_caught():
    result = run_sanitized(["-m", "tests.cuda.test_bounds"], timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]  # without the bugs
    reports = reports_of_each(result.stderr)
    assert set(reports) == set(BROKEN), result.stderr[-3000:]
    for name, (status, report) in reports.items():
        found = "AddressSanitizer" in report or "runtime error" in report
        assert status != 0 and found and ".cu" in report, f"{name}: {report[-3000:]}"


def _run_broken(call: str, old: str, new: str) -> None:
    if call == "attention":
        for deterministic in (False, True):
            _run_attention(broken(old, new, deterministic=deterministic, chunk_bytes=200))
        return
    case = make_conv(C=8, H=5, W=5, spread=3.0, seed=9)
    if call.startswith("deform_roi_pool"):
        case = make_roi_pool(C=12, H=5, W=5, spread=9.0, seed=9)
        case.rois[0, 0] = 7  # an image that does not exist
    runner = broken(old, new, deterministic=True, chunk_bytes=200)
    (runner.backward if call.endswith("backward") else runner.forward)(case)


def _run_attention(runner: EmulatedRunner) -> None:
    """Run attention and aggregation, also with shapes of levels, known on the device only, that do not fit."""
    case = make_attention(N=1, M=3, D=4, Lq=5, points=(3, 6), spread=2.0, seed=1)  # an odd number of rows
    for any_case in (case, make_aggregate(D=4, packed=True, seed=2)):
        runner.forward(any_case)
        runner.backward(any_case)
    arrays, needs = runner._arrays(case), frozenset(case.needs)
    for shapes in (((2**40, 4), (3, 2)), ((-5, -5), (2**62, 2**62)), ((2**62, 2), (-(2**63), 7))):
        arrays[1] = runner.engine.xp.asarray(np.array(shapes))
        geometry = type(case.geometry()).of(
            case.value, arrays[1], case.sampling_locations, case.attention_weights, case.points, on_device=True
        )
        plans.ms_deform_attn(runner.engine, geometry, *arrays)
        plans.ms_deform_attn_backward(
            runner.engine, geometry, case.grad_out, *arrays, needs, runner.deterministic, runner.chunk_bytes
        )


SANITIZED = {
    "convolution": (
        "tests/arrays/test_deform_conv2d.py::test_any_offset_equals_the_reference[emulated]",
        "tests/arrays/test_deform_conv2d.py::test_distant_samples_are_zero",
        "tests/arrays/test_deform_conv2d.py::test_nan_coordinates_propagate",
        "tests/arrays/test_deform_conv2d.py::test_tiny_images",
        "tests/arrays/test_operations.py::test_equals_the_reference",
        "tests/arrays/test_operations.py::test_equals_the_reference_in_16_bits",
        "tests/cuda/test_deform_conv2d_lists.py::test_all_samples_on_one_pixel",
        "tests/cuda/test_deform_conv2d_lists.py::test_equals_the_reference",
        "tests/cuda/test_deform_conv2d_lists.py::test_memory_orders",
        "tests/cuda/test_plans.py::test_arrays_may_change_during_a_call",
        "tests/cuda/test_plans.py::test_the_chunk_size_does_not_change_results",
        "tests/cuda/test_plans.py::test_the_deterministic_path_equals_the_reference",
        "tests/cuda/test_plans.py::test_channels_last_images_keep_their_memory_order",
        "tests/cuda/test_plans.py::test_parts_of_the_output_of_a_branch_are_read_in_place",
        "tests/cuda/test_plans.py::test_wide_weights_are_rounded_and_their_gradient_is_not",
    ),
    "fused convolution": (
        "tests/cuda/test_deform_conv2d_fused.py::test_any_offset_follows_the_reference",
        "tests/cuda/test_deform_conv2d_fused.py::test_equals_the_reference",
        "tests/cuda/test_deform_conv2d_fused.py::test_split_sums",
        "tests/cuda/test_deform_conv2d_fused.py::test_tiles_of_every_width",
    ),
    "RoI pooling": (
        "tests/arrays/test_deform_roi_pool.py::test_every_path_of_the_kernels",
        "tests/arrays/test_deform_roi_pool.py::test_huge_regions_are_fast",
        "tests/arrays/test_deform_roi_pool.py::test_more_channels_than_a_warp_and_more_bins_than_a_tile",
        "tests/arrays/test_deform_roi_pool.py::test_non_finite_regions_make_nan",
        "tests/arrays/test_deform_roi_pool.py::test_regions_of_nonexistent_feature_maps_are_nan_in_the_kernels",
        "tests/arrays/test_deform_roi_pool.py::test_the_output_may_be_channels_last",
        "tests/arrays/test_deform_roi_pool.py::test_unusual_offsets",
        "tests/arrays/test_deform_roi_pool.py::test_unusual_regions",
    ),
    "attention and aggregation": (
        "tests/arrays/test_deform_aggregate.py::test_a_packed_array_equals_two_arrays",
        "tests/arrays/test_deform_aggregate.py::test_nan_and_infinite_offsets",
        "tests/arrays/test_ms_deform_attn.py::test_any_number_of_channels",
        "tests/arrays/test_ms_deform_attn.py::test_borders_nan_and_far_away_locations",
        "tests/arrays/test_ms_deform_attn.py::test_more_points_and_levels_than_usual",
        "tests/cuda/test_deform_attention.py::test_arrays_that_are_not_aligned",
    ),
}
"""Tests of all data types and vector widths, each of which has to be compiled."""

SANITIZED_BY_DEFAULT = (
    "tests/arrays/test_deform_conv2d.py::test_distant_samples_are_zero",
    "tests/arrays/test_deform_conv2d.py::test_tiny_images",
    "tests/arrays/test_deform_roi_pool.py::test_huge_regions_are_fast",
    *(
        "tests/arrays/test_deform_roi_pool.py::test_more_channels_than_a_warp_and_more_bins_than_a_tile"
        f"[float16-66-{{}}-{deterministic}]"
        for deterministic in (False, True)
    ),
    "tests/arrays/test_deform_roi_pool.py::test_regions_of_nonexistent_feature_maps_are_nan_in_the_kernels",
    "tests/arrays/test_deform_roi_pool.py::test_unusual_offsets",
    "tests/arrays/test_deform_roi_pool.py::test_unusual_regions",
    *(
        f"tests/arrays/test_ms_deform_attn.py::test_borders_nan_and_far_away_locations[emulated-float32-{location}]"
        for location in ("1e+30-0-0.0-slope7", "0--inf-0.0-slope8", "nan-inf-nan-slope10")
    ),
    "tests/arrays/test_ms_deform_attn.py::test_more_points_and_levels_than_usual",
    "tests/cuda/test_deform_attention.py::test_arrays_that_are_not_aligned[float32]",
    *(
        f"tests/cuda/test_deform_attention.py::test_grids_schedules_and_lanes_do_not_change_results[{name}-most lanes]"
        for name in ("attention", "aggregation")
    ),
    "tests/cuda/test_deform_conv2d_fused.py::test_bad_pixels_and_weights_follow_the_reference[nan-3xtf32]",
    "tests/cuda/test_deform_conv2d_fused.py::test_split_sums[float16-NCHW]",
    "tests/cuda/test_deform_conv2d_fused.py::test_split_sums[float32-NHWC]",
    "tests/cuda/test_deform_conv2d_lists.py::test_all_samples_on_one_pixel[1-float32-short limits-default]",
    "tests/cuda/test_deform_conv2d_lists.py::test_all_samples_on_one_pixel[1-float32-default limits-deterministic]",
    "tests/cuda/test_plans.py::test_arrays_may_change_during_a_call",
)
"""Tests of every unit with few data types and vector widths: unusual values, sizes and addresses."""


def assert_clean_under_the_sanitizers(selection: tuple[str, ...]) -> None:
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "not cpu", "-m", "not gpu"]
    result = run_sanitized([*arguments, "--hypothesis-profile=brief", *selection], timeout=900)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert " passed" in result.stdout and "failed" not in result.stdout


@pytest.mark.slow
def test_the_kernels_are_clean_under_the_sanitizers():
    assert_clean_under_the_sanitizers(SANITIZED_BY_DEFAULT)


@pytest.mark.exhaustive
@pytest.mark.parametrize("operation", SANITIZED)
def test_all_specialisations_are_clean_under_the_sanitizers(operation: str):
    assert_clean_under_the_sanitizers(SANITIZED[operation])


if __name__ == "__main__":
    for call in sorted({call for call, *_ in BROKEN.values()}):
        _run_broken(call, "not in the source", "")
    run_each(BROKEN, lambda name: _run_broken(*BROKEN[name]))
