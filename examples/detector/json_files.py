"""JSON files."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from .errors import UserError


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            return json.load(file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not json ({error})") from None


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
