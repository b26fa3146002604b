"""The wheel contains the tree and works in a new environment from another folder."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]

PROJECT = (
    *("dcnops", "adapters", "cuda", "tests", "examples", "benchmarks", "docs"),
    *("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "Makefile", "CHANGELOG.md", "CONTRIBUTING.md"),
    *("constraints.txt", "mkdocs.yml", ".clang-format"),
)

USE = """
import numpy as np
import dcnops
from dcnops._backends.cuda.kernel_source import kernel_source
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
image = torch.rand(3, 8, 8)
plot_spatial_support({"": torch.nn.Conv2d(3, 4, 3)}, image, {"": ("", 2, 2)}, image, budget=20)
""",
    "onnx": """
import torch
from dcnops.adapters.torch import DeformConv2dPack
from dcnops.adapters.torch.onnx import export
export(DeformConv2dPack(3, 4, 3).eval(), (torch.rand(1, 3, 8, 8),), "model.onnx")
""",
    "detector": """
from importlib.metadata import entry_points
script = next(script for script in entry_points(group="console_scripts") if script.name == "dcnops-detector")
assert script.load()(["flops", "--set", "network.backbone=small", "network.detector=mask"]) == 0
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
    """Build the source distribution from a copy of the project, and the wheel from it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in PROJECT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = folder.glob("dcnops-*.whl")
    assert built.name.endswith("-py3-none-any.whl")
    return built


def files(name: str) -> list[Path]:
    """Return the files of a folder, or the file of that name, relative to the root."""
    paths = (ROOT / name).rglob("*") if (ROOT / name).is_dir() else [ROOT / name]
    return [path.relative_to(ROOT) for path in paths if path.is_file() and "__pycache__" not in path.parts]


def test_the_wheel_contains_the_tree(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    folders = {"dcnops": "dcnops", "adapters": "dcnops/adapters", "cuda": "dcnops/cuda"}
    folders["examples/detector"] = "dcnops/detector"
    expected = {
        f"{place}/{path.relative_to(folder).as_posix()}" for folder, place in folders.items() for path in files(folder)
    }
    assert held == expected


def test_the_source_distribution_contains_the_project(wheel: Path):
    (built,) = wheel.parent.glob("dcnops-*.tar.gz")
    with tarfile.open(built) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {path.as_posix() for name in PROJECT for path in files(name)} <= held


@pytest.mark.parametrize(
    "extras",
    [("torch", "jax", "detector"), pytest.param(("plots", "onnx"), marks=pytest.mark.exhaustive)],
    ids=" ".join,
)
def test_the_wheel_works_alone_and_with_each_extra(
    extras: tuple[str, ...], wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The required packages, then all, are those of this environment. One process imports torch only once."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir("/")
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    subprocess.run([*pip, "install", "--quiet", "--no-compile", "--no-deps", "--no-index", str(wheel)], check=True)
    site = next((tmp_path / "venv" / "lib").iterdir()) / "site-packages"
    packages = Path(sysconfig.get_paths()["purelib"])
    for name in ("numpy", "numba", "llvmlite"):
        for part in {path.parts[0] for path in distribution(name).files or []} - {".."}:
            (site / part).symlink_to(packages / part)
    subprocess.run([*pip, "check"], check=True)  # nothing else is required

    def run(code: str) -> str:
        done = subprocess.run([str(python), "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert str(site / "dcnops") in run(USE)
    command = [str(tmp_path / "venv" / "bin" / "dcnops-detector")]
    done = subprocess.run([*command, "--help"], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("usage: dcnops-detector ")
    done = subprocess.run([*command, "flops"], check=False, capture_output=True, text=True)
    assert done.stderr == "error: the package torch is missing: pip install 'dcnops[detector]'\n"

    # Python ignores .pth files in a folder named by a .pth file, which keeps the editable installation out.
    (site / "packages.pth").write_text(str(packages))
    place = f"import dcnops\nassert dcnops.__file__.startswith({str(site)!r}), dcnops.__file__\n"
    run(place + "".join(EXTRAS[extra] for extra in extras))


@pytest.mark.parametrize(
    ("package", "module", "extra"),
    [
        ("torch", "torch", "torch"),
        ("jax", "jax", "jax"),
        ("matplotlib", "torch.spatial_support.plots", "plots"),
    ],
)
def test_missing_packages_are_named_with_their_extra(
    package: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"dcnops.adapters.{module}", raising=False)
    with pytest.raises(ModuleNotFoundError) as raised:
        importlib.import_module(f"dcnops.adapters.{module}")
    assert raised.value.name == package
    assert str(raised.value) == f"the package {package} is missing: pip install 'dcnops[{extra}]'"
