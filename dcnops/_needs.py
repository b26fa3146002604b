"""Which gradients a backward call computes."""

from __future__ import annotations

from collections.abc import Iterable

from dcnops._errors import ArgumentError

__all__ = ["check_needs"]


def check_needs(needs: Iterable[str], **arguments: object) -> frozenset[str]:
    """The names in `needs` whose argument was given.

    Raises
    ------
    ArgumentError
        When `needs` holds a name that is not among `arguments`.
    """
    try:
        wanted = frozenset([needs] if isinstance(needs, str) else needs)
    except TypeError:
        wanted = frozenset([repr(needs)])
    if not wanted <= arguments.keys():
        raise ArgumentError(f"needs must be names among {', '.join(arguments)}, got {needs!r}")
    return frozenset(name for name in wanted if arguments[name] is not None)
