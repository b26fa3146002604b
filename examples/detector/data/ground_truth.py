"""Annotations of a data set: those that count in an evaluation, and those that a detector can be trained on."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO

from .coco_json import CocoJson, Notes, Picture, positions
from .segmentations import MAX_COORDINATE, NARROW, empty_code, encode_polygons, encode_segmentation

MIN_SIDE = 0.01  # pixels; float32 still resolves such a box after resizing

Flags = npt.NDArray[np.bool_]


class GroundTruth:
    """Annotations of `pictures`, which are in order of id. See `CocoDataset` for the rules.

    `evaluated` says that `content` keeps all segmentations, as `coco` needs them.
    """

    def __init__(
        self, content: CocoJson, pictures: Sequence[Picture], notes: Notes, *, masks: bool, evaluated: bool
    ) -> None:
        self._content = content
        self._pictures = pictures
        self._masks = masks
        self._notes = notes
        number = len(content.ids)
        self.image = positions(_ids(pictures), content.image_ids)  # index of the picture, or -1
        self.label = 1 + positions(_ids(content.categories), content.category_ids)  # 0 if unknown
        known = positions(np.sort(_ids(content.images)), content.image_ids) >= 0
        self.counted: Flags = (self.image >= 0) & (self.label > 0)
        self._note(~known, "left out {} annotation{s} of images that the json does not have")
        self._note(
            (self.image >= 0) & ~self.counted, "left out {} annotation{s} of categories that the json does not have"
        )

        self.codes: dict[int, bytes] = {}  # compressed run lengths by index of the annotation
        self._empty: Flags = np.zeros(number, bool)  # masks
        self._encode()
        located = ~np.isnan(content.boxes[:, 0])
        self._note(self.counted & ~located, "left out {} annotation{s} without a usable bbox or segmentation")
        self.counted &= located
        content.areas = np.where(np.isnan(content.areas), content.boxes[:, 2:].prod(1), content.areas)

        sizes = np.array([(picture.width, picture.height) for picture in pictures], np.float32).reshape(-1, 2)
        size = sizes[self.image] if len(sizes) else np.zeros((number, 2), np.float32)
        self.corners = content.boxes.copy()  # x1, y1, x2, y2 inside the image
        self.corners[:, 2:] += self.corners[:, :2]
        for corner in (self.corners[:, :2], self.corners[:, 2:]):
            np.clip(corner, 0, size, out=corner)
        sides = np.minimum(content.boxes[:, 2:], self.corners[:, 2:] - self.corners[:, :2]).min(1, initial=np.inf)
        self.trainable: Flags = self.counted & ~content.crowds
        kept = "kept for the evaluation only: {} annotation{s} " if evaluated else "left out {} annotation{s} "
        if masks:
            drawn = self._draw_narrow_polygons(size)
            drawn[list(self.codes)] = True
            self._exclude(~drawn, f"{kept}without a usable segmentation")
            self._exclude(self._empty, f"{kept}with an empty mask")
        narrow = ~(sides >= MIN_SIDE)
        self._exclude(narrow, f"{kept}with a box of less than {MIN_SIDE} pixels on a side inside the image")

    def pictures_to_train_on(self, *, negatives: bool) -> list[int]:
        """Return the indices of the pictures with targets, and with `negatives` of those without any annotation."""
        empty = ~self._has(self.trainable)
        if negatives and not empty.all():  # negative examples alone teach nothing
            empty &= self._has(self.image >= 0)
        crowded = self._has(self.counted & self._content.crowds)
        for kind, which in (
            ("left out {} image{s} without annotations to train on", empty & ~crowded),
            ("left out {} image{s} with crowd regions only, which are not trained on", empty & crowded),
        ):
            if which.any():
                self._notes.add(kind, self._pictures[int(which.argmax())].name, int(which.sum()))
        return np.flatnonzero(~empty).tolist()

    def coco(self) -> COCO:
        """Return the annotations that count, with missing values filled in."""
        content, annotations = self._content, []
        for index in np.flatnonzero(self.counted).tolist():
            picture = self._pictures[self.image[index]]
            annotation = {
                "id": int(content.ids[index]),
                "image_id": picture.id,
                "category_id": int(content.category_ids[index]),
                "bbox": content.boxes[index].tolist(),
                "area": float(content.areas[index]),
                "iscrowd": int(content.crowds[index]),
            }
            if self._masks:
                size = [picture.height, picture.width]
                code = self.codes.get(index) or empty_code(*size)["counts"]
                annotation["segmentation"] = {"size": size, "counts": code.decode()}
            annotations.append(annotation)
        coco = COCO()
        coco.dataset = {
            "images": [
                {"id": picture.id, "file_name": picture.name, "width": picture.width, "height": picture.height}
                for picture in self._pictures
            ],
            "categories": [category._asdict() for category in content.categories],
            "annotations": annotations,
        }
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco

    def _encode(self) -> None:
        """Encode the segmentations that were kept; derive missing boxes and areas from them."""
        content = self._content
        for index, segmentation in content.segmentations.items():
            if not self.counted[index]:
                continue
            picture = self._pictures[self.image[index]]
            code = encode_segmentation(segmentation, picture.height, picture.width)
            if code is None:
                continue
            area = int(rle_tools.area(code))
            self._empty[index] = area == 0
            if self._masks:
                self.codes[index] = code["counts"]
            if np.isnan(content.boxes[index, 0]):
                content.boxes[index] = rle_tools.toBbox(code)
            if np.isnan(content.areas[index]):
                content.areas[index] = area
        content.segmentations = {}

    def _draw_narrow_polygons(self, size: npt.NDArray[np.float32]) -> Flags:
        """Find empty masks among the narrow polygons; return a flag for annotations with usable polygons.

        To draw all polygons would take a minute for a million annotations. Wider ones are drawn when they are used.
        """
        points, spans = self._content.points, self._content.spans
        rows = np.flatnonzero(spans[:, 1] > spans[:, 0])
        drawn: Flags = np.zeros(len(spans), bool)
        if not len(rows):
            return drawn
        lower, upper = (function.reduceat(points, spans[rows, 0], axis=0) for function in (np.fmin, np.fmax))
        usable = np.maximum(-lower, upper).max(1) < MAX_COORDINATE
        sides = np.minimum(upper, size[rows]) - np.maximum(lower, 0)
        drawn[rows[usable]] = True
        for index in rows[usable & (sides.min(1) < NARROW) & self.trainable[rows]].tolist():
            picture = self._pictures[self.image[index]]
            code = encode_polygons(points[slice(*spans[index])], picture.height, picture.width)
            self._empty[index] = rle_tools.area(code) == 0
        return drawn

    def _exclude(self, which: Flags, kind: str) -> None:
        self._note(self.trainable & which, kind)
        self.trainable &= ~which

    def _note(self, which: Flags, kind: str) -> None:
        if which.any():
            self._notes.add(kind, f"id {self._content.ids[int(which.argmax())]}", int(which.sum()))

    def _has(self, which: Flags) -> Flags:
        """Return a flag for each picture that has an annotation in `which`."""
        return np.bincount(self.image[which], minlength=len(self._pictures)) > 0


def _ids(items: Sequence[Any]) -> npt.NDArray[np.int64]:
    return np.array([item.id for item in items], np.int64)
