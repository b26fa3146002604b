"""How float32 matrix products are computed on a GPU."""

from __future__ import annotations

from dcnops._errors import ArgumentError

__all__ = ["PRECISIONS", "check_precision"]

PRECISIONS = ("ieee", "tf32", "3xtf32")


def check_precision(precision: object) -> None:
    """Check the name of a precision; None is left to the array library's own switch.

    Raises
    ------
    ArgumentError
        When there is none of that name.
    """
    if precision is not None and not (isinstance(precision, str) and precision in PRECISIONS):
        raise ArgumentError(f"precision must be None, 'ieee', 'tf32' or '3xtf32', got {precision!r}")
