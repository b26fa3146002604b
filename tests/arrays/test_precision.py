"""Precision of float32 products: accuracy, scope, and the settings of CuPy and PyTorch that it follows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cupy._core import _routines_linalg as cupy_linalg

import dcnops
from dcnops._backends.cuda import backend as cuda
from dcnops.adapters.torch import deform_conv2d
from tests.cases import DTYPES, assert_close, make_conv
from tests.cuda.emulated_cupy import cupy_arguments, emulated_cupy

SHAPES = {"fused": make_conv(C=64, O=40, H=6, W=7, seed=1), "columns": make_conv(C=6, O=5, H=6, W=7, seed=1)}


def both_directions(arguments: dict[str, Any], **options: Any) -> dict[str, np.ndarray]:
    forward = {name: value for name, value in arguments.items() if name != "grad_out"}
    output = dcnops.deform_conv2d(**forward, **options)
    gradients = dcnops.deform_conv2d_backward(**arguments, **options)
    return {"output": output, **gradients._asdict()}


@pytest.mark.parametrize("path", SHAPES)
def test_each_precision_has_its_accuracy(path: str):
    case = SHAPES[path]
    exact = {"output": case.expected(), **case.expected_gradients()}
    errors = {}
    with emulated_cupy() as stand_in:
        for precision in ("ieee", "3xtf32", "tf32"):
            results = both_directions(cupy_arguments(stand_in, case), precision=precision)
            for name, result in results.items():
                assert_close(result, exact[name], "float16" if precision == "tf32" else "float32", name)
            errors[precision] = np.abs(results["output"] - exact["output"]).max()
    assert errors["tf32"] > 10 * max(errors["ieee"], errors["3xtf32"])


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "float32"])
def test_other_dtypes_have_one_precision(dtype: str):
    case = make_conv(C=64, O=8, dtype=dtype, seed=2)
    with emulated_cupy() as stand_in:
        arguments = cupy_arguments(stand_in, case)
        first, second = (both_directions(arguments, precision=precision) for precision in ("ieee", "tf32"))
    for name, result in first.items():
        if name != "input":  # summed in any order
            np.testing.assert_array_equal(result, second[name], err_msg=name)


def test_numpy_arrays_have_one_precision():
    arguments = {**SHAPES["fused"].arguments(), "grad_out": SHAPES["fused"].grad_out}
    expected = both_directions(arguments)
    for precision in ("ieee", "tf32", "3xtf32", None):
        for name, result in both_directions(arguments, precision=precision).items():
            np.testing.assert_array_equal(result, expected[name], err_msg=name)


@pytest.mark.parametrize("precision", ["fp32", "", 1, True, b"ieee"])
def test_an_unknown_precision_is_an_error(precision: Any):
    case = make_conv()
    message = "precision must be None, 'ieee', 'tf32' or '3xtf32', got "
    with pytest.raises(dcnops.ArgumentError, match=message):
        dcnops.deform_conv2d(**case.arguments(), precision=precision)
    with pytest.raises(dcnops.ArgumentError, match=message):
        dcnops.deform_conv2d_backward(case.grad_out, **case.arguments(), precision=precision)
    tensors = {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in case.arguments().items()
    }
    with pytest.raises(dcnops.ArgumentError, match=message):
        deform_conv2d(**tensors, precision=precision)


def test_none_follows_cupy(monkeypatch: pytest.MonkeyPatch):
    """CuPy's setting needs a device, so a stand-in replaces it here."""
    single, half = np.empty(0, np.float32), np.empty(0, np.float16)
    for compute_type, expected in (
        (cupy_linalg.COMPUTE_TYPE_TF32, "tf32"),
        (cupy_linalg.COMPUTE_TYPE_DEFAULT, "ieee"),
        (cupy_linalg.COMPUTE_TYPE_FP32, "ieee"),
    ):
        switch = SimpleNamespace(
            get_compute_type={np.float32: compute_type}.__getitem__, COMPUTE_TYPE_TF32=cupy_linalg.COMPUTE_TYPE_TF32
        )
        monkeypatch.setattr(cuda, "cupy_linalg", switch)
        assert cuda._precision(None, single) == expected
        assert cuda._precision("3xtf32", single) == "3xtf32"
        assert cuda._precision(None, half) == cuda._precision("tf32", half) == "ieee"


@pytest.mark.gpu
def test_none_follows_the_setting_of_cupy_on_a_gpu():
    before = cupy_linalg.get_compute_type(np.float32)
    try:
        cupy_linalg.set_compute_type(np.float32, cupy_linalg.COMPUTE_TYPE_TF32)
        assert cuda._precision(None, np.empty(0, np.float32)) == "tf32"
    finally:
        cupy_linalg.set_compute_type(np.float32, before)
