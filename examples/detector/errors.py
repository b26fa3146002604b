"""What the user can mend."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the user gave: one sentence that names it, what is needed and what was got."""
