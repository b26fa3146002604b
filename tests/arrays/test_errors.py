"""Every wrong argument: the documented class, and a message that names the argument, what it needs and what it got."""

from __future__ import annotations

import inspect
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dcnops
from dcnops import ArgumentError, DcnError, DeviceError, DtypeError, ShapeError
from tests.cases import ConvCase, conv_cases, make_conv, make_roi_pool


class FakeDevice:
    def __init__(self, id: int) -> None:
        self.id = id


def fake_cupy(array: np.ndarray, device: int = 0) -> Any:
    """What the checks see of a CuPy array; there is no memory behind it."""
    kind = type("ndarray", (), {"__module__": "cupy", "shape": array.shape, "dtype": array.dtype})
    fake = kind()
    fake.device = FakeDevice(device)
    return fake


class JaxArray:
    __module__ = "jaxlib._jax"
    shape = (1,)
    dtype = np.dtype(np.float32)


def arguments(**changes: Any) -> dict[str, Any]:
    """Legal arguments with C=4, 2 deformable groups, a 3x2 kernel; `changes` of them."""
    case = make_conv(N=2, C=4, H=5, W=5, O=6, kernel=(3, 2), padding=(1, 0), D=2, G=2)
    legal = {**case.arguments(), "grad_out": case.grad_out}
    return {**legal, **{k: v(legal[k]) if inspect.isfunction(v) else v for k, v in changes.items()}}


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


