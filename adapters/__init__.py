"""Deformable operations for array frameworks: thin layers over the array functions of `dcnops`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def name_extra(extra: str, *packages: str) -> Iterator[None]:
    """Name the extra of dcnops that installs `packages`, if their import in this context fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in packages:
            raise
        message = f"the package {error.name} is missing: pip install 'dcnops[{extra}]'"
        raise ModuleNotFoundError(message, name=error.name) from None
