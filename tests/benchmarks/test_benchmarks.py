"""The benchmark refuses what is wrong, writes what it promises and judges its targets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import (
    correctness,
    deform_conv2d,
    deform_conv2d_float64,
    deform_roi_pool,
    deform_roi_pool_float64,
    report,
    targets,
    timing,
)
from benchmarks.contenders import OURS, PEER, Case
from benchmarks.deform_conv2d import PLAIN
from benchmarks.deform_roi_pool import MODULATED
from tests.cases import make_conv, make_roi_pool

ROOT = Path(__file__).parents[2]
TINY = ("--device", "cpu", "--threads", "1", "--shapes", "4x6x5", "4x6x5x8x3", "--seconds", "0.01")

# The library, with one gradient of each operation off by a hundredth.
WRONG = """
import sys
import numpy as np
import dcnops
from benchmarks.__main__ import main

for name in ("deform_conv2d_backward", "deform_roi_pool_backward"):
    def wrong(*args, right=getattr(dcnops, name), **kwargs):
        gradients = right(*args, **kwargs)
        return gradients if gradients.mask is None else gradients._replace(mask=gradients.mask * np.float32(1.01))
    setattr(dcnops, name, wrong)
sys.exit(main(sys.argv[1:]))
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, check=False, capture_output=True, text=True)


def test_a_wrong_contender_is_not_timed(tmp_path: Path) -> None:
    path = tmp_path / "benchmark.json"
    done = run("-c", WRONG, *TINY, "--parts", "forward", "backward", "--output", str(path))
    assert done.returncode == 1
    assert "dcnops is wrong: mask is off by 1.0e-02" in done.stdout
    assert "dcnops modulated is wrong: mask is off by 1.0e-02" in done.stdout
    conv, pool = json.loads(path.read_text())["results"]
    for direction in ("forward", "backward"):
        assert set(conv["timings"][direction]) == {PEER, PLAIN}
        assert not conv["ratios"][direction]
        assert set(pool["timings"][direction]) == {OURS, PEER}


