"""Precision of float32 convolutions on a GPU: the argument, the setting of the adapter, torch's switch."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dcnops
from dcnops.adapters.torch import DeformConv2d, ModulatedDeformConv2dPack, operators, set_float32_precision
from dcnops.adapters.torch.precision import AT_RUN_TIME, operator_precision

ON_A_GPU: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)


@pytest.fixture(autouse=True)
def torch_settings() -> Iterator[None]:
    conv = torch.backends.cudnn.conv
    before, matmul = conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    yield
    conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision = before, matmul


@pytest.mark.parametrize("switch, expected", [("tf32", "tf32"), ("ieee", "ieee")])
def test_the_default_is_that_of_torchs_convolutions(switch: str, expected: str):
    torch.backends.cuda.matmul.fp32_precision = "tf32" if switch == "ieee" else "ieee"  # has no influence
    torch.backends.cudnn.conv.fp32_precision = switch
    assert operator_precision(None, ON_A_GPU) == expected


def test_torch_uses_tf32_unless_the_user_says_otherwise():
    assert operator_precision(None, ON_A_GPU) == "tf32"
    torch.backends.cudnn.allow_tf32 = False
    assert operator_precision(None, ON_A_GPU) == "ieee"
    torch.backends.cudnn.allow_tf32 = True
    assert operator_precision(None, ON_A_GPU) == "tf32"


def test_older_versions_of_torch_have_one_switch(monkeypatch: pytest.MonkeyPatch):
    for allowed, expected in ((True, "tf32"), (False, "ieee")):
        monkeypatch.setattr(torch.backends, "cudnn", SimpleNamespace(allow_tf32=allowed))
        assert operator_precision(None, ON_A_GPU) == expected


def test_the_argument_comes_before_the_setting_and_the_setting_before_torch():
    with set_float32_precision("3xtf32"):
        assert operator_precision(None, ON_A_GPU) == "3xtf32"
        assert operator_precision("ieee", ON_A_GPU) == "ieee"
        with set_float32_precision(None):
            assert operator_precision(None, ON_A_GPU) == "tf32"
    assert operator_precision(None, ON_A_GPU) == "tf32"
    try:
        set_float32_precision("ieee")
        assert operator_precision(None, ON_A_GPU) == "ieee"
    finally:
        set_float32_precision(None)
    with pytest.raises(dcnops.ArgumentError, match="precision must be"):
        set_float32_precision("fp32")


@pytest.mark.parametrize("device, dtype", [("cpu", torch.float32), ("cuda", torch.float16), ("cuda", torch.float64)])
def test_other_data_have_one_precision(device: str, dtype: torch.dtype):
    with set_float32_precision("tf32"):
        assert operator_precision("tf32", SimpleNamespace(device=torch.device(device), dtype=dtype)) == "ieee"


def test_compiled_graphs_read_the_switch_when_they_run(monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert operator_precision(None, ON_A_GPU) == AT_RUN_TIME
        assert operator_precision("ieee", ON_A_GPU) == "ieee"
    used: list[str] = []
    monkeypatch.setattr(
        dcnops, "deform_conv2d", lambda precision, input, **rest: (used.append(precision), input * 1)[1]
    )
    image, offset, weight = torch.ones(1, 1, 1, 1), torch.zeros(1, 2, 1, 1), torch.ones(1, 1, 1, 1)
    for switch in ("tf32", "ieee"):
        torch.backends.cudnn.conv.fp32_precision = switch
        operators.deform_conv2d(image, offset, weight, None, None, [1, 1], [0, 0, 0, 0], [1, 1], AT_RUN_TIME)
    assert used == ["tf32", "ieee"]


def test_layers_pass_their_precision_on(monkeypatch: pytest.MonkeyPatch):
    used: list[str | None] = []
    monkeypatch.setattr(
        "dcnops.adapters.torch.deform_conv2d_layers.deform_conv2d",
        lambda *arguments, precision: used.append(precision),
    )
    image = torch.ones(1, 4, 5, 5)
    layer = DeformConv2d(4, 4, 3, precision="ieee")
    layer(image, torch.zeros(1, 18, 3, 3))
    ModulatedDeformConv2dPack(4, 4, 3, precision="3xtf32")(image)
    DeformConv2d(4, 4, 3)(image, torch.zeros(1, 18, 3, 3))
    assert used == ["ieee", "3xtf32", None]
    assert "precision='ieee'" in repr(layer)
    with pytest.raises(dcnops.ArgumentError, match="precision must be"):
        DeformConv2d(4, 4, 3, precision="half")
