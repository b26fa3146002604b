"""Configuration of a detector and of its training; the defaults are the paper's values."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from .errors import UserError
from .presets import PRESETS, STAGES, Preset

T = TypeVar("T")
WEIGHT_FILES = (".pth", ".pt", ".safetensors", ".npz", ".pkl")
MOST_NUMBERS = 100  # in an option such as network.anchor_sizes


def option(default: T, help: str, minimum: float | None = None, maximum: float | None = None, **metadata: Any) -> T:
    """Declare a dataclass field with its help text and its valid range."""
    value: T = field(default=default, metadata={"help": help, "minimum": minimum, "maximum": maximum, **metadata})
    return value


@dataclass(frozen=True)
class NetworkConfig:
    """Configuration of the network; stored in every checkpoint."""

    preset: str = option("dcnv2", "row of Table 1: which layers are deformable")
    convolution: Literal["preset", "regular", "deformable", "modulated"] = option(
        "preset", "kind of the 3x3 convolutions in network.stages; preset: as the preset says"
    )
    stages: Literal["preset", "c5", "c4c5", "c3c5", "c2c5"] = option(
        "preset", "stages with deformable convolutions: conv5, conv4 and conv5, ..."
    )
    pooling: Literal["preset", "quantised", "aligned", "deformable", "modulated"] = option(
        "preset", "kind of RoI pooling; aligned: RoIAlign"
    )
    detector: Literal["faster", "mask", "faster-fpn"] = option(
        "faster", "Faster R-CNN on conv4 and conv5, Mask R-CNN with FPN, or Faster R-CNN with FPN"
    )
    backbone: Literal["resnet50", "resnet101", "resnext101_32x4d", "resnext101_32x8d", "resnext101_64x4d", "small"] = (
        option("resnet50", "small: 8 narrow blocks with GroupNorm for CPUs, no pretrained weights")
    )
    stride_style: Literal["torchvision", "caffe"] = option(
        "torchvision", "stride of a stage in its first 3x3 convolution, or (caffe) in the 1x1 convolution before it"
    )
    frozen_stages: int = option(
        -1,
        "number of frozen stages: 2 is conv1 and conv2, without their offset branches; -1: 2, or 0 for small",
        -1,
        5,
    )
    norm_eps: float = option(1e-5, "term added to the variance in frozen BatchNorm", 0, 1)
    conv_mask_scale: float = option(
        2.0,
        "masks of modulated convolutions are conv_mask_scale * sigmoid; 2, as in the authors' code, starts from the "
        "pretrained network; the paper's text says 1",
        0,
        1000,
    )
    roi_mask_scale: float = option(
        1.0, "the same for modulated RoI pooling: 1 in the authors' code and the text", 0, 1000
    )
    gamma: float = option(0.1, "factor of the offsets in RoI pooling", -1000, 1000)
    deform_groups: int = option(1, "deformable groups of a convolution", 1, 64)
    share_branch: bool = option(True, "share one offset branch of RoI pooling among all pyramid levels")
    pool_branch: Literal["paper", "mmcv"] = option(
        "paper",
        "fully connected layers of that branch: one, or three if modulated; mmcv: three, and two more for the masks, "
        "without roi_mask_scale",
    )
    deform_mask_pool: bool = option(
        False, "make the 14x14 pooling of the mask head deformable too, with a separate branch"
    )
    aligned_masks: bool = option(
        True, "mask targets and pasting with pixel centres at half-integer coordinates; false: as in torchvision"
    )
    aligned: bool = option(
        True, "RoIAlign with pixel centres at half-integer coordinates; false: at integers, as in torchvision's models"
    )
    sampling_ratio: int = option(2, "sampling points of a RoI bin along each axis; 0: adaptive", 0, 64)
    neck_channels: int = option(0, "channels of the maps that RoIs are pooled from; 0: 256, or 64 for small", 0, 2048)
    head_channels: int = option(0, "width of the fully connected layers; 0: 1024, or 256 for small", 0, 8192)
    min_size: int = option(800, "length of the shorter side of the resized image, pixels", 1, 16384)
    max_size: int = option(1333, "maximum length of the longer side, pixels", 1, 16384)
    resize: Literal["torchvision", "opencv", "pillow"] = option(
        "torchvision",
        "library to resize images like: torchvision rounds sides down, the others to the nearest integer, and pixels "
        "to 8 bits; pillow averages when it shrinks",
    )
    image_mean: tuple[float, ...] = option(
        (0.485, 0.456, 0.406), "mean of red, green and blue in 0..1, subtracted from images", 0, 1
    )
    image_std: tuple[float, ...] = option(
        (0.229, 0.224, 0.225), "images are divided by these; 1/255 for networks from Caffe", 1e-6, 1e6
    )
    anchor_sizes: tuple[float, ...] = option(
        (32, 64, 128, 256, 512), "sides of the anchors, pixels; with FPN five, one per level", 1, 1e5
    )
    anchor_ratios: tuple[float, ...] = option((0.5, 1, 2), "height / width of the anchors", 0.01, 100)
    exact_anchors: bool = option(
        False,
        "do not round the sides of anchors and their distance on the coarsest level, as in detectron2 and mmdetection",
    )
    rpn_batch: int = option(256, "anchors per image in the RPN loss", 1, 10**6)
    rpn_positive_fraction: float = option(0.5, "maximum fraction of positive anchors in rpn_batch", 0, 1)
    rpn_positive_iou: float = option(0.7, "minimum IoU of a positive anchor", 0, 1)
    rpn_negative_iou: float = option(0.3, "anchors with a lower IoU are negative", 0, 1)
    rpn_border: float = option(
        -1,
        "the RPN loss ignores anchors that reach more pixels than this out of the image: 0 in Detectron; -1: uses all",
        -1,
        1e5,
    )
    rpn_nms: float = option(0.7, "IoU threshold of NMS of the proposals", 0, 1)
    rpn_candidates_train: int = option(
        0, "proposals before NMS in training; 0: 12000, or 2000 per level with FPN", 0, 10**6
    )
    rpn_candidates_test: int = option(
        0, "proposals before NMS in testing; 0: 6000, or 1000 per level with FPN", 0, 10**6
    )
    proposals_train: int = option(2000, "proposals after NMS in training", 1, 10**6)
    proposals_test: int = option(1000, "proposals after NMS in testing", 1, 10**6)
    roi_batch: int = option(512, "RoIs per image in the loss of the head", 1, 10**6)
    roi_positive_fraction: float = option(0.25, "maximum fraction of positive RoIs in roi_batch", 0, 1)
    roi_positive_iou: float = option(0.5, "minimum IoU of a positive RoI; other RoIs are background", 0, 1)
    box_loss_beta: float = option(
        1.0, "size of a box delta at which the smooth L1 loss of the head becomes linear; 1/9 in torchvision", 1e-6, 1e6
    )
    score_threshold: float = option(0.05, "drop detections with a lower score", 0, 1)
    detection_nms: float = option(0.5, "IoU threshold of NMS of the detections of a class", 0, 1)
    max_detections: int = option(100, "maximum number of detections per image", 1, 10**5)

    def resolve(self) -> NetworkConfig:
        """Return a copy with the values 0 and -1 replaced by the numbers for this backbone and detector."""
        small, levels = self.backbone == "small", self.has_pyramid
        return dataclasses.replace(
            self,
            frozen_stages=(0 if small else 2) if self.frozen_stages < 0 else self.frozen_stages,
            neck_channels=self.neck_channels or (64 if small else 256),
            head_channels=self.head_channels or (256 if small else 1024),
            rpn_candidates_train=self.rpn_candidates_train or (2000 if levels else 12000),
            rpn_candidates_test=self.rpn_candidates_test or (1000 if levels else 6000),
        )

    @property
    def has_masks(self) -> bool:
        """Return whether the detector has a mask head."""
        return self.detector == "mask"

    @property
    def has_pyramid(self) -> bool:
        """Return whether the detector has a feature pyramid."""
        return self.detector != "faster"

    @property
    def layers(self) -> Preset:
        """Return the preset with `convolution`, `stages` and `pooling` applied."""
        layers = PRESETS[self.preset]
        if self.convolution != "preset":
            layers = layers._replace(convolution=self.convolution)
        if self.stages != "preset":
            layers = layers._replace(stages=STAGES[self.stages])
        if self.pooling != "preset":
            layers = layers._replace(pooling=self.pooling)
        if layers.convolution == "regular" and self.stages == "preset":
            layers = layers._replace(stages=())
        return layers

    @property
    def title(self) -> str:
        """Return the preset's name, followed by the values of options that replace a part of it."""
        parts = (self.convolution, self.stages, self.pooling)
        return "-".join([self.preset, *(part for part in parts if part != "preset")])