def test_a_tiny_run(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "benchmark.json"
    done = run("-m", "benchmarks", *TINY, "--output", str(path))
    assert done.returncode == 0, done.stderr
    for text in (
        "deform_conv2d forward, cpu, batch 1",
        "deform_conv2d backward",
        "| 4x6x5 |",
        "deform_roi_pool backward",
        "| 4x6x5x8x3 |",
        "cpu, cold",
        "cpu, warm",
    ):
        assert text in " ".join(done.stdout.split())
    document = json.loads(path.read_text())
    assert set(document) >= {"date", "environment", "results", "first_call_seconds", "targets", "failures"}
    assert set(document["environment"]) >= {
        "cpu",
        "threads",
        "python",
        "numpy",
        "numba",
        "torch",
        "torchvision",
        "commit",
    }
    assert document["environment"]["threads"] == 1
    assert document["failures"] == []
    conv, pool = document["results"]
    for row, operation, shape, contenders, ratios, with_memory in (
        (conv, "deform_conv2d", "4x6x5", {OURS, PEER, PLAIN}, {f"{PEER}/{OURS}", f"{OURS}/{PLAIN}"}, {OURS, PEER}),
        (pool, "deform_roi_pool", "4x6x5x8x3", {OURS, PEER, MODULATED}, {f"{PEER}/{OURS}"}, {OURS, PEER, MODULATED}),
    ):
        described = [row[name] for name in ("operation", "shape", "N", "dtype", "device")]
        assert described == [operation, shape, 1, "float32", "cpu"]
        for direction in ("forward", "backward"):
            assert set(row["timings"][direction]) == contenders
            for timed in row["timings"][direction].values():
                assert 0 < timed["min_ms"] <= timed["median_ms"] <= timed["max_ms"]
                assert timed["rounds"] >= 3
            assert set(row["ratios"][direction]) == ratios
            assert set(row["peak_extra_bytes"][direction]) == with_memory
    assert set(pool["errors"][MODULATED]) == {"output", "input", "offset", "mask"}
    assert conv["column_bytes"] == 4 * 9 * 6 * 5 * 4
    assert pool["column_bytes"] is None
    for state in ("cold", "warm"):
        assert set(document["first_call_seconds"]["cpu"][state]) == {"import", "forward", "backward"}
    assert [target["name"] for target in document["targets"]] == [
        "first call cold, import and forward, s",
        "first backward call cold, s",
        "first call warm, import and forward, s",
        "first backward call warm, s",
    ]


def test_operations_can_be_chosen(tmp_path: Path) -> None:
    chosen = ("--operations", "deform_roi_pool", "--parts", "forward", "first-call")
    done = run(
        "-m", "benchmarks", *TINY[:-4], "4x6x5x8x3", "--seconds", "0.01", *chosen, "--output", str(tmp_path / "b")
    )
    assert done.returncode == 0, done.stderr
    assert "deform_conv2d" not in done.stdout
    assert "first call" not in done.stdout
    done = run("-m", "benchmarks", *TINY, *chosen)
    assert done.returncode == 1
    assert done.stderr == "--shapes: no operation has 3 sizes\n"


def test_the_gpu_is_optional() -> None:
    modules = "benchmarks.cpu, benchmarks.deform_conv2d, benchmarks.deform_roi_pool"
    done = run("-c", f"import sys; sys.modules['cupy'] = None; import {modules}")
    assert done.returncode == 0, done.stderr


def test_the_float64_convolution_equals_the_reference() -> None:
    case = make_conv(C=3, O=3, H=5, W=6, seed=3)
    arrays = {name: getattr(case, name) for name in ("input", "offset", "weight", "bias", "mask", "grad_out")}
    results = deform_conv2d_float64.evaluate(arrays)
    expected = {"output": case.expected(), **case.expected_gradients()}
    assert set(results) == set(expected)
    for name, array in results.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("modulated", [False, True])
def test_the_float64_pooling_equals_the_reference(modulated: bool) -> None:
    settings = {
        "spatial_scale": deform_roi_pool_float64.SPATIAL_SCALE,
        "sampling_ratio": deform_roi_pool_float64.SAMPLING_RATIO,
        "gamma": deform_roi_pool_float64.GAMMA,
    }
    # More channels than are evaluated at once; regions across the border; positions at whole pixels.
    case = make_roi_pool(N=1, C=130, R=12, offset=modulated, mask=modulated, seed=5, **settings)
    rois = case.rois.copy()
    rois[:2] = [[0, -40, 8, 56, 104], [0, 8, -24, 136, 136]]
    offset = None if case.offset is None else case.offset.copy()
    if offset is not None:
        offset[0] = 0
    case = case.with_arrays(rois=rois, offset=offset)
    names = ("input", "rois", "offset", "mask", "grad_out")
    results = deform_roi_pool_float64.evaluate(
        {name: getattr(case, name) for name in names if getattr(case, name) is not None}
    )
    expected = {"output": case.expected(), **case.expected_gradients()}
    assert set(results) == set(expected)
    for name, array in results.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-9, atol=1e-9, err_msg=name)


def test_proposals_are_like_those_of_a_detector() -> None:
    H, W = 50, 84
    rois = deform_roi_pool.OPERATION.inputs(Case("cpu", (1, H, W, 512, 1)))["rois"]
    width, height = rois[:, 3] - rois[:, 1], rois[:, 4] - rois[:, 2]
    assert min(width.min(), height.min()) > 12 and 700 < max(width.max(), height.max()) < 1300
    assert (width / height).min() < 0.4 and (width / height).max() > 2.5
    across = (rois[:, 1:3] < 0).any(1) | (rois[:, 3] > 16 * W) | (rois[:, 4] > 16 * H)
    assert 0.1 < across.mean() < 0.5


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_offset_gradients_are_compared_away_from_their_jumps(dtype: str) -> None:
    arrays = deform_roi_pool.OPERATION.inputs(Case("cuda", (1, 50, 84, 512, 7), dtype=dtype))
    for at, _ in deform_roi_pool_float64.positions(arrays):
        assert np.abs(at - at.round()).min() >= 1e-3


def test_a_batch_begins_with_the_image_of_a_batch_of_one() -> None:
    operation = deform_conv2d.OPERATION
    one, many = (operation.inputs(Case("cpu", (4, 5, 6), N)) for N in (1, 16))
    for name, array in one.items():
        np.testing.assert_array_equal(array, many[name][:1] if name in operation.per_image else many[name])


def test_results_that_are_nan_or_of_another_shape_are_wrong() -> None:
    expected = {"output": np.ones((2, 2))}
    assert correctness._errors({"output": np.full((2, 2), np.nan)}, expected) == {"output": np.inf}
    assert correctness._errors({"output": np.ones((2, 1))}, expected) == {"output": np.inf}


