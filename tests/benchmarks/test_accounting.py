"""Launches and scratch memory of real layers, counted without a GPU."""

from __future__ import annotations

import itertools
import re

import pytest

from benchmarks import accounting
from benchmarks.accounting import LAYERS, account

MIB = 2**20
LAYOUTS = ("NCHW", "NHWC")
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}


def weight_bytes(layer: tuple[int, int, int], dtype: str) -> int:
    return 9 * layer[0] ** 2 * ITEMSIZE[dtype]


@pytest.mark.parametrize("name", LAYERS)
def test_forward_of_one_image_takes_three_launches(name: str):
    for layout, (dtype, precision) in itertools.product(
        LAYOUTS, (("float16", "ieee"), ("bfloat16", "ieee"), ("float32", "ieee"), ("float32", "tf32"))
    ):
        found = account(LAYERS[name], 1, dtype, "forward", layout, precision)
        assert found.launches <= 3
        assert all(re.match("run_array_jobs|deform_conv2d_(fused|add_splits)", kernel) for kernel in found.kernels)


@pytest.mark.parametrize("name", LAYERS)
def test_forward_scratch_memory_is_bounded(name: str):
    """Tensor cores need no columns: with channels last, scratch memory holds only the rearranged weights."""
    for layout, dtype, N in itertools.product(LAYOUTS, ("float16", "float32"), (1, 16, 33)):
        found = account(LAYERS[name], N, dtype, "forward", layout)
        assert found.scratch_bytes <= 32 * MIB + weight_bytes(LAYERS[name], dtype)
        if dtype == "float16" and layout == "NHWC" and N > 2:
            assert found.scratch_bytes == weight_bytes(LAYERS[name], dtype)
            assert found.launches == 2


@pytest.mark.parametrize("name", ["conv4", "conv5, stride 32"])
def test_backward_of_one_image_takes_seven_launches(name: str):
    """The columns of an image fit into one chunk here; other layers take six launches per chunk."""
    for layout, deterministic in itertools.product(LAYOUTS, (False, True)):
        found = account(LAYERS[name], 1, "float16", "backward", layout, deterministic=deterministic)
        assert found.launches == 7
        assert found.kernels.count("product") == 2


@pytest.mark.parametrize("name", LAYERS)
def test_backward_scratch_memory_is_bounded(name: str):
    """The limit is 32 MiB beyond the weights, unless one image and its float32 gradient take more than half of it."""
    C, H, W = layer = LAYERS[name]
    for layout, dtype, N in itertools.product(LAYOUTS, ("float16", "float32"), (1, 2, 16)):
        deterministic = layout == "NHWC"
        found = account(layer, N, dtype, "backward", layout, deterministic=deterministic)
        once = weight_bytes(layer, dtype) + weight_bytes(layer, "float32") + 4 * C * max(N, N * H * W // 1024 + 1) + 256
        image = C * H * W * ITEMSIZE[dtype] + 4 * C * H * W + 8 * H * W + 256
        assert found.scratch_bytes <= once + max(32 * MIB, image + 16 * MIB + 64 * 9 * (4 * C + 32))
        if name == "conv4":
            assert found.scratch_bytes <= once + 32 * MIB


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_scratch_memory_holds_copies_of_input_and_weights(direction: str):
    C, H, W = layer = LAYERS["conv3"]
    nchw, nhwc = (account(layer, 1, "float16", direction, layout).scratch_bytes for layout in LAYOUTS)
    assert nchw >= 2 * C * H * W + weight_bytes(layer, "float16")
    assert nhwc >= weight_bytes(layer, "float16")
    if direction == "forward":
        assert nchw == nhwc + 2 * C * H * W


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(accounting, "LAYERS", {"conv4": LAYERS["conv4"]})
    assert accounting.main() == 0
    printed = capsys.readouterr().out
    assert printed.count("conv4") == 24 and "backward" in printed
