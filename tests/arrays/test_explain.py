"""The logger "dcnops" at level DEBUG explains calls on NumPy arrays."""

from __future__ import annotations

import logging

import numpy as np
import pytest

import dcnops
from tests.cases import make_aggregate, make_attention, make_conv, make_roi_pool


def explanations(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the messages at level DEBUG; a compilation adds one at level INFO."""
    return [record.getMessage() for record in caplog.records if record.levelno == logging.DEBUG]


def test_both_directions_say_shapes_first_and_then_tiles(caplog: pytest.LogCaptureFixture):
    case = make_conv(N=2, C=4, O=3, H=5, W=6)
    with caplog.at_level(logging.DEBUG, logger="dcnops"):
        dcnops.deform_conv2d(**case.arguments())
        dcnops.deform_conv2d_backward(case.grad_out, **case.arguments(), needs=("offset",))
    forward, tiles, backward, spans = explanations(caplog)
    assert forward.startswith("deform_conv2d of numpy arrays: input=float32[2, 4, 5, 6], offset=float32[2, 18, 5, 6]")
    assert "stride=1" in forward and "layout='NCHW'" in forward
    assert "60 pixels in tiles of" in tiles and "threads" in tiles
    assert backward.startswith("deform_conv2d_backward of numpy arrays: grad_out=float32[2, 3, 5, 6]")
    assert "needs=('offset',)" in backward and "60 pixels in spans of" in spans


def test_roi_pooling_says_shapes_and_strides(caplog: pytest.LogCaptureFixture):
    case = make_roi_pool(N=1, C=4, H=8, W=9, R=5)
    case = case.with_arrays(input=np.asfortranarray(case.input))
    with caplog.at_level(logging.DEBUG, logger="dcnops"):
        dcnops.deform_roi_pool(**case.arguments())
        dcnops.deform_roi_pool_backward(case.grad_out, **case.arguments())
    assert "input=float32[1, 4, 8, 9] with strides (4, 4, 16, 128) in bytes" in explanations(caplog)[0]
    assert [message.partition(" of numpy")[0] for message in explanations(caplog)[::2]] == [
        "deform_roi_pool",
        "deform_roi_pool_backward",
    ]


def test_attention_and_aggregation_say_shapes_and_queries(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.DEBUG, logger="dcnops"):
        for case in (make_attention(N=1, Lq=5), make_aggregate(N=2, H=4, W=3)):
            getattr(dcnops, case.operation)(**case.arguments())
            getattr(dcnops, f"{case.operation}_backward")(case.grad_out, **case.arguments())
    attention, queries, attention_backward, aggregation, pixels, _ = caplog.messages
    assert attention.startswith("ms_deform_attn of numpy arrays: value=float32[1, 30, 2, 4], spatial_shapes=((6, 4),")
    assert attention_backward.startswith("ms_deform_attn_backward of numpy arrays: grad_out=float32[1, 5, 8]")
    assert aggregation.startswith("deform_aggregate of numpy arrays: input=float32[2, 4, 3, 8]")
    assert queries.startswith("5 queries, ") and pixels.startswith("24 queries, ")


def test_a_wrong_call_leaves_its_shapes_behind(caplog: pytest.LogCaptureFixture):
    arguments = {**make_conv().arguments(), "input": [1, 2]}
    with caplog.at_level(logging.DEBUG, logger="dcnops"), pytest.raises(dcnops.DtypeError):
        dcnops.deform_conv2d(**arguments)
    assert "input=[1, 2], offset=float32" in caplog.text


def test_nothing_is_logged_by_default(caplog: pytest.LogCaptureFixture):
    dcnops.deform_conv2d(**make_conv().arguments())
    assert not caplog.records