FORWARD_ERRORS: dict[str, tuple[dict[str, Any], type[DcnError], str]] = {
    "input rank": (
        {"input": zeros(4, 5, 5)},
        ShapeError,
        "input must have 4 dimensions [N, C, H, W], got shape (4, 5, 5)",
    ),
    "offset rank": (
        {"offset": zeros(2, 24, 5)},
        ShapeError,
        "offset must have 4 dimensions [N, 2*D*kh*kw, oh, ow], got shape (2, 24, 5)",
    ),
    "weight rank": (
        {"weight": zeros(6, 2, 3)},
        ShapeError,
        "weight must have 4 dimensions [O, C/G, kh, kw], got shape (6, 2, 3)",
    ),
    "mask rank": (
        {"mask": zeros(2)},
        ShapeError,
        "mask must have 4 dimensions [N, D*kh*kw, oh, ow], got shape (2,)",
    ),
    "bias rank": ({"bias": zeros(1, 6)}, ShapeError, "bias must be [O=6], got shape (1, 6)"),
    "bias size": ({"bias": zeros(5)}, ShapeError, "bias must be [O=6], got shape (5,)"),
    "no channels": ({"input": zeros(2, 0, 5, 5)}, ShapeError, "input must be [N, C >= 1, H >= 1, W >= 1], got"),
    "no height": ({"input": zeros(2, 4, 0, 5)}, ShapeError, "input must be [N, C >= 1, H >= 1, W >= 1], got"),
    "no filters": ({"weight": zeros(0, 2, 3, 2)}, ShapeError, "weight must be [O >= 1, C/G >= 1, kh >= 1, kw >= 1]"),
    "no taps": ({"weight": zeros(6, 2, 0, 2)}, ShapeError, "weight must be [O >= 1, C/G >= 1, kh >= 1, kw >= 1]"),
    "weight channels": (
        {"weight": zeros(6, 3, 3, 2)},
        ShapeError,
        "weight must be [O, C/G, kh, kw] with C/G a divisor of input's C=4, got shape (6, 3, 3, 2)",
    ),
    "weight groups": (
        {"weight": zeros(5, 2, 3, 2), "bias": None},
        ShapeError,
        "weight must have O divisible by the G=C/weight.shape[1]=2 weight groups, got shape (5, 2, 3, 2)",
    ),
    "offset batch": (
        {"offset": zeros(1, 24, 5, 4)},
        ShapeError,
        "offset must be [N=2, 2*D*3*2, oh=5, ow=4], got shape (1, 24, 5, 4)",
    ),
    "offset height": (
        {"offset": zeros(2, 24, 4, 4)},
        ShapeError,
        "offset must be [N=2, 2*D*3*2, oh=5, ow=4], got shape (2, 24, 4, 4)",
    ),
    "offset width": ({"offset": zeros(2, 24, 5, 5)}, ShapeError, "offset must be [N=2, 2*D*3*2, oh=5, ow=4], got"),
    "offset channels": ({"offset": zeros(2, 18, 5, 4)}, ShapeError, "offset must be [N=2, 2*D*3*2, oh=5, ow=4], got"),
    "offset empty": ({"offset": zeros(2, 0, 5, 4)}, ShapeError, "offset must be [N=2, 2*D*3*2, oh=5, ow=4], got"),
    "offset groups": (
        {"offset": zeros(2, 36, 5, 4)},
        ShapeError,
        "with D a divisor of input's C=4, got shape (2, 36, 5, 4), that is D=3",
    ),
    "mask channels": (
        {"mask": zeros(2, 24, 5, 4)},
        ShapeError,
        "mask must be [N=2, D*kh*kw=2*3*2, oh=5, ow=4], got shape (2, 24, 5, 4)",
    ),
    "mask size": ({"mask": zeros(2, 12, 4, 4)}, ShapeError, "mask must be [N=2, D*kh*kw=2*3*2, oh=5, ow=4], got"),
    "kernel too large": (
        {"weight": zeros(6, 2, 8, 2)},
        ShapeError,
        "input must have a padded height of at least dilation*(kernel-1)+1 = 8, got 5 + 2 = 7",
    ),
    "dilation too large": ({"dilation": (1, 5)}, ShapeError, "input must have a padded width of at least"),
    "zero stride": (
        {"stride": 0},
        ArgumentError,
        "stride must be an integer from 1 to 16777216 or a pair of them, got 0",
    ),
    "negative stride": ({"stride": (1, -1)}, ArgumentError, "stride must be an integer from 1 to"),
    "float stride": ({"stride": 1.5}, ArgumentError, "stride must be an integer from 1 to 16777216 or a pair"),
    "text stride": ({"stride": "11"}, ArgumentError, "stride must be an integer from 1 to 16777216 or a pair"),
    "three strides": ({"stride": (1, 1, 1)}, ArgumentError, "got (1, 1, 1)"),
    "no stride": ({"stride": None}, ArgumentError, "stride must be an integer from 1 to 16777216 or a pair"),
    "zero dilation": ({"dilation": 0}, ArgumentError, "dilation must be an integer from 1 to"),
    "huge dilation": ({"dilation": 2**40}, ArgumentError, "dilation must be an integer from 1 to"),
    "negative padding": ({"padding": -1}, ArgumentError, "padding must be an integer from 0 to"),
    "four paddings": ({"padding": (1, 1, 0, 0)}, ArgumentError, "((top, bottom), (left, right)), got (1, 1, 0, 0)"),
    "ragged padding": ({"padding": ((1, 1), 0)}, ArgumentError, "((top, bottom), (left, right)), got ((1, 1), 0)"),
    "deep padding": ({"padding": ((1, 1, 1), (0, 0))}, ArgumentError, "((top, bottom), (left, right)), got"),
    "huge padding": (
        {"padding": 2**24},
        ArgumentError,
        "padding must keep input's height within 16777216 pixels, got 5 + 33554432",
    ),
    "integers": (
        {"input": lambda x: x.astype(np.int32)},
        DtypeError,
        "input must be float16, bfloat16, float32 or float64, got int32",
    ),
    "complex": ({"input": lambda x: x.astype(np.complex64)}, DtypeError, "input must be float16, bfloat16, float32"),
    "weight dtype": (
        {"weight": lambda w: w.astype(np.float64)},
        DtypeError,
        "weight must be float32 like input, got float64",
    ),
    "bias dtype": ({"bias": lambda b: b.astype(np.float16)}, DtypeError, "bias must be float32 like input, got"),
    "offset dtype": (
        {"offset": lambda o: o.astype(np.float64)},
        DtypeError,
        "offset must be float32 beside float32 input, got float64",
    ),
    "offset too coarse": (
        {"offset": lambda o: o.astype(np.float16)},
        DtypeError,
        "offset must be float32 beside float32 input, got float16",
    ),
    "mask unlike offset": (
        {
            **{name: (lambda a: a.astype(np.float16)) for name in ("input", "grad_out", "weight", "bias", "offset")},
            "mask": lambda m: m,
        },
        DtypeError,
        "mask must be float16 like offset, got float32",
    ),
    "two 16-bit types": (
        {**{name: (lambda a: a.astype(ml_dtypes.bfloat16)) for name in ("input", "grad_out", "weight", "bias", "mask")},
         "offset": lambda o: o.astype(np.float16)},
        DtypeError,
        "offset must be bfloat16 or float32 beside bfloat16 input, got float16",
    ),
    "byte order": (
        {"mask": lambda m: m.astype(m.dtype.newbyteorder())},
        DtypeError,
        "mask must be in native byte order, got dtype('>f4'); pass mask.astype('float32')",
    ),
    "torch tensor": (
        {"input": lambda x: torch.from_numpy(x)},
        DtypeError,
        "input must be a NumPy or CuPy array, got torch.Tensor; dcnops works on arrays: pass tensor.detach().numpy()",
    ),
    "torch mask": ({"mask": lambda m: torch.from_numpy(m)}, DtypeError, "mask must be a NumPy or CuPy array, got"),
    "JAX array": ({"weight": JaxArray()}, DtypeError, "weight must be a NumPy or CuPy array, got jaxlib"),
    "list": (
        {"input": lambda x: x.tolist()},
        DtypeError,
        "input must be a NumPy or CuPy array, got list; pass numpy.asarray(...)",
    ),
    "masked array": (
        {"input": lambda x: np.ma.masked_less(x, 0)},
        DtypeError,
        "input must be a NumPy or CuPy array, got numpy.ma.",
    ),
    "scalar": ({"bias": 1.0}, DtypeError, "bias must be a NumPy or CuPy array, got float"),
    "nothing": ({"weight": None}, DtypeError, "weight must be a NumPy or CuPy array, got NoneType"),
    "mixed libraries": (
        {"offset": lambda o: fake_cupy(o)},
        DeviceError,
        "offset must be a numpy array like input, got a cupy array",
    ),
    "mixed devices": (
        {
            **{name: (lambda a: fake_cupy(a)) for name in ("input", "grad_out", "weight", "bias", "mask")},
            "offset": lambda o: fake_cupy(o, device=1),
        },
        DeviceError,
        "offset must be on device 0 like input, got device 1",
    ),
}  # fmt: skip

