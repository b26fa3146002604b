"""Files with tensors: reading them without running code from them, and checks of their content."""

from __future__ import annotations

import collections
import os
import pickle
import pickletools
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first value in a file that torch wrote before version 1.6

# Functions that pickled NumPy arrays call; their modules differ between the versions of NumPy.
_CORE = {
    "multiarray._reconstruct": np.ndarray(0).__reduce__()[0],
    "multiarray.scalar": np.float64(0).__reduce__()[0],
    "numeric._frombuffer": np.ndarray(0).__reduce_ex__(5)[0],
}
ARRAY_CLASSES: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),
    **{
        (f"numpy.{core}.{module}", name): value
        for core in ("core", "_core")
        for (module, name), value in ((key.split("."), value) for key, value in _CORE.items())
    },
}


class Unread:
    """Stand-in for an object in a file that has neither tensors nor plain values, such as a training log."""

    def __new__(cls, *args: object, **options: object) -> Unread:
        return super().__new__(cls)

    def __init__(self, *args: object, **options: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class ArrayUnpickler(pickle.Unpickler):
    """Unpickler of plain values and NumPy arrays that calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return ARRAY_CLASSES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not a class of arrays") from None


def read_file(path: Path) -> Any:
    """Read what `torch.save`, safetensors, `numpy.savez` or a pickle of arrays wrote, with all tensors on the CPU.

    The content of the file decides on the format. Nothing in the file is executed: objects of classes that torch does
    not consider safe become `Unread`, and pickles with other objects than arrays and plain values are refused. Damaged
    files are refused as well.
    """
    if not os.path.isfile(path):
        raise UserError(f"there is no file of weights {path}")
    try:
        check_archive(path)
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        with path.open("rb") as file:
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    names = archive.namelist()
                    pickles = [name for name in names if name.endswith("/data.pkl")]
                    if not pickles:
                        with np.load(path) as arrays:
                            return {name: torch.from_numpy(arrays[name]) for name in arrays}
                    with archive.open(pickles[0]) as content:
                        unsafe = _classes(content)
            else:
                file.seek(0)
                first = ArrayUnpickler(file, encoding="latin1").load()
                if first != LEGACY_MAGIC:
                    return _to_tensors(first)
                # Behind the magic number: the version, the machine, and the content.
                unsafe = _classes(file) | _classes(file) | _classes(file)
        with torch.serialization.safe_globals([(Unread, name) for name in unsafe]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:
        # torch's messages advise unsafe loading.
        raise UserError(
            f"{path} cannot be read as weights without running code from it: it must hold named tensors and plain "
            f"values ({type(error).__name__})"
        ) from error


def check_archive(path: Path) -> None:
    """Check the checksums of a file if it is a zip archive, as those of `torch.save` and NumPy are.

    `torch.load` does not look at them.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # damaged directories of archives raise all kinds of errors
        raise UserError(f"{path}: is damaged ({error})") from None
    if damaged is not None:
        raise UserError(f"{path}: is damaged, the checksum of its part {damaged} is wrong")


def tensor_problem(value: object, own: Tensor) -> str | None:
    """Return why a value of a file cannot replace a tensor of a network, or None if it can."""
    if not isinstance(value, Tensor) or value.shape != own.shape:
        return f"has the shape {list(getattr(value, 'shape', []))}, but {list(own.shape)} is needed"
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        return "is not a dense tensor"
    if value.is_floating_point() != own.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        return f"has the data type {value.dtype}, but {own.dtype} is needed"
    if not value.to(own.dtype).isfinite().all():
        return "has values that are not finite"
    return None


def _classes(file: IO[bytes]) -> set[str]:
    """Return the full names of the classes and functions in the next pickle of a file, as torch looks them up."""
    found = (str(value).split(" ") for code, value, _ in pickletools.genops(file) if code.name == "GLOBAL")
    return {
        ".".join(NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))) for module, name in found
    }


def _to_tensors(value: Any) -> Any:
    """Convert the arrays in nested dictionaries and lists to tensors."""
    if isinstance(value, dict):
        return {key: _to_tensors(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_to_tensors(item) for item in value]
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
        return torch.from_numpy(np.array(value, value.dtype.newbyteorder("=")))
    return value


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{path}: the package safetensors is needed to read it (pip install safetensors)") from None
    tensors: dict[str, Tensor] = load_file(path)
    return tensors
