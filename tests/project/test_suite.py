"""The test suite itself: what runs without the optional packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

COLLECT = """
import sys, pytest
sys.modules.update(dict.fromkeys(("torch", "torchvision", "jax")))
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]))
"""


@pytest.mark.slow
def test_tests_of_missing_frameworks_are_left_out_in_one_line():
    done = subprocess.run([sys.executable, "-c", COLLECT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("left out")]
    assert line.startswith("left out because jax, torch, torchvision cannot be imported: ")
    left_out = [path for path in ("tests/torch", "tests/detector", "tests/jax", "tests/benchmarks") if path in line]
    assert len(left_out) == 4 and not any(path + "/" in done.stdout for path in left_out)
    for path in ("arrays/test_deform_roi_pool", "arrays/test_robustness", "arrays/test_errors", "cuda/test_plans"):
        assert f"tests/{path}.py::" in done.stdout
