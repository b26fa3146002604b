"""Options of the commands: one dataclass per command, from which `command_line` generates the parser."""

# ruff: noqa: RUF009 -- `option` and `required` are `dataclasses.field`

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .config import WEIGHT_FILES, Config, option, parse_assignments
from .errors import UserError
from .json_files import read_json
from .presets import PRESETS
from .spatial_support_view import SpatialSupportView
from .variants import ABLATION_IMAGES, ABLATION_VARIANTS, Variant

CHECKPOINT = "checkpoint of `train`, or of a Faster or Mask R-CNN of torchvision, mmdetection or detectron2"


def required(help: str, **metadata: Any) -> Any:
    """Declare a field without a default."""
    return field(metadata={"help": help, "minimum": None, "maximum": None, **metadata})


class Options:
    """Options of a command. Values that need no data or packages are checked when an instance is created."""

    def __post_init__(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class DeviceOption(Options):
    """Device to run on."""

    device: str = option("auto", "cpu, cuda or cuda:1; default: the GPU if there is one")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise UserError(f"--device must be auto, cpu, cuda or cuda:NUMBER, got {self.device!r}")


@dataclass(frozen=True, kw_only=True)
class SetOption(Options):
    """Changes of the configuration."""

    set: tuple[str, ...] = option(
        (), "options of the configuration, such as network.gamma=1; train --help lists all", metavar="OPTION=VALUE"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_assignments(self.set)


@dataclass(frozen=True, kw_only=True)
class AutocastOption(Options):
    """Precision of inference."""

    amp: Literal["none", "float16", "bfloat16"] = option("none", "data type of autocast")


@dataclass(frozen=True, kw_only=True)
class DataOption(Options):
    """Data set in one folder."""

    data: Path | None = option(
        None, "folder with annotations/instances_train.json, instances_val.json and images/, or with COCO's own names"
    )


@dataclass(frozen=True, kw_only=True)
class TrainOptions(DataOption, SetOption, DeviceOption):
    """Train a detector on a COCO data set.

    With several processes: torchrun -m dcnops.detector train ...
    """

    out: Path = required("folder for checkpoints, metrics and TensorBoard files")
    train_annotations: tuple[Path, ...] = option(
        (), "COCO JSON files to train on, instead of --data; several are one data set, and must have equal categories"
    )
    train_images: tuple[Path, ...] = option((), "folder of the images of each of --train-annotations, or of all")
    val_annotations: Path | None = option(None, "COCO JSON file to evaluate on, instead of --data")
    val_images: Path | None = option(None, "folder of the images of --val-annotations")
    preset: str | None = option(
        None, f"sets network.preset: {', '.join(PRESETS)}; default: dcnv2, or that of a detector in --weights"
    )
    detector: str | None = option(
        None,
        "sets network.detector: faster (Faster R-CNN on conv4 and conv5, as in the paper), faster-fpn (with a feature "
        "pyramid) or mask (Mask R-CNN with one); default: faster, or that of a detector in --weights",
        metavar="KIND",
    )
    backbone: str | None = option(
        None,
        "sets network.backbone, such as resnet101, or small for CPUs; default: resnet50, or that of a detector in "
        "--weights",
        metavar="NAME",
    )
    weights: str | None = option(
        None,
        "weights of the backbone: imagenet, the name of torchvision weights, a .pth, .safetensors, .npz or .pkl file "
        "with torchvision's parameter names, or none; ResNets from Caffe and Keras need --set "
        "network.stride_style=caffe. Or a file with a whole detector, of `train`, torchvision, mmdetection or "
        "detectron2, which also sets the options of the network; default: imagenet, or none for the small backbone",
    )
    mimic: str | None = option(
        None,
        "sets mimicking.regions, the regions for R-CNN feature mimicking: fg (the default of dcnv2-mimic), bg, all or "
        "none. On an H200, a training iteration with 2 images of 800x1333 and 32 crops each takes 3 times as long, "
        "or 1.9 times with training.amp=bfloat16; prediction is not slower",
        metavar="REGIONS",
    )
    config: Path | None = option(
        None, "JSON file with the configuration, such as the config.json of another run; --set changes it"
    )
    resume: Literal["never", "always", "auto"] = option(
        "never", "continue from the checkpoint in --out; auto: if there is one; default: never", bare="always"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.weights or "").endswith(WEIGHT_FILES):  # a file may set the network
            self.configuration()

    @property
    def sets_preset(self) -> bool:
        """Return whether the user chooses the preset."""
        return bool(self.preset) or any(item.startswith("network.preset=") for item in self.set)

    def configuration(self, start: Config | None = None) -> Config:
        """Return the configuration of the detector and its training; `start` is that of initial weights."""
        shortcuts = {
            "network.preset": self.preset,
            "network.detector": self.detector,
            "network.backbone": self.backbone,
            "mimicking.regions": self.mimic,
        }
        given = [f"{name}={value}" for name, value in shortcuts.items() if value is not None]
        config = start or Config()
        if self.config:
            try:
                config = Config.from_dict(read_json(self.config))
            except UserError as error:
                raise UserError(f"--config {self.config}: {error}") from None
        return config.set([*given, *self.set])


@dataclass(frozen=True, kw_only=True)
class CategoriesOption(Options):
    """Names of the categories of a checkpoint."""

    categories: Path | None = option(
        None,
        "file with the names of the checkpoint's categories, for checkpoints of other projects that do not have them: "
        "text with a name per line, or a COCO JSON file",
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(DataOption, CategoriesOption, SetOption, AutocastOption, DeviceOption):
    """Compute the COCO average precision of a checkpoint or of a results file.

    Without annotations, as in COCO's test-dev, the detections of the checkpoint are only written to --out, in COCO's
    results format.
    """

    checkpoint: Path | None = option(None, CHECKPOINT, exclusive=True)
    results: Path | None = option(None, "detections in COCO's results format", exclusive=True)
    annotations: Path | None = option(None, "COCO JSON file, instead of --data")
    images: Path | None = option(None, "folder of the images of --annotations")
    split: Literal["train", "val", "test"] = option("val", "split of --data to evaluate on")
    allow_missing: bool = option(False, "evaluate without the images that are missing or unusable")
    out: Path | None = option(None, "folder for metrics.json and the detections; default: only print the metrics")
    batch_size: int = option(1, "images per forward pass", 1, 4096)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.categories and not self.checkpoint:
            raise UserError("--categories goes with --checkpoint; detections in --results have the ids of the data")


@dataclass(frozen=True, kw_only=True)
class PredictOptions(CategoriesOption, SetOption, AutocastOption, DeviceOption):
    """Detect objects in images; write pictures and predictions.json."""

    images: tuple[str, ...] = required("files, folders or glob patterns", positional=True)
    checkpoint: Path = required(CHECKPOINT)
    out: Path = required("folder for the pictures and predictions.json")
    threshold: float = option(0.5, "minimum score of a detection", 0, 1)
    batch_size: int = option(
        1,
        "images per forward pass; only images of the same size after resizing and padding share a batch, so that "
        "the detections differ by rounding errors only",
        1,
        4096,
    )
    no_pictures: bool = option(False, "write only predictions.json, which is much faster")


@dataclass(frozen=True, kw_only=True)
class SpatialSupportOptions(SpatialSupportView, CategoriesOption, SetOption, DeviceOption):
    """Draw the spatial support of trained detectors: figures 1 and 2 of the paper for an image.

    For each checkpoint, the figure shows the effective sampling points or bins, the receptive field and the saliency
    region of each node. Histograms show the offsets and masks. Without --node and --roi, the nodes are the smallest
    and the largest object that the last network detects, and the background.
    """

    checkpoint: tuple[Path, ...] = required(f"{CHECKPOINT}; several are drawn side by side")
    image: Path = required("image file")
    out: Path = required("folder for the pictures")


@dataclass(frozen=True, kw_only=True)
class ExportOptions(CategoriesOption, SetOption):
    """Export a detector to ONNX, for images of one size.

    The file takes image, float32 [1, 3, height, width] (RGB in 0..1), and returns boxes, labels, scores and, from Mask
    R-CNN, masks. It runs without PyTorch, for example in onnxruntime 1.25 or newer. Needs pip install 'dcnops[onnx]'.
    """

    checkpoint: Path = required(CHECKPOINT)
    out: Path = required("ONNX file to write")
    size: str = required("size of the images, pixels", metavar="HEIGHTxWIDTH")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", self.size):
            raise UserError(f"--size must be HEIGHTxWIDTH in pixels, such as 800x1333, got {self.size!r:.40}")


@dataclass(frozen=True, kw_only=True)
class FlopsOptions(SetOption):
    """Count the parameters and multiply-adds of all presets and compare them with the paper's."""

    backbone: str | None = option(None, "sets network.backbone; default: resnet50, the paper's", metavar="NAME")
    json: bool = option(False, "print exact numbers as JSON")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.config("faster")

    def config(self, detector: Literal["faster", "mask"]) -> Config:
        """Return the configuration of a detector; `detector` is the default of network.detector."""
        backbone = [f"network.backbone={self.backbone}"] if self.backbone else []
        return Config().set([f"network.detector={detector}", *backbone, *self.set])


@dataclass(frozen=True, kw_only=True)
class SynthOptions(Options):
    """Write a synthetic COCO data set of deformed shapes."""

    folder: Path = required("folder to create", positional=True)
    train: int = option(1000, "number of training images", 0, 10**6)
    val: int = option(200, "number of validation images", 0, 10**6)
    size: int = option(160, "width and height of the images, pixels", 32, 4096)
    deformation: float = option(1.0, "strength of the deformation, 0 to 2; 0: all shapes upright", 0, 2)
    seed: int = option(0, "seed of all random numbers", 0, 2**63 - 1)


@dataclass(frozen=True, kw_only=True)
class ImportOptions(Options):
    """Copy labelled images from another format to a folder for --data.

    COCO labels need no import: give their folder to --data.

    voc reads the boxes in XML files, as in PASCAL VOC, not the masks; difficult objects are neither trained on nor
    counted in the evaluation. yolo reads text files with boxes or polygons, and the names of the classes from data.yaml
    or classes.txt. The splits of the source are kept.
    """

    format: Literal["voc", "yolo"] = required("format of the labels: voc or yolo", positional=True, metavar="format")
    source: Path = required("folder with images and labels", positional=True)
    out: Path = required("folder to create", positional=True)
    val_share: float = option(0.1, "part of the images to validate on if the source has no split", 0, 0.9)


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

    def __post_init__(self) -> None:
        super().__post_init__()
        for variant in self.variants:
            Variant.parse(variant)


@dataclass(frozen=True, kw_only=True)
class DemoOptions(DeviceOption):
    """Write synthetic data, then train, evaluate and predict; takes minutes on a CPU."""

    out: Path = option(Path("out/detector"), "folder of the demo")


COMMANDS: dict[str, type[Options]] = {
    "train": TrainOptions,
    "evaluate": EvaluateOptions,
    "predict": PredictOptions,
    "spatial-support": SpatialSupportOptions,
    "export": ExportOptions,
    "flops": FlopsOptions,
    "import": ImportOptions,
    "synth": SynthOptions,
    "ablate": AblateOptions,
    "demo": DemoOptions,
}
