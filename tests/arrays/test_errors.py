"""Errors of wrong arguments: the class, and a message with the argument, what it needs and what it got."""

from __future__ import annotations

import inspect
import itertools
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dcnops
from dcnops import ArgumentError, DcnError, DeviceError, DtypeError, ShapeError
from tests.cases import Case, ConvCase, conv_cases, make_aggregate, make_attention, make_conv, make_roi_pool


def fake_cupy(array: np.ndarray, device: int = 0) -> Any:
    """Return an object without memory that passes for a CuPy array in the checks."""
    kind = type("ndarray", (), {"__module__": "cupy", "shape": array.shape, "dtype": array.dtype})
    fake = kind()
    fake.device = type("Device", (), {"id": device})
    return fake


class Unprintable:
    def __repr__(self) -> str:
        raise ValueError("no text")


class JaxArray:
    __module__ = "jaxlib._jax"
    shape = (1,)
    dtype = np.dtype(np.float32)


def changed_arguments(case: Case, changes: dict[str, Any]) -> dict[str, Any]:
    """Return the legal arguments of a case with changes: new values, or functions of the old ones."""
    legal = {**case.arguments(), "grad_out": case.grad_out}
    return {**legal, **{k: v(legal[k]) if inspect.isfunction(v) else v for k, v in changes.items()}}


def arguments(**changes: Any) -> dict[str, Any]:
    """Return the arguments of a convolution with C=4, 2 deformable groups and a 3x2 kernel, with changes."""
    return changed_arguments(make_conv(N=2, C=4, H=5, W=5, O=6, kernel=(3, 2), padding=(1, 0), D=2, G=2), changes)


def roi_arguments(**changes: Any) -> dict[str, Any]:
    """Return the arguments of a RoI pooling with 5 regions and 3x2 bins, with changes."""
    return changed_arguments(make_roi_pool(N=2, R=5, output_size=(3, 2)), changes)


def attention_arguments(**changes: Any) -> dict[str, Any]:
    """Return the arguments of an attention with 3 heads and 2 levels of 2 points, with changes."""
    return changed_arguments(make_attention(N=2, M=3, D=4, Lq=5), changes)


def aggregate_arguments(**changes: Any) -> dict[str, Any]:
    """Return the arguments of an aggregation with 2 groups of 4 channels and a 3x3 kernel, with changes."""
    return changed_arguments(make_aggregate(N=2, G=2, D=4, H=5, W=6), changes)


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def astype(dtype: Any) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: array.astype(dtype)


def as_tensor(array: np.ndarray) -> Any:
    return pytest.importorskip("torch").from_numpy(array)


ErrorTable = dict[str, tuple[dict[str, Any], type[DcnError], str]]
"""Changes of the legal arguments, the class of the error and part of its message, by the name of the mistake."""


def errors(error: type[DcnError], cases: dict[str, tuple[dict[str, Any], str]]) -> ErrorTable:
    return {name: (changes, error, message) for name, (changes, message) in cases.items()}


NEEDS_OFFSET = "offset must be [N=2, 2*D*3*2, oh=5, ow=4], got shape "
NEEDS_MASK = "mask must be [N=2, D*kh*kw=2*3*2, oh=5, ow=4], got shape "
NEEDS_INPUT = "input must be [N, C >= 1, H >= 1, W >= 1], got"
NEEDS_WEIGHT = "weight must be [O >= 1, C/G >= 1, kh >= 1, kw >= 1]"
NEEDS_STRIDE = "stride must be an integer from 1 to 16777216 or a pair of them, got "
NEEDS_SIDES = "((top, bottom), (left, right)), got "
NEEDS_ARRAY = "{} must be a NumPy or CuPy array, got "

