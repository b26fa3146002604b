"""The examples run as a user runs them and leave what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
PICTURES = ("1_channels", "2_sampling_points", "3_edges", "4_smoothing", "5_swirl")


def run_example(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, env=environment, check=False, capture_output=True, text=True)


def test_quickstart_numpy() -> None:
    done = run_example("quickstart_numpy.py")
    assert done.returncode == 0, done.stderr
    assert "two pixels further left is True" in done.stdout
    assert "gradient of offset: (1, 18, 32, 48)" in done.stdout
    before, after = re.findall(r"\d\.\d{4}", done.stdout)
    assert float(after) < float(before)


def test_quickstart_torch() -> None:
    done = run_example("quickstart_torch.py")
    assert done.returncode == 0, done.stderr
    error = float(done.stdout.splitlines()[4].split("error ")[1].split(",")[0])
    assert error < 0.01
    assert "layer output (4, 8, 48, 48)" in done.stdout


def test_quickstart_jax() -> None:
    done = run_example("quickstart_jax.py")
    assert done.returncode == 0, done.stderr
    before, after = re.findall(r"\d\.\d{4}", done.stdout)
    assert float(after) < float(before)
    assert "pooled regions: (2, 8, 7, 7)" in done.stdout


def test_quickstart_cupy_runs_or_says_what_is_missing() -> None:
    import cupy

    done = run_example("quickstart_cupy.py")
    if cupy.cuda.is_available():
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 1
    assert done.stderr.startswith("This example needs")
    assert done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def photograph(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and printed text of one run of the example."""
    out = tmp_path_factory.mktemp("photograph") / "pictures"
    done = run_example("photograph.py", "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_the_photograph(photograph: tuple[Path, str], name: str) -> None:
    from PIL import Image

    out, text = photograph
    path = out / f"{name}.png"
    assert str(path) in text
    assert path.stat().st_size < 600_000
    pixels = np.asarray(Image.open(path).convert("RGB"), np.float64)
    height, width, _ = pixels.shape
    assert width > 1000
    assert height > 250
    # Neither blank nor half empty: no band of a quarter of the width is of one colour.
    for band in np.array_split(pixels, 4, axis=1):
        assert band.std() > 20


def test_the_swirl_is_found(photograph: tuple[Path, str]) -> None:
    _, text = photograph
    found = float(text.split("found ")[1].split(";")[0])
    assert found == pytest.approx(2.5, abs=0.02)
