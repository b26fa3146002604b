"""Evaluation of the targets on rows with invented figures."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from benchmarks import targets
from benchmarks.__main__ import OPERATIONS
from benchmarks.measure import cases
from benchmarks.operations import GRID, OURS, PEER, PLAIN, Case, load

FLOORS = {"float16": 1e15, "bfloat16": 1e15, "memory": 4e12}


def row_of(forward: float, backward: float, to_plain: float, extra: int, **changes: Any) -> dict[str, Any]:
    times = {OURS: {"median_ms": 2.0}}
    row = {
        "operation": "deform_conv2d",
        "device": "cpu",
        "shape": "256x50x84",
        "N": 1,
        "dtype": "float32",
        "products": "ieee",
        "layout": "NCHW",
        "spread": 1.0,
        "deterministic": False,
        "groups": 1,
        "deformable_groups": 1,
        "data": "float32",
        "column_bytes": 8000,
        "work": (1e12, 1e6),
        "timings": {"forward": times, "backward": times},
        "ratios": {
            "forward": {f"{PEER}/{OURS}": forward, f"{GRID}/{OURS}": forward, f"{OURS}/{PLAIN}": to_plain},
            "backward": {f"{PEER}/{OURS}": backward, f"{GRID}/{OURS}": backward, f"{OURS}/{PLAIN}": 2.6},
        },
        "peak_extra_bytes": {"forward": {OURS: extra, PEER: 9000}, "backward": {OURS: extra + 150, PEER: 9000}},
        "errors": {OURS: {"output": 1e-6}, PEER: {"output": 2e-6}},
    }
    return {**row, **changes}


def gpu_row(**changes: Any) -> dict[str, Any]:
    return row_of(4.5, 4.5, 1.4, 1000, **{"device": "cuda", "N": 16, "dtype": "float16", "spread": 2.0, **changes})


def judged(*rows: dict[str, Any]) -> dict[str, bool]:
    found = targets.evaluate(rows, {}, FLOORS)
    return {target.name.partition(", ")[2]: target.holds for target in found}


@pytest.mark.parametrize(
    ("shape", "forward", "backward", "extra", "missed"),
    [
        ("64x56x56", 6.0, 16.0, 1000, []),
        ("64x56x56", 5.9, 15.9, 1001, ["forward, torchvision / dcnops", "backward, torchvision / dcnops"]),
        ("128x100x168", 6.0, 7.0, 1000, ["backward, dcnops / conv2d"]),
        ("128x100x168", 5.9, 7.0, 1001, ["forward, torchvision / dcnops", "backward, dcnops / conv2d", "memory"]),
        ("512x50x84", 5.9, 7.0, 1000, ["backward, dcnops / conv2d"]),
    ],
)
def test_convolution_on_a_cpu(shape: str, forward: float, backward: float, extra: int, missed: list[str]):
    found = targets.evaluate([row_of(forward, backward, 2.0, extra, shape=shape)], {})
    names = [target.name for target in found if not target.holds]
    assert len(names) == len(missed)
    for name, part in zip(names, missed, strict=True):
        assert part in name


def test_roi_pooling():
    cpu = row_of(1.5, 1.5, 0, 1, operation="deform_roi_pool", shape="1024x50x84x512x14")
    assert [(target.name, target.limit, target.holds) for target in targets.evaluate([cpu], {})] == [
        ("1024x50x84x512x14, batch 1, float32 forward, torchvision / dcnops", 1.0, True),
        ("1024x50x84x512x14, batch 1, float32 backward, torchvision / dcnops", 2.0, False),
    ]
    gpu = row_of(1.1, 2.9, 0, 1, operation="deform_roi_pool", device="cuda")
    assert list(judged(gpu).values()) == [True, False]


def test_every_case_on_a_cpu_has_targets_in_both_directions():
    for operation in map(load, OPERATIONS):
        peer = PEER if PEER in operation.columns else GRID
        for case in cases(operation, "cpu"):
            fields = {**asdict(case), "shape": case.label, "data": case.data}
            found = targets.evaluate([row_of(1, 1, 1, 1, operation=operation.name, **fields)], {})
            for direction in ("forward", "backward"):
                assert any(f" {direction}, {peer} / dcnops" in target.name for target in found)


def test_first_call():
    cold = {"import": 0.1, "forward": 2.1, "backward": 3.0}
    warm = {"import": 0.1, "forward": 0.2, "backward": 0.1}
    found = targets.evaluate([], {"cpu": {"cold": cold, "warm": warm}, "cuda": {"cold": cold, "warm": cold}})
    assert [target.holds for target in found] == [False, True, True, True]
    assert str(found[0]).startswith("MISSED")
    assert found[0].as_dict() == {
        "name": "first forward call cold, s",
        "value": 2.1,
        "relation": "<=",
        "limit": 2.0,
        "holds": False,
    }


def test_figures_that_were_not_measured_have_no_target():
    partial = row_of(1, 1, 1, 1, ratios={}, peak_extra_bytes={})
    others = [row_of(1, 1, 1, 1, dtype="float16"), row_of(1, 1, 1, 1, shape="1x2x3")]
    assert targets.evaluate([partial, *others], {}) == []
    for other in ({"layout": "NHWC"}, {"spread": 8.0}, {"device": "rehearsal"}, {"products": "3xtf32"}):
        assert not judged(gpu_row(**other))


def test_large_batch_on_a_gpu():
    assert judged(gpu_row()) == {
        "batch 16, float16 forward, torchvision / dcnops": True,
        "batch 16, float16 backward, torchvision / dcnops": False,
        "batch 16, float16 forward, dcnops / conv2d": True,
        "batch 16, float16 forward, extra memory / torchvision's": True,
        "batch 16, float16 backward, extra memory / torchvision's": False,
    }


def test_one_image_and_other_data_on_a_gpu():
    one = judged(gpu_row(N=1))
    assert one["batch 1, float16 forward, torchvision / dcnops"]
    assert not one["batch 1, float16 backward, torchvision / dcnops"]
    assert "batch 1, float16 forward, dcnops / conv2d" not in one
    assert judged(gpu_row(dtype="float32", products="tf32"))["batch 16, float32, tf32 forward, torchvision / dcnops"]
    assert judged(gpu_row(dtype="float32"))["batch 16, float32, error of output / torchvision's"]


def test_cpu_time_on_a_gpu():
    host = {"forward": {OURS: 44e-6}, "backward": {OURS: 201e-6}}
    one, many = (judged(gpu_row(N=N, host_seconds=host)) for N in (1, 16))
    assert one["batch 1, float16 forward, CPU time, us"] and not one["batch 1, float16 backward, CPU time, us"]
    assert many["batch 16, float16 forward, CPU time, us"] and "batch 16, float16 backward, CPU time, us" not in many
    unknown = {"forward": {OURS: None}, "backward": {}}
    assert not any("CPU time" in name for name in judged(gpu_row(N=1, host_seconds=unknown)))


def test_model():
    rows = [{"title": "eager, batch 2, float16, training", "ratio": ratio} for ratio in (0.9, 1.01, None)]
    found = targets.evaluate_model(rows)
    assert [target.holds for target in found] == [True, False]
    assert str(found[1]).startswith("MISSED  Mask R-CNN, eager, batch 2, float16, training, dcnops / torchvision: 1.01")


def test_share_of_the_floor():
    name = "batch 16, bfloat16 forward, share of the floor"
    assert judged(gpu_row(dtype="bfloat16"))[name]
    assert not judged(gpu_row(dtype="bfloat16", work=(5e11, 1e6)))[name]


def test_cost_of_determinism():
    slow = gpu_row(deterministic=True, timings={"backward": {OURS: {"median_ms": 2.7}}})
    assert judged(slow, gpu_row(N=2)) == judged(gpu_row(N=2))
    assert judged(slow, gpu_row())["batch 16, float16 backward, deterministic / default"] is False


def test_the_floor_is_the_slower_of_products_and_memory():
    floors = {"float16": 1e15, "memory": 4e12}
    assert targets.floor_seconds(gpu_row(work=(1e12, 1e6)), floors, "forward") == pytest.approx(1e-3)
    assert targets.floor_seconds(gpu_row(work=(1e12, 1e6)), floors, "backward") == pytest.approx(2e-3)
    assert targets.floor_seconds(gpu_row(work=(1e6, 4e9)), floors, "forward") == pytest.approx(1e-3)
    assert targets.floor_seconds(gpu_row(work=None), floors, "forward") is None
    assert targets.floor_seconds(gpu_row(dtype="bfloat16"), floors, "forward") is None


def test_attention_on_a_cpu():
    row = row_of(
        0, 0, 0, 0,
        operation="ms_deform_attn",
        shape="100x167x22223x4x4x4",
        ratios={"forward": {f"{GRID}/{OURS}": 4.1}, "backward": {f"{GRID}/{OURS}": 5.9}},
        peak_extra_bytes={"forward": {OURS: 1000, GRID: 9000}, "backward": {OURS: 100, GRID: 9000}},
    )  # fmt: skip
    verdicts = [(target.name.partition("float32 ")[2], target.holds) for target in targets.evaluate([row], {})]
    assert verdicts == [
        ("forward, grid_sample / dcnops", True),
        ("backward, grid_sample / dcnops", False),
        ("forward, extra memory / grid_sample's", False),
        ("backward, extra memory / grid_sample's", True),
    ]


def test_attention_on_a_gpu():
    operation = load("ms_deform_attn")
    work = operation.work(Case("cuda", operation.shapes[0], dtype="float16"))
    assert work == (0, pytest.approx(57e6, rel=0.01))  # values and output 11 MB each, locations 23 MB, weights 11 MB
    row = gpu_row(
        operation="ms_deform_attn",
        shape="100x167x22223x4x4x4",
        work=work,
        timings={"forward": {OURS: {"median_ms": 0.02}}},
        host_seconds={"forward": {OURS: 44e-6}, "backward": {OURS: 201e-6}},
    )
    found = judged(row)
    assert found["batch 16, float16 forward, grid_sample / dcnops"]
    assert found["batch 16, float16 forward, share of the floor"]
    assert not judged({**row, "timings": {"forward": {OURS: {"median_ms": 0.022}}}})[
        "batch 16, float16 forward, share of the floor"
    ]
    assert found["batch 16, float16 forward, CPU time, us"] and not found["batch 16, float16 backward, CPU time, us"]