# The names are also used by the tests of the adapters.
FORWARD_ERRORS: ErrorTable = {
    **errors(ShapeError, {
        "input rank": ({"input": zeros(4, 5, 5)}, "input must have 4 dimensions [N, C, H, W], got shape (4, 5, 5)"),
        "offset rank": (
            {"offset": zeros(2, 24, 5)}, "offset must have 4 dimensions [N, 2*D*kh*kw, oh, ow], got shape (2, 24, 5)"
        ),
        "weight rank": (
            {"weight": zeros(6, 2, 3)}, "weight must have 4 dimensions [O, C/G, kh, kw], got shape (6, 2, 3)"
        ),
        "mask rank": ({"mask": zeros(2)}, "mask must have 4 dimensions [N, D*kh*kw, oh, ow], got shape (2,)"),
        "bias rank": ({"bias": zeros(1, 6)}, "bias must be [O=6], got shape (1, 6)"),
        "bias size": ({"bias": zeros(5)}, "bias must be [O=6], got shape (5,)"),
        "no channels": ({"input": zeros(2, 0, 5, 5)}, NEEDS_INPUT),
        "no height": ({"input": zeros(2, 4, 0, 5)}, NEEDS_INPUT),
        "no filters": ({"weight": zeros(0, 2, 3, 2)}, NEEDS_WEIGHT),
        "no taps": ({"weight": zeros(6, 2, 0, 2)}, NEEDS_WEIGHT),
        "weight channels": (
            {"weight": zeros(6, 3, 3, 2)},
            "weight must be [O, C/G, kh, kw] with C/G a divisor of input's C=4, got shape (6, 3, 3, 2)",
        ),
        "weight groups": (
            {"weight": zeros(5, 2, 3, 2), "bias": None},
            "weight must have O divisible by the G=C/weight.shape[1]=2 weight groups, got shape (5, 2, 3, 2)",
        ),
        "offset batch": ({"offset": zeros(1, 24, 5, 4)}, NEEDS_OFFSET + "(1, 24, 5, 4)"),
        "offset height": ({"offset": zeros(2, 24, 4, 4)}, NEEDS_OFFSET + "(2, 24, 4, 4)"),
        "offset width": ({"offset": zeros(2, 24, 5, 5)}, NEEDS_OFFSET),
        "offset channels": ({"offset": zeros(2, 18, 5, 4)}, NEEDS_OFFSET),
        "offset empty": ({"offset": zeros(2, 0, 5, 4)}, NEEDS_OFFSET),
        "offset groups": (
            {"offset": zeros(2, 36, 5, 4)}, "with D a divisor of input's C=4, got shape (2, 36, 5, 4), that is D=3"
        ),
        "mask channels": ({"mask": zeros(2, 24, 5, 4)}, NEEDS_MASK + "(2, 24, 5, 4)"),
        "mask size": ({"mask": zeros(2, 12, 4, 4)}, NEEDS_MASK),
        "kernel too large": (
            {"weight": zeros(6, 2, 8, 2)},
            "input must have a padded height of at least dilation*(kernel-1)+1 = 8, got 5 + 2 = 7",
        ),
        "dilation too large": ({"dilation": (1, 5)}, "input must have a padded width of at least"),
    }),
    **errors(ArgumentError, {
        "zero stride": ({"stride": 0}, NEEDS_STRIDE + "0"),
        "negative stride": ({"stride": (1, -1)}, NEEDS_STRIDE),
        "float stride": ({"stride": 1.5}, NEEDS_STRIDE),
        "text stride": ({"stride": "11"}, NEEDS_STRIDE),
        "three strides": ({"stride": (1, 1, 1)}, NEEDS_STRIDE + "(1, 1, 1)"),
        "no stride": ({"stride": None}, NEEDS_STRIDE),
        "zero dilation": ({"dilation": 0}, "dilation must be an integer from 1 to"),
        "huge dilation": ({"dilation": 2**40}, "dilation must be an integer from 1 to"),
        "negative padding": ({"padding": -1}, "padding must be an integer from 0 to"),
        "four paddings": ({"padding": (1, 1, 0, 0)}, NEEDS_SIDES + "(1, 1, 0, 0)"),
        "ragged padding": ({"padding": ((1, 1), 0)}, NEEDS_SIDES + "((1, 1), 0)"),
        "deep padding": ({"padding": ((1, 1, 1), (0, 0))}, NEEDS_SIDES),
        "huge padding": (
            {"padding": 2**24}, "padding must keep input's height within 16777216 pixels, got 5 + 33554432"
        ),
    }),
    **errors(DtypeError, {
        "integers": ({"input": astype(np.int32)}, "input must be float16, bfloat16, float32 or float64, got int32"),
        "complex": ({"input": astype(np.complex64)}, "input must be float16, bfloat16, float32"),
        "weight dtype": ({"weight": astype(np.float64)}, "weight must be float32 like input, got float64"),
        "bias dtype": ({"bias": astype(np.float16)}, "bias must be float32 like input, got"),
        "offset dtype": ({"offset": astype(np.float64)}, "offset must be float32 for float32 input, got float64"),
        "offset too coarse": (
            {"offset": astype(np.float16)}, "offset must be float32 for float32 input, got float16"
        ),
        "mask unlike offset": (
            dict.fromkeys(("input", "grad_out", "weight", "bias", "offset"), astype(np.float16)),
            "mask must be float16 like offset, got float32",
        ),
        "two 16-bit types": (
            {
                **dict.fromkeys(("input", "grad_out", "weight", "bias", "mask"), astype(ml_dtypes.bfloat16)),
                "offset": astype(np.float16),
            },
            "offset must be bfloat16 or float32 for bfloat16 input, got float16",
        ),
        "byte order": (
            {"mask": lambda m: m.astype(m.dtype.newbyteorder())},
            "mask must be in native byte order, got dtype('>f4'); pass mask.astype('float32')",
        ),
        "torch tensor": (
            {"input": as_tensor},
            NEEDS_ARRAY.format("input") + "torch.Tensor; dcnops works on arrays: pass tensor.detach().numpy()",
        ),
        "torch mask": ({"mask": as_tensor}, NEEDS_ARRAY.format("mask")),
        "JAX array": ({"weight": JaxArray()}, NEEDS_ARRAY.format("weight") + "jaxlib"),
        "list": ({"input": lambda x: x.tolist()}, NEEDS_ARRAY.format("input") + "list; pass numpy.asarray(...)"),
        "masked array": ({"input": lambda x: np.ma.masked_less(x, 0)}, NEEDS_ARRAY.format("input") + "numpy.ma."),
        "scalar": ({"bias": 1.0}, NEEDS_ARRAY.format("bias") + "float"),
        "nothing": ({"weight": None}, NEEDS_ARRAY.format("weight") + "NoneType"),
    }),
    **errors(DeviceError, {
        "mixed libraries": ({"offset": fake_cupy}, "offset must be a numpy array like input, got a cupy array"),
        "mixed devices": (
            {
                **dict.fromkeys(("input", "grad_out", "weight", "bias", "mask"), fake_cupy),
                "offset": lambda o: fake_cupy(o, device=1),
            },
            "offset must be on device 0 like input, got device 1",
        ),
    }),
}  # fmt: skip

