"""`make gpu` without a GPU: the rehearsal of all parts, and parts that fail, hang or cannot run."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_targets
from benchmarks.__main__ import main as benchmark
from benchmarks.contenders import OURS, PEER
from benchmarks.deform_conv2d import PLAIN
from benchmarks.floors import floor_seconds
from benchmarks.gpu import SHARES, Part, main, parts_of, run_parts


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_the_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """What a GPU would run, on emulated kernels and with the CPU's peers; it cannot be taken for a measurement."""
    assert main(["--rehearse", "--minutes", "4", "--out", str(tmp_path), "tests", "sanitizers", "model"]) == 0
    printed = capsys.readouterr().out
    assert "REHEARSAL" in printed and printed.count("passed") >= 3
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert "no figure is a measurement" in document["rehearsal"]
    assert [(part["name"], part["status"]) for part in document["parts"]] == [
        ("tests", "passed"),
        ("sanitizers", "passed"),
        ("model", "passed"),
    ]
    assert set(document["environment"]) >= {"commit", "torch", "cupy"}
    log = (tmp_path / "sanitizers.log").read_text()
    assert all(f"--tool {tool}" in log for tool in ("memcheck", "racecheck", "synccheck"))
    assert log.count("deterministic: right") == 18
    model = document["parts"][2]["results"]
    assert model["rehearsal"] and len(model["results"]) == 2
    assert all(row["features_differ_by"] < 1e-3 for row in model["results"])


def test_the_rehearsal_of_the_benchmark(tmp_path: Path):
    assert main(["--rehearse", "--minutes", "4", "--out", str(tmp_path), "benchmark"]) == 0
    (part,) = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    document = part["results"]
    assert document["rehearsal"] and document["targets"] == [] and document["failures"] == []
    assert document["not_reached"] == []
    assert {row["operation"] for row in document["results"]} == {"deform_conv2d", "deform_roi_pool"}
    for row in document["results"]:
        assert row["device"] == "rehearsal"
        assert set(row["host_seconds"]) == {"forward", "backward"}
    assert set(document["floors"]["rehearsal"]) == {"float16", "bfloat16", "float32", "float32, tf32", "memory"}


def test_rows_after_the_time_is_up_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "benchmark.json"
    options = ["--device", "rehearsal", "--operations", "deform_roi_pool", "--parts", "forward", "--minutes", "0"]
    assert benchmark([*options, "--output", str(path)]) == 0
    document = json.loads(path.read_text())
    assert document["results"] == [] and len(document["not_reached"]) >= 5
    assert f"{len(document['not_reached'])} rows were not reached in 0 minutes" in capsys.readouterr().out


def test_parts_that_fail_hang_or_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pid_file = tmp_path / "pid"
    hanging = (
        "import subprocess, sys, time;"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        f"open({str(pid_file)!r}, 'w').write(str(child.pid)); time.sleep(600)"
    )
    results = tmp_path / "results.json"
    results.write_text('{"targets": [], "old": true}')
    target = {"name": "speed", "value": 3.25, "relation": ">=", "limit": 4.0, "holds": False}
    written = f"import json; open({str(results)!r}, 'w').write(json.dumps({{'targets': [{target!r}]}}))"
    parts = [
        Part("fails", [python("print('oh no'); raise SystemExit(3)"), python("print('still tried')")], 30),
        Part("hangs", [python(hanging)], 3, results),
        Part("missing", [["no-such-program-anywhere"]], 30),
        Part("works", [python(written)], 30, results),
    ]
    begin = time.monotonic()
    assert run_parts(parts, tmp_path) == 1
    assert time.monotonic() - begin < 60
    outcomes = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert [outcome["status"] for outcome in outcomes] == ["failed", "ended", "failed", "passed"]
    assert outcomes[0]["last_lines"][-1] == "still tried"
    assert outcomes[1]["results"] is None, "results of an earlier run"
    assert "cannot run no-such-program-anywhere" in outcomes[2]["last_lines"][-1]
    child = int(pid_file.read_text())
    time.sleep(0.2)
    stat = Path(f"/proc/{child}/stat")
    assert not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z", "a child outlived its part"
    printed = capsys.readouterr().out
    assert "MISSED" in printed and "3.25" in printed and ">= 4" in printed


def test_results_are_there_after_each_part(tmp_path: Path):
    look = f"import json; print(len(json.load(open({str(tmp_path / 'gpu.json')!r}))['parts']), 'before')"
    assert run_parts([Part("first", [python("")], 30), Part("second", [python(look)], 30)], tmp_path) == 0
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"][1]["last_lines"][-1] == "1 before"


