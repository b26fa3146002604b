"""Eager RoI pooling past the dispatcher: results, the cases that take the operator instead, and what a call costs.

The kernels run under emulation, on CPU tensors that the adapter takes for tensors on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from dcnops import ArgumentError, ShapeError
from dcnops._backends.cuda import cupy_programs
from dcnops._backends.cuda.deform_roi_pool_programs import RoIPoolPrograms
from dcnops.adapters.torch import (
    ModulatedDeformRoIPoolPack,
    MultiScaleDeformRoIPool,
    cuda_roi_calls,
    deform_roi_pool,
    devices,
    eager,
    operators,
)
from tests.cases import RoIPoolCase, make_roi_pool
from tests.conftest import EmulatedRunner
from tests.cuda.emulator import host_engine
from tests.cuda.emulator.host_engine import prepare_roi_pool_program
from tests.torch.tensors import tensors_of, to_numpy, to_tensor
from tests.torch.test_eager import Recorder, count_calls

OPERATOR = "dcnops.deform_roi_pool.default"
REGIONS = (5, 3, 0, 1, 70, 3)


@pytest.fixture(autouse=True)
def emulated_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take CPU tensors for tensors on the current GPU, and emulate its kernels."""
    programs = RoIPoolPrograms(host_engine(), prepare_roi_pool_program)
    monkeypatch.setattr(devices, "roi_pool_programs", lambda: programs)
    monkeypatch.setattr(devices, "is_on_current_gpu", lambda tensor: True)
    monkeypatch.setattr(devices, "current_stream", lambda index: 0)
    monkeypatch.setattr(cuda_roi_calls, "ROI_CALLS", type(cuda_roi_calls.ROI_CALLS)())
    monkeypatch.setattr(eager, "ROI_CALLS", cuda_roi_calls.ROI_CALLS)
    yield


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the passes that were prepared, in order."""
    names: list[str] = []
    for name in ("forward", "backward"):
        method = getattr(cuda_roi_calls.RoICall, name)

        def call(self: Any, *arguments: Any, name: str = name, method: Callable[..., Any] = method) -> Any:
            names.append(name)
            return method(self, *arguments)

        monkeypatch.setattr(cuda_roi_calls.RoICall, name, call)
    return names


def arguments_of(case: RoIPoolCase, channels_last: bool = False) -> dict[str, Any]:
    """Tensors of torch's own."""
    tensors = {
        name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in tensors_of(case).items()
    }
    if channels_last:
        tensors["input"] = tensors["input"].to(memory_format=torch.channels_last)
    for name in case.needs:
        tensors[name].requires_grad_()
    return tensors


def results(arguments: dict[str, Any], grad_out: Tensor | None = None) -> dict[str, Tensor]:
    """The output and the gradients."""
    output = deform_roi_pool(**arguments)
    leaves = {name: value for name, value in arguments.items() if isinstance(value, Tensor) and value.requires_grad}
    weights = torch.ones_like(output) if grad_out is None else grad_out
    gradients = torch.autograd.grad(output, list(leaves.values()), weights)
    return {"output": output.detach(), **dict(zip(leaves, gradients))}


def warm_arguments(**options: Any) -> dict[str, Any]:
    """Arguments of a call that is prepared."""
    arguments = arguments_of(make_roi_pool(**options))
    for _ in range(2):
        results(arguments)
    return arguments


def detached(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in arguments.items()}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("offset, mask", [(False, False), (True, False), (False, True), (True, True)])
def test_prepared_calls_give_the_bits_of_the_plan(
    dtype: str, channels_last: bool, offset: bool, mask: bool, prepared: list[str]
):
    runner = EmulatedRunner()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for R in (2, *REGIONS):
        case = make_roi_pool(C=8, R=R, offset=offset, mask=mask, dtype=dtype, seed=R, rois_dtype="float16")
        arguments = arguments_of(case, channels_last)
        found = results(arguments, to_tensor(case.grad_out).contiguous(memory_format=memory_format))
        if not prepared:  # the first call
            continue
        order = (0, 2, 3, 1) if channels_last else (0, 1, 2, 3)
        images = np.ascontiguousarray(case.input.transpose(order)).transpose(np.argsort(order))
        planned = case.with_arrays(input=images, grad_out=case.grad_out)
        expected = {"output": runner.forward(planned), **runner.backward(planned)}
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            np.testing.assert_array_equal(to_numpy(tensor), expected[name].astype(np.float64), err_msg=name)
        assert found["output"].is_contiguous()
        assert found["input"].is_contiguous(memory_format=memory_format)
    assert prepared == ["forward", "backward"] * len(REGIONS)


