"""Eager calls on CPU tensors past the dispatcher: the cases that take the operator instead, and what a call costs.

`test_functional` compares results and gradients, which come from these calls, with those of the array functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dcnops._backends.cpu import backend
from dcnops.adapters.torch import cpu_calls
from tests.cases import Case, make_conv, make_roi_pool
from tests.torch.tensors import call, tensors_of
from tests.torch.test_eager import count_calls

CASES: dict[str, Case] = {"conv": make_conv(N=2), "roi": make_roi_pool(sampling_ratio=2)}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the passes that were computed past the dispatcher, in order."""
    names: list[str] = []
    for kind in (cpu_calls.ConvCall, cpu_calls.RoICall):
        for name in ("forward", "backward"):
            method = getattr(kind, name)

            def record(self: Any, *arguments: Any, name: str = name, method: Callable[..., Any] = method) -> Any:
                names.append(name)
                return method(self, *arguments)

            monkeypatch.setattr(kind, name, record)
    return names


def gradients(case: Case, arguments: dict[str, Any], **options: Any) -> tuple[Tensor, ...]:
    output = call(case, arguments)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    return torch.autograd.grad(output, [arguments[name] for name in case.needs], weights, **options)


def test_plain_tensors_take_the_short_way(case: Case, direct: list[str]):
    arguments = tensors_of(case, requires_grad=True)
    computed = gradients(case, arguments)
    assert direct == ["forward", "backward"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        expected = gradients(case, arguments)
    assert direct == ["forward", "backward"]
    assert f"dcnops::{case.operation}" in {event.key for event in profile.key_averages()}
    torch.testing.assert_close(computed, expected, rtol=0, atol=0)


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


def with_mode(function: Callable[..., Tensor], image: Tensor) -> Tensor:
    with DispatchMode():
        return function(image)


@pytest.mark.parametrize(
    "wrap",
    [
        with_mode,
        lambda function, image: make_fx(function)(image)(image),
        lambda function, image: function(image.as_subclass(Subclass)),
        lambda function, image: torch.func.vmap(function)(image[None])[0],
        lambda function, image: torch.compile(function, backend="eager", fullgraph=True)(image),
        lambda function, image: function(image.double()).to(image.dtype),  # mixed dtypes
    ],
    ids=["mode", "make_fx", "subclass", "vmap", "compile", "mixed dtypes"],
)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_everything_else_takes_the_operator(
    case: Case, wrap: Callable[[Callable[..., Tensor], Tensor], Tensor], direct: list[str]
):
    arguments = tensors_of(case)
    expected = call(case, arguments)
    direct.clear()
    actual = wrap(lambda image: call(case, {**arguments, "input": image}), arguments["input"])
    torch.testing.assert_close(actual.as_subclass(Tensor), expected)
    assert direct == []


def test_second_gradients(case: Case, direct: list[str]):
    arguments = tensors_of(case, requires_grad=True)
    first = gradients(case, arguments, create_graph=True)
    second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), arguments["input"])
    assert direct == ["forward"] and second[0].abs().sum() > 0


def test_autocast(case: Case, direct: list[str]):
    arguments = tensors_of(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call(case, arguments).dtype == torch.bfloat16
    assert direct == ["forward"]


def test_checkpoints_and_changed_tensors(case: Case, direct: list[str]):
    arguments = tensors_of(case, requires_grad=True)
    image = arguments["input"]

    def loss(image: Tensor) -> Tensor:
        return call(case, {**arguments, "input": image}).square().sum()

    expected = torch.autograd.grad(loss(image), image)
    torch.testing.assert_close(torch.autograd.grad(checkpoint(loss, image, use_reentrant=False), image), expected)
    assert direct == ["forward", "backward", "forward", "forward", "backward"]
    value = loss(image)
    with torch.no_grad():
        image.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_a_call_costs_few_function_calls(case: Case, monkeypatch: pytest.MonkeyPatch):
    """Calls of Python and C functions, with a backend that computes nothing."""
    arguments = tensors_of(case, requires_grad=True)
    leaves = [arguments[name] for name in case.needs]
    output = call(case, arguments)
    array = output.detach().numpy()
    results = {name: arguments[name].detach().numpy() for name in case.needs}
    monkeypatch.setattr(backend, case.operation, lambda *arguments: array)
    monkeypatch.setattr(backend, f"{case.operation}_backward", lambda *arguments: results)
    weights = torch.ones_like(output)

    def count(function: Callable[[], object]) -> int:
        return min(count_calls(function) for _ in range(3))  # the first call imports more of torch

    recording = count(lambda: call(case, arguments))
    backward = count(lambda: torch.autograd.grad(output, leaves, weights, retain_graph=True))
    with torch.no_grad():
        forward = count(lambda: call(case, arguments))
    assert forward <= 90 and recording <= 95 and backward <= 160, (forward, recording, backward)
