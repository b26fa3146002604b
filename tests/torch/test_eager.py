"""Eager calls past the dispatcher: results, the cases that take the operator instead, and what a call costs the CPU.

The programs of the CUDA backend run under emulation, on CPU tensors that the adapter takes for tensors on a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dcnops._backends.cuda import cupy_programs
from dcnops._backends.cuda.programs import ProgramCache
from dcnops.adapters.torch import cuda_calls, deform_conv2d, devices, eager
from tests.cases import ConvCase, assert_close, conv_cases, make_conv
from tests.cuda.emulator import host_engine
from tests.cuda.emulator.host_engine import prepare_program
from tests.torch.tensors import tensors_of

OPERATOR = "dcnops.deform_conv2d.default"
NAMES = ("input", "offset", "weight", "bias", "mask")


@pytest.fixture(autouse=True)
def emulated_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take CPU tensors for tensors on the current GPU, and emulate its kernels."""
    programs = ProgramCache(host_engine(), prepare_program)
    monkeypatch.setattr(devices, "recorded_programs", lambda: programs)
    monkeypatch.setattr(devices, "is_on_current_gpu", lambda tensor: True)
    monkeypatch.setattr(devices, "current_stream", lambda index: 0)
    monkeypatch.setattr(cuda_calls, "CALLS", type(cuda_calls.CALLS)())
    monkeypatch.setattr(eager, "CALLS", cuda_calls.CALLS)
    yield


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the passes that were replayed, in order."""
    names: list[str] = []
    for name in ("forward", "backward"):
        method = getattr(cuda_calls.ConvCall, name)

        def call(self: Any, *arguments: Any, name: str = name, method: Callable[..., Any] = method) -> Any:
            names.append(name)
            return method(self, *arguments)

        monkeypatch.setattr(cuda_calls.ConvCall, name, call)
    return names


def arguments_of(case: ConvCase, requires_grad: bool = True) -> dict[str, Any]:
    """Tensors of torch's own, in the memory order of the case."""
    tensors = {
        name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in tensors_of(case).items()
    }
    for name in case.needs:
        tensors[name].requires_grad_(requires_grad)
    return tensors


def results(arguments: dict[str, Any]) -> list[Tensor]:
    """The output and the gradients of all tensors."""
    output = deform_conv2d(**arguments)
    leaves = [value for value in arguments.values() if isinstance(value, Tensor)]
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    return [output, *torch.autograd.grad(output, leaves, weights)]


@given(case=conv_cases(dtypes=("float16", "bfloat16", "float32", "float64"), max_batch=3))
@settings(settings.get_profile("brief"))
def test_replayed_calls_equal_the_first_one(case: ConvCase):
    arguments = arguments_of(case)
    expected, *others = (results(arguments) for _ in range(3))
    for found in others:
        for tensor, wanted in zip(found, expected, strict=True):
            assert_close(tensor.detach().double().numpy(), wanted.detach().double().numpy(), case.dtype)


def test_from_the_second_call_on_nothing_is_planned(replayed: list[str]):
    arguments = arguments_of(make_conv(C=64, D=2))
    for _ in range(3):
        results(arguments)
    assert replayed == ["forward", "backward"] * 2


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_formats_and_parts_of_a_branch(memory_format: torch.memory_format, replayed: list[str]):
    """The gradient of each argument keeps its memory format, and no part of the branch's output is copied."""
    arguments = arguments_of(make_conv(N=2, C=8, O=8, dtype="float32"))
    branch = torch.cat([arguments["offset"], arguments["mask"]], dim=1).detach()
    branch = branch.contiguous(memory_format=memory_format).requires_grad_()
    arguments["offset"], arguments["mask"] = branch.split([18, 9], dim=1)
    for name in ("input", "weight"):
        arguments[name] = arguments[name].detach().to(memory_format=torch.channels_last).requires_grad_()
    expected, *others = (results(arguments) for _ in range(3))
    assert replayed == ["forward", "backward"] * 2
    for found in others:
        for tensor, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(tensor, wanted)
        assert all(found[i].is_contiguous(memory_format=torch.channels_last) for i in (0, 1, 3))


def test_expanded_offsets_and_masks(replayed: list[str]):
    case = make_conv(N=2, C=8, O=8, dtype="float64")
    arguments = arguments_of(case)
    mask = arguments["mask"][:1, :1].detach().requires_grad_()
    arguments["mask"] = mask.expand(case.mask.shape)
    expected, *others = (results(arguments) for _ in range(3))
    for found in others:
        for tensor, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(tensor, wanted)
    assert replayed == ["forward", "backward"] * 2