ROI_ERRORS: ErrorTable = {
    **errors(ShapeError, {
        "input rank": ({"input": zeros(4, 8, 9)}, "input must have 4 dimensions [N, C, H, W], got"),
        "no width": ({"input": zeros(2, 4, 8, 0)}, NEEDS_INPUT),
        "rois rank": ({"rois": zeros(5)}, "rois must be [R, 5] (image, x1, y1, x2, y2), got shape (5,)"),
        "rois without image": ({"rois": zeros(5, 4)}, "rois must be [R, 5] (image, x1, y1, x2, y2), got"),
        "offset order": ({"offset": zeros(5, 3, 2, 2)}, "offset must be [R=5, 2, P=3, Q=2], got shape"),
        "offset regions": ({"offset": zeros(4, 2, 3, 2)}, "offset must be [R=5, 2, P=3, Q=2], got"),
        "mask rank": ({"mask": zeros(5, 1, 3, 2)}, "mask must be [R=5, P=3, Q=2], got shape (5, 1, 3, 2)"),
    }),
    **errors(ArgumentError, {
        "output size 0": (
            {"output_size": 0}, "output_size must be an integer from 1 to 16777216 or a pair of them, got 0"
        ),
        "output size text": ({"output_size": "7"}, "output_size must be an integer from 1 to"),
        "output size of three": ({"output_size": (3, 2, 1)}, "output_size must be an integer from 1 to"),
        "negative sampling ratio": (
            {"sampling_ratio": -1}, "sampling_ratio must be an integer from 0 to 16777216, got -1"
        ),
        "fractional sampling ratio": ({"sampling_ratio": 1.5}, "sampling_ratio must be an integer from 0"),
        "zero scale": ({"spatial_scale": 0}, "spatial_scale must be a positive finite number, got 0"),
        "NaN scale": ({"spatial_scale": float("nan")}, "spatial_scale must be a positive finite number"),
        "infinite gamma": ({"gamma": float("inf")}, "gamma must be a finite number, got inf"),
        "gamma text": ({"gamma": "0.1"}, "gamma must be a finite number, got '0.1'"),
        "gamma beyond float32": ({"gamma": -1e39}, "gamma must be a finite float32, of at most 3.402823e+38"),
        "scale beyond float32": ({"spatial_scale": 1e39}, "spatial_scale must be a finite float32, of at most"),
        "scale beyond float64": ({"spatial_scale": 10**400}, "spatial_scale must be a positive finite number, got"),
        "gamma beyond text": ({"gamma": 10**5000}, "gamma must be a finite number, got an integer of 16610 bits"),
        "gamma fraction": ({"gamma": Fraction(10**400)}, "gamma must be a finite number, got Fraction(1000"),
        "endless output size": ({"output_size": itertools.count()}, "output_size must be an integer from 1 to"),
        "huge sampling ratio": (
            {"sampling_ratio": 10**5000}, "sampling_ratio must be an integer from 0 to 16777216, got an integer of 166"
        ),
        "image index": (
            {"rois": lambda r: np.concatenate([r[:, :1] + 2, r[:, 1:]], 1)},
            "rois must hold indices of feature maps from 0 to N-1=1 in column 0, got",
        ),
    }),
    **errors(DtypeError, {
        "integer rois": ({"rois": astype(np.int64)}, "rois must be float16, bfloat16, float32 or float64, got int64"),
        "offset dtype": ({"offset": astype(np.float64)}, "offset must be float32 for float32 input, got float64"),
        "mask alone": (
            {"offset": None, "mask": astype(np.float16)}, "mask must be float32 for float32 input, got float16"
        ),
        "list of boxes": ({"rois": [zeros(3, 4), zeros(2, 4)]}, NEEDS_ARRAY.format("rois") + "list"),
        "torch rois": ({"rois": as_tensor}, NEEDS_ARRAY.format("rois")),
    }),
    **errors(DeviceError, {
        "rois elsewhere": ({"rois": fake_cupy}, "rois must be a numpy array like input, got a cupy array"),
    }),
}  # fmt: skip