@dataclass(frozen=True)
class TrainingConfig:
    """Training recipe: section 5.1 of the paper, completed by Detectron's defaults."""

    epochs: int = option(16, "passes over the data", 1, 10**6)
    batch_size: int = option(2, "images per process and forward pass", 1, 4096)
    accumulate: int = option(
        1, "forward and backward passes per iteration, to train with larger batches than the memory holds", 1, 1024
    )
    lr: float = option(0.02, "learning rate for lr_batch images per iteration, scaled to the actual number", 0, 1000)
    lr_batch: int = option(16, "images per iteration, over all processes, that lr refers to", 1, 10**6)
    lr_steps: tuple[float, ...] = option(
        (10, 14), "epochs after which the learning rate is divided by 10", 0, 1e6, may_be_empty=True
    )
    warmup_iterations: int = option(500, "iterations of linear warm-up", 0, 10**9)
    warmup_factor: float = option(1 / 3, "factor of the learning rate at the start of the warm-up", 0, 1)
    optimizer: Literal["sgd", "adamw"] = option("sgd", "adamw learns faster from scratch; use it with lr=0.001")
    momentum: float = option(0.9, "momentum of SGD, beta1 of AdamW", 0, 1)
    weight_decay: float = option(1e-4, "weight decay of all parameters", 0, 1000)
    offset_lr_mult: float = option(
        -1, "learning rate factor of the offset convolutions; -1: 0.1 of modulated ones, 1 of v1", -1, 1000
    )
    roi_offset_lr_mult: float = option(
        -1, "learning rate factor of the offset branches of RoI pooling; -1: 1 of modulated ones, 0.01 of v1", -1, 1000
    )
    bias_lr_mult: float = option(1.0, "learning rate factor of biases; the authors' code: 2", 0, 1000)
    bias_weight_decay: float = option(
        -1.0, "weight decay of biases; the authors' code: 0; -1: that of the other parameters", -1, 1000
    )
    clip_norm: float = option(0.0, "maximum norm of the gradient; 0: no clipping", 0, 1e9)
    ema: float = option(
        0.0,
        "decay per iteration of a moving average of the parameters, such as 0.9998; the average is evaluated and saved "
        "as the model; 0: none",
        0,
        0.999999,
    )
    flip: float = option(0.5, "probability of a horizontal flip", 0, 1)
    min_sizes: tuple[int, ...] = option(
        (),
        "training at several scales: an image is resized with one of these instead of network.min_size, at random; "
        "none: off",
        1,
        16384,
        may_be_empty=True,
    )
    scale_jitter: tuple[float, ...] = option(
        (),
        "smallest and largest factor of a random enlargement (large-scale jitter), such as 0.1,2: an enlarged image is "
        "cropped, a smaller one surrounded with grey; none: off",
        0.05,
        20,
        may_be_empty=True,
    )
    color_jitter: float = option(
        0.0,
        "strength s of random changes of the colours: brightness, contrast and saturation by factors of 1 - s to "
        "1 + s, the hue by up to s / 4 of a turn; 0: none",
        0,
        1,
    )
    amp: Literal["none", "float16", "bfloat16"] = option("none", "autocast to a 16-bit type")
    negative_images: bool = option(False, "also train on images without annotations, as negative examples")
    group_aspect_ratios: bool = option(True, "do not mix wide and tall images in a batch")
    workers: int = option(2, "data-loading processes", 0, 256)
    seed: int = option(0, "seed of all random numbers", 0, 2**63 - 1)
    save_every: int = option(500, "iterations between checkpoints, in addition to one per epoch", 1, 10**9)
    log_offsets_every: int = option(
        200, "iterations between histograms of offsets and masks in TensorBoard; 0: none", 0, 10**9
    )
    evaluate_every: int = option(1, "epochs between evaluations; 0: only after the last", 0, 10**6)
    best_by: Literal["auto", "box", "mask"] = option(
        "auto", "average precision that chooses best.pth and ends the training; auto: of masks if there are any"
    )
    patience: int = option(
        0, "end the training after this number of evaluations without a better average precision; 0: never", 0, 10**6
    )

    @property
    def images(self) -> int:
        """Images per process and iteration."""
        return self.batch_size * self.accumulate


