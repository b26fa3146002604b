"""Launches and scratch memory of real layers, counted without a GPU."""

from __future__ import annotations

import itertools
import re

import pytest

from benchmarks import accounting
from benchmarks.accounting import LAYERS, account
from benchmarks.operations import Case, load
from dcnops._backends.cuda.workspace import WORKSPACE_BYTES

MIB = 2**20
LAYOUTS = ("NCHW", "NHWC")
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}
ALIGNMENT = 256
"""Sizes of scratch arrays are rounded up to a multiple of it."""


def weight_bytes(layer: tuple[int, int, int], dtype: str) -> int:
    return 9 * layer[0] ** 2 * ITEMSIZE[dtype]


@pytest.mark.parametrize("name", LAYERS)
def test_forward_of_one_image_takes_three_launches(name: str):
    for layout, (dtype, products) in itertools.product(
        LAYOUTS, (("float16", "ieee"), ("bfloat16", "ieee"), ("float32", "ieee"), ("float32", "tf32"))
    ):
        found = account(Case("cuda", LAYERS[name], 1, dtype, products, layout), "forward")
        assert found.steps == found.launches <= 3
        assert all(re.match("run_array_jobs|deform_conv2d_(fused|add_splits)", kernel) for kernel in found.kernels)


@pytest.mark.parametrize("name", LAYERS)
def test_forward_scratch_memory_is_bounded(name: str):
    """Tensor cores need no columns: with channels last, scratch memory holds only the rearranged weights."""
    for layout, dtype, N in itertools.product(LAYOUTS, ("float16", "float32"), (1, 16, 33)):
        found = account(Case("cuda", LAYERS[name], N, dtype, layout=layout), "forward")
        assert found.scratch_bytes <= WORKSPACE_BYTES + weight_bytes(LAYERS[name], dtype) + ALIGNMENT
        if dtype == "float16" and layout == "NHWC" and N > 2:
            assert found.scratch_bytes == weight_bytes(LAYERS[name], dtype)
            assert found.steps == 2


@pytest.mark.parametrize("name", LAYERS)
def test_backward_of_one_image_takes_eight_steps(name: str):
    """The columns of an image fit into one chunk."""
    for layout, deterministic in itertools.product(LAYOUTS, (False, True)):
        case = Case("cuda", LAYERS[name], 1, "float16", layout=layout, deterministic=deterministic)
        found = account(case, "backward")
        assert (found.launches, found.products, found.fills) == (5, 2, 1)


@pytest.mark.parametrize("name", LAYERS)
def test_backward_scratch_memory_is_bounded(name: str):
    C, H, W = layer = LAYERS[name]
    for layout, dtype, N in itertools.product(LAYOUTS, ("float16", "float32"), (1, 2, 16)):
        case = Case("cuda", layer, N, dtype, layout=layout, deterministic=layout == "NHWC")
        once = weight_bytes(layer, dtype) + weight_bytes(layer, "float32") + 4 * C * max(N, N * H * W // 1024 + 1)
        assert account(case, "backward").scratch_bytes <= once + WORKSPACE_BYTES + 8 * ALIGNMENT


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_scratch_memory_holds_copies_of_input_and_weights(direction: str):
    C, H, W = layer = LAYERS["conv3"]
    cases = (Case("cuda", layer, 1, "float16", layout=layout) for layout in LAYOUTS)
    nchw, nhwc = (account(case, direction).scratch_bytes for case in cases)
    assert nchw >= 2 * C * H * W + weight_bytes(layer, "float16")
    assert nhwc >= weight_bytes(layer, "float16")
    if direction == "forward":
        assert nchw == nhwc + 2 * C * H * W


def test_roi_pooling():
    case = Case("cuda", (256, 50, 84, 512, 7), dtype="float16")
    assert [account(case, direction).steps for direction in ("forward", "backward")] == [2, 3]


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(accounting, "LAYERS", {"conv4": LAYERS["conv4"]})
    assert accounting.main() == 0
    printed = capsys.readouterr().out
    assert printed.count("conv4") == 24 and "backward" in printed
    assert printed.count("128x64x64, 16 deformable groups |") == 24


def test_groups_count():
    """Offsets of several groups take memory, and weight groups share a product's filters."""
    (one, deformable, grouped) = (
        account(Case("cuda", (128, 64, 64), 1, "float16", **groups), "backward")
        for groups in ({}, {"deformable_groups": 16}, {"groups": 4})
    )
    assert "scatter" in "".join(deformable.kernels) and "scatter" not in "".join(one.kernels)
    assert grouped.scratch_bytes < one.scratch_bytes


@pytest.mark.parametrize("name", ["ms_deform_attn", "deform_aggregate"])
def test_attention_and_aggregation_take_few_steps(name: str):
    for shape, N, dtype in itertools.product(load(name).shapes, (1, 16), ("float16", "float32")):
        found = account(Case("cuda", shape, N, dtype), "forward")
        assert found.kernels[0].startswith("deform_attention_forward") and found.steps == 1 and found.scratch_bytes == 0
        found = account(Case("cuda", shape, N, dtype), "backward")
        assert found.kernels[0].startswith("deform_attention_backward") and found.steps == (
            3 if dtype == "float16" else 2
        )
        found = account(Case("cuda", shape, N, dtype, deterministic=True), "backward")
        assert found.scratch_bytes <= WORKSPACE_BYTES + ALIGNMENT