NEEDS_SHAPES = "spatial_shapes must be 1 to 64 pairs (height, width) of integers from 1 to 16777216, got "
NEEDS_POINTS = "points must be a positive integer or a sequence of L=2 positive integers, got "
NEEDS_LOCATIONS = "sampling_locations must be [N=2, Lq, M=3, "
ATTENTION_ERRORS: ErrorTable = {
    **errors(ShapeError, {
        "value rank": ({"value": zeros(2, 30, 12)}, "value must have 4 dimensions [N, S, M, D], got shape (2, 30, 12)"),
        "locations rank": (
            {"sampling_locations": zeros(2, 5, 3, 4, 2)},
            "sampling_locations must have 6 dimensions [N, Lq, M, L, P, 2], got shape (2, 5, 3, 4, 2)",
        ),
        "locations of unequal points": (
            {"points": (3, 1)}, "sampling_locations must have 5 dimensions [N, Lq, M, sum(points), 2], got shape (2, 5,"
        ),
        "no points": ({"sampling_locations": zeros(2, 5, 3, 2, 0, 2)}, "must be [N, Lq, M, L, P >= 1, 2], got shape"),
        "sum of the sizes": (
            {"spatial_shapes": [(6, 4), (3, 3)]},
            "spatial_shapes must have a sum of height*width equal to value's S=30, got 33 for ((6, 4), (3, 3))",
        ),
        "levels": ({"spatial_shapes": [(6, 5)]}, NEEDS_LOCATIONS + "L=1, P=2, 2], got shape (2, 5, 3, 2, 2, 2)"),
        "points": ({"points": 4}, NEEDS_LOCATIONS + "L=2, P=4, 2], got shape (2, 5, 3, 2, 2, 2)"),
        "heads": ({"value": zeros(2, 30, 2, 4)}, "sampling_locations must be [N=2, Lq, M=2, L=2, P=2, 2], got shape"),
        "images": ({"value": zeros(1, 30, 3, 4)}, "sampling_locations must be [N=1, Lq, M=3, L=2, P=2, 2], got shape"),
        "coordinates": ({"sampling_locations": zeros(2, 5, 3, 2, 2, 3)}, NEEDS_LOCATIONS),
        "weights": (
            {"attention_weights": zeros(2, 4, 3, 2, 2)},
            "attention_weights must be [N=2, Lq=5, M=3, L=2, P=2], got shape (2, 4, 3, 2, 2)",
        ),
        "too many channels": (
            {
                "value": np.broadcast_to(np.float32(0), (2, 30, 3, 2**30)),
                "grad_out": np.broadcast_to(np.float32(0), (2, 5, 3 * 2**30)),
            },
            "value must have M*D below 2147483648, got 3221225472",
        ),
        "too many queries": (
            {
                "sampling_locations": np.broadcast_to(np.float32(0), (2, 2**31, 3, 2, 2, 2)),
                "attention_weights": np.broadcast_to(np.float32(0), (2, 2**31, 3, 2, 2)),
            },
            "sampling_locations must have Lq below 2147483648, got 2147483648",
        ),
    }),
    **errors(ArgumentError, {
        "no levels": ({"spatial_shapes": []}, NEEDS_SHAPES + "[]"),
        "empty level": ({"spatial_shapes": [(6, 4), (0, 2)]}, NEEDS_SHAPES + "[(6, 4), (0, 2)]"),
        "flat sizes": ({"spatial_shapes": (6, 4, 3, 2)}, NEEDS_SHAPES + "(6, 4, 3, 2)"),
        "fractional sizes": ({"spatial_shapes": np.array([[6.0, 4], [3, 2]])}, NEEDS_SHAPES),
        "three sizes": ({"spatial_shapes": [(6, 4, 1), (3, 2, 1)]}, NEEDS_SHAPES),
        "huge level": ({"spatial_shapes": [(2**30, 2**30), (3, 2)]}, NEEDS_SHAPES),
        "levels without end": ({"spatial_shapes": itertools.repeat((6, 4))}, NEEDS_SHAPES + "repeat((6, 4))"),
        "text": ({"spatial_shapes": "6432"}, NEEDS_SHAPES + "'6432'"),
        "no points": ({"points": 0}, NEEDS_POINTS + "0"),
        "points of three levels": ({"points": (1, 2, 1)}, NEEDS_POINTS + "(1, 2, 1)"),
        "points without end": ({"points": itertools.repeat(2)}, NEEDS_POINTS + "repeat(2)"),
        "fractional points": ({"points": 2.0}, NEEDS_POINTS + "2.0"),
    }),
    **errors(DtypeError, {
        "value dtype": ({"value": astype(np.int32)}, "value must be float16, bfloat16, float32 or float64, got int32"),
        "locations too coarse": (
            {"sampling_locations": astype(np.float16)},
            "sampling_locations must be float32 for float32 value, got float16",
        ),
        "weights unlike locations": (
            dict.fromkeys(("value", "grad_out", "attention_weights"), astype(np.float16)),
            "attention_weights must be float32 like sampling_locations, got float16",
        ),
        "torch tensor": ({"sampling_locations": as_tensor}, NEEDS_ARRAY.format("sampling_locations") + "torch.Tensor"),
        "integers on a device": (
            {
                **dict.fromkeys(("value", "grad_out", "sampling_locations", "attention_weights"), fake_cupy),
                "spatial_shapes": fake_cupy(np.zeros((2, 2), np.int16)),
            },
            "spatial_shapes must be int32 or int64, got int16",
        ),
    }),
    **errors(DeviceError, {
        "locations elsewhere": (
            {"sampling_locations": fake_cupy}, "sampling_locations must be a numpy array like value, got a cupy array"
        ),
        "sizes elsewhere": (
            {"spatial_shapes": fake_cupy(np.zeros((2, 2), np.int64))},
            "spatial_shapes must be on the host like value, got a cupy array",
        ),
        "sizes on another device": (
            {
                **dict.fromkeys(("value", "grad_out", "sampling_locations", "attention_weights"), fake_cupy),
                "spatial_shapes": fake_cupy(np.zeros((2, 2), np.int64), device=1),
            },
            "spatial_shapes must be on device 0 like value, got device 1",
        ),
    }),
}  # fmt: skip
ATTENTION_BACKWARD_ERRORS: ErrorTable = {
    **errors(ShapeError, {
        "grad_out": ({"grad_out": zeros(2, 5, 3, 4)}, "grad_out must be [N=2, Lq=5, M*D=12], got shape (2, 5, 3, 4)"),
    }),
    **errors(ArgumentError, {
        "unknown need": (
            {"needs": "input"},
            "needs must be names among value, sampling_locations, attention_weights, got 'input'",
        ),
    }),
}  # fmt: skip

