"""Tests that need a GPU: streams, devices, arrays beyond 32-bit indices, real sizes. Other tests run there too."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import dcnops
from tests.cases import Case, ConvCase, assert_close, make_attention, make_conv
from tests.conftest import GpuRunner

pytestmark = pytest.mark.gpu


@pytest.fixture
def cupy():
    import cupy

    assert cupy.cuda.runtime.getDeviceCount() > 0, "these tests need a GPU"
    return cupy


def on_gpu(cupy, case: Case) -> dict:
    return {k: cupy.asarray(v) if isinstance(v, np.ndarray) else v for k, v in case.arguments().items()}


def test_the_current_stream_is_used(cupy):
    # The stream writes the input late, so the call must be ordered after that.
    case = make_conv(C=64, O=64, H=64, W=64)
    arrays = on_gpu(cupy, case)
    dcnops.deform_conv2d(**arrays)
    late = cupy.empty_like(arrays["input"])
    stream = cupy.cuda.Stream(non_blocking=True)
    busy = cupy.ones((4096, 4096), cupy.float32)
    cupy.cuda.Device().synchronize()
    with stream:
        for _ in range(10):
            busy = busy @ busy * 1e-4
        late[...] = arrays["input"]
        output = dcnops.deform_conv2d(**{**arrays, "input": late})
        gradients = dcnops.deform_conv2d_backward(
            cupy.asarray(case.grad_out), **{**arrays, "input": late}, needs=case.needs
        )
    stream.synchronize()
    assert_close(cupy.asnumpy(output), case.expected(), "float32")
    expected = case.expected_gradients()
    for name in case.needs:
        assert_close(cupy.asnumpy(getattr(gradients, name)), expected[name], "float32", name)


def test_a_second_device(cupy):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("this machine has one GPU")
    case = make_conv(N=2, C=8, O=4)
    with cupy.cuda.Device(1):
        arrays = on_gpu(cupy, case)
        grad_out = cupy.asarray(case.grad_out)
    with cupy.cuda.Device(0):
        output = dcnops.deform_conv2d(**arrays)
        gradients = dcnops.deform_conv2d_backward(grad_out, **arrays, needs=case.needs)
        assert cupy.cuda.Device().id == 0
    assert output.device.id == 1
    assert gradients.input.device.id == 1
    assert_close(cupy.asnumpy(output), case.expected(), "float32")
    with pytest.raises(dcnops.DeviceError, match="mask must be on device 1 like input, got device 0"):
        dcnops.deform_conv2d(**{**arrays, "mask": cupy.asarray(case.mask)})


def test_mixing_libraries_is_an_error(cupy):
    case = make_conv()
    arrays = on_gpu(cupy, case)
    with pytest.raises(dcnops.DeviceError, match="mask must be a cupy array like input, got a numpy array"):
        dcnops.deform_conv2d(**{**arrays, "mask": case.mask})


def test_concurrent_threads(cupy):
    cases = [make_conv(C=16, O=8, H=20, W=20, seed=seed) for seed in range(8)]
    expected = [case.expected() for case in cases]
    failures: list[BaseException] = []

    def work(case: ConvCase, output: np.ndarray) -> None:
        try:
            with cupy.cuda.Stream(non_blocking=True):
                for _ in range(5):
                    assert_close(GpuRunner().forward(case), output, "float32")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(cases, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def need_memory(cupy, gigabytes: int) -> None:
    free, _ = cupy.cuda.runtime.memGetInfo()
    if free < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of GPU memory, {free >> 30} are free")


def test_an_input_beyond_32_bit_indices(cupy):
    # Checks the last rows of an image of 2.2 billion elements.
    need_memory(cupy, 40)
    side, stride = 33_000, 1000
    image = cupy.zeros((1, 2, side, side), cupy.float16)
    image[:, :, -50:] = cupy.random.default_rng(0).standard_normal((1, 2, 50, side), dtype=cupy.float32)
    out = (side - 1) // stride + 1
    offset = cupy.full((1, 2, out, out), 0.25, cupy.float32)
    offset[:, 0, -1] = side - 20.75 - (out - 1) * stride  # the last samples are 20.75 rows above the border
    weight = cupy.ones((1, 2, 1, 1), cupy.float16)
    output = dcnops.deform_conv2d(image, offset, weight, stride=stride)
    lower, upper = image[0, :, -21, ::stride].sum(0), image[0, :, -20, ::stride].sum(0)
    right = image[0, :, -21, 1::stride].sum(0), image[0, :, -20, 1::stride].sum(0)
    left_value = 0.75 * lower.astype(cupy.float32) + 0.25 * upper.astype(cupy.float32)
    right_value = 0.75 * right[0].astype(cupy.float32) + 0.25 * right[1].astype(cupy.float32)
    expected = 0.75 * left_value[: len(right_value)] + 0.25 * right_value
    cupy.testing.assert_allclose(output[0, 0, -1, : len(right_value)].astype(cupy.float32), expected, atol=2e-2)
    gradients = dcnops.deform_conv2d_backward(
        cupy.ones_like(output), image, offset, weight, stride=stride, needs=("input",)
    )
    rows = gradients.input[0, :, -21:-19, ::stride].astype(cupy.float32)
    cupy.testing.assert_allclose(rows[:, 0], 0.75 * 0.75, atol=1e-3)
    cupy.testing.assert_allclose(rows[:, 1], 0.25 * 0.75, atol=1e-3)


def test_offsets_beyond_32_bit_indices(cupy):
    need_memory(cupy, 40)
    side = 33_000
    image = cupy.arange(side, dtype=cupy.float16)[None, None, None] % 128
    image = cupy.ascontiguousarray(cupy.broadcast_to(image, (1, 1, side, side)))
    offset = cupy.zeros((1, 2, side, side), cupy.float16)
    offset[:, 1] = 1
    weight = cupy.ones((1, 1, 1, 1), cupy.float16)
    output = dcnops.deform_conv2d(image, offset, weight)
    assert bool((output[0, 0, :, :-1] == image[0, 0, :, 1:]).all())
    assert bool((output[0, 0, :, -1] == 0).all())


SIZES = {"fused": {"C": 256, "O": 320, "H": 25, "W": 42}, "columns": {"C": 100, "O": 60, "H": 25, "W": 42, "D": 4}}
KINDS = [("float16", None), ("bfloat16", None), ("float32", "ieee"), ("float32", "tf32"), ("float32", "3xtf32")]
# TF32 has the 10 bits of float16.
TOLERANCE_OF = {"tf32": "float16"}


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype, precision", KINDS, ids=[precision or dtype for dtype, precision in KINDS])
@pytest.mark.parametrize("size", SIZES)
def test_real_sizes_in_each_precision_and_layout(cupy, size: str, dtype: str, precision: str | None, layout: str):
    case = make_conv(N=2, dtype=dtype, seed=7, spread=2.0, **SIZES[size])
    tolerance = TOLERANCE_OF.get(precision or "", dtype)
    arrays = on_gpu(cupy, case)
    grad_out = cupy.asarray(case.grad_out)
    images = ("input", "offset", "mask")
    if layout == "NHWC":
        arrays |= {name: cupy.ascontiguousarray(moved(arrays[name], to="NHWC")) for name in images}
        grad_out = cupy.ascontiguousarray(moved(grad_out, to="NHWC"))
    options = {"layout": layout, "precision": precision}
    output = dcnops.deform_conv2d(**arrays, **options)
    gradients = dcnops.deform_conv2d_backward(grad_out, **arrays, **options)._asdict()
    results = {"output": output, **gradients}
    if layout == "NHWC":
        results |= {name: moved(results[name], to="NCHW") for name in ("output", *images)}
    expected = {"output": case.expected(), **case.expected_gradients()}
    for name, array in expected.items():
        assert_close(cupy.asnumpy(results[name]), array, tolerance, name)


def moved(array, to: str):
    return array.transpose(0, 2, 3, 1) if to == "NHWC" else array.transpose(0, 3, 1, 2)


@pytest.mark.parametrize("deterministic", [False, True], ids=["any order", "deterministic"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_capture_in_a_graph_of_cupy(cupy, dtype: str, deterministic: bool):
    # Each replay of the graph must read the inputs again.
    case = make_conv(N=2, C=64, O=64, H=20, W=20, dtype=dtype)
    arrays, grad_out = on_gpu(cupy, case), cupy.asarray(case.grad_out)

    def call():
        output = dcnops.deform_conv2d(**arrays)
        return output, dcnops.deform_conv2d_backward(grad_out, **arrays, deterministic=deterministic)

    pool = cupy.cuda.MemoryPool()
    stream = cupy.cuda.Stream(non_blocking=True)
    with cupy.cuda.using_allocator(pool.malloc), stream:
        # The memory that the graph uses must be in the pool before the capture.
        call()
        stream.synchronize()
        stream.begin_capture()
        output, gradients = call()
        graph = stream.end_capture()
        arrays["input"] *= 2
        graph.launch(stream)
        stream.synchronize()
    doubled = case.with_arrays(input=2 * case.input)
    assert_close(cupy.asnumpy(output), doubled.expected(), dtype)
    expected = doubled.expected_gradients()
    for name in case.needs:
        assert_close(cupy.asnumpy(getattr(gradients, name)), expected[name], dtype, name)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_deterministic_gradients(cupy, dtype: str):
    case = make_conv(N=2, C=64, O=64, H=40, W=40, spread=8.0, dtype=dtype)
    arrays, grad_out = on_gpu(cupy, case), cupy.asarray(case.grad_out)
    runs = [dcnops.deform_conv2d_backward(grad_out, **arrays, deterministic=True) for _ in range(10)]
    for run in runs[1:]:
        for ours, first in zip(run, runs[0]):
            assert bool((ours.view(cupy.uint8) == first.view(cupy.uint8)).all())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_attention_of_an_encoder(cupy, dtype: str):
    shapes = ((25, 42), (13, 21), (7, 11))
    options = {"M": 8, "D": 32, "points": 4, "spread": 0.3, "dtype": dtype, "offset_dtype": "float32"}
    case = make_attention(N=2, Lq=300, spatial_shapes=shapes, **options)
    arrays, grad_out = on_gpu(cupy, case), cupy.asarray(case.grad_out)
    arrays["spatial_shapes"] = cupy.asarray(shapes)
    assert_close(cupy.asnumpy(dcnops.ms_deform_attn(**arrays)), case.expected(), dtype)
    expected = case.expected_gradients()
    runs = [dcnops.ms_deform_attn_backward(grad_out, **arrays, deterministic=True) for _ in range(5)]
    for run in (runs[0], dcnops.ms_deform_attn_backward(grad_out, **arrays)):
        for name in case.needs:
            assert_close(cupy.asnumpy(getattr(run, name)), expected[name], dtype, name)
    for run in runs[1:]:
        for ours, first in zip(run, runs[0]):
            assert bool((ours.view(cupy.uint8) == first.view(cupy.uint8)).all())


def test_an_attention_value_beyond_32_bit_indices(cupy):
    # The samples are at the centers of the last pixels of 2.3 billion elements.
    need_memory(cupy, 40)
    height, width, D = 9000, 8000, 32
    value = cupy.zeros((1, height * width, 1, D), cupy.float16)
    value[0, -width:] = cupy.arange(width, dtype=cupy.float16)[:, None, None] % 128
    x = (cupy.arange(width, dtype=cupy.float32) + 0.5) / width
    locations = cupy.stack([x, cupy.full(width, 1 - 0.5 / height, cupy.float32)], axis=1)
    arrays = [[(height, width)], locations.reshape(1, width, 1, 1, 1, 2), cupy.ones((1, width, 1, 1, 1), cupy.float32)]
    output = dcnops.ms_deform_attn(value, *arrays)
    cupy.testing.assert_allclose(output[0], value[0, -width:, 0], atol=0.3)
    gradients = dcnops.ms_deform_attn_backward(cupy.ones_like(output), value, *arrays, needs=("value",))
    assert abs(float(gradients.value[0, -width:, 0].sum(dtype=cupy.float64)) / output.size - 1) < 2e-3
    assert not bool(gradients.value[0, : -2 * width].any())
