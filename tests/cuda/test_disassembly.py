"""The machine code of each kernel has the instructions that its design relies on, and none that it rules out."""

from __future__ import annotations

import re
import subprocess
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cupy_backends.cuda.libs import nvrtc

from tests.cuda.kernel_matrix import UNITS, Specialisation, specialisations
from tests.cuda.nvrtc import compile_without_spills

DISASSEMBLER = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin" / "nvdisasm"
DEFAULT_ARCHITECTURE = 90
OTHER_ARCHITECTURES = (80, 100, 120)

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)", re.MULTILINE)

LOADS, STORES = r"LDG\.E\.128", r"STG\.E\.128"
ATOMICS = r"(RED|REDG|ATOM|ATOMG)\."
VECTOR_ADDITIONS = r"REDG?\.E\.ADD\.F32x4"
TENSOR_CORES = r"[HIDQ]G?MMA\."
COPIES, MATRICES = r"LDGSTS\.E\.BYPASS\.128", r"LDSM\.16\.M88\.4"
SHUFFLES = r"SHFL\.BFLY"
LOCAL_MEMORY = r"(LDL|STL)\b"
DOUBLES = r"D(ADD|MUL|FMA)\b"
TILES, NO_WARPS = (COPIES, MATRICES, LOADS), (r"HMMA", MATRICES, ATOMICS)

# (Kernel, suffix, product): instructions that must occur, and instructions that must not. All vectors have 16 bytes.
EXPECTED: dict[tuple[str, str, str], tuple[tuple[str, ...], tuple[str, ...]]] = {
    ("deform_conv2d_fused", "f16", "TensorProduct"): ((r"HMMA\.16816\.F32$", *TILES), (ATOMICS,)),
    ("deform_conv2d_fused", "bf16", "TensorProduct"): ((r"HMMA\.16816\.F32\.BF16", *TILES), (ATOMICS,)),
    ("deform_conv2d_fused", "tf32", "TensorProduct"): ((r"HMMA\.1688\.F32\.TF32", *TILES), (ATOMICS,)),
    ("deform_conv2d_fused", "f16", "WarpgroupProduct"): ((r"HGMMA\.64x64x16\.F32$", COPIES, LOADS), NO_WARPS),
    ("deform_conv2d_fused", "bf16", "WarpgroupProduct"): ((r"HGMMA\.64x64x16\.F32\.BF16", COPIES, LOADS), NO_WARPS),
    ("deform_conv2d_fused", "tf32", "WarpgroupProduct"): ((r"HGMMA\.64x64x8\.F32\.TF32", COPIES, LOADS), NO_WARPS),
    ("deform_conv2d_fused", "3xtf32", "SplitTensorProduct"): ((r"HMMA\.1688\.F32\.TF32", *TILES), (ATOMICS,)),
    ("deform_conv2d_fused", "f32", "FmaProduct"): ((r"FFMA", r"LDS\.128", COPIES, LOADS), (TENSOR_CORES, ATOMICS)),
    ("deform_conv2d_columns", "f16", ""): ((LOADS, STORES), (ATOMICS,)),
    ("deform_conv2d_columns", "f32", ""): ((LOADS, STORES), (ATOMICS,)),
    ("deform_conv2d_grad_samples", "f16", ""): ((LOADS, r"STG\.E\.(128|64)", SHUFFLES), (ATOMICS,)),
    ("deform_conv2d_grad_samples", "f32", ""): ((LOADS, STORES, SHUFFLES), (ATOMICS,)),
    ("deform_conv2d_gather_input", "f16", ""): ((LOADS, STORES), ()),
    ("deform_conv2d_gather_input", "bf16", ""): ((LOADS, STORES), ()),
    ("deform_conv2d_gather_input_in_order", "f16", ""): ((LOADS, STORES), (ATOMICS,)),
    ("deform_conv2d_gather_input_in_order", "f32", ""): ((LOADS, STORES), (ATOMICS,)),
    ("deform_conv2d_scatter_input", "f16", ""): ((LOADS, r"RED"), ()),
    ("deform_roi_pool_forward", "f16", ""): ((LOADS, STORES), (ATOMICS,)),
    ("deform_roi_pool_backward", "f32", ""): ((LOADS, r"RED", SHUFFLES), ()),
    ("deform_roi_pool_grad_input", "f32", ""): ((LOADS,), (ATOMICS,)),
    ("deform_attention_forward", "f16", ""): ((LOADS, STORES), (ATOMICS,)),
    ("deform_attention_forward", "f32", ""): ((LOADS, STORES), (ATOMICS,)),
    ("deform_attention_backward", "bf16", ""): ((LOADS, r"RED", SHUFFLES), ()),
    ("deform_attention_grad_value", "f32", ""): ((LOADS,), (ATOMICS,)),
}


