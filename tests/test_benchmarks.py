"""The benchmark refuses what is wrong, writes what it promises and judges its targets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import correctness, deform_conv2d, report, targets, timing
from benchmarks.contenders import OURS, PEER, PLAIN, Case
from benchmarks.deform_conv2d_float64 import evaluate
from tests.cases import make_conv

ROOT = Path(__file__).parents[1]
TINY = ("--device", "cpu", "--threads", "1", "--shapes", "4x6x5", "--seconds", "0.01")

# The library, with one gradient off by a hundredth.
WRONG = """
import sys
import numpy as np
import dcnops
from benchmarks.__main__ import main

right = dcnops.deform_conv2d_backward
def wrong(*args, **kwargs):
    gradients = right(*args, **kwargs)
    return gradients._replace(mask=gradients.mask * np.float32(1.01))
dcnops.deform_conv2d_backward = wrong
sys.exit(main(sys.argv[1:]))
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, check=False, capture_output=True, text=True)


def test_a_wrong_contender_is_not_timed(tmp_path: Path) -> None:
    path = tmp_path / "benchmark.json"
    done = run("-c", WRONG, *TINY, "--parts", "forward", "backward", "--output", str(path))
    assert done.returncode == 1
    assert "dcnops is wrong: mask is off by 1.0e-02" in done.stdout
    row = json.loads(path.read_text())["results"][0]
    for direction in ("forward", "backward"):
        assert set(row["timings"][direction]) == {PEER, PLAIN}
        assert not row["ratios"][direction]


def test_a_tiny_run(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "benchmark.json"
    done = run("-m", "benchmarks", *TINY, "--output", str(path))
    assert done.returncode == 0, done.stderr
    for text in (
        "deform_conv2d forward, cpu, batch 1",
        "deform_conv2d backward",
        "| 4x6x5 |",
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
    (row,) = document["results"]
    assert (row["C"], row["H"], row["W"], row["N"], row["dtype"], row["device"]) == (4, 6, 5, 1, "float32", "cpu")
    assert row["column_bytes"] == 4 * 9 * 6 * 5 * 4
    for direction in ("forward", "backward"):
        for contender in (OURS, PEER, PLAIN):
            timed = row["timings"][direction][contender]
            assert 0 < timed["min_ms"] <= timed["median_ms"] <= timed["max_ms"]
            assert timed["rounds"] >= 5
        assert set(row["ratios"][direction]) == {f"{PEER}/{OURS}", f"{OURS}/{PLAIN}"}
        assert set(row["peak_extra_bytes"][direction]) == {OURS, PEER}
    for state in ("cold", "warm"):
        assert set(document["first_call_seconds"]["cpu"][state]) == {"import", "forward", "backward"}
    assert [target["name"] for target in document["targets"]] == [
        "first call cold, import and forward, s",
        "first backward call cold, s",
        "first call warm, import and forward, s",
        "first backward call warm, s",
    ]


def test_the_gpu_is_optional() -> None:
    done = run("-c", "import sys; sys.modules['cupy'] = None; import benchmarks.cpu, benchmarks.deform_conv2d")
    assert done.returncode == 0, done.stderr


def test_the_float64_evaluation_equals_the_reference() -> None:
    case = make_conv(C=3, O=3, H=5, W=6, seed=3)
    arrays = {name: getattr(case, name) for name in ("input", "offset", "weight", "bias", "mask", "grad_out")}
    results = evaluate(arrays)
    expected = {"output": case.expected(), **case.expected_gradients()}
    assert set(results) == set(expected)
    for name, array in results.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-9, atol=1e-9, err_msg=name)


def test_a_batch_begins_with_the_image_of_a_batch_of_one() -> None:
    operation = deform_conv2d.OPERATION
    one, many = (operation.inputs(Case("cpu", 4, 5, 6, N)) for N in (1, 16))
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
    assert "".join(order) == "AB" * 6
    assert timings["A"].summary() == {"median_ms": 7000, "min_ms": 3000, "max_ms": 11000, "rounds": 5}


def row_of(shape: tuple[int, int, int], forward: float, backward: float, extra: int, **changes: Any) -> dict[str, Any]:
    C, H, W = shape
    row = {
        "operation": "deform_conv2d",
        "device": "cpu",
        "dtype": "float32",
        "precision": "float32",
        "N": 1,
        "C": C,
        "H": H,
        "W": W,
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
        ((64, 56, 56), 2.5, 7.0, 1000, []),
        ((64, 56, 56), 2.4, 6.9, 1001, ["forward, torchvision / dcnops", "backward, torchvision / dcnops", "memory"]),
        ((128, 100, 168), 6.0, 7.0, 1000, ["backward, dcnops / conv2d"]),
        ((128, 100, 168), 5.9, 7.0, 1000, ["forward, torchvision / dcnops", "backward, dcnops / conv2d"]),
        ((512, 50, 84), 5.9, 7.0, 1000, ["backward, dcnops / conv2d"]),
    ],
)
def test_targets(shape: tuple[int, int, int], forward: float, backward: float, extra: int, missed: list[str]) -> None:
    reached = targets.evaluate([row_of(shape, forward, backward, extra)], {})
    names = [target.name for target in reached if not target.holds]
    assert len(names) == len(missed)
    for name, part in zip(names, missed, strict=True):
        assert part in name


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
    other = row_of((64, 56, 56), 1, 1, 1, dtype="float16")
    partial = row_of((64, 56, 56), 1, 1, 1, ratios={}, peak_extra_bytes={})
    assert targets.evaluate([other, partial, row_of((1, 2, 3), 1, 1, 1)], {}) == []


def test_tables_show_what_is_missing_as_a_dash() -> None:
    row = row_of((64, 56, 56), 3, 8, 2**20, timings={"forward": {OURS: {"median_ms": 1.234}}})
    table = report.tables([row])
    assert "64x56x56" in table
    assert "1.23" in table
    assert " - " in table
    assert "backward" not in table
