"""Results and gradients of deformable convolution on every backend."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import ConvCase, assert_close, assert_correct, away_from_kinks, conv_cases, make_conv
from tests.reference import expand_padding, expand_pair

FAR = [np.inf, -np.inf, 1e30, -1e30, 2.0**31, -(2.0**31), 2.0**63, 1e9]


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


@pytest.mark.parametrize("N", [0, 1, 32, 33])
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


@given(
    case=conv_cases(dtypes=("float64",)), name=st.sampled_from(ConvCase.differentiable), seed=st.integers(0, 2**32 - 1)
)
def test_finite_differences(run, case: ConvCase, name: str, seed: int):
    case = away_from_kinks(case, seed)
    if name not in case.needs:
        name = "offset"
    array, step = getattr(case, name), 1e-6
    direction = np.random.default_rng(seed + 1).uniform(-1, 1, array.shape)

    def value(sign: int) -> float:
        return float((run.forward(case.with_arrays(**{name: array + sign * step * direction})) * case.grad_out).sum())

    slope = (value(1) - value(-1)) / (2 * step)
    derivative = float((run.backward(case, (name,))[name] * direction).sum())
    assert abs(slope - derivative) <= 1e-6 * max(1.0, abs(slope), np.abs(case.grad_out).sum())


@pytest.mark.parametrize("axis", [0, 1], ids=["vertical", "horizontal"])
@pytest.mark.parametrize("position", [-1, 0, 1, 2, 3, 4])
def test_one_sided_derivative_at_integers(run, axis: int, position: int):
    """The right derivative applies at a kink; on the edge of the open box, at -1 and 4, the derivative is 0."""
    column = np.array([3.0, -2.0, 5.0, 11.0])
    right = {-1: 0.0, 0: -5.0, 1: 7.0, 2: 6.0, 3: -11.0, 4: 0.0}[position]
    image = column.reshape((1, 1, 4, 1) if axis == 0 else (1, 1, 1, 4))
    case = make_conv(C=1, O=1, H=1, W=1, kernel=(1, 1), padding=0, mask=True, dtype="float64", spread=0.0)
    offset = np.zeros(image.shape, np.float64).repeat(2, axis=1)
    at = (0, axis, 0, 0)
    offset[at] = position
    case = case.with_arrays(
        input=image,
        offset=offset,
        mask=np.full(image.shape, 0.5),
        weight=np.full((1, 1, 1, 1), 2.0),
        grad_out=np.eye(1, 4).reshape(image.shape),
    )
    gradients = run.backward(case)
    assert gradients["offset"][at] == right
    value = column[position] if 0 <= position < 4 else 0.0
    assert gradients["mask"][0, 0, 0, 0] == 2.0 * value
    assert gradients["input"].sum() == (1.0 if 0 <= position < 4 else 0.0)
    if 0 <= position < 4:
        step = 1e-6
        moved = offset.copy()
        moved[at] += step
        slope = (run.forward(case.with_arrays(offset=moved)) - run.forward(case))[0, 0, 0, 0] / step
        assert abs(slope - right) < 1e-6


def test_all_offsets_on_one_pixel(run):
    case = make_conv(C=4, H=8, W=8, seed=4)
    a, b = np.indices((8, 8))
    i, j = np.divmod(np.arange(9), 3)
    offset = np.empty((1, 18, 8, 8), np.float32)
    offset[0, 0::2] = 3.25 - (a[None] - 1 + i[:, None, None])
    offset[0, 1::2] = 4.5 - (b[None] - 1 + j[:, None, None])
    assert_correct(run, case.with_arrays(offset=offset))


def test_weight_gradient_is_summed_in_float32(run):
    """A float16 sum of 2500 ones would stop growing at 2048."""
    case = make_conv(C=1, O=1, H=50, W=50, kernel=(1, 1), padding=0, mask=False, dtype="float16", spread=0.0)
    ones = {name: np.ones_like(getattr(case, name)) for name in ("input", "grad_out")}
    gradients = run.backward(case.with_arrays(**ones), ("weight", "bias"))
    assert gradients["weight"].item() == 2500 and gradients["bias"].item() == 2500


@given(
    case=conv_cases(dtypes=("float32", "float64", "float16", "bfloat16"), spread=0.4),
    values=st.lists(st.sampled_from([np.nan, *FAR]), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_offset_equals_the_reference(run, case: ConvCase, values: list[float], seed: int):
    offset = case.offset.copy()
    for value, at in zip(values, np.random.default_rng(seed).random(len(values))):
        with np.errstate(over="ignore"):
            offset.reshape(-1)[int(at * offset.size) : int(at * offset.size) + 1] = value
    assert_correct(run, case.with_arrays(offset=offset))


def case_with_one_extreme_sample(value: float, axis: int, dtype: str = "float32") -> ConvCase:
    """Return a case in which the middle tap of the middle pixel has an offset of `value` along one axis."""
    case = make_conv(C=4, O=3, H=5, W=5, seed=7, dtype=dtype, spread=0.3)
    offset = case.offset.copy()
    offset[0, 2 * 4 + axis, 2, 2] = value
    return case.with_arrays(offset=offset)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("value", FAR)
def test_distant_samples_are_zero(run, value: float, axis: int):
    case = case_with_one_extreme_sample(value, axis)
    mask = case.mask.copy()
    mask[0, 4, 2, 2] = 0
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(run.forward(case), run.forward(case.with_arrays(mask=mask)))
    gradients = run.backward(case)
    assert (gradients["offset"][0, 8:10, 2, 2] == 0).all() and gradients["mask"][0, 4, 2, 2] == 0
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.parametrize("axis", [0, 1])
def test_nan_coordinates_propagate(run, axis: int):
    case = case_with_one_extreme_sample(np.nan, axis)
    output, gradients = run.forward(case), run.backward(case)
    assert np.isnan(output[0, :, 2, 2]).all() and np.isnan(output).sum() == 3
    assert np.isnan(gradients["offset"][0, 8:10, 2, 2]).all() and np.isnan(gradients["offset"]).sum() == 2
    assert np.isnan(gradients["mask"]).sum() == 1
    assert np.isnan(gradients["weight"][:, :, 1, 1]).all() and np.isnan(gradients["weight"]).sum() == 12
    assert np.isfinite(gradients["input"]).all() and np.isfinite(gradients["bias"]).all()


def test_nan_takes_precedence_over_infinity(run):
    case = case_with_one_extreme_sample(np.nan, 0)
    case.offset[0, 9, 2, 2] = np.inf
    assert np.isnan(run.forward(case)[0, :, 2, 2]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_of_weight_zero_do_not_contribute(run, value: float):
    """With zero offsets a pixel affects the same outputs as in a regular convolution."""
    case = make_conv(C=2, O=1, H=6, W=6, mask=False, spread=0.0)
    image = case.input.copy()
    image[0, 0, 2, 2] = value
    case = case.with_arrays(input=image)
    output = run.forward(case)
    assert not np.isfinite(output[0, 0, 1:4, 1:4]).any()
    output[0, 0, 1:4, 1:4] = 0
    assert np.isfinite(output).all()


def test_a_mask_of_zero_suppresses_infinite_pixels(run):
    case = make_conv(C=2, O=1, H=4, W=4)
    case = case.with_arrays(input=np.full_like(case.input, np.inf), mask=np.zeros_like(case.mask))
    np.testing.assert_array_equal(run.forward(case), np.broadcast_to(case.bias[:, None, None], (1, 1, 4, 4)))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 2)])
def test_tiny_images(run, shape: tuple[int, int]):
    assert_correct(run, make_conv(H=shape[0], W=shape[1], C=12, O=2, spread=1.0, seed=11))