def specialisation_of(kernel: str, suffix: str, product: str) -> Specialisation:
    unit = next(unit for unit, (_, kernels) in UNITS.items() if kernel in kernels)
    wanted = {"DCN_SUFFIX": suffix, "DCN_OFFSET_SCALAR": "float", "DCN_VEC": 4 if suffix.endswith("32") else 8}
    if product:
        wanted |= {"DCN_PRODUCT": product}
    return next(s for s in specialisations() if s.unit == unit and wanted.items() <= s.macros.items())


def disassemble(program: Any) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        # CuPy drops the last byte, which it takes for the end of a string.
        file.write(nvrtc.getCUBIN(program) + b"\0")
        file.flush()
        done = subprocess.run([DISASSEMBLER, "-c", file.name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def instructions(text: str, kernel: str) -> Counter[str]:
    """Count the instructions in the code of a kernel."""
    body = re.split(r"\n\s*\.section", text.split(f".text.{kernel}:")[1])[0]
    found = Counter(_INSTRUCTION.findall(body))
    assert found["EXIT"], f"{kernel} has no code"
    return found


def count(found: Counter[str], pattern: str) -> int:
    return sum(number for instruction, number in found.items() if re.match(pattern, instruction))


KERNELS: dict[Specialisation, list[tuple[str, str, str]]] = {}
"""Keys of `EXPECTED` by specialisation, each of which is compiled once."""

for key in EXPECTED:
    KERNELS.setdefault(specialisation_of(*key), []).append(key)


DISASSEMBLED = [
    specialisation
    for specialisation, keys in KERNELS.items()
    if any(suffix == "f16" or (kernel, "f16", product) not in EXPECTED for kernel, suffix, product in keys)
]
"""Specialisations of the default run. Others repeat the check of float16 for another data type."""


def builds() -> Iterator[Any]:
    """Yield the parameters of a test: specialisation and architecture."""
    for specialisation in KERNELS:
        for architecture in (DEFAULT_ARCHITECTURE, *OTHER_ARCHITECTURES):
            if specialisation.is_for(architecture):
                is_default = architecture == DEFAULT_ARCHITECTURE and specialisation in DISASSEMBLED
                marks = pytest.mark.slow if is_default else pytest.mark.exhaustive
                yield pytest.param(specialisation, architecture, marks=marks, id=f"{specialisation}-{architecture}")


@pytest.mark.parametrize(("specialisation", "architecture"), list(builds()))
def test_instructions_follow_the_design(specialisation: Specialisation, architecture: int, record_property):
    text = disassemble(compile_without_spills(specialisation, architecture, record_property))
    for kernel, suffix, product in KERNELS[specialisation]:
        wanted, unwanted = EXPECTED[kernel, suffix, product]
        found = instructions(text, f"{kernel}_{suffix}")
        for pattern in wanted:
            assert count(found, pattern), f"no {pattern} in {kernel}: {dict(found)}"
        for pattern in (*unwanted, LOCAL_MEMORY, DOUBLES):
            assert not count(found, pattern), f"{pattern} in {kernel}: {dict(found)}"
        if count(found, "RED") and architecture >= 90:
            assert count(found, "RED") == count(found, VECTOR_ADDITIONS), f"scalar additions in {kernel}: {dict(found)}"
        if suffix == "3xtf32":
            single = specialisation_of(kernel, "tf32", "TensorProduct")
            text = disassemble(compile_without_spills(single, architecture, record_property))
            assert count(found, r"HMMA") == 3 * count(instructions(text, f"{kernel}_tf32"), r"HMMA")


@pytest.mark.slow
def test_the_check_finds_double_precision_and_atomics(record_property):
    doubles = next(
        s for s in specialisations() if s.unit == "deform_roi_pool_backward" and s.macros["DCN_SUFFIX"] == "f64"
    )
    text = disassemble(compile_without_spills(doubles, DEFAULT_ARCHITECTURE, record_property))
    found = instructions(text, "deform_roi_pool_backward_f64")
    assert count(found, DOUBLES) and count(found, ATOMICS)
