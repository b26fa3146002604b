"""The command line: ``python -m examples.detector COMMAND``."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NoReturn

import torch

from .config import Config, describe_options
from .data import CocoDataset, check_categories, find_data, find_images, write_synthetic
from .engine import (
    Interrupted,
    Kind,
    coco_metrics,
    compared,
    detect,
    is_main,
    load_results,
    metrics_table,
    session,
    train,
    world_size,
    write_results,
)
from .errors import UserError
from .model import build_detector, cost_rows, cost_table, load_backbone, load_detector
from .predict import AMP_TYPES, View, predict, run_support, write_predictions
from .presets import PRESETS
from .recipes import TRAIN_IMAGES, VAL_IMAGES, VARIANTS, run_ablation, run_demo


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help tells more)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns
    -------
    int
        The exit code: 0; 2 for a mistake of the user, which is named in one line on stderr; 128 + the number of the
        signal that ended a training.
    """
    try:
        options = _parser().parse_args(arguments)
        options.run(options)
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        print(f"error{'' if rank == '0' else f' in process {rank}'}: {error}", file=sys.stderr)
        return 2
    except Interrupted as interruption:
        print(interruption, file=sys.stderr)
        return interruption.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever reads the output has enough of it; nothing may be flushed into the pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def run_train(options: argparse.Namespace) -> None:
    config = _config(options)
    masks = config.network.detector == "mask"
    train_annotations, train_images = _data(options, "train")
    train_set = CocoDataset(train_annotations, train_images, masks=masks, keep_empty=False)
    val_set = None
    if options.val_annotations or options.data:
        val_annotations, val_images = _data(options, "val")
        val_set = CocoDataset(val_annotations, val_images, masks=masks, keep_empty=True)
    with session(options.device) as device:
        _warn(train_set, train_annotations)
        if val_set:
            _warn(val_set, val_annotations)
        torch.manual_seed(config.training.seed)
        model = build_detector(config.network, len(train_set.categories))
        weights = options.weights or ("none" if config.network.backbone == "small" else "imagenet")
        if weights != "none" and not options.resume:
            load_backbone(model, weights, config.network.backbone)
        train(model, config, train_set, val_set, options.out, device, resume=options.resume)


def run_evaluate(options: argparse.Namespace) -> None:
    if options.results:
        _make_folder(options.out)
        annotations = options.annotations or _data(options, options.split)[0]
        truth = CocoDataset(annotations, None, masks=False, keep_empty=True)
        results, kinds = load_results(options.results, truth.coco)
        if "segm" in kinds:
            truth = CocoDataset(annotations, None, masks=True, keep_empty=True)
        _warn(truth, annotations)
        _report(truth, results, kinds, options.out)
        return
    annotations, images = _data(options, options.split)
    _make_folder(options.out)
    with session(options.device) as device:
        model, config, categories = load_detector(options.checkpoint, device, options.set)
        masks = config.network.detector == "mask"
        dataset = CocoDataset(annotations, images, masks=masks, keep_empty=True)
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
            _report(dataset, results, compared(config.network), options.out)


def run_predict(options: argparse.Namespace) -> None:
    paths = find_images(options.images)
    _make_folder(options.out)
    with session(options.device) as device:
        if world_size() > 1:
            raise UserError("predict runs in one process, not under torchrun")
        model, _, categories = load_detector(options.checkpoint, device, options.set)
        found = predict(model, paths, device, threshold=options.threshold, amp_dtype=AMP_TYPES[options.amp])
        number = write_predictions(found, options.out, categories, inputs=paths)
    scores = f"scores from {options.threshold:g} on" + ("" if number else ", --threshold changes that")
    print(f"{number} detections ({scores}) in {len(paths)} images: pictures and predictions.json in {options.out}")


