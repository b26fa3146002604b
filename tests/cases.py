"""Calls of the operations: drawn by hypothesis, made with random numbers, compared with a tolerance per dtype."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from tests import reference

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}

# Error over the largest magnitude of the expected array (at least 1): some roundings of the type for data of 16 bits,
# whose columns are rounded before the products, and of float32 for sums of up to a thousand terms.
TOLERANCE = {"float16": 6e-3, "bfloat16": 5e-2, "float32": 2e-5, "float64": 1e-12}

CHANNELS = (1, 2, 3, 4, 6, 8, 12, 17, 32, 33, 71)


@dataclass
class ConvCase:
    """The arguments of one deformable convolution, NumPy arrays."""

    input: np.ndarray
    offset: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None
    mask: np.ndarray | None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    grad_out: np.ndarray = field(default_factory=lambda: np.empty(0))

    def arguments(self) -> dict[str, Any]:
        names = ("input", "offset", "weight", "bias", "stride", "padding", "dilation", "mask")
        return {name: getattr(self, name) for name in names}

    def expected(self) -> np.ndarray:
        return reference.deform_conv2d(**self.arguments())

    def expected_gradients(self) -> dict[str, np.ndarray]:
        return reference.deform_conv2d_backward(self.grad_out, **self.arguments())

    def with_arrays(self, **arrays: Any) -> ConvCase:
        return replace(self, **arrays)

    @property
    def dtype(self) -> str:
        return self.input.dtype.name

    @property
    def needs(self) -> tuple[str, ...]:
        return (
            "input",
            "offset",
            "weight",
            *(["bias"] if self.bias is not None else []),
            *(["mask"] if self.mask is not None else []),
        )


def make_conv(
    *,
    N: int = 1,
    C: int = 4,
    H: int = 5,
    W: int = 6,
    O: int = 4,
    kernel: tuple[int, int] = (3, 3),
    stride: Any = 1,
    padding: Any = 1,
    dilation: Any = 1,
    G: int = 1,
    D: int = 1,
    bias: bool = True,
    mask: bool = True,
    dtype: str = "float32",
    offset_dtype: str | None = None,
    spread: float = 1.5,
    seed: int = 0,
) -> ConvCase:
    """A case with normally distributed arrays; offsets have the standard deviation `spread`."""
    random = np.random.default_rng(seed)
    kh, kw = kernel
    (sh, sw), (dh, dw) = reference.pair_of(stride), reference.pair_of(dilation)
    top, bottom, left, right = reference.padding_of(padding)
    oh = (H + top + bottom - dh * (kh - 1) - 1) // sh + 1
    ow = (W + left + right - dw * (kw - 1) - 1) // sw + 1
    K = kh * kw

    def normal(*shape: int, of: str = dtype, scale: float = 1.0) -> np.ndarray:
        return (scale * random.standard_normal(shape)).astype(DTYPES[of])

    offset_dtype = offset_dtype or dtype
    return ConvCase(
        input=normal(N, C, H, W),
        offset=normal(N, 2 * D * K, oh, ow, of=offset_dtype, scale=spread),
        weight=normal(O, C // G, kh, kw, scale=(C // G * K) ** -0.5),
        bias=normal(O) if bias else None,
        mask=random.uniform(-0.5, 1.5, (N, D * K, oh, ow)).astype(DTYPES[offset_dtype]) if mask else None,
        stride=stride,
        padding=padding,
        dilation=dilation,
        grad_out=normal(N, O, oh, ow),
    )


def away_from_kinks(case: ConvCase, seed: int) -> ConvCase:
    """The case with offsets whose fractional part is in [0.1, 0.9], inside and outside of the image."""
    random = np.random.default_rng(seed)
    whole = random.integers(-3, 3, case.offset.shape)
    offset = whole + random.uniform(0.1, 0.9, case.offset.shape)
    return case.with_arrays(offset=offset.astype(case.offset.dtype))


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@st.composite
def conv_cases(
    draw: st.DrawFn,
    dtypes: tuple[str, ...] = ("float32",),
    max_batch: int = 2,
    symmetric: bool = False,
    **fixed: Any,
) -> ConvCase:
    """Any legal call of moderate size: what `make_conv` takes is drawn unless it is in `fixed`.

    `symmetric` keeps to paddings that every library knows, the same on opposite sides.
    """
    dtype = draw(st.sampled_from(dtypes))
    C = fixed.get("C") or draw(st.sampled_from(CHANNELS))
    kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    dilation = (draw(st.integers(1, 3)), draw(st.integers(1, 2)))
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    sides = st.integers(0, 3)
    paddings = [sides, st.tuples(sides, sides)]
    if not symmetric:
        paddings.append(st.tuples(st.tuples(sides, sides), st.tuples(sides, sides)))
    padding = draw(st.one_of(paddings))
    top, bottom, left, right = reference.padding_of(padding)
    smallest = (
        max(1, dilation[0] * (kernel[0] - 1) + 1 - top - bottom),
        max(1, dilation[1] * (kernel[1] - 1) + 1 - left - right),
    )
    G = draw(st.sampled_from(divisors(C)))
    D = draw(st.sampled_from([d for d in divisors(C) if d <= 4 or d == C <= 17]))
    sixteen_bit = dtype in ("float16", "bfloat16")
    options: dict[str, Any] = {
        "N": draw(st.integers(0, max_batch)),
        "C": C,
        "H": draw(st.integers(smallest[0], smallest[0] + 4)),
        "W": draw(st.integers(smallest[1], smallest[1] + 4)),
        "O": G * draw(st.integers(1, 3 if G < 8 else 1)),
        "kernel": kernel,
        "stride": stride[0] if stride[0] == stride[1] else stride,
        "padding": padding,
        "dilation": dilation,
        "G": G,
        "D": D,
        "bias": draw(st.booleans()),
        "mask": draw(st.booleans()),
        "dtype": dtype,
        "offset_dtype": "float32" if sixteen_bit and draw(st.booleans()) else dtype,
        "spread": draw(st.sampled_from([0.0, 0.4, 2.0, 20.0])),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }
    return make_conv(**{**options, **fixed})


def assert_close(
    actual: np.ndarray, expected: np.ndarray, dtype: str, what: str = "output", slack: float = 1.0
) -> None:
    """The arrays agree within `slack` times the tolerance of `dtype`; NaN and infinities stand at the same places."""
    actual = np.asarray(actual).astype(np.float64)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape} instead of {expected.shape}"
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(actual[~finite], expected[~finite], err_msg=what)
    if finite.any():
        error = np.abs(actual[finite] - expected[finite]).max()
        limit = slack * TOLERANCE[dtype] * max(1.0, np.abs(expected[finite]).max())
        assert error <= limit, f"{what}: error {error:.3g} exceeds {limit:.3g}"
