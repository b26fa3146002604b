"""One thread per process: parallel tests would compete for cores, and results depend on the number of threads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

os.environ["OMP_NUM_THREADS"] = "1"  # for programs that tests start


@pytest.fixture
def picture(tmp_path):
    def make(name: str, width: int = 60, height: int = 40, mode: str = "RGB", **options: Any) -> Path:
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).convert(mode).save(path, **options)
        return path

    return make


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Run every test with one thread: training is reproducible only with the same number of threads."""
    torch.set_num_threads(1)