AGGREGATE_ERRORS: ErrorTable = {
    **errors(ShapeError, {
        "input rank": ({"input": zeros(8, 5, 6)}, "input must have 4 dimensions [N, H, W, C], got shape (8, 5, 6)"),
        "mask rank": ({"mask": zeros(2, 90, 18)}, "mask must have 4 dimensions [N, oh, ow, channels], got shape"),
        "no height": ({"input": zeros(2, 0, 6, 8)}, "input must be [N, H >= 1, W >= 1, C], got shape (2, 0, 6, 8)"),
        "groups": ({"groups": 3}, "input must have C divisible by groups=3, got shape (2, 5, 6, 8)"),
        "offset channels": (
            {"offset": zeros(2, 5, 6, 18)},
            "offset must be [N=2, oh=5, ow=6, groups*2*9=36], got shape (2, 5, 6, 18)",
        ),
        "offset size": ({"stride": 2}, "offset must be [N=2, oh=3, ow=3, groups*2*9=36], got shape (2, 5, 6, 36)"),
        "mask channels": (
            {"mask": zeros(2, 5, 6, 9)}, "mask must be [N=2, oh=5, ow=6, groups*9=18], got shape (2, 5, 6, 9)"
        ),
        "not packed": (
            {"mask": None},
            "offset must be [N=2, oh=5, ow=6, groups*3*9=54 rounded up to a multiple of 8=56], got shape (2, 5, 6, 36)",
        ),
        "kernel too large": ({"kernel_size": (9, 1)}, "input must have a padded height of at least dilation*(kernel-"),
    }),
    **errors(ArgumentError, {
        "no groups": ({"groups": 0}, "groups must be a positive integer, got 0"),
        "groups text": ({"groups": "2"}, "groups must be a positive integer, got '2'"),
        "kernel": ({"kernel_size": 0}, "kernel_size must be an integer from 1 to 16777216 or a pair of them, got 0"),
        "stride": ({"stride": (1, 0)}, "stride must be an integer from 1 to"),
        "padding": ({"padding": -1}, "padding must be an integer from 0 to"),
        "dilation": ({"dilation": None}, "dilation must be an integer from 1 to"),
        "scale": ({"offset_scale": float("nan")}, "offset_scale must be a finite float32, got nan"),
        "scale beyond float32": ({"offset_scale": 1e39}, "offset_scale must be a finite float32, got 1e+39"),
        "center text": ({"remove_center": "yes"}, "remove_center must be True or False, got 'yes'"),
        "center of an even kernel": (
            {"remove_center": True, "kernel_size": (3, 2)},
            "remove_center must be False unless kernel_size is odd and above 1, got (3, 2)",
        ),
        "center of one tap": ({"remove_center": True, "kernel_size": 1}, "remove_center must be False unless"),
    }),
    **errors(DtypeError, {
        "offset dtype": ({"offset": astype(np.float64)}, "offset must be float32 for float32 input, got float64"),
        "mask dtype": ({"mask": astype(np.float16)}, "mask must be float32 for float32 input, got float16"),
        "list": ({"mask": lambda mask: mask.tolist()}, NEEDS_ARRAY.format("mask") + "list"),
    }),
    **errors(DeviceError, {
        "mask elsewhere": ({"mask": fake_cupy}, "mask must be a numpy array like input, got a cupy array"),
    }),
}  # fmt: skip
AGGREGATE_BACKWARD_ERRORS: ErrorTable = {
    **errors(ShapeError, {
        "grad_out": (
            {"grad_out": zeros(2, 8, 5, 6)}, "grad_out must be [N=2, oh=5, ow=6, C=8], got shape (2, 8, 5, 6)"
        ),
    }),
    **errors(ArgumentError, {
        "unknown need": ({"needs": ("weight",)}, "needs must be names among input, offset, mask, got ('weight',)"),
    }),
}  # fmt: skip