@pytest.mark.parametrize("order", [(1, 0, 2, 3), (2, 3, 1, 0), (1, 2, 3, 0), (2, 3, 0, 1)])
def test_offsets_and_masks_in_another_memory_order(order: tuple[int, ...], replayed: list[str]):
    """Their pixels are evenly spaced, but the images or the pixels of several images are not consecutive."""
    arguments = arguments_of(make_conv(N=2, C=8, O=8, dtype="float64"))
    inverse = [order.index(axis) for axis in range(4)]
    for name in ("offset", "mask"):
        arguments[name] = arguments[name].detach().permute(order).contiguous().permute(inverse).requires_grad_()
    expected, *others = (results(arguments) for _ in range(3))
    assert replayed == ["forward", "backward"] * 2
    for found in others:
        for tensor, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(tensor, wanted)


def test_an_expanded_output_gradient(replayed: list[str]):
    arguments = arguments_of(make_conv())
    for _ in range(2):
        deform_conv2d(**arguments).sum().backward()
    gradient = arguments["input"].grad.clone()
    deform_conv2d(**arguments).sum().backward()
    torch.testing.assert_close(arguments["input"].grad, 1.5 * gradient)
    assert replayed == ["forward", "backward"] * 2


def warm_arguments(**changes: Any) -> dict[str, Any]:
    """Arguments of a call that is replayed."""
    arguments = arguments_of(make_conv(**changes))
    for _ in range(2):
        results(arguments)
    return arguments


