"""The benchmark command, its float64 results and its inputs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dcnops
from benchmarks import correctness, deform_aggregate, deform_conv2d, deform_roi_pool, ms_deform_attn, report
from benchmarks.__main__ import OPERATIONS, PARTS, main
from benchmarks.contenders import POOLING, layer_tensors, prepare_torch, to_numpy
from benchmarks.cpu_meter import CpuMeter
from benchmarks.environment import run_module
from benchmarks.measure import time_in_turn
from benchmarks.operations import MODULATED, OURS, PEER, PLAIN, Arrays, Case, load
from tests.cases import Case as TestCase
from tests.cases import make_aggregate, make_attention, make_conv, make_roi_pool

ROOT = Path(__file__).parents[2]
TINY = ("--device", "cpu", "--threads", "1", "--shapes", "4x6x5", "4x6x5x8x3", "--seconds", "0.01")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, check=False, capture_output=True, text=True)


@pytest.mark.slow
def test_a_wrong_contender_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """One gradient of each operation is off by a hundredth."""

    def wrong(right: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        gradients = right(*args, **kwargs)
        return gradients if gradients.mask is None else gradients._replace(mask=gradients.mask * np.float32(1.01))

    for name in ("deform_conv2d_backward", "deform_roi_pool_backward"):
        monkeypatch.setattr(dcnops, name, partial(wrong, getattr(dcnops, name)))
    monkeypatch.setattr("benchmarks.environment.limit_threads", lambda threads: None)  # sets environment variables
    path = tmp_path / "benchmark.json"
    assert main([*TINY, "--parts", "forward", "backward", "--output", str(path)]) == 1
    printed = capsys.readouterr().out
    assert "dcnops is wrong: mask is off by 1.0e-02" in printed
    assert "dcnops modulated is wrong: mask is off by 1.0e-02" in printed
    conv, pool = json.loads(path.read_text())["results"]
    for direction in ("forward", "backward"):
        assert set(conv["timings"][direction]) == {PEER, PLAIN}
        assert not conv["ratios"][direction]
        assert set(pool["timings"][direction]) == {OURS, PEER}


@pytest.mark.slow
@pytest.mark.parametrize(
    "parts",
    [("forward", "backward"), pytest.param(PARTS, marks=pytest.mark.exhaustive)],  # the others start many processes
    ids=" ".join,
)
def test_a_tiny_run(
    parts: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("benchmarks.environment.limit_threads", lambda threads: None)  # sets environment variables
    path = tmp_path / "folder" / "benchmark.json"
    assert main([*TINY, "--parts", *parts, "--output", str(path)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for title in ("deform_conv2d forward, cpu, batch 1", "deform_roi_pool backward", "| 4x6x5x8x3 |"):
        assert title in printed
    assert ("cpu, cold" in printed) == ("first-call" in parts)
    document = json.loads(path.read_text())
    assert set(document) >= {"date", "environment", "results", "first_call_seconds", "targets", "failures"}
    assert set(document["environment"]) >= {"cpu", "python", "numpy", "numba", "torch", "torchvision", "commit"}
    assert document["environment"]["threads"] == 1
    assert document["failures"] == []
    conv, pool = document["results"]
    for row, operation, shape, contenders, ratios, with_memory in (
        (conv, "deform_conv2d", "4x6x5", {OURS, PEER, PLAIN}, {f"{PEER}/{OURS}", f"{OURS}/{PLAIN}"}, {OURS, PEER}),
        (pool, "deform_roi_pool", "4x6x5x8x3", {OURS, PEER, MODULATED}, {f"{PEER}/{OURS}"}, {OURS, PEER, MODULATED}),
    ):
        assert (row["operation"], row["shape"], row["device"]) == (operation, shape, "cpu")
        for direction in ("forward", "backward"):
            assert set(row["timings"][direction]) == contenders
            for timed in row["timings"][direction].values():
                assert 0 < timed["min_ms"] <= timed["median_ms"] <= timed["max_ms"]
                assert timed["rounds"] >= 3
            assert set(row["ratios"][direction]) == ratios
            assert set(row["peak_extra_bytes"].get(direction, {})) == (with_memory if "memory" in parts else set())
    assert set(pool["errors"][MODULATED]) == {"output", "input", "offset", "mask"}
    assert conv["column_bytes"] == 4 * 9 * 6 * 5 * 4
    assert pool["column_bytes"] is None
    calls = [
        f"first {direction} call {state}, s" for state in ("cold", "warm") for direction in ("forward", "backward")
    ]
    assert [target["name"] for target in document["targets"]] == (calls if "first-call" in parts else [])


@pytest.mark.slow
def test_memory_of_a_call():
    assert (
        CpuMeter().peak_extra_bytes(deform_roi_pool.OPERATION, Case("cpu", (4, 6, 5, 8, 7)), OURS, "forward", int) >= 0
    )


@pytest.mark.slow
def test_first_calls():
    seconds = run_module("benchmarks.first_call", "cpu")
    assert list(seconds) == ["import", "forward", "backward"] and min(seconds.values()) > 0


def test_shapes_must_fit_an_operation(capsys: pytest.CaptureFixture[str]):
    assert main(["--operations", "deform_roi_pool", "--shapes", "4x6x5"]) == 1
    assert capsys.readouterr().err == "--shapes: no operation has 3 sizes\n"


def test_the_gpu_is_optional():
    modules = ", ".join(f"benchmarks.{name}" for name in ("cpu_meter", *OPERATIONS))
    done = run("-c", f"import sys; sys.modules['cupy'] = None; import {modules}")
    assert done.returncode == 0, done.stderr


def test_float64_convolution_equals_the_reference():
    case = make_conv(C=3, O=3, H=5, W=6, seed=3)
    arrays = {name: getattr(case, name) for name in ("input", "offset", "weight", "bias", "mask", "grad_out")}
    assert_equals_reference(deform_conv2d.expected(arrays), case)


def test_float64_attention_and_aggregation_equal_the_reference():
    case = make_attention(M=8, D=3, Lq=7, spatial_shapes=((4, 5), (2, 3)), points=(1, 2), seed=3)
    arrays = {name: getattr(case, name) for name in (*case.arrays, "grad_out")}
    levels = np.array([[4, 5, 0], [2, 3, 20], [2, 3, 20]])
    assert_equals_reference(ms_deform_attn.expected({**arrays, "levels": levels}), case)
    aggregation = make_aggregate(G=3, D=2, H=4, W=5, seed=3)
    arrays = {name: getattr(aggregation, name) for name in (*aggregation.arrays, "grad_out")}
    assert_equals_reference(deform_aggregate.expected(arrays), aggregation)


@pytest.mark.parametrize("modulated", [False, True])
def test_float64_pooling_equals_the_reference(modulated: bool):
    # More channels than are evaluated at once; regions across the border; positions at whole pixels.
    case = make_roi_pool(N=1, C=130, R=12, offset=modulated, mask=modulated, seed=5, **POOLING)
    rois = case.rois.copy()
    rois[:2] = [[0, -40, 8, 56, 104], [0, 8, -24, 136, 136]]
    offset = None if case.offset is None else case.offset.copy()
    if offset is not None:
        offset[0] = 0
    case = case.with_arrays(rois=rois, offset=offset)
    arrays = {name: getattr(case, name) for name in ("input", "rois", "offset", "mask", "grad_out")}
    given = {name: array for name, array in arrays.items() if array is not None}
    assert_equals_reference(deform_roi_pool.expected(given), case)


def assert_equals_reference(results: Arrays, case: TestCase):
    expected = {"output": case.expected(), **case.expected_gradients()}
    assert set(results) == set(expected)
    for name, array in results.items():
        # The reference rounds the factor of an offset's gradient in RoI pooling to float32.
        rtol = 2e-7 if name == "offset" and case.operation == "deform_roi_pool" else 1e-9
        np.testing.assert_allclose(array, expected[name], rtol=rtol, atol=1e-9, err_msg=name)


def test_proposals_resemble_those_of_a_detector():
    H, W = 50, 84
    rois = deform_roi_pool.OPERATION.inputs(Case("cpu", (1, H, W, 512, 1)))["rois"]
    width, height = rois[:, 3] - rois[:, 1], rois[:, 4] - rois[:, 2]
    assert min(width.min(), height.min()) > 12 and 700 < max(width.max(), height.max()) < 1300
    assert (width / height).min() < 0.4 and (width / height).max() > 2.5
    across = (rois[:, 1:3] < 0).any(1) | (rois[:, 3] > 16 * W) | (rois[:, 4] > 16 * H)
    assert 0.1 < across.mean() < 0.5


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_samples_keep_a_distance_from_whole_pixels(dtype: str):
    arrays = deform_roi_pool.OPERATION.inputs(Case("cuda", (1, 50, 84, 512, 7), dtype=dtype))
    for at, _ in deform_roi_pool.positions(arrays):
        assert np.abs(at - at.round()).min() >= 1e-3


def test_a_batch_begins_with_the_image_of_a_batch_of_one():
    operation = deform_conv2d.OPERATION
    one, many = (operation.inputs(Case("cpu", (4, 5, 6), N)) for N in (1, 16))
    for name, array in one.items():
        np.testing.assert_array_equal(array, many[name][:1] if name in operation.per_image else many[name])


def test_contenders_compute_groups_as_in_float64():
    operation, case = deform_conv2d.OPERATION, Case("cpu", (8, 5, 6), groups=2, deformable_groups=4)
    contenders = operation.contenders(case)
    errors = correctness.check(operation, case, operation.inputs(case), contenders)
    for contender in contenders:
        assert max(errors[contender.name].values()) <= contender.tolerance


def test_nan_and_another_shape_are_errors():
    expected = {"output": np.ones((2, 2))}
    assert correctness._errors({"output": np.full((2, 2), np.nan)}, expected) == {"output": np.inf}
    assert correctness._errors({"output": np.ones((2, 1))}, expected) == {"output": np.inf}


def test_contenders_take_turns():
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "AB"}

    def clock(call: Any) -> float:
        call()
        return float(len(order))

    timings = time_in_turn(calls, clock, seconds=0)
    assert "".join(order) == "AB" * 4
    assert timings["A"] == {"median_ms": 5000, "min_ms": 3000, "max_ms": 7000, "rounds": 3}


def test_tables_show_missing_figures_as_dashes():
    row = {"operation": "deform_conv2d", "device": "cpu", "shape": "64x56x56", "N": 1, "data": "float32"}
    row |= {"column_bytes": 8000, "ratios": {}, "peak_extra_bytes": {}}
    row["timings"] = {"forward": {OURS: {"median_ms": 1.234}}}
    table = report.tables([row], [deform_conv2d.OPERATION])
    for text in ("64x56x56", "1.23", " - "):
        assert text in table
    assert "backward" not in table


def test_tables_of_a_gpu_show_host_times_and_launches():
    row = {"operation": "deform_conv2d", "device": "cuda", "shape": "64x56x56", "N": 1, "data": "float16"}
    row |= {"column_bytes": 8000, "ratios": {}, "peak_extra_bytes": {}}
    row["timings"] = {"backward": {OURS: {"median_ms": 1.234}}}
    row["host_seconds"] = {"backward": {OURS: 123e-6, PEER: 456e-6, PLAIN: None}}
    row["launches"] = {"backward": {"kernels": 5, "products": 2, "fills": 1}}
    header, _, line = (
        [cell.strip() for cell in line.split("|")]
        for line in report.tables([row], [deform_conv2d.OPERATION]).splitlines()
        if line.startswith("|")
    )
    cells = dict(zip(header, line, strict=True))
    assert [cells[f"{name} host"] for name in (OURS, PEER, PLAIN)] == ["123", "456", "-"]
    assert cells["launches"] == "5+2+1"


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(("operation", "shape"), [("deform_conv2d", (4, 5, 6)), ("deform_roi_pool", (4, 5, 6, 3, 2))])
def test_our_calls_on_tensors_compute_what_those_on_arrays_compute(operation: str, shape: tuple[int, ...], layout: str):
    """Tensors are what is timed on a GPU, arrays what is timed on a CPU and rehearsed."""
    case = Case("cpu", shape, N=2 if operation == "deform_conv2d" else 1, layout=layout, deterministic=True)
    arrays = load(operation).inputs(case)
    on_tensors, on_arrays = (
        {contender.name: contender.prepare for contender in load(operation).contenders(replace(case, device=device))}
        for device in ("cuda", "cpu")
    )
    for name in {OURS, MODULATED} & set(on_arrays):
        for direction in ("forward", "backward"):
            found, expected = (prepare[name](case, arrays, direction)() for prepare in (on_tensors, on_arrays))
            if direction == "forward":
                found, expected = {"output": found}, {"output": expected}
            assert set(found) == set(expected)
            for result, array in expected.items():
                np.testing.assert_allclose(to_numpy(found[result]), array, rtol=1e-4, atol=1e-5, err_msg=result)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_timed_backward_pass_belongs_to_a_signature_that_was_seen_before():
    """The first forward call of a signature goes through the operator, later ones are replayed."""
    calls: list[torch.Tensor] = []

    def double(input: torch.Tensor) -> torch.Tensor:
        calls.append(2 * input)
        return calls[-1]

    backward = prepare_torch(double, {"input": torch.ones(3)}, torch.ones(3), "backward")
    assert len(calls) == 2
    assert backward()["input"].tolist() == [2, 2, 2]


def test_offsets_are_a_part_of_one_tensor_as_in_a_layer():
    case = Case("cpu", (4, 5, 6), N=2)
    tensors = layer_tensors(case, deform_conv2d.OPERATION.inputs(case), ("offset", "mask", "weight"))
    assert tensors["offset"].stride() == (27 * 30, 30, 6, 1)
    assert tensors["mask"].is_contiguous()


def test_json_has_one_line_per_row(tmp_path: Path):
    document = {"date": "today", "results": [{"a": [1, 2]}, {"a": []}], "failures": [], "names": ["a", "b"]}
    path = tmp_path / "folder" / "results.json"
    report.write_json(path, document)
    assert json.loads(path.read_text()) == document
    assert len(path.read_text().splitlines()) == 9