NEEDS_NAMES = "needs must be names among input, offset, weight, bias, mask"
BACKWARD_ERRORS: ErrorTable = {
    **errors(ShapeError, {
        "grad_out size": (
            {"grad_out": zeros(2, 6, 5, 5)}, "grad_out must be [N=2, O=6, oh=5, ow=4], got shape (2, 6, 5, 5)"
        ),
        "grad_out rank": ({"grad_out": zeros(2)}, "grad_out must be [N=2, O=6, oh=5, ow=4], got shape (2,)"),
    }),
    **errors(DtypeError, {
        "grad_out dtype": ({"grad_out": astype(np.float64)}, "grad_out must be float32 like input, got float64"),
        "grad_out library": ({"grad_out": as_tensor}, NEEDS_ARRAY.format("grad_out")),
    }),
    **errors(ArgumentError, {
        "unknown need": ({"needs": ("input", "biases")}, NEEDS_NAMES + ", got ('input', 'biases')"),
        "needs is nothing": ({"needs": None}, NEEDS_NAMES),
        "needs unhashable": ({"needs": [["input"]]}, "needs must be names among"),
        "needs without end": ({"needs": itertools.repeat("input")}, NEEDS_NAMES + ", got repeat('input')"),
        "stride without end": ({"stride": itertools.repeat(1)}, "stride must be an integer from 1"),
        "padding without end": ({"padding": itertools.cycle([(0, 1)])}, "padding must be an integer from 0"),
        "dilation of a huge range": ({"dilation": range(10**12)}, "dilation must be an integer from 1"),
        "stride beyond text": ({"stride": 10**5000}, "got an integer of 16610 bits"),
        "padding of a million": ({"padding": [1] * 10**6}, "got [1, 1, 1, 1, 1, 1, ...]"),
        "stride without text": ({"stride": Unprintable()}, "got <Unprintable instance at "),
    }),
}  # fmt: skip
ROI_BACKWARD_ERRORS: ErrorTable = {
    **errors(ShapeError, {
        "grad_out size": (
            {"grad_out": zeros(5, 4, 2, 3)}, "grad_out must be [R=5, C=4, P=3, Q=2], got shape (5, 4, 2, 3)"
        ),
    }),
    **errors(ArgumentError, {
        "unknown need": ({"needs": "rois"}, "needs must be names among input, offset, mask, got 'rois'"),
    }),
}  # fmt: skip


