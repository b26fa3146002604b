"""NVRTC builds all specialisations without a GPU. No kernel may spill.

The default run builds the widest vectors, each for one architecture; the tests of the machine code build others for
sm_90. The exhaustive run builds everything for all architectures. The test run prints the registers of each kernel at
its end.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from cupy_backends.cuda.libs import nvrtc

from dcnops._backends.cuda.kernel_source import compile_options, kernel_source
from tests.cuda.kernel_matrix import UNITS, Specialisation, constant_assertions, specialisations, struct_assertions
from tests.cuda.nvrtc import compile_with_nvrtc, compile_without_spills, resources
from tests.cuda.test_disassembly import DEFAULT_ARCHITECTURE, DISASSEMBLED

GENERATIONS = (75, 80, 90, 100, 120)
"""One architecture of each generation."""


def typical() -> Iterator[Specialisation]:
    """Yield the specialisations with offsets of the data type and the widest vectors, which need most registers.

    Of the fused kernel, the tests of the machine code build the smallest tiles, and bfloat16 has the registers of
    float16.
    """
    widest: dict[tuple[object, ...], Specialisation] = {}
    for specialisation in specialisations():
        macros = specialisation.macros
        if macros.get("DCN_OFFSET_SCALAR", macros["DCN_SCALAR"]) != macros["DCN_SCALAR"]:
            continue
        if "DCN_PRODUCT" in macros and (macros["DCN_OUTPUTS"] == 64) != (macros["DCN_SUFFIX"] == "bf16"):
            continue
        kind = (specialisation.unit, *(macros.get(key) for key in ("DCN_SUFFIX", "DCN_PRODUCT", "DCN_OUTPUTS")))
        widest.setdefault(kind, specialisation)
    yield from widest.values()


def share(architecture: int) -> list[Specialisation]:
    """Return the specialisations of the default run for one of `GENERATIONS`; those of a unit take turns."""
    turns = Counter({unit: turn for turn, unit in enumerate(UNITS)})
    chosen = []
    for specialisation in typical():
        candidates = [generation for generation in GENERATIONS if specialisation.is_for(generation)]
        if len(candidates) > 1:
            candidates.remove(DEFAULT_ARCHITECTURE)
            turns[specialisation.unit] += 1
        if candidates[turns[specialisation.unit] % len(candidates)] == architecture:
            chosen.append(specialisation)
    return chosen


@pytest.mark.slow
@pytest.mark.parametrize("architecture", GENERATIONS)
def test_typical_specialisations_compile_without_spills(architecture: int, record_property):
    for specialisation in share(architecture):
        compile_without_spills(specialisation, architecture, record_property)


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", nvrtc.getSupportedArchs())
def test_every_specialisation_compiles_for_every_architecture(architecture: int, record_property):
    for specialisation in specialisations():
        if specialisation.is_for(architecture):
            compile_without_spills(specialisation, architecture, record_property)


def test_the_default_run_has_every_kernel_in_every_dtype_and_on_every_generation():
    shares = {architecture: share(architecture) for architecture in GENERATIONS}
    assert Counter(itertools.chain(*shares.values())) == Counter(typical())
    shares[DEFAULT_ARCHITECTURE] += DISASSEMBLED
    chosen = list(itertools.chain(*shares.values()))
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
    options = (*compile_options(specialisation.macros), "-arch=compute_90", "--fdevice-syntax-only")
    compile_with_nvrtc(source, f"{unit}.cu", options)


def test_compiler_messages_name_the_file_and_line_before_flattening():
    text = "const long long tiles = array_job_tiles(p);"
    true_line = next(i for i, line in enumerate(Path("cuda/array_jobs.cu").read_text().splitlines(), 1) if text in line)
    source = kernel_source("array_jobs").replace(text, f"broken {text}")
    with pytest.raises(pytest.fail.Exception, match=rf"cuda/array_jobs\.cu\({true_line}\)"):
        compile_with_nvrtc(source, "flat.cu", compile_options({"DCN_SUFFIX": "f32", "DCN_SCALAR": "float"}))


@pytest.mark.slow
@pytest.mark.parametrize("dtype, vector", [("f16", 8), ("f32", 4)])
@pytest.mark.parametrize("unit", [unit for unit in UNITS if unit.startswith(("deform_roi_pool", "deform_attention"))])
def test_pooling_and_attention_move_16_bytes_at_once(unit: str, dtype: str, vector: int):
    # Atomic additions add 16 bytes, too.
    wanted = {"DCN_SUFFIX": dtype, "DCN_VEC": vector, "DCN_OFFSET_SCALAR": "float"}
    macros = next(s.macros for s in specialisations() if s.unit == unit and wanted.items() <= s.macros.items())
    program = compile_with_nvrtc(kernel_source(unit), f"{unit}.cu", (*compile_options(macros), "-arch=compute_90"))
    ptx = nvrtc.getPTX(program).decode()
    assert re.search(r"ld\.global(\.nc)?\.v4\.[fu]32", ptx)
    assert ("red.global.add.v4.f32" in ptx) == unit.endswith("_backward")
    assert "atom.global.add" not in ptx
