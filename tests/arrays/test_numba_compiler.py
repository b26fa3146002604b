"""The compiler of the CPU loops does nothing twice."""

from __future__ import annotations

import gc
import operator
import re
import subprocess
import sys
from typing import Any

import numba
import numpy as np
import pytest
from numba.core import types
from numba.core.registry import cpu_target

from dcnops._backends.cpu.compiled import inner
from dcnops._backends.cpu.vectors import transpose

numba_compiler = pytest.importorskip("dcnops._backends.cpu.numba_compiler", exc_type=ImportError)


class _CountingContext:
    def __init__(self) -> None:
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(cpu_target.typing_context, name)

    def resolve_function_type(self, *call: Any) -> Any:
        self.calls += 1
        return cpu_target.typing_context.resolve_function_type(*call)


def test_functions_are_resolved_once_for_the_same_types(monkeypatch):
    monkeypatch.setattr(numba_compiler._TypingContext, "_resolved", {})
    cpu_target.target_context.refresh()
    counting = _CountingContext()
    reals = types.float32, types.uint16
    signatures = [
        numba_compiler._TypingContext(counting).resolve_function_type(operator.mul, reals, {}) for _ in range(3)
    ]
    assert counting.calls == 1
    assert len(set(signatures)) == 1
    assert signatures[0] == cpu_target.typing_context.resolve_function_type(operator.mul, reals, {})
    numba_compiler._TypingContext(counting).resolve_function_type(operator.mul, reals[::-1], {})
    assert counting.calls == 2


@inner()
def _scaled(x: Any) -> Any:
    return 2 * x


def _transpose_twice(a: Any, b: Any) -> Any:
    transpose(a, 0, 4, 4, 4, b, 0, 4, 4, 1)
    transpose(a, 16, 4, 4, 4, b, 16, 4, 4, 1)
    return _scaled(a[0])


def test_a_kernel_contains_one_transposition_inlines_small_functions_and_optimizes_no_wrapper():
    kernel = numba.njit(pipeline_class=numba_compiler.KernelCompiler, no_cfunc_wrapper=True)(_transpose_twice)
    a, b = np.arange(32, dtype=np.float64), np.zeros(32)
    assert kernel(a, b) == 0 and gc.isenabled()
    np.testing.assert_array_equal(b.reshape(2, 4, 4), a.reshape(2, 4, 4).swapaxes(1, 2))
    (code,) = kernel.inspect_llvm().values()
    definitions = [line for line in code.splitlines() if line.startswith("define")]
    assert sum("transpose" in line and "twice" not in line for line in definitions) == 1
    assert not any("_scaled" in line for line in definitions)
    unoptimized = re.findall(r"^attributes (#\d+) = .* optnone ", code, re.MULTILINE)
    assert ["cpython" in line for line in definitions] == [
        any(mark in line for mark in unoptimized) for line in definitions
    ]


@pytest.mark.slow
def test_another_version_of_numba_uses_its_own_compiler():
    code = """
import numba.core.typed_passes as passes, numba.np.arraymath, numba.np.linalg as linalg
del passes.IRLegalization, linalg.ensure_blas
import numpy as np, dcnops
from dcnops._backends.cpu import compiled
assert compiled.KernelCompiler is compiled.VectorCompiler is compiled.InnerCompiler is compiled.Compiler
x = np.ones((1, 1, 1, 2), np.float32)
output = dcnops.deform_conv2d(x, np.zeros((1, 2, 1, 2), np.float32), np.full((1, 1, 1, 1), 3, np.float32))
assert output.tolist() == [[[[3, 3]]]]
"""
    subprocess.run([sys.executable, "-c", code], check=True)
