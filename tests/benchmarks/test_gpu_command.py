"""`make gpu` without a GPU: a rehearsal of all parts, and parts that fail, hang or cannot run."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, measure
from benchmarks.__main__ import OPERATIONS
from benchmarks.gpu import SHARES, Part, main, parts_of, run_parts
from benchmarks.measure import cases as all_cases
from benchmarks.operations import OURS, PEER
from tests.benchmarks.rehearse import main as rehearse
from tests.cuda import sanitizer_cases


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def rehearsed(out: Path, *parts: str) -> dict[str, Any]:
    """Rehearse the parts, check that they passed and return their results."""
    assert main(["--rehearse", "--minutes", "30", "--out", str(out), *parts]) == 0
    document = json.loads((out / "gpu.json").read_text())
    assert "no figure is a measurement" in document["rehearsal"]
    assert set(document["environment"]) >= {"commit", "torch", "cupy"}
    assert [(part["name"], part["status"]) for part in document["parts"]] == [(name, "passed") for name in parts]
    return {part["name"]: part["results"] for part in document["parts"]}


@pytest.mark.exhaustive
def test_rehearsal_of_the_model(tmp_path: Path):
    model = rehearsed(tmp_path, "model")["model"]
    assert model["rehearsal"] and [row["mode"] for row in model["results"]] == ["eager", "graphs"]
    assert all(set(row["timings"]) == {OURS, PEER} for row in model["results"])
    assert [profile["contender"] for profile in model["profiles"]] == [OURS, PEER]
    assert all(len(profile["by_cpu_time"]) == 15 for profile in model["profiles"])
    assert model["failures"] == model["peer_failures"] == model["not_reached"] == []


@pytest.mark.slow
def test_rehearsal_of_the_workspace(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    workspace = rehearsed(tmp_path, "workspace")["workspace"]
    assert "REHEARSAL" in capsys.readouterr().out
    assert workspace["rehearsal"] and [row["direction"] for row in workspace["results"]] == ["backward", "forward"]
    small, large = workspace["results"][0]["limits"]
    assert small["products"] > large["products"] == 2
    assert workspace["failures"] == workspace["not_reached"] == []


@pytest.mark.exhaustive
def test_rehearsal_of_the_tests(tmp_path: Path):
    rehearsed(tmp_path, "tests")


@pytest.mark.exhaustive
def test_rehearsal_of_the_sanitizers(tmp_path: Path):
    rehearsed(tmp_path, "sanitizers")
    log = (tmp_path / "sanitizers.log").read_text()
    assert all(f"--tool {tool}" in log for tool in ("memcheck", "racecheck", "synccheck"))
    assert log.count("deterministic: correct") == 18


@pytest.mark.slow
def test_the_cases_for_the_sanitizers_are_correct(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["sanitizer_cases", "--rehearse"])
    assert sanitizer_cases.main() == 0
    assert capsys.readouterr().out.count("deterministic: correct") == 8


@pytest.mark.exhaustive
def test_rehearsal_of_the_benchmark(tmp_path: Path):
    assert_measured(rehearsed(tmp_path, "benchmark")["benchmark"])


@pytest.mark.slow
def test_rehearsal_of_some_rows_of_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "cases", lambda *arguments: list(all_cases(*arguments))[::16])
    monkeypatch.setattr(measure, "_LEAST_ROUNDS", 1)
    path = tmp_path / "benchmark.json"
    assert rehearse(["--parts", "forward", "backward", "memory", "--output", str(path)]) == 0
    assert_measured(json.loads(path.read_text()))


def assert_measured(document: dict[str, Any]):
    assert document["rehearsal"]
    assert document["targets"] == document["failures"] == document["not_reached"] == []
    assert {row["operation"] for row in document["results"]} == set(OPERATIONS)
    for row in document["results"]:
        assert row["device"] == "rehearsal"
        assert set(row["host_seconds"]) == set(row["launches"]) == {"forward", "backward"}
    assert set(document["floors"]["rehearsal"]) == {"float16", "bfloat16", "float32", "float32, tf32", "memory"}


def test_rows_after_the_time_limit_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "benchmark.json"
    options = ["--operations", "deform_roi_pool", "--parts", "forward", "--minutes", "0"]
    assert rehearse([*options, "--output", str(path)]) == 0
    document = json.loads(path.read_text())
    assert document["results"] == [] and len(document["not_reached"]) >= 5
    assert f"{len(document['not_reached'])} rows were not reached in 0 minutes" in capsys.readouterr().out


@pytest.mark.slow
def test_parts_that_fail_hang_or_do_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pid_file = tmp_path / "pid"
    hanging = f"sleep 600 & echo $! > '{pid_file}'; wait"  # starts in milliseconds
    results = tmp_path / "results.json"
    results.write_text('{"targets": [], "old": true}')
    target = {"name": "speed", "value": 3.25, "relation": ">=", "limit": 4.0, "holds": False}
    written = f"import json; open({str(results)!r}, 'w').write(json.dumps({{'targets': [{target!r}]}}))"
    count = f"import json; print(len(json.load(open({str(tmp_path / 'gpu.json')!r}))['parts']), 'before')"
    parts = [
        Part("fails", [python("print('oh no'); raise SystemExit(3)"), python("print('still tried')")], 30),
        Part("hangs", [["sh", "-c", hanging]], 1.5, results),
        Part("missing", [["no-such-program-anywhere"]], 30),
        Part("works", [python(written)], 30, results),
        Part("reads the results so far", [python(count)], 30),
    ]
    begin = time.monotonic()
    assert run_parts(parts, tmp_path) == 1
    assert time.monotonic() - begin < 60
    outcomes = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert [outcome["status"] for outcome in outcomes] == ["failed", "ended", "failed", "passed", "passed"]
    assert outcomes[0]["last_lines"][-1] == "still tried"
    assert outcomes[1]["results"] is None, "results of an earlier run"
    assert "cannot run no-such-program-anywhere" in outcomes[2]["last_lines"][-1]
    assert outcomes[4]["last_lines"][-1] == "4 before"
    child = int(pid_file.read_text())
    time.sleep(0.2)
    stat = Path(f"/proc/{child}/stat")
    assert not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z", "a child outlived its part"
    printed = capsys.readouterr().out
    assert "MISSED" in printed and "3.25" in printed and ">= 4" in printed


def test_parts_share_the_time():
    parts = parts_of([], 600, Path("out"), False, None)
    assert [part.name for part in parts] == list(SHARES)
    assert sum(part.seconds for part in parts) == pytest.approx(600)
    (model,) = parts_of(["model"], 600, Path("out"), False, None)
    assert model.seconds == pytest.approx(600)
    commands = [command for part in parts for command in part.commands]
    (tests,) = (command for command in commands if "pytest" in command)
    assert tests[tests.index("gpu") - 1] == "-m"
    assert sum("compute-sanitizer" in command[0] for command in commands) == 3


def test_an_unknown_part_is_an_error(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["speed"])
    assert "parts are model, workspace, tests, sanitizers, benchmark, got speed" in capsys.readouterr().err


@pytest.mark.parametrize(("parts", "seconds"), [(["model"], 240), (["model", "tests"], 480), ([], 600)])
def test_a_part_alone_takes_four_minutes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, parts: list[str], seconds: float
):
    planned: list[Part] = []
    monkeypatch.setattr(gpu, "run_parts", lambda parts, *_: planned.extend(parts))
    main(["--out", str(tmp_path), *parts])
    assert sum(part.seconds for part in planned) == pytest.approx(seconds)


@pytest.mark.slow
def test_a_missing_gpu_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    if os.environ.get("CUDA_VISIBLE_DEVICES") is None and Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    assert main(["--minutes", "1", "--out", str(tmp_path), "workspace"]) == 1
    assert "needs a GPU" in capsys.readouterr().out