@dataclass(frozen=True)
class MimickingConfig:
    """R-CNN feature mimicking, section 3.3 of the paper; affects training only."""

    regions: Literal["auto", "fg", "bg", "all", "none"] = option(
        "auto", "RoIs to mimic: foreground, background, all or none; auto: the preset's choice, fg or none"
    )
    ground_truth: bool = option(False, "also mimic ground-truth boxes, not only proposals of the RPN")
    boxes: int = option(32, "maximum number of RoIs to mimic per image", 1, 10**4)
    crop: int = option(224, "width and height of the crops, pixels; 224 gives features of 14x14", 32, 4096)
    weight: float = option(0.1, "weight of the loss of equation 3", 0, 1e6)
    classifier_weight: float = option(0.1, "weight of the cross-entropy loss of the crops", 0, 1e6)
    reduction: Literal["sum", "mean"] = option("sum", "reduction of the loss over the RoIs of an image")
    features: Literal["after", "before"] = option("after", "compare features after or before their last ReLU")
    detach: bool = option(False, "stop the gradient of the mimicking loss at the crop features")
    chunk: int = option(32, "crops per forward pass; limits the memory for activations", 1, 10**4)


@dataclass(frozen=True)
class Config:
    """Configuration of a detector and of its training."""

    network: NetworkConfig = NetworkConfig()
    training: TrainingConfig = TrainingConfig()
    mimicking: MimickingConfig = MimickingConfig()

    def mimics(self) -> MimickingConfig | None:
        """Return the mimicking options with `regions` resolved, or None without mimicking."""
        regions = self.mimicking.regions
        if regions == "auto":
            regions = "fg" if PRESETS[self.network.preset].mimic else "none"
        return None if regions == "none" else dataclasses.replace(self.mimicking, regions=regions)

    def resolve_training(self) -> TrainingConfig:
        """Return the training options with the value -1 replaced by the numbers for these layers."""
        preset, training = self.network.layers, self.training
        offsets = 1.0 if preset.convolution == "deformable" else 0.1
        branches = 0.01 if preset.pooling == "deformable" else 1.0
        return dataclasses.replace(
            training,
            offset_lr_mult=offsets if training.offset_lr_mult < 0 else training.offset_lr_mult,
            roi_offset_lr_mult=branches if training.roi_offset_lr_mult < 0 else training.roi_offset_lr_mult,
            bias_weight_decay=training.weight_decay if training.bias_weight_decay < 0 else training.bias_weight_decay,
        )

    def set(self, assignments: Iterable[str]) -> Config:
        """Return a copy with assignments such as ``network.gamma=1`` or ``training.lr_steps=6,8`` applied."""
        values = self.to_dict()
        for section, key, value in parse_assignments(assignments):
            values[section][key] = value
        return Config.from_dict(values)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Convert to plain numbers, strings and lists for JSON files and checkpoints."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @staticmethod
    def from_dict(values: Mapping[str, Mapping[str, Any]]) -> Config:
        """Build a configuration from the result of `to_dict`."""
        if not isinstance(values, Mapping) or set(values) - set(SECTIONS):
            raise UserError(f"a configuration must have the sections {', '.join(SECTIONS)}, got {values!r:.80}")
        values = _upgrade(values)
        sections = {}
        for section, kind in SECTIONS.items():
            given = values.get(section, {})
            if not isinstance(given, Mapping):
                raise UserError(f"a configuration must have options in {section}, got {given!r:.80}")
            given = dict(given)
            known = _types(kind)
            for key, value in given.items():
                if key not in known:
                    raise UserError(f"{section}.{key}: there is no such option")
                given[key] = _check(value, f"{section}.{key}", known[key], _field(kind, key))
            sections[section] = kind(**given)
        config = Config(**sections)
        network = config.network
        if network.preset not in PRESETS:
            raise UserError(f"network.preset must be one of {', '.join(PRESETS)}, got {network.preset!r}")
        _check_layers(network)
        if network.has_pyramid and len(network.anchor_sizes) != 5:
            raise UserError(f"network.anchor_sizes must be 5 numbers with FPN, got {len(network.anchor_sizes)}")
        for name, colours in (("image_mean", network.image_mean), ("image_std", network.image_std)):
            if len(colours) != 3:
                raise UserError(f"network.{name} must be 3 numbers, for red, green and blue, got {len(colours)}")
        if network.rpn_negative_iou > network.rpn_positive_iou:
            raise UserError(
                f"network.rpn_negative_iou must be at most rpn_positive_iou={network.rpn_positive_iou}, "
                f"got {network.rpn_negative_iou}"
            )
        if network.max_size < network.min_size:
            raise UserError(f"network.max_size must be at least min_size={network.min_size}, got {network.max_size}")
        _check_training(config.training, network)
        return config


