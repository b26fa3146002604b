"""Numba's compiler with less work, for the first call on a new machine.

By default, Numba optimizes the code of every function by itself, then with the functions it calls, and turns it into
machine code, also for functions that are only inlined into others. Here only functions that Python calls are optimized,
once, together with the functions they call, and become machine code. Numba also infers the type of each expression
several times, for which it tries a dozen functions; here it does so once for the same types.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import llvmlite.binding as llvm
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.typed_passes import InlineOverloads, IRLegalization, NopythonRewrites
from numba.core.types import BaseFunction
from numba.core.untyped_passes import InlineClosureLikes

_UNUSED_PASSES = (InlineClosureLikes, InlineOverloads, IRLegalization, NopythonRewrites)
"""Passes for closures, inlined overloads, reference counts and array expressions, which the loops do not use."""

_OVERRIDDEN = ("_optimize_functions", "_optimize_final_module", "_finalize_final_module", "_finalize_dynamic_globals")
"""Methods of Numba's code libraries that have no public name."""


class _KernelLibrary(JITCodeLibrary):  # type: ignore[misc]
    """Code that Python calls, with that of all functions it calls."""

    _level = 3
    _unrolls_loops = True

    def add_ir_module(self, ir_module: Any) -> None:
        """Add code, without optimization if it is the code that converts Python's arguments."""
        if ir_module.name == "wrapper":  # to optimize it takes as long as a short loop, and saves 0.1 us
            for function in ir_module.functions:
                if not function.is_declaration:
                    function.attributes.add("noinline")
                    function.attributes.add("optnone")
        super().add_ir_module(ir_module)

    def _optimize_functions(self, ll_module: Any) -> None:
        """Leave this to the optimization of the whole library."""

    def _optimize_final_module(self) -> None:
        options = llvm.create_pipeline_tuning_options(self._level)
        options.loop_vectorization = True
        options.loop_unrolling = self._unrolls_loops
        builder = llvm.create_pass_builder(self._codegen._tm, options)
        builder.getModulePassManager().run(self._final_module, builder)


class _VectorLibrary(_KernelLibrary):
    """Code with inner loops that are vector code already. Unrolling them makes it longer, not faster."""

    _level = 2
    _unrolls_loops = False


class _InnerLibrary(_KernelLibrary):
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


class _TypingContext:
    """Numba's typing context, which resolves a function only once for the same types of arguments."""

    _resolved: dict[Any, Any] = {}  # noqa: RUF012 (shared by all compilers, which hold Numba's lock)

    def __init__(self, context: Any) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def resolve_function_type(self, function: Any, args: Any, kws: Any) -> Any:
        """Return the signature of a call."""
        function = self._lookup_global(function) or function
        if not isinstance(function, BaseFunction) or kws:
            return self._context.resolve_function_type(function, args, kws)
        # A function type remembers the implementations of its own signatures; an equal one does not know them.
        key = id(function), args
        if key not in self._resolved:
            self._resolved[key] = self._context.resolve_function_type(function, args, kws), function
        return self._resolved[key][0]


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Pause Python's search for cyclic garbage: it takes a fifth of the time, as everything is still in use."""
    was_enabled = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if was_enabled:
            gc.enable()


class KernelCompiler(Compiler):  # type: ignore[misc]
    """Compiler of functions that Python calls."""

    _library_class: type[JITCodeLibrary] = _KernelLibrary

    def __init__(self, typingctx: Any, *args: Any) -> None:
        super().__init__(_TypingContext(typingctx), *args)

    def compile_extra(self, func: Any) -> Any:
        """Compile a function into a library of this class."""
        self.state.library = self._library_class(self.state.targetctx.codegen(), func.__qualname__)
        self.state.library.enable_object_caching()
        with _without_garbage_collection():
            return super().compile_extra(func)

    def define_pipelines(self) -> Any:
        """Return Numba's passes without those that find nothing to do."""
        pipelines = super().define_pipelines()
        for pipeline in pipelines:
            pipeline.passes[:] = [entry for entry in pipeline.passes if entry[0] not in _UNUSED_PASSES]
        return pipelines


class VectorCompiler(KernelCompiler):
    """Compiler of functions that Python calls, with inner loops from `vectors`."""

    _library_class = _VectorLibrary


class InnerCompiler(KernelCompiler):
    """Compiler of functions that only compiled functions call."""

    _library_class = _InnerLibrary


if not (hasattr(llvm, "create_pass_builder") and all(hasattr(JITCodeLibrary, method) for method in _OVERRIDDEN)):
    raise ImportError("this version of Numba has another compiler, for example 0.60")
