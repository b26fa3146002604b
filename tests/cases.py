"""Test cases: random calls of the operations, hypothesis strategies for them, and comparison with the reference."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from typing_extensions import Self

from dcnops import _dtypes
from dcnops._attention_shapes import DeformAggregateGeometry, MSDeformAttnGeometry, packed_channels
from dcnops._shapes import DeformConvGeometry, DeformRoIPoolGeometry
from tests import reference, reference_attention

DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in _dtypes.DTYPES}

# Error relative to the largest magnitude of the expected array, which counts as at least 1. 16-bit data round the
# columns before the products; float32 sums have up to a thousand terms.
TOLERANCE = {"float16": 6e-3, "bfloat16": 5e-2, "float32": 2e-5, "float64": 1e-12}

CHANNELS = (1, 2, 3, 4, 6, 8, 12, 17, 32, 33, 71)


class Case:
    """Arguments of one call, as NumPy arrays."""

    operation: ClassVar[str]
    geometry_type: ClassVar[Any]
    reference: ClassVar[Any] = reference
    arrays: ClassVar[tuple[str, ...]]
    """Array arguments of the forward pass, in their order."""
    parameters: ClassVar[tuple[str, ...]]
    differentiable: ClassVar[tuple[str, ...]]

    grad_out: np.ndarray

    def arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*self.arrays, *self.parameters)}

    def geometry(self) -> Any:
        return self.geometry_type.of(**self.arguments())

    def with_arrays(self, **changes: Any) -> Self:
        return replace(self, **changes)  # type: ignore[type-var]

    def expected(self) -> np.ndarray:
        return self._computed(self.operation)

    def expected_gradients(self) -> dict[str, np.ndarray]:
        return self._computed(f"{self.operation}_backward", self.grad_out)

    def _computed(self, function: str, *arrays: np.ndarray) -> Any:
        """Call a function of the reference, once for equal calls, because many runners check the same cases."""
        arguments = self.arguments()
        key = function, *(_content(value) for value in (*arrays, *arguments.values()))
        if key not in _COMPUTED:
            _COMPUTED[key] = getattr(self.reference, function)(*arrays, **arguments)
            if len(_COMPUTED) > 3000:  # small arrays
                del _COMPUTED[next(iter(_COMPUTED))]
        return copy.deepcopy(_COMPUTED[key])

    @property
    def dtype(self) -> str:
        return getattr(self, self.arrays[0]).dtype.name

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the differentiable arguments that are not None."""
        return tuple(name for name in self.differentiable if getattr(self, name) is not None)


_COMPUTED: dict[tuple[Any, ...], Any] = {}


