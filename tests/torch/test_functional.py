"""The operations on tensors: values, first and second gradients, compilation, dtypes, errors."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.ops
from dcnops.adapters.torch import deform_conv2d, deform_roi_pool
from hypothesis import given, settings
from hypothesis import strategies as st

import dcnops
from dcnops import ArgumentError, DeviceError, DtypeError, ShapeError
from tests.arrays.test_errors import FORWARD_ERRORS, ROI_ERRORS, roi_arguments
from tests.arrays.test_errors import arguments as array_arguments
from tests.cases import (
    Case,
    ConvCase,
    RoIPoolCase,
    assert_close,
    away_from_kinks,
    conv_cases,
    make_conv,
    make_roi_pool,
    roi_pool_cases,
)

OPERATIONS = {"deform_conv2d": deform_conv2d, "deform_roi_pool": deform_roi_pool}
DTYPES = ("float16", "bfloat16", "float32", "float64")


def to_tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def tensors_of(case: Case, requires_grad: bool = False) -> dict[str, Any]:
    arguments = {k: to_tensor(v) if isinstance(v, np.ndarray) else v for k, v in case.arguments().items()}
    for name in case.needs:
        arguments[name].requires_grad_(requires_grad)
    return arguments


def call(case: Case, arguments: dict[str, Any]) -> torch.Tensor:
    return OPERATIONS[case.operation](**arguments)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


@given(case=st.one_of(conv_cases(dtypes=DTYPES), roi_pool_cases(dtypes=DTYPES)))
def test_output_and_gradients_are_those_of_the_arrays(case: Case):
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


@settings(max_examples=30)
@given(case=conv_cases(dtypes=("float64",), symmetric=True), seed=st.integers(0, 2**32 - 1))
def test_gradients_are_torchvisions(case: ConvCase, seed: int):
    case = away_from_kinks(case, seed)
    ours, theirs = tensors_of(case, requires_grad=True), tensors_of(case, requires_grad=True)
    deform_conv2d(**ours).backward(to_tensor(case.grad_out))
    if case.input.shape[0] == 0:
        return  # torchvision's empty batch has no gradients
    torchvision.ops.deform_conv2d(**theirs).backward(to_tensor(case.grad_out))
    for name in case.needs:
        assert_close(to_numpy(ours[name].grad), to_numpy(theirs[name].grad), "float64", name, slack=10)


def differentiable_case(kind: str, **options: Any) -> Case:
    if kind == "conv":
        case = make_conv(N=2, C=2, H=3, W=2, O=2, kernel=(2, 2), G=2, D=2, dtype="float64", **options)
        return away_from_kinks(case, seed=1)
    return make_roi_pool(N=2, C=1, H=5, W=4, R=2, output_size=(2, 1), dtype="float64", gamma=0.3, seed=3, **options)


def as_function(case: Case, names: tuple[str, ...]) -> Any:
    fixed = {name: value for name, value in tensors_of(case).items() if name not in names}
    return lambda *values: call(case, {**fixed, **dict(zip(names, values))})


@pytest.mark.parametrize("mask", [False, True], ids=["plain", "modulated"])
@pytest.mark.parametrize("kind", ["conv", "roi"])
def test_first_and_second_gradients(kind: str, mask: bool):
    case = differentiable_case(kind, mask=mask)
    inputs = [tensors_of(case, requires_grad=True)[name] for name in case.needs]
    function = as_function(case, case.needs)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_second_gradients_of_adaptive_pooling_across_the_border(sampling_ratio: int):
    case = make_roi_pool(
        N=1, C=1, H=4, W=4, R=2, output_size=(2, 1), dtype="float64", sampling_ratio=sampling_ratio, seed=11
    )
    inputs = [tensors_of(case, requires_grad=True)[name] for name in case.needs]
    assert torch.autograd.gradgradcheck(as_function(case, case.needs), inputs)


@settings(max_examples=25)
@given(case=st.one_of(conv_cases(dtypes=("float64",)), roi_pool_cases(dtypes=("float64",))))
def test_the_differentiable_path_computes_the_same(case: Case):
    from dcnops.adapters.torch import differentiable

    arguments = tensors_of(case)
    if isinstance(case, ConvCase):
        names = ("input", "offset", "weight", "bias", "mask", "stride", "padding", "dilation")
    else:
        names = (*case.arrays, *case.parameters)
    output = getattr(differentiable, case.operation)(*(arguments[name] for name in names))
    assert_close(to_numpy(output), case.expected(), "float64", slack=10)


def operator_arguments(case: Case, requires_grad: bool) -> tuple[Any, ...]:
    t = tensors_of(case, requires_grad)
    if isinstance(case, ConvCase):
        return (*(t[n] for n in ("input", "offset", "weight", "bias", "mask")), [1, 1], [1, 1, 1, 1], [1, 1], "ieee")
    return (*(t[n] for n in case.arrays), [2, 1], case.spatial_scale, case.sampling_ratio, case.gamma)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("kind", ["conv", "roi"])
def test_opcheck(kind: str, requires_grad: bool):
    case = differentiable_case(kind)
    arguments = operator_arguments(case, requires_grad)
    namespace = torch.ops.dcnops
    torch.library.opcheck(getattr(namespace, case.operation).default, arguments)
    needs = [True] * len(case.differentiable)
    backward = (torch.from_numpy(case.grad_out), *arguments, needs)
    torch.library.opcheck(getattr(namespace, f"{case.operation}_backward").default, backward)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", ["conv", "roi"])
def test_compile_without_graph_breaks(kind: str, backend: str):
    torch._dynamo.reset()
    case = make_conv(N=2, D=2) if kind == "conv" else make_roi_pool()
    function = torch.compile(lambda **kwargs: call(case, kwargs).relu() * 2, fullgraph=True, backend=backend)
    compiled, eager = tensors_of(case, requires_grad=True), tensors_of(case, requires_grad=True)
    function(**compiled).sum().backward()
    (call(case, eager).relu() * 2).sum().backward()
    for name in case.needs:
        torch.testing.assert_close(compiled[name].grad, eager[name].grad)


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


def test_functorch_gradients_say_that_they_do_not_work():
    case = differentiable_case("conv")
    function = as_function(case, case.needs)
    values = [tensors_of(case)[name] for name in case.needs]
    with pytest.raises(RuntimeError, match=r"use torch\.autograd\.grad or backward"):
        torch.func.grad(lambda *v: function(*v).sum(), argnums=(0, 1, 2))(*values)


@pytest.mark.parametrize("kind", ["conv", "roi"])
def test_forward_mode_says_that_it_does_not_work(kind: str):
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
        function(image)  # without a tangent it is a call like any other


def test_the_differentiable_path_follows_the_nan_policy():
    from dcnops.adapters.torch import differentiable

    case = make_conv(dtype="float64")
    case.offset[0, 8, 2, 2], case.offset[0, 3, 1, 1], case.offset[0, 4, 0, 0] = np.nan, np.inf, -np.inf
    t = tensors_of(case)
    names = ("input", "offset", "weight", "bias", "mask", "stride", "padding", "dilation")
    assert_close(to_numpy(differentiable.deform_conv2d(*(t[n] for n in names))), case.expected(), "float64", slack=10)
    pool = make_roi_pool(R=2, dtype="float64", sampling_ratio=0, inside=True)
    pool.rois[0, 3] = np.nan
    t = tensors_of(pool)
    arguments = (t[name] for name in (*pool.arrays, *pool.parameters))
    assert_close(to_numpy(differentiable.deform_roi_pool(*arguments)), pool.expected(), "float64", slack=10)


def test_the_differentiable_path_reaches_every_pixel_of_a_large_image():
    """Beyond 2**24 pixels, where float32 does not hold every index."""
    from dcnops.adapters.torch import differentiable

    side = 4200
    image = torch.arange(side * side).remainder(251).float().reshape(1, 1, side, side)
    offset = torch.full((1, 2, 1, 1), side - 2.0)
    offset[0, 1] = side - 3.0
    weight = torch.ones(1, 1, 1, 1)
    arguments = (image, offset, weight, None, None, [side, side], 0, 1)
    assert differentiable.deform_conv2d(*arguments).item() == image[0, 0, -2, -3].item()


@pytest.mark.parametrize("name", [n for n, (_, e, _) in FORWARD_ERRORS.items() if e in (ShapeError, ArgumentError)])
def test_wrong_sizes_and_parameters_are_the_errors_of_the_arrays(name: str):
    changes, error, message = FORWARD_ERRORS[name]
    bad = {k: to_tensor(v) if isinstance(v, np.ndarray) else v for k, v in array_arguments(**changes).items()}
    del bad["grad_out"]
    with pytest.raises(error) as raised:
        deform_conv2d(**bad)
    assert message in str(raised.value)


@pytest.mark.parametrize("name", [n for n, (_, e, _) in ROI_ERRORS.items() if e in (ShapeError, ArgumentError)])
def test_wrong_regions_are_the_errors_of_the_arrays(name: str):
    changes, error, message = ROI_ERRORS[name]
    bad = {k: to_tensor(v) if isinstance(v, np.ndarray) else v for k, v in roi_arguments(**changes).items()}
    del bad["grad_out"]
    with pytest.raises(error) as raised:
        deform_roi_pool(**bad)
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


def test_only_needed_gradients_are_computed(monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []
    original = dcnops.deform_conv2d_backward
    monkeypatch.setattr(
        dcnops,
        "deform_conv2d_backward",
        lambda *a, needs, **k: asked.append(list(needs)) or original(*a, needs=needs, **k),
    )
    t = tensors_of(make_conv())
    t["weight"].requires_grad_()
    deform_conv2d(**t).sum().backward()
    assert asked == [["weight"]]


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("kind", ["conv", "roi"])
def test_torchs_switch_selects_the_deterministic_path(kind: str, enabled: bool, monkeypatch: pytest.MonkeyPatch):
    case = make_conv() if kind == "conv" else make_roi_pool()
    name = f"{case.operation}_backward"
    original, chosen = getattr(dcnops, name), []

    def record(*args: Any, deterministic: bool, **kwargs: Any) -> Any:
        chosen.append(deterministic)
        return original(*args, deterministic=deterministic, **kwargs)

    monkeypatch.setattr(dcnops, name, record)
    torch.use_deterministic_algorithms(enabled)
    try:
        call(case, tensors_of(case, requires_grad=True)).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert chosen == [enabled]


@pytest.mark.parametrize("change", ["channels_last", "transposed", "every other", "expanded", "negated view"])
def test_strides_of_tensors_do_not_matter(change: str):
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


def test_channels_last_in_gives_channels_last_out():
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
    with torch.no_grad():
        arguments = (
            x,
            *(t[n].detach() for n in ("offset", "weight", "bias", "mask")),
            [1, 1],
            [1, 1, 1, 1],
            [1, 1],
            "ieee",
        )
    torch.library.opcheck(
        torch.ops.dcnops.deform_conv2d.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_cpu_tensors_are_handed_over_without_a_copy(monkeypatch: pytest.MonkeyPatch):
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


def test_outputs_outlive_their_inputs_and_may_be_changed_in_place():
    t = tensors_of(make_conv(N=2))
    output = deform_conv2d(**t)
    copy = output.clone()
    t.clear()
    torch.testing.assert_close(output, copy)
    output.add_(1)
    torch.testing.assert_close(output, copy + 1)


def bad_arguments(**changes: Any) -> dict[str, Any]:
    return {**tensors_of(make_conv(N=2, D=2, G=2)), **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"offset": torch.zeros(2, 36, 4, 6)}, ShapeError, "offset must be [N=2, 2*D*3*3, oh=5, ow=6], got shape"),
        ({"mask": torch.zeros(2, 9, 5, 6)}, ShapeError, "mask must be [N=2, D*kh*kw=2*3*3, oh=5, ow=6], got"),
        ({"bias": torch.zeros(3)}, ShapeError, "bias must be [O=4], got shape (3,)"),
        ({"stride": 0}, ArgumentError, "stride must be an integer from 1"),
        ({"padding": -1}, ArgumentError, "padding must be an integer from 0"),
        ({"dilation": "x"}, ArgumentError, "dilation must be an integer from 1"),
        ({"input": np.zeros((2, 4, 5, 6), np.float32)}, DtypeError, "input must be a torch.Tensor, got numpy.ndarray"),
        ({"weight": None}, DtypeError, "weight must be a torch.Tensor, got builtins.NoneType"),
        (
            {"mask": torch.zeros(2, 18, 5, 6, dtype=torch.int32)},
            DtypeError,
            "mask must be float16, bfloat16, float32 or",
        ),
        (
            {"offset": torch.zeros(2, 36, 5, 6, device="meta")},
            DeviceError,
            "offset must be on cpu like input, got meta",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error) as raised:
        deform_conv2d(**bad_arguments(**changes))
    assert message in str(raised.value)


def test_bad_regions():
    case = make_roi_pool(N=2, R=3)
    case.rois[1, 0] = 2
    with pytest.raises(ArgumentError, match="rois must hold indices of feature maps from 0 to N-1=1"):
        deform_roi_pool(**tensors_of(case))
    with pytest.raises(DtypeError, match=r"rois must be a torch\.Tensor, got builtins\.list"):
        deform_roi_pool(torch.zeros(1, 1, 2, 2), [[0, 0, 0, 1, 1]], output_size=1)


def test_meta_tensors_give_the_shape():
    t = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in tensors_of(make_conv(N=3)).items()}
    output = deform_conv2d(**t)
    assert (output.device.type, output.shape) == ("meta", (3, 4, 5, 6))


def test_concurrent_threads():
    cases = [make_conv(C=16, O=8, H=20, W=20, seed=seed) for seed in range(8)]
    expected = [deform_conv2d(**tensors_of(case)) for case in cases]
    failures: list[BaseException] = []

    def work(case: Case, output: torch.Tensor) -> None:
        try:
            for _ in range(10):
                torch.testing.assert_close(call(case, tensors_of(case)), output)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(cases, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("case", [make_conv(N=0), make_roi_pool(R=0)], ids=["no images", "no regions"])
def test_empty(case: Case):
    arguments = tensors_of(case, requires_grad=True)
    output = call(case, arguments)
    assert output.numel() == 0
    output.sum().backward()
    assert all((arguments[name].grad == 0).all() for name in case.needs)


def test_regions_need_no_gradient():
    case: RoIPoolCase = make_roi_pool()
    arguments = tensors_of(case, requires_grad=True)
    arguments["rois"].requires_grad_()
    call(case, arguments).sum().backward()
    assert arguments["rois"].grad is None
    assert arguments["offset"].grad is not None
