"""Choice of the backend by the type of the arrays; imports no array library itself."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Container
from types import ModuleType
from typing import Any, Protocol, TypeVar

from dcnops._dtypes import DTYPES
from dcnops._errors import DeviceError, DtypeError
from dcnops._forks import no_fork

_BACKENDS = {"numpy": "dcnops._backends.cpu.backend", "cupy": "dcnops._backends.cuda.backend"}
_ADVICE = {
    "torch": "dcnops works on arrays: pass tensor.detach().numpy() on the CPU or cupy.from_dlpack(tensor) on a GPU",
    "jax": "dcnops works on arrays: pass numpy.asarray(array) on the CPU or cupy.from_dlpack(array) on a GPU",
    "jaxlib": "dcnops works on arrays: pass numpy.asarray(array) on the CPU or cupy.from_dlpack(array) on a GPU",
}


class Array(Protocol):
    """Array attributes that the checks read."""

    @property
    def shape(self) -> Any: ...
    @property
    def dtype(self) -> Any: ...


ArrayT = TypeVar("ArrayT", bound=Array)


def check_arrays(
    data: dict[str, Array | None],
    sampling: dict[str, Array | None],
    regions: dict[str, Array | None] | None = None,
    optional: Container[str] = (),
) -> str:
    """Check the library, dtype and device of a call's arrays and return the name of the library.

    Parameters
    ----------
    data : dict
        Arrays of one dtype, by argument name; the first determines the library, dtype and device.
    sampling : dict
        Offsets and masks. They have the dtype of `data`; with float16 and bfloat16 data all of them may be float32.
    regions : dict, optional
        Arrays of any supported dtype, such as `rois`.
    optional : container of str
        Arguments that may be None.
    """
    arrays = {
        name: array
        for name, array in {**data, **sampling, **(regions or {})}.items()
        if array is not None or name not in optional
    }
    kinds = [(name, type(array), _dtype(array)) for name, array in arrays.items()]
    library = _check_kinds(tuple(kinds), tuple(data), tuple(sampling), tuple(regions or ()))
    if library == "cupy":
        _check_devices(arrays)
    return library


def is_device_array(name: str, array: Any, like: str, first: Array, library: str) -> bool:
    """Check an argument that may be on the host or next to the array `first`; return True if it is a CuPy array.

    `like` is the name of `first`, and `library` the name of its library.
    """
    kind: type = type(array)
    if _library_of(kind) != "cupy":
        return False
    if library != "cupy":
        raise DeviceError(f"{name} must be on the host like {like}, got a cupy array")
    if _native_name(name, _dtype(array)) not in ("int32", "int64"):
        raise DtypeError(f"{name} must be int32 or int64, got {_dtype(array).name}")
    _check_devices({like: first, name: array})
    return True


@functools.lru_cache(maxsize=256)
def _check_kinds(
    kinds: tuple[tuple[str, type, Any], ...],
    data: tuple[str, ...],
    sampling: tuple[str, ...],
    regions: tuple[str, ...],
) -> str:
    """Check the library and dtype of arrays given as (name, type, dtype) and return the name of the library."""
    libraries = {name: _check_library(name, kind) for name, kind, _ in kinds}
    first = kinds[0][0]
    library = libraries[first]
    for name, other in libraries.items():
        if other != library:
            raise DeviceError(f"{name} must be a {library} array like {first}, got a {other} array")

    dtypes = {name: _native_name(name, dtype) for name, _, dtype in kinds}
    for name in (first, *regions):
        if dtypes[name] not in DTYPES:
            *others, last = DTYPES
            raise DtypeError(f"{name} must be {', '.join(others)} or {last}, got {dtypes[name]}")
    dtype = dtypes[first]
    legal = (dtype, "float32") if DTYPES[dtype].is_16_bit else (dtype,)
    lead = next((name for name in sampling if name in dtypes), "")
    for name, got in dtypes.items():
        if name in data and got != dtype:
            raise DtypeError(f"{name} must be {dtype} like {first}, got {got}")
        if name in sampling and got not in legal:
            raise DtypeError(f"{name} must be {' or '.join(legal)} for {dtype} {first}, got {got}")
        if name in sampling and got != dtypes[lead]:
            raise DtypeError(f"{name} must be {dtypes[lead]} like {lead}, got {got}")
    return library


@functools.cache
def load_backend(library: str) -> ModuleType:
    """Import the backend for arrays of `library`."""
    with no_fork():
        before = set(sys.modules)
        try:
            return importlib.import_module(_BACKENDS[library])
        except BaseException:
            _forget_partial_imports(set(sys.modules) - before)
            raise


def _forget_partial_imports(new: set[str]) -> None:
    """Forget the packages among the `new` modules that Ctrl-C left half imported: later imports of them would fail."""
    partial = {"dcnops", "numba", "llvmlite"}
    for name in new:
        package = name.partition(".")[0]
        if package not in sys.modules or getattr(
            getattr(sys.modules.get(name), "__spec__", None), "_initializing", False
        ):
            partial.add(package)
    for name in new:
        if name.partition(".")[0] in partial:
            sys.modules.pop(name, None)


@functools.lru_cache(maxsize=256)
def _library_of(kind: type) -> str | None:
    """Return the library of an array class, and None for anything else."""
    for base in kind.__mro__:
        if base.__name__ == "MaskedArray":
            return None  # its mask would be ignored
        library = base.__module__.partition(".")[0]
        if base.__name__ == "ndarray" and library in _BACKENDS:
            return library
    return None


def _check_library(name: str, kind: type) -> str:
    library = _library_of(kind)
    if library is not None:
        return library
    got = f"{kind.__module__}.{kind.__qualname__}" if kind.__module__ != "builtins" else kind.__qualname__
    advice = _ADVICE.get(kind.__module__.partition(".")[0], "pass numpy.asarray(...) or cupy.asarray(...) of it")
    raise DtypeError(f"{name} must be a NumPy or CuPy array, got {got}; {advice}")


def _dtype(array: Any) -> Any:
    kind: type = type(array)
    return array.dtype if _library_of(kind) else None


def _native_name(name: str, dtype: Any) -> str:
    if not dtype.isnative:
        raise DtypeError(f"{name} must be in native byte order, got {dtype!r}; pass {name}.astype({dtype.name!r})")
    return str(dtype.name)


def _check_devices(arrays: dict[str, Any]) -> None:
    first = next(iter(arrays))
    expected = int(arrays[first].device.id)
    for name, array in arrays.items():
        device = int(array.device.id)
        if device != expected:
            raise DeviceError(f"{name} must be on device {expected} like {first}, got device {device}")
