"""The emulator catches each misuse of CUDA that its README.md lists."""

from __future__ import annotations

import ctypes
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcnops._errors import KernelCompileError
from tests.cuda.emulator import (
    HostArrays,
    HostCompiler,
    HostKernel,
    KernelFault,
    host_compiler,
    host_engine,
    is_sanitized,
    matmul,
    reports_of_each,
    run_sanitized,
)

xp = HostArrays()

SCHEDULES = [("forward", 0), ("reverse", 0), *(("random", seed) for seed in range(6))]


class Params(ctypes.Structure):
    _fields_ = [("x", ctypes.c_void_p), ("y", ctypes.c_void_p), ("n", ctypes.c_int), ("m", ctypes.c_int)]


PRELUDE = """
struct Params { const float* x; float* y; int n, m; };
"""


def compile_kernel(body: str, **options: Any) -> HostKernel:
    """Compile a kernel of the statements `body`. Reports call their first line ``cuda/test.cu:1``."""
    source = f'{PRELUDE}extern "C" __global__ void __launch_bounds__(1024) test_f32(const Params p) {{\n'
    source += f'#line 1 "cuda/test.cu"\n{body}\n}}\n'
    return HostCompiler(sanitize=is_sanitized(), **options).compile(source, "test_f32", ("--std=c++17",))


def run(
    kernel: HostKernel,
    x: np.ndarray | None = None,
    y: np.ndarray | None = None,
    *,
    grid: int = 1,
    block: tuple[int, int] = (32, 1),
    shared_bytes: int = 0,
    n: int = 0,
    m: int = 0,
) -> None:
    addresses = (None if array is None else array.ctypes.data for array in (x, y))
    kernel(grid, block, shared_bytes, Params(*addresses, n, m))


# ---- correct kernels pass under every schedule

REDUCTION = """
DCN_SHARED_MEMORY(raw);
float* s = reinterpret_cast<float*>(raw);
for (int i = blockIdx.x; i < p.m; i += gridDim.x) {
    float sum = 0.0f;
    for (int j = threadIdx.x; j < p.n; j += blockDim.x) sum += p.x[i * p.n + j];
    s[threadIdx.x] = sum;
    __syncthreads();
    for (int half = blockDim.x / 2; half >= 32; half /= 2) {
        if (threadIdx.x < half) s[threadIdx.x] += s[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x < 32) {
        sum = s[threadIdx.x];
        for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, by);
        if (threadIdx.x == 0) p.y[i] = sum;
    }
    __syncthreads();
}
"""


def check_reduction(**options: Any) -> None:
    x = xp.asarray(np.random.default_rng(0).integers(-9, 9, (7, 333)).astype(np.float32))
    y = xp.empty(7, np.float32)
    run(compile_kernel(REDUCTION, **options), x, y, grid=5, block=(256, 1), shared_bytes=1024, n=333, m=7)
    np.testing.assert_array_equal(y, x.sum(1))


@pytest.mark.parametrize(("schedule", "seed"), SCHEDULES)
@pytest.mark.parametrize("options", [{}, {"threads": 3}, {"single_block": True}], ids=str)
def test_a_correct_reduction_passes(schedule: str, seed: int, options: dict[str, Any]) -> None:
    check_reduction(schedule=schedule, seed=seed, **options)


def test_a_correct_reduction_passes_with_the_portable_switch_of_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_compiler, "_PLAIN", (*host_compiler._PLAIN, "-DCUDA_ON_CPU_UCONTEXT"))
    check_reduction(schedule="random", threads=2)


def test_every_thread_sees_its_indices() -> None:
    kernel = compile_kernel(
        """int* y = reinterpret_cast<int*>(p.y);
        const int t = (blockIdx.x * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
        y[4 * t] = blockIdx.x * 10000 + threadIdx.y * 100 + threadIdx.x;
        y[4 * t + 1] = gridDim.x; y[4 * t + 2] = blockDim.x; y[4 * t + 3] = blockDim.y;
        y[4 * t + 3] *= gridDim.y * gridDim.z * blockDim.z;"""
    )
    y = xp.empty((6, 5, 7, 4), np.int32)
    run(kernel, y=y, grid=6, block=(7, 5))
    block, row, column = np.indices((6, 5, 7))
    np.testing.assert_array_equal(y[..., 0], block * 10000 + row * 100 + column)
    assert (y[..., 1:] == (6, 7, 5)).all()


