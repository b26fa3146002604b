"""What deformable convolution computes, wherever it runs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import DTYPES, ConvCase, assert_close, conv_cases, make_conv


@given(case=conv_cases(dtypes=("float32", "float64")))
def test_equals_the_reference(run, case: ConvCase):
    assert_close(run.forward(case), case.expected(), case.dtype)


@given(case=conv_cases(dtypes=("float16", "bfloat16")))
def test_equals_the_reference_in_16_bits(run, case: ConvCase):
    output = run.forward(case)
    assert output.dtype == DTYPES[case.dtype]
    assert_close(output, case.expected(), case.dtype)


def plain_convolution(case: ConvCase) -> np.ndarray:
    """Convolution by definition, from windows of the padded image."""
    from tests.reference import padding_of, pair_of

    x, w = case.input.astype(np.float64), case.weight.astype(np.float64)
    (sh, sw), (dh, dw) = pair_of(case.stride), pair_of(case.dilation)
    top, bottom, left, right = padding_of(case.padding)
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    O, group_channels, kh, kw = w.shape
    reach = (dh * (kh - 1) + 1, dw * (kw - 1) + 1)
    windows = np.lib.stride_tricks.sliding_window_view(x, reach, (2, 3))[:, :, ::sh, ::sw, ::dh, ::dw]
    G = x.shape[1] // group_channels
    windows = windows.reshape(x.shape[0], G, group_channels, *windows.shape[2:])
    w = w.reshape(G, O // G, group_channels, kh, kw)
    output = np.einsum("ngcabij,gocij->ngoab", windows, w)
    output = output.reshape(x.shape[0], O, *output.shape[3:])
    return output if case.bias is None else output + case.bias.astype(np.float64)[:, None, None]


@given(case=conv_cases(dtypes=("float32", "float64"), spread=0.0, mask=False))
def test_zero_offsets_are_a_plain_convolution(run, case: ConvCase):
    assert_close(run.forward(case), plain_convolution(case), case.dtype)


@given(case=conv_cases(spread=0.0, mask=False), dy=st.integers(-4, 4), dx=st.integers(-4, 4))
def test_integer_offsets_shift_the_image(run, case: ConvCase, dy: int, dx: int):
    offset = case.offset.copy()
    offset[:, 0::2], offset[:, 1::2] = dy, dx
    N, C, H, W = case.input.shape
    shifted = np.zeros((N, C, H + 8, W + 8), case.input.dtype)
    shifted[:, :, 4 - dy : 4 - dy + H, 4 - dx : 4 - dx + W] = case.input
    # Padding that reads what the shift brought in from beyond the old border.
    from tests.reference import padding_of

    top, bottom, left, right = padding_of(case.padding)
    wide = np.pad(shifted, ((0, 0), (0, 0), (8, 8), (8, 8)))
    wide = wide[:, :, 12 - top : 12 + H + bottom, 12 - left : 12 + W + right]
    expected = plain_convolution(case.with_arrays(input=wide, padding=0))
    assert_close(run.forward(case.with_arrays(offset=offset)), expected, case.dtype)


@given(case=conv_cases(dtypes=("float64",), bias=False, mask=True), which=st.sampled_from(["input", "weight", "mask"]))
def test_linear_in_input_weight_and_mask(run, case: ConvCase, which: str):
    array = getattr(case, which)
    other = np.random.default_rng(1).standard_normal(array.shape)
    combined = run.forward(case.with_arrays(**{which: 2 * array - 3 * other}))
    separate = 2 * run.forward(case) - 3 * run.forward(case.with_arrays(**{which: other}))
    assert_close(combined, separate, "float64", slack=10)


@given(case=conv_cases(dtypes=("float32",)))
def test_explicit_zero_padding_is_implicit_padding(run, case: ConvCase):
    from tests.reference import padding_of

    top, bottom, left, right = padding_of(case.padding)
    padded = np.pad(case.input, ((0, 0), (0, 0), (top, bottom), (left, right)))
    assert_close(run.forward(case.with_arrays(input=padded, padding=0)), case.expected(), case.dtype)


@given(case=conv_cases(dtypes=("float32",), mask=False))
def test_a_mask_of_ones_changes_nothing(run, case: ConvCase):
    N, channels, oh, ow = case.offset.shape
    ones = np.ones((N, channels // 2, oh, ow), case.offset.dtype)
    np.testing.assert_array_equal(run.forward(case.with_arrays(mask=ones)), run.forward(case))


@pytest.mark.parametrize("N", [0, 1, 31, 32, 33, 64, 65, 97])
def test_batches_agree_with_one_by_one(run, N: int):
    case = make_conv(N=N, C=6, H=4, W=3, O=4, G=2, D=3, seed=N)
    output = run.forward(case)
    gradients = run.backward(case)
    assert output.shape == (N, 4, 4, 3)
    assert [gradients[name].shape for name in case.needs] == [getattr(case, name).shape for name in case.needs]
    weight = np.zeros(case.weight.shape)
    for n in range(N):
        one = case.with_arrays(
            **{name: getattr(case, name)[n : n + 1] for name in ("input", "offset", "mask", "grad_out")}
        )
        assert_close(output[n : n + 1], run.forward(one).astype(np.float64), "float32")
        alone = run.backward(one)
        for name in ("input", "offset", "mask"):
            assert_close(gradients[name][n : n + 1], alone[name].astype(np.float64), "float32", name)
        weight += alone["weight"]
    assert_close(gradients["weight"], weight, "float32", "weight")


@given(case=conv_cases(dtypes=("float32", "float16")), data=st.data())
def test_strides_of_the_arrays_do_not_matter(run, case: ConvCase, data: st.DataObject):
    def restride(array: np.ndarray) -> np.ndarray:
        kind = data.draw(st.sampled_from(["as is", "Fortran", "reversed", "every other", "read-only"]))
        if kind == "Fortran":
            return np.asfortranarray(array)
        if kind == "reversed":
            return array[..., ::-1].copy()[..., ::-1]
        if kind == "every other":
            return np.repeat(array, 2, axis=-1)[..., ::2]
        copy = array.copy()
        copy.flags.writeable = kind != "read-only"
        return copy

    changed = case.with_arrays(**{name: restride(getattr(case, name)) for name in (*case.needs, "grad_out")})
    np.testing.assert_array_equal(run.forward(changed), run.forward(case))
    plain, restrided = run.backward(case), run.backward(changed)
    for name in case.needs:
        assert_close(restrided[name], plain[name].astype(np.float64), case.dtype, name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_coordinates_are_exact_where_16_bits_are_not(run, dtype: str):
    """Columns beyond 2048: float16 would round them to even numbers, bfloat16 to multiples of 16."""
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


def test_output_arrays_are_contiguous_and_new(run):
    case = make_conv(N=2)
    output = run.forward(case)
    assert output.flags.c_contiguous and output.flags.writeable
    assert all(not np.shares_memory(output, getattr(case, name)) for name in case.needs)


@pytest.mark.parametrize("kernel", [(1, 1), (5, 2), (7, 7)])
@pytest.mark.parametrize("G, D", [(1, 1), (8, 1), (1, 8), (8, 8), (2, 4)])
def test_kernels_and_groups(run, kernel: tuple[int, int], G: int, D: int):
    case = make_conv(C=8, O=8, H=9, W=8, kernel=kernel, padding=((2, 1), (0, 3)), stride=(1, 2), G=G, D=D)
    assert_close(run.forward(case), case.expected(), "float32")
    expected = case.expected_gradients()
    for name, gradient in run.backward(case).items():
        assert_close(gradient, expected[name], "float32", name)