def run_flops(options: argparse.Namespace) -> None:
    backbone = [f"network.backbone={options.backbone}"] if options.backbone else []
    both = (Config().set([f"network.detector={kind}", *backbone, *options.set]).network for kind in ("faster", "mask"))
    networks = list(dict.fromkeys(both))
    if options.json:
        print(json.dumps([row for network in networks for row in cost_rows(network)], indent=1))
    else:
        print("\n\n".join(cost_table(network) for network in networks))


def run_synth(options: argparse.Namespace) -> None:
    for split in ("train", "val"):
        if (existing := options.folder / "annotations" / f"instances_{split}.json").exists():
            raise UserError(f"{existing} exists already: give another folder")
    write_synthetic(
        options.folder,
        train=options.train,
        val=options.val,
        size=options.size,
        deformation=options.deformation,
        seed=options.seed,
    )
    print(f"{options.train} + {options.val} images in {options.folder}; train with --data {options.folder}")


def run_ablate(options: argparse.Namespace) -> None:
    run_ablation(
        options.out,
        options.device,
        variants=options.variants,
        seeds=options.seeds,
        data=options.data,
        scale=options.scale,
        assignments=options.set,
        weights=options.weights,
    )
    print(f"{options.out}: table.md, results.json, plot.png")


def run_support_command(options: argparse.Namespace) -> None:
    with session(options.device) as device:
        if world_size() > 1:
            raise UserError("support runs in one process, not under torchrun")
        paths = run_support(
            options.checkpoint,
            options.image,
            options.out,
            device,
            View(
                figure=options.figure,
                points=options.node,
                boxes=options.roi,
                category=options.category,
                layer=options.layer,
                depth=options.depth,
                bound=options.bound,
                budget=options.budget,
            ),
            assignments=options.set,
        )
    print("\n".join(map(str, paths)))


def _config(options: argparse.Namespace) -> Config:
    named = [
        f"network.{name}={value}"
        for name in ("preset", "detector", "backbone")
        if (value := getattr(options, name)) is not None
    ]
    if options.mimic:
        named.append(f"mimicking.regions={options.mimic}")
    return Config().set([*named, *options.set])


def _data(options: argparse.Namespace, split: Literal["train", "val"]) -> tuple[Path, Path]:
    """The json and the folder of images of a split, from ``--data`` or named one by one."""
    prefix = f"{split}_" if hasattr(options, f"{split}_annotations") else ""
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
    """Before anything is computed, not after."""
    try:
        if out:
            out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made a folder ({error.strerror})") from None


def _warn(dataset: CocoDataset, annotations: Path) -> None:
    for line in dataset.report if is_main() else ():
        print(f"{annotations}: {line}", file=sys.stderr)