# ---- memory


def test_unwritten_arrays_are_nan() -> None:
    y = xp.empty(40, np.float32)
    run(compile_kernel("p.y[threadIdx.x] = 1.0f;"), y=y)
    np.testing.assert_array_equal(y, [*32 * [1], *8 * [np.nan]])
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float64):
        assert np.isnan(xp.empty((2, 3), dtype).astype(np.float64)).all()


def test_shared_memory_starts_as_nan_in_every_block() -> None:
    kernel = compile_kernel(
        """DCN_SHARED_MEMORY(raw);
        float* s = reinterpret_cast<float*>(raw);
        p.y[blockIdx.x * blockDim.x + threadIdx.x] = s[threadIdx.x];
        s[threadIdx.x] = 1.0f;"""
    )
    y = xp.zeros(96, np.float32)
    run(kernel, y=y, grid=3, shared_bytes=128)
    assert np.isnan(y).all()


@pytest.mark.skipif(is_sanitized(), reason="AddressSanitizer would end the process")
def test_a_write_after_the_end_of_shared_memory_is_a_fault() -> None:
    kernel = compile_kernel("DCN_SHARED_MEMORY(raw); reinterpret_cast<float*>(raw)[threadIdx.x] = 0.0f;")
    run(kernel, shared_bytes=128)
    with pytest.raises(KernelFault, match="shared memory written at byte 124 of 124"):
        run(kernel, shared_bytes=124)


def test_arrays_are_aligned_and_copied_as_on_a_gpu() -> None:
    for size in (0, 1, 5, 1000):
        assert xp.empty(size, np.uint8).ctypes.data % 256 == 0
    host = np.arange(6, dtype=np.float32).reshape(2, 3)
    device = xp.asarray(host)
    assert not np.shares_memory(host, device)
    assert xp.asarray(device) is device
    np.testing.assert_array_equal(xp.ascontiguousarray(device.T), host.T)
    assert xp.ascontiguousarray(device) is device
    assert not xp.zeros((2, 3), np.int16).any()
    assert xp.float32 is np.float32


def test_an_asynchronous_copy_happens_at_its_wait() -> None:
    body = """DCN_SHARED_MEMORY(raw);
        float* s = reinterpret_cast<float*>(raw);
        using cuda_on_cpu::Site;
        cuda_on_cpu::copy_async(s + 8 * threadIdx.x, p.x, 16, 16, Site::here("cp.async"));
        cuda_on_cpu::copy_async_commit();
        cuda_on_cpu::copy_async(s + 8 * threadIdx.x + 4, p.x, 16, 8, Site::here("cp.async"));
        cuda_on_cpu::copy_async_commit();
        cuda_on_cpu::copy_async_wait(1);
        for (int i = 0; i < 8; ++i) p.y[8 * threadIdx.x + i] = s[8 * threadIdx.x + i];
        if (p.n) cuda_on_cpu::copy_async_wait(0);
        for (int i = 0; i < 8; ++i) p.y[8 * threadIdx.x + i + 256] = s[8 * threadIdx.x + i];"""
    kernel = compile_kernel(body)
    x, y = xp.asarray(np.arange(1, 5, dtype=np.float32)), xp.empty((2, 32, 8), np.float32)
    run(kernel, x, y, shared_bytes=1024, n=1)
    np.testing.assert_array_equal(y[0], np.broadcast_to([1, 2, 3, 4, *4 * [np.nan]], (32, 8)))
    np.testing.assert_array_equal(y[1], np.broadcast_to([1, 2, 3, 4, 1, 2, 0, 0], (32, 8)))
    with pytest.raises(KernelFault, match=r"without waiting for its cp.async at cuda/test.cu:6"):
        run(kernel, x, y, shared_bytes=1024, n=0)