class Recorder(TorchDispatchMode):
    """Notes the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(str(function))
        return function(*args, **(kwargs or {}))


class TestTheOperatorIsCalled:
    """With anything but plain tensors in eager mode, the dispatcher sees the operator."""

    def test_by_a_dispatch_mode(self, replayed: list[str]):
        arguments = warm_arguments()
        replayed.clear()
        with Recorder() as recorder:
            deform_conv2d(**arguments)
        assert OPERATOR in recorder.operators and replayed == []

    def test_by_make_fx(self, replayed: list[str]):
        arguments = warm_arguments()
        tensors = [arguments[name].detach() for name in NAMES]
        replayed.clear()

        def call(*tensors: Tensor) -> Tensor:
            return deform_conv2d(**{**arguments, **dict(zip(NAMES, tensors))})

        graph = make_fx(call)(*tensors)
        assert OPERATOR in {str(node.target) for node in graph.graph.nodes} and replayed == []

    def test_by_compilation(self, replayed: list[str]):
        arguments = warm_arguments()
        replayed.clear()
        torch.compile(deform_conv2d, backend="aot_eager", fullgraph=True)(**arguments).sum().backward()
        assert replayed == []

    def test_by_the_profiler(self, replayed: list[str]):
        arguments = warm_arguments()
        replayed.clear()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            deform_conv2d(**arguments)
        assert "dcnops::deform_conv2d" in {event.key for event in profile.key_averages()} and replayed == []

    def test_by_a_subclass(self, replayed: list[str]):
        arguments = warm_arguments()
        replayed.clear()
        subclass = type("Subclass", (Tensor,), {})
        output = deform_conv2d(**{**arguments, "input": arguments["input"].detach().as_subclass(subclass)})
        assert type(output) is subclass and replayed == []

    def test_by_vmap(self, replayed: list[str]):
        arguments = warm_arguments(bias=False)
        images = torch.stack([arguments["input"].detach()] * 2)
        replayed.clear()

        def call(image: Tensor) -> Tensor:
            return deform_conv2d(**{**arguments, "input": image})

        with torch.no_grad():
            output = torch.func.vmap(call)(images)
            expected = deform_conv2d(**arguments)
        torch.testing.assert_close(output[1], expected)
        assert replayed == ["forward"]

    def test_by_unaligned_tensors(self, replayed: list[str]):
        arguments = warm_arguments()
        expected = deform_conv2d(**arguments)
        image = arguments["input"].detach()
        shifted = torch.cat([image.new_zeros(1), image.flatten()])[1:].reshape(image.shape)
        replayed.clear()
        torch.testing.assert_close(deform_conv2d(**{**arguments, "input": shifted}), expected)
        assert replayed == []

    def test_by_a_second_gradient(self):
        arguments = warm_arguments(dtype="float64")
        tensors = [arguments[name] for name in NAMES]
        gradients = torch.autograd.grad(deform_conv2d(**arguments).square().sum(), tensors, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), tensors)
        assert all(gradient.abs().sum() > 0 for gradient in second)


@pytest.fixture
def autocast() -> Iterator[None]:
    """Autocast on the emulated GPU. Its tensors are CPU tensors."""
    with torch.autocast("cpu", torch.bfloat16):
        torch.set_autocast_enabled("cuda", True)
        yield
        torch.set_autocast_enabled("cuda", False)


def test_float32_weights_under_autocast(autocast: None, replayed: list[str]):
    arguments = arguments_of(make_conv(C=8, O=8, seed=4))
    expected, *others = (results(arguments) for _ in range(3))
    assert expected[0].dtype == torch.bfloat16 and replayed == ["forward", "backward"] * 2
    for found in others:
        assert [tensor.dtype for tensor in found[1:]] == [torch.float32] * 5
        for tensor, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(tensor, wanted, rtol=2**-7, atol=2**-7 * float(wanted.detach().abs().max()))
        # The operator rounds the gradient of the weights, a replay does not.
        weight = found[1 + list(arguments).index("weight")]
        assert not torch.equal(weight, weight.bfloat16().float())
    tensors = [arguments[name] for name in NAMES]
    gradients = torch.autograd.grad(deform_conv2d(**arguments).float().square().sum(), tensors, create_graph=True)
    second = torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), tensors)
    assert [tensor.dtype for tensor in (*gradients, *second)] == [torch.float32] * 10
    with torch.no_grad():
        for name in ("input", "offset", "mask", "bias"):
            arguments[name] = arguments[name].bfloat16()
        in_autocast = deform_conv2d(**arguments)
        torch.set_autocast_enabled("cuda", False)
        with torch.autocast("cpu", enabled=False):
            # The same tensors without autocast are promoted.
            assert (deform_conv2d(**arguments).dtype, in_autocast.dtype) == (torch.float32, torch.bfloat16)


def test_a_call_allocates_its_results_and_one_block_of_scratch_memory(monkeypatch: pytest.MonkeyPatch):
    arguments = warm_arguments(N=2, C=8, O=8)
    gradient = torch.ones_like(deform_conv2d(**arguments))
    for name in ("bias", "mask"):
        arguments[name] = arguments[name].detach()
    leaves = [arguments[name] for name in ("input", "offset", "weight")]
    allocated: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        function = getattr(torch, name)
        return lambda *sizes, **options: allocated.append(name) or function(*sizes, **options)

    for name in ("empty", "empty_like", "empty_strided", "zeros", "zeros_like", "UntypedStorage"):
        monkeypatch.setattr(torch, name, counted(name))
    monkeypatch.setattr(Tensor, "contiguous", None)  # not called
    output = deform_conv2d(**arguments)
    assert len(allocated) == 2
    allocated.clear()
    torch.autograd.grad(output, leaves, gradient)
    assert len(allocated) == 3 + 1


def test_a_default_device_changes_nothing(replayed: list[str]):
    arguments = warm_arguments()
    expected = results(arguments)
    replayed.clear()
    with torch.device("cpu"):
        for tensor, wanted in zip(results(arguments), expected, strict=True):
            torch.testing.assert_close(tensor, wanted, rtol=0, atol=0)
    assert replayed == ["forward", "backward"]


def test_wrong_arguments_are_the_same_errors_at_every_call():
    arguments = arguments_of(make_conv(), requires_grad=False)
    for numbers in ({}, *({name: (1, 1)} for name in ("stride", "padding", "dilation"))):
        for _ in range(3):
            deform_conv2d(**{**arguments, **numbers})
    for changes, message in (
        ({"mask": arguments["mask"][:, :-1]}, "mask must be"),
        ({"weight": arguments["weight"].double()}, "offset must be|expected|weight"),
        ({"stride": 0}, "stride must be"),
        # Equal to the numbers of a call that is replayed.
        *(
            ({name: wrong}, f"{name} must be")
            for name in ("stride", "padding", "dilation")
            for wrong in (1.0, (1.0, 1), (1, 1.0), 10**5000)
        ),
        ({"precision": "fp32"}, "precision must be"),
    ):
        for _ in range(3):
            if "weight" in changes:  # promoted
                deform_conv2d(**{**arguments, **changes})
                continue
            with pytest.raises(ValueError, match=message):
                deform_conv2d(**{**arguments, **changes})


def test_checkpoints_and_hooks_of_saved_tensors():
    arguments = warm_arguments()
    expected = results(arguments)[1]

    def call(image: Tensor) -> Tensor:
        return deform_conv2d(**{**arguments, "input": image})

    weights = torch.linspace(-1, 1, expected.numel())
    output = checkpoint(call, arguments["input"], use_reentrant=False)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    torch.testing.assert_close(torch.autograd.grad(output, arguments["input"], weights)[0], expected)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (saved.append(tensor), tensor)[1], lambda tensor: tensor
    ):
        output = call(arguments["input"])
    assert len(saved) == len(NAMES)


def test_checkpoints_of_a_first_call_under_autocast(autocast: None, replayed: list[str]):
    """The recomputation is a replay, and the forward pass was none."""
    arguments = arguments_of(make_conv(C=8, O=8))
    weight, image = arguments["weight"], arguments["input"]

    def call(image: Tensor) -> Tensor:
        return deform_conv2d(**{**arguments, "input": image})

    found = torch.autograd.grad(checkpoint(call, image, use_reentrant=False).float().sum(), [image, weight])
    assert replayed == ["forward"]
    for tensor, wanted in zip(found, torch.autograd.grad(call(image).float().sum(), [image, weight]), strict=True):
        torch.testing.assert_close(tensor, wanted, rtol=2**-7, atol=2**-7 * float(wanted.abs().max()))


def shifted(tensor: Tensor) -> Tensor:
    """A copy that is not aligned for vectors."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].reshape(tensor.shape)