def test_prefetch_refuses_names_without_end():
    with pytest.raises(ArgumentError, match=r"dtypes must be among .*, got repeat"):
        dcnops.prefetch(dtypes=itertools.repeat("float32"))  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="input must be 4 positive numbers"):
        dcnops.prefetch(input=itertools.count(1))  # type: ignore[arg-type]


def assert_raises(function: Callable[..., Any], bad: dict[str, Any], error: type[DcnError], message: str) -> None:
    with pytest.raises(error) as raised:
        function(**bad)
    text = str(raised.value)
    assert message in text and " must " in text and "got " in text


TABLES: dict[str, tuple[Callable[..., dict[str, Any]], ErrorTable, ErrorTable]] = {
    "deform_conv2d": (arguments, FORWARD_ERRORS, BACKWARD_ERRORS),
    "deform_roi_pool": (roi_arguments, ROI_ERRORS, ROI_BACKWARD_ERRORS),
    "ms_deform_attn": (attention_arguments, ATTENTION_ERRORS, ATTENTION_BACKWARD_ERRORS),
    "deform_aggregate": (aggregate_arguments, AGGREGATE_ERRORS, AGGREGATE_BACKWARD_ERRORS),
}
"""Legal arguments of the backward function, errors of both directions, and errors of the backward function alone."""


