"""Operations on tensors: values, first and second gradients, compilation, dtypes, errors."""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

import dcnops
from dcnops import ArgumentError, DeviceError, DtypeError, ShapeError
from dcnops.adapters.torch import deform_conv2d, deform_roi_pool, differentiable, operators
from tests.arrays.test_errors import TABLES
from tests.cases import (
    DTYPES,
    Case,
    ConvCase,
    aggregate_cases,
    assert_close,
    attention_cases,
    away_from_kinks,
    conv_cases,
    make_conv,
    make_roi_pool,
    roi_pool_cases,
)
from tests.torch.tensors import OPERATIONS, as_tensors, call, tensors_of, to_numpy, to_tensor

DRAWS: tuple[Any, ...] = (conv_cases, roi_pool_cases, attention_cases, aggregate_cases)


@given(case=st.one_of(*(draw(dtypes=tuple(DTYPES)) for draw in DRAWS)))
def test_output_and_gradients_equal_the_array_functions(case: Case):
    arguments = tensors_of(case, requires_grad=True)
    output = call(case, arguments)
    arrays = getattr(dcnops, case.operation)(**case.arguments())
    np.testing.assert_array_equal(to_numpy(output), arrays.astype(np.float64))
    output.backward(to_tensor(case.grad_out))
    expected = getattr(dcnops, f"{case.operation}_backward")(case.grad_out, **case.arguments())
    for name in case.needs:
        gradient = arguments[name].grad
        assert (gradient.dtype, gradient.shape) == (arguments[name].dtype, arguments[name].shape)
        np.testing.assert_array_equal(to_numpy(gradient), getattr(expected, name).astype(np.float64))


def differentiable_case(kind: str, **options: Any) -> Case:
    if kind == "conv":
        case = make_conv(N=2, C=2, H=3, W=2, O=2, kernel=(2, 2), G=2, D=2, dtype="float64", **options)
        return away_from_kinks(case, seed=1)
    return make_roi_pool(N=2, C=1, H=5, W=4, R=2, output_size=(2, 1), dtype="float64", gamma=0.3, seed=3, **options)


def as_function(case: Case, names: tuple[str, ...]) -> Any:
    fixed = {name: value for name, value in tensors_of(case).items() if name not in names}
    return lambda *values: call(case, {**fixed, **dict(zip(names, values))})


# Fast mode compares derivatives along random directions, which involve every entry.
each_check = pytest.mark.parametrize(
    "fast_mode", [True, pytest.param(False, marks=pytest.mark.exhaustive)], ids=["random directions", "every entry"]
)


@pytest.mark.slow
@each_check
@pytest.mark.parametrize("mask", [False, True], ids=["plain", "modulated"])
@pytest.mark.parametrize("kind", ["conv", "roi"])
def test_first_and_second_gradients(kind: str, mask: bool, fast_mode: bool):
    case = differentiable_case(kind, mask=mask)
    inputs = [tensors_of(case, requires_grad=True)[name] for name in case.needs]
    function = as_function(case, case.needs)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=fast_mode)


@pytest.mark.slow
@each_check
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_second_gradients_of_adaptive_pooling_across_the_border(sampling_ratio: int, fast_mode: bool):
    case = make_roi_pool(
        N=1, C=1, H=4, W=4, R=2, output_size=(2, 1), dtype="float64", sampling_ratio=sampling_ratio, seed=11
    )
    inputs = [tensors_of(case, requires_grad=True)[name] for name in case.needs]
    assert torch.autograd.gradgradcheck(as_function(case, case.needs), inputs, fast_mode=fast_mode)


def assert_differentiable_path(case: Case):
    arguments = tensors_of(case)
    ordered = (arguments[name] for name in (*case.arrays, *case.parameters))
    output = getattr(differentiable, case.operation)(*ordered)
    assert_close(to_numpy(output), case.expected(), "float64", slack=10)


@settings(max_examples=25)
@given(case=st.one_of(conv_cases(dtypes=("float64",)), roi_pool_cases(dtypes=("float64",))))
def test_differentiable_path_computes_the_same(case: Case):
    assert_differentiable_path(case)


