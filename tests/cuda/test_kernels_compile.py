"""NVRTC builds all specialisations without a GPU. No kernel may spill.

The default run builds the widest vectors and some of one element, each for one architecture, and each unit for every
generation. The exhaustive run builds everything for all architectures. The test run prints the registers of each kernel
at its end.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cupy_backends.cuda.libs import nvrtc

from dcnops._backends.cuda.kernel_source import compile_options, kernel_source
from tests.cuda.kernel_matrix import UNITS, Specialisation, constant_assertions, specialisations, struct_assertions

GENERATIONS = (75, 80, 90, 100, 120)
"""One architecture of each generation."""

_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


def compile_with_nvrtc(source: str, name: str, options: tuple[str, ...]) -> str:
    """Return the compiler's log. If the source does not compile, fail with the log."""
    program = nvrtc.createProgram(source, name, (), ())
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    return nvrtc.getProgramLog(program)


def resources(log: str) -> dict[str, tuple[int, int]]:
    """Return (registers, bytes of stack frame and spills) of each kernel in the log of ptxas."""
    used = {}
    kernel, frame = "", 0
    for line in log.splitlines():
        if entry := _ENTRY.search(line):
            kernel = entry.group(1)
        elif sizes := _FRAME.search(line):
            frame = sum(map(int, sizes.groups()))
        elif registers := _REGISTERS.search(line):
            used[kernel] = (int(registers.group(1)), frame)
    return used


def typical() -> Iterator[Specialisation]:
    """Yield the specialisations with the widest vectors, which need most registers, and some without vectors.

    Only the smallest tiles of the fused kernel are built for 16-bit offsets, which are read before the products, and
    for bfloat16, which has the registers of float16.
    """
    widest: dict[tuple[object, ...], int] = {}
    for specialisation in specialisations():
        kind, vector = _kind_and_vector(specialisation)
        widest[kind] = max(vector, widest.get(kind, 0))
    for specialisation in specialisations():
        kind, vector = _kind_and_vector(specialisation)
        macros = specialisation.macros
        one_type = macros.get("DCN_OFFSET_SCALAR") == macros["DCN_SCALAR"]
        alike = kind[1] == "bf16" or (kind[1] == "f16" and one_type)
        left_out = alike and macros.get("DCN_OUTPUTS", 64) != 64
        if (vector == widest[kind] and not left_out) or (vector == 1 and one_type and kind[1] in ("f16", "f64")):
            yield specialisation


def _kind_and_vector(specialisation: Specialisation) -> tuple[tuple[object, ...], int]:
    macros = specialisation.macros
    return (specialisation.unit, macros["DCN_SUFFIX"]), int(macros.get("DCN_VEC", 0))


def share(architecture: int) -> list[Specialisation]:
    """Return the specialisations of the default run for one of `GENERATIONS`; those of a unit take turns."""
    turns: Counter[str] = Counter()
    chosen = []
    for specialisation in typical():
        candidates = [generation for generation in GENERATIONS if specialisation.is_for(generation)]
        if candidates[turns[specialisation.unit] % len(candidates)] == architecture:
            chosen.append(specialisation)
        turns[specialisation.unit] += 1
    return chosen


def assert_compile_without_spills(chosen: Iterable[Specialisation], architecture: int, record_property: Any) -> None:
    worst: dict[str, tuple[int, int]] = {}
    for specialisation in chosen:
        log = compile_with_nvrtc(
            kernel_source(specialisation.unit),
            f"{specialisation.unit}.cu",
            # CuPy adds -ftz.
            (*compile_options(specialisation.macros), f"-arch=sm_{architecture}", "-ftz=true", "--ptxas-options=-v"),
        )
        used = resources(log)
        expected = {f"{kernel}_{specialisation.macros['DCN_SUFFIX']}" for kernel in UNITS[specialisation.unit][1]}
        assert set(used) == expected, f"{specialisation}: kernels {set(used)} instead of {expected}"
        for kernel, (registers, spills) in used.items():
            assert spills == 0, f"{specialisation} on sm_{architecture}: {kernel} spills {spills} bytes"
            assert registers <= specialisation.most_registers, (
                f"{specialisation} on sm_{architecture}: {registers} registers"
            )
            worst[kernel] = max(worst.get(kernel, (0, 0)), (registers, spills))
    record_property("kernel_resources", (architecture, worst))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", GENERATIONS)
