"""Evaluation: detections in a data set and their COCO average precision from the standard packages."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pycocotools.coco
import pycocotools.cocoeval
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..config import NetworkConfig
from ..data import Category, CocoDataset, Sample, encode_segmentation, prepare_worker, worker_errors
from ..errors import UserError, cannot_write, printable
from ..json_files import is_finite, read_json, write_json
from ..predict import coco_results, evaluating, infer
from .distributed import gather_lists, is_main, rank, world_size

Kind = Literal["bbox", "segm"]
Package = Literal["auto", "pycocotools", "faster-coco-eval"]

FIELDS: dict[Kind, str] = {"bbox": "bbox", "segm": "segmentation"}
SUMMARY = ("AP", "AP50", "AP75", "APs", "APm", "APl")
RECALL = ("AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
TITLES: dict[Kind, str] = {"bbox": "box", "segm": "mask"}


@dataclass(frozen=True)
class Scores:
    """Average precision and recall in 0..1 as defined by COCO; NaN without ground truth."""

    AP: float  # mean over the IoU thresholds 0.50, 0.55, ..., 0.95
    AP50: float
    AP75: float
    APs: float  # objects below 32^2 pixels
    APm: float  # objects up to 96^2 pixels
    APl: float  # larger objects
    AR1: float  # mean over the IoU thresholds of the recall with 1 detection per image
    AR10: float
    AR100: float
    ARs: float  # with 100 detections, of small, medium and large objects
    ARm: float
    ARl: float
    per_category: dict[int, float]  # AP by category id
    per_category_AP50: dict[int, float]


Metrics = dict[Kind, Scores]


def detect(
    model: nn.Module,
    dataset: CocoDataset,
    device: torch.device,
    *,
    batch_size: int = 1,
    workers: int = 0,
    progress: bool = True,
    amp_dtype: torch.dtype | None = None,
    categories: Sequence[Category | None] | None = None,
) -> list[dict[str, Any]]:
    """Detect objects in all images of a data set; under `torchrun` each process handles a part and gets all results.

    `categories` are those of the detector, by default the data set's; detections of a None are dropped.

    Return entries of a COCO results file in the order of the images, then of decreasing score: ``image_id``,
    ``category_id``, ``bbox`` (x, y, width, height), ``score`` and, from a network with masks, ``segmentation`` (run
    lengths).
    """
    share = range(rank(), len(dataset), world_size())
    loader: DataLoader[Sample | UserError] = DataLoader(
        _Share(dataset, share),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=prepare_worker,
        pin_memory=device.type == "cuda",
    )
    results = []
    quiet = None if progress and is_main() else True  # None: show it on a terminal
    bar = tqdm(total=len(share), desc="detecting", unit="image", leave=False, disable=quiet)
    with evaluating(model), worker_errors(), bar:
        for batch in loader:
            for sample in batch:
                if isinstance(sample, UserError):
                    raise sample
            images = [image.to(device, non_blocking=True) for image, _ in batch]
            sizes = [(image.shape[2], image.shape[1]) for image in images]
            for found, (_, target) in zip(infer(model, images, sizes, amp_dtype=amp_dtype), batch):
                results += coco_results(found, int(target["image_id"]), categories or dataset.categories)
            bar.update(len(batch))
    position = {image_id: index for index, image_id in enumerate(dataset.image_ids)}
    return sorted(gather_lists(results), key=lambda result: position[result["image_id"]])


def evaluated_kinds(network: NetworkConfig) -> tuple[Kind, ...]:
    """Return the kinds of results that a detector is evaluated on."""
    return ("bbox", "segm") if network.has_masks else ("bbox",)


@dataclass(frozen=True, eq=False)
class _Share(Dataset[Sample | UserError]):
    """Part of a data set; an unreadable sample is its `UserError`, which a DataLoader would turn into a traceback."""

    dataset: CocoDataset
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Sample | UserError:
        try:
            return self.dataset[self.indices[position]]
        except UserError as error:
            return error


def coco_metrics(
    coco: pycocotools.coco.COCO,
    results: Sequence[dict[str, Any]],
    image_ids: Iterable[int],
    kinds: Sequence[Kind] = ("bbox",),
    *,
    package: Package = "auto",
) -> Metrics:
    """Compute the average precision of detections.

    Parameters
    ----------
    coco
        Ground truth from `CocoDataset`, with masks if `kinds` contains them; it is not modified.
    results
        Entries of a COCO results file; those in other images than `image_ids` are ignored.
    kinds
        Evaluate boxes, masks or both. The area of a detection is the area of its box or its mask accordingly.
    package
        ``auto`` uses faster-coco-eval if it is installed. Both packages give the same numbers.
    """
    chosen = sorted(set(image_ids))
    return {kind: _evaluate(_ground_truth(coco, chosen, kind), results, kind, package) for kind in kinds}


def metrics_table(metrics: Metrics, categories: Sequence[Category]) -> str:
    """Format metrics as text: a line for boxes, one for masks, then one per category."""
    overall = [["", *SUMMARY]]
    for kind, scores in metrics.items():
        overall.append([TITLES[kind], *(_number(getattr(scores, name)) for name in SUMMARY)])
    by_category = [["AP by category", *(TITLES[kind] for kind in metrics)]]
    by_category += [
        [printable(category.name), *(_number(scores.per_category[category.id]) for scores in metrics.values())]
        for category in categories
    ]
    width = max(len(row[0]) for row in overall + by_category)
    return "\n\n".join(
        "\n".join(row[0].ljust(width) + "".join(cell.rjust(8) for cell in row[1:]) for row in table)
        for table in (overall, by_category)
    )


def write_results(
    folder: Path, results: Sequence[dict[str, Any]], metrics: Metrics, categories: Sequence[Category]
) -> None:
    """Write ``metrics.json``, in which NaN becomes null, and the detections, see `write_detections`."""
    write_detections(folder, results, tuple(metrics))
    values: dict[str, Any] = {}
    for kind, scores in metrics.items():
        per_category = [
            {
                "id": category.id,
                "name": category.name,
                "AP": _null(scores.per_category[category.id]),
                "AP50": _null(scores.per_category_AP50[category.id]),
            }
            for category in categories
        ]
        values[kind] = {name: _null(getattr(scores, name)) for name in (*SUMMARY, *RECALL)}
        values[kind]["per_category"] = per_category
    try:
        write_json(folder / "metrics.json", values, indent=2)
    except OSError as error:
        raise cannot_write(error.filename or folder, error) from None


def write_detections(folder: Path, results: Sequence[dict[str, Any]], kinds: Sequence[Kind]) -> None:
    """Write ``detections_bbox.json`` or ``detections_segm.json`` for each kind.

    They are COCO results files for other programs, COCO's evaluation server and `load_results`. A file is replaced only
    after the new one has been written completely.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for kind in kinds:
            write_json(folder / f"detections_{kind}.json", _of_kind(results, kind))
    except OSError as error:
        raise cannot_write(error.filename or folder, error) from None


