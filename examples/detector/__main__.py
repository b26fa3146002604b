"""The command line: ``python -m examples.detector COMMAND``."""

from __future__ import annotations

import os

# OpenMP reads this when torch is imported. By default, its waiting threads keep the cores busy, which makes an
# iteration many times slower if another program uses the machine as well.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import contextlib
import dataclasses
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal


def _report_missing(error: ModuleNotFoundError) -> int:
    """Name the extra that installs a missing package, and return the exit code."""
    package = str(error.name).partition(".")[0]
    if package == "examples":
        raise error
    print(f"error: the package {package} is missing: pip install -e '.[detector]'", file=sys.stderr)
    return 2


try:
    from .command_line import parse
    from .command_options import (
        AblateOptions,
        DemoOptions,
        EvaluateOptions,
        FlopsOptions,
        PredictOptions,
        SpatialSupportOptions,
        SynthOptions,
        TrainOptions,
    )
    from .config import Config, describe_options
    from .data import CocoDataset, check_categories, find_data, find_images, write_synthetic
    from .engine import (
        Interrupted,
        Kind,
        build_and_train,
        coco_metrics,
        detect,
        evaluated_kinds,
        is_main,
        load_results,
        metrics_table,
        session,
        world_size,
        write_results,
    )
    from .errors import UserError, printable
    from .model import cost_rows, cost_table, load_detector
    from .predict import AMP_TYPES, draw_checkpoints, predict, write_predictions
    from .recipes import run_ablation, run_demo
except ModuleNotFoundError as error:
    sys.exit(_report_missing(error))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code.

    The code is 2 after a mistake of the user, which is printed as one line on stderr. After a signal that ended a
    training run, it is 128 + the number of the signal.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # paths and names may have characters that stdout cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    epilogs = {"train": f"options for --set, with their defaults:\n{describe_options()}"}
    try:
        command, options = parse(
            arguments,
            {name: (kind, epilogs.get(name, "")) for name, (_, kind) in COMMANDS.items()},
            "python -m examples.detector",
            "Faster and Mask R-CNN with deformable convolution and RoI pooling (Deformable ConvNets v2).",
        )
        COMMANDS[command][0](options)
        sys.stdout.flush()
    except UserError as error:
        return _report_error(str(error))
    except ModuleNotFoundError as error:
        return _report_missing(error)
    except Interrupted as interruption:
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(interruption, file=sys.stderr)
        return interruption.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _discard_output()  # the reader of the pipe has closed it
        return 0
    except OSError as error:  # of a disk that is full or read-only, a path that is too long, and the like
        try:
            sys.stdout.flush()
        except OSError:
            _discard_output()
        return _report_error(f"{error.filename or 'output'}: {error.strerror or error}")
    return 0


