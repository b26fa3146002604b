"""The examples, run as a user runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, env=environment, check=False, capture_output=True, text=True)


def test_quickstart_numpy() -> None:
    done = run_example("quickstart_numpy.py")
    assert done.returncode == 0, done.stderr
    assert "two pixels further left: True" in done.stdout
    assert "gradient of offset: (1, 18, 32, 48)" in done.stdout
    before, after = re.findall(r"\d\.\d{4}", done.stdout)
    assert float(after) < float(before)


def test_quickstart_torch() -> None:
    done = run_example("quickstart_torch.py")
    assert done.returncode == 0, done.stderr
    error = float(done.stdout.splitlines()[4].split("error ")[1].split(",")[0])
    assert error < 0.01
    assert "layer output (4, 8, 48, 48)" in done.stdout


def test_quickstart_attention() -> None:
    done = run_example("quickstart_attention.py")
    assert done.returncode == 0, done.stderr
    x, y = re.findall(r"location \((\d\.\d+), (\d\.\d+)\)", done.stdout)[4]
    assert abs(float(x) - 0.6) < 0.005 and abs(float(y) - 0.4) < 0.005
    assert "layer output (1, 100, 16)" in done.stdout


def test_quickstart_jax() -> None:
    done = run_example("quickstart_jax.py")
    assert done.returncode == 0, done.stderr
    before, after = re.findall(r"\d\.\d{4}", done.stdout)
    assert float(after) < float(before)
    assert "pooled regions: (2, 8, 7, 7)" in done.stdout


def test_quickstart_cupy_runs_or_names_the_missing_requirement() -> None:
    import cupy

    done = run_example("quickstart_cupy.py")
    if cupy.cuda.is_available():
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 1
    assert done.stderr.startswith("This example needs")
    assert done.stderr.count("\n") == 1


def test_train_small() -> None:
    """A shortened run: the gain shows only after more steps."""
    done = run_example("train_small.py", "--steps", "3")
    assert done.returncode == 0, done.stderr
    regular, deformable, gain = (float(line.split()[-2]) for line in done.stdout.splitlines())
    assert 0 <= regular <= 100
    assert 0 <= deformable <= 100
    assert gain == pytest.approx(deformable - regular, abs=0.11)