BACKWARD_ERRORS: dict[str, tuple[dict[str, Any], type[DcnError], str]] = {
    "grad_out size": (
        {"grad_out": zeros(2, 6, 5, 5)},
        ShapeError,
        "grad_out must be [N=2, O=6, oh=5, ow=4], got shape (2, 6, 5, 5)",
    ),
    "grad_out rank": ({"grad_out": zeros(2)}, ShapeError, "grad_out must be [N=2, O=6, oh=5, ow=4], got shape (2,)"),
    "grad_out dtype": (
        {"grad_out": lambda g: g.astype(np.float64)},
        DtypeError,
        "grad_out must be float32 like input, got float64",
    ),
    "grad_out library": (
        {"grad_out": lambda g: torch.from_numpy(g)},
        DtypeError,
        "grad_out must be a NumPy or CuPy array",
    ),
    "unknown need": (
        {"needs": ("input", "biases")},
        ArgumentError,
        "needs must be names among input, offset, weight, bias, mask, got ('input', 'biases')",
    ),
    "needs is nothing": ({"needs": None}, ArgumentError, "needs must be names among input, offset, weight, bias, mask"),
    "needs unhashable": ({"needs": [["input"]]}, ArgumentError, "needs must be names among"),
}


def roi_arguments(**changes: Any) -> dict[str, Any]:
    """Legal arguments of RoI pooling with 5 regions and 3x2 bins; `changes` of them."""
    case = make_roi_pool(N=2, R=5, output_size=(3, 2))
    legal = {**case.arguments(), "grad_out": case.grad_out}
    return {**legal, **{k: v(legal[k]) if inspect.isfunction(v) else v for k, v in changes.items()}}


