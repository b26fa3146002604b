"""(Modulated) deformable convolution and deformable RoI pooling on JAX arrays.

XLA calls back into the array functions with its own buffers: on the CPU they become NumPy arrays, on a GPU CuPy arrays
(through DLPack) on XLA's stream, in both cases without a copy. Eager calls and compiled programs take this same path;
only the result is copied once, from the array that the array functions return into the buffer that XLA has waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, NoReturn, TypeAlias

import jax
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.experimental.buffer_callback import Buffer, ExecutionContext, buffer_callback

from dcnops._arguments import Padding, Pair, check_layout, check_precision
from dcnops._dispatch import check_arrays, load_backend
from dcnops._dtypes import DTYPES
from dcnops._errors import ArgumentError, DeviceError, DtypeError
from dcnops._geometry import DeformConvGeometry, DeformRoIPoolGeometry
from dcnops._layout import NCHW, Layout

from .cuda_stream import CudaStream

Array: TypeAlias = "jax.Array | np.ndarray[Any, Any]"
_Arrays: TypeAlias = dict[str, Any]
"""Arrays, or what stands for them, by the name of the argument."""
_Geometry: TypeAlias = DeformConvGeometry | DeformRoIPoolGeometry

_DLPACK_CPU = 1


def deform_conv2d(
    input: Array,
    offset: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    mask: Array | None = None,
    *,
    layout: str = "NCHW",
    precision: str | None = None,
) -> jax.Array:
    """Deformable convolution on JAX arrays; modulated (v2) when `mask` is given.

    Works eagerly, under `jax.jit`, `jax.grad` and `jax.vmap`, on the CPU and on NVIDIA GPUs. The formula and the
    gradients are those of `dcnops.deform_conv2d` and `dcnops.deform_conv2d_backward`.

    Parameters
    ----------
    input : array [N, C, H, W] or [N, H, W, C], float16, bfloat16, float32 or float64
        The images. N may be 0.
    offset : array [N, 2*D*kh*kw, oh, ow] or [N, oh, ow, 2*D*kh*kw], in pixels
        Shift of each sampling point: vertical, then horizontal, tap by tap, for each of D deformable groups. In the
        dtype of `input`; beside 16-bit data also float32.
    weight : array [O, C/G, kh, kw], dtype of `input`
        The filters of G weight groups.
    bias : array [O], dtype of `input`, optional
    stride, dilation : int or (vertical, horizontal)
        Python integers, also under `jax.jit`: they decide about shapes.
    padding : int, (vertical, horizontal) or ((top, bottom), (left, right)), in pixels
        Zero padding; Python integers.
    mask : array [N, D*kh*kw, oh, ow] or [N, oh, ow, D*kh*kw], dtype of `offset`, optional
        Factor of each sampling point.
    layout : "NCHW" or "NHWC"
        Which of the two orders of axes `input`, `offset`, `mask` and the result have.
    precision : "ieee", "tf32" or "3xtf32", optional
        How float32 products are computed on a GPU, as in `dcnops.deform_conv2d`.

    Returns
    -------
    jax.Array [N, O, oh, ow] or [N, oh, ow, O], dtype of `input`

    Raises
    ------
    ShapeError
        An array has the wrong rank or size.
    ArgumentError
        `stride`, `padding`, `dilation`, `layout` or `precision` is not legal.
    DtypeError
        An argument is no JAX or NumPy array, or has the wrong dtype.
    NotImplementedError
        A second derivative is taken.

    Notes
    -----
    Errors are raised while the call is traced. `jax.vmap` calls the operation once for each element of the new axis;
    a larger N is faster. There are first derivatives in reverse mode only, and those that nobody asks for are not
    computed. ``jax.default_matmul_precision``, whose meaning depends on the platform, has no influence on `precision`.

    On a GPU the work is done by CuPy, which needs memory of its own beside what JAX sets aside at its start
    (``XLA_PYTHON_CLIENT_MEM_FRACTION``). A computation that is sharded over devices belongs in `jax.shard_map`:
    otherwise every device computes all of it.

    Examples
    --------
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from dcnops.adapters.jax import deform_conv2d
    >>> image = jnp.arange(16, dtype=jnp.float32).reshape(1, 1, 4, 4)
    >>> weight = jnp.ones((1, 1, 1, 1), jnp.float32)
    >>> offset = jnp.zeros((1, 2, 4, 4)).at[:, 1].set(0.5)  # every sampling point half a pixel to the right
    >>> deform_conv2d(image, offset, weight)[0, 0, 0].tolist()
    [0.5, 1.5, 2.5, 1.5]
    >>> gradient = jax.jit(jax.grad(lambda offset: deform_conv2d(image, offset, weight).sum()))
    >>> gradient(offset)[0, :, 1, 1].tolist()  # one pixel down adds 4, one pixel right adds 1
    [4.0, 1.0]
    """
    order = check_layout(layout)
    check_precision(precision)
    _check_known(stride=stride, padding=padding, dilation=dilation)
    optional = ("bias", "mask")
    data = _arrays({"input": input, "weight": weight, "bias": bias}, optional)
    sampling = _arrays({"offset": offset, "mask": mask}, optional)
    check_arrays(_stand_ins(data), _stand_ins(sampling), optional=optional)
    arrays = data | sampling
    geometry = DeformConvGeometry.of(**arrays, stride=stride, padding=padding, dilation=dilation, layout=order)
    operation = _Operation("deform_conv2d", geometry, order, ("input", "offset", "mask"), (("precision", precision),))
    return _operate(operation, _equally_varying(arrays))


def deform_roi_pool(
    input: Array,
    rois: Array,
    offset: Array | None = None,
    mask: Array | None = None,
    *,
    output_size: Pair,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 2,
    gamma: float = 0.1,
    layout: str = "NCHW",
) -> jax.Array:
    """Deformable RoI pooling on JAX arrays; modulated (v2) with `mask`, RoIAlign without `offset` and `mask`.

    Works eagerly, under `jax.jit`, `jax.grad` and `jax.vmap`, on the CPU and on NVIDIA GPUs. The formula and the
    gradients are those of `dcnops.deform_roi_pool` and `dcnops.deform_roi_pool_backward`.

    Parameters
    ----------
    input : array [N, C, H, W] or [N, H, W, C], float16, bfloat16, float32 or float64
        The feature maps.
    rois : array [R, 5], float16, bfloat16, float32 or float64, in units of the image
        Regions (index of the feature map, x1, y1, x2, y2). R may be 0. Their gradient is 0.
    offset : array [R, 2, P, Q], dtype of `input` (beside 16-bit data also float32), optional
        Shift of each bin, as a fraction of the region: ``offset[r, 0]`` horizontal, ``offset[r, 1]`` vertical.
    mask : array [R, P, Q], dtype of `offset`, optional
        Factor of each bin.
    output_size : int or (P, Q)
        Bins of a region, vertical and horizontal. This and what follows are Python numbers, also under `jax.jit`.
    spatial_scale : float
        Pixels of `input` per unit of `rois`, such as 1/16.
    sampling_ratio : int
        Samples of a bin along each axis; 0 for as many as the bin has pixels.
    gamma : float
        Factor of the offsets.
    layout : "NCHW" or "NHWC"
        Which of the two orders of axes `input` and the result have.

    Returns
    -------
    jax.Array [R, C, P, Q] or [R, P, Q, C], dtype of `input`

    Raises
    ------
    ShapeError
        An array has the wrong rank or size.
    ArgumentError
        A parameter is not legal.
    DtypeError
        An argument is no JAX or NumPy array, or has the wrong dtype.
    NotImplementedError
        A second derivative is taken.

    Notes
    -----
    What is said of `deform_conv2d` holds here too. Whether `rois` name feature maps that exist is known only when the
    operation runs: on the CPU JAX then raises an error of its own with the message of the `ArgumentError`, on a GPU
    the result is NaN.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from dcnops.adapters.jax import deform_roi_pool
    >>> image = jnp.arange(16, dtype=jnp.float32).reshape(1, 1, 4, 4)
    >>> rois = jnp.array([[0, 0, 0, 4, 4]], jnp.float32)
    >>> deform_roi_pool(image, rois, output_size=2)[0, 0].tolist()
    [[2.5, 4.5], [10.5, 12.5]]
    """
    order = check_layout(layout)
    _check_known(output_size=output_size, spatial_scale=spatial_scale, sampling_ratio=sampling_ratio, gamma=gamma)
    optional = ("offset", "mask")
    data, regions = _arrays({"input": input}), _arrays({"rois": rois})
    sampling = _arrays({"offset": offset, "mask": mask}, optional)
    check_arrays(_stand_ins(data), _stand_ins(sampling), _stand_ins(regions), optional)
    arrays = data | regions | sampling
    geometry = DeformRoIPoolGeometry.of(
        **arrays,
        output_size=output_size,
        spatial_scale=spatial_scale,
        sampling_ratio=sampling_ratio,
        gamma=gamma,
        layout=order,
    )
    return _operate(_Operation("deform_roi_pool", geometry, order, ("input",)), _equally_varying(arrays))


@dataclass(frozen=True)
class _Operation:
    """One call but for its arrays. Those of equal calls are equal, and JAX compiles them once."""

    name: str
    geometry: _Geometry
    layout: Layout = NCHW
    images: tuple[str, ...] = ()
    """The arrays in that layout."""
    options: tuple[tuple[str, Any], ...] = ()
    """Keyword arguments of both directions."""

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self.layout.shape(*self.geometry.output_shape)


def _check_known(**parameters: Any) -> None:
    for name, parameter in parameters.items():
        if any(isinstance(number, jax.core.Tracer) for number in jax.tree.leaves(parameter)):
            raise ArgumentError(
                f"{name} must be known while JAX traces the call, got {parameter!r}; "
                f"list it in static_argnames of jax.jit, or use a constant"
            )


def _arrays(arguments: dict[str, Any], optional: Container[str] = ()) -> _Arrays:
    """The arguments as JAX takes them; `DtypeError` for what is no array."""
    return {
        name: None if argument is None and name in optional else _array(name, argument)
        for name, argument in arguments.items()
    }


def _array(name: str, argument: Any) -> Array:
    array = argument
    if not isinstance(argument, jax.Array | np.ndarray) and hasattr(argument, "__jax_array__"):
        # The parameters of neural network libraries, which wrap an array.
        array = argument.__jax_array__()
    # Random keys are JAX arrays too, of a dtype that is none of NumPy's; JAX takes no masked arrays.
    legal = isinstance(array, jax.Array | np.ndarray) and isinstance(array.dtype, np.dtype)
    if legal and not isinstance(array, np.ma.MaskedArray):
        checked: Array = array
        return checked
    kind = type(argument)
    got = f"{kind.__module__}.{kind.__qualname__}" if kind.__module__ != "builtins" else kind.__qualname__
    raise DtypeError(f"{name} must be a JAX or NumPy array of numbers, got {got}; pass jax.numpy.asarray(...) of it")


def _stand_ins(arrays: _Arrays) -> _Arrays:
    """Empty NumPy arrays of the dtypes that JAX will see, for the checks of the array functions."""
    return {name: None if array is None else np.empty(0, _dtype(array)) for name, array in arrays.items()}


def _dtype(array: Array) -> np.dtype[Any]:
    # JAX makes float32 of NumPy's float64 unless it was told to know 64 bits.
    if array.dtype.name in DTYPES and array.dtype.isnative:
        return np.dtype(jax.dtypes.canonicalize_dtype(array.dtype))
    return array.dtype


def _varying_axes(array: Any) -> frozenset[str]:
    """Axes of the mesh along which the devices of a `jax.shard_map` may hold different values."""
    kind: Any = jax.typeof(array)
    # Versions of JAX differ in where they keep this.
    axes: frozenset[str] = kind.mat.varying if hasattr(kind, "mat") else kind.vma
    return axes


def _equally_varying(arrays: _Arrays, beside: _Arrays | None = None) -> _Arrays:
    """The same arrays; each may differ between devices wherever any of them, or of those `beside` them, does.

    JAX sums the gradient of what is the same everywhere, such as a weight, over the devices. It cannot know that the
    results of a callback differ, nor that those of backward are still to be summed.
    """
    tracers = [array for array in (arrays | (beside or {})).values() if isinstance(array, jax.core.Tracer)]
    axes = frozenset[str]().union(*map(_varying_axes, tracers))
    if not axes:
        return arrays
    return {
        name: None if array is None else jax.lax.pcast(array, tuple(axes - _varying_axes(array)), to="varying")
        for name, array in arrays.items()
    }


def _result(shape: tuple[int, ...], dtype: np.dtype[Any]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[no-untyped-call]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(operation: _Operation, arrays: _Arrays) -> jax.Array:
    results = {"output": _result(operation.output_shape, arrays["input"].dtype)}
    return _call(_Callback(operation), results, arrays)["output"]


def _forward(operation: _Operation, primals: _Arrays) -> tuple[jax.Array, tuple[_Arrays, dict[str, None]]]:
    arrays = {name: None if primal is None else primal.value for name, primal in primals.items()}
    perturbed = {name for name, primal in primals.items() if primal is not None and primal.perturbed}
    # The keys of a dictionary are structure, not values: backward knows them while it is traced.
    needs = dict.fromkeys(sorted(perturbed - {"rois"}))
    return _differentiable(operation, arrays), (arrays, needs)


def _backward(
    operation: _Operation, residuals: tuple[_Arrays, dict[str, None]], grad_out: jax.Array | SymbolicZero
) -> tuple[_Arrays]:
    arrays, needs = residuals
    gradients: _Arrays = {}
    if needs and not isinstance(grad_out, SymbolicZero):
        results = {name: _result(arrays[name].shape, arrays[name].dtype) for name in needs}
        arguments = {"grad_out": grad_out, **{name: array for name, array in arrays.items() if name != "bias"}}
        gradients = _call(_Callback(operation, frozenset(needs)), results, arguments)
    return ({name: gradients.get(name) for name in arrays},)


_differentiable.defvjp(_forward, _backward, symbolic_zeros=True)

# Compiled for eager calls too: interpreting a function with its own derivative takes JAX far longer.
_operate: Callable[[_Operation, _Arrays], jax.Array] = jax.jit(_differentiable, static_argnums=0)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _call(callback: _Callback, results: _Arrays, arguments: _Arrays) -> dict[str, jax.Array]:
    computed = buffer_callback(callback, results, vmap_method="sequential")(arguments)
    return _equally_varying(computed, beside=arguments)


@_call.defjvp
def _no_derivative(callback: _Callback, *_: object) -> NoReturn:
    raise NotImplementedError(
        f"{callback.operation.name} must be differentiated once, in reverse mode, got a second derivative; "
        f"dcnops.adapters.torch has second derivatives"
    )


@dataclass(frozen=True)
class _Callback:
    """One direction of an operation, called by XLA."""

    operation: _Operation
    needs: frozenset[str] | None = None
    """The gradients to compute; None for the forward pass."""

    def __call__(
        self, context: ExecutionContext, results: dict[str, Buffer], arguments: dict[str, Buffer | None]
    ) -> None:
        device_type, device = results[next(iter(results))].__dlpack_device__()
        if device_type == _DLPACK_CPU:
            self._compute(np, np.asarray, results, arguments)
            return
        try:
            import cupy
        except ImportError as error:
            raise DeviceError(
                "JAX arrays on a GPU must be computed by CuPy, got no CuPy; "
                "pip install 'dcnops[cuda13]' (or 'dcnops[cuda12]' for a driver of CUDA 12)"
            ) from error
        with cupy.cuda.Device(device), cupy.cuda.Stream.from_external(CudaStream(context.stream)):
            self._compute(cupy, cupy.from_dlpack, results, arguments)

    def _compute(
        self,
        library: ModuleType,
        view: Callable[[Buffer], Any],
        results: dict[str, Buffer],
        arguments: dict[str, Buffer | None],
    ) -> None:
        backend = load_backend(library.__name__)
        operation, order = self.operation, self.operation.layout
        images = {"output", "grad_out", *operation.images}
        arrays = {name: None if buffer is None else view(buffer) for name, buffer in arguments.items()}
        arrays = {name: order.to_nchw(array) if name in images else array for name, array in arrays.items()}
        options = dict(operation.options)
        if self.needs is None:
            computed = {"output": getattr(backend, operation.name)(operation.geometry, **arrays, **options)}
        else:
            backward = getattr(backend, f"{operation.name}_backward")
            computed = backward(operation.geometry, **arrays, needs=self.needs, deterministic=False, **options)
        for name, array in computed.items():
            if name in images:
                array = order.from_nchw(array, backend.contiguous)
            library.copyto(view(results[name]), array)
