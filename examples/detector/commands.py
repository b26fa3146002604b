"""Functions that run the commands."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .command_options import (
    AblateOptions,
    EvaluateOptions,
    ExportOptions,
    FlopsOptions,
    ImportOptions,
    PredictOptions,
    SpatialSupportOptions,
    SynthOptions,
    TrainOptions,
)
from .config import Config
from .data import (
    Category,
    CocoDataset,
    Split,
    find_data,
    find_images,
    has_split,
    import_annotations,
    match_categories,
    read_categories,
    read_voc,
    read_yolo,
    write_synthetic,
)
from .engine import (
    RESUME_HINT,
    Kind,
    build_and_train,
    coco_metrics,
    detect,
    evaluated_kinds,
    from_main,
    is_main,
    load_results,
    metrics_table,
    session,
    world_size,
    write_detections,
    write_results,
)
from .errors import UserError, number_of, printable
from .model import (
    cost_rows,
    cost_table,
    export_onnx,
    load_detector,
    read_initial_detector,
    starting_config,
)
from .predict import AMP_TYPES, draw_checkpoints, predict, write_predictions
from .processes import in_background
from .recipes import run_ablation, run_demo


def run_train(options: TrainOptions) -> None:
    weights, initial = options.weights, None
    if weights:
        initial = read_initial_detector(weights, _say)
    try:
        config = options.configuration(starting_config(initial, options.sets_preset))
    except UserError as error:
        raise UserError(f"--weights {weights} sets the network: {error}" if initial else str(error)) from None
    masks, negatives = config.network.has_masks, config.training.negative_images

    def read() -> tuple[CocoDataset, CocoDataset | None]:
        train = _data(options, "train", "train_")
        val = None
        if options.val_annotations or options.val_images or (options.data and has_split(options.data, "val")):
            val = _data(options, "val", "val_")
        train_set = partial(CocoDataset, *train, masks=masks, keep_empty=False, negatives=negatives)
        val_set = partial(CocoDataset, *val, masks=masks, keep_empty=True) if val else lambda: None
        # In other processes, as reading 100,000 images takes several times the memory of the data set.
        with in_background(train_set) as train_result, in_background(val_set) as val_result:
            return train_result(), val_result()

    with session(options.device) as device:
        train_set, val_set = from_main(read)
        _warn(train_set)
        if val_set:
            _warn(val_set)
        elif options.data:
            _say(f"{options.data}: no validation data, so the training goes without evaluation")
        weights = weights or ("none" if config.network.backbone == "small" else "imagenet")
        resume = options.resume if options.resume == "auto" else options.resume == "always"
        hint = "the same command goes on from there" if options.resume == "auto" else RESUME_HINT
        start: dict[str, Any] = {"weights": weights, "initial": initial}
        build_and_train(config, train_set, val_set, options.out, device, **start, resume=resume, hint=hint)


def run_evaluate(options: EvaluateOptions) -> None:
    if options.results:
        _make_folder(options.out)
        annotations = options.annotations or _data(options, options.split)[0]
        dataset = CocoDataset(annotations, None, masks=False, keep_empty=True)
        if not dataset.annotated:
            raise UserError(f"{dataset.name}: there are no annotations to evaluate detections with")
        results, kinds = load_results(options.results, dataset.coco)
        if "segm" in kinds:
            dataset = CocoDataset(annotations, None, masks=True, keep_empty=True)
        _warn(dataset)
        _report(dataset, results, kinds, options.out)
        return
    assert options.checkpoint is not None
    with session(options.device) as device:
        annotations, images = from_main(lambda: _data(options, options.split))
        _make_folder(options.out)
        model, config, categories = _load(options.checkpoint, device, options)
        dataset = from_main(lambda: CocoDataset(annotations, images, masks=config.network.has_masks, keep_empty=True))
        matched = match_categories(categories, dataset.categories, dataset.name)
        if None in matched:
            _say(
                f"{dataset.name}: has {len(dataset.categories)} of the detector's {number_of(len(matched), 'category')}"
            )
        if dataset.unusable_images and not options.allow_missing:
            raise UserError(
                f"{dataset.name}: {'; '.join(dataset.unusable_images)}: all images are needed, or --allow-missing to "
                "evaluate the others alone"
            )
        if not (dataset.annotated or options.out):
            raise UserError(f"{dataset.name}: there are no annotations, so --out is needed for the detections")
        _warn(dataset)
        results = detect(
            model,
            dataset,
            device,
            batch_size=options.batch_size,
            workers=config.training.workers,
            amp_dtype=AMP_TYPES[options.amp],
            categories=matched,
        )
        if is_main():
            _report(dataset, results, evaluated_kinds(config.network), options.out)


def run_predict(options: PredictOptions) -> None:
    paths = find_images(options.images)
    _make_folder(options.out)
    with session(options.device) as device:
        _require_one_process("predict")
        model, config, categories = _load(options.checkpoint, device, options)
        predictions = predict(
            model,
            paths,
            device,
            threshold=options.threshold,
            batch_size=options.batch_size,
            workers=config.training.workers,
            amp_dtype=AMP_TYPES[options.amp],
        )
        pictures = not options.no_pictures
        number = write_predictions(predictions, options.out, categories, inputs=paths, pictures=pictures)
    lowest = config.network.score_threshold
    scores = f"scores from {max(options.threshold, lowest):g}"
    if not number and (lowest or options.threshold):
        scores += f"; lower {'--threshold' if options.threshold > lowest else '--set network.score_threshold'} for more"
    files = "pictures and predictions.json" if pictures else "predictions.json"
    print(f"{number_of(number, 'detection')} ({scores}) in {number_of(len(paths), 'image')}: {files} in {options.out}")


def run_spatial_support(options: SpatialSupportOptions) -> None:
    with session(options.device) as device:
        _require_one_process("spatial-support")
        paths = draw_checkpoints(
            options.checkpoint,
            options.image,
            options.out,
            device,
            options,
            assignments=options.set,
            categories=_names(options),
            report=_say,
        )
    print("\n".join(printable(str(path)) for path in paths))


def run_export(options: ExportOptions) -> None:
    _make_folder(options.out.parent)
    model, _, categories = _load(options.checkpoint, torch.device("cpu"), options)
    height, width = map(int, options.size.split("x"))
    export_onnx(model, options.out, (height, width), categories)
    print(f"{options.out}: for images of {height}x{width} pixels")


def run_flops(options: FlopsOptions) -> None:
    networks = list(dict.fromkeys([options.config("faster").network, options.config("mask").network]))
    if options.json:
        print(json.dumps([row for network in networks for row in cost_rows(network)], indent=1))
    else:
        print("\n\n".join(cost_table(network) for network in networks))


def run_import(options: ImportOptions) -> None:
    read = {"voc": read_voc, "yolo": read_yolo}[options.format]
    counts, notes = import_annotations(read, options.source, options.out, val_share=options.val_share)
    for line in notes:
        print(printable(line), file=sys.stderr)
    images = ", ".join(f"{split} {count}" for split, count in counts.items())
    print(f"images: {images} in {options.out}; train with --data {options.out}")


def run_synth(options: SynthOptions) -> None:
    for split in ("train", "val"):
        if (existing := options.folder / "annotations" / f"instances_{split}.json").exists():
            raise UserError(f"{existing} exists already: give another folder")
    write_synthetic(**dataclasses.asdict(options))
    print(f"{options.train} + {options.val} images in {options.folder}; train with --data {options.folder}")


def run_ablate(options: AblateOptions) -> None:
    run_ablation(
        options.out,
        options.data,
        variants=options.variants,
        seeds=options.seeds,
        scale=options.scale,
        weights=options.weights,
        assignments=options.set,
        device_name=options.device,
    )
    print(f"{options.out}: table.md, results.json, plot.png")


RUN: dict[str, Callable[[Any], None]] = {
    "train": run_train,
    "evaluate": run_evaluate,
    "predict": run_predict,
    "spatial-support": run_spatial_support,
    "export": run_export,
    "flops": run_flops,
    "import": run_import,
    "synth": run_synth,
    "ablate": run_ablate,
    "demo": lambda options: run_demo(options.out, options.device),
}


def _load(path: Path, device: torch.device, options: Any) -> tuple[Any, Config, list[Category]]:
    """Load a detector with the options ``--set`` and ``--categories``."""
    return load_detector(path, device, options.set, categories=_names(options), report=_say)


def _names(options: Any) -> list[Category] | None:
    return read_categories(options.categories) if options.categories else None


def _say(line: str) -> None:
    """Print a line about the input in the main process."""
    if is_main():
        print(printable(line), file=sys.stderr)


def _data(options: Any, split: Split, prefix: str = "") -> tuple[Any, Any]:
    """Return the JSON file and the image folder of a split, from ``--data`` or from the two options for it.

    If the options take several paths, return tuples.
    """
    annotations, images = getattr(options, f"{prefix}annotations"), getattr(options, f"{prefix}images")
    option = f"--{prefix}".replace("_", "-")
    if annotations and images:
        if isinstance(images, tuple) and len(images) not in (1, len(annotations)):
            raise UserError(
                f"{option}images must name one folder or {len(annotations)}, one for each of {option}annotations, "
                f"got {len(images)}"
            )
        return annotations, images
    if annotations or images:
        missing = "images" if annotations else "annotations"
        raise UserError(f"{option}annotations and {option}images go together, {option}{missing} is missing")
    if options.data is None:
        raise UserError(f"the data are missing: --data FOLDER, or {option}annotations and {option}images")
    return find_data(options.data, split)


def _make_folder(out: Path | None) -> None:
    """Create the output folder before the computation, so that a wrong path fails early."""
    try:
        if out:
            out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made a folder ({error.strerror})") from None


def _require_one_process(command: str) -> None:
    if world_size() > 1:
        raise UserError(f"{command} runs in one process, not under torchrun")


def _warn(dataset: CocoDataset) -> None:
    for line in dataset.report:
        _say(f"{dataset.name}: {line}")


def _report(dataset: CocoDataset, results: list[dict[str, object]], kinds: tuple[Kind, ...], out: Path | None) -> None:
    if not dataset.annotated:
        assert out is not None
        write_detections(out, results, kinds)
        found = f"{number_of(len(results), 'detection')} in {number_of(len(dataset), 'image')}"
        print(f"{found}: {out}; no metrics, as there are no annotations")
        return
    if dataset.boxes_only:
        print(f"{dataset.name}: masks are not evaluated, as no annotation has a segmentation", file=sys.stderr)
        kinds = ("bbox",)
    metrics = coco_metrics(dataset.coco, results, dataset.image_ids, kinds)
    print(metrics_table(metrics, dataset.categories))
    if out:
        write_results(out, results, metrics, dataset.categories)