ROI_ERRORS: dict[str, tuple[dict[str, Any], type[DcnError], str]] = {
    "input rank": ({"input": zeros(4, 8, 9)}, ShapeError, "input must have 4 dimensions [N, C, H, W], got"),
    "no width": ({"input": zeros(2, 4, 8, 0)}, ShapeError, "input must be [N, C >= 1, H >= 1, W >= 1], got"),
    "rois rank": ({"rois": zeros(5)}, ShapeError, "rois must be [R, 5] (image, x1, y1, x2, y2), got shape (5,)"),
    "rois without image": ({"rois": zeros(5, 4)}, ShapeError, "rois must be [R, 5] (image, x1, y1, x2, y2), got"),
    "offset order": ({"offset": zeros(5, 3, 2, 2)}, ShapeError, "offset must be [R=5, 2, P=3, Q=2], got shape"),
    "offset regions": ({"offset": zeros(4, 2, 3, 2)}, ShapeError, "offset must be [R=5, 2, P=3, Q=2], got"),
    "mask rank": ({"mask": zeros(5, 1, 3, 2)}, ShapeError, "mask must be [R=5, P=3, Q=2], got shape (5, 1, 3, 2)"),
    "output size 0": (
        {"output_size": 0},
        ArgumentError,
        "output_size must be an integer from 1 to 16777216 or a pair of them, got 0",
    ),
    "output size text": ({"output_size": "7"}, ArgumentError, "output_size must be an integer from 1 to"),
    "output size of three": ({"output_size": (3, 2, 1)}, ArgumentError, "output_size must be an integer from 1 to"),
    "negative sampling ratio": (
        {"sampling_ratio": -1},
        ArgumentError,
        "sampling_ratio must be an integer from 0 to 16777216, got -1",
    ),
    "fractional sampling ratio": ({"sampling_ratio": 1.5}, ArgumentError, "sampling_ratio must be an integer from 0"),
    "zero scale": ({"spatial_scale": 0}, ArgumentError, "spatial_scale must be a positive finite number, got 0"),
    "NaN scale": ({"spatial_scale": float("nan")}, ArgumentError, "spatial_scale must be a positive finite number"),
    "infinite gamma": ({"gamma": float("inf")}, ArgumentError, "gamma must be a finite number, got inf"),
    "gamma text": ({"gamma": "0.1"}, ArgumentError, "gamma must be a finite number, got '0.1'"),
    "image index": (
        {"rois": lambda r: np.concatenate([r[:, :1] + 2, r[:, 1:]], 1)},
        ArgumentError,
        "rois must hold indices of feature maps from 0 to N-1=1 in column 0, got",
    ),
    "integer rois": (
        {"rois": lambda r: r.astype(np.int64)},
        DtypeError,
        "rois must be float16, bfloat16, float32 or float64, got int64",
    ),
    "offset dtype": (
        {"offset": lambda o: o.astype(np.float64)},
        DtypeError,
        "offset must be float32 beside float32 input, got float64",
    ),
    "mask alone": (
        {"offset": None, "mask": lambda m: m.astype(np.float16)},
        DtypeError,
        "mask must be float32 beside float32 input, got float16",
    ),
    "list of boxes": ({"rois": [zeros(3, 4), zeros(2, 4)]}, DtypeError, "rois must be a NumPy or CuPy array, got list"),
    "torch rois": ({"rois": lambda r: torch.from_numpy(r)}, DtypeError, "rois must be a NumPy or CuPy array, got"),
    "rois elsewhere": (
        {"rois": lambda r: fake_cupy(r)},
        DeviceError,
        "rois must be a numpy array like input, got a cupy array",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROI_ERRORS)
def test_roi_pooling_refuses(name: str):
    changes, error, message = ROI_ERRORS[name]
    bad = roi_arguments(**changes)
    with pytest.raises(error) as raised:
        dcnops.deform_roi_pool_backward(**bad)
    assert message in str(raised.value)
    bad.pop("grad_out")
    with pytest.raises(error) as raised:
        dcnops.deform_roi_pool(**bad)
    assert message in str(raised.value)


def test_roi_pooling_backward_refuses():
    with pytest.raises(ShapeError, match=r"grad_out must be \[R=5, C=4, P=3, Q=2\], got shape \(5, 4, 2, 3\)"):
        dcnops.deform_roi_pool_backward(**roi_arguments(grad_out=zeros(5, 4, 2, 3)))
    with pytest.raises(ArgumentError, match="needs must be names among input, offset, mask, got 'rois'"):
        dcnops.deform_roi_pool_backward(**roi_arguments(), needs="rois")


def test_backends_take_the_same_arguments():
    from dcnops._backends.cpu import backend as cpu
    from dcnops._backends.cuda import backend as cuda

    for name in ("deform_conv2d", "deform_conv2d_backward", "deform_roi_pool", "deform_roi_pool_backward"):
        ours, theirs = (inspect.signature(getattr(backend, name)).parameters for backend in (cpu, cuda))
        assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


@pytest.mark.parametrize("name", FORWARD_ERRORS)
def test_forward_and_backward_refuse(name: str):
    changes, error, message = FORWARD_ERRORS[name]
    bad = arguments(**changes)
    with pytest.raises(error) as raised:
        dcnops.deform_conv2d_backward(**bad)
    assert message in str(raised.value)
    bad.pop("grad_out")
    with pytest.raises(error) as raised:
        dcnops.deform_conv2d(**bad)
    assert message in str(raised.value)
    assert isinstance(raised.value, DcnError)
    assert " must " in str(raised.value) and "got " in str(raised.value)


@pytest.mark.parametrize("name", BACKWARD_ERRORS)
def test_backward_refuses(name: str):
    changes, error, message = BACKWARD_ERRORS[name]
    with pytest.raises(error) as raised:
        dcnops.deform_conv2d_backward(**arguments(**changes))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "error, base",
    [(ShapeError, ValueError), (ArgumentError, ValueError), (DeviceError, ValueError), (DtypeError, TypeError)],
)
def test_errors_are_also_the_usual_python_errors(error: type[Exception], base: type[Exception]):
    assert issubclass(error, base) and issubclass(error, DcnError)


