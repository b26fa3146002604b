"""Numba's compiler with less work, for the first call on a new machine.

By default, Numba optimizes the code of every function by itself, then with the functions it calls, and turns it into
machine code, also for functions that are only inlined into others. Here only functions that Python calls become machine
code. They are optimized once, together with the functions they call. Those are optimized by themselves first: LLVM
would inline too few of them otherwise.
"""

from __future__ import annotations

from typing import Any

from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.typed_passes import NopythonRewrites
from numba.core.untyped_passes import InlineClosureLikes

_UNUSED_PASSES = (InlineClosureLikes, NopythonRewrites)
"""Passes for closures and array expressions, which the loops do not use."""

_OVERRIDDEN = ("_optimize_functions", "_optimize_final_module", "_finalize_final_module", "_finalize_dynamic_globals")
"""Methods of Numba's code libraries that have no public name. Without them, Numba's own compiler is used."""


class _KernelLibrary(JITCodeLibrary):  # type: ignore[misc]
    """Code that Python calls, with that of all functions it calls."""

    def _optimize_functions(self, ll_module: Any) -> None:
        """Leave this to the optimization of the whole library."""


class _InnerLibrary(JITCodeLibrary):  # type: ignore[misc]
    """Code that is only linked into other libraries, which turn it into machine code."""

    def _optimize_final_module(self) -> None:
        """Leave this to the library of the caller."""

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True

    @property
    def codegen(self) -> _InnerLibrary:
        """The target of `set_env`."""
        return self

    def set_env(self, env_name: str, env: Any) -> None:
        """Do nothing: without machine code, there is no address to which the environment could be written."""


class KernelCompiler(Compiler):  # type: ignore[misc]
    """Compiler of functions that Python calls."""

    _library_class: type[JITCodeLibrary] = _KernelLibrary

    def compile_extra(self, func: Any) -> Any:
        """Compile a function into a library of this class."""
        self.state.library = self._library_class(self.state.targetctx.codegen(), func.__qualname__)
        self.state.library.enable_object_caching()
        return super().compile_extra(func)

    def define_pipelines(self) -> Any:
        """Return Numba's passes without those that find nothing to do."""
        pipelines = super().define_pipelines()
        for pipeline in pipelines:
            pipeline.passes[:] = [entry for entry in pipeline.passes if entry[0] not in _UNUSED_PASSES]
        return pipelines


class InnerCompiler(KernelCompiler):
    """Compiler of functions that only compiled functions call."""

    _library_class = _InnerLibrary


if not all(hasattr(JITCodeLibrary, method) for method in _OVERRIDDEN):
    KernelCompiler = InnerCompiler = Compiler  # type: ignore[misc]