@pytest.mark.parametrize("unpack", [Tensor.contiguous, shifted])
def test_hooks_may_change_the_memory_order_and_alignment(unpack: Callable[[Tensor], Tensor], replayed: list[str]):
    arguments = arguments_of(make_conv(N=2, C=8, O=8))
    for name in ("input", "weight"):
        arguments[name] = arguments[name].detach().to(memory_format=torch.channels_last).requires_grad_()
    expected = [results(arguments) for _ in range(2)][-1]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        found = results(arguments)
    assert replayed == ["forward", "backward"] * 2
    for tensor, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=0)


def test_negative_views(replayed: list[str]):
    """Tensors that torch stores with the opposite sign."""
    arguments = arguments_of(make_conv(dtype="float64"), requires_grad=False)
    expected = [deform_conv2d(**arguments) for _ in range(2)][-1]
    for name in NAMES:
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                tensor = torch._neg_view(-arguments[name])  # as ``x.conj().imag``
                assert tensor.is_neg()
                for view in (tensor, tensor.detach(), torch.nn.Parameter(tensor, requires_grad=False)):
                    torch.testing.assert_close(deform_conv2d(**{**arguments, name: view}), expected)


def test_in_place_changes_of_saved_tensors_are_detected():
    arguments = warm_arguments()
    output = deform_conv2d(**arguments)
    with torch.no_grad():
        arguments["weight"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def count_calls(function: Callable[[], object]) -> int:
    """Calls of Python and C functions."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


def test_a_call_costs_few_function_calls(monkeypatch: pytest.MonkeyPatch):
    """Launches, products and fills do nothing, but all that CuPy is given is prepared."""

    def nothing(*arguments: Any) -> int:
        return 0

    class Session:
        def __init__(self, stream: int) -> None: ...
        def __enter__(self) -> int:
            return 0

        def __exit__(self, *arguments: Any) -> None: ...

    class Launcher:
        function = staticmethod(nothing)
        __call__ = staticmethod(nothing)

    monkeypatch.setattr(cupy_programs, "driver", SimpleNamespace(launchKernel=nothing))
    monkeypatch.setattr(cupy_programs, "runtime", SimpleNamespace(memsetAsync=nothing))
    monkeypatch.setattr(cupy_programs, "_THREAD", SimpleNamespace(has_context=True))
    monkeypatch.setattr(cupy_programs, "CublasSession", Session)
    monkeypatch.setattr(cupy_programs, "multiply", nothing)
    engine = host_engine()
    monkeypatch.setattr(engine, "kernel", lambda *arguments: Launcher())
    programs = ProgramCache(engine, cupy_programs.CupyProgram)
    monkeypatch.setattr(devices, "recorded_programs", lambda: programs)
    arguments = warm_arguments(C=64, O=64, N=1, dtype="float16")
    output = deform_conv2d(**arguments)
    tensors = [arguments[name] for name in NAMES]
    gradient = torch.ones_like(output)
    backward = count_calls(lambda: torch.autograd.grad(output, tensors, gradient))
    recording = count_calls(lambda: deform_conv2d(**arguments))
    with torch.no_grad():
        forward = count_calls(lambda: deform_conv2d(**arguments))
    assert forward <= 50 and recording <= 60 and backward <= 130, (forward, recording, backward)