@pytest.mark.parametrize("needs", [("input",), ("offset",), ("mask",), ("offset", "mask")])
def test_only_wanted_gradients_are_computed(needs: tuple[str, ...], prepared: list[str]):
    arguments = warm_arguments()
    expected = results(arguments)
    for name in {"input", "offset", "mask"}.difference(needs):
        arguments[name] = arguments[name].detach()
    found = results(arguments)
    assert found.keys() == {"output", *needs}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    assert prepared[-2:] == ["forward", "backward"]


def test_regions_have_no_gradient(prepared: list[str]):
    arguments = detached(warm_arguments())
    rois = arguments["rois"].requires_grad_()
    prepared.clear()
    deform_roi_pool(**arguments).sum().backward()
    assert rois.grad is None and prepared == ["forward"]


def test_strided_arguments(prepared: list[str]):
    """Offset and mask as a branch predicts them, every second pixel of the feature map, and an expanded gradient."""
    values = torch.randn(6, 3, 2, 2, requires_grad=True)
    whole = torch.randn(2, 4, 8, 18, requires_grad=True)
    rois = torch.tensor([[0.0, 1, 1, 6, 5]]).expand(6, 5)

    def gradients() -> list[Tensor]:
        output = deform_roi_pool(whole[..., ::2], rois, values[:, :2], values[:, 2], output_size=2)
        return [output, *torch.autograd.grad(output.sum(), [whole, values])]

    expected, *others = (gradients() for _ in range(3))
    assert prepared == ["forward", "backward"] * 2
    for found in others:
        for tensor, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(tensor, wanted)


def test_autocast_prepares_the_promoted_call(prepared: list[str], monkeypatch: pytest.MonkeyPatch):
    arguments = arguments_of(make_roi_pool())
    monkeypatch.setattr(eager.torch, "is_autocast_enabled", lambda device="cpu": True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    for _ in range(2):
        found = results(arguments)
    assert prepared == ["forward", "backward"] and found["output"].dtype == torch.bfloat16
    assert all(found[name].dtype == torch.float32 for name in ("input", "offset", "mask"))


class TestTheOperatorIsCalled:
    """With anything but plain tensors in eager mode, the dispatcher sees the operator."""

    def test_by_a_dispatch_mode(self, prepared: list[str]):
        arguments = warm_arguments()
        prepared.clear()
        with Recorder() as recorder:
            deform_roi_pool(**arguments)
        assert OPERATOR in recorder.operators and prepared == []

    def test_by_make_fx(self, prepared: list[str]):
        arguments = detached(warm_arguments())
        prepared.clear()
        graph = make_fx(lambda image: deform_roi_pool(**{**arguments, "input": image}))(arguments["input"])
        assert OPERATOR in {str(node.target) for node in graph.graph.nodes} and prepared == []

    def test_by_compilation(self, prepared: list[str]):
        arguments = warm_arguments()
        prepared.clear()
        torch.compile(deform_roi_pool, backend="aot_eager", fullgraph=True)(**arguments).sum().backward()
        assert prepared == []

    def test_by_the_profiler(self, prepared: list[str]):
        arguments = warm_arguments()
        prepared.clear()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            deform_roi_pool(**arguments)
        assert "dcnops::deform_roi_pool" in {event.key for event in profile.key_averages()} and prepared == []

    @pytest.mark.parametrize("name", ["input", "rois", "mask"])
    def test_by_a_subclass(self, name: str, prepared: list[str]):
        arguments = detached(warm_arguments())
        prepared.clear()
        subclass = type("Subclass", (Tensor,), {})
        output = deform_roi_pool(**{**arguments, name: arguments[name].as_subclass(subclass)})
        assert type(output) is subclass and prepared == []

    def test_by_vmap(self, prepared: list[str]):
        arguments = detached(warm_arguments())
        images = torch.stack([arguments["input"]] * 2)
        prepared.clear()
        output = torch.func.vmap(lambda image: deform_roi_pool(**{**arguments, "input": image}))(images)
        assert prepared == []
        torch.testing.assert_close(output[1], deform_roi_pool(**arguments))

    def test_by_unaligned_feature_maps(self, prepared: list[str]):
        arguments = detached(warm_arguments())
        expected, image = deform_roi_pool(**arguments), arguments["input"]
        prepared.clear()
        torch.testing.assert_close(deform_roi_pool(**{**arguments, "input": shifted(image)}), expected)
        assert prepared == []

    def test_by_a_second_gradient(self):
        arguments = warm_arguments(dtype="float64", inside=True)
        tensors = [arguments[name] for name in ("input", "offset", "mask")]
        gradients = torch.autograd.grad(deform_roi_pool(**arguments).square().sum(), tensors, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), tensors)
        assert all(gradient.abs().sum() > 0 for gradient in second)

    def test_by_a_deterministic_gradient_of_the_input(self, prepared: list[str]):
        arguments = warm_arguments()
        expected = results(arguments)
        torch.use_deterministic_algorithms(True)
        try:
            prepared.clear()
            found = results(arguments)
            assert prepared == ["forward"]
            arguments["input"] = arguments["input"].detach()
            results(arguments)
            assert prepared == ["forward"] * 2 + ["backward"]
        finally:
            torch.use_deterministic_algorithms(False)
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name])


