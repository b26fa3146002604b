"""JSON files, and the numbers and flags in them, which are read leniently."""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .errors import UserError

MAX_NUMBER = 1e30
CHUNK = 1 << 18  # characters that are read at a time
TAIL = 1 << 15  # characters at the end of a chunk in which a list is divided
BETWEEN = re.compile(r"\}\s*,\s*\{")
BETWEEN_BYTES = re.compile(BETWEEN.pattern.encode())
SPACE = re.compile(r"[ \t\n\r]*")
DECODER = json.JSONDecoder()
WHOLE = re.compile(r"\s*[+-]?\d{1,18}\s*", re.ASCII)

Handler = Callable[[int, list[Any]], None]


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            return json.load(file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not json ({error})") from None


def read_json_lists(
    path: Path, handlers: Mapping[str, Handler], parts: Mapping[str, Mapping[int, Callable[[int], int]]] | None = None
) -> dict[str, int]:
    """Read lists of a JSON object in pieces, so that the file need not fit into memory.

    For each name in `handlers` that the object has as a list, call the handler with the index of the next item and some
    items, until it has received all of them. Return the lengths of these lists. Other entries are skipped.

    `parts` has, by the name of a list, functions that know what `read_json_part` found from some places in the file to
    the next one in `parts`. Called with the index of the next item, a function returns the number of items, or 0 if
    they must be read here.
    """
    parts = parts or {}
    try:
        with path.open("rb") as file:
            reader = _Reader(file, 0, sorted(place for places in parts.values() for place in places))
            if reader.peek() == "{":
                return _read_lists(path, reader, handlers, parts)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        pass
    value = read_json(path)  # raises the error with its line
    raise UserError(f"{path}: must hold a JSON object, got a {type(value).__name__}")


def read_json_part(path: Path, start: int, stop: int, handle: Handler) -> int:
    """Read the items of a list that are between two places in a file (see `find_places`); return their number.

    Raises
    ------
    ValueError
        There is anything else than whole items between these places.
    """
    with path.open("rb") as file:
        reader, count = _Reader(file, start, [stop]), 0
        while reader.stop() is None:
            items = reader.items()
            handle(count, items)
            count += len(items)
            reader.take(",")
            if not reader.stops:
                raise ValueError("an item does not end before the stop")
        return count


def find_places(path: Path, part: int, most: int) -> list[int]:
    """Return places in a file, in bytes, where an item of a list probably begins.

    They are the starts of at most `most` parts of at least `part` bytes, without the first part, and a place near the
    end of the file. The list is empty if it would divide nothing.
    """
    places = []
    with contextlib.suppress(OSError), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        number = min(size // part, most)
        for wanted in [*(size * index // number for index in range(1, number)), max(size - CHUNK, 0)]:
            file.seek(wanted)
            if match := BETWEEN_BYTES.search(file.read(TAIL)):
                places.append(wanted + match.end() - 1)
    return sorted(places) if len(places) > 1 else []


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
    """Check that a number is absent, null or NaN."""
    return value is None or value != value


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

    def __init__(self, file: BinaryIO, start: int = 0, stops: Sequence[int] = ()) -> None:
        file.seek(start)
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8" if start else "utf-8-sig")().decode
        self._offset = start  # bytes that have been read
        self.stops = list(stops)  # places behind `_offset` where no text is read ahead
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
        """Return the next values of a list: if they are objects, those that the text so far has; otherwise one."""
        self.peek()
        if not self.divided:
            self.divided = True
            ends = list(BETWEEN.finditer(self._text, max(self._position, len(self._text) - TAIL)))
            if ends:
                end = ends[-1].start() + 1
                # If the text is cut inside a value, or after the end of the list, this is not json.
                with contextlib.suppress(ValueError):
                    items: list[Any] = DECODER.decode(f"[{self._text[self._position : end]}]")
                    self._position = end
                    return items
        return [self.value()]

    def stop(self) -> int | None:
        """Return the next stop if there is nothing before it."""
        if self.stops[:1] != [self._offset]:
            return None
        match = SPACE.match(self._text, self._position)
        assert match
        return self._offset if match.end() == len(self._text) else None

    def skip(self) -> None:
        """Go from a stop to the next."""
        del self.stops[0]
        self._text, self._position, self._offset = "", 0, self._file.seek(self.stops[0])

    def _more(self) -> bool:
        rest = self._text[self._position :]
        if self.stops[:1] == [self._offset]:
            del self.stops[0]
        size = max(CHUNK, len(rest))  # twice the rest, because an unfinished value is decoded again from its start
        chunk = self._file.read(min(size, self.stops[0] - self._offset) if self.stops else size)
        self._offset += len(chunk)
        text = self._decode(chunk, not chunk)
        if chunk:
            self._text, self._position, self.divided = rest + text, 0, False
        return bool(chunk)


def _read_lists(
    path: Path,
    reader: _Reader,
    handlers: Mapping[str, Handler],
    parts: Mapping[str, Mapping[int, Callable[[int], int]]],
) -> dict[str, int]:
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
            lengths[name] = _read_list(reader, handlers[name], parts.get(name, {}))
        else:
            raise UserError(f"{path}: needs a list {name!r}, got a {type(reader.value()).__name__}")
        more = reader.take(",}") == ","
    if reader.peek():
        raise ValueError("extra data")
    return lengths


def _read_list(reader: _Reader, handle: Handler, parts: Mapping[int, Callable[[int], int]]) -> int:
    reader.take("[")
    reader.divided = False
    if reader.peek() == "]":
        reader.take("]")
        return 0
    count = 0
    while True:
        while (stop := reader.stop()) is not None and (number := parts[stop](count) if stop in parts else 0):
            count += number
            reader.skip()
        items = reader.items()
        handle(count, items)
        count += len(items)
        if reader.take(",]") == "]":
            return count
