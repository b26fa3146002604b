"""The operations on JAX arrays: deformable convolution, RoI pooling, multi-scale attention and aggregation.

XLA calls back into the array functions with its own buffers, without copying them. On the CPU the buffers become NumPy
arrays; on a GPU they become CuPy arrays (through DLPack) on XLA's stream. Eager calls and compiled programs take the
same path. Only the result is copied, once, from the array that the array functions return into XLA's output buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, NoReturn, TypeAlias

import numpy as np

from dcnops._arguments import Padding, Pair, Points, SpatialShapes, check_layout, check_precision
from dcnops._attention_shapes import DeformAggregateGeometry, MSDeformAttnGeometry
from dcnops._dispatch import check_arrays, load_backend
from dcnops._dtypes import DTYPES
from dcnops._errors import ArgumentError, DeviceError, DtypeError
from dcnops._layout import NCHW, Layout
from dcnops._shapes import DeformConvGeometry, DeformRoIPoolGeometry

from . import name_extra
from .cuda_stream import CudaStream

with name_extra("jax", "jax", "jax.experimental.buffer_callback"):  # JAX is missing or too old
    import jax
    from jax.custom_derivatives import SymbolicZero
    from jax.experimental.buffer_callback import Buffer, ExecutionContext, buffer_callback

Array: TypeAlias = "jax.Array | np.ndarray[Any, Any]"
_Arrays: TypeAlias = dict[str, Any]
"""Arrays or tracers by argument name; None for an optional argument that is not given."""

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
    """Compute a deformable convolution of JAX arrays, modulated (v2) if `mask` is given.

    See `dcnops.deform_conv2d` for the parameters, the formula and the errors. Here arrays are JAX or NumPy arrays, and
    `stride`, `padding` and `dilation` must be Python integers under `jax.jit` too, because shapes depend on them.

    Raises
    ------
    DtypeError
        An argument is not a JAX or NumPy array, or has the wrong dtype.
    NotImplementedError
        A second derivative is taken.

    Notes
    -----
    The function works eagerly and under `jax.jit`, `jax.grad` and `jax.vmap`, on the CPU and on NVIDIA GPUs. Errors
    are raised while the call is traced. `jax.vmap` calls the operation once per element of the mapped axis; a larger N
    is faster. Only first-order reverse-mode derivatives are supported; gradients that are not needed are skipped.
    ``jax.default_matmul_precision`` has no influence on `precision`.

    On a GPU, CuPy does the work. It needs memory outside of the pool that JAX reserves at startup
    (``XLA_PYTHON_CLIENT_MEM_FRACTION``). Wrap a computation that is sharded over devices in `jax.shard_map`:
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
    _check_static(stride=stride, padding=padding, dilation=dilation)
    optional = ("bias", "mask")
    data = _check_jax_arrays({"input": input, "weight": weight, "bias": bias}, optional)
    sampling = _check_jax_arrays({"offset": offset, "mask": mask}, optional)
    check_arrays(_empty_arrays(data), _empty_arrays(sampling), optional=optional)
    arrays = data | sampling
    geometry = DeformConvGeometry.of(**arrays, stride=stride, padding=padding, dilation=dilation, layout=order)
    options = (("precision", precision),)
    signature = _Signature("deform_conv2d", geometry, order, ("input", "offset", "mask"), options)
    return _run_compiled(signature, _unify_varying_axes(arrays))


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
    """Compute deformable RoI pooling, modulated (v2) if `mask` is given, or RoIAlign without `offset` and `mask`.

    See `dcnops.deform_roi_pool` for the parameters, the formula and the errors. Here arrays are JAX or NumPy arrays,
    and the keyword arguments must be Python numbers under `jax.jit` too. The gradient of `rois` is 0.

    Raises
    ------
    DtypeError
        An argument is not a JAX or NumPy array, or has the wrong dtype.
    NotImplementedError
        A second derivative is taken.

    Notes
    -----
    The notes of `deform_conv2d` apply. An index in `rois` without a feature map is detected only when the operation
    runs: on the CPU, JAX raises its own exception with the message of the `ArgumentError`; on a GPU the result is NaN.

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
    numbers: dict[str, Any] = {
        "output_size": output_size,
        "spatial_scale": spatial_scale,
        "sampling_ratio": sampling_ratio,
        "gamma": gamma,
    }
    _check_static(**numbers)
    optional = ("offset", "mask")
    data, regions = _check_jax_arrays({"input": input}), _check_jax_arrays({"rois": rois})
    sampling = _check_jax_arrays({"offset": offset, "mask": mask}, optional)
    check_arrays(_empty_arrays(data), _empty_arrays(sampling), _empty_arrays(regions), optional)
    arrays = data | regions | sampling
    geometry = DeformRoIPoolGeometry.of(**arrays, **numbers, layout=order)
    return _run_compiled(_Signature("deform_roi_pool", geometry, order, ("input",)), _unify_varying_axes(arrays))


def ms_deform_attn(
    value: Array,
    spatial_shapes: SpatialShapes,
    sampling_locations: Array,
    attention_weights: Array,
    *,
    points: Points | None = None,
) -> jax.Array:
    """Compute multi-scale deformable attention of JAX arrays.

    See `dcnops.ms_deform_attn` for the parameters, the formula and the errors. Here arrays are JAX or NumPy arrays.
    `spatial_shapes` and `points` must be known under `jax.jit` too: Python integers, or a NumPy array.

    Raises
    ------
    DtypeError
        An argument is not a JAX or NumPy array, or has the wrong dtype.
    NotImplementedError
        A second derivative is taken.

    Notes
    -----
    The notes of `deform_conv2d` apply.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from dcnops.adapters.jax import ms_deform_attn
    >>> value = jnp.arange(6, dtype=jnp.float32).reshape(1, 6, 1, 1)  # a map of 2 x 2 pixels, and one of 1 x 2
    >>> locations = jnp.full((1, 1, 1, 2, 1, 2), 0.5, jnp.float32)  # the centers of both maps
    >>> weights = jnp.array([0.25, 0.75], jnp.float32).reshape(1, 1, 1, 2, 1)
    >>> ms_deform_attn(value, [(2, 2), (1, 2)], locations, weights).item()  # 0.25 * 1.5 + 0.75 * 4.5
    3.75
    """
    _check_static(spatial_shapes=spatial_shapes, points=points)
    data = _check_jax_arrays({"value": value})
    sampling = _check_jax_arrays({"sampling_locations": sampling_locations, "attention_weights": attention_weights})
    check_arrays(_empty_arrays(data), _empty_arrays(sampling))
    arrays = data | sampling
    shapes = np.asarray(spatial_shapes) if isinstance(spatial_shapes, jax.Array) else spatial_shapes
    geometry = MSDeformAttnGeometry.of(**arrays, spatial_shapes=shapes, points=points)
    # The geometry holds the shapes.
    signature = _Signature("ms_deform_attn", geometry, data="value", options=(("spatial_shapes", None),))
    return _run_compiled(signature, _unify_varying_axes(arrays))


def deform_aggregate(
    input: Array,
    offset: Array,
    mask: Array | None = None,
    *,
    groups: int,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
) -> jax.Array:
    """Compute the core of DCNv3, or with one packed array that of DCNv4, on JAX arrays.

    See `dcnops.deform_aggregate` for the parameters, the formula and the errors. Here arrays are JAX or NumPy arrays,
    and the keyword arguments must be Python numbers under `jax.jit` too.

    Raises
    ------
    DtypeError
        An argument is not a JAX or NumPy array, or has the wrong dtype.
    NotImplementedError
        A second derivative is taken.

    Notes
    -----
    The notes of `deform_conv2d` apply.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from dcnops.adapters.jax import deform_aggregate
    >>> image = jnp.arange(16, dtype=jnp.float32).reshape(1, 4, 4, 1)
    >>> offset = jnp.zeros((1, 4, 4, 2), jnp.float32).at[..., 0].set(0.5)  # half a pixel to the right
    >>> deform_aggregate(image, offset, jnp.ones((1, 4, 4, 1)), groups=1, kernel_size=1)[0, 0, :, 0].tolist()
    [0.5, 1.5, 2.5, 1.5]
    """
    numbers: dict[str, Any] = {
        "groups": groups,
        "kernel_size": kernel_size,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "offset_scale": offset_scale,
        "remove_center": remove_center,
    }
    _check_static(**numbers)
    optional = ("mask",)
    data = _check_jax_arrays({"input": input})
    sampling = _check_jax_arrays({"offset": offset, "mask": mask}, optional)
    check_arrays(_empty_arrays(data), _empty_arrays(sampling), optional=optional)
    arrays = data | sampling
    geometry = DeformAggregateGeometry.of(**arrays, **numbers)
    return _run_compiled(_Signature("deform_aggregate", geometry), _unify_varying_axes(arrays))


@dataclass(frozen=True)
class _Signature:
    """Everything about a call except its arrays. JAX compiles equal signatures once."""

    operation: str
    geometry: DeformConvGeometry | DeformRoIPoolGeometry | MSDeformAttnGeometry | DeformAggregateGeometry
    layout: Layout = NCHW
    images: tuple[str, ...] = ()
    """Names of the arrays that have this layout."""
    options: tuple[tuple[str, Any], ...] = ()
    """Keyword arguments of the forward and the backward function."""
    data: str = "input"
    """Name of the array with the dtype of the output."""

    @property
    def output_shape(self) -> tuple[int, ...]:
        shape = self.geometry.output_shape
        return shape if self.layout is NCHW else self.layout.shape(*shape)


def _check_static(**parameters: Any) -> None:
    for name, parameter in parameters.items():
        if any(isinstance(number, jax.core.Tracer) for number in jax.tree.leaves(parameter)):
            raise ArgumentError(
                f"{name} must be known while JAX traces the call, got {parameter!r}; "
                f"list it in static_argnames of jax.jit, or use a constant"
            )


def _check_jax_arrays(arguments: dict[str, Any], optional: Container[str] = ()) -> _Arrays:
    """Return the arguments as JAX or NumPy arrays; raise `DtypeError` for anything else."""
    return {
        name: None if argument is None and name in optional else _check_jax_array(name, argument)
        for name, argument in arguments.items()
    }


def _check_jax_array(name: str, argument: Any) -> Array:
    array = argument
    if not isinstance(argument, jax.Array | np.ndarray) and hasattr(argument, "__jax_array__"):
        # Parameters of neural network libraries wrap an array.
        array = argument.__jax_array__()
    # Random keys are JAX arrays too, but their dtype is not a NumPy dtype. JAX does not accept masked arrays.
    legal = isinstance(array, jax.Array | np.ndarray) and isinstance(array.dtype, np.dtype)
    if legal and not isinstance(array, np.ma.MaskedArray):
        checked: Array = array
        return checked
    kind = type(argument)
    got = f"{kind.__module__}.{kind.__qualname__}" if kind.__module__ != "builtins" else kind.__qualname__
    raise DtypeError(f"{name} must be a JAX or NumPy array of numbers, got {got}; pass jax.numpy.asarray(...) of it")


def _empty_arrays(arrays: _Arrays) -> _Arrays:
    """Return empty NumPy arrays of the dtypes that JAX will see, for the checks of the array functions."""
    return {name: None if array is None else np.empty(0, _jax_dtype(array)) for name, array in arrays.items()}


def _jax_dtype(array: Array) -> np.dtype[Any]:
    # JAX converts float64 of NumPy to float32 unless 64-bit types are enabled.
    if array.dtype.name in DTYPES and array.dtype.isnative:
        return np.dtype(jax.dtypes.canonicalize_dtype(array.dtype))
    return array.dtype


def _varying_axes(array: Any) -> frozenset[str]:
    """Return the mesh axes along which devices in a `jax.shard_map` may hold different values."""
    kind: Any = jax.typeof(array)
    # The attribute moved between versions of JAX.
    axes: frozenset[str] = kind.mat.varying if hasattr(kind, "mat") else kind.vma
    return axes


def _unify_varying_axes(arrays: _Arrays, related: _Arrays | None = None) -> _Arrays:
    """Mark every array as varying along each mesh axis along which any array here or in `related` varies.

    JAX sums the gradient of a value that is equal on all devices, such as a weight, over the devices. It cannot tell
    that the results of a callback differ between devices, nor that gradients from a callback still need that sum.
    """
    tracers = [array for array in (arrays | (related or {})).values() if isinstance(array, jax.core.Tracer)]
    axes = frozenset[str]().union(*map(_varying_axes, tracers))
    if not axes:
        return arrays
    return {
        name: None if array is None else jax.lax.pcast(array, tuple(axes - _varying_axes(array)), to="varying")
        for name, array in arrays.items()
    }


def _shape_struct(shape: tuple[int, ...], dtype: np.dtype[Any]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[no-untyped-call]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run_operation(signature: _Signature, arrays: _Arrays) -> jax.Array:
    results = {"output": _shape_struct(signature.output_shape, arrays[signature.data].dtype)}
    return _call_back(_Callback(signature), results, arrays)["output"]


def _forward(signature: _Signature, primals: _Arrays) -> tuple[jax.Array, tuple[_Arrays, dict[str, None]]]:
    arrays = {name: None if primal is None else primal.value for name, primal in primals.items()}
    perturbed = {name for name, primal in primals.items() if primal is not None and primal.perturbed}
    # Dictionary keys are part of the structure, not values, so the backward pass knows them while it is traced.
    needs = dict.fromkeys(sorted(perturbed - {"rois"}))
    return _run_operation(signature, arrays), (arrays, needs)


def _backward(
    signature: _Signature, residuals: tuple[_Arrays, dict[str, None]], grad_out: jax.Array | SymbolicZero
) -> tuple[_Arrays]:
    arrays, needs = residuals
    gradients: _Arrays = {}
    if needs and not isinstance(grad_out, SymbolicZero):
        results = {name: _shape_struct(arrays[name].shape, arrays[name].dtype) for name in needs}
        arguments = {"grad_out": grad_out, **{name: array for name, array in arrays.items() if name != "bias"}}
        gradients = _call_back(_Callback(signature, frozenset(needs)), results, arguments)
    return ({name: gradients.get(name) for name in arrays},)


_run_operation.defvjp(_forward, _backward, symbolic_zeros=True)

# Eager calls use the compiled function too: JAX takes far longer to interpret a function with a custom derivative.
_run_compiled: Callable[[_Signature, _Arrays], jax.Array] = jax.jit(_run_operation, static_argnums=0)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _call_back(callback: _Callback, results: _Arrays, arguments: _Arrays) -> dict[str, jax.Array]:
    computed = buffer_callback(callback, results, vmap_method="sequential")(arguments)
    return _unify_varying_axes(computed, related=arguments)


@_call_back.defjvp
def _refuse_second_derivative(callback: _Callback, *_: object) -> NoReturn:
    raise NotImplementedError(
        f"{callback.signature.operation} must be differentiated once, in reverse mode, got a second derivative; "
        f"dcnops.adapters.torch has second derivatives"
    )


@dataclass(frozen=True)
class _Callback:
    """Forward or backward pass of an operation, called by XLA."""

    signature: _Signature
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
        signature, order = self.signature, self.signature.layout
        images = {"output", "grad_out", *signature.images}
        arrays = {name: None if buffer is None else view(buffer) for name, buffer in arguments.items()}
        arrays = {name: order.to_nchw(array) if name in images else array for name, array in arrays.items()}
        options = dict(signature.options)
        if self.needs is None:
            forward = getattr(backend, signature.operation)
            computed = {"output": forward(signature.geometry, **arrays, **options)}
        else:
            backward = getattr(backend, f"{signature.operation}_backward")
            computed = backward(signature.geometry, **arrays, needs=self.needs, deterministic=False, **options)
        for name, array in computed.items():
            if name in images:
                array = order.from_nchw(array, backend.contiguous)
            library.copyto(view(results[name]), array)