def test_shares_of_the_time():
    everything = parts_of([], 600, Path("out"), False, None)
    assert [part.name for part in everything] == list(SHARES)
    assert sum(part.seconds for part in everything) == pytest.approx(600)
    (alone,) = parts_of(["model"], 600, Path("out"), False, None)
    assert alone.seconds == pytest.approx(600)
    commands = [command for part in everything for command in part.commands]
    assert commands[0][commands[0].index("gpu") - 1] == "-m"
    assert sum("compute-sanitizer" in command[0] for command in commands) == 3


def test_an_unknown_part_is_an_error(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["speed"])
    assert "parts are tests, sanitizers, benchmark, model, got speed" in capsys.readouterr().err


# ---- targets


def row_of(**changes: Any) -> dict[str, Any]:
    times = {OURS: {"median_ms": 2.0}, PEER: {"median_ms": 9.0}, PLAIN: {"median_ms": 1.5}}
    ratios = {f"{PEER}/{OURS}": 4.5, f"{OURS}/{PLAIN}": 1.4}
    row = {
        "operation": "deform_conv2d",
        "device": "cuda",
        "shape": "256x50x84",
        "N": 16,
        "dtype": "float16",
        "products": "ieee",
        "layout": "NCHW",
        "spread": 2.0,
        "deterministic": False,
        "work": (1e12, 1e6),
        "timings": {"forward": times, "backward": times},
        "ratios": {"forward": ratios, "backward": ratios},
        "peak_extra_bytes": {"forward": {OURS: 10, PEER: 100}, "backward": {OURS: 20, PEER: 100}},
        "errors": {OURS: {"output": 1e-6}, PEER: {"output": 2e-6}},
    }
    return {**row, **changes}


def held(row: dict[str, Any], *others: dict[str, Any]) -> dict[str, bool]:
    floors = {"float16": 1e15, "bfloat16": 1e15, "memory": 4e12}
    found = gpu_targets.gpu_targets([row, *others], floors)
    return {target.name.partition(", ")[2]: target.holds for target in found}


def test_targets_of_a_large_batch():
    assert held(row_of()) == {
        "batch 16, float16 forward, torchvision/dcnops": True,
        "batch 16, float16 backward, torchvision/dcnops": False,
        "batch 16, float16 forward, dcnops/conv2d": True,
        "batch 16, float16 forward, extra memory / torchvision's": True,
        "batch 16, float16 backward, extra memory / torchvision's": False,
    }


def test_targets_of_one_image_and_of_other_data():
    one = held(row_of(N=1))
    assert one["batch 1, float16 forward, torchvision/dcnops"]
    assert not one["batch 1, float16 backward, torchvision/dcnops"]
    assert "batch 1, float16 forward, dcnops/conv2d" not in one
    tf32 = held(row_of(dtype="float32", products="tf32"))
    assert tf32["batch 16, float32, tf32 forward, torchvision/dcnops"]
    ieee = held(row_of(dtype="float32"))
    assert ieee["batch 16, float32, error of output / torchvision's"]
    assert not held(row_of(layout="NHWC")) and not held(row_of(spread=8.0)) and not held(row_of(device="rehearsal"))
    assert not held(row_of(dtype="float32", products="3xtf32"))


def test_targets_of_the_floor_and_of_determinism():
    share = held(row_of(dtype="bfloat16"))
    assert share["batch 16, bfloat16 forward, share of the floor"]
    assert not held(row_of(dtype="bfloat16", work=(5e11, 1e6)))["batch 16, bfloat16 forward, share of the floor"]
    slow = {"backward": {OURS: {"median_ms": 2.7}}}
    assert held(row_of(deterministic=True, timings=slow), row_of(N=2)) == held(row_of(N=2))
    both = held(row_of(deterministic=True, timings=slow), row_of())
    assert both["batch 16, float16 backward, deterministic / default"] is False


def test_targets_of_roi_pooling():
    ratios = {"forward": {f"{PEER}/{OURS}": 1.1}, "backward": {f"{PEER}/{OURS}": 2.9}}
    found = held(row_of(operation="deform_roi_pool", ratios=ratios, N=1, spread=1.0))
    assert list(found.values()) == [True, False]


def test_the_floor_is_the_slower_of_products_and_memory():
    floors = {"float16": 1e15, "memory": 4e12}
    assert floor_seconds(row_of(work=(1e12, 1e6)), floors, "forward") == pytest.approx(1e-3)
    assert floor_seconds(row_of(work=(1e12, 1e6)), floors, "backward") == pytest.approx(2e-3)
    assert floor_seconds(row_of(work=(1e6, 4e9)), floors, "forward") == pytest.approx(1e-3)
    assert floor_seconds(row_of(work=None), floors, "forward") is None
    assert floor_seconds(row_of(dtype="bfloat16"), floors, "forward") is None


def test_no_gpu_is_a_failure_that_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    if os.environ.get("CUDA_VISIBLE_DEVICES") is None and Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    assert main(["--minutes", "1", "--out", str(tmp_path), "model"]) == 1
    assert "needs a GPU" in capsys.readouterr().out