@pytest.mark.parametrize(
    ("ctype", "dtype"),
    [
        ("int", np.int32),
        ("unsigned", np.uint32),
        ("float", np.float32),
        ("double", np.float64),
    ],
)
def test_atomic_additions_of_several_os_threads(ctype: str, dtype: type) -> None:
    body = f"atomicAdd(reinterpret_cast<{ctype}*>(p.y) + threadIdx.x % 3, static_cast<{ctype}>(1));"
    kernel = compile_kernel(body, threads=4)
    y = xp.zeros(3, dtype)
    run(kernel, y=y, grid=2000, block=(96, 1))
    np.testing.assert_array_equal(y, np.full(3, 64000))


def test_bits_that_several_os_threads_set() -> None:
    body = "atomicOr(reinterpret_cast<unsigned*>(p.y) + blockIdx.x % 3, 1u << threadIdx.x);"
    kernel = compile_kernel(body, threads=4)
    y = xp.zeros(3, np.uint32)
    run(kernel, y=y, grid=300, block=(20, 1))
    np.testing.assert_array_equal(y, np.full(3, 2**20 - 1))


# ---- missing barriers


def rotates(barrier: str, **options: Any) -> bool:
    """Run a kernel that needs `barrier`, and return True if its result is correct."""
    kernel = compile_kernel(
        f"""DCN_SHARED_MEMORY(raw);
        float* s = reinterpret_cast<float*>(raw);
        const int t = threadIdx.x, next = t + 1 < blockDim.x ? t + 1 : t;
        s[t] = t;
        __syncthreads();
        const float read = s[next];
        {barrier}
        s[t] = -1.0f;
        p.y[t] = read;""",
        **options,
    )
    y = xp.empty(64, np.float32)
    run(kernel, y=y, block=(64, 1), shared_bytes=256)
    return bool((y == [*range(1, 64), 63]).all())


def test_a_missing_barrier_shows_under_some_schedule() -> None:
    for schedule, seed in SCHEDULES:
        assert rotates("__syncthreads();", schedule=schedule, seed=seed)
    assert rotates("", schedule="forward"), "this order must hide the fault, or the test proves nothing"
    assert not rotates("", schedule="reverse")
    assert not all(rotates("", schedule="random", seed=seed) for seed in range(6))


def test_a_seed_determines_the_order() -> None:
    def order(seed: int) -> list[int]:
        body = "reinterpret_cast<int*>(p.y)[atomicAdd(reinterpret_cast<int*>(p.y) + 64, 1)] = threadIdx.x;"
        y = xp.zeros(65, np.int32)
        run(compile_kernel(body, schedule="random", seed=seed), y=y, block=(64, 1))
        return list(y[:64])

    assert order(1) == order(1) != order(2)
    assert sorted(order(1)) == list(range(64)) != order(1)


# ---- divergence and deadlock are reported with file and line

