"""Robustness: memory over many calls, fuzzed arguments, threads, worker processes and corrupted caches."""

from __future__ import annotations

import errno
import gc
import importlib.util
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numba.core import caching

import dcnops
from dcnops import DcnError
from dcnops._backends.cpu import compiled

ROOT = Path(__file__).resolve().parents[2]
WARM = 100  # calls before the first measurement
SOAK = WARM + int(os.environ.get("DCNOPS_SOAK_CALLS", "300"))
GROWTH = 24 * 2**20  # bytes that the allocator may keep


def convolve(*arrays: Any, grad_out: Any = None, **options: Any) -> list[np.ndarray]:
    """Return the output and all gradients of a convolution."""
    output = dcnops.deform_conv2d(*arrays, **options)
    gradients = dcnops.deform_conv2d_backward(output if grad_out is None else grad_out, *arrays, **options)
    return [output, *(gradient for gradient in gradients if gradient is not None)]


def pool(*arrays: Any, grad_out: Any = None, **options: Any) -> list[np.ndarray]:
    """Return the output and all gradients of a RoI pooling."""
    output = dcnops.deform_roi_pool(*arrays, **options)
    gradients = dcnops.deform_roi_pool_backward(output if grad_out is None else grad_out, *arrays, **options)
    return [output, *(gradient for gradient in gradients if gradient is not None)]