def test_typical_specialisations_compile_without_spills(architecture: int, record_property):
    assert_compile_without_spills(share(architecture), architecture, record_property)


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", nvrtc.getSupportedArchs())
def test_every_specialisation_compiles_for_every_architecture(architecture: int, record_property):
    everything = [s for s in specialisations() if s.is_for(architecture)]
    assert_compile_without_spills(everything, architecture, record_property)


def test_shares_have_every_kernel_in_every_dtype_and_on_every_generation():
    shares = {architecture: share(architecture) for architecture in GENERATIONS}
    chosen = list(itertools.chain(*shares.values()))
    assert Counter(chosen) == Counter(typical())
    for key in ("DCN_SUFFIX", "DCN_OFFSET_SCALAR", "DCN_PRODUCT", "DCN_OUTPUTS"):
        built, all_of_them = ({(s.unit, s.macros.get(key)) for s in some} for some in (chosen, specialisations()))
        assert built == all_of_them
    for architecture, own in shares.items():
        units = {s.unit for s in specialisations() if s.is_for(architecture)}
        assert {s.unit for s in own} >= units - {"array_jobs"}  # fewer specialisations than generations


def test_the_spill_check_sees_a_spill():
    # An array that needs memory: it is indexed at run time.
    source = """
    extern "C" __global__ void greedy(float* data, const int* at) {
      float values[64];
      for (int i = 0; i < 64; ++i) values[i] = data[i];
      for (int i = 0; i < 64; ++i) values[at[i] % 64] *= 2;
      for (int i = 0; i < 64; ++i) data[i] = values[i];
    }
    """
    used = resources(compile_with_nvrtc(source, "greedy.cu", ("-arch=sm_90", "--ptxas-options=-v")))
    assert used["greedy"][1] > 0


@pytest.mark.parametrize(
    "unit, suffix",
    [
        *((unit, "f16") for unit in UNITS),
        *(("deform_roi_pool_grad_input", suffix) for suffix in ("f32", "f64")),
        *((f"deform_attention_{part}", "f64") for part in ("forward", "grad_value")),
    ],
)
def test_structs_and_constants_equal_those_in_python(unit: str, suffix: str):
    specialisation = next(s for s in specialisations() if s.unit == unit and s.macros["DCN_SUFFIX"] == suffix)
    source = kernel_source(unit) + "\n#define OFFSET_OF(type, field) __INTADDR__(&((type*)0)->field)\n"
    source += struct_assertions(UNITS[unit][0]) + constant_assertions(specialisation)
    compile_with_nvrtc(source, f"{unit}.cu", (*compile_options(specialisation.macros), "-arch=compute_90"))


def test_compiler_messages_name_the_file_and_line_before_flattening():
    text = "const long long tiles = array_job_tiles(p);"
    true_line = next(i for i, line in enumerate(Path("cuda/array_jobs.cu").read_text().splitlines(), 1) if text in line)
    source = kernel_source("array_jobs").replace(text, f"broken {text}")
    with pytest.raises(pytest.fail.Exception, match=rf"cuda/array_jobs\.cu\({true_line}\)"):
        compile_with_nvrtc(source, "flat.cu", compile_options({"DCN_SUFFIX": "f32", "DCN_SCALAR": "float"}))


@pytest.mark.parametrize("dtype, vector", [("f16", 8), ("f32", 4)])
@pytest.mark.parametrize("unit", [unit for unit in UNITS if unit.startswith(("deform_roi_pool", "deform_attention"))])
def test_pooling_and_attention_move_16_bytes_at_once(unit: str, dtype: str, vector: int):
    # Atomic additions add 16 bytes, too.
    wanted = {"DCN_SUFFIX": dtype, "DCN_VEC": vector, "DCN_OFFSET_SCALAR": "float"}
    macros = next(s.macros for s in specialisations() if s.unit == unit and wanted.items() <= s.macros.items())
    program = nvrtc.createProgram(kernel_source(unit), f"{unit}.cu", (), ())
    nvrtc.compileProgram(program, (*compile_options(macros), "-arch=compute_90"))
    ptx = nvrtc.getPTX(program).decode()
    assert re.search(r"ld\.global(\.nc)?\.v4\.[fu]32", ptx)
    assert ("red.global.add.v4.f32" in ptx) == unit.endswith("_backward")
    assert "atom.global.add" not in ptx
