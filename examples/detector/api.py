"""Detectors in Python programs and notebooks: build, train, evaluate, predict."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from .config import Config
from .data import Category, CocoDataset, TorchDataset, as_image, check_categories, match_categories, read_image
from .engine import Metrics, choose_device, coco_metrics, detect, evaluated_kinds, session, train
from .errors import UserError
from .model import (
    build_detector,
    load_backbone,
    load_detector,
    load_initial_detector,
    read_initial_detector,
    save_checkpoint,
    starting_config,
)
from .predict import AMP_TYPES, RLE, decode_rle, evaluating, infer_in_batches

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray[Any, Any] | Tensor
LARGEST = 4096  # pixels; larger image files are shrunk before the network, as by the command


class Detector:
    """Faster R-CNN or Mask R-CNN with the convolutions and RoI pooling of a preset.

    Parameters
    ----------
    categories : sequence of str
        Names of the categories; the first one has the label 1. The categories of a `CocoDataset` work too.
    preset : str, optional
        Row of the paper's Table 1, such as ``"dcnv2"`` (the default) or ``"regular"``.
    detector : str, optional
        ``"faster"`` (boxes, the default), ``"faster-fpn"`` (boxes, with a feature pyramid) or ``"mask"`` (boxes and
        masks).
    backbone : str, optional
        ``"resnet50"`` (the default), ``"small"`` for CPUs, and others; see the option ``network.backbone``.
    weights : str, optional
        Weights of the backbone: ``"imagenet"``, a file, or ``"none"``. The default is ``"none"`` for the small backbone
        and ``"imagenet"`` for others. A file with a whole detector (see `load`) also sets the options of the network,
        which other arguments change.
    options : mapping, optional
        Further options of the configuration, such as ``{"network.min_size": 480, "training.epochs": 4}``. The command
        ``dcnops-detector train --help`` lists all.
    device : str or torch.device
        ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or ``"auto"`` for a GPU if there is one.

    Attributes
    ----------
    model : torch.nn.Module
        The network, called like the detectors of torchvision, except that masks are not pasted: they are
        [n, 1, 28, 28].
    config : Config
        Every number of the network and its training.
    categories : list of str
    device : torch.device
    report : list of str
        What was used of a file with a whole detector, what was renamed and what was left out.

    Raises
    ------
    UserError
        An option, the weights or the device do not exist, or the categories are not different names.

    Examples
    --------
    >>> from dcnops.detector import Detector
    >>> detector = Detector(["cat", "dog"], detector="mask", backbone="small", device="cpu")
    >>> detector
    Detector(['cat', 'dog'], preset='dcnv2', detector='mask', backbone='small', device='cpu')
    """

    def __init__(
        self,
        categories: Sequence[str | Category],
        *,
        preset: str | None = None,
        detector: str | None = None,
        backbone: str | None = None,
        weights: str | None = None,
        options: Mapping[str, object] | None = None,
        device: str | torch.device = "auto",
    ) -> None:
        named = {"network.preset": preset, "network.detector": detector, "network.backbone": backbone}
        given: dict[str, object] = {name: value for name, value in named.items() if value is not None}
        given |= options or {}
        self.report: list[str] = []
        initial = read_initial_detector(weights, self.report.append) if weights else None
        start = starting_config(initial, "network.preset" in given) or Config()
        self.config = start.set(_assignments(given))
        self._categories = _categories(categories)
        self.device = choose_device(device)
        torch.manual_seed(self.config.training.seed)
        self.model: nn.Module = build_detector(self.config.network, len(self._categories))
        name = self.config.network.backbone
        weights = weights or ("none" if name == "small" else "imagenet")
        if initial:
            self.report += load_initial_detector(self.model, initial, self._categories)
        elif weights != "none":
            load_backbone(self.model, weights, name)
        self.model.to(self.device).eval()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        categories: Sequence[str | Category] | None = None,
        options: Mapping[str, object] | None = None,
        device: str | torch.device = "auto",
    ) -> Detector:
        """Load a checkpoint of `save`, of `train` or of the command ``dcnops-detector train``.

        Files with a Faster or Mask R-CNN of torchvision, mmdetection or detectron2 work too, see the table in the
        documentation of the command.

        Parameters
        ----------
        path : path
            Such as ``runs/mine/model.pth``. Loading never runs code from the file.
        categories : sequence of str, optional
            Names of the categories, if the file does not have them.
        options : mapping, optional
            Changes of the configuration, such as ``{"network.score_threshold": 0.3}``.
        device : str or torch.device
            As for `Detector`.

        Returns
        -------
        Detector

        Raises
        ------
        UserError
            There is no such file, it is damaged, it does not fit the options, or it does not have exactly the
            parameters of the network.
        """
        detector = cls.__new__(cls)
        detector.device = choose_device(device)
        detector.report = []
        loaded = load_detector(
            Path(path),
            detector.device,
            _assignments(options or {}),
            categories=None if categories is None else _categories(categories),
            report=detector.report.append,
        )
        detector.model, detector.config, detector._categories = loaded
        return detector

    @property
    def categories(self) -> list[str]:
        """Names of the categories; the first one has the label 1."""
        return [category.name for category in self._categories]

    def __repr__(self) -> str:
        network = self.config.network
        return (
            f"Detector({self.categories}, preset={network.preset!r}, detector={network.detector!r}, "
            f"backbone={network.backbone!r}, device={str(self.device)!r})"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint with the network, its configuration and its categories; see `load`."""
        save_checkpoint(Path(path), self.model, self.config, self._categories, 0)

    def train(
        self,
        train_set: Dataset[Any],
        val_set: Dataset[Any] | None = None,
        *,
        out: str | os.PathLike[str],
        resume: bool = False,
    ) -> Metrics | None:
        """Train the network with the options ``training.*`` and ``mimicking.*``.

        Under ``torchrun``, all processes must call it, and train in parallel.

        Parameters
        ----------
        train_set, val_set : Dataset
            A `CocoDataset` with the detector's categories, or any map-style data set of pairs (image, target). The
            image is a Pillow image, a uint8 array [H, W, 3] or a tensor [3, H, W], uint8 or float in 0..1. The target
            is a dictionary in torchvision's format: ``boxes`` [n, 4] (x1, y1, x2, y2 in pixels), ``labels`` [n] (1 for
            the first category), for Mask R-CNN ``masks`` [n, H, W] (zeros and ones), and optionally ``iscrowd`` [n]
            for the evaluation. An image without objects has n = 0. Images may differ in size.

            Images are flipped at random, see ``training.flip``. Further augmentation is up to the data set. If it has
            no method ``get_height_and_width(index)``, each sample of `train_set` is read once more at the start. The
            samples of `val_set` must be the same each time.
        out : path
            Folder for ``model.pth``, ``checkpoint.pth``, ``metrics.json`` and TensorBoard files.
        resume : bool
            Continue from ``checkpoint.pth`` in `out`. Otherwise, `out` must not hold a run.

        Returns
        -------
        dict or None
            The last metrics, as from `evaluate`; None without `val_set`, and in the further processes of ``torchrun``.

        Raises
        ------
        UserError
            A sample is not as described, `out` holds a run or cannot be written, or the loss is not finite.
        KeyboardInterrupt
            Ctrl-C was pressed; a checkpoint is saved first.
        """
        data = self._data(train_set, evaluated=False)
        val_data = None if val_set is None else self._data(val_set, evaluated=True)
        for given, name in ((data, "train_set"), (val_data, "val_set")):
            if given is not None:
                check_categories(self._categories, given.categories, name)
        with session(self.device) as device:
            try:
                return train(self.model, self.config, data, val_data, Path(out), device, resume=resume)
            finally:
                self.model.eval()

    def evaluate(self, dataset: Dataset[Any], *, batch_size: int = 1) -> Metrics:
        """Compute the average precision as COCO defines it.

        Parameters
        ----------
        dataset : Dataset
            As `val_set` of `train`.
        batch_size : int
            Images per forward pass. Images are padded to the largest of their batch, which affects the detections
            slightly.

        Returns
        -------
        dict
            `Scores` of the boxes (``"bbox"``) and, from Mask R-CNN, of the masks (``"segm"``): ``AP``, ``AP50``,
            ``AP75``, ``APs``, ``APm``, ``APl``, the average recall ``AR1``, ``AR10``, ``AR100``, ``ARs``, ``ARm`` and
            ``ARl``, and ``per_category`` and ``per_category_AP50`` by category id; in 0..1, NaN without ground truth.

        Raises
        ------
        UserError
            A sample is not as described in `train`.
        """
        data = self._data(dataset, evaluated=True)
        options: dict[str, Any] = {"workers": self.config.training.workers, "amp_dtype": self._amp_dtype()}
        options["categories"] = match_categories(self._categories, data.categories, "dataset")
        with session(self.device) as device:
            results = detect(self.model, data, device, batch_size=batch_size, **options)
        return coco_metrics(data.coco, results, data.image_ids, evaluated_kinds(self.config.network))

    def predict(
        self, images: Iterable[ImageLike], *, threshold: float = 0.5, batch_size: int = 1
    ) -> list[dict[str, Any]]:
        """Detect objects.

        Parameters
        ----------
        images : iterable
            Paths of files, Pillow images, arrays [H, W, 3] or [H, W], or tensors [3, H, W]. Arrays and tensors are RGB,
            uint8 or floating-point in 0..1. Files are turned upright according to EXIF, and larger ones than 4096
            pixels are shrunk.
        threshold : float
            Minimum score. The network itself drops scores below ``network.score_threshold`` (0.05).
        batch_size : int
            Images per forward pass. Only images of the same size after resizing and padding share a batch, so the
            results do not depend on it, except for rounding errors.

        Returns
        -------
        list of dict
            For each image, on the CPU and in order of decreasing score: ``boxes`` float32 [n, 4] (x1, y1, x2, y2 in
            pixels of the image), ``labels`` int64 [n] (1 for the first category), ``scores`` float32 [n] in 0..1,
            ``names`` (a list of n category names) and, from Mask R-CNN, ``masks`` bool [n, H, W].

        Raises
        ------
        UserError
            A file cannot be read, or an image has another type, shape or range.
        """
        if isinstance(images, (str, os.PathLike, Image.Image)):
            raise UserError(f"images must be a list of images, got a {type(images).__name__}: write [image]")
        options: dict[str, Any] = {"threshold": threshold, "amp_dtype": self._amp_dtype()}
        results = []
        with evaluating(self.model):
            for _, size, found in infer_in_batches(self.model, _read(images), self.device, batch_size, **options):
                names = [self.categories[label - 1] for label in found.labels.tolist()]
                result = {"boxes": found.boxes, "labels": found.labels, "scores": found.scores, "names": names}
                if found.masks is not None:
                    result["masks"] = _decoded(found.masks, size)
                results.append(result)
        return results

    def _amp_dtype(self) -> torch.dtype | None:
        return AMP_TYPES[self.config.training.amp]

    def _data(self, dataset: Dataset[Any], *, evaluated: bool) -> CocoDataset:
        if isinstance(dataset, CocoDataset):
            return dataset
        masks = "segm" in evaluated_kinds(self.config.network)
        return TorchDataset(dataset, self._categories, masks=masks, evaluated=evaluated)


