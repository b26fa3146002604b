"""Eager calls of attention and aggregation on CUDA tensors: replayed programs, run by the emulator on CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dcnops import DtypeError
from dcnops._backends.cuda.programs import ProgramCache, Replay
from dcnops.adapters.torch import cuda_attention_calls, devices, ms_deform_attn
from tests.cases import Case, assert_close, make_aggregate, make_attention
from tests.cuda.emulator import host_engine
from tests.cuda.emulator.host_engine import prepare_program
from tests.torch.tensors import call, tensors_of, to_numpy
from tests.torch.test_eager import count_calls

CASES: dict[str, Case] = {
    "attention": make_attention(N=2, points=(2, 3)),
    "attention, shapes on the device": make_attention(N=2),
    "attention, bfloat16": make_attention(dtype="bfloat16", offset_dtype="float32"),
    "aggregate": make_aggregate(stride=(1, 2), offset_scale=0.7),
    "aggregate, packed": make_aggregate(packed=True, remove_center=True),
}


@pytest.fixture(autouse=True)
def replayed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Take CPU tensors for tensors on the current GPU, and emulate its kernels; record the passes that are replayed."""
    programs, names = ProgramCache(host_engine(), prepare_program), []
    monkeypatch.setattr(devices, "recorded_programs", lambda: programs)
    monkeypatch.setattr(devices, "is_on_current_gpu", lambda tensor: True)
    monkeypatch.setattr(devices, "current_stream", lambda index: 0)
    monkeypatch.setattr(cuda_attention_calls, "CALLS", type(cuda_attention_calls.CALLS)())
    for name in ("forward", "backward"):
        method = getattr(cuda_attention_calls._Call, name)

        def record(self: Any, *arguments: Any, name: str = name, method: Any = method) -> Any:
            names.append(name)
            return method(self, *arguments)

        monkeypatch.setattr(cuda_attention_calls._Call, name, record)
    yield names


@pytest.fixture(params=CASES)
def arguments(request: pytest.FixtureRequest) -> tuple[Case, dict[str, Any]]:
    case = CASES[request.param]
    # Memory of torch's own, which is aligned.
    tensors = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in tensors_of(case).items()}
    if "on the device" in request.param:
        tensors["spatial_shapes"] = torch.tensor(case.spatial_shapes)
    for name in case.needs:
        tensors[name].requires_grad_()
    return case, tensors


def results(case: Case, tensors: dict[str, Any], **options: Any) -> list[Tensor]:
    output = call(case, tensors)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    return [output, *torch.autograd.grad(output, [tensors[name] for name in case.needs], weights, **options)]


def test_replayed_calls_equal_the_first_one(arguments: tuple[Case, dict[str, Any]], replayed: list[str]):
    case, tensors = arguments
    expected = results(case, tensors)
    assert replayed == []
    for strided in (False, True):
        if strided:
            for name in case.needs:
                values = tensors[name].detach()
                tensors[name] = values.repeat_interleave(2, 1)[:, ::2].requires_grad_()
        for found, wanted in zip(results(case, tensors), expected, strict=True):
            assert_close(to_numpy(found), to_numpy(wanted), case.dtype)
    assert replayed == ["forward", "backward"] * 2


def test_second_gradients_and_inference(arguments: tuple[Case, dict[str, Any]], replayed: list[str]):
    case, tensors = arguments
    results(case, tensors)
    _, *first = results(case, tensors, create_graph=True)
    second = torch.autograd.grad(sum(gradient.float().square().sum() for gradient in first), tensors[case.needs[0]])
    assert replayed == ["forward"] and second[0].any()
    with torch.no_grad():
        call(case, tensors)
    assert replayed == ["forward"] * 2


def test_errors_are_those_of_the_operator(arguments: tuple[Case, dict[str, Any]]):
    case, tensors = arguments
    name = case.needs[1]
    for _ in range(3):
        with pytest.raises(DtypeError, match=f"{name} must be float16"):
            call(case, {**tensors, name: tensors[name].detach().int()})


class Shapes:
    """Sizes of levels with a text that does not tell them, like that of an iterator."""

    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        self.shapes = shapes

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.shapes)

    def __repr__(self) -> str:
        return "shapes"


def test_sizes_with_the_same_text_are_told_apart():
    case = make_attention(N=2)
    tensors = {name: tensors_of(case)[name].clone() for name in case.needs}
    (h, w), *others = case.spatial_shapes
    for shapes in ([(h, w), *others], [(w, h), *others]) * 3:
        output = ms_deform_attn(**tensors, spatial_shapes=Shapes(shapes))  # type: ignore[arg-type]
        torch.testing.assert_close(output, ms_deform_attn(**tensors, spatial_shapes=torch.tensor(shapes)))


def test_a_call_costs_few_function_calls(arguments: tuple[Case, dict[str, Any]], monkeypatch: pytest.MonkeyPatch):
    """Without the launch itself, which is that of the other operations."""
    monkeypatch.setattr(Replay, "issue", lambda self, addresses, stream: None)
    case, tensors = arguments
    results(case, tensors)
    results(case, tensors)
    output, leaves = call(case, tensors), [tensors[name] for name in case.needs]
    grad_out = torch.ones_like(output)
    backward = count_calls(lambda: torch.autograd.grad(output, leaves, grad_out, retain_graph=True))
    recording = count_calls(lambda: call(case, tensors))
    with torch.no_grad():
        forward = count_calls(lambda: call(case, tensors))
    assert forward <= 65 and recording <= 70 and backward <= 130, (forward, recording, backward)
