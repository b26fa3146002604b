"""The JAX adapter gives the results of the array functions: eager, compiled, differentiated, vmapped and sharded."""

from __future__ import annotations

import contextlib
import doctest
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

import dcnops
from dcnops import ArgumentError, DeviceError, DtypeError
from dcnops.adapters import jax as adapter
from dcnops.adapters.jax import deform_aggregate, deform_conv2d, deform_roi_pool, ms_deform_attn
from tests.arrays import test_errors
from tests.cases import (
    DTYPES,
    Case,
    aggregate_cases,
    assert_close,
    attention_cases,
    away_from_kinks,
    conv_cases,
    make_aggregate,
    make_attention,
    make_conv,
    make_roi_pool,
    roi_pool_cases,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _enable_64_bits() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def call(case: Case, **changes: Any) -> jax.Array:
    return getattr(adapter, case.operation)(**{**case.arguments(), **changes})


def loss(case: Case, arrays: dict[str, Any]) -> jax.Array:
    return (call(case, **arrays) * case.grad_out).sum()


def given_arrays(case: Case) -> dict[str, np.ndarray]:
    """Return the arrays that the case has, including regions."""
    return {name: getattr(case, name) for name in case.arrays if getattr(case, name) is not None}


def assert_same(case: Case) -> None:
    """Check that output and gradients equal those of the array functions bit for bit."""
    arrays = given_arrays(case)
    output, pull = jax.vjp(lambda arrays: call(case, **arrays), arrays)
    expected = getattr(dcnops, case.operation)(**case.arguments())
    assert isinstance(output, jax.Array) and output.dtype == expected.dtype
    np.testing.assert_array_equal(output, expected)

    (gradients,) = pull(jnp.asarray(case.grad_out))
    expected_gradients = getattr(dcnops, f"{case.operation}_backward")(case.grad_out, **case.arguments())._asdict()
    for name, array in arrays.items():
        gradient, wanted = gradients[name], expected_gradients.get(name, np.zeros_like(array))
        assert gradient.dtype == array.dtype, name
        np.testing.assert_array_equal(gradient, wanted, err_msg=name)


DRAWS: tuple[Any, ...] = (conv_cases, roi_pool_cases, attention_cases, aggregate_cases)


@settings(settings.get_profile("brief"), max_examples=30)
@given(case=st.one_of(*(draw(dtypes=tuple(DTYPES)) for draw in DRAWS)))
def test_output_and_gradients_equal_the_array_functions(case: Case) -> None:
    assert_same(case)


CASES: dict[str, Case] = {
    "conv": make_conv(N=2, D=2, G=2, stride=(2, 1), padding=((1, 0), (2, 1))),
    "roi pool": make_roi_pool(),
    "attention": make_attention(N=2, points=(2, 3)),
    "aggregate": make_aggregate(N=2, stride=(2, 1), offset_scale=0.7),
}
MAKERS: dict[str, Any] = {
    "deform_conv2d": make_conv,
    "deform_roi_pool": make_roi_pool,
    "ms_deform_attn": make_attention,
    "deform_aggregate": make_aggregate,
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_dtypes(make: Any, dtype: str) -> None:
    assert_same(make(dtype=dtype))
    if dtype in ("float16", "bfloat16"):
        assert_same(make(dtype=dtype, offset_dtype="float32"))


def test_empty_batches_and_absent_arguments() -> None:
    assert_same(make_conv(N=0))
    assert_same(make_roi_pool(R=0))
    assert_same(make_conv(bias=False, mask=False))
    assert_same(make_roi_pool(offset=False, mask=False))
    assert_same(make_attention(Lq=0))
    assert_same(make_aggregate(packed=True))


def test_transformations_give_equal_results(case: Case) -> None:
    arrays = given_arrays(case)
    expected, gradients = jax.value_and_grad(lambda arrays: loss(case, arrays))(arrays)
    transformed = {
        "jit of gradient": jax.jit(jax.value_and_grad(lambda arrays: loss(case, arrays))),
        "gradient of jit": jax.value_and_grad(jax.jit(lambda arrays: loss(case, arrays))),
        "rematerialised": jax.jit(jax.value_and_grad(jax.checkpoint(lambda arrays: loss(case, arrays)))),
    }
    for name, function in transformed.items():
        value, got = function(arrays)
        np.testing.assert_allclose(value, expected, rtol=1e-6, err_msg=name)
        jax.tree.map(np.testing.assert_array_equal, got, gradients)
    np.testing.assert_array_equal(jax.jit(lambda arrays: call(case, **arrays))(arrays), call(case))


DIFFERENTIABLE = (
    away_from_kinks(make_conv(D=2, G=2, dtype="float64"), seed=1),
    make_roi_pool(dtype="float64", inside=True),
    make_attention(dtype="float64"),
    make_aggregate(dtype="float64"),
)


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=CASES)
def test_gradients_are_derivatives(case: Case) -> None:
    arrays = {name: getattr(case, name) for name in case.needs}
    check_grads(jax.jit(lambda arrays: call(case, **arrays)), (arrays,), order=1, modes=["rev"])


def test_gradient_descent_in_a_scan() -> None:
    case = make_conv(C=4, O=4, dtype="float64")

    def two(offset: jax.Array) -> jax.Array:
        hidden = jnp.tanh(call(case, offset=offset))
        return (call(case, input=hidden, offset=offset) ** 2).mean()

    def step(offset: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        value, gradient = jax.value_and_grad(two)(offset)
        return offset - 0.1 * gradient, value

    _, losses = jax.jit(lambda offset: jax.lax.scan(step, offset, None, length=10))(case.offset)
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("batched", [("input", "offset", "mask"), ("weight",), ("bias", "offset")])
def test_vmap(batched: tuple[str, ...]) -> None:
    cases = [make_conv(seed=seed) for seed in range(3)]
    first = given_arrays(cases[0])
    stacked = {name: np.stack([getattr(case, name) for case in cases]) for name in batched}
    axes = {name: 0 if name in batched else None for name in first}

    def one(arrays: dict[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
        return jax.value_and_grad(lambda arrays: loss(cases[0], arrays))(arrays)

    values, gradients = jax.jit(jax.vmap(one, in_axes=(axes,)))(first | stacked)
    for i in range(3):
        value, wanted = one(first | {name: array[i] for name, array in stacked.items()})
        np.testing.assert_allclose(values[i], value, rtol=1e-6)
        jax.tree.map(lambda got, expected, i=i: np.testing.assert_array_equal(got[i], expected), gradients, wanted)


@pytest.mark.slow
def test_vmap_of_vmap_and_of_regions() -> None:
    case = make_roi_pool()
    inputs = np.stack([case.input, 2 * case.input, case.input, -case.input]).reshape(2, 2, *case.input.shape)
    pooled = jax.vmap(jax.vmap(lambda input: call(case, input=input)))(inputs)
    np.testing.assert_allclose(pooled[1, 1], -call(case), rtol=1e-5, atol=1e-6)
    rois = np.stack([case.rois, case.rois[::-1]])
    pooled = jax.vmap(lambda rois: call(case, rois=rois))(rois)
    np.testing.assert_array_equal(pooled[1], call(case, rois=case.rois[::-1]))


@pytest.mark.slow
@pytest.mark.parametrize("make", [make_attention, make_aggregate])
def test_vmap_of_attention_and_aggregation(make: Any) -> None:
    cases = [make(seed=seed) for seed in range(3)]
    stacked = {name: np.stack([getattr(case, name) for case in cases]) for name in cases[0].arrays}
    gradients = jax.jit(jax.vmap(jax.grad(lambda arrays: loss(cases[0], arrays))))(stacked)
    for i, case in enumerate(cases):
        wanted = jax.grad(lambda arrays: loss(cases[0], arrays))(given_arrays(case))
        for name, expected in wanted.items():
            np.testing.assert_array_equal(gradients[name][i], expected)


def test_shapes_of_attention_are_static() -> None:
    case = make_attention()
    for shapes in (
        np.array(case.spatial_shapes),
        jnp.array(case.spatial_shapes),
        [list(pair) for pair in case.spatial_shapes],
    ):
        np.testing.assert_array_equal(call(case, spatial_shapes=shapes), call(case))
    with pytest.raises(ArgumentError, match="spatial_shapes must be known while JAX traces the call"):
        jax.jit(lambda shapes: call(case, spatial_shapes=shapes))(np.array(case.spatial_shapes))


def spy(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Record the operations that run from now on, with the gradients that they compute."""
    calls: list[tuple[str, Any]] = []
    compute = adapter._Callback._compute

    def recorded(self: Any, *args: Any) -> None:
        calls.append((self.signature.operation, None if self.needs is None else sorted(self.needs)))
        compute(self, *args)

    monkeypatch.setattr(adapter._Callback, "_compute", recorded)
    return calls


@pytest.mark.parametrize("compiled", [False, True])
def test_only_needed_gradients_are_computed(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_conv()
    calls = spy(monkeypatch)
    maybe_jit = jax.jit if compiled else lambda function: function
    jax.block_until_ready(maybe_jit(jax.value_and_grad(lambda x: loss(case, {"offset": x})))(case.offset))
    assert calls == [("deform_conv2d", None), ("deform_conv2d", ["offset"])]

    calls.clear()
    jax.block_until_ready(
        maybe_jit(jax.value_and_grad(lambda x: loss(make_roi_pool(), {"rois": x})))(CASES["roi pool"].rois)
    )
    assert calls == [("deform_roi_pool", None)]


def test_inputs_are_not_copied(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {name: jnp.array(array) for name, array in given_arrays(case).items()}
    seen: dict[str, int] = {}

    def load_backend(library: str) -> Any:
        assert library == "numpy"

        def operation(geometry: Any, **arguments: Any) -> np.ndarray:
            views = {name: view for name, view in arguments.items() if isinstance(view, np.ndarray)}
            seen.update({name: view.ctypes.data for name, view in views.items()})
            # The array functions copy arrays that are not writable.
            assert all(view.flags.writeable and view.flags.aligned for view in views.values())
            return np.zeros(geometry.output_shape, views[case.arrays[0]].dtype)

        return SimpleNamespace(**{case.operation: operation, "contiguous": np.ascontiguousarray})

    monkeypatch.setattr(adapter, "load_backend", load_backend)
    assert not call(case, **arrays).any()
    assert seen == {name: array.unsafe_buffer_pointer() for name, array in arrays.items()}


def test_equal_calls_are_compiled_once() -> None:
    case = make_conv(H=11)
    call(case)
    before = adapter._run_compiled._cache_size()
    call(case)
    call(case.with_arrays(stride=(np.int64(1), 1), padding=[[1, 1], [1, 1]]))
    assert adapter._run_compiled._cache_size() == before


def test_gradient_of_regions_is_zero() -> None:
    case = make_roi_pool()
    assert not jax.grad(lambda rois: loss(case, {"rois": rois}))(case.rois).any()


@pytest.mark.parametrize("take", [jax.grad, jax.jacrev])
def test_second_derivatives_raise_an_error(case: Case, take: Any) -> None:
    name = case.arrays[0]
    gradient = jax.grad(lambda array: loss(case, {name: array}))
    with pytest.raises(NotImplementedError, match="must be differentiated once, in reverse mode, got a second"):
        take(lambda array: gradient(array).sum())(getattr(case, name))


def test_forward_mode_raises_an_error(case: Case) -> None:
    name, array = case.arrays[0], getattr(case, case.arrays[0])
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda array: call(case, **{name: array}), (array,), (array,))


ARRAYS_OF_OTHER_LIBRARIES = {
    *("torch tensor", "torch mask", "JAX array", "list", "masked array", "scalar", "nothing"),
    *("mixed libraries", "mixed devices", "list of boxes", "torch rois", "rois elsewhere"),
    *("locations elsewhere", "mask elsewhere", "integers on a device", "sizes on another device"),
}
ERRORS = {
    f"{operation}: {name}": (getattr(adapter, operation), arguments, *errors[name])
    for operation, (arguments, errors, _) in test_errors.TABLES.items()
    for name in errors
    # The first depends on values, so it is detected when the operation runs; the second is about CuPy arrays.
    if name not in ("image index", "sizes elsewhere")
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_raised_while_tracing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_run_compiled", None)
    operation, make_arguments, changes, error, message = ERRORS[name]
    arguments = make_arguments(**changes)
    del arguments["grad_out"]
    if name.split(": ")[1] in ARRAYS_OF_OTHER_LIBRARIES:
        error, message = DtypeError, " must be a JAX or NumPy array of numbers, got "
    with pytest.raises(error) as raised:
        operation(**arguments)
    assert message in str(raised.value)


def test_traced_parameters_raise_an_error() -> None:
    case = make_conv()
    with pytest.raises(ArgumentError, match=r"stride must be known while JAX traces the call, got .*static_argnames"):
        jax.jit(lambda stride: call(case, stride=(stride, 1)))(1)
    with pytest.raises(ArgumentError, match="gamma must be known while JAX traces the call, got "):
        jax.jit(lambda gamma: call(make_roi_pool(), gamma=gamma))(0.1)
    compiled = jax.jit(deform_conv2d, static_argnames=("stride", "padding", "dilation"))
    np.testing.assert_array_equal(compiled(**case.arguments()), call(case))


def test_random_keys_raise_an_error() -> None:
    with pytest.raises(DtypeError, match="input must be a JAX or NumPy array of numbers, got "):
        call(make_conv(), input=jax.random.key(0))


def test_64_bit_numpy_arrays_are_converted_like_jax_does() -> None:
    case = make_conv(dtype="float64")
    with jax.enable_x64(False):
        output = call(case)
        assert output.dtype == jnp.float32
        with pytest.raises(DtypeError, match="input must be float16, bfloat16, float32 or float64, got int64"):
            call(case, input=np.zeros(case.input.shape, np.int64))
    np.testing.assert_allclose(output, call(case), atol=1e-4)


def test_parameters_of_neural_network_libraries() -> None:
    class Parameter:
        def __init__(self, value: np.ndarray) -> None:
            self.value = jnp.asarray(value)

        def __jax_array__(self) -> jax.Array:
            return self.value

    case = make_conv()
    np.testing.assert_array_equal(call(case, weight=Parameter(case.weight), bias=Parameter(case.bias)), call(case))


def test_regions_of_missing_feature_maps_raise_an_error() -> None:
    case = make_roi_pool(N=2)
    rois = case.rois.copy()
    rois[3, 0] = 2
    # The class depends on whether JAX has compiled the call before.
    errors = (jax.errors.JaxRuntimeError, ValueError)
    with pytest.raises(errors, match=r"ArgumentError: rois must hold indices .* got 2\.0 in row 3"):
        call(case, rois=rois).block_until_ready()
    assert np.isfinite(call(case)).all()


def run_python(code: str, **environment: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_no_deadlock_on_few_cores() -> None:
    """Many concurrent computations from several threads, with arrays that XLA does not copy."""
    run_python("""
import threading
import jax, jax.numpy as jnp
from dcnops.adapters.jax import deform_conv2d

image, offset = jnp.ones((1, 32, 64, 64)), jnp.full((1, 18, 64, 64), 0.3)
weight = jnp.full((32, 32, 3, 3), 0.01)

def loss(image):
    # Two independent branches: XLA may run both callbacks concurrently.
    return sum((deform_conv2d(image * s, offset, weight, padding=1) ** 2).mean() for s in (1, 2))

step = jax.jit(jax.value_and_grad(loss))

def work():
    x = image
    for _ in range(20):
        value, gradient = step(x)
        x = x - gradient + deform_conv2d(x, offset, weight, padding=1) * 1e-3
    x.block_until_ready()

threads = [threading.Thread(target=work) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
""")


@pytest.mark.slow
def test_several_devices() -> None:
    """Sharded arrays, `shard_map` without communication, and an error for arrays on different devices."""
    run_python(
        """
import jax, numpy as np
from functools import partial
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from dcnops.adapters.jax import deform_conv2d
from tests.cases import make_conv

case = make_conv(N=4)
expected = np.asarray(deform_conv2d(**case.arguments()))
mesh = Mesh(np.array(jax.devices()), ("n",))
put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
batch = [put(x, P("n")) for x in (case.input, case.offset, case.mask)]
rest = [put(x, P()) for x in (case.weight, case.bias)]

def conv(input, offset, mask, weight, bias):
    return deform_conv2d(input, offset, weight, bias, padding=1, mask=mask)

def grad(*arrays):
    return jax.grad(lambda weight: (conv(*arrays[:3], weight, arrays[4]) ** 2).sum())(arrays[3])

wanted = grad(*(np.asarray(x) for x in (*batch, *rest)))
np.testing.assert_array_equal(jax.jit(conv)(*batch, *rest), expected)
np.testing.assert_allclose(jax.jit(grad)(*batch, *rest), wanted, rtol=1e-4, atol=1e-4)

sharded = jax.jit(jax.shard_map(conv, mesh=mesh, in_specs=(P("n"),) * 3 + (P(),) * 2, out_specs=P("n")))
np.testing.assert_array_equal(sharded(*batch, *rest), expected)
assert "all-gather" not in sharded.lower(*batch, *rest).compile().as_text()
loss = lambda *arrays: (sharded(*arrays) ** 2).sum()
np.testing.assert_allclose(jax.grad(loss, 3)(*batch, *rest), wanted, rtol=1e-4, atol=1e-4)

try:
    input, offset = (jax.device_put(x, device) for x, device in zip((case.input, case.offset), jax.devices()))
    deform_conv2d(input, offset, case.weight, padding=1)
except ValueError as error:
    assert "incompatible devices" in str(error), error
else:
    raise AssertionError("arrays on different devices must be an error")
""",
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )


@pytest.mark.slow
def test_array_functions_do_not_import_jax() -> None:
    run_python("""
import sys, numpy as np, dcnops, dcnops.adapters
x = np.ones((1, 1, 3, 3), np.float32)
dcnops.deform_conv2d(x, np.zeros((1, 2, 3, 3), np.float32), np.ones((1, 1, 1, 1), np.float32))
assert not {"jax", "jaxlib", "torch", "cupy"} & set(sys.modules)
""")


@pytest.mark.slow
def test_importing_the_adapter_imports_no_backend() -> None:
    run_python("import sys, dcnops.adapters.jax; assert not {'numba', 'torch', 'cupy'} & set(sys.modules)")


class FakeGpu:
    """The parts of CuPy that the adapter uses, and XLA's GPU buffers, in NumPy's memory."""

    def __init__(self) -> None:
        self.entered: list[str] = []
        self.cuda = SimpleNamespace(
            Device=lambda device: self._recorder(f"device {device}"),
            Stream=SimpleNamespace(from_external=self._stream),
        )
        self.copyto = np.copyto
        self.__name__ = "cupy"

    @contextlib.contextmanager
    def _recorder(self, name: str) -> Iterator[None]:
        self.entered.append(name)
        yield
        self.entered.remove(name)

    def _stream(self, stream: Any) -> Any:
        return self._recorder(f"stream {stream.__cuda_stream__()[1]} of {self.entered[-1]}")

    def from_dlpack(self, buffer: Any) -> np.ndarray:
        assert self.entered == ["device 1", "stream 1234 of device 1"]
        return buffer.array

    @staticmethod
    def buffer(array: np.ndarray | None) -> Any:
        return None if array is None else SimpleNamespace(array=array, __dlpack_device__=lambda: (2, 1))


def test_execution_context_has_a_stream() -> None:
    from jaxlib._jax import ffi

    assert isinstance(ffi.ExecutionContext.stream, property)


def signature_of(case: Case) -> Any:
    options = {"deform_conv2d": (("precision", None),), "ms_deform_attn": (("spatial_shapes", None),)}
    return adapter._Signature(case.operation, case.geometry(), options=options.get(case.operation, ()))


def test_gpu_callback_uses_the_stream_of_xla(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks the order of steps without a GPU. The test marked `gpu` below runs them."""
    expected = call(case)
    expected_gradients = getattr(dcnops, f"{case.operation}_backward")(case.grad_out, **case.arguments())
    cupy = FakeGpu()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    load_backend = adapter.load_backend
    monkeypatch.setattr(adapter, "load_backend", lambda name: load_backend({"cupy": "numpy"}[name]))
    context = SimpleNamespace(stream=1234)

    output = np.full(case.grad_out.shape, np.nan, np.float32)
    arguments = {name: cupy.buffer(getattr(case, name)) for name in case.arrays}
    adapter._Callback(signature_of(case))(context, {"output": cupy.buffer(output)}, arguments)
    np.testing.assert_array_equal(output, expected)

    gradients = {name: np.full_like(getattr(case, name), np.nan) for name in case.needs}
    arguments = {"grad_out": cupy.buffer(case.grad_out), **arguments}
    arguments.pop("bias", None)
    results = {name: cupy.buffer(array) for name, array in gradients.items()}
    adapter._Callback(signature_of(case), frozenset(case.needs))(context, results, arguments)
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(gradient, getattr(expected_gradients, name), err_msg=name)
    assert cupy.entered == []


def test_missing_cupy_raises_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    case = make_conv()
    results = {"output": FakeGpu.buffer(case.grad_out)}
    with pytest.raises(DeviceError, match=r"must be computed by CuPy, got no CuPy; pip install 'dcnops\[cuda13\]'"):
        adapter._Callback(signature_of(case))(SimpleNamespace(), results, {})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(case: Case, dtype: str) -> None:
    """Needs JAX with CUDA support and CuPy."""
    gpu = jax.devices("gpu")[0]
    case = MAKERS[case.operation](dtype=dtype)
    arrays = {name: jax.device_put(array, gpu) for name, array in given_arrays(case).items()}
    grad_out = jax.device_put(case.grad_out, gpu)
    expected = case.expected()
    wanted = case.expected_gradients()

    def both(arrays: dict[str, Any]) -> Any:
        output, pull = jax.vjp(lambda arrays: call(case, **arrays), arrays)
        return output, pull(grad_out)[0]

    for function in (both, jax.jit(both)):
        for _ in range(3):
            output, gradients = function(arrays)
            assert output.devices() == {gpu}
            assert_close(output, expected, dtype)
            for name in case.needs:
                assert_close(gradients[name], wanted[name], dtype, name, slack=4)


def test_docstring_examples() -> None:
    with jax.enable_x64(False):
        result = doctest.testmod(adapter)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("function", [deform_conv2d, deform_roi_pool, ms_deform_attn, deform_aggregate])
def test_signatures_are_those_of_the_array_functions(function: Any) -> None:
    ours, model = (
        [(parameter.name, parameter.kind, parameter.default) for parameter in inspect.signature(f).parameters.values()]
        for f in (function, getattr(dcnops, function.__name__))
    )
    assert ours == model
