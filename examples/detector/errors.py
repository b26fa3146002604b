"""The error that the commands print without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the user's arguments, files or data.

    Any function of the detector may raise it. The message says in one sentence what is needed and what was given.
    """