def _report(dataset: CocoDataset, results: list[dict[str, object]], kinds: tuple[Kind, ...], out: Path | None) -> None:
    metrics = coco_metrics(dataset.coco, results, dataset.image_ids, kinds)
    print(metrics_table(metrics, dataset.categories))
    if out:
        write_results(out, results, metrics, dataset.categories)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m examples.detector",
        description="Faster and Mask R-CNN with deformable convolution and RoI pooling (Deformable ConvNets v2).",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)

    command = commands.add_parser(
        "train",
        help="train a detector on a COCO data set",
        description="Train a detector on a COCO data set. Several processes: torchrun -m examples.detector train ...",
        epilog=f"options for --set, with their defaults:\n{describe_options()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run_train)
    _add_data(command, "train", "val")
    command.add_argument("--out", type=_path, required=True, help="folder for checkpoints, metrics and TensorBoard")
    command.add_argument("--preset", metavar="PRESET", help=f"network.preset: {', '.join(PRESETS)}")
    command.add_argument("--detector", metavar="KIND", help="network.detector: faster or mask")
    command.add_argument("--backbone", metavar="NAME", help="network.backbone, such as resnet50 or small")
    command.add_argument(
        "--weights",
        help="for the backbone: imagenet (the default but for small), a name of torchvision's weights, a .pth, "
        ".safetensors or .npz file with torchvision's parameter names, or none; Caffe's and Keras' ResNets need "
        "--set network.stride_style=caffe",
    )
    command.add_argument(
        "--mimic",
        metavar="REGIONS",
        help="mimicking.regions: fg, bg, all or none; R-CNN feature mimicking, which the preset dcnv2-mimic has (fg). "
        "An iteration with 2 images of 800x1333 and 32 crops for each took 3 times as long on an H200, 1.9 times with "
        "training.amp=bfloat16; prediction costs nothing more",
    )
    command.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    _add_set(command)
    _add_device(command)

    command = commands.add_parser("evaluate", help="COCO's average precision of a checkpoint or of a results json")
    command.set_defaults(run=run_evaluate)
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", type=_path, help="what `train` wrote")
    what.add_argument("--results", type=_path, help="json of detections in COCO's results format")
    _add_data(command, "")
    command.add_argument("--split", choices=("train", "val"), default="val", help="of --data; default: %(default)s")
    command.add_argument("--out", type=_path, help="folder for metrics.json and the detections")
    command.add_argument("--batch-size", type=_positive, default=1, help="images at a time; default: %(default)s")
    _add_set(command)
    _add_amp(command)
    _add_device(command)

    command = commands.add_parser("predict", help="detect in images; pictures and a json")
    command.set_defaults(run=run_predict)
    command.add_argument("images", nargs="+", help="files, folders or globs")
    command.add_argument("--checkpoint", type=_path, required=True, help="what `train` wrote")
    command.add_argument("--out", type=_path, required=True, help="folder for the pictures and predictions.json")
    command.add_argument("--threshold", type=_share, default=0.5, help="least score; default: %(default)s")
    _add_set(command)
    _add_amp(command)
    _add_device(command)

    command = commands.add_parser(
        "support",
        help="where trained detectors look: figures 1 and 2 of the paper for an image",
        description="Effective sampling points or bins, receptive field and saliency region of three nodes, for each "
        "checkpoint; and histograms of its offsets and masks. Without --node and --roi: the smallest and the largest "
        "object that the last network detects, and the background.",
    )
    command.set_defaults(run=run_support_command)
    command.add_argument(
        "--checkpoint", type=_path, nargs="+", required=True, help="what `train` wrote; several: beside"
    )
    command.add_argument("--image", type=_path, required=True)
    command.add_argument("--out", type=_path, required=True, help="folder for the pictures")
    command.add_argument(
        "--figure",
        type=int,
        choices=(1, 2),
        default=View.figure,
        help="1: pixels of a layer; 2: regions; default: %(default)s",
    )
    command.add_argument(
        "--node", type=_numbers(2), action="append", default=[], metavar="X,Y", help="pixel; repeatable"
    )
    command.add_argument(
        "--roi", type=_numbers(4), action="append", default=[], metavar="X1,Y1,X2,Y2", help="region; repeatable"
    )
    command.add_argument("--category", help="whose score a region's node is; default: the best")
    command.add_argument(
        "--layer", default=View.layer, help="whose pixels are the nodes of figure 1; default: %(default)s"
    )
    command.add_argument(
        "--depth", type=_positive, default=View.depth, help="layers whose points are drawn; default: %(default)s"
    )
    command.add_argument(
        "--bound",
        type=_share,
        default=View.bound,
        help="error of the response to the saliency region; default: %(default)s",
    )
    command.add_argument(
        "--budget", type=_positive, default=View.budget, help="images run to find such a region; default: %(default)s"
    )
    _add_set(command)
    _add_device(command)

    command = commands.add_parser("flops", help="parameters and multiply-adds of all presets beside the paper's")
    command.set_defaults(run=run_flops)
    command.add_argument("--backbone", metavar="NAME", help="network.backbone; default: resnet50, the paper's")
    command.add_argument("--json", action="store_true", help="exact numbers for machines")
    _add_set(command)

    command = commands.add_parser("synth", help="write a COCO data set of deformed shapes")
    command.set_defaults(run=run_synth)
    command.add_argument("folder", type=_path, help="a new one")
    command.add_argument("--train", type=int, default=1000, help="images to train on; default: %(default)s")
    command.add_argument("--val", type=int, default=200, help="images to evaluate on; default: %(default)s")
    command.add_argument("--size", type=int, default=160, help="sides of an image, pixels; default: %(default)s")
    command.add_argument("--deformation", type=float, default=1.0, help="0: all upright; default: %(default)s")
    command.add_argument("--seed", type=int, default=0, help="default: %(default)s")

    command = commands.add_parser(
        "ablate",
        help="train presets and ways of mimicking with several seeds; a table and a plot",
        description="Train each variant with each seed on one data set and compare them. The same command goes on "
        "where it was interrupted, and adds variants and seeds to what is there. reduced: Mask R-CNN on the small "
        "backbone, the demo's recipe with 12 epochs and 8 mimicking crops of 56x56 for an image; full: ResNet-50, the "
        "paper's recipe.",
    )
    command.set_defaults(run=run_ablate)
    command.add_argument("--out", type=_path, default=Path("out/ablation"), help="default: %(default)s")
    command.add_argument(
        "--variants",
        nargs="+",
        default=VARIANTS,
        metavar="PRESET[:MIMIC]",
        help=f"MIMIC is fg, bg, all or none; default: {' '.join(VARIANTS)}",
    )
    command.add_argument("--seeds", type=_positive, default=3, help="runs of each variant; default: %(default)s")
    command.add_argument(
        "--data",
        type=_path,
        help="folder of a COCO data set as for train; default: deformed shapes as from synth, "
        f"{TRAIN_IMAGES} + {VAL_IMAGES} images",
    )
    command.add_argument(
        "--scale", choices=("auto", "reduced", "full"), default="auto", help="default: full on a GPU, reduced on a CPU"
    )
    command.add_argument("--weights", help="for the backbone, as for train")
    _add_set(command)
    _add_device(command)

    command = commands.add_parser("demo", help="all of it on a small synthetic set, in minutes on a CPU")
    command.set_defaults(run=lambda options: run_demo(options.out, options.device))
    command.add_argument("--out", type=_path, default=Path("out/detector"), help="default: %(default)s")
    _add_device(command)
    return parser


def _add_data(command: argparse.ArgumentParser, *splits: str) -> None:
    command.add_argument(
        "--data",
        type=_path,
        help="folder with annotations/instances_train.json, instances_val.json and images/, or COCO's own layout",
    )
    for split in splits:
        prefix = f"--{split}-" if split else "--"
        of = {"train": " to train on", "val": " to evaluate on", "": ""}[split]
        command.add_argument(f"{prefix}annotations", type=_path, help=f"COCO json{of}, instead of --data")
        command.add_argument(f"{prefix}images", type=_path, help="folder of its images")


def _add_set(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="OPTION=VALUE", help="such as network.gamma=1"
    )


def _add_amp(command: argparse.ArgumentParser) -> None:
    command.add_argument("--amp", choices=tuple(AMP_TYPES), default="none", help="autocast; default: %(default)s")


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; default: the GPU if there is one")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number between 0 and 1, got {text!r}")
    return value


def _numbers(count: int) -> Callable[[str], list[float]]:
    """A parser of so many numbers with commas between them."""

    def parse(text: str) -> list[float]:
        try:
            values = [float(part) for part in text.split(",")]
        except ValueError:
            values = []
        if len(values) != count or not all(map(math.isfinite, values)):
            raise argparse.ArgumentTypeError(f"must be {count} numbers with commas between them, got {text!r}")
        return values

    return parse


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("must name a file or folder, got nothing")
    return Path(text)


if __name__ == "__main__":
    sys.exit(main())