def _assignments(options: Mapping[str, object]) -> list[str]:
    """Write options as the command line does."""
    return [
        f"{name}={','.join(map(str, value)) if isinstance(value, (tuple, list)) else value}"
        for name, value in options.items()
    ]


def _categories(given: Sequence[str | Category]) -> list[Category]:
    categories = [
        item if isinstance(item, Category) else Category(number, item) for number, item in enumerate(given, 1)
    ]
    names = [category.name for category in categories]
    if isinstance(given, str) or not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"categories must be a list of names, got {given!r:.80}")
    if len(set(names)) < len(names) or len({category.id for category in categories}) < len(categories):
        raise UserError(f"categories must have different names and ids, got {names}")
    return categories


def _read(images: Iterable[ImageLike]) -> Iterator[tuple[int, Tensor, tuple[int, int]]]:
    for index, image in enumerate(images):
        if isinstance(image, (str, os.PathLike)):
            yield index, *read_image(Path(image), LARGEST)
        else:
            pixels = as_image(image, f"images[{index}]")
            yield index, pixels, (pixels.shape[2], pixels.shape[1])


def _decoded(masks: Sequence[RLE], size: tuple[int, int]) -> Tensor:
    """Decode run lengths to a bool tensor [n, H, W]."""
    width, height = size
    decoded = torch.zeros(len(masks), height, width, dtype=torch.bool)
    for target, mask in zip(decoded, masks):
        target.copy_(torch.from_numpy(decode_rle(mask)))
    return decoded
