"""Exceptions that the commands print without a traceback, and text that a terminal can show."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the user's arguments, files or data.

    Any function of the detector may raise it. The message says in one sentence what is needed and what was given.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class Interrupted(KeyboardInterrupt):
    """Stop on request of the user; the text says what has been saved."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.exit_code = 128 + number  # by convention


def printable(text: str) -> str:
    r"""Replace line breaks, escape sequences of terminals and unpaired surrogates by escapes such as ``\n``.

    Names in files may contain them. Everything that is printed or drawn with a name in it passes through here.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
