"""Transposition of images and weights on a CPU, in tiles of registers and at edges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcnops._backends.cpu.threads import parallel
from dcnops._backends.cpu.transpose_loops import (
    from_channels_last,
    pack_weight,
    pack_weight_transposed,
    to_channels_last,
    unpack_weight,
)

SIZES = st.integers(1, 70)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@given(channels=SIZES, pixels=SIZES, first=st.integers(0, 3))
def test_images_become_channels_last_and_back(dtype: str, channels: int, pixels: int, first: int):
    source = np.arange(2 * channels * pixels, dtype=dtype).reshape(2, channels, pixels)
    image = np.full((2, pixels + 1, channels), -1, dtype)
    back = np.full((2, channels + 4, pixels), -1, dtype)
    parallel(*to_channels_last(source, image))
    np.testing.assert_array_equal(image[:, :-1], source.transpose(0, 2, 1))
    assert (image[:, -1] == -1).all()
    parallel(*from_channels_last(image, back, first))
    np.testing.assert_array_equal(back[:, first : first + channels], source)
    assert (np.delete(back, np.arange(first, first + channels), axis=1) == -1).all()


@given(outputs=SIZES, channels=st.integers(1, 20), first=st.integers(0, 3), taps=st.integers(1, 9))
def test_weights_are_packed_for_the_register_tile(outputs: int, channels: int, first: int, taps: int):
    groups, lanes = 2, 32
    weight = np.arange(groups * outputs * (channels + 3) * taps, dtype=np.float32)
    weight = weight.reshape(groups * outputs, channels + 3, taps)
    panels = -(-outputs // lanes)
    packed = np.full((groups, panels, taps * channels, lanes), np.nan, np.float32)
    parallel(*pack_weight(weight, packed, 0, first, channels, outputs))
    for g in range(groups):
        expected = weight[g * outputs : (g + 1) * outputs, first : first + channels].transpose(2, 1, 0)
        found = packed[g].transpose(1, 0, 2).reshape(taps * channels, panels * lanes)
        np.testing.assert_array_equal(found[:, :outputs], expected.reshape(taps * channels, outputs))
        assert not found[:, outputs:].any()


@given(outputs=SIZES, channels=SIZES, first=st.integers(0, 3), taps=st.integers(1, 9))
def test_weights_are_packed_transposed_and_unpacked(outputs: int, channels: int, first: int, taps: int):
    groups, lanes, length = 2, 32, taps * channels
    weight = np.arange(groups * outputs * (channels + 3) * taps, dtype=np.float32)
    weight = weight.reshape(groups * outputs, channels + 3, taps)
    panels = -(-length // lanes)
    packed = np.full((groups, panels, outputs, lanes), np.nan, np.float32)
    for job in pack_weight_transposed(weight, packed, 0, first, channels):
        parallel(*job)
    rows = packed.transpose(0, 2, 1, 3).reshape(groups, outputs, panels * lanes)
    expected = weight[:, first : first + channels].transpose(0, 2, 1).reshape(groups, outputs, length)
    np.testing.assert_array_equal(rows[:, :, :length], expected)
    assert not rows[:, :, length:].any()
    back = np.full_like(weight, -1)
    for job in unpack_weight(rows, back, 0, first, channels, outputs):
        parallel(*job)
    inside = np.arange(first, first + channels)
    np.testing.assert_array_equal(back[:, inside], weight[:, inside])
    assert (np.delete(back, inside, axis=1) == -1).all()
