"""Results of deformable convolution on every backend."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import ConvCase, assert_close, assert_correct, conv_cases, make_conv
from tests.reference import expand_padding, expand_pair


def pad(case: ConvCase, extra: int = 0) -> np.ndarray:
    """Return the input with its padding, and `extra` pixels on all sides, as zeros."""
    top, bottom, left, right = (extra + side for side in expand_padding(case.padding))
    return np.pad(case.input, ((0, 0), (0, 0), (top, bottom), (left, right)))


def regular_convolution(x: np.ndarray, case: ConvCase) -> np.ndarray:
    """Convolve a padded image with the filters of a case, without offsets and mask."""
    w = case.weight.astype(np.float64)
    (sh, sw), (dh, dw) = expand_pair(case.stride), expand_pair(case.dilation)
    O, group_channels, kh, kw = w.shape
    extent = (dh * (kh - 1) + 1, dw * (kw - 1) + 1)
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), extent, (2, 3))[..., ::dh, ::dw]
    windows = windows[:, :, ::sh, ::sw]
    G = x.shape[1] // group_channels
    windows = windows.reshape(x.shape[0], G, group_channels, *windows.shape[2:])
    output = np.einsum("ngcabij,gocij->ngoab", windows, w.reshape(G, O // G, group_channels, kh, kw))
    output = output.reshape(x.shape[0], O, *output.shape[3:])
    return output if case.bias is None else output + case.bias.astype(np.float64)[:, None, None]


@given(case=conv_cases(dtypes=("float32", "float64"), spread=0.0, mask=False))
def test_zero_offsets_are_a_regular_convolution(run, case: ConvCase):
    assert_close(run.forward(case), regular_convolution(pad(case), case), case.dtype)


@given(case=conv_cases(spread=0.0, mask=False), dy=st.integers(-4, 4), dx=st.integers(-4, 4))
def test_integer_offsets_shift_the_image(run, case: ConvCase, dy: int, dx: int):
    offset = case.offset.copy()
    offset[:, 0::2], offset[:, 1::2] = dy, dx
    padded = pad(case, extra=4)
    height, width = padded.shape[2] - 8, padded.shape[3] - 8
    shifted = padded[:, :, 4 + dy : 4 + dy + height, 4 + dx : 4 + dx + width]
    assert_close(run.forward(case.with_arrays(offset=offset)), regular_convolution(shifted, case), case.dtype)


@given(case=conv_cases())
def test_explicit_zero_padding_equals_implicit_padding(run, case: ConvCase):
    assert_close(run.forward(case.with_arrays(input=pad(case), padding=0)), case.expected(), case.dtype)


@given(case=conv_cases(mask=False))
def test_a_mask_of_ones_changes_nothing(run, case: ConvCase):
    N, channels, oh, ow = case.offset.shape
    ones = np.ones((N, channels // 2, oh, ow), case.offset.dtype)
    np.testing.assert_array_equal(run.forward(case.with_arrays(mask=ones)), run.forward(case))


@pytest.mark.parametrize("N", [0, 1, 31, 32, 33, 64, 65, 97])
def test_a_batch_equals_its_single_images(run, N: int):
    case = make_conv(N=N, C=6, H=4, W=3, O=4, G=2, D=3, seed=N)
    output = run.forward(case)
    gradients = run.backward(case)
    assert output.shape == (N, 4, 4, 3)
    assert [gradients[name].shape for name in case.needs] == [getattr(case, name).shape for name in case.needs]
    weight = np.zeros(case.weight.shape)
    for n in range(N):
        names = ("input", "offset", "mask", "grad_out")
        image = case.with_arrays(**{name: getattr(case, name)[n : n + 1] for name in names})
        assert_close(output[n : n + 1], run.forward(image).astype(np.float64), "float32")
        expected = run.backward(image)
        for name in ("input", "offset", "mask"):
            assert_close(gradients[name][n : n + 1], expected[name].astype(np.float64), "float32", name)
        weight += expected["weight"]
    assert_close(gradients["weight"], weight, "float32", "weight")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_coordinates_of_16_bit_data_are_float32(run, dtype: str):
    """Beyond 2048, float16 has only even integers and bfloat16 only multiples of 16."""
    W = 2200
    case = make_conv(C=1, O=1, H=1, W=W, kernel=(1, 1), padding=0, bias=False, mask=False, dtype=dtype, spread=0.0)
    columns = (np.arange(W) % 97).astype(case.input.dtype)
    offset = np.zeros((1, 2, 1, W), case.offset.dtype)
    offset[0, 1] = 0.25
    output = run.forward(
        case.with_arrays(input=columns.reshape(1, 1, 1, W), offset=offset, weight=np.ones_like(case.weight))
    )
    exact = 0.75 * columns.astype(np.float64) + 0.25 * np.append(columns[1:].astype(np.float64), 0)
    np.testing.assert_array_equal(output[0, 0, 0], exact.astype(case.input.dtype))


@pytest.mark.parametrize("kernel", [(1, 1), (5, 2), (7, 7)])
@pytest.mark.parametrize("G, D", [(1, 1), (8, 1), (1, 8), (8, 8), (2, 4)])
def test_kernels_and_groups(run, kernel: tuple[int, int], G: int, D: int):
    padding, stride = ((2, 1), (0, 3)), (1, 2)
    assert_correct(run, make_conv(C=8, O=8, H=9, W=8, kernel=kernel, padding=padding, stride=stride, G=G, D=D))