@st.composite
def broken_cases(draw: st.DrawFn) -> ConvCase:
    """A legal case in which the size of one array is changed along one axis."""
    case = draw(conv_cases(dtypes=("float32",)))
    name = draw(st.sampled_from(case.needs))
    array = getattr(case, name)
    axis = draw(st.integers(0, array.ndim - 1))
    shape = list(array.shape)
    shape[axis] = draw(st.integers(0, 2 * shape[axis] + 2).filter(lambda size: size != shape[axis]))
    return case.with_arrays(**{name: np.zeros(shape, array.dtype)})


@given(case=broken_cases())
def test_a_wrong_size_is_an_error_or_another_legal_call(case: ConvCase):
    """Never a crash and never an undocumented exception."""
    try:
        output = dcnops.deform_conv2d(**case.arguments())
    except ShapeError as error:
        assert " must " in str(error) and "got " in str(error)
    else:
        np.testing.assert_allclose(output, case.expected(), rtol=1e-4, atol=1e-4)


def test_errors_come_before_any_allocation():
    dcnops.deform_conv2d(**{k: v for k, v in arguments().items() if k != "grad_out"})
    big = np.zeros((1, 64, 256, 256), np.float32)
    offset, weight = np.zeros((1, 18, 256, 255), np.float32), np.zeros((64, 64, 3, 3), np.float32)
    tracemalloc.start()
    try:
        with pytest.raises(ShapeError):
            dcnops.deform_conv2d(big, offset, weight, padding=1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000


def test_a_failure_leaves_the_inputs_untouched():
    good = arguments()
    before = {name: array.copy() for name, array in good.items() if isinstance(array, np.ndarray)}
    with pytest.raises(ArgumentError):
        dcnops.deform_conv2d_backward(**{**good, "needs": ("everything",)})
    with pytest.raises(ShapeError):
        dcnops.deform_conv2d_backward(**{**good, "stride": 2})
    for name, array in before.items():
        np.testing.assert_array_equal(good[name], array)


@pytest.mark.parametrize("stride", [np.array(1), np.int64(1), np.array([1, 1]), [1, 1], (np.int32(1), 1)], ids=repr)
def test_numbers_of_numpy_are_numbers(stride: Any):
    legal = {k: v for k, v in arguments().items() if k != "grad_out"}
    expected = dcnops.deform_conv2d(**legal)
    np.testing.assert_array_equal(dcnops.deform_conv2d(**{**legal, "stride": stride}), expected)


def test_a_single_need_may_be_a_plain_string():
    gradients = dcnops.deform_conv2d_backward(**arguments(needs="weight"))
    assert gradients.weight is not None and gradients.input is None


def test_gradients_of_absent_arguments_are_none():
    gradients = dcnops.deform_conv2d_backward(**arguments(bias=None, mask=None))
    assert gradients.bias is None and gradients.mask is None
    assert gradients._fields == ("input", "offset", "weight", "bias", "mask")
