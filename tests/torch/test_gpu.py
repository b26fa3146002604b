"""CUDA tensors: stream, device, memory and graphs of torch."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Thread

import pytest
import torch

from dcnops import ArgumentError, DeviceError
from dcnops.adapters.torch import (
    DeformConv2dPack,
    ModulatedDeformConv2dPack,
    MSDeformAttn,
    deform_conv2d,
    deform_roi_pool,
    set_float32_precision,
)
from dcnops.adapters.torch.spatial_support import (
    effective_receptive_field,
    effective_sampling_locations,
    error_bounded_saliency_region,
    offset_statistics,
    sampling_locations,
)
from tests.cases import Case, assert_close, make_aggregate, make_attention, make_conv, make_roi_pool
from tests.torch.tensors import call, tensors_of, to_numpy, to_tensor

pytestmark = pytest.mark.gpu

CASES = {"conv": make_conv(N=2, C=16, O=8, H=12, W=9), "roi": make_roi_pool(C=16, R=9)}


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """Without TF32, which torch's convolutions use by default."""
    with set_float32_precision("ieee"):
        yield


def on_gpu(case: Case, device: str = "cuda", requires_grad: bool = False) -> dict:
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in tensors_of(case).items()}
    for name in case.needs:
        moved[name].requires_grad_(requires_grad)
    return moved


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("make", [make_conv, make_roi_pool, make_attention, make_aggregate])
def test_output_and_gradients(make, dtype: str):
    channels = {"C": 16} if make in (make_conv, make_roi_pool) else {"D": 16}
    case = make(N=2, dtype=dtype, **channels)
    expected = case.expected_gradients()
    for _ in range(3):  # planned, recorded, replayed
        arguments = on_gpu(case, requires_grad=True)
        output = call(case, arguments)
        assert_close(to_numpy(output.cpu()), case.expected(), dtype)
        output.backward(to_tensor(case.grad_out).cuda())
        for name in case.needs:
            assert_close(to_numpy(arguments[name].grad.cpu()), expected[name], dtype, name)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_regions_that_change_from_call_to_call(dtype: str, channels_last: bool):
    for R in (3, 3, 0, 1, 500, 3):  # planned, then prepared
        case = make_roi_pool(C=16, R=R, output_size=7, dtype=dtype, rois_dtype=dtype, seed=R)
        arguments = on_gpu(case)
        if channels_last:
            arguments["input"] = arguments["input"].to(memory_format=torch.channels_last)
        leaves = [arguments[name].requires_grad_() for name in case.needs]
        output = deform_roi_pool(**arguments)
        assert_close(to_numpy(output.cpu()), case.expected(), dtype)
        gradients = torch.autograd.grad(output, leaves, to_tensor(case.grad_out).cuda())
        expected = case.expected_gradients()
        for name, gradient in zip(case.needs, gradients):
            assert_close(to_numpy(gradient.cpu()), expected[name], dtype, name)


@pytest.mark.parametrize("kind", CASES)
def test_the_first_launch_of_a_thread(kind: str):
    case = CASES[kind]
    arguments = on_gpu(case)
    outputs = [call(case, arguments) for _ in range(3)]
    thread = Thread(target=lambda: outputs.append(call(case, arguments)))
    thread.start()
    thread.join()
    assert len(outputs) == 4
    torch.testing.assert_close(outputs[3], outputs[2])


