"""``python -m dcnops`` gives the right advice, and `dcnops.prefetch` compiles everything."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dcnops
from dcnops.__main__ import main
from dcnops._diagnosis import MINIMUM, Backend, Cache, Environment, advise, format_report, inspect_environment
from tests.cases import DTYPES

ROOT = Path(__file__).resolve().parents[2]

HEALTHY = Environment(
    versions={"numpy": "2.4.6", "numba": "0.68.1", "torch": "2.15.0+cu132", "cupy-cuda13x": "14.2.0"},
    driver=13020,
    backends=[Backend("numpy", "CPU, 2 threads, znver4", None), Backend("cupy", "a GPU", None)],
    caches=[Cache("CPU code", "/cache/numba", 2**20, True), Cache("GPU code", "/cache/cupy", 2**21, True)],
)


def environment_with(**changes: Any) -> Environment:
    versions = {**HEALTHY.versions, **changes.pop("versions", {})}
    without = changes.pop("without", ())
    kept = {name: version for name, version in versions.items() if name not in without}
    return dataclasses.replace(HEALTHY, versions=kept, **changes)


def gpu_error(error: str) -> dict[str, Any]:
    return {"backends": [HEALTHY.backends[0], Backend("cupy", "a GPU", error)]}


def test_a_healthy_environment_needs_no_advice() -> None:
    assert advise(HEALTHY) == [] and HEALTHY.works
    text = format_report(HEALTHY)
    assert "numpy arrays: CPU, 2 threads, znver4; works" in text and "NVIDIA driver for CUDA 13.2" in text
    assert "/cache/cupy (2.0 MiB)" in text and "*" not in text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"driver": None, **gpu_error("CUDARuntimeError")}, "No NVIDIA driver was found"),
        ({"without": ["cupy-cuda13x"]}, r"no CuPy: pip install 'dcnops\[cuda13\]'"),
        ({"without": ["cupy-cuda13x"], "driver": 12040}, r"no CuPy: pip install 'dcnops\[cuda12\]'"),
        (
            {"versions": {"cupy-cuda12x": "14.2.0"}},
            "Several CuPy packages .* pip uninstall cupy-cuda13x cupy-cuda12x, then",
        ),
        (
            {"driver": 12040, **gpu_error("insufficient driver")},
            r"cupy-cuda13x needs a driver for CUDA 13, this one runs CUDA 12.4 .* 'dcnops\[cuda12\]'",
        ),
        (
            gpu_error('CompileException: catastrophic error: cannot open source file "cuda_fp16.h"'),
            r"does not find CUDA's headers: pip install 'cupy-cuda13x\[ctk\]'",
        ),
        (gpu_error("ImportError: libnvrtc.so.13: cannot open shared object file"), "does not find CUDA's libraries"),
        (gpu_error("CUDARuntimeError: cudaErrorNoDevice: no CUDA-capable device"), "CUDA_VISIBLE_DEVICES"),
        (gpu_error("ValueError: something else"), r"cupy.show_config\(\).*something else"),
        ({"versions": {"torch": "2.15.0+cpu"}}, "torch 2.15.0.cpu is a build without CUDA, but there is a GPU"),
        ({"interpreted": True}, "NUMBA_DISABLE_JIT is set"),
        ({"caches": [Cache("CPU code", "/ro", 0, False)]}, "/ro cannot be written to.*NUMBA_CACHE_DIR"),
        ({"caches": [Cache("GPU code", "/ro", 0, False)]}, "/ro cannot be written to.*CUPY_CACHE_DIR"),
        ({"versions": {"numba": "0.59.1"}}, "numba 0.59.1 is too old: pip install --upgrade 'numba>=0.60'"),
        ({"versions": {"cupy-cuda13x": "13.6.0"}}, "cupy-cuda13x 13.6.0 is too old"),
        (
            {"backends": [Backend("numpy", "CPU", "ImportError: llvmlite")]},
            "The CPU backend does not work .ImportError",
        ),
    ],
)
def test_each_problem_has_its_advice(changes: dict[str, Any], sentence: str) -> None:
    (advice,) = advise(environment_with(**changes))
    assert re.search(sentence, advice), advice
    assert f"* {advice}" in format_report(environment_with(**changes))


def test_no_gpu_and_no_cupy_is_no_problem() -> None:
    environment = environment_with(without=["cupy-cuda13x"], driver=None, backends=HEALTHY.backends[:1])
    assert advise(environment) == [] and environment.works


def test_minimum_versions_equal_pyproject() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name, minimum in MINIMUM.items():
        package = "cupy-cuda13x\\[ctk\\]" if name == "cupy" else name
        match = re.search(rf'"{package}>=([\d.]+)', text)
        assert match and tuple(map(int, match.group(1).split("."))) == minimum


def test_the_current_environment() -> None:
    environment = inspect_environment()
    assert environment.backends[0].error is None and environment.versions["numpy"] == np.__version__
    assert Path(environment.caches[0].folder).is_absolute() and environment.caches[0].writable


@pytest.mark.slow
def test_the_command() -> None:
    command = [sys.executable, "-m", "dcnops", "--json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    environment = json.loads(result.stdout)
    assert result.returncode == (0 if environment["works"] else 1)
    assert environment["backends"][0]["error"] is None and isinstance(environment["advice"], list)
    env = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    interpreted = subprocess.run(command[:-1], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert "* NUMBA_DISABLE_JIT is set" in interpreted.stdout


MISSES = """
import sys
import numpy as np
import dcnops
from dcnops._backends.cpu import deform_attention_loops, deform_conv2d_loops, deform_roi_pool_loops, transpose_loops

