"""Launches and scratch memory of real layers, counted without a GPU."""

from __future__ import annotations

import re

import pytest

from benchmarks import accounting
from benchmarks.accounting import LAYERS, account

MIB = 2**20
DTYPES = ["float16", "bfloat16", "float32"]


def weight_bytes(layer: tuple[int, int, int], dtype: str) -> int:
    return 9 * layer[0] ** 2 * (4 if dtype == "float32" else 2)


@pytest.mark.parametrize("precision", ["ieee", "tf32", "3xtf32"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_forward_of_one_image_in_three_launches(name: str, dtype: str, layout: str, precision: str):
    found = account(LAYERS[name], 1, dtype, "forward", layout, precision)
    assert found.launches <= 3
    assert all(re.match("run_array_jobs|deform_conv2d_(fused|add_splits)", kernel) for kernel in found.kernels)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("N", [1, 2, 8, 16, 33])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_forward_scratch_memory(name: str, N: int, dtype: str, layout: str):
    """At most 32 MiB beside the rearranged weights; tensor cores need no columns at all."""
    found = account(LAYERS[name], N, dtype, "forward", layout)
    assert found.scratch_bytes <= 32 * MIB + weight_bytes(LAYERS[name], dtype)
    if dtype != "float32" and layout == "NHWC" and N > 2:
        assert found.scratch_bytes == weight_bytes(LAYERS[name], dtype)
        assert found.launches == 2


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("name", ["conv4", "conv5, stride 32"])
def test_backward_of_one_image_in_seven_launches(name: str, layout: str, deterministic: bool):
    """Where an image's columns fit a chunk, as they do in 16 bits; the other layers take six launches a chunk."""
    for dtype in ("float16", "bfloat16"):
        found = account(LAYERS[name], 1, dtype, "backward", layout, deterministic=deterministic)
        assert found.launches == 7
        assert found.kernels.count("product") == 2


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("N", [1, 2, 8, 16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_backward_scratch_memory(name: str, N: int, dtype: str, layout: str, deterministic: bool):
    """At most 32 MiB beside what weights need; more only where one image with its float32 gradient leaves no half."""
    layer = LAYERS[name]
    found = account(layer, N, dtype, "backward", layout, deterministic=deterministic)
    C, H, W = layer
    once = weight_bytes(layer, dtype) + weight_bytes(layer, "float32") + 4 * C * max(N, N * H * W // 1024 + 1) + 256
    image = C * H * W * (4 if dtype == "float32" else 2) + 4 * C * H * W + 8 * H * W + 256
    assert found.scratch_bytes <= once + max(32 * MIB, image + 16 * MIB + 64 * 9 * (4 * C + 32))
    if name == "conv4":
        assert found.scratch_bytes <= once + 32 * MIB


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_memory_is_counted(direction: str):
    """A call in 16-bit NCHW needs the input's copy and the weights' at least; one in NHWC no copy of the input."""
    layer = LAYERS["conv3"]
    C, H, W = layer
    turned, native = (account(layer, 1, "float16", direction, layout).scratch_bytes for layout in ("NCHW", "NHWC"))
    assert turned >= 2 * C * H * W + weight_bytes(layer, "float16")
    assert native >= weight_bytes(layer, "float16")
    if direction == "forward":
        assert turned == native + 2 * C * H * W


def test_the_table(capsys: pytest.CaptureFixture[str]):
    assert accounting.main() == 0
    printed = capsys.readouterr().out
    assert printed.count("conv4") == 24 and "backward" in printed