def test_contenders_take_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "AB"}

    def clock(call: Any) -> float:
        call()
        return float(len(order))

    timings = timing.interleave(calls, clock, seconds=0)
    assert "".join(order) == "AB" * 4
    assert timings["A"].summary() == {"median_ms": 5000, "min_ms": 3000, "max_ms": 7000, "rounds": 3}


def row_of(shape: str, forward: float, backward: float, extra: int, **changes: Any) -> dict[str, Any]:
    row = {
        "operation": "deform_conv2d",
        "device": "cpu",
        "dtype": "float32",
        "data": "float32",
        "N": 1,
        "shape": shape,
        "column_bytes": 8000,
        "timings": {},
        "ratios": {
            "forward": {f"{PEER}/{OURS}": forward, f"{OURS}/{PLAIN}": 2.0},
            "backward": {f"{PEER}/{OURS}": backward, f"{OURS}/{PLAIN}": 2.6},
        },
        "peak_extra_bytes": {"forward": {OURS: extra, PEER: 9000}},
    }
    return {**row, **changes}


@pytest.mark.parametrize(
    ("shape", "forward", "backward", "extra", "missed"),
    [
        ("64x56x56", 2.5, 7.0, 1000, []),
        ("64x56x56", 2.4, 6.9, 1001, ["forward, torchvision / dcnops", "backward, torchvision / dcnops", "memory"]),
        ("128x100x168", 6.0, 7.0, 1000, ["backward, dcnops / conv2d"]),
        ("128x100x168", 5.9, 7.0, 1000, ["forward, torchvision / dcnops", "backward, dcnops / conv2d"]),
        ("512x50x84", 5.9, 7.0, 1000, ["backward, dcnops / conv2d"]),
    ],
)
def test_targets(shape: str, forward: float, backward: float, extra: int, missed: list[str]) -> None:
    reached = targets.evaluate([row_of(shape, forward, backward, extra)], {})
    names = [target.name for target in reached if not target.holds]
    assert len(names) == len(missed)
    for name, part in zip(names, missed, strict=True):
        assert part in name


def test_targets_of_roi_pooling() -> None:
    ratios = {direction: {f"{PEER}/{OURS}": 1.5} for direction in ("forward", "backward")}
    shape = "1024x50x84x512x14"
    row = row_of(shape, 0, 0, 1, operation="deform_roi_pool", column_bytes=None, ratios=ratios)
    reached = targets.evaluate([row], {})
    assert [(target.name, target.limit, target.holds) for target in reached] == [
        (f"{shape} forward, torchvision / dcnops", 1.0, True),
        (f"{shape} backward, torchvision / dcnops", 2.0, False),
    ]


def test_targets_are_for_shapes_that_are_measured() -> None:
    for operation in (deform_conv2d.OPERATION, deform_roi_pool.OPERATION):
        assert set(targets._FASTER[operation.name]) == {"x".join(map(str, shape)) for shape in operation.shapes}


def test_targets_of_the_first_call() -> None:
    cold = {"import": 0.1, "forward": 15.0, "backward": 1.0}
    warm = {"import": 0.1, "forward": 0.2, "backward": 0.1}
    reached = targets.evaluate([], {"cpu": {"cold": cold, "warm": warm}, "cuda": {"cold": cold, "warm": cold}})
    assert [target.holds for target in reached] == [False, True, True, True]
    assert str(reached[0]).startswith("MISSED")
    assert reached[0].as_dict() == {
        "name": "first call cold, import and forward, s",
        "value": 15.1,
        "relation": "<=",
        "limit": 15.0,
        "holds": False,
    }


def test_targets_are_silent_about_what_was_not_measured() -> None:
    other = row_of("64x56x56", 1, 1, 1, dtype="float16")
    partial = row_of("64x56x56", 1, 1, 1, ratios={}, peak_extra_bytes={})
    assert targets.evaluate([other, partial, row_of("1x2x3", 1, 1, 1)], {}) == []


def test_tables_show_what_is_missing_as_a_dash() -> None:
    row = row_of("64x56x56", 3, 8, 2**20, timings={"forward": {OURS: {"median_ms": 1.234}}})
    table = report.tables([row], [deform_conv2d.OPERATION])
    assert "64x56x56" in table
    assert "1.23" in table
    assert " - " in table
    assert "backward" not in table