@pytest.mark.parametrize(
    "error, changes",
    [
        (ArgumentError, {"output_size": 2.0}),
        (ArgumentError, {"output_size": 0}),
        (ArgumentError, {"sampling_ratio": 2.0}),
        (ArgumentError, {"spatial_scale": [0.5]}),
        (ArgumentError, {"gamma": float("nan")}),
        (ShapeError, {"rois": torch.zeros(4, 5)}),
        (ShapeError, {"rois": torch.zeros(5, 4)}),
        (ShapeError, {"rois": torch.zeros(5)}),
        (ShapeError, {"mask": torch.zeros(4, 2, 2)}),
        (ShapeError, {"offset": torch.zeros(5, 3, 2, 2)}),
        (ShapeError, {"input": torch.zeros(4, 8, 9)}),
        (TypeError, {"rois": torch.zeros(5, 5, dtype=torch.int64)}),
    ],
)
def test_wrong_arguments_are_the_same_errors_at_every_call(error: type[Exception], changes: dict[str, Any]):
    arguments = detached(warm_arguments(output_size=2))
    (name,) = changes
    for _ in range(3):
        with pytest.raises(error, match=rf"^({name}|offset) must "):
            deform_roi_pool(**{**arguments, **changes})


def test_checkpoints_and_hooks_of_saved_tensors(prepared: list[str]):
    arguments = warm_arguments()
    expected = results(arguments)["input"]

    def call(image: Tensor) -> Tensor:
        return deform_roi_pool(**{**arguments, "input": image})

    output = checkpoint(call, arguments["input"], use_reentrant=False)
    prepared.clear()
    torch.testing.assert_close(torch.autograd.grad(output.sum(), arguments["input"])[0], expected)
    assert prepared == ["forward", "backward"]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        call(arguments["input"])
    assert len(saved) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_checkpoints_of_a_first_call_with_regions_of_another_dtype(dtype: torch.dtype, prepared: list[str]):
    """The recomputation is prepared, and the forward pass was not."""
    arguments = arguments_of(make_roi_pool(C=8))
    arguments["rois"] = arguments["rois"].to(dtype)

    def call(image: Tensor) -> Tensor:
        return deform_roi_pool(**{**arguments, "input": image})

    image = arguments["input"]
    output = checkpoint(call, image, use_reentrant=False)
    found = torch.autograd.grad(output.sum(), image)[0]
    assert prepared == ["forward"]
    torch.testing.assert_close(found, torch.autograd.grad(call(image).sum(), image)[0])
    assert prepared == ["forward"] * 2 + ["backward"]


