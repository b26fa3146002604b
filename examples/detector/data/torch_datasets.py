"""Data sets of PyTorch, in torchvision's detection format, as data for training and evaluation."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle_tools
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import UserError
from .coco import CocoDataset, Sample
from .coco_json import Category
from .images import as_image


class TorchDataset(CocoDataset):
    """Map-style data set of (image, target) with the interface of `CocoDataset`.

    `Detector.train` describes the samples. The sizes of the images come from the method
    ``get_height_and_width(index)`` of the data set, as in torchvision's reference scripts. Without it, or if
    `evaluated`, every sample is read once here.

    Parameters
    ----------
    dataset : Dataset
    categories : sequence of Category
        The categories of the labels 1, 2, ...
    masks : bool
        Require masks in the targets, and add them to the samples.
    evaluated : bool
        Use the targets as ground truth of an evaluation.
    """

    def __init__(self, dataset: Dataset[Any], categories: Sequence[Category], *, masks: bool, evaluated: bool) -> None:
        for method in ("__len__", "__getitem__"):
            if not hasattr(dataset, method):
                raise UserError(f"a data set must have {method}, got a {type(dataset).__name__}")
        self._dataset: Any = dataset
        self._needs_masks = masks
        self._labels_of = range(1, len(categories) + 1)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(len(self)):
            if evaluated or not hasattr(dataset, "get_height_and_width"):
                image, target = self._sample(index)
                height, width = image.shape[1:]
                if evaluated:
                    annotations += _annotations(target, index + 1, categories)
            else:
                height, width = map(int, dataset.get_height_and_width(index))
            images.append({"id": index + 1, "file_name": f"sample {index}", "width": width, "height": height})
        content = {
            "images": images,
            "annotations": [{"id": number, **annotation} for number, annotation in enumerate(annotations, 1)],
            "categories": [category._asdict() for category in categories],
        }
        with tempfile.TemporaryDirectory() as folder:  # so that there is one way to make ground truth
            file = Path(folder) / "samples"
            file.write_text(json.dumps(content))
            super().__init__(file, None, masks=masks and evaluated, keep_empty=True)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Sample:
        image, target = self._sample(range(len(self))[index])
        crowd = target.pop("iscrowd", None)
        if crowd is not None:  # counts in the evaluation only
            target = {name: values[crowd == 0] for name, values in target.items()}
        return image, {**target, "image_id": self.image_ids[index]}

    def path(self, index: int) -> Path:
        """Return the name of a sample for messages."""
        return Path(f"sample {index}")

    def _sample(self, index: int) -> Sample:
        sample = self._dataset[index]
        if not isinstance(sample, (tuple, list)) or len(sample) != 2 or not isinstance(sample[1], dict):
            raise UserError(f"sample {index} must be (image, target) with a dictionary as target, got {sample!r:.80}")
        image = as_image(sample[0], f"sample {index}: the image")
        return image, self._target(sample[1], index, image.shape[1:])

    def _target(self, target: dict[str, Any], index: int, shape: Sequence[int]) -> dict[str, Tensor]:
        """Check a target and convert it to the data types of the network."""
        boxes, labels = (_tensor(target, name, index) for name in ("boxes", "labels"))
        count = len(labels)
        whole = not labels.is_floating_point() or not count  # torch.tensor([]) has a floating-point type

        def require(condition: bool, name: str, need: str) -> None:
            if not condition:
                values = target[name]
                got = f"{values.dtype} of shape {list(values.shape)}" if isinstance(values, Tensor) else "other values"
                raise UserError(f"sample {index}: target[{name!r}] must be {need}, got {got}: {values!r:.60}")

        require(labels.ndim == 1 and whole, "labels", "whole numbers [n]")
        require(
            all(label in self._labels_of for label in labels.tolist()),
            "labels",
            f"between 1 and {len(self._labels_of)}, the number of categories",
        )
        boxes = boxes.reshape(-1, 4) if boxes.numel() == 0 else boxes
        require(boxes.shape == (count, 4), "boxes", f"[{count}, 4], one row for each label")
        require(bool((boxes[:, 2:] > boxes[:, :2]).all()), "boxes", "x1, y1, x2, y2 with x1 < x2 and y1 < y2")
        checked = {"boxes": boxes.float(), "labels": labels.long()}
        if self._needs_masks:
            masks = _tensor(target, "masks", index)
            require(masks.shape == (count, *shape), "masks", f"{[count, *shape]}, one mask for each label")
            checked["masks"] = (masks > 0).byte()
        if "iscrowd" in target:
            crowd = _tensor(target, "iscrowd", index)
            require(crowd.shape == (count,), "iscrowd", f"[{count}], one number for each label")
            checked["iscrowd"] = crowd.long()
        return checked


def _tensor(target: dict[str, Any], name: str, index: int) -> Tensor:
    if name not in target:
        raise UserError(f"sample {index}: the target needs {name!r}, got {', '.join(map(repr, target)) or 'nothing'}")
    try:
        return torch.as_tensor(target[name]).as_subclass(Tensor)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"sample {index}: target[{name!r}] must be a tensor, got {target[name]!r:.60}") from None


def _annotations(target: dict[str, Any], image_id: int, categories: Sequence[Category]) -> Iterator[dict[str, Any]]:
    """Yield the objects of a target as entries of a COCO file."""
    for index, ((x1, y1, x2, y2), label) in enumerate(zip(target["boxes"].tolist(), target["labels"].tolist())):
        annotation = {"image_id": image_id, "category_id": categories[label - 1].id, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        if "masks" in target:
            code = rle_tools.encode(np.asfortranarray(target["masks"][index].numpy()))
            annotation["segmentation"] = {"size": list(code["size"]), "counts": code["counts"].decode()}
        if "iscrowd" in target:
            annotation["iscrowd"] = int(target["iscrowd"][index])
        yield annotation
