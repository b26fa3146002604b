"""Options of the commands: one dataclass per command, from which `command_line` generates the parser."""

# ruff: noqa: RUF009 -- `option` and `required` are `dataclasses.field`

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .config import option
from .predict import SpatialSupportView
from .presets import PRESETS
from .recipes import ABLATION_IMAGES, ABLATION_VARIANTS


def required(help: str, **metadata: Any) -> Any:
    """Declare a field without a default."""
    return field(metadata={"help": help, "minimum": None, "maximum": None, **metadata})


@dataclass(frozen=True, kw_only=True)
class DeviceOption:
    """Device to run on."""

    device: str = option("auto", "cpu, cuda or cuda:1; default: the GPU if there is one")


@dataclass(frozen=True, kw_only=True)
class SetOption:
    """Changes of the configuration."""

    set: tuple[str, ...] = option(
        (), "options of the configuration, such as network.gamma=1; train --help lists all", metavar="OPTION=VALUE"
    )


@dataclass(frozen=True, kw_only=True)
class AutocastOption:
    """Precision of inference."""

    amp: Literal["none", "float16", "bfloat16"] = option("none", "data type of autocast")


@dataclass(frozen=True, kw_only=True)
class DataOption:
    """Data set in one folder."""

    data: Path | None = option(
        None, "folder with annotations/instances_train.json, instances_val.json and images/, or with COCO's own names"
    )


@dataclass(frozen=True, kw_only=True)
class TrainOptions(DataOption, SetOption, DeviceOption):
    """Train a detector on a COCO data set.

    With several processes: torchrun -m examples.detector train ...
    """

    out: Path = required("folder for checkpoints, metrics and TensorBoard files")
    train_annotations: Path | None = option(None, "COCO JSON file to train on, instead of --data")
    train_images: Path | None = option(None, "folder of the images of --train-annotations")
    val_annotations: Path | None = option(None, "COCO JSON file to evaluate on, instead of --data")
    val_images: Path | None = option(None, "folder of the images of --val-annotations")
    preset: str | None = option(None, f"sets network.preset: {', '.join(PRESETS)}")
    detector: str | None = option(None, "sets network.detector: faster, mask or faster-fpn", metavar="KIND")
    backbone: str | None = option(None, "sets network.backbone, such as resnet50 or small", metavar="NAME")
    weights: str | None = option(
        None,
        "weights of the backbone: imagenet, the name of torchvision weights, a .pth, .safetensors or .npz file with "
        "torchvision's parameter names, or none; ResNets from Caffe and Keras need --set network.stride_style=caffe; "
        "default: imagenet, or none for the small backbone",
    )
    mimic: str | None = option(
        None,
        "sets mimicking.regions, the regions for R-CNN feature mimicking: fg (the default of dcnv2-mimic), bg, all or "
        "none. On an H200, a training iteration with 2 images of 800x1333 and 32 crops each takes 3 times as long, "
        "or 1.9 times with training.amp=bfloat16; prediction is not slower",
        metavar="REGIONS",
    )
    resume: bool = option(False, "continue from the checkpoint in --out")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(DataOption, SetOption, AutocastOption, DeviceOption):
    """Compute the COCO average precision of a checkpoint or of a results file."""

    checkpoint: Path | None = option(None, "checkpoint written by `train`", exclusive=True)
    results: Path | None = option(None, "detections in COCO's results format", exclusive=True)
    annotations: Path | None = option(None, "COCO JSON file, instead of --data")
    images: Path | None = option(None, "folder of the images of --annotations")
    split: Literal["train", "val"] = option("val", "split of --data to evaluate on")
    out: Path | None = option(None, "folder for metrics.json and the detections; default: only print the metrics")
    batch_size: int = option(1, "images per forward pass", 1, 4096)


@dataclass(frozen=True, kw_only=True)
class PredictOptions(SetOption, AutocastOption, DeviceOption):
    """Detect objects in images; write pictures and a JSON file."""

    images: tuple[str, ...] = required("files, folders or glob patterns", positional=True)
    checkpoint: Path = required("checkpoint written by `train`")
    out: Path = required("folder for the pictures and predictions.json")
    threshold: float = option(0.5, "minimum score of a detection", 0, 1)


@dataclass(frozen=True, kw_only=True)
class SpatialSupportOptions(SpatialSupportView, SetOption, DeviceOption):
    """Draw the spatial support of trained detectors: figures 1 and 2 of the paper for an image.

    For each checkpoint, the figure shows the effective sampling points or bins, the receptive field and the saliency
    region of each node. Histograms show the offsets and masks. Without --node and --roi, the nodes are the smallest
    and the largest object that the last network detects, and the background.
    """

    checkpoint: tuple[Path, ...] = required("checkpoints written by `train`, drawn side by side")
    image: Path = required("image file")
    out: Path = required("folder for the pictures")


@dataclass(frozen=True, kw_only=True)
class FlopsOptions(SetOption):
    """Count the parameters and multiply-adds of all presets and compare them with the paper's."""

    backbone: str | None = option(None, "sets network.backbone; default: resnet50, the paper's", metavar="NAME")
    json: bool = option(False, "print exact numbers as JSON")


@dataclass(frozen=True, kw_only=True)
class SynthOptions:
    """Write a synthetic COCO data set of deformed shapes."""

    folder: Path = required("folder to create", positional=True)
    train: int = option(1000, "number of training images", 0, 10**6)
    val: int = option(200, "number of validation images", 0, 10**6)
    size: int = option(160, "width and height of the images, pixels", 32, 4096)
    deformation: float = option(1.0, "strength of the deformation, 0 to 2; 0: all shapes upright", 0, 2)
    seed: int = option(0, "seed of all random numbers", 0, 2**63 - 1)


@dataclass(frozen=True, kw_only=True)
class AblateOptions(DataOption, SetOption, DeviceOption):
    """Train several presets with several seeds; write a table and a plot.

    Each variant is trained with each seed on one data set. The same command continues where it was interrupted, and
    adds variants and seeds to existing results. Scale reduced is Mask R-CNN on the small backbone with the demo's
    recipe, 12 epochs and 8 mimicking crops of 56x56 per image; full is ResNet-50 with the paper's recipe.
    """

    out: Path = option(Path("out/ablation"), "folder of the experiment")
    variants: tuple[str, ...] = option(
        ABLATION_VARIANTS, "presets; MIMIC sets the regions to mimic: fg, bg, all or none", metavar="PRESET[:MIMIC]"
    )
    seeds: int = option(3, "runs per variant", 1, 1000)
    data: Path | None = option(
        None,
        f"COCO data set, as for train; default: {' + '.join(map(str, ABLATION_IMAGES))} synthetic images",
    )
    scale: Literal["auto", "reduced", "full"] = option("auto", "auto: full on a GPU, reduced on a CPU")
    weights: str | None = option(None, "weights of the backbone, as for train")


@dataclass(frozen=True, kw_only=True)
class DemoOptions(DeviceOption):
    """Write synthetic data, then train, evaluate and predict; takes minutes on a CPU."""

    out: Path = option(Path("out/detector"), "folder of the demo")