def test_differentiable_path_follows_the_nan_policy():
    case = make_conv(dtype="float64")
    case.offset[0, 8, 2, 2], case.offset[0, 3, 1, 1], case.offset[0, 4, 0, 0] = np.nan, np.inf, -np.inf
    assert_differentiable_path(case)
    pool = make_roi_pool(R=2, dtype="float64", sampling_ratio=0, inside=True)
    pool.rois[0, 3] = np.nan
    assert_differentiable_path(pool)


def test_differentiable_path_reaches_every_pixel_of_a_large_image():
    """float32 cannot represent every index of an image with more than 2**24 pixels."""
    side = 4200
    image = torch.arange(side * side).remainder(251).float().reshape(1, 1, side, side)
    offset = torch.full((1, 2, 1, 1), side - 2.0)
    offset[0, 1] = side - 3.0
    arguments = (image, offset, torch.ones(1, 1, 1, 1), None, None, [side, side], 0, 1)
    assert differentiable.deform_conv2d(*arguments).item() == image[0, 0, -2, -3].item()


def operator_arguments(case: Case, requires_grad: bool) -> tuple[Any, ...]:
    tensors = [tensors_of(case, requires_grad)[name] for name in case.arrays]
    if isinstance(case, ConvCase):
        return (*tensors, [1, 1], [1, 1, 1, 1], [1, 1], "ieee")
    return (*tensors, [2, 1], case.spatial_scale, case.sampling_ratio, case.gamma)


@pytest.mark.slow
@pytest.mark.parametrize("second", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("kind", ["conv", "roi"])
def test_opcheck(kind: str, second: bool):
    """Check both operators, and the derivatives of the backward operator if `second`, which are slow to trace."""
    case = differentiable_case(kind)
    namespace = torch.ops.dcnops
    torch.library.opcheck(getattr(namespace, case.operation).default, operator_arguments(case, requires_grad=True))
    needs = [True] * len(case.differentiable)
    backward = (torch.from_numpy(case.grad_out), *operator_arguments(case, requires_grad=second), needs)
    torch.library.opcheck(getattr(namespace, f"{case.operation}_backward").default, backward)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("conv", "aot_eager"),
        ("roi", "aot_eager"),
        *(pytest.param(kind, "inductor", marks=pytest.mark.exhaustive) for kind in ("conv", "roi")),
    ],
)
def test_compile_without_graph_breaks(kind: str, backend: str):
    torch._dynamo.reset()
    case = make_conv(N=2, D=2) if kind == "conv" else make_roi_pool()
    function = torch.compile(lambda **kwargs: call(case, kwargs).relu() * 2, fullgraph=True, backend=backend)
    compiled, eager = tensors_of(case, requires_grad=True), tensors_of(case, requires_grad=True)
    function(**compiled).sum().backward()
    (call(case, eager).relu() * 2).sum().backward()
    for name in case.needs:
        torch.testing.assert_close(compiled[name].grad, eager[name].grad)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_with_a_dynamic_batch(backend: str):
    torch._dynamo.reset()
    compilations = []

    def counting(graph: Any, inputs: Any) -> Any:
        compilations.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    function = torch.compile(
        lambda x, o, w, m: deform_conv2d(x, o, w, padding=1, mask=m) + 1, fullgraph=True, dynamic=True, backend=counting
    )
    for N in (2, 5, 7):
        t = tensors_of(make_conv(N=N, bias=False, seed=N))
        actual = function(t["input"], t["offset"], t["weight"], t["mask"])
        torch.testing.assert_close(actual, deform_conv2d(**t) + 1)
    assert len(compilations) == 1


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor, o: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return deform_conv2d(x, o, w, padding=1)

    t = tensors_of(make_conv(bias=False, mask=False))
    arguments = (t["input"], t["offset"], t["weight"])
    program = torch.export.export(Layer(), arguments)
    assert "dcnops.deform_conv2d" in str(program.graph)
    torch.testing.assert_close(program.module()(*arguments), deform_conv2d(*arguments, padding=1))


