"""Importing the library is fast and imports no array library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

IMPORT = """
import sys, time
before = set(sys.modules)
start = time.perf_counter()
import dcnops
seconds = time.perf_counter() - start
heavy = {"numba", "llvmlite", "cupy", "cupy_backends", "torch", "jax", "numpy"} & (set(sys.modules) - before)
print(seconds, *sorted(heavy))
"""


def test_import_is_fast_and_imports_no_backend():
    printed = [
        subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(3)
    ]
    assert all(heavy == [] for _, *heavy in printed)
    assert min(float(seconds) for seconds, *_ in printed) < 0.2


@pytest.mark.slow
def test_a_checkout_that_is_not_installed_has_its_adapters():
    pytest.importorskip("torch")
    root = Path(__file__).resolve().parents[2]
    code = "import dcnops.adapters.torch as adapter, dcnops; print(adapter.__file__); print(dcnops.__file__)"
    without = "import sys; sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in str(finder)]"
    run = [sys.executable, "-c", f"{without}; {code}"]
    printed = subprocess.run(run, cwd=root, capture_output=True, text=True, check=True).stdout.split()
    assert printed == [str(root / "adapters/torch/__init__.py"), str(root / "dcnops/__init__.py")]


def test_numpy_calls_import_no_other_library_and_leave_numba_as_it_is():
    code = """
import gc, importlib.util, sys, numpy as np, dcnops
x = np.ones((1, 1, 3, 3), np.float32)
dcnops.deform_conv2d(x, np.zeros((1, 2, 3, 3), np.float32), np.ones((1, 1, 1, 1), np.float32))
assert not {"cupy", "torch", "jax", "scipy.linalg"} & set(sys.modules) and gc.isenabled()

from numba.np import arraymath, linalg
has_scipy = importlib.util.find_spec("scipy") is not None
assert arraymath._HAVE_BLAS == has_scipy
assert arraymath.ensure_blas is linalg.ensure_blas
if has_scipy:
    linalg.ensure_blas()
    assert "scipy.linalg.cython_blas" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_the_torch_adapter_imports_neither_the_compiler_nor_a_backend():
    pytest.importorskip("torch")
    code = """
import sys, dcnops.adapters.torch
assert not {"torch._dynamo", "torch.utils.flop_counter", "cupy", "numba"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_kernel_folder_holds_no_python():
    """A Python module in cuda/ would hide NVIDIA's package of that name in the root folder and break CuPy."""
    assert not list(Path("cuda").rglob("*.py"))
    assert list(Path("cuda").glob("*.cu"))


def test_cupy_can_be_imported_in_the_root_folder():
    pytest.importorskip("cupy")
    subprocess.run([sys.executable, "-c", "import cupy, dcnops._backends.cuda.backend"], check=True)


@pytest.mark.parametrize("module", ["dcnops", "dcnops.adapters.torch", "dcnops.adapters.torch.spatial_support"])
def test_public_names_are_listed(module: str):
    if module != "dcnops":
        pytest.importorskip("torch")
    names = __import__(module, fromlist=["__all__"])
    assert sorted(names.__all__) == sorted(set(names.__all__))
    assert all(hasattr(names, name) for name in names.__all__)
