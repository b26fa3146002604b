"""The wheel holds what the tree holds, and works in an empty environment from another directory."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROJECT = (
    *("dcnops", "adapters", "cuda", "tests", "examples", "benchmarks", "docs"),
    *("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "Makefile", "CHANGELOG.md", "CONTRIBUTING.md"),
    *("constraints.txt", "mkdocs.yml", ".clang-format"),
)

USE = """
import numpy as np
import dcnops
from dcnops._backends.cuda.engine import kernel_source
image = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
offset = np.zeros((1, 2, 4, 4), np.float32)
offset[:, 1] = 1
weight = np.ones((1, 1, 1, 1), np.float32)
output = dcnops.deform_conv2d(image, offset, weight)
assert output[0, 0, 0].tolist() == [1, 2, 3, 0], output
gradients = dcnops.deform_conv2d_backward(output, image, offset, weight)
assert gradients.input.shape == image.shape
assert "deform_conv2d_columns" in kernel_source("deform_conv2d_columns")
import dcnops.adapters
print(dcnops.__version__, dcnops.__file__)
"""


EXTRAS = {
    "torch": """
import torch
from dcnops.adapters.torch import ModulatedDeformConv2dPack
from dcnops.adapters.torch.spatial_support import sampling_locations
layer = ModulatedDeformConv2dPack(3, 4, 3, padding=1)
layer(torch.rand(1, 3, 8, 8)).sum().backward()
assert len(sampling_locations(layer, torch.rand(3, 8, 8), ("", 4, 4)).positions) == 9
""",
    "plots": """
import torch
from dcnops.adapters.torch.spatial_support.plots import plot_spatial_support
plot_spatial_support({"": torch.nn.Conv2d(3, 4, 3)}, torch.rand(3, 8, 8), {"": ("", 2, 2)}, torch.rand(3, 8, 8), budget=20)
""",
    "onnx": """
import torch
from dcnops.adapters.torch import DeformConv2dPack
from dcnops.adapters.torch.onnx import export
export(DeformConv2dPack(3, 4, 3).eval(), (torch.rand(1, 3, 8, 8),), "model.onnx")
""",
    "jax": """
import jax, numpy as np
from dcnops.adapters.jax import deform_conv2d
x, weight = np.ones((1, 2, 5, 5), np.float32), np.ones((2, 2, 1, 1), np.float32)
assert jax.grad(lambda o: deform_conv2d(x, o, weight).sum())(np.zeros((1, 2, 5, 5), np.float32)).shape == (1, 2, 5, 5)
""",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tracked files, in the environment of the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in PROJECT:
        copy_into(ROOT / name, source / name)
    # The source distribution, and the wheel from it.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
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


def test_the_source_distribution_holds_the_project(wheel: Path):
    (built,) = wheel.parent.glob("dcnops-*.tar.gz")
    with tarfile.open(built) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    for name in PROJECT:
        files = (
            [path for path in (ROOT / name).rglob("*") if path.is_file()] if (ROOT / name).is_dir() else [ROOT / name]
        )
        for path in files:
            if "__pycache__" not in path.parts:
                assert path.relative_to(ROOT).as_posix() in held


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_wheel_works_with_what_an_extra_brings(extra: str, wheel: Path, tmp_path: Path):
    """The packages are those of this environment, the library is the wheel's."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = next((tmp_path / "venv" / "lib").iterdir()) / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # A folder that a .pth file names is not searched for .pth files itself: the editable installation stays out.
    (site / "packages.pth").write_text(sysconfig.get_paths()["purelib"])
    place = "import dcnops\nassert 'venv' in dcnops.__file__, dcnops.__file__\n"
    (tmp_path / "empty").mkdir()
    command = [str(python), "-c", place + EXTRAS[extra]]
    result = subprocess.run(command, cwd=tmp_path / "empty", capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