def test_functorch_gradients_raise_an_error():
    case = differentiable_case("conv")
    function = as_function(case, case.needs)
    values = [tensors_of(case)[name] for name in case.needs]
    with pytest.raises(RuntimeError, match=r"use torch\.autograd\.grad or backward"):
        torch.func.grad(lambda *v: function(*v).sum(), argnums=(0, 1, 2))(*values)


@pytest.mark.parametrize("kind", ["conv", "roi"])
def test_forward_mode_raises_an_error(kind: str):
    case = differentiable_case(kind)
    function = as_function(case, ("input",))
    image = tensors_of(case)["input"]
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(function, (image,), (torch.ones_like(image),))
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jacfwd(function)(image)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(image, torch.ones_like(image))
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            function(dual)
        function(image)  # no tangent, no error


SHAPE_AND_ARGUMENT_ERRORS = {
    f"{operation}: {name}": (operation, arguments, *case)
    for operation, (arguments, cases, _) in TABLES.items()
    for name, case in cases.items()
    if case[1] in (ShapeError, ArgumentError)
}


@pytest.mark.parametrize("name", SHAPE_AND_ARGUMENT_ERRORS)
def test_wrong_sizes_and_parameters_raise_the_errors_of_the_array_functions(name: str):
    operation, arguments, changes, error, message = SHAPE_AND_ARGUMENT_ERRORS[name]
    arrays = arguments(**changes)
    on_the_host = {name: arrays[name] for name in ("spatial_shapes",) if name in arrays}
    bad = as_tensors(arrays) | on_the_host
    del bad["grad_out"]
    with pytest.raises(error) as raised:
        OPERATIONS[operation](**bad)
    assert message in str(raised.value)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind", ["conv", "roi"])
@pytest.mark.parametrize("batched", ["everything", "input only"])
def test_vmap(kind: str, batched: str):
    cases = [make_conv(seed=s) if kind == "conv" else make_roi_pool(seed=s) for s in range(3)]
    names = cases[0].arrays if batched == "everything" else ("input",)
    fixed = {k: v for k, v in tensors_of(cases[0]).items() if k not in names}
    stacked = [torch.stack([tensors_of(case)[name] for case in cases]) for name in names]
    mapped = torch.vmap(lambda *values: call(cases[0], {**fixed, **dict(zip(names, values))}))(*stacked)
    one_by_one = [call(case, {**fixed, **{n: tensors_of(case)[n] for n in names}}) for case in cases]
    torch.testing.assert_close(mapped, torch.stack(one_by_one))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["conv", "roi"])