def _content(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, hashlib.sha256(value.tobytes()).digest()
    return repr(value)


@dataclass
class ConvCase(Case):
    """Arguments of one deformable convolution."""

    operation = "deform_conv2d"
    geometry_type = DeformConvGeometry
    arrays = ("input", "offset", "weight", "bias", "mask")
    parameters = ("stride", "padding", "dilation")
    differentiable = ("input", "offset", "weight", "bias", "mask")

    input: np.ndarray
    offset: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None
    mask: np.ndarray | None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    grad_out: np.ndarray = field(default_factory=lambda: np.empty(0))


@dataclass
class RoIPoolCase(Case):
    """Arguments of one deformable RoI pooling."""

    operation = "deform_roi_pool"
    geometry_type = DeformRoIPoolGeometry
    arrays = ("input", "rois", "offset", "mask")
    parameters = ("output_size", "spatial_scale", "sampling_ratio", "gamma")
    differentiable = ("input", "offset", "mask")

    input: np.ndarray
    rois: np.ndarray
    offset: np.ndarray | None
    mask: np.ndarray | None
    output_size: Any = 2
    spatial_scale: float = 1.0
    sampling_ratio: int = 2
    gamma: float = 0.1
    grad_out: np.ndarray = field(default_factory=lambda: np.empty(0))


@dataclass
class AttentionCase(Case):
    """Arguments of one multi-scale deformable attention."""

    operation = "ms_deform_attn"
    geometry_type = MSDeformAttnGeometry
    reference = reference_attention
    arrays = ("value", "sampling_locations", "attention_weights")
    parameters = ("spatial_shapes", "points")
    differentiable = arrays

    value: np.ndarray
    spatial_shapes: Any
    sampling_locations: np.ndarray
    attention_weights: np.ndarray
    points: Any = None
    grad_out: np.ndarray = field(default_factory=lambda: np.empty(0))


@dataclass
class AggregateCase(Case):
    """Arguments of one deformable aggregation."""

    operation = "deform_aggregate"
    geometry_type = DeformAggregateGeometry
    reference = reference_attention
    arrays = ("input", "offset", "mask")
    parameters = (
        "groups", "kernel_size", "stride", "padding", "dilation", "offset_scale", "remove_center",
    )  # fmt: skip
    differentiable = arrays

    input: np.ndarray
    offset: np.ndarray
    mask: np.ndarray | None
    groups: int = 1
    kernel_size: Any = 3
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    offset_scale: float = 1.0
    remove_center: bool = False
    grad_out: np.ndarray = field(default_factory=lambda: np.empty(0))


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
    """Make a case with normally distributed arrays and offsets of standard deviation `spread`."""
    random = np.random.default_rng(seed)
    kh, kw = kernel
    (sh, sw), (dh, dw) = reference.expand_pair(stride), reference.expand_pair(dilation)
    top, bottom, left, right = reference.expand_padding(padding)
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
    """Replace the offsets by some with fractional parts in [0.1, 0.9], inside and outside the image."""
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
    """Draw a legal call of moderate size, with all arguments of `make_conv` that are not in `fixed`.

    `symmetric` limits the padding to equal values on opposite sides, as in other libraries.
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
    top, bottom, left, right = reference.expand_padding(padding)
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


def make_roi_pool(
    *,
    N: int = 2,
    C: int = 4,
    H: int = 8,
    W: int = 9,
    R: int = 5,
    output_size: Any = (3, 2),
    spatial_scale: float = 0.5,
    sampling_ratio: int = 2,
    gamma: float = 0.1,
    offset: bool = True,
    mask: bool = True,
    dtype: str = "float32",
    offset_dtype: str | None = None,
    rois_dtype: str | None = None,
    spread: float = 1.0,
    inside: bool = False,
    seed: int = 0,
) -> RoIPoolCase:
    """Make a case with random regions: also inverted and across the border, or all `inside` the image."""
    random = np.random.default_rng(seed)
    P, Q = reference.expand_pair(output_size)
    offset_dtype = offset_dtype or dtype
    extent = np.array([W, H, W, H]) / spatial_scale
    if inside:
        corners = random.uniform(0.2, 0.4, (R, 4))
        corners[:, 2:] += 0.35
    else:
        corners = random.uniform(-0.4, 1.4, (R, 4))
    rois = np.concatenate([random.integers(0, max(N, 1), (R, 1)), corners * extent], axis=1)
    return RoIPoolCase(
        input=random.standard_normal((N, C, H, W)).astype(DTYPES[dtype]),
        rois=rois.astype(DTYPES[rois_dtype or ("float64" if dtype == "float64" else "float32")]),
        offset=(spread * random.standard_normal((R, 2, P, Q))).astype(DTYPES[offset_dtype]) if offset else None,
        mask=random.uniform(-0.5, 1.5, (R, P, Q)).astype(DTYPES[offset_dtype]) if mask else None,
        output_size=output_size,
        spatial_scale=spatial_scale,
        sampling_ratio=sampling_ratio,
        gamma=gamma,
        grad_out=random.standard_normal((R, C, P, Q)).astype(DTYPES[dtype]),
    )


@st.composite
def roi_pool_cases(draw: st.DrawFn, dtypes: tuple[str, ...] = ("float32",), **fixed: Any) -> RoIPoolCase:
    """Draw a legal call of moderate size, with all arguments of `make_roi_pool` that are not in `fixed`."""
    dtype = draw(st.sampled_from(dtypes))
    sixteen_bit = dtype in ("float16", "bfloat16")
    sizes = st.integers(1, 3)
    options: dict[str, Any] = {
        "N": draw(st.integers(1, 3)),
        "C": draw(st.sampled_from(CHANNELS)),
        "H": draw(st.integers(1, 9)),
        "W": draw(st.integers(1, 9)),
        "R": draw(st.integers(0, 4)),
        "output_size": draw(st.one_of(sizes, st.tuples(sizes, sizes))),
        "spatial_scale": draw(st.sampled_from([1.0, 0.5, 0.0625, 2.0])),
        "sampling_ratio": draw(st.integers(0, 3)),
        "gamma": draw(st.sampled_from([0.1, 1.0, -0.5, 0.0])),
        "offset": draw(st.booleans()),
        "mask": draw(st.booleans()),
        "dtype": dtype,
        "offset_dtype": "float32" if sixteen_bit and draw(st.booleans()) else dtype,
        "rois_dtype": draw(st.sampled_from(["float32", "float64", "float16"])),
        "spread": draw(st.sampled_from([0.0, 0.4, 3.0])),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }
    return make_roi_pool(**{**options, **fixed})


def make_attention(
    *,
    N: int = 1,
    M: int = 2,
    D: int = 4,
    Lq: int = 5,
    spatial_shapes: Any = ((6, 4), (3, 2)),
    points: Any = None,
    dtype: str = "float32",
    offset_dtype: str | None = None,
    spread: float = 0.4,
    seed: int = 0,
) -> AttentionCase:
    """Make a case with locations of standard deviation `spread` around the middle, two per level by default."""
    random = np.random.default_rng(seed)
    S = sum(height * width for height, width in spatial_shapes)
    tail = (sum(points),) if isinstance(points, tuple) else (len(spatial_shapes), points or 2)
    locations = 0.5 + spread * random.standard_normal((N, Lq, M, *tail, 2))
    return AttentionCase(
        value=random.standard_normal((N, S, M, D)).astype(DTYPES[dtype]),
        spatial_shapes=spatial_shapes,
        sampling_locations=locations.astype(DTYPES[offset_dtype or dtype]),
        attention_weights=random.uniform(-0.5, 1.5, (N, Lq, M, *tail)).astype(DTYPES[offset_dtype or dtype]),
        points=points,
        grad_out=random.standard_normal((N, Lq, M * D)).astype(DTYPES[dtype]),
    )


@st.composite
def attention_cases(draw: st.DrawFn, dtypes: tuple[str, ...] = ("float32",), **fixed: Any) -> AttentionCase:
    """Draw a legal call of moderate size, with all arguments of `make_attention` that are not in `fixed`."""
    dtype = draw(st.sampled_from(dtypes))
    shapes = tuple(draw(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=4)))
    per_level = st.tuples(*[st.integers(1, 4)] * len(shapes))
    options: dict[str, Any] = {
        "N": draw(st.integers(0, 2)),
        "M": draw(st.integers(1, 4)),
        "D": draw(st.sampled_from(CHANNELS)),
        "Lq": draw(st.integers(0, 6)),
        "spatial_shapes": shapes,
        "points": draw(st.one_of(st.none(), st.integers(1, 4), per_level)),
        "dtype": dtype,
        "offset_dtype": "float32" if dtype in ("float16", "bfloat16") and draw(st.booleans()) else dtype,
        "spread": draw(st.sampled_from([0.0, 0.1, 0.4, 5.0])),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }
    return make_attention(**{**options, **fixed})


def make_aggregate(
    *,
    N: int = 1,
    G: int = 2,
    D: int = 4,
    H: int = 5,
    W: int = 6,
    kernel_size: Any = 3,
    stride: Any = 1,
    padding: Any = 1,
    dilation: Any = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    packed: bool = False,
    dtype: str = "float32",
    offset_dtype: str | None = None,
    spread: float = 1.5,
    seed: int = 0,
) -> AggregateCase:
    """Make a case with normally distributed arrays and offsets of standard deviation `spread`."""
    random = np.random.default_rng(seed)
    pairs = (reference.expand_pair(value) for value in (kernel_size, stride, padding, dilation))
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = pairs
    K = kh * kw - remove_center
    size = (N, (H + 2 * ph - dh * (kh - 1) - 1) // sh + 1, (W + 2 * pw - dw * (kw - 1) - 1) // sw + 1)
    offset, mask = spread * random.standard_normal((*size, G, 2 * K)), random.uniform(-0.5, 1.5, (*size, G, K))
    if packed:
        together = np.concatenate([offset, mask], axis=4).reshape(*size, 3 * G * K)
        offset = np.zeros((*size, packed_channels(G, K)))
        offset[..., : 3 * G * K] = together
        offset[..., 3 * G * K :] = np.nan  # the padding is not read
    offsets = offset if packed else offset.reshape(*size, 2 * G * K)
    return AggregateCase(
        input=random.standard_normal((N, H, W, G * D)).astype(DTYPES[dtype]),
        offset=offsets.astype(DTYPES[offset_dtype or dtype]),
        mask=None if packed else mask.reshape(*size, G * K).astype(DTYPES[offset_dtype or dtype]),
        groups=G,
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        offset_scale=offset_scale,
        remove_center=remove_center,
        grad_out=random.standard_normal((*size, G * D)).astype(DTYPES[dtype]),
    )


@st.composite
def aggregate_cases(draw: st.DrawFn, dtypes: tuple[str, ...] = ("float32",), **fixed: Any) -> AggregateCase:
    """Draw a legal call of moderate size, with all arguments of `make_aggregate` that are not in `fixed`."""
    dtype = draw(st.sampled_from(dtypes))
    kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    dilation, padding = (draw(st.tuples(st.integers(low, 2), st.integers(low, 2))) for low in (1, 0))
    smallest = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding)]
    is_odd = kernel[0] % 2 == kernel[1] % 2 == 1 and kernel != (1, 1)
    options: dict[str, Any] = {
        "N": draw(st.integers(0, 2)),
        "G": draw(st.integers(1, 4)),
        "D": draw(st.sampled_from(CHANNELS)),
        "H": draw(st.integers(smallest[0], smallest[0] + 3)),
        "W": draw(st.integers(smallest[1], smallest[1] + 3)),
        "kernel_size": kernel,
        "stride": draw(st.integers(1, 3)),
        "padding": padding,
        "dilation": dilation,
        "offset_scale": draw(st.sampled_from([1.0, 0.5, 2.3, -1.0, 0.0])),
        "remove_center": is_odd and draw(st.booleans()),
        "packed": draw(st.booleans()),
        "dtype": dtype,
        "offset_dtype": "float32" if dtype in ("float16", "bfloat16") and draw(st.booleans()) else dtype,
        "spread": draw(st.sampled_from([0.0, 0.4, 2.0, 20.0])),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }
    return make_aggregate(**{**options, **fixed})


def assert_close(
    actual: np.ndarray, expected: np.ndarray, dtype: str, name: str = "output", slack: float = 1.0
) -> None:
    """Check that arrays agree within `slack` times the tolerance of `dtype`, with NaN and infinity in equal places."""
    actual = np.asarray(actual).astype(np.float64)
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape} instead of {expected.shape}"
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(actual[~finite], expected[~finite], err_msg=name)
    if finite.any():
        error = np.abs(actual[finite] - expected[finite]).max()
        limit = slack * TOLERANCE[dtype] * max(1.0, np.abs(expected[finite]).max())
        assert error <= limit, f"{name}: error {error:.3g} exceeds {limit:.3g}"


def assert_correct(run: Any, case: Case, slack: float = 1.0) -> None:
    """Check the output and all gradients of a runner (see tests/conftest.py) against the reference."""
    output = run.forward(case)
    assert output.dtype.name == case.dtype
    assert_close(output, case.expected(), case.dtype, slack=slack)
    gradients, expected = run.backward(case), case.expected_gradients()
    assert set(gradients) == set(case.needs)
    for name in case.needs:
        assert gradients[name].dtype == getattr(case, name).dtype, name
        assert_close(gradients[name], expected[name], case.dtype, name, slack)