rng = np.random.default_rng(0)
def random(*shape):
    return rng.random(shape, dtype=np.float32)

for mask in (None, random(2, 18, 5, 3)):
    arguments = (random(2, 4, 9, 7)[:, ::-1], random(2, 36, 5, 3), random(6, 2, 3, 3))
    output = dcnops.deform_conv2d(*arguments, random(6), stride=2, padding=(1, 0), mask=mask)
    dcnops.deform_conv2d_backward(output, *arguments, stride=2, padding=(1, 0), mask=mask)
rois = np.array([[0, 1, 1, 5, 6], [1, 0, 0, 3, 3]], np.float32)
for given in ({}, {"offset": random(2, 2, 3, 4)}, {"offset": random(2, 2, 3, 4), "mask": random(2, 3, 4)}):
    image = random(2, 5, 9, 7)
    output = dcnops.deform_roi_pool(image, rois, output_size=(3, 4), sampling_ratio=0, **given)
    dcnops.deform_roi_pool_backward(output, image, rois, output_size=(3, 4), sampling_ratio=0, **given)
attention = random(2, 30, 2, 3), [(6, 4), (3, 2)], random(2, 5, 2, 4, 2)[:, ::-1], random(2, 5, 2, 4)
output = dcnops.ms_deform_attn(*attention, points=(3, 1))
dcnops.ms_deform_attn_backward(output, *attention, points=(3, 1))
aggregation = random(2, 5, 6, 4), random(2, 3, 4, 56)
output = dcnops.deform_aggregate(*aggregation, groups=2, kernel_size=3)
dcnops.deform_aggregate_backward(output, *aggregation, groups=2, kernel_size=3, needs="offset")
modules = (deform_attention_loops, deform_conv2d_loops, deform_roi_pool_loops, transpose_loops)
loops = [value for module in modules for value in vars(module).values()]
print(sum(sum(loop.stats.cache_misses.values()) for loop in loops if hasattr(loop, "stats")))
"""


@pytest.mark.slow
def test_prefetched_calls_compile_nothing(tmp_path: Path) -> None:
    def run(*command: str) -> str:
        env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
        command = (sys.executable, *command)
        return subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True).stdout

    run("-m", "dcnops", "prefetch")
    assert int(run("-c", MISSES)) == 0


def test_output_that_cannot_be_written() -> None:
    code = "import sys, dcnops.__main__ as m; m.format_report = lambda environment: 'text'; sys.exit(m.main([]))"
    code = f"import dcnops._diagnosis as d; d.inspect_environment = lambda: d.Environment({{}}, None, [], []); {code}"
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # as `head` does
    assert (process.stderr.read(), process.wait()) == ("", 0)
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: the output cannot be written (No space left on device)\n"


def test_prefetch_refuses_wrong_arguments() -> None:
    for name in ("input", "weight"):
        for sizes in ((1, -4, 9, 9), (0, 4, 9, 9), (1, 10**12, 9, 9), (10**400, 1, 1, 1)):
            with pytest.raises(ValueError, match=rf"^{name} must be 4 positive numbers with a product of less than"):
                dcnops.prefetch(**{name: sizes})
    with pytest.raises(dcnops.ArgumentError, match="library must be 'numpy' or 'cupy', got 'torch'"):
        dcnops.prefetch("torch")
    with pytest.raises(dcnops.ArgumentError, match=r"dtypes must be among .* got 'int8'"):
        dcnops.prefetch(dtypes=["int8"])
    with pytest.raises(dcnops.ShapeError, match="input must be 4 positive numbers"):
        dcnops.prefetch(input=(1, 2, 3))
    with pytest.raises(dcnops.ShapeError, match="weight must be"):
        dcnops.prefetch(input=(1, 4, 9, 9), weight=(4, 3, 3, 3))
    for heads in (0, 3, 1.0):
        with pytest.raises(dcnops.ArgumentError, match=f"heads must be a divisor of input's C=4, got {heads}"):
            dcnops.prefetch(input=(1, 4, 9, 9), weight=(4, 4, 3, 3), heads=heads)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefetch_compiles_every_dtype(dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    sizes: dict[str, Any] = {"input": (2, 4, 8, 8), "weight": (6, 2, 3, 1), "deform_groups": 2, "heads": 2}
    with caplog.at_level("DEBUG", "dcnops"):
        dcnops.prefetch(dtypes=[dtype], **sizes, stride=2, padding=(1, 0))
    for argument in (" offset", " mask", "sampling_locations", "attention_weights"):
        used = set(re.findall(rf"{argument}=(\w+)", caplog.text))
        assert used == ({dtype, "float32"} if dtype.endswith("16") else {dtype}), argument


def test_prefetch_command_takes_the_number_of_heads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prefetch", "--heads", "3"]) == 2
    assert capsys.readouterr().err == "error: heads must be a divisor of input's C=16, got 3\n"