def test_autocast(kind: str, dtype: torch.dtype):
    case = make_conv() if kind == "conv" else make_roi_pool()
    arguments = tensors_of(case, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        output = call(case, arguments)
    assert output.dtype == dtype
    low = {
        name: value.to(dtype) if name in ("input", "weight", "bias") and value is not None else value
        for name, value in tensors_of(case).items()
    }
    torch.testing.assert_close(output, call(case, low))
    output.float().sum().backward()
    assert all(arguments[name].grad.dtype == torch.float32 for name in case.needs)


def test_autocast_keeps_float64():
    case = make_conv(dtype="float64")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert deform_conv2d(**tensors_of(case)).dtype == torch.float64


@pytest.mark.parametrize("case", [make_conv(), make_roi_pool()], ids=["conv", "roi"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_autocast_converts_floating_point_only(case: Case, dtype: torch.dtype):
    tensors = tensors_of(case)
    for name in (name for name, value in tensors.items() if isinstance(value, torch.Tensor)):
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(DtypeError, match=f"{name} must be float16"):
            call(case, {**tensors, name: tensors[name].to(dtype)})


@pytest.mark.parametrize(
    ("input", "weight", "offset", "mask", "output"),
    [
        ("float32", "float32", "float64", "float16", "float32"),
        ("float16", "float32", "float16", "float16", "float32"),
        ("float16", "bfloat16", "float32", "float32", "float32"),
        ("float16", "float16", "float32", "float16", "float16"),
        ("bfloat16", "bfloat16", "bfloat16", "bfloat16", "bfloat16"),
        ("float32", "float64", "float32", "float32", "float64"),
    ],
)
def test_mixed_dtypes_are_promoted(input: str, weight: str, offset: str, mask: str, output: str):
    t = tensors_of(make_conv(bias=False))
    types = {"input": input, "weight": weight, "offset": offset, "mask": mask}
    mixed = {**t, **{name: t[name].to(getattr(torch, dtype)) for name, dtype in types.items()}}
    for name in types:
        mixed[name].requires_grad_()
    result = deform_conv2d(**mixed)
    assert result.dtype == getattr(torch, output)
    result.sum().backward()
    for name, dtype in types.items():
        assert mixed[name].grad.dtype == getattr(torch, dtype)


def record_backward(operation: str, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Record the keyword arguments of the backward function from now on."""
    calls: list[dict[str, Any]] = []
    original = getattr(dcnops, f"{operation}_backward")

    def record(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(dcnops, f"{operation}_backward", record)
    return calls


def test_only_needed_gradients_are_computed(monkeypatch: pytest.MonkeyPatch):
    calls = record_backward("deform_conv2d", monkeypatch)
    case = differentiable_case("conv")
    arguments = operator_arguments(case, requires_grad=False)
    arguments[2].requires_grad_()
    torch.ops.dcnops.deform_conv2d(*arguments).sum().backward()
    assert [call["needs"] for call in calls] == [["weight"]]


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("kind", ["conv", "roi"])
def test_deterministic_switch_of_torch(kind: str, enabled: bool, monkeypatch: pytest.MonkeyPatch):
    case = differentiable_case(kind)
    calls = record_backward(case.operation, monkeypatch)
    torch.use_deterministic_algorithms(enabled)
    try:
        getattr(torch.ops.dcnops, case.operation)(*operator_arguments(case, requires_grad=True)).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert [call["deterministic"] for call in calls] == [enabled]


@pytest.mark.parametrize("change", ["channels_last", "transposed", "every other", "expanded", "negated view"])
def test_tensors_with_any_strides(change: str):
    t = tensors_of(make_conv(N=2, C=4, H=6, W=6))
    x = t["input"]
    changed = {
        "channels_last": lambda: x.to(memory_format=torch.channels_last),
        "transposed": lambda: x.transpose(2, 3).contiguous().transpose(2, 3),
        "every other": lambda: x.repeat_interleave(2, 3)[..., ::2],
        "expanded": lambda: x[:1].expand(2, -1, -1, -1),
        "negated view": lambda: torch.imag(torch.conj(torch.complex(torch.zeros_like(x), -x))),
    }[change]()
    plain = x[:1].repeat(2, 1, 1, 1) if change == "expanded" else x
    torch.testing.assert_close(deform_conv2d(**{**t, "input": changed}), deform_conv2d(**{**t, "input": plain}))


def test_output_and_gradient_keep_channels_last():
    case = make_conv(N=2, C=4, O=3, H=6, W=5)
    t = tensors_of(case, requires_grad=True)
    plain = deform_conv2d(**t)
    x = t["input"].detach().to(memory_format=torch.channels_last).requires_grad_()
    output = deform_conv2d(**{**t, "input": x})
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, plain)
    output.backward(to_tensor(case.grad_out))
    plain.backward(to_tensor(case.grad_out))
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x.grad, t["input"].grad)
    arguments = (x.detach(), *operator_arguments(case, requires_grad=False)[1:])
    torch.library.opcheck(
        torch.ops.dcnops.deform_conv2d.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_cpu_tensors_are_not_copied(monkeypatch: pytest.MonkeyPatch):
    from dcnops._backends.cpu import backend as cpu

    case = make_conv()
    t = tensors_of(case)
    seen: list[Any] = []
    original = cpu.deform_conv2d

    def record(geometry: Any, *arrays: Any) -> Any:
        output = original(geometry, *arrays)
        seen.extend([*arrays[:5], output])
        return output

    monkeypatch.setattr(cpu, "deform_conv2d", record)
    output = deform_conv2d(**t)
    tensors = [t[name] for name in ("input", "offset", "weight", "bias", "mask")]
    assert [array.ctypes.data for array in seen] == [tensor.data_ptr() for tensor in (*tensors, output)]


def test_outputs_outlive_their_inputs_and_can_be_changed_in_place():
    t = tensors_of(make_conv(N=2))
    output = deform_conv2d(**t)
    copy = output.clone()
    t.clear()
    torch.testing.assert_close(output, copy)
    output.add_(1)
    torch.testing.assert_close(output, copy + 1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input": np.zeros((2, 4, 5, 6), np.float32)}, DtypeError, "input must be a torch.Tensor, got numpy.ndarray"),
        ({"weight": None}, DtypeError, "weight must be a torch.Tensor, got builtins.NoneType"),
        ({"mask": torch.zeros(2, 18, 5, 6).int()}, DtypeError, "mask must be float16, bfloat16, float32 or float64"),
        ({"offset": torch.zeros(2, 36, 5, 6).to("meta")}, DeviceError, "offset must be on cpu like input, got meta"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_wrong_types_dtypes_and_devices(changes: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error) as raised:
        deform_conv2d(**{**tensors_of(make_conv(N=2, D=2, G=2)), **changes})
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "changes",
    [{"offset": torch.zeros(1, 18, 4, 4)}, {"offset": torch.zeros(1, 18, 3, 3).int()}, {"padding": -1}],
    ids=lambda changes: ",".join(changes),
)
def test_wrong_arguments_raise_the_type_of_error_that_torchvision_raises(changes: dict[str, Any]):
    shapes = {"input": (1, 4, 5, 5), "offset": (1, 18, 3, 3), "weight": (4, 4, 3, 3)}
    arguments = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for function in (torchvision.ops.deform_conv2d, deform_conv2d):
        with pytest.raises(RuntimeError):
            function(**{**arguments, **changes})


def test_regions_that_are_not_a_tensor():
    with pytest.raises(DtypeError, match=r"rois must be a torch\.Tensor, got builtins\.list"):
        deform_roi_pool(torch.zeros(1, 1, 2, 2), [[0, 0, 0, 1, 1]], output_size=1)


def test_operators_can_be_imported_again():
    importlib.reload(operators)
    case = differentiable_case("conv")
    output = torch.ops.dcnops.deform_conv2d(*operator_arguments(case, requires_grad=True))
    torch.testing.assert_close(output, deform_conv2d(**tensors_of(case)))
    output.sum().backward()
    meta = [value.to("meta") if isinstance(value, torch.Tensor) else value for value in operator_arguments(case, False)]
    assert torch.ops.dcnops.deform_conv2d(*meta).shape == output.shape


def test_meta_tensors_give_the_shape():
    t = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in tensors_of(make_conv(N=3)).items()}
    output = deform_conv2d(**t)
    assert (output.device.type, output.shape) == ("meta", (3, 4, 5, 6))


def test_concurrent_threads():
    cases = [make_conv(C=16, O=8, H=20, W=20, seed=seed) for seed in range(8)]
    expected = [deform_conv2d(**tensors_of(case)) for case in cases]

    def work(case: Case, output: torch.Tensor) -> None:
        for _ in range(10):
            torch.testing.assert_close(call(case, tensors_of(case)), output)

    with ThreadPoolExecutor(len(cases)) as pool:
        list(pool.map(work, cases, expected))


@pytest.mark.parametrize("case", [make_conv(N=0), make_roi_pool(R=0)], ids=["no images", "no regions"])
def test_empty(case: Case):
    arguments = tensors_of(case, requires_grad=True)
    output = call(case, arguments)
    assert output.numel() == 0
    output.sum().backward()
    assert all((arguments[name].grad == 0).all() for name in case.needs)


def test_regions_have_no_gradient():
    case = make_roi_pool()
    arguments = tensors_of(case, requires_grad=True)
    arguments["rois"].requires_grad_()
    call(case, arguments).sum().backward()
    assert arguments["rois"].grad is None
    assert arguments["offset"].grad is not None
