"""The wheel holds what the tree holds, and works in an empty environment from another directory."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

USE = """
import numpy as np
import dcnops
from dcnops._kernels import kernel_source
image = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
offset = np.zeros((1, 2, 4, 4), np.float32)
offset[:, 1] = 1
weight = np.ones((1, 1, 1, 1), np.float32)
output = dcnops.deform_conv2d(image, offset, weight)
assert output[0, 0, 0].tolist() == [1, 2, 3, 0], output
gradients = dcnops.deform_conv2d_backward(output, image, offset, weight)
assert gradients.input.shape == image.shape
assert "deform_conv2d_columns" in kernel_source("deform_conv2d_forward")
import dcnops.adapters
print(dcnops.__version__, dcnops.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tracked files, in the environment of the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("dcnops", "adapters", "cuda", "pyproject.toml", "README.md", "LICENSE"):
        copy_into(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = folder.glob("dcnops-*.whl")
    assert built.name.endswith("-py3-none-any.whl")
    return built


def copy_into(source: Path, target: Path) -> None:
    if source.is_dir():
        for path in source.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                copy_into(path, target / path.relative_to(source))
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())


def test_the_wheel_holds_the_tree(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = set()
    for folder, place in (("dcnops", "dcnops"), ("adapters", "dcnops/adapters"), ("cuda", "dcnops/cuda")):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                expected.add(f"{place}/{path.relative_to(ROOT / folder).as_posix()}")
    assert held == expected


def test_the_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path):
    """With its base dependencies alone, from another directory."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    constraints = str(ROOT / "constraints.txt")
    install = [str(python), "-m", "pip", "install", "--quiet", "--constraint", constraints, str(wheel)]
    subprocess.run(install, check=True)
    listed = subprocess.run([str(python), "-m", "pip", "list"], check=True, capture_output=True, text=True).stdout
    assert "cupy" not in listed and "torch" not in listed
    result = subprocess.run([str(python), "-c", USE], cwd="/", check=True, capture_output=True, text=True)
    assert str(tmp_path / "venv") in result.stdout