def random_call(rng: np.random.Generator) -> list[np.ndarray]:
    """Return the output and gradients of a random legal call of either operation."""
    dtype = rng.choice([np.float16, np.float32, np.float64])

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    N, G, D = int(rng.integers(0, 4)), int(rng.integers(1, 3)), int(rng.integers(1, 3))
    C, O = 2 * G * int(rng.integers(1, 9)), G * int(rng.integers(1, 9))
    H, W = (int(size) for size in rng.integers(6, 40, 2))
    image = random(N, C, H, W)
    if rng.random() < 0.5:
        kh, kw = (int(size) for size in rng.integers(1, 4, 2))
        oh, ow = H + 2 - kh + 1, W + 2 - kw + 1
        offset = (3 * random(N, 2 * D * kh * kw, oh, ow)).astype(dtype)
        mask = random(N, D * kh * kw, oh, ow) if rng.random() < 0.5 else None
        return convolve(image, offset, random(O, C // G, kh, kw), padding=1, mask=mask)
    R = int(rng.integers(0, 9)) if N else 0
    corners = rng.uniform(-4, 40, (R, 4))
    rois = np.concatenate([rng.integers(0, max(N, 1), (R, 1)), corners], axis=1).astype(np.float32)
    return pool(image, rois, random(R, 2, 3, 3), random(R, 3, 3), output_size=3)


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is measured on Linux only")
def test_memory_does_not_grow() -> None:
    rng = np.random.default_rng(0)
    for _ in range(WARM):
        random_call(rng)
    gc.collect()
    before = resident()
    for _ in range(SOAK - WARM):
        random_call(rng)
    gc.collect()
    assert resident() - before < GROWTH, f"{(resident() - before) / 2**20:.1f} MiB"


FLOATS = [np.float16, np.float32, np.float64]
ODD_DTYPES = [np.int32, np.uint8, np.complex64, np.bool_, object, ">f4", "U3"]
SIZES = st.integers(0, 5)


@st.composite
def anything(draw: st.DrawFn) -> Any:
    """Draw an array of any kind, or something else."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.sampled_from([None, 3, 1.5, "text", [[1.0]], (), {}, float("nan"), b"x", object()]))
    shape = tuple(draw(st.lists(SIZES, max_size=6 if kind == 1 else 4, min_size=0 if kind == 1 else 4)))
    dtype = draw(st.sampled_from(ODD_DTYPES if kind == 2 else FLOATS))
    array = np.ones(shape, dtype)
    if array.dtype.kind == "f" and array.size:
        value = draw(st.sampled_from([0.5, -1.0, np.nan, np.inf, -np.inf, 1e30, 6e4]))
        with np.errstate(over="ignore"):
            array[...] = value
    if kind == 3 and array.ndim:
        array = array[..., ::-1]
    if kind == 4:
        array = array.T
    return array


NUMBERS = st.one_of(
    st.integers(-3, 4),
    st.sampled_from(
        [2**31, 2**63, -(2**70), 1.0, 1.5, float("nan"), None, "2", [1], (1, 2), (1, 2, 3), ((1, 0), (0, 2))]
    ),
    st.sampled_from([True, np.int64(1), np.float32(2), np.array(1), np.array([1, 2])]),
)
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def survive(function: Any, *args: Any, **kwargs: Any) -> None:
    """Check that a call succeeds or raises an error of the library."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            function(*args, **kwargs)
        except DcnError as error:
            assert str(error)


@FUZZ
@given(st.lists(anything(), min_size=5, max_size=5), st.lists(NUMBERS, min_size=3, max_size=3), st.data())
def test_convolutions_survive_any_arguments(arrays: list[Any], numbers: list[Any], data: st.DataObject) -> None:
    options = {"layout": data.draw(st.sampled_from(["NCHW", "NHWC", "x", None, 3]))}
    survive(dcnops.deform_conv2d, *arrays[:3], arrays[3], *numbers, arrays[4], **options)
    needs = data.draw(st.sampled_from([("input",), "offset", (), ("x",), None, 3, ("mask", "weight", "bias")]))
    survive(dcnops.deform_conv2d_backward, arrays[3], *arrays[:3], *numbers, arrays[4], needs=needs, **options)


@FUZZ
@given(st.lists(anything(), min_size=5, max_size=5), st.lists(NUMBERS, min_size=4, max_size=4))
def test_poolings_survive_any_arguments(arrays: list[Any], numbers: list[Any]) -> None:
    options = dict(zip(("output_size", "spatial_scale", "sampling_ratio", "gamma"), numbers))
    survive(dcnops.deform_roi_pool, *arrays[:4], **options)
    survive(dcnops.deform_roi_pool_backward, arrays[4], *arrays[:4], **options)


@FUZZ
@given(st.data())
def test_legal_calls_survive_any_values(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(FLOATS))

    def extreme(*shape: int) -> np.ndarray:
        values = [0.0, -1.0, 0.5, 1e30, -1e30, np.nan, np.inf, -np.inf, 2.0**31, -(2.0**63)]
        drawn = np.resize(data.draw(st.lists(st.sampled_from(values), min_size=1, max_size=7)), shape)
        with np.errstate(over="ignore"):
            return drawn.astype(dtype)

    image, mask = extreme(1, 2, 4, 3), extreme(1, 4, 3, 2)
    rois, scale = extreme(2, 5), data.draw(st.sampled_from([1.0, 1e-30, 1e30, 0.25]))
    rois[:, 0] = 0
    options = {"output_size": 2, "spatial_scale": scale, "sampling_ratio": data.draw(st.sampled_from([1, 2]))}
    bins = {"offset": extreme(2, 2, 2, 2), "mask": extreme(2, 2, 2), "grad_out": extreme(2, 2, 2, 2)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convolve(image, extreme(1, 8, 3, 2), extreme(3, 2, 2, 2), mask=mask, grad_out=extreme(1, 3, 3, 2))
        pool(image, rois, gamma=1e10, **bins, **options)


def test_threads_get_the_results_of_a_single_thread() -> None:
    expected = [random_call(np.random.default_rng(seed)) for seed in range(24)]
    barrier = threading.Barrier(8)

    def work(first: int) -> list[list[np.ndarray]]:
        barrier.wait()
        return [random_call(np.random.default_rng(seed)) for seed in range(first, 24, 8)]

    with ThreadPoolExecutor(8) as pool:
        for first, results in enumerate(pool.map(work, range(8))):
            for seed, found in zip(range(first, 24, 8), results):
                assert len(found) == len(expected[seed])
                for result, reference in zip(found, expected[seed]):
                    np.testing.assert_array_equal(result, reference)


def in_child(seed: int) -> bytes:
    return pickle.dumps(random_call(np.random.default_rng(seed)))


def each_start_method(exhaustive: str) -> pytest.MarkDecorator:
    """Parametrise `start_method`; the default run leaves out the method `exhaustive`."""
    methods = ("fork", "spawn", "forkserver")
    marks = {exhaustive: pytest.mark.exhaustive}
    return pytest.mark.parametrize(
        "start_method", [pytest.param(name, marks=marks.get(name, ())) for name in methods], indirect=True
    )


@pytest.fixture
def start_method(request: pytest.FixtureRequest) -> str:
    """Start method of worker processes, after this process has started its threads."""
    if request.param not in multiprocessing.get_all_start_methods():
        pytest.skip(f"{request.param} is not available here")
    random_call(np.random.default_rng(0))
    return str(request.param)


@pytest.mark.slow
@each_start_method(exhaustive="forkserver")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork in a process with threads
def test_worker_processes(start_method: str) -> None:
    expected = [in_child(seed) for seed in range(4)]
    with multiprocessing.get_context(start_method).Pool(2) as pool:
        assert pool.map_async(in_child, range(4)).get(timeout=120) == expected


class Samples:
    """Data set that deforms its images with PyTorch."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        import torch  # here, because the worker processes of other tests do without it

        from dcnops.adapters.torch import deform_conv2d

        random = torch.Generator().manual_seed(index)
        image = torch.randn(1, 4, 9, 8, generator=random)
        offset = torch.randn(1, 18, 9, 8, generator=random)
        weight = torch.randn(3, 4, 3, 3, generator=random)
        return deform_conv2d(image, offset, weight, padding=1)[0]


@pytest.mark.slow
@each_start_method(exhaustive="spawn")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_data_loaders_of_torch(start_method: str) -> None:
    torch = pytest.importorskip("torch")
    samples = Samples()
    expected = torch.stack([samples[index] for index in range(len(samples))])
    options: dict[str, Any] = {"batch_size": 2, "num_workers": 2, "timeout": 120}
    loader = torch.utils.data.DataLoader(samples, multiprocessing_context=start_method, **options)
    torch.testing.assert_close(torch.cat(list(loader)), expected, rtol=0, atol=0)


USE = """
import numpy as np, dcnops, sys
x = np.ones((1, 1, 3, 3), np.float32)
out = dcnops.deform_conv2d(x, np.zeros((1, 2, 3, 3), np.float32), np.ones((1, 1, 1, 1), np.float32))
assert out.sum() == 9
"""


def use(cache: Path, code: str = USE) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    command = [sys.executable, "-W", "always", "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


LOOPS = """
from dcnops._backends.cpu.compiled import inner, kernel

@inner()
def product(a, x):
    return a * x

@kernel
def double(x):
    return product(2, x)
"""


def load_loops(folder: Path) -> Any:
    """Import a new module with a compiled function and return the function. Its cache is in `folder`."""
    source = folder / "loops.py"
    if not source.exists():
        source.write_text(LOOPS)
    spec = importlib.util.spec_from_file_location("loops", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.double


def misses(function: Any) -> int:
    """Call the function, and return how many compilations that took."""
    assert function(3.5) == 7
    return sum(function.stats.cache_misses.values())


DAMAGES = pytest.mark.parametrize("damage", [b"", b"garbage", None])
CACHE_FILES = pytest.mark.parametrize("pattern", ["*.nbi", "*.nbc"])


def damage_files(folder: Path, pattern: str, damage: bytes | None) -> dict[Path, bytes]:
    files = sorted(folder.rglob(pattern))
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:-20] if damage is None else damage)
    return {file: file.read_bytes() for file in files}


@CACHE_FILES
@DAMAGES
def test_a_corrupted_cache_is_rebuilt(pattern: str, damage: bytes | None, tmp_path: Path) -> None:
    assert misses(load_loops(tmp_path)) == 1
    assert misses(load_loops(tmp_path)) == 0
    damaged = damage_files(tmp_path, pattern, damage)
    assert misses(load_loops(tmp_path)) == 1
    assert all(file.read_bytes() != content for file, content in damaged.items())
    assert misses(load_loops(tmp_path)) == 0


@pytest.mark.skipif(compiled.INTERPRETED, reason="needs compiled loops")
def test_only_kernels_become_machine_code(tmp_path: Path) -> None:
    double = load_loops(tmp_path)
    assert double(3.5) == 7
    for function, has_code in ((double, True), (double.py_func.__globals__["product"], False)):
        (result,) = function.overloads.values()
        address = result.library.get_pointer_to_function(result.fndesc.llvm_func_name)
        assert bool(address) == has_code


def test_a_long_compilation_is_announced_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled, "_ANNOUNCE_SECONDS", 0.01)
    with caplog.at_level("INFO", logger="dcnops"):
        double = load_loops(tmp_path)
        assert double(3.5) == 7 and double(3) == 6
        assert load_loops(tmp_path)(3.5) == 7
    (message,) = caplog.messages
    assert message.startswith("compiling loops for the CPU") and str(tmp_path) in message


@pytest.mark.exhaustive
@CACHE_FILES
@DAMAGES
def test_a_corrupted_cache_of_the_operations_is_rebuilt(pattern: str, damage: bytes | None, tmp_path: Path) -> None:
    assert use(tmp_path).returncode == 0
    damaged = damage_files(tmp_path, pattern, damage)
    result = use(tmp_path)
    assert result.returncode == 0, result.stderr
    assert all(file.read_bytes() != content for file, content in damaged.items())
    assert use(tmp_path, f"{USE}\nfrom dcnops._backends.cpu import deform_conv2d_loops\n{HITS}").stdout.strip() == "0"


HITS = (
    "print(sum(sum(f.stats.cache_misses.values()) for f in vars(deform_conv2d_loops).values() if hasattr(f, 'stats')))"
)


def warnings_of(folder: Path) -> list[str]:
    """Compile and call two functions, and return the warnings."""
    compiled._warn.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert misses(load_loops(folder)) == 1
    return [str(warning.message) for warning in caught]


def test_a_missing_cache_folder_is_only_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    (warning,) = warnings_of(tmp_path)
    assert warning.startswith("dcnops cannot keep its compiled CPU code") and "NUMBA_CACHE_DIR" in warning


def test_a_full_disk_is_only_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "some.nbi")

    monkeypatch.setattr(caching.IndexDataCacheFile, "save", save)
    (warning,) = warnings_of(tmp_path)
    assert "some.nbi: No space left on device" in warning


FORKS = """
import os, signal, sys, threading, time, warnings
import numpy as np, dcnops
warnings.simplefilter("ignore", DeprecationWarning)
def call():
    dcnops.deform_roi_pool(np.ones((1, 1, 4, 4), np.float32), np.array([[0, 0, 0, 3, 3]], np.float32), output_size=1)
def compile():
    from numba.core.compiler_lock import global_compiler_lock
    with global_compiler_lock:  # as every compilation does
        begun.set()
        time.sleep(0.3)
def first_call():
    begun.set()
    call()
def prefetch():
    begun.set()
    dcnops.prefetch(dtypes=["float32"])
def compute():
    begun.set()
    for _ in range(3000):
        call()
if sys.argv[1] in ("compile", "compute"):
    call()
begun = threading.Event()
other = threading.Thread(target=globals()[sys.argv[1]])
other.start()
begun.wait()
time.sleep(0.1)
child = os.fork()
if child == 0:
    signal.alarm(240)  # a busy machine takes long to compile
    call()
    os._exit(0)
other.join()
assert os.waitpid(child, 0)[1] == 0, "the child hangs"
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("step", ["first_call", "compile", "prefetch", "compute"])
def test_a_fork_next_to_a_first_call(step: str) -> None:
    subprocess.run([sys.executable, "-c", FORKS, step], cwd=ROOT, check=True, timeout=300)


IMPORTS = """
import sys
import numpy as np, dcnops
from dcnops import _forks
from tests.cases import make_conv, make_roi_pool
unguarded = []
class Finder:
    def find_spec(self, name, path=None, target=None):
        numba = sys.modules.get("numba.core.compiler_lock")
        compiling = numba is not None and numba.global_compiler_lock.is_locked()
        if not _forks._IMPORTS._is_owned() and not compiling:
            unguarded.append(name)
cases = make_conv(dtype="bfloat16"), make_roi_pool()
sys.meta_path.insert(0, Finder())
for case in cases:
    getattr(dcnops, case.operation)(**case.arguments())
    getattr(dcnops, f"{case.operation}_backward")(case.grad_out, **case.arguments())
print(unguarded)
"""


@pytest.mark.slow
def test_a_first_call_imports_only_what_a_fork_waits_for() -> None:
    """A child that is forked during any other import would wait for it forever."""
    command = [sys.executable, "-c", IMPORTS]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "[]", result.stderr


INTERRUPTED = """
import builtins, sys
import numpy as np, dcnops
original, hits = builtins.__import__, 0
def interrupt(name, *args, **kwargs):
    global hits
    hits += name.startswith("numba.core")
    if hits == 40:
        hits += 1
        raise KeyboardInterrupt
    return original(name, *args, **kwargs)
builtins.__import__ = interrupt
def call():
    x = np.ones((1, 1, 4, 4), np.float32)
    return dcnops.deform_roi_pool(x, np.array([[0, 0, 0, 3, 3]], np.float32), output_size=1).item()
try:
    call()
except KeyboardInterrupt:
    print(call())
"""


@pytest.mark.slow
def test_a_call_works_after_an_interrupted_import() -> None:
    command = [sys.executable, "-c", INTERRUPTED]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "1.0", result.stderr


INTERPRETED = """
import sys
from numba import config
assert config.DISABLE_JIT
import dcnops, numpy as np
from tests.cases import assert_close, make_conv, make_roi_pool
np.seterr(all="raise")
for case in (make_conv(N=1, C=4, O=4, H=3, W=4, G=2, D=2), make_roi_pool(N=1, C=2, R=2, output_size=2)):
    assert_close(getattr(dcnops, case.operation)(**case.arguments()), case.expected(), "float32")
    gradients = getattr(dcnops, f"{case.operation}_backward")(case.grad_out, **case.arguments())._asdict()
    for name, expected in case.expected_gradients().items():
        assert_close(gradients[name], expected, "float32", name)
"""


@pytest.mark.slow
def test_the_backend_works_without_the_compiler() -> None:
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    subprocess.run([sys.executable, "-W", "error", "-c", INTERPRETED], cwd=ROOT, env=environment, check=True)


@pytest.mark.parametrize("dtype", FLOATS)
def test_no_error_state_of_numpy_changes_a_call(dtype: type) -> None:
    def calls() -> list[np.ndarray]:
        x = np.full((1, 2, 4, 4), 1e-4, dtype)
        x[0, 0, 0] = np.finfo(dtype).max
        grad_out = np.full((1, 1, 4, 4), np.finfo(dtype).max, dtype)
        grad_out[0, 0, 0, :2] = np.inf, -np.inf
        offset, mask = np.full((1, 2, 4, 4), 0.1, dtype), np.full((1, 1, 4, 4), 3, dtype)
        arrays = convolve(x, offset, np.full((1, 2, 1, 1), 1e-4, dtype), mask=mask, grad_out=grad_out)
        arrays += dcnops.deform_conv2d_backward(
            grad_out, x, offset, np.ones((1, 2, 1, 1), dtype), np.zeros(1, dtype), needs="bias"
        )[3:4]
        rois = np.array([[0, 1e-300, 0, 3, 3], [0, 0, 0, 1e300, 3]])
        options = {"spatial_scale": 3e38, "gamma": -3e38, "output_size": 1}
        shift = np.full((2, 2, 1, 1), np.inf, dtype)
        arrays += pool(x, rois, shift, np.ones((2, 1, 1), dtype), grad_out=np.ones((2, 2, 1, 1), dtype), **options)
        return arrays

    with np.errstate(all="ignore"):
        expected = calls()
    with np.errstate(all="raise"):
        strict = calls()
    with warnings.catch_warnings(), np.errstate(all="warn"):
        warnings.simplefilter("error")
        warned = calls()
    for arrays in (strict, warned):
        for array, reference in zip(arrays, expected, strict=True):
            np.testing.assert_array_equal(array, reference)
