"""`ms_deform_attn` and `deform_aggregate` on tensors: values, gradients, compilation, dtypes, errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dcnops
from dcnops import ArgumentError, DeviceError, DtypeError, ShapeError
from dcnops._attention_shapes import MSDeformAttnGeometry
from dcnops.adapters.torch import attention_eager, cpu_calls, deform_aggregate, differentiable, ms_deform_attn
from tests.torch.attention_reference import SHAPES, attention_by_grid_sample, attention_tensors

POINTS = (3, 2)
SHAPES_TENSOR = torch.tensor(SHAPES)
aggregate = partial(deform_aggregate, groups=2, kernel_size=(3, 1), padding=(1, 0), stride=(1, 2), offset_scale=0.7)


def aggregate_tensors(packed: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    image = torch.randn(2, 4, 5, 6, dtype=dtype, requires_grad=True)
    if packed:
        return image, torch.randn(2, 4, 3, 24, dtype=dtype, requires_grad=True)
    offset = torch.randn(2, 4, 3, 12, dtype=dtype, requires_grad=True)
    return image, offset, torch.randn(2, 4, 3, 6, dtype=dtype, requires_grad=True)


def attention(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    return ms_deform_attn(value, SHAPES, locations, weights, points=POINTS)


def attention_with_tensor_shapes(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    return ms_deform_attn(value, SHAPES_TENSOR, locations, weights, points=POINTS)


CALLS: dict[str, tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, ...]]]] = {
    "attention": (attention, attention_tensors),
    "attention, tensor of shapes": (attention_with_tensor_shapes, attention_tensors),
    "aggregate": (aggregate, partial(aggregate_tensors, False)),
    "aggregate, packed": (aggregate, partial(aggregate_tensors, True)),
}
each_call = pytest.mark.parametrize("name", CALLS)


@pytest.mark.parametrize("D", [1, 30, 71])
def test_attention_equals_grid_sample(D: int):
    tensors = attention_tensors(D)
    output = attention(*tensors)
    expected = attention_by_grid_sample(tensors[0], SHAPES, *tensors[1:], POINTS)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(output)
    for actual, wanted in zip(*(torch.autograd.grad(result, tensors, weights) for result in (output, expected))):
        torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-11)
    value, locations, factors = tensors
    for shapes in (SHAPES_TENSOR, SHAPES_TENSOR.int(), np.array(SHAPES)):
        assert torch.equal(ms_deform_attn(value, shapes, locations, factors, points=list(POINTS)), output)
    # The same number of points on both levels, with an axis of levels.
    value, locations, factors = attention_tensors(D, points=(3, 3))
    expected = attention_by_grid_sample(value, SHAPES, locations, factors, (3, 3))
    for points in (None, 3):
        actual = ms_deform_attn(
            value, SHAPES, locations.unflatten(3, (2, 3)), factors.unflatten(3, (2, 3)), points=points
        )
        torch.testing.assert_close(actual, expected)


@each_call
def test_first_and_second_gradients(name: str):
    function, make = CALLS[name]
    assert torch.autograd.gradcheck(function, make(), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, make(), fast_mode=True)


@each_call
def test_plain_tensors_take_the_short_way(name: str, monkeypatch: pytest.MonkeyPatch):
    function, make = CALLS[name]
    tensors = make()
    passes: list[str] = []
    for kind in (cpu_calls.AttentionCall, cpu_calls.AggregateCall):
        for method in ("forward", "backward"):
            original = getattr(kind, method)

            def record(self: Any, *args: Any, method: str = method, original: Any = original) -> Any:
                passes.append(method)
                return original(self, *args)

            monkeypatch.setattr(kind, method, record)
    computed = [output := function(*tensors), *torch.autograd.grad(output.square().sum(), tensors)]
    assert passes == ["forward", "backward"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        expected = [output := function(*tensors), *torch.autograd.grad(output.square().sum(), tensors)]
    assert passes == ["forward", "backward"]
    assert {event.key for event in profile.key_averages()} & {"dcnops::ms_deform_attn", "dcnops::deform_aggregate"}
    torch.testing.assert_close(computed, expected, rtol=0, atol=0)
    with torch.no_grad():
        assert torch.equal(function(*tensors), output)


@pytest.mark.slow
@pytest.mark.parametrize("second", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_opcheck(second: bool):
    """Check all operators, and the derivatives of the backward operators if `second`, which are slow to trace."""

    def check_backward(operator: Any, grad_out: Tensor, arguments: tuple[Any, ...]) -> None:
        plain = [value.detach() if isinstance(value, Tensor) else value for value in arguments]
        torch.library.opcheck(operator, (grad_out, *(arguments if second else plain), [True] * 3))

    tensors, namespace = attention_tensors(), torch.ops.dcnops
    for shapes, numbers in ((SHAPES_TENSOR, []), (None, [6, 4, 3, 2])):
        arguments = (tensors[0], shapes, *tensors[1:], numbers, list(POINTS), True)
        torch.library.opcheck(namespace.ms_deform_attn.default, arguments)
    grad_out = torch.randn(2, 5, 6, dtype=torch.float64)
    check_backward(namespace.ms_deform_attn_backward.default, grad_out, arguments)
    arguments = (*aggregate_tensors(packed=True), None, 2, [3, 1], [1, 2], [1, 0], [1, 1], 0.7, False)
    torch.library.opcheck(namespace.deform_aggregate.default, arguments)
    grad_out = torch.randn(2, 4, 3, 6, dtype=torch.float64)
    check_backward(namespace.deform_aggregate_backward.default, grad_out, arguments)


@pytest.mark.slow
@each_call
def test_compile_with_gradients(name: str):
    torch._dynamo.reset()
    function, make = CALLS[name]
    tensors = make()
    compiled = torch.compile(lambda *values: function(*values).relu() * 2, fullgraph=True, backend="aot_eager")
    gradients = torch.autograd.grad(compiled(*tensors).sum(), tensors)
    expected = torch.autograd.grad((function(*tensors).relu() * 2).sum(), tensors)
    torch.testing.assert_close(gradients, expected)


@pytest.mark.slow
def test_one_compilation_and_one_export_for_all_sizes():
    class Net(torch.nn.Module):
        def forward(self, first: Tensor, second: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            maps = (first, second)
            shapes = [tuple(features.shape[2:]) for features in maps]
            value = torch.cat([features.flatten(2) for features in maps], dim=2).transpose(1, 2).unflatten(2, (2, -1))
            output = ms_deform_attn(value, shapes, locations, weights)
            offset = first.new_zeros(first.shape[0], *first.shape[2:], 8)
            return output.sum() + deform_aggregate(first.permute(0, 2, 3, 1), offset, groups=2, kernel_size=1).sum()

    def inputs(N: int, Lq: int, h: int, w: int) -> tuple[Tensor, ...]:
        maps = torch.rand(N, 4, h, w), torch.rand(N, 4, h // 2, w + 3)
        return *maps, torch.rand(N, Lq, 2, 2, 3, 2), torch.rand(N, Lq, 2, 2, 3)

    torch._dynamo.reset()
    net, graphs = Net(), []

    def count(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=count)
    axes = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    queries = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = torch.export.export(net, inputs(5, 11, 14, 9), dynamic_shapes=(axes, axes, queries, queries)).module()
    for sizes in ((5, 11, 14, 9), (3, 8, 10, 4), (4, 2, 6, 19)):
        arguments = inputs(*sizes)
        expected = net(*arguments)
        torch.testing.assert_close(compiled(*arguments), expected)
        torch.testing.assert_close(program(*arguments), expected)
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@each_call
def test_vmap(name: str):
    function, make = CALLS[name]
    batches = [torch.stack(values).detach() for values in zip(*(make() for _ in range(3)))]
    expected = torch.stack([function(*values) for values in zip(*batches)])
    torch.testing.assert_close(torch.vmap(function)(*batches), expected)


@each_call
def test_autocast(name: str):
    """Values are rounded to bfloat16, locations are not."""
    function, make = CALLS[name]
    tensors = make(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = function(*tensors)
    expected = function(tensors[0].bfloat16(), *tensors[1:])
    assert output.dtype == torch.bfloat16 and torch.equal(output, expected)
    gradients = torch.autograd.grad(output.float().sum(), tensors)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    arrays = (tensor.detach().numpy() for tensor in tensors)
    precise = torch.from_numpy(function(*map(torch.from_numpy, arrays)).numpy())
    torch.testing.assert_close(output.float(), precise, rtol=0.05, atol=0.05)


def test_mixed_dtypes():
    value, locations, weights = attention_tensors(dtype=torch.float32)
    half = ms_deform_attn(value.half(), SHAPES, locations, weights.half(), points=POINTS)
    assert torch.equal(half, attention(value.half(), locations, weights.half().float()))
    assert torch.equal(attention(value, locations.double(), weights), attention(value, locations, weights))


@each_call
def test_only_needed_gradients_are_computed(name: str, monkeypatch: pytest.MonkeyPatch):
    function, make = CALLS[name]
    tensors = [tensor.detach() for tensor in make()]
    tensors[1].requires_grad_()
    seen: list[Any] = []
    for operation in ("ms_deform_attn_backward", "deform_aggregate_backward"):
        original = getattr(dcnops, operation)
        monkeypatch.setattr(dcnops, operation, lambda original=original, **kw: seen.append(kw) or original(**kw))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):  # sees operators
        output = function(*tensors)
    torch.use_deterministic_algorithms(True)
    try:
        torch.autograd.grad(output.sum(), tensors[1])
    finally:
        torch.use_deterministic_algorithms(False)
    assert [(call["needs"], call["deterministic"]) for call in seen] == [
        (["sampling_locations" if "attention" in name else "offset"], True)
    ]


def test_differentiable_path_follows_the_nan_policy():
    value, locations, weights = (tensor.detach() for tensor in attention_tensors())
    locations[0, 0, 0, 0] = torch.tensor([np.nan, 0.5])
    locations[0, 1, 0, 0] = torch.tensor([np.inf, -np.inf])
    locations[0, 2, 0, 3] = torch.tensor([-1e30, 0.5])
    geometry = MSDeformAttnGeometry.of(value, SHAPES, locations, weights, POINTS)
    actual = differentiable.ms_deform_attn(geometry, value, None, locations, weights)
    expected = attention(value, locations, weights)
    assert expected[0, 0, :3].isnan().all() and expected.isnan().sum() == 3
    torch.testing.assert_close(actual, expected, equal_nan=True)


def test_differentiable_path_stays_in_range_for_wrong_shapes_on_a_device():
    value, locations, weights = attention_tensors()
    geometry = MSDeformAttnGeometry.of(value, SHAPES_TENSOR, locations, weights, POINTS, on_device=True)
    for shapes in ([(60, 40), (30, 20)], [(-6, 4), (3, 2)], [(0, 0), (0, 0)], [(2**31, 2**31), (6, 4)]):
        output = differentiable.ms_deform_attn(geometry, value, torch.tensor(shapes), locations, weights)
        assert output.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"value": np.zeros((2, 30, 2, 3))}, DtypeError, "value must be a torch.Tensor, got numpy.ndarray"),
        ({"value": torch.zeros(2, 29, 2, 3)}, ShapeError, "spatial_shapes must have a sum of height*width equal to"),
        ({"spatial_shapes": [(6, 4), (3, 0)]}, ArgumentError, "spatial_shapes must be 1 to 64 pairs"),
        (
            {"spatial_shapes": SHAPES_TENSOR.float()},
            DtypeError,
            "spatial_shapes must be int32 or int64, got torch.float",
        ),
        ({"spatial_shapes": SHAPES_TENSOR.to("meta")}, DeviceError, "spatial_shapes must be on the CPU or on cpu"),
        ({"points": (3, 3)}, ShapeError, "sampling_locations must be [N=2, Lq, M=2, sum(points)=6, 2]"),
        ({"points": 5}, ShapeError, "sampling_locations must have 6 dimensions"),
        ({"attention_weights": torch.zeros(2, 5, 2, 5).int()}, DtypeError, "attention_weights must be float16"),
        ({"sampling_locations": torch.zeros(2, 5, 2, 5, 2).to("meta")}, DeviceError, "must be on cpu like value"),
    ],
)
@pytest.mark.parametrize("through_the_operator", [False, True])
def test_errors(
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
    through_the_operator: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    if through_the_operator:
        monkeypatch.setattr(attention_eager, "ms_deform_attn", lambda *arguments: None)
    value, locations, weights = (tensor.detach() for tensor in attention_tensors(dtype=torch.float32))
    legal = {"value": value, "spatial_shapes": SHAPES, "sampling_locations": locations, "attention_weights": weights}
    with pytest.raises(error) as raised:
        ms_deform_attn(**{**legal, "points": POINTS, **changes})
    assert message in str(raised.value)


def test_aggregate_errors():
    image, offset, mask = (tensor.detach() for tensor in aggregate_tensors(packed=False))
    with pytest.raises(ShapeError, match=r"offset must be \[N=2, oh=4, ow=3, groups\*3\*3=18 rounded up"):
        aggregate(image, offset)
    with pytest.raises(ArgumentError, match="remove_center must be False unless kernel_size is odd"):
        deform_aggregate(image, offset, mask, groups=2, kernel_size=2, remove_center=True)
    with pytest.raises(DtypeError, match=r"offset must be a torch\.Tensor, got builtins\.NoneType"):
        aggregate(image, None)


@each_call
def test_empty_batch(name: str):
    function, make = CALLS[name]
    tensors = [tensor.detach()[:0].requires_grad_() for tensor in make()]
    output = function(*tensors)
    assert output.shape[0] == 0
    assert [gradient.shape for gradient in torch.autograd.grad(output.sum(), tensors)] == [t.shape for t in tensors]
