"""Limit of the scratch memory on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import dcnops
from dcnops._backends.cuda import backend, workspace
from tests.cases import make_conv
from tests.cuda.emulated_cupy import cupy_arguments, emulated_cupy


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("DCNOPS_WORKSPACE", raising=False)
    dcnops.set_workspace(None)
    yield
    dcnops.set_workspace(None)


def test_the_default_is_the_variable_or_128_mebibytes(monkeypatch: pytest.MonkeyPatch):
    assert dcnops.get_workspace() == 128 * 2**20 == workspace.WORKSPACE_BYTES
    dcnops.set_workspace(1000)
    assert dcnops.get_workspace() == 1000
    monkeypatch.setenv("DCNOPS_WORKSPACE", "4096")
    dcnops.set_workspace(None)
    assert dcnops.get_workspace() == 4096
    monkeypatch.setenv("DCNOPS_WORKSPACE", "")
    dcnops.set_workspace(None)
    assert dcnops.get_workspace() == 128 * 2**20


@pytest.mark.parametrize("value", [0, -1, 1.5, "128", True, [], float("nan")])
def test_other_values_are_errors(value: Any):
    with pytest.raises(dcnops.ArgumentError, match="nbytes must be a positive number of bytes, got"):
        dcnops.set_workspace(value)
    assert dcnops.get_workspace() == 128 * 2**20


@pytest.mark.parametrize("value", ["0", "-5", "128MiB", "1e9"])
def test_a_wrong_variable_is_named(value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DCNOPS_WORKSPACE", value)
    with pytest.raises(dcnops.ArgumentError, match="DCNOPS_WORKSPACE must be a positive number of bytes, got"):
        dcnops.get_workspace()


def test_a_smaller_limit_makes_more_chunks(monkeypatch: pytest.MonkeyPatch):
    case = make_conv(N=3, C=8, H=9, W=9, seed=1)
    with emulated_cupy() as stand_in:
        arguments = cupy_arguments(stand_in, case)
        products: list[Any] = []
        multiply = backend.ENGINE._matmul
        monkeypatch.setattr(backend.ENGINE, "_matmul", lambda *call: (products.append(call), multiply(*call)))
        results, counts = [], []
        for limit in (1, 2**20, 1, 2**20):  # planned, then recorded
            dcnops.set_workspace(limit)
            products.clear()
            results.append(dcnops.deform_conv2d_backward(**arguments))
            counts.append(len(products))
        assert len(backend.PROGRAMS.replays) == 2  # of different programs
    assert counts[0] > counts[1] > 0
    for found in results[1:]:
        np.testing.assert_allclose(found.weight, results[0].weight, rtol=1e-5, atol=1e-5)
