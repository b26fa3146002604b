"""Sources, names and compiler options of the CUDA kernels."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path

Macros = Mapping[str, "str | int"]
"""Macros that specialise the kernels of a unit."""

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
_PACKAGE = Path(__file__).resolve().parents[2]
_ROOTS = (_PACKAGE / "cuda", _PACKAGE.parent / "cuda")


def kernel_name(kernel: str, macros: Macros) -> str:
    """Return the name of a compiled kernel as a profiler shows it: ``<operation>_<role>_<dtype>``."""
    return f"{kernel}_{macros['DCN_SUFFIX']}"


def compile_options(macros: Macros) -> tuple[str, ...]:
    """Return NVRTC's options for one specialisation.

    The macro DCN_ARCHITECTURE names an architecture that the specialisation is restricted to by its instructions.
    """
    options = ["--std=c++17", "--generate-line-info", *(f"-D{name}={value}" for name, value in macros.items())]
    if "DCN_ARCHITECTURE" in macros:
        # CuPy adds the device's own architecture; NVRTC prefers the more specific one.
        options.append(f"-arch=sm_{macros['DCN_ARCHITECTURE']}")
    return tuple(options)


@functools.cache
def kernel_source(unit: str) -> str:
    """Return the text of ``cuda/<unit>.cu`` with every header of this library pasted in once.

    CuPy's cache on disk identifies a kernel by its source text, so the text must change when a header does. `#line`
    directives keep the compiler's messages at the original file and line.
    """
    root = next((root for root in _ROOTS if root.is_dir()), None)
    if root is None:
        raise FileNotFoundError(f"the CUDA sources of dcnops are in neither {_ROOTS[0]} nor {_ROOTS[1]}")
    return "".join(_flatten(root, f"{unit}.cu", set()))


def _flatten(root: Path, name: str, seen: set[str]) -> list[str]:
    seen.add(name)
    text = [f'#line 1 "cuda/{name}"\n']
    for number, line in enumerate((root / name).read_text(encoding="utf-8").splitlines(), start=1):
        include = _INCLUDE.match(line)
        if include is None:
            text.append(f"{line}\n")
        elif include.group(1) not in seen:
            text += [*_flatten(root, include.group(1), seen), f'#line {number + 1} "cuda/{name}"\n']
        else:
            text.append("\n")
    return text
