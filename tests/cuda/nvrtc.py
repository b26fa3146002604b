"""Compilation of the kernels with NVRTC, and the registers that they need."""

from __future__ import annotations

import re
from typing import Any

import pytest
from cupy_backends.cuda.libs import nvrtc

from dcnops._backends.cuda.kernel_source import compile_options, kernel_source
from tests.cuda.kernel_matrix import UNITS, Specialisation

_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


def compile_with_nvrtc(source: str, name: str, options: tuple[str, ...]) -> Any:
    """Return the compiled program. If the source does not compile, fail with the log."""
    program = nvrtc.createProgram(source, name, (), ())
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    return program


def compile_without_spills(specialisation: Specialisation, architecture: int, record_property: Any) -> Any:
    """Return the compiled program of a specialisation. Fail if a kernel spills or has too many registers."""
    program = compile_with_nvrtc(
        kernel_source(specialisation.unit),
        f"{specialisation.unit}.cu",
        # CuPy adds -ftz.
        (*compile_options(specialisation.macros), f"-arch=sm_{architecture}", "-ftz=true", "--ptxas-options=-v"),
    )
    used = resources(program)
    kernels = UNITS[specialisation.unit][1]
    names = [f"{kernel}_{specialisation.macros['DCN_SUFFIX']}" for kernel in kernels]
    assert set(used) == set(names), f"{specialisation}: kernels {set(used)} instead of {names}"
    for name, (registers, spills) in used.items():
        assert spills == 0, f"{specialisation} on sm_{architecture}: {name} spills {spills} bytes"
        assert registers <= specialisation.most_registers, (
            f"{specialisation} on sm_{architecture}: {registers} registers"
        )
    record_property("kernel_resources", (architecture, used))
    return program


def resources(program: Any) -> dict[str, tuple[int, int]]:
    """Return (registers, bytes of stack frame and spills) of each kernel in the log of ptxas."""
    used = {}
    kernel, frame = "", 0
    for line in nvrtc.getProgramLog(program).splitlines():
        if entry := _ENTRY.search(line):
            kernel = entry.group(1)
        elif sizes := _FRAME.search(line):
            frame = sum(map(int, sizes.groups()))
        elif registers := _REGISTERS.search(line):
            used[kernel] = (int(registers.group(1)), frame)
    return used
