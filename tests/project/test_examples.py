"""The examples, with the output that a user sees."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(name: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, str(EXAMPLES / name)]
    return subprocess.run(command, env=environment, check=False, capture_output=True, text=True)


@pytest.fixture
def output_of(monkeypatch, capsys):
    """Run an example in this process, which has the frameworks imported already, and return its output."""

    def run(name: str, *arguments: str) -> str:
        path = str(EXAMPLES / name)
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        runpy.run_path(path, run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def no_gpu(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_quickstart_numpy() -> None:
    done = run_example("quickstart_numpy.py")
    assert done.returncode == 0, done.stderr
    assert "two pixels further left: True" in done.stdout
    assert "gradient of offset: (1, 18, 32, 48)" in done.stdout
    before, after = re.findall(r"\d\.\d{4}", done.stdout)
    assert float(after) < float(before)


def test_quickstart_torch(output_of, no_gpu) -> None:
    printed = output_of("quickstart_torch.py")
    error = float(printed.splitlines()[4].split("error ")[1].split(",")[0])
    assert error < 0.01
    assert "layer output (4, 8, 48, 48)" in printed


def test_quickstart_attention(output_of, no_gpu) -> None:
    printed = output_of("quickstart_attention.py")
    x, y = re.findall(r"location \((\d\.\d+), (\d\.\d+)\)", printed)[4]
    assert abs(float(x) - 0.6) < 0.005 and abs(float(y) - 0.4) < 0.005
    assert "layer output (1, 100, 16)" in printed


def test_quickstart_jax(output_of) -> None:
    pytest.importorskip("jax")
    printed = output_of("quickstart_jax.py")
    before, after = re.findall(r"\d\.\d{4}", printed)
    assert float(after) < float(before)
    assert "pooled regions: (2, 8, 7, 7)" in printed


def test_quickstart_cupy_runs_or_names_the_missing_requirement() -> None:
    cupy = pytest.importorskip("cupy")
    done = run_example("quickstart_cupy.py")
    if cupy.cuda.is_available():
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 1
    assert done.stderr.startswith("This example needs")
    assert done.stderr.count("\n") == 1


def test_train_small(output_of, no_gpu) -> None:
    """A shortened run: the gain shows only after more steps."""
    printed = output_of("train_small.py", "--steps", "3")
    regular, deformable, gain = (float(line.split()[-2]) for line in printed.splitlines())
    assert 0 <= regular <= 100
    assert 0 <= deformable <= 100
    assert gain == pytest.approx(deformable - regular, abs=0.11)
