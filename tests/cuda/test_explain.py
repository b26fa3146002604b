"""The logger "dcnops" at level DEBUG explains calls on CuPy arrays, under emulation."""

from __future__ import annotations

import logging
from typing import Any

import pytest

import dcnops
from tests.cases import Case, make_attention, make_conv, make_roi_pool
from tests.cuda.emulated_cupy import cupy_arguments, emulated_cupy


def explained(caplog: pytest.LogCaptureFixture, case: Case, **backward: Any) -> list[str]:
    """Return the messages of both directions."""
    with emulated_cupy() as stand_in, caplog.at_level(logging.DEBUG, logger="dcnops"):
        arguments = cupy_arguments(stand_in, case)
        getattr(dcnops, f"{case.operation}_backward")(**arguments, **backward)
        del arguments["grad_out"]
        getattr(dcnops, case.operation)(**arguments)
    return caplog.messages


def test_convolution_through_columns(caplog: pytest.LogCaptureFixture):
    messages = explained(caplog, make_conv(N=2, C=8, O=4, H=5, W=6))
    assert messages[0].startswith("deform_conv2d_backward of cupy arrays: grad_out=float32[2, 4, 5, 6]")
    assert "gradient of the input scattered by atomic additions; 2 images, groups: 1, chunks: 1" in messages[1]
    assert "scratch memory" in messages[1]
    first = next(message for message in messages if message.startswith("launch"))
    assert messages.index(first) == 2 and "run_array_jobs_f32: grid" in first and "block 256x1" in first
    forward = messages[next(i for i, message in enumerate(messages) if message.startswith("deform_conv2d of cupy")) :]
    assert "columns path, because a step covers 128 bytes" in forward[1] and "architecture=90" in forward[1]
    assert "groups: 1, each of 2 images, chunks: 1 of at most 60 rows of columns" in forward[2]
    kinds = [message.split()[:2] for message in forward[3:]]
    assert kinds == [["launch", "run_array_jobs_f32:"], ["launch", "deform_conv2d_columns_f32:"], ["product", "(2,"]]


def test_fused_convolution_and_lists(caplog: pytest.LogCaptureFixture):
    messages = explained(caplog, make_conv(C=64, O=64, H=4, W=4, dtype="float16"), deterministic=True)
    text = "\n".join(messages)
    assert "gradient of the input gathered by lists" in text and "deform_conv2d_gather_input_in_order_f16" in text
    assert "fused path" in text and "1 images by WarpgroupProduct (f16) in tiles of 64 outputs" in text


@pytest.mark.parametrize("deterministic", [False, True])
def test_roi_pooling(caplog: pytest.LogCaptureFixture, deterministic: bool):
    text = "\n".join(explained(caplog, make_roi_pool(C=8, R=6), deterministic=deterministic))
    assert "tiles of 8 bins" in text and "launch deform_roi_pool_forward_f32: grid" in text
    assert ("collected by pixel" in text) == deterministic


@pytest.mark.parametrize("deterministic", [False, True])
def test_attention(caplog: pytest.LogCaptureFixture, deterministic: bool):
    text = "\n".join(explained(caplog, make_attention(N=2), deterministic=deterministic))
    assert "20 rows of 4 points, 4 lanes to a row" in text and "launch deform_attention_forward_f32: grid" in text
    assert ("by strips of 8 pixels, 4 heads and 5 queries at a time" in text) == deterministic


def test_plans_that_explain_are_not_those_of_other_calls(caplog: pytest.LogCaptureFixture):
    case = make_conv(C=8)
    with emulated_cupy() as stand_in:
        arguments = cupy_arguments(stand_in, case)
        del arguments["grad_out"]
        with caplog.at_level(logging.DEBUG, logger="dcnops"):
            dcnops.deform_conv2d(**arguments)
        caplog.clear()
        dcnops.deform_conv2d(**arguments)
    assert not caplog.records
