"""Explanations of calls on request: log lines of the logger "dcnops" at level DEBUG."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

LOGGER = logging.getLogger("dcnops")


def is_explaining() -> bool:
    """Return True if the logger records explanations."""
    return LOGGER.isEnabledFor(logging.DEBUG)


def log_call(operation: str, arguments: Mapping[str, Any]) -> None:
    """Log a call before anything is checked or launched, so that a crash leaves the line behind."""
    library = type(next(iter(arguments.values()))).__module__.partition(".")[0]
    given = (f"{name}={_describe(value)}" for name, value in arguments.items() if value is not None)
    LOGGER.debug("%s of %s arrays: %s", operation, library, ", ".join(given))


def _describe(value: Any) -> str:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        return repr(value)
    text = f"{value.dtype}{list(value.shape)}"
    is_contiguous = getattr(getattr(value, "flags", None), "c_contiguous", True)
    return text if is_contiguous else f"{text} with strides {value.strides} in bytes"