@pytest.mark.parametrize("kind", CASES)
def test_operations_run_on_the_current_stream(kind: str):
    case = CASES[kind]
    arguments = on_gpu(case)
    call(case, arguments)
    late = torch.empty_like(arguments["input"])
    busy = torch.ones(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(10):
            busy = busy @ busy * 1e-4
        late.copy_(arguments["input"])
        output = call(case, {**arguments, "input": late})
    stream.synchronize()
    assert_close(to_numpy(output.cpu()), case.expected(), "float32")


@pytest.mark.parametrize("kind", CASES)
def test_memory_comes_from_torch(kind: str):
    import cupy

    case = CASES[kind]
    arguments = on_gpu(case, requires_grad=True)
    call(case, arguments).sum().backward()
    pool = cupy.get_default_memory_pool().total_bytes()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = call(case, arguments)
    assert torch.cuda.memory_allocated() >= before + output.numel() * output.element_size()
    assert torch.cuda.max_memory_allocated() > torch.cuda.memory_allocated()
    output.sum().backward()
    del output
    assert cupy.get_default_memory_pool().total_bytes() == pool
    assert torch.cuda.memory_allocated() <= before + sum(arguments[name].nbytes for name in case.needs) + 2**20


@pytest.mark.parametrize("kind", CASES)
def test_graph_capture(kind: str):
    case = CASES[kind]
    arguments = on_gpu(case, requires_grad=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(call(case, arguments).sum(), [arguments[name] for name in case.needs])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call(case, arguments)
        gradients = torch.autograd.grad(output.sum(), [arguments[name] for name in case.needs])
    with torch.no_grad():
        arguments["input"].copy_(2 * arguments["input"])
    graph.replay()
    torch.cuda.synchronize()
    doubled = case.with_arrays(input=2 * case.input)
    assert_close(to_numpy(output.cpu()), doubled.expected(), "float32")
    expected = torch.autograd.grad(call(case, arguments).sum(), [arguments[name] for name in case.needs])
    for ours, theirs in zip(gradients, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_attention_never_waits_for_shapes_on_the_device():
    layer = MSDeformAttn(32, n_levels=2, n_heads=4, n_points=[3, 2]).cuda()
    shapes = torch.tensor([(6, 4), (3, 2)], device="cuda")
    query, reference, value = (torch.rand(size, device="cuda") for size in ((2, 5, 32), (2, 5, 2, 2), (2, 30, 32)))
    arguments = (query, reference, value.requires_grad_())
    expected = layer(*arguments, shapes.cpu())

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        output = layer(*arguments, shapes)
        return output, torch.autograd.grad(output.sum(), value)[0]

    for _ in range(3):
        run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output, _ = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(output, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, gradient = run()
    with torch.no_grad():
        value.mul_(2)
    graph.replay()
    for actual, wanted in zip((output, gradient), run()):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_a_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    for case in CASES.values():
        output = call(case, on_gpu(case, "cuda:1"))
        assert output.device.index == 1
        assert torch.cuda.current_device() == 0
        assert_close(to_numpy(output.cpu()), case.expected(), "float32")


def test_mixed_devices_raise_an_error():
    arguments = on_gpu(CASES["conv"])
    with pytest.raises(DeviceError, match="offset must be on cuda:0 like input, got cpu"):
        deform_conv2d(**{**arguments, "offset": arguments["offset"].cpu()})


def test_errors_leave_the_gpu_usable():
    arguments = on_gpu(CASES["roi"])
    with pytest.raises(ArgumentError, match="output_size must be"):
        deform_roi_pool(**{**arguments, "output_size": 0})
    torch.cuda.synchronize()


@pytest.mark.parametrize("kind", CASES)
def test_deterministic_gradients(kind: str):
    case = make_conv(C=32, H=40, W=40, spread=8.0) if kind == "conv" else make_roi_pool(C=32, R=200)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(5):
            arguments = on_gpu(case, requires_grad=True)
            call(case, arguments).backward(to_tensor(case.grad_out).cuda())
            runs.append(arguments["input"].grad)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", CASES)
def test_autocast(kind: str, dtype: torch.dtype):
    case = CASES[kind]
    arguments = on_gpu(case, requires_grad=True)
    with torch.autocast("cuda", dtype=dtype):
        output = call(case, arguments)
    assert output.dtype == dtype
    output.float().sum().backward()
    assert all(arguments[name].grad.dtype == torch.float32 for name in case.needs)


def test_channels_last_is_kept():
    case = CASES["conv"]
    arguments = on_gpu(case)
    x = arguments["input"].to(memory_format=torch.channels_last).requires_grad_()
    output = deform_conv2d(**{**arguments, "input": x})
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert_close(to_numpy(output.cpu()), case.expected(), "float32")
    output.backward(to_tensor(case.grad_out).cuda().to(memory_format=torch.channels_last))
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    assert_close(to_numpy(x.grad.cpu()), case.expected_gradients()["input"], "float32")


@pytest.mark.parametrize("kind", CASES)
def test_compiled(kind: str):
    case = CASES[kind]
    arguments = on_gpu(case)
    function = torch.compile(lambda **kwargs: call(case, kwargs) * 2, fullgraph=True)
    torch.testing.assert_close(function(**arguments), call(case, arguments) * 2)


def test_spatial_support_equals_that_of_the_cpu():
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1),
        ModulatedDeformConv2dPack(4, 4, 3, stride=2, padding=1),
        DeformConv2dPack(4, 4, 3, padding=1),
    ).double()
    for layer in network[1:]:
        torch.nn.init.normal_(layer.conv_offset.weight, std=0.1)
    image, node = torch.rand(3, 24, 24, dtype=torch.float64), ("2", 5, 6)
    found = {}
    for device in ("cpu", "cuda"):
        network.to(device)
        arguments = (network, image.to(device), node)
        points, effective = sampling_locations(*arguments), effective_sampling_locations(*arguments)
        found[device] = [
            *(value.cpu() for item in (points, effective) for value in (item.positions, item.strength)),
            effective_receptive_field(*arguments).cpu(),
            error_bounded_saliency_region(*arguments, cell=2).mask.cpu(),
            torch.cat([layer.offsets for layer in offset_statistics(*arguments[:2]).values()]),
        ]
    for cpu, cuda in zip(found["cpu"], found["cuda"]):
        torch.testing.assert_close(cuda.double().sum(0), cpu.double().sum(0))
