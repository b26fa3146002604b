"""JSON files, and the numbers and flags in them, which are read leniently."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from .errors import UserError

MAX_NUMBER = 1e30
CHUNK = 1 << 18  # characters that are read at a time
TAIL = 1 << 15  # characters at the end of a chunk in which a list is divided
BETWEEN = re.compile(r"\}\s*,\s*\{")
SPACE = re.compile(r"[ \t\n\r]*")
WHOLE = re.compile(r"\s*[+-]?\d{1,18}\s*", re.ASCII)

Handler = Callable[[int, list[Any]], None]


class NotANumber:
    """NaN in a list of `read_json_lists`. It is not a float, so that nobody needs to search lists of numbers for it."""

    def __repr__(self) -> str:
        return "NaN"


DECODER = json.JSONDecoder(parse_constant=lambda name: NotANumber() if name == "NaN" else float(name))


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            return json.load(file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not json ({error})") from None


def read_json_lists(path: Path, handlers: Mapping[str, Handler]) -> dict[str, int]:
    """Read lists of a JSON object in pieces, so that the file need not fit into memory.

    For each name in `handlers` that the object has as a list, call the handler with the index of the next item and some
    items, until it has received all of them. Return the lengths of these lists. Other entries are skipped.

    NaN, which is not JSON but which Python writes, becomes `NotANumber`.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            reader = _Reader(file)
            if reader.peek() == "{":
                return _read_lists(path, reader, handlers)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        pass
    value = read_json(path)  # raises the error with its line
    raise UserError(f"{path}: must hold a JSON object, got a {type(value).__name__}")


def write_json(path: Path, value: object, indent: int | None = None) -> None:
    """Write a JSON file without NaN; `path` keeps its old content until the new content is complete."""
    replace_text(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a text file; `path` keeps its old content until the new content is complete."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # of a program that was killed, or a link
    try:
        with partial.open("x", encoding="utf-8") as file:
            file.write(text)
        os.replace(partial, path)
    except OSError as error:  # that of a full disk has no file name
        error.filename = str(path)
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def is_whole(value: object) -> bool:
    """Check that a value is an integer in the range of pycocotools' ids."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def is_finite(value: object) -> bool:
    """Check that a value is a finite number."""
    # Integers in JSON may be too large for a float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MAX_NUMBER


def is_missing(value: object) -> bool:
    """Check that a number in a list of `read_json_lists` is absent, null or NaN."""
    return value is None or isinstance(value, NotANumber)


def whole_number(value: object) -> int | None:
    """Return the whole number that a value means, also as a float or a text; None if it means none."""
    if is_whole(value):
        return value  # type: ignore[return-value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return int(value) if isinstance(value, str) and WHOLE.fullmatch(value) else None


def flag(value: object) -> int | None:
    """Return the meaning of a flag, 0 or 1; None if it has none. An absent flag is 0."""
    if value is None:
        return 0
    if isinstance(value, str):
        return {"0": 0, "false": 0, "1": 1, "true": 1}.get(value.lower())
    return int(value) if isinstance(value, (int, float)) and value in (0, 1) else None


class _Reader:
    """Tokens and values of a JSON text that is read in chunks."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text = ""
        self._position = 0
        self.divided = False  # `items` has divided this text, or tried to

    def peek(self) -> str:
        """Return the next character that is not white space, or an empty string at the end."""
        while True:
            character = self._text[self._position : self._position + 1]
            if character > " ":  # no white space, which is usual
                return character
            match = SPACE.match(self._text, self._position)
            assert match
            self._position = match.end()
            if self._position < len(self._text) or not self._more():
                return self._text[self._position : self._position + 1]

    def take(self, characters: str) -> str:
        """Return the next character, which must be one of `characters`."""
        character = self.peek()
        if not character or character not in characters:
            raise ValueError(f"expecting one of {characters}")
        self._position += 1
        return character

    def value(self) -> Any:
        """Return the next value."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._position)
            except ValueError:  # the value may continue in the next chunk
                if not self._more():
                    raise
                continue
            if end < len(self._text) or not self._more():  # a number may continue too
                self._position = end
                return value

    def items(self) -> list[Any]:
        """Return the next values of a list: all objects that are complete in the text so far, or a single value."""
        import orjson  # not above: `--help` needs no package

        self.peek()
        if not self.divided:
            self.divided = True
            ends = list(BETWEEN.finditer(self._text, max(self._position, len(self._text) - TAIL)))
            if ends:
                end = ends[-1].start() + 1
                # If the text is cut inside a value, or after the end of the list, this is not json.
                with contextlib.suppress(ValueError):
                    items: list[Any] = orjson.loads(f"[{self._text[self._position : end]}]")
                    self._position = end
                    return items
        return [self.value()]

    def _more(self) -> bool:
        rest = self._text[self._position :]
        # Twice the rest, because an unfinished value is decoded again from its start.
        chunk = self._file.read(max(CHUNK, len(rest)))
        if chunk:
            self._text, self._position, self.divided = rest + chunk, 0, False
        return bool(chunk)


def _read_lists(path: Path, reader: _Reader, handlers: Mapping[str, Handler]) -> dict[str, int]:
    lengths: dict[str, int] = {}
    reader.take("{")
    more = reader.peek() != "}" or reader.take("}") != "}"
    while more:
        if reader.peek() != '"':
            raise ValueError("expecting a name")
        name = reader.value()
        reader.take(":")
        if name not in handlers or name in lengths:
            reader.value()
        elif reader.peek() == "[":
            lengths[name] = _read_list(reader, handlers[name])
        else:
            raise UserError(f"{path}: needs a list {name!r}, got a {type(reader.value()).__name__}")
        more = reader.take(",}") == ","
    if reader.peek():
        raise ValueError("extra data")
    return lengths


def _read_list(reader: _Reader, handle: Handler) -> int:
    reader.take("[")
    reader.divided = False
    if reader.peek() == "]":
        reader.take("]")
        return 0
    count = 0
    while True:
        items = reader.items()
        handle(count, items)
        count += len(items)
        if reader.take(",]") == "]":
            return count