def _upgrade(values: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
    """Translate the configuration of a checkpoint of version 0.1.0, which is known by its only mask scale."""
    network = values.get("network", {})
    if not isinstance(network, Mapping) or "mask_scale" not in network:
        return values
    network = {
        **network,
        "conv_mask_scale": network["mask_scale"],
        "roi_mask_scale": network["mask_scale"],
        "aligned_masks": False,
        "box_loss_beta": 1 / 9,
    }
    del network["mask_scale"]
    mimicking = values.get("mimicking", {})
    if isinstance(mimicking, Mapping):
        mimicking = {"ground_truth": True, **mimicking}
    return {**values, "network": network, "mimicking": mimicking}


SECTIONS: dict[str, Any] = {"network": NetworkConfig, "training": TrainingConfig, "mimicking": MimickingConfig}


def parse_assignments(assignments: Iterable[str]) -> list[tuple[str, str, Any]]:
    """Parse texts such as ``network.gamma=1`` to (section, option, value), and check each value by itself."""
    parsed = []
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        section, _, key = name.strip().partition(".")
        if not equals:
            raise UserError(f"--set needs section.option=value, got {assignment!r}")
        if section not in SECTIONS or key not in _types(SECTIONS[section]):
            raise UserError(f"--set {name}: there is no such option (the help of `train` lists all)")
        kind = _types(SECTIONS[section])[key]
        value = _check(_parse(text.strip(), name, kind), f"{section}.{key}", kind, _field(SECTIONS[section], key))
        parsed.append((section, key, value))
    return parsed


def _check_layers(network: NetworkConfig) -> None:
    """Check that options of the layers do not contradict each other."""
    layers = network.layers
    if (layers.convolution == "regular") != (not layers.stages):
        raise UserError(
            "network.convolution and network.stages go together: deformable or modulated convolutions need stages, "
            f"regular ones have none, got {layers.convolution} and {network.stages} with the preset {network.preset}"
        )
    if not network.aligned and layers.pooling not in ("aligned", "quantised"):
        raise UserError(
            f"network.aligned=false needs network.pooling=aligned, got {layers.pooling} (deformable pooling has pixel "
            "centres at half-integer coordinates)"
        )


def describe_options() -> str:
    """Return two lines per option: its name and default, and its meaning."""
    lines = []
    for section, kind in SECTIONS.items():
        for item in dataclasses.fields(kind):
            name, choices = f"{section}.{item.name}", _types(kind)[item.name]
            default = _text(item.default)
            if typing.get_origin(choices) is Literal:
                default += f" ({'|'.join(typing.get_args(choices))})"
            lines.append(f"  {name}={default}\n      {item.metadata['help']}")
    return "\n".join(lines)


def _check_training(training: TrainingConfig, network: NetworkConfig) -> None:
    """Check the options of the training that depend on each other."""
    if training.optimizer == "adamw" and training.momentum == 1:
        raise UserError("training.momentum must be less than 1 with training.optimizer=adamw, got 1.0")
    if max(training.min_sizes, default=0) > network.max_size:
        raise UserError(
            f"training.min_sizes must be at most network.max_size={network.max_size}, got {max(training.min_sizes)}"
        )
    jitter = training.scale_jitter
    if jitter and (len(jitter) != 2 or jitter[0] > jitter[1]):
        raise UserError(f"training.scale_jitter must be a smallest and a largest factor, got {_text(jitter)}")
    if training.best_by == "mask" and network.detector != "mask":
        raise UserError("training.best_by=mask needs network.detector=mask")
    if training.patience and not training.evaluate_every:
        raise UserError(f"training.patience={training.patience} needs training.evaluate_every of at least 1, got 0")


def _types(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _field(kind: Any, key: str) -> Mapping[str, Any]:
    metadata: types.MappingProxyType[str, Any] = kind.__dataclass_fields__[key].metadata
    return metadata


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(_text(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _parse(text: str, name: str, kind: Any) -> Any:
    """Parse an option's value from the command line."""
    if typing.get_origin(kind) is tuple:
        return [_parse(item, name, typing.get_args(kind)[0]) for item in text.split(",") if item]
    if kind is bool:
        words = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
        return words.get(text.lower(), text)
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise UserError(f"{name} must be {_kind_name(kind)}, got {_short(text)}") from None
    return text


def _check(value: Any, name: str, kind: Any, metadata: Mapping[str, Any]) -> Any:
    """Convert `value` to the type of its field, or raise a `UserError`."""
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise UserError(f"{name} must be one of {', '.join(typing.get_args(kind))}, got {value!r}")
        return value
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{name} must be numbers with commas between them, got {value!r}")
        if not value and not metadata.get("may_be_empty"):
            raise UserError(f"{name} must have at least one number")
        if len(value) > MOST_NUMBERS:
            raise UserError(f"{name} must have at most {MOST_NUMBERS} numbers, got {len(value)}")
        return tuple(_check(item, name, typing.get_args(kind)[0], metadata) for item in value)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and kind is float) and not (isinstance(value, kind) and number == (kind is int)):
        raise UserError(f"{name} must be {_kind_name(kind)}, got {_short(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} must be finite, got {value!r}")
    low, high = metadata["minimum"], metadata["maximum"]
    if number and not low <= value <= high:
        raise UserError(f"{name} must be between {low:g} and {high:g}, got {_short(value)}")
    return kind(value)


def _short(value: object) -> str:
    """Describe a wrong value; Python does not print integers of more than 4300 digits."""
    if isinstance(value, int) and abs(value) > 10**30:
        return f"a number of {value.bit_length()} bits"
    return repr(value)[:60]


def _kind_name(kind: Any) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}[kind]
