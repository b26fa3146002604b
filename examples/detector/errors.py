"""Exceptions that the commands print without a traceback, and text that a terminal can show."""

from __future__ import annotations

import errno
from pathlib import Path


class UserError(Exception):
    """A mistake in the user's arguments, files or data.

    Any function of the detector may raise it. The message says in one sentence what is needed and what was given.
    """

    reported = False  # another process has the same error and reports it

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class Interrupted(KeyboardInterrupt):
    """Stop on request of the user; the text says what has been saved."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.exit_code = 128 + number  # by convention


def os_problem(error: OSError) -> str:
    """Describe an error of the operating system; that of a full disk or an exhausted quota begins with "disk full"."""
    text = error.strerror or str(error)
    return f"disk full: {text}" if error.errno in (errno.ENOSPC, errno.EDQUOT) else text


def cannot_write(path: Path | str, error: OSError) -> UserError:
    """Build the error of a file or folder that cannot be written."""
    return UserError(f"{path}: cannot be written ({os_problem(error)})")


def number_of(count: int, noun: str) -> str:
    """Return a number with its noun, such as "1 image", "2 images" or "3 categories"."""
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun[:-1]}ies" if noun.endswith("y") else f"{count} {noun}s"


def printable(text: str) -> str:
    r"""Replace line breaks, escape sequences of terminals and unpaired surrogates by escapes such as ``\n``.

    Names in files may contain them. Everything that is printed or drawn with a name in it passes through here.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