FAULTS = {
    "barrier after an exit": (
        "if (threadIdx.x == 5) return;\n__syncthreads();",
        r"divergent __syncthreads.* waits at cuda/test.cu:2 .*thread \(5, 0, 0\), which has left",
    ),
    "barriers at two places": (
        "if (threadIdx.x < 7)\n  __syncthreads();\nelse\n  __syncthreads();",
        r"divergent __syncthreads: .*cuda/test.cu:(4.*cuda/test.cu:2|2.*cuda/test.cu:4)",
    ),
    "another number of rounds": (
        "for (int i = 0; i <= threadIdx.x / 16; ++i)\n  __syncthreads();",
        r"divergent __syncthreads.*cuda/test.cu:2.*has left",
    ),
    "shuffles at two places": (
        "if (threadIdx.x % 2)\n  p.y[0] = __shfl_sync(~0u, 1, 0);\nelse\n  p.y[0] = __shfl_sync(~0u, 2, 1);",
        r"divergent collective: .*__shfl_sync at cuda/test.cu:\d with mask 0xffffffff.*__shfl_sync at cuda/test.cu:\d",
    ),
    "two masks at one place": (
        "__ballot_sync(threadIdx.x < 16 ? 0x0003ffffu : ~0u, 1);",
        r"divergent collective: .*cuda/test.cu:1 with mask 0x(0003ffff.*0xffffffff|ffffffff.*0x0003ffff)",
    ),
    "shuffle after an exit": (
        "if (threadIdx.x == 3) return;\n__shfl_xor_sync(~0u, 1, 1);",
        r"divergent __shfl_xor_sync.*cuda/test.cu:2.*\(3, 0, 0\), which has left",
    ),
    "not in its own mask": (
        "__syncwarp(1u);",
        r"divergent __syncwarp at cuda/test.cu:1: lane \d+ is not in its own mask",
    ),
    "width": ("__shfl_sync(~0u, 1, 0, 24);", r"__shfl_sync at cuda/test.cu:1: width 24"),
    "deadlock": (
        "if (threadIdx.x == 0)\n  __any_sync(3u, 1);\nelse\n  __syncthreads();",
        r"deadlock.*waiting: 1 from \(0, 0, 0\) in __any_sync at cuda/test.cu:2 with mask 0x00000003; "
        r"31 from \(1, 0, 0\) in __syncthreads at cuda/test.cu:4",
    ),
    "assert": (
        "assert(threadIdx.x < 9);",
        r"thread \(\d+, 0, 0\): assertion 'threadIdx.x < 9' failed at cuda/test.cu:1",
    ),
    "misaligned atomic": (
        "atomicAdd(reinterpret_cast<int*>(reinterpret_cast<char*>(p.y) + 2), 1);",
        r"misaligned address of a 4-byte atomic",
    ),
    "misaligned copy": (
        'cuda_on_cpu::copy_async(p.y + 1, p.y, 16, 16, cuda_on_cpu::Site::here("cp.async"));',
        r"misaligned cp.async at cuda/test.cu:1",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize(("schedule", "seed", "threads"), [("forward", 0, 1), ("reverse", 0, 1), ("random", 1, 3)])
def test_a_fault_is_reported_and_the_next_launch_works(name: str, schedule: str, seed: int, threads: int) -> None:
    body, message = FAULTS[name]
    options = {"schedule": schedule, "seed": seed, "threads": threads}
    y = xp.zeros(8, np.float32)
    kernel = compile_kernel(body, **options)
    for _ in range(2):
        with pytest.raises(KernelFault, match=message) as fault:
            run(kernel, y=y, grid=4)
    assert str(fault.value).startswith("test_f32: block (")
    assert f"schedule {schedule}" in str(fault.value)
    check_reduction(**options)


def test_a_mask_with_lanes_that_do_not_exist_is_a_fault() -> None:
    with pytest.raises(KernelFault, match=r"cuda/test.cu:1: mask 0xffffffff names lanes that the block does not have"):
        run(compile_kernel("__syncwarp();"), block=(40, 1))


def test_half_warps_may_diverge() -> None:
    kernel = compile_kernel(
        """const unsigned mask = threadIdx.x < 16 ? 0x0000ffffu : 0xffff0000u;
        float v = threadIdx.x;
        for (int i = 0; i < (threadIdx.x < 16 ? 1 : 3); ++i) v += __shfl_xor_sync(mask, v, 1);
        p.y[threadIdx.x] = v;""",
        schedule="random",
    )
    y = xp.empty(32, np.float32)
    run(kernel, y=y)
    pairs = np.arange(32) // 2 * 4 + 1
    np.testing.assert_array_equal(y, np.where(np.arange(32) < 16, pairs, 4 * pairs))


def test_votes() -> None:
    kernel = compile_kernel(
        """unsigned* y = reinterpret_cast<unsigned*>(p.y) + 2 * threadIdx.x;
        y[0] = __ballot_sync(~0u, threadIdx.x % 2);
        y[1] = __any_sync(~0u, threadIdx.x == 40);"""
    )
    y = xp.empty((64, 2), np.uint32)
    run(kernel, y=y, block=(64, 1))
    np.testing.assert_array_equal(y, [*32 * [[0xAAAAAAAA, 0]], *32 * [[0xAAAAAAAA, 1]]])


SHUFFLE = """
struct ShuffleParams { const CTYPE* value; const int* by; CTYPE* result; unsigned mask; int width, mode; };
extern "C" __global__ void shuffle(const ShuffleParams p) {
    const int t = threadIdx.x;
    if (!(p.mask >> t & 1)) return;
    const CTYPE v = p.value[t];
    const int by = p.by[t];
    if (p.mode == 0) p.result[t] = __shfl_sync(p.mask, v, by, p.width);
    if (p.mode == 1) p.result[t] = __shfl_up_sync(p.mask, v, by, p.width);
    if (p.mode == 2) p.result[t] = __shfl_xor_sync(p.mask, v, by, p.width);
}
"""


class ShuffleParams(ctypes.Structure):
    _fields_ = [
        ("value", ctypes.c_void_p),
        ("by", ctypes.c_void_p),
        ("result", ctypes.c_void_p),
        ("mask", ctypes.c_uint),
        ("width", ctypes.c_int),
        ("mode", ctypes.c_int),
    ]


SHUFFLED = {"float": np.float32, "double": np.float64, "int": np.int32}


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    ctype=st.sampled_from(list(SHUFFLED)),
    mode=st.integers(0, 2),
    width=st.sampled_from([1, 2, 4, 8, 16, 32]),
    by=st.one_of(st.integers(0, 31).map(lambda n: [n] * 32), st.lists(st.integers(0, 31), min_size=32, max_size=32)),
    mask=st.one_of(st.just(0xFFFFFFFF), st.integers(1, 0xFFFFFFFF)),
    schedule=st.sampled_from(["forward", "reverse", "random"]),
)
def test_shuffles_match_their_definition(
    ctype: str, mode: int, width: int, by: list[int], mask: int, schedule: str
) -> None:
    dtype = SHUFFLED[ctype]
    value = xp.asarray((np.arange(32) * 3 + 1).astype(dtype))
    moves, result = xp.asarray(np.array(by, np.int32)), xp.empty(32, dtype)
    compiler = HostCompiler(schedule=schedule, seed=mask, sanitize=is_sanitized())
    kernel = compiler.compile(SHUFFLE.replace("CTYPE", ctype), "shuffle", ())
    kernel(1, (32, 1), 0, ShuffleParams(value.ctypes.data, moves.ctypes.data, result.ctypes.data, mask, width, mode))

    expected = xp.empty(32, dtype)
    for lane in range(32):
        if not mask >> lane & 1:
            continue
        first = lane // width * width
        source = (first + by[lane] % width, lane - by[lane], lane ^ by[lane])[mode]
        if (mode == 1 and source < first) or (mode == 2 and source >= first + width):
            source = lane
        if mask >> source & 1:
            expected[lane] = value[source]
    np.testing.assert_array_equal(result, expected)


# ---- compilation and launch


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache without compiled kernels."""
    shutil.copy(HostCompiler().scheduler(), tmp_path)
    return tmp_path


def test_a_cached_object_is_not_compiled_again(cache: Path) -> None:
    def build(source: str, options: tuple[str, ...]) -> tuple[int, HostKernel]:
        compiler = HostCompiler(cache)
        kernel = compiler.compile(f'{PRELUDE}extern "C" __global__ void k(const Params p) {{ {source} }}', "k", options)
        return compiler.builds, kernel

    y = xp.empty(1, np.float32)
    for options, source, builds, value in (
        (("-DVALUE=1",), "p.y[0] = VALUE;", 1, 1),
        (("-DVALUE=1", "--generate-line-info"), "p.y[0] = VALUE;", 0, 1),
        (("-DVALUE=2",), "p.y[0] = VALUE;", 1, 2),
        (("-DVALUE=2",), "p.y[0] = VALUE + 1;", 1, 3),
        (("-DVALUE=1",), "p.y[0] = VALUE;", 0, 1),
    ):
        made, kernel = build(source, options)
        assert made == builds
        run(kernel, y=y)
        assert y[0] == value


def test_concurrent_compilers_build_an_object_once(cache: Path) -> None:
    compilers = [HostCompiler(cache) for _ in range(4)]
    source = f'{PRELUDE}extern "C" __global__ void k(const Params p) {{}}'
    workers = [threading.Thread(target=compiler.compile, args=(source, "k", ())) for compiler in compilers]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sum(compiler.builds for compiler in compilers) == 1


def test_a_compile_error_names_file_and_line() -> None:
    with pytest.raises(KernelCompileError, match=r"cuda/test.cu:2:.*nonsense"):
        compile_kernel("int a = 0;\nnonsense(a);")
    with pytest.raises(KernelCompileError, match="dynamic shared memory only"):
        compile_kernel("__shared__ float s[32];")
    source = 'struct P { P(const P&); }; extern "C" __global__ void k(const P p) {}'
    with pytest.raises(KernelCompileError, match="plain data"):
        HostCompiler().compile(source, "k", ())


def test_a_missing_compiler_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(host_compiler, "_compiler", host_compiler._compiler.__wrapped__)
    with pytest.raises(RuntimeError, match="there is no g\\+\\+ on the PATH"):
        compile_kernel("")


def test_an_illegal_launch_is_a_fault() -> None:
    kernel = compile_kernel("")
    for arguments, message in (
        ({"grid": 0}, "a grid has from 1"),
        ({"block": (64, 32)}, "1024 threads, got"),
        ({"block": (32, 0)}, "1024 threads, got"),
        ({"shared_bytes": 240_000}, "bytes of shared memory, got 240000"),
    ):
        with pytest.raises(KernelFault, match=message):
            run(kernel, **arguments)  # type: ignore[arg-type]
    with pytest.raises(KernelFault, match="takes 24 bytes of parameters, got 40"):
        kernel(1, (32, 1), 0, ShuffleParams())


# ---- matrix products


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("wide_out", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
def test_matmul(name: str, wide_out: bool, accumulate: bool) -> None:
    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    wide = np.dtype(np.float64 if name == "float64" else np.float32)
    rng = np.random.default_rng(1)
    a, b = (rng.integers(-4, 5, shape).astype(dtype) for shape in ((3, 6, 5), (3, 4, 6)))
    out = xp.empty((3, 5, 4), wide if wide_out else dtype)
    expected = a.swapaxes(1, 2).astype(wide) @ b.swapaxes(1, 2).astype(wide)
    if accumulate:
        out[...] = 3
        expected += 3
    with host_engine().products() as multiply:
        multiply(a.swapaxes(1, 2), b.swapaxes(1, 2), out, accumulate)
    np.testing.assert_array_equal(out.astype(wide), expected)


def test_matmul_rejects_what_cublas_cannot_do() -> None:
    def zeros(*shape: int, dtype: type = np.float32) -> np.ndarray:
        return np.zeros(shape, dtype)

    a, b, out = zeros(2, 3, 4), zeros(2, 4, 5), zeros(2, 3, 5)
    matmul(a, b, out, False)
    matmul(np.broadcast_to(a[:1], (2, 3, 4)), b, out, False)
    matmul(zeros(2, 3, 8)[:, :, 2:6], b, zeros(2, 3, 9)[:, :, 3:8], False)
    matmul(zeros(2, 3, 4)[:, :1], b, zeros(2, 3, 5)[:, 1:2], True)
    bad: list[tuple[Callable[[], None], str]] = [
        (lambda: matmul(zeros(2, 3, 8)[:, :, ::2], b, out, False), "cannot take a"),
        (lambda: matmul(a, np.broadcast_to(zeros(2, 1, 5), (2, 4, 5)), out, False), "cannot take b"),
        (lambda: matmul(a, b, zeros(2, 5, 3).swapaxes(1, 2), False), "cannot take out"),
        (lambda: matmul(a, b, np.broadcast_to(zeros(1, 3, 5), (2, 3, 5)), False), "matrices of out overlap"),
        (lambda: matmul(a, b, out.astype(np.float64), False), "not float64"),
        (lambda: matmul(a.astype(np.float16), b, out, False), "one dtype"),
        (lambda: matmul(a, zeros(2, 3, 5), out, False), "matmul: "),
        (lambda: matmul(out, zeros(2, 5, 5), out, False), "overlaps a factor"),
    ]
    for call, message in bad:
        with pytest.raises(AssertionError, match=message):
            call()


# ---- the sanitizers

FINDINGS: dict[str, tuple[str, ...]] = {
    "read": ("\np.y[threadIdx.x] = p.x[threadIdx.x + 1];", "heap-buffer-overflow", "READ of size 4"),
    "write": ("\np.y[threadIdx.x + (threadIdx.x == 31)] = 1.0f;", "heap-buffer-overflow", "WRITE of size 4"),
    "write before": ("\np.y[static_cast<int>(threadIdx.x) - 1] = 1.0f;", "heap-buffer-overflow", "WRITE of size 4"),
    "shared memory": (
        "DCN_SHARED_MEMORY(raw);\n__syncthreads(); reinterpret_cast<float*>(raw)[threadIdx.x + 1] = 1.0f;",
        "heap-buffer-overflow",
        "WRITE of size 4",
    ),
    "misaligned": (
        "\n*reinterpret_cast<int4*>(p.y + 4 + threadIdx.x / 31 * 2) = make_int4(1, 2, 3, 4);",
        "runtime error",
        "misaligned address",
    ),
    "conversion": (
        "\np.y[static_cast<int>(p.x[0] * 1e20f) & 1] = 1.0f;",
        "runtime error",
        "is outside the range of representable values of type 'int'",
    ),
    "nothing": ("\np.y[threadIdx.x] = __shfl_xor_sync(~0u, p.x[threadIdx.x], 1); __syncthreads();",),
}


def sanitized_case(name: str) -> None:
    """Run one of `FINDINGS`. The tests below call this in new processes."""
    x, y = xp.asarray(np.ones(32, np.float32)), xp.empty(32, np.float32)
    run(compile_kernel(FINDINGS[name][0]), x, y, shared_bytes=128)
    for body, _ in FAULTS.values():
        with pytest.raises(KernelFault):
            run(compile_kernel(body), x, y)
    check_reduction(threads=2)
    print("survived", flush=True)


@pytest.mark.slow
@pytest.mark.skipif(is_sanitized(), reason="starts sanitized processes itself")
def test_the_sanitizers_report_the_line() -> None:
    imports = "from tests.cuda.emulator import run_each; from tests.cuda.test_emulator import FINDINGS, sanitized_case"
    done = run_sanitized(["-c", f"{imports}; run_each(FINDINGS, sanitized_case)"], timeout=120)
    assert (done.returncode, done.stdout) == (0, "survived\n"), done.stderr[-3000:]
    reports = reports_of_each(done.stderr)
    assert set(reports) == set(FINDINGS)
    assert reports.pop("nothing") == (0, "\n")
    for name, (status, report) in reports.items():
        assert status != 0
        for expected in (*FINDINGS[name][1:], "cuda/test.cu:2"):
            assert expected in report, f"{name}: {report[-3000:]}"


@pytest.mark.slow
@pytest.mark.skipif(is_sanitized(), reason="starts sanitized processes itself")
def test_pytest_keeps_the_report(tmp_path: Path) -> None:
    (tmp_path / "test_case.py").write_text(
        "from tests.cuda.test_emulator import sanitized_case\ndef test(): sanitized_case('misaligned')\n"
    )
    argv = ["-m", "pytest", "-p", "no:cacheprovider", str(tmp_path / "test_case.py")]
    done = run_sanitized(argv, timeout=120)
    assert done.returncode != 0
    assert "cuda/test.cu:2:58: runtime error: store to misaligned address" in done.stderr


@pytest.mark.skipif(is_sanitized(), reason="needs a process without the sanitizers")
def test_sanitized_kernels_need_a_sanitized_process() -> None:
    with pytest.raises(RuntimeError, match="run_sanitized"):
        host_engine(sanitize=True)