def _discard_output() -> None:
    """Keep the flush at exit from failing again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report_error(message: str) -> int:
    rank = os.environ.get("RANK") or "0"
    print(f"error{'' if rank == '0' else f' in process {rank}'}: {printable(message)}", file=sys.stderr)
    return 2


def run_train(options: TrainOptions) -> None:
    config = _config(options)
    masks, negatives = config.network.has_masks, config.training.negative_images
    train_annotations, train_images = _data(options, "train", "train_")
    train_set = CocoDataset(train_annotations, train_images, masks=masks, keep_empty=False, negatives=negatives)
    val_set = None
    if options.val_annotations or options.data:
        val_annotations, val_images = _data(options, "val", "val_")
        val_set = CocoDataset(val_annotations, val_images, masks=masks, keep_empty=True)
    with session(options.device) as device:
        _warn(train_set, train_annotations)
        if val_set:
            _warn(val_set, val_annotations)
        weights = options.weights or ("none" if config.network.backbone == "small" else "imagenet")
        build_and_train(config, train_set, val_set, options.out, device, weights=weights, resume=options.resume)


def run_evaluate(options: EvaluateOptions) -> None:
    if options.results:
        _make_folder(options.out)
        annotations = options.annotations or _data(options, options.split)[0]
        dataset = CocoDataset(annotations, None, masks=False, keep_empty=True)
        results, kinds = load_results(options.results, dataset.coco)
        if "segm" in kinds:
            dataset = CocoDataset(annotations, None, masks=True, keep_empty=True)
        _warn(dataset, annotations)
        _report(dataset, results, kinds, options.out)
        return
    assert options.checkpoint is not None
    annotations, images = _data(options, options.split)
    _make_folder(options.out)
    with session(options.device) as device:
        model, config, categories = load_detector(options.checkpoint, device, options.set)
        dataset = CocoDataset(annotations, images, masks=config.network.has_masks, keep_empty=True)
        check_categories(categories, dataset.categories, str(annotations))
        _warn(dataset, annotations)
        results = detect(
            model,
            dataset,
            device,
            batch_size=options.batch_size,
            workers=config.training.workers,
            amp_dtype=AMP_TYPES[options.amp],
        )
        if is_main():
            _report(dataset, results, evaluated_kinds(config.network), options.out)


def run_predict(options: PredictOptions) -> None:
    paths = find_images(options.images)
    _make_folder(options.out)
    with session(options.device) as device:
        _require_one_process("predict")
        model, _, categories = load_detector(options.checkpoint, device, options.set)
        predictions = predict(model, paths, device, threshold=options.threshold, amp_dtype=AMP_TYPES[options.amp])
        number = write_predictions(predictions, options.out, categories, inputs=paths)
    scores = f"scores from {options.threshold:g}" + ("" if number else "; lower --threshold for more")
    print(f"{number} detections ({scores}) in {len(paths)} images: pictures and predictions.json in {options.out}")


def run_spatial_support(options: SpatialSupportOptions) -> None:
    with session(options.device) as device:
        _require_one_process("spatial-support")
        paths = draw_checkpoints(
            options.checkpoint, options.image, options.out, device, options, assignments=options.set
        )
    print("\n".join(printable(str(path)) for path in paths))


def run_flops(options: FlopsOptions) -> None:
    backbone = [f"network.backbone={options.backbone}"] if options.backbone else []
    both = (Config().set([f"network.detector={kind}", *backbone, *options.set]).network for kind in ("faster", "mask"))
    networks = list(dict.fromkeys(both))
    if options.json:
        print(json.dumps([row for network in networks for row in cost_rows(network)], indent=1))
    else:
        print("\n\n".join(cost_table(network) for network in networks))


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


COMMANDS: dict[str, tuple[Any, type]] = {
    "train": (run_train, TrainOptions),
    "evaluate": (run_evaluate, EvaluateOptions),
    "predict": (run_predict, PredictOptions),
    "spatial-support": (run_spatial_support, SpatialSupportOptions),
    "flops": (run_flops, FlopsOptions),
    "synth": (run_synth, SynthOptions),
    "ablate": (run_ablate, AblateOptions),
    "demo": (lambda options: run_demo(options.out, options.device), DemoOptions),
}


def _config(options: TrainOptions) -> Config:
    shortcuts = {
        "network.preset": options.preset,
        "network.detector": options.detector,
        "network.backbone": options.backbone,
        "mimicking.regions": options.mimic,
    }
    return Config().set([*(f"{name}={value}" for name, value in shortcuts.items() if value is not None), *options.set])


def _data(options: Any, split: Literal["train", "val"], prefix: str = "") -> tuple[Path, Path]:
    """Return the JSON file and the image folder of a split, from ``--data`` or from the two options for it."""
    annotations, images = getattr(options, f"{prefix}annotations"), getattr(options, f"{prefix}images")
    option = f"--{prefix}".replace("_", "-")
    if annotations and images:
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


def _warn(dataset: CocoDataset, annotations: Path) -> None:
    for line in dataset.report if is_main() else ():
        print(f"{annotations}: {line}", file=sys.stderr)


def _report(dataset: CocoDataset, results: list[dict[str, object]], kinds: tuple[Kind, ...], out: Path | None) -> None:
    metrics = coco_metrics(dataset.coco, results, dataset.image_ids, kinds)
    print(metrics_table(metrics, dataset.categories))
    if out:
        write_results(out, results, metrics, dataset.categories)


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # notebooks export a backend that other environments may lack
    sys.exit(main())