@pytest.mark.parametrize(
    "operation, name", [(operation, name) for operation in TABLES for name in TABLES[operation][1]]
)
def test_both_directions_refuse(operation: str, name: str):
    legal, errors, _ = TABLES[operation]
    changes, error, message = errors[name]
    bad = legal(**changes)
    assert_raises(getattr(dcnops, f"{operation}_backward"), bad, error, message)
    del bad["grad_out"]
    assert_raises(getattr(dcnops, operation), bad, error, message)


@pytest.mark.parametrize(
    "operation, name", [(operation, name) for operation in TABLES for name in TABLES[operation][2]]
)
def test_backward_refuses(operation: str, name: str):
    legal, _, errors = TABLES[operation]
    changes, error, message = errors[name]
    assert_raises(getattr(dcnops, f"{operation}_backward"), legal(**changes), error, message)


def test_backends_have_the_same_signatures():
    from dcnops._backends.cpu import backend as cpu
    from dcnops._backends.cuda import backend as cuda

    for name in (name for operation in TABLES for name in (operation, f"{operation}_backward")):
        ours, theirs = (inspect.signature(getattr(backend, name)).parameters for backend in (cpu, cuda))
        assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


@pytest.mark.parametrize(
    "error, base",
    [(ShapeError, ValueError), (ArgumentError, ValueError), (DeviceError, ValueError), (DtypeError, TypeError)],
)
def test_errors_are_also_the_usual_python_errors(error: type[Exception], base: type[Exception]):
    assert issubclass(error, base) and issubclass(error, DcnError) and issubclass(error, RuntimeError)


@st.composite
def cases_with_a_changed_size(draw: st.DrawFn) -> ConvCase:
    case = draw(conv_cases(dtypes=("float32",)))
    name = draw(st.sampled_from(case.needs))
    array = getattr(case, name)
    axis = draw(st.integers(0, array.ndim - 1))
    shape = list(array.shape)
    shape[axis] = draw(st.integers(0, 2 * shape[axis] + 2).filter(lambda size: size != shape[axis]))
    return case.with_arrays(**{name: np.zeros(shape, array.dtype)})


@given(case=cases_with_a_changed_size())
def test_a_wrong_size_is_an_error_or_another_legal_call(case: ConvCase):
    try:
        output = dcnops.deform_conv2d(**case.arguments())
    except ShapeError as error:
        assert " must " in str(error) and "got " in str(error)
    else:
        np.testing.assert_allclose(output, case.expected(), rtol=1e-4, atol=1e-4)


def test_errors_are_raised_before_any_allocation():
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


def test_a_failure_leaves_the_inputs_unchanged():
    good = arguments()
    before = {name: array.copy() for name, array in good.items() if isinstance(array, np.ndarray)}
    for change in ({"needs": ("everything",)}, {"stride": 2}):
        with pytest.raises(DcnError):
            dcnops.deform_conv2d_backward(**{**good, **change})
    for name, array in before.items():
        np.testing.assert_array_equal(good[name], array)


@pytest.mark.parametrize("stride", [np.array(1), np.int64(1), np.array([1, 1]), [1, 1], (np.int32(1), 1)], ids=repr)
def test_numpy_integers_are_accepted(stride: Any):
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
