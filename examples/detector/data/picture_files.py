"""Checks of the image files of a data set, from their headers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError, number_of
from ..processes import CAN_COPY, in_background
from .coco_json import Notes, Picture
from .images import read_header

MANY = 15000  # files, for which it pays to start a process
MISSING = "left out {} missing picture{s}"


_Problem = tuple[str, str]  # kind and example


class _Found(NamedTuple):
    """Header of an image file."""

    size: tuple[int, int]  # of the stored pixels
    orientation: int  # EXIF, 1 to 8


class Headers(ExitStack):
    """Headers of image files. On Linux, other processes read many of them while this one reads the JSON file.

    `folders` and `annotations` are the image folder and the path of each JSON file.
    """

    def __init__(self, folders: Sequence[Path], annotations: Sequence[Path]) -> None:
        super().__init__()
        self.folders = folders
        self.annotations = annotations
        self._waiting: list[tuple[str, str]] = []  # folder and name
        self._parts: list[Callable[[], list[_Found | _Problem]]] = []
        for folder, file in zip(folders, annotations):
            if not folder.is_dir():
                raise UserError(f"{folder}, the folder of the images of {file}, does not exist")
        _is_folder_inside.cache_clear()  # links may have changed

    def add(self, file: int, pictures: Sequence[Picture]) -> None:
        """Add pictures of the JSON file number `file`."""
        self._waiting += [(str(self.folders[file]), picture.name) for picture in pictures]
        # Later processes read more files: there are few processes for any number of files.
        while CAN_COPY and len(self._waiting) >= (number := MANY << len(self._parts) // 2):
            self._start(self._waiting[:number])
            del self._waiting[:number]

    def read(self) -> list[_Found | _Problem]:
        """Return the headers in the order of the pictures."""
        if self._parts:
            if self._waiting:
                self._start(self._waiting)
            return [item for part in self._parts for item in part()]
        with ThreadPoolExecutor(8) as threads:  # hides the latency of network drives
            return list(threads.map(_look, self._waiting))

    def _start(self, files: list[tuple[str, str]]) -> None:
        self._parts.append(self.enter_context(in_background(partial(list, map(_look, files)))))


def check_pictures(pictures: Sequence[Picture], headers: Headers, notes: Notes) -> tuple[list[Picture], list[bool]]:
    """Return the pictures with a usable file, completed by missing sizes, and a flag for those to turn upright.

    See `CocoDataset` for the rules. `headers` are those of all pictures.
    """
    found = headers.read()
    if pictures and all(isinstance(item, tuple) and item[0] == MISSING for item in found):
        where = ", ".join(map(str, dict.fromkeys(headers.folders)))
        files = ", ".join(map(str, headers.annotations))
        raise UserError(
            f"{where} must have the {number_of(len(pictures), 'image')} of {files}, "
            f"got none of them, e.g. {pictures[0].name}"
        )
    usable: list[Picture] = []
    turns: list[bool | None] = []  # None if the stored and the upright size are equal
    evidence = set()
    for picture, item in zip(pictures, found):
        if not isinstance(item, _Found):
            notes.add(*item)
            continue
        stored, upright = item.size, item.size[::-1] if item.orientation >= 5 else item.size
        if not picture.width:
            notes.add("read the size of {} picture{s} from the file{s}, as the json does not say it", picture.name)
            picture = picture._replace(width=upright[0], height=upright[1])
        wanted = (picture.width, picture.height)
        if wanted not in (stored, upright):
            turned = f", by EXIF upright {upright[0]}x{upright[1]}" if upright != stored else ""
            sizes = f"{picture.name} ({stored[0]}x{stored[1]}{turned}, json {wanted[0]}x{wanted[1]})"
            notes.add("left out {} picture{s} of another size than the json says", sizes)
            continue
        usable.append(picture)
        if item.orientation == 1:
            turns.append(False)
        elif stored == upright:
            turns.append(None)
        else:
            turns.append(wanted == upright)
            evidence.add(wanted == upright)
    default = evidence != {False}
    return usable, [default if turn is None else turn for turn in turns]


def _look(file: tuple[str, str]) -> _Found | _Problem:
    """Read the header of a file, given as folder and name."""
    folder, name = file
    path = os.path.join(folder, name)
    try:
        if not _is_inside(path, folder):
            return "left out {} picture{s} outside of the folder of images", f"{name} ({os.path.realpath(path)})"
        return _Found(*read_header(path))
    except FileNotFoundError:
        return MISSING, name
    except Exception as error:  # decoders raise all kinds of errors on damaged files
        return "left out {} unreadable picture{s}", f"{name} ({error})"


def _is_inside(path: str, folder: str) -> bool:
    """Check that a file is in a folder once symbolic links are followed."""
    parent, name = os.path.split(path)
    if name in ("", ".", "..") or os.path.islink(path):
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    return _is_folder_inside(parent, folder)


@lru_cache(maxsize=4096)  # following links takes a system call for each part of a path
def _is_folder_inside(path: str, folder: str) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
