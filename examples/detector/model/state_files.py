"""Checks of files with tensors: their checksums, and whether a tensor can become a parameter."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError


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