def load_results(path: Path, coco: pycocotools.coco.COCO) -> tuple[list[dict[str, Any]], tuple[Kind, ...]]:
    """Read a COCO results file and check that it fits the ground truth.

    Return the entries, and the kinds that all of them have: boxes, masks or both. An empty list counts as boxes.
    """
    results = read_json(path)
    if not isinstance(results, list):
        raise UserError(
            f"{path}: must hold a list of detections, as COCO's results files do, got {_json_type(results)}"
        )
    fields: set[str] = set(FIELDS.values())
    for index, result in enumerate(results):
        if problem := _normalise(result, coco):
            raise UserError(f"{path}: detection number {index + 1} {problem}")
        fields &= set(result)
        if not fields:
            raise UserError(f"{path}: some detections have no bbox and others no segmentation; all need the same")
    return results, tuple(kind for kind, field in FIELDS.items() if field in fields and (results or kind == "bbox"))


def _evaluate(truth: dict[str, Any], results: Sequence[dict[str, Any]], kind: Kind, package: Package) -> Scores:
    """Run the standard package on a copy of the data, which it may change."""
    COCO, COCOeval = _classes(package)
    # The packages cannot use all ids: faster-coco-eval has no negative ones.
    number = {image["id"]: index for index, image in enumerate(truth["images"], 1)}
    for item in truth["images"]:
        item["id"] = number[item["id"]]
    for item in truth["annotations"]:
        item["image_id"] = number[item["image_id"]]
    found = _of_kind((result for result in results if result["image_id"] in number), kind)
    for item in found:
        item["image_id"] = number[item["image_id"]]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        if found:
            detections = coco.loadRes(found)
        else:  # pycocotools cannot load an empty list
            detections = COCO()
            detections.dataset = {**truth, "annotations": []}
            detections.createIndex()
        evaluation = COCOeval(coco, detections, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # Axes of precision: IoU, recall, category, area (the first is all), detections per image (the last is 100).
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    names = (*SUMMARY, *RECALL)
    summary = {name: float(value) if value > -1 else math.nan for name, value in zip(names, evaluation.stats)}
    categories = list(map(int, evaluation.params.catIds))
    return Scores(
        **summary,
        per_category=dict(zip(categories, map(_mean, np.moveaxis(precision, 2, 0)))),
        per_category_AP50=dict(zip(categories, map(_mean, np.moveaxis(precision[0], 1, 0)))),
    )


def _mean(values: npt.NDArray[np.float64]) -> float:
    """Return the mean of precisions; -1 marks those without ground truth."""
    return float(values[values > -1].mean()) if (values > -1).any() else math.nan


def _classes(package: Package) -> tuple[Any, Any]:
    if package != "pycocotools":
        try:
            import faster_coco_eval

            return faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster
        except ImportError:
            if package != "auto":
                raise
    return pycocotools.coco.COCO, pycocotools.cocoeval.COCOeval


def _ground_truth(coco: pycocotools.coco.COCO, image_ids: list[int], kind: Kind) -> dict[str, Any]:
    """Copy the evaluated part of the data set."""
    keys = ["image_id", "category_id", "bbox", "area", "iscrowd", *(["segmentation"] if kind == "segm" else [])]
    counted = [annotation for image_id in image_ids for annotation in coco.imgToAnns.get(image_id, [])]
    if kind == "segm" and not all("segmentation" in annotation for annotation in counted):
        raise UserError("the mask AP needs a data set that was made with masks=True")
    return {
        "images": [{key: coco.imgs[image_id][key] for key in ("id", "height", "width")} for image_id in image_ids],
        "categories": [dict(category) for category in coco.cats.values()],
        # The packages use the id 0 for no match.
        "annotations": [
            {"id": number, **{key: annotation[key] for key in keys}} for number, annotation in enumerate(counted, 1)
        ],
    }


def _of_kind(results: Iterable[dict[str, Any]], kind: Kind) -> list[dict[str, Any]]:
    """Reduce entries to the box or the mask, as the packages take the area from the box if both are present."""
    keys = ("image_id", "category_id", FIELDS[kind], "score")
    try:
        return [{key: result[key] for key in keys} for result in results]
    except KeyError:
        raise UserError(f"the {TITLES[kind]} AP cannot be evaluated: some detections have no {FIELDS[kind]}") from None


def _normalise(result: Any, coco: pycocotools.coco.COCO) -> str | None:
    """Encode the mask of an entry of a results file in place; return the problem if the entry is unusable."""
    if not isinstance(result, dict):
        return f"must be an object, got {_json_type(result)}"
    for key in ("image_id", "category_id", "score"):
        if key not in result:
            return f"has no {key}"
    for key, known in (("image_id", coco.imgs), ("category_id", coco.cats)):
        if type(result[key]) is not int or result[key] not in known:
            return f"has the {key} {_short(result[key])}, which is not in the annotations"
    if not is_finite(result["score"]):
        return f"has the score {_short(result['score'])}, which is no number"
    if not set(FIELDS.values()) & set(result):
        return "has neither bbox nor segmentation"
    if "bbox" in result and not _is_box(result["bbox"]):
        return f"has the bbox {_short(result['bbox'])}, which is not [x, y, width, height]"
    if "segmentation" in result:
        image = coco.imgs[result["image_id"]]
        code = encode_segmentation(result["segmentation"], image["height"], image["width"])
        if code is None:
            return f"has a segmentation that is no mask of {image['width']}x{image['height']} pixels"
        result["segmentation"] = {"size": code["size"], "counts": code["counts"].decode()}
    return None


def _is_box(value: object) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(is_finite, value)) and min(value[2:]) >= 0


def _short(value: object) -> str:
    return repr(value)[:60]


def _json_type(value: object) -> str:
    return {dict: "an object", str: "a string", type(None): "null"}.get(type(value), "something else")


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _null(value: float) -> float | None:
    return None if math.isnan(value) else value
