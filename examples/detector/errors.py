"""The error that the commands print without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the user's arguments, files or data.

    Every function of the detector raises it; the message is one sentence with what is needed and what was given.
    """