def shifted(tensor: Tensor) -> Tensor:
    """A copy that is not aligned for vectors."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].reshape(tensor.shape)


@pytest.mark.parametrize("unpack", [Tensor.contiguous, shifted])
def test_hooks_may_change_the_memory_order_and_alignment(unpack: Callable[[Tensor], Tensor], prepared: list[str]):
    arguments = arguments_of(make_roi_pool(C=8), channels_last=True)
    for _ in range(2):
        expected = results(arguments)
    prepared.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        found = results(arguments)
    assert prepared == ["forward", "backward"]
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_in_place_changes_of_saved_tensors_are_detected():
    arguments = warm_arguments()
    output = deform_roi_pool(**arguments)
    with torch.no_grad():
        arguments["offset"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_layers(prepared: list[str]):
    """Each layer pools twice per level; levels without boxes have no regions."""
    layer = MultiScaleDeformRoIPool(["0", "1"], ModulatedDeformRoIPoolPack(2, 4, 8))
    with torch.no_grad():
        layer.pools[0].offset_fc[-1].weight.normal_()
    features = {str(i): torch.randn(2, 4, size, size, requires_grad=True) for i, size in enumerate((32, 16))}
    boxes = [torch.tensor([[4.0, 4, 40, 40]] * n) for n in (1, 2)]
    outputs = [layer(features, boxes, [(128, 128)] * 2) for _ in range(3)]
    assert prepared == ["forward"] * 2 * 4
    for output in outputs:
        torch.testing.assert_close(output, outputs[0])
    outputs[2].sum().backward()
    assert prepared[8:] == ["backward"] * 4
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_the_operator_converts_regions_with_torch():
    with FakeTensorMode():
        image, rois = torch.empty(1, 1, 1, 1, device="cuda"), torch.empty(3, 5, dtype=torch.float16, device="cuda")
        assert operators._coordinates(rois, image).dtype == torch.float32
        assert operators._coordinates(rois, image.double()).dtype == torch.float64
        assert operators._coordinates(rois.T.contiguous().T, image).is_contiguous()


def test_a_call_costs_few_function_calls_and_allocations(monkeypatch: pytest.MonkeyPatch):
    """Launches and fills do nothing, but all that CuPy is given is prepared."""

    def nothing(*arguments: Any) -> int:
        return 0

    class Launcher:
        function = staticmethod(nothing)
        __call__ = staticmethod(nothing)

    monkeypatch.setattr(cupy_programs, "driver", SimpleNamespace(launchKernel=nothing))
    monkeypatch.setattr(cupy_programs, "runtime", SimpleNamespace(memsetAsync=nothing))
    monkeypatch.setattr(cupy_programs, "_THREAD", SimpleNamespace(has_context=True))
    engine = host_engine()
    monkeypatch.setattr(engine, "kernel", lambda *arguments: Launcher())
    programs = RoIPoolPrograms(engine, cupy_programs.CupyRoIPoolProgram)
    monkeypatch.setattr(devices, "roi_pool_programs", lambda: programs)
    warm_arguments(C=64, output_size=7, dtype="float16", rois_dtype="float16")
    arguments = arguments_of(make_roi_pool(C=64, R=100, output_size=7, dtype="float16", rois_dtype="float16"))
    tensors = [arguments[name] for name in ("input", "offset", "mask")]
    output = deform_roi_pool(**arguments)
    gradient = torch.ones_like(output)
    backward = count_calls(lambda: torch.autograd.grad(output, tensors, gradient))
    recording = count_calls(lambda: deform_roi_pool(**arguments))
    with torch.no_grad():
        forward = count_calls(lambda: deform_roi_pool(**arguments))
    assert forward <= 51 and recording <= 60 and backward <= 130, (forward, recording, backward)

    allocated: list[str] = []
    for name in ("empty", "empty_like", "UntypedStorage"):
        allocate = getattr(torch, name)

        def count(*args: Any, name: str = name, allocate: Any = allocate, **options: Any) -> Any:
            allocated.append(name)
            return allocate(*args, **options)

        monkeypatch.setattr(torch, name, count)
    output = deform_roi_pool(**arguments)
    assert allocated == ["empty", "UntypedStorage"]
    allocated.clear()
    torch.autograd.grad(output, tensors, gradient)
    assert sorted(allocated) == ["UntypedStorage", *["empty_like"] * 3]
