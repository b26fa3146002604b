"""Segmentations of COCO JSON files: polygons and run-length codes."""

from __future__ import annotations

import math
from array import array
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as rle_tools

from ..json_files import is_whole

MAX_COORDINATE = 1e5  # pixels; pycocotools allocates memory proportional to a polygon's length
NARROW = 3  # pixels; polygons that are wider and higher are assumed to cover a pixel until they are drawn

BEFORE_POLYGON = [math.nan, math.nan]

Points = npt.NDArray[np.float32]  # [n, 2], x and y; a row of NaN before each polygon


def encode_segmentation(segmentation: object, height: int, width: int) -> dict[str, Any] | None:
    """Convert a segmentation to a compressed run-length code; None if it is invalid or of another size.

    Masks are equal to those of `COCO.annToMask`: polygons with fewer than three points cover nothing, and the last of
    an odd number of coordinates is ignored.
    """
    code: dict[str, Any]
    if isinstance(segmentation, list):
        polygons = []
        for part in segmentation:
            if not isinstance(part, list):
                return None
            if len(part) >= 6:
                try:
                    polygon = np.array(part[: len(part) // 2 * 2], np.float64)
                except (TypeError, ValueError, OverflowError):
                    return None
                # NaN fails the comparison too.
                if polygon.ndim != 1 or not bool((np.abs(polygon) < MAX_COORDINATE).all()):
                    return None
                polygons.append(polygon)
        return rle_tools.merge(rle_tools.frPyObjects(polygons, height, width)) if polygons else None
    if not isinstance(segmentation, dict) or segmentation.get("size") != [height, width]:
        return None
    counts = segmentation.get("counts")
    if isinstance(counts, list):
        if not all(is_whole(run) and run >= 0 for run in counts) or sum(counts) != height * width:
            return None
        code = rle_tools.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        return code
    if isinstance(counts, str) and counts.isascii() and _covered(counts.encode()) == height * width:
        return {"size": [height, width], "counts": counts.encode()}
    return None


def empty_code(height: int, width: int) -> dict[str, Any]:
    """Return the run-length code of a mask without pixels."""
    code: dict[str, Any] = rle_tools.frPyObjects({"size": [height, width], "counts": [height * width]}, height, width)
    return code


def append_polygons(points: array[float], polygons: list[Any]) -> None:
    """Append the polygons of an annotation to flat `Points`; nothing if they are invalid."""
    begin = len(points)
    try:
        for part in polygons:
            if len(part) >= 6:
                points.fromlist(BEFORE_POLYGON)
                points.fromlist(part[:-1] if len(part) % 2 else part)  # twice as fast as extend
    except (TypeError, OverflowError):
        del points[begin:]


def encode_polygons(points: Points, height: int, width: int) -> dict[str, Any]:
    """Convert `Points` of an annotation to a compressed run-length code."""
    starts = np.flatnonzero(np.isnan(points[:, 0]))
    polygons = [part[1:].ravel().astype(np.float64) for part in np.split(points, starts)[1:]]
    code: dict[str, Any] = rle_tools.merge(rle_tools.frPyObjects(polygons, height, width))
    return code


def _covered(counts: bytes) -> int:
    """Count the pixels of a compressed run-length code; -1 if it is malformed.

    pycocotools hardly checks codes: a wrong length makes it return uninitialised memory or write out of bounds.
    """
    characters = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if not len(characters) or characters.min() < 0 or characters.max() > 63 or characters[-1] & 32:
        return -1
    # A number is a group of 5-bit digits, lowest first. Bit 5 means that another digit follows; bit 4 of the last digit
    # is the sign.
    last = (characters & 32) == 0
    starts = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
    digits = np.diff(np.concatenate([starts, [len(characters)]]))
    if digits.max() > 7:  # more than 32 bits
        return -1
    place = 5 * (np.arange(len(characters)) - np.repeat(starts, digits))
    runs = np.add.reduceat((characters & 31) << place, starts)
    runs -= np.where(characters[last] & 16, np.int64(1) << (5 * digits), 0)
    # From the fourth on, each number is stored as the difference from the number two places before.
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return int(runs.sum()) if bool((runs >= 0).all()) else -1
