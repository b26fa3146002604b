"""Presets and ways of mimicking trained side by side with several seeds: the paper's Tables 1 and 2 in small."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from matplotlib.figure import Figure

from ..config import Config
from ..data import AspectRatioBatches, CocoDataset, find_data, load_batches, read_json, write_json, write_synthetic
from ..engine import CHECKPOINT, MODEL, SUMMARY, Trainer, session, train, world_size
from ..errors import UserError
from ..model import Count, MimickingDetector, build_detector, count, load_backbone, load_checkpoint
from ..presets import PRESETS
from .demo import demo_config

VARIANTS = ("regular", "dcnv1", "dcnv2", "dcnv2-mimic")
"""What is compared by default, in the order in which the paper finds them to be better."""

TRAIN_IMAGES, VAL_IMAGES, SIZE = 400, 200, 128
TIMED_ITERATIONS = 5
TITLES = {"bbox": "box AP", "segm": "mask AP"}
BLUE, ORANGE = "#0072b2", "#e69f00"

Scale = Literal["auto", "reduced", "full"]


class Variant(NamedTuple):
    """A row of the table: a preset, trained with a way of mimicking (fg, bg, all, none) or with the preset's own."""

    preset: str
    mimic: str | None

    @property
    def name(self) -> str:
        return self.preset if self.mimic is None else f"{self.preset}:{self.mimic}"

    @property
    def folder(self) -> str:
        return self.name.replace(":", "-mimics-")

    @staticmethod
    def parse(text: str) -> Variant:
        """From ``PRESET`` or ``PRESET:MIMIC``.

        Raises
        ------
        UserError
            There is no such preset or way of mimicking.
        """
        preset, colon, mimic = text.partition(":")
        if preset not in PRESETS:
            raise UserError(f"a variant must be one of {', '.join(PRESETS)}, or one with a colon, got {text!r}")
        if colon and mimic not in ("fg", "bg", "all", "none"):
            raise UserError(f"after the colon of a variant stands fg, bg, all or none, got {text!r}")
        return Variant(preset, mimic if colon else None)

    def configure(self, config: Config, seed: int) -> Config:
        network = dataclasses.replace(config.network, preset=self.preset)
        training = dataclasses.replace(config.training, seed=seed)
        mimicking = config.mimicking
        if self.mimic is not None:
            mimicking = dataclasses.replace(mimicking, regions=self.mimic)  # type: ignore[arg-type]
        return Config(network, training, mimicking)


@dataclass(frozen=True)
class Row:
    """What is known of a variant.

    Attributes
    ----------
    variant : Variant
    seeds : of the runs that are finished
    metrics : for each of them, COCO's numbers by kind (``bbox``, ``segm``) and name (``AP`` ...), in 0..1
    cost : parameters, and multiply-adds for an image of 800x1333
    seconds : of an iteration of training
    """

    variant: Variant
    seeds: tuple[int, ...]
    metrics: tuple[dict[str, dict[str, float]], ...]
    cost: Count
    seconds: float

    def values(self, kind: str, name: str) -> list[float]:
        """One number of each run, in per cent; NaN where there is no ground truth."""
        found = [run[kind][name] for run in self.metrics]
        return [math.nan if value is None else 100 * value for value in found]


@dataclass(frozen=True)
class Experiment:
    """What all runs have in common.

    Attributes
    ----------
    config : Config
        Each variant changes the preset, the way of mimicking and the seed.
    data : Path
        Folder of a COCO data set.
    weights : str
        Of the backbone; see ``train --weights``.
    """

    config: Config
    data: Path
    weights: str

    def describe(self) -> dict[str, Any]:
        return {"config": self.config.to_dict(), "data": str(self.data.resolve()), "weights": self.weights}


def ablation_config(scale: Literal["reduced", "full"]) -> Config:
    """`reduced` is the demo's with a longer schedule, and mimicking to its scale; `full` is the paper's."""
    if scale == "full":
        return Config().set(["network.detector=mask", "training.evaluate_every=0"])
    return demo_config().set(
        [
            "training.epochs=12",
            "training.lr_steps=9,11",
            "training.save_every=100",
            # One and a half times the image's work, like the paper's 32 crops of 224x224 beside 800x1333, and seen by
            # the level of the pyramid that finds these objects.
            "mimicking.crop=56",
            "mimicking.boxes=8",
            # Summed, equation 3 makes the features of all categories alike before they have been told apart.
            "mimicking.reduction=mean",
        ]
    )


def run_ablation(
    out: Path,
    device_name: str,
    *,
    variants: Sequence[str] = VARIANTS,
    seeds: int = 3,
    data: Path | None = None,
    scale: Scale = "auto",
    assignments: Sequence[str] = (),
    weights: str | None = None,
) -> list[Row]:
    """Train and evaluate each variant with each seed, all variants with one seed before the next.

    After each run the table and the plot are written anew. What is finished is not done again, and a run that was
    interrupted goes on from its checkpoint.

    Parameters
    ----------
    out : Path
        Gets ``table.md``, ``results.json``, ``plot.png``, the synthetic ``data/`` and ``runs/``.
    device_name : str
        As for `distributed.session`.
    variants : sequence of str
        ``PRESET`` or ``PRESET:MIMIC``.
    seeds : int
        The seeds are 0, 1, ...
    data : Path, optional
        Folder of a COCO data set; by default a synthetic one of deformed shapes.
    scale : "auto", "reduced" or "full"
        See `ablation_config`; auto is full on a GPU.
    assignments : sequence of str
        ``section.option=value``, for all variants.
    weights : str, optional
        Of the backbone; by default ImageNet's, or none for the small one.

    Raises
    ------
    UserError
        Something given is wrong, or `out` has an experiment with other options.
    Interrupted
        After SIGINT or SIGTERM; the same call goes on.
    """
    chosen = [Variant.parse(text) for text in variants]
    if len({variant.name for variant in chosen}) < len(chosen):
        raise UserError(f"each variant can be there once, got {' '.join(variants)}")
    with session(device_name) as device:
        if world_size() > 1:
            raise UserError("ablate runs in one process, not under torchrun")
        if scale == "auto":
            scale = "full" if device.type == "cuda" else "reduced"
        config = ablation_config(scale).set(assignments)
        weights = weights or ("none" if config.network.backbone == "small" else "imagenet")
        experiment = Experiment(config, data or out / "data", weights)
        _begin(out, experiment)
        if data is None and not (out / "data" / ".complete").exists():
            write_synthetic(out / "data", train=TRAIN_IMAGES, val=VAL_IMAGES, size=SIZE, deformation=1, seed=0)
            (out / "data" / ".complete").touch()
        masks = config.network.detector == "mask"
        train_set = CocoDataset(*find_data(experiment.data, "train"), masks=masks, keep_empty=False)
        val_set = CocoDataset(*find_data(experiment.data, "val"), masks=masks, keep_empty=True)

        costs = {variant: count(variant.configure(config, 0).network) for variant in chosen}
        seconds: dict[Variant, float] = {}
        rows: list[Row] = []
        for seed in range(seeds):
            for variant in chosen:
                folder = out / "runs" / variant.folder / f"seed{seed}"
                if not (folder / "metrics.json").exists():
                    print(f"{variant.name}, seed {seed}", flush=True)
                    _train(variant.configure(config, seed), experiment, train_set, val_set, folder, device)
                if variant not in seconds:
                    seconds[variant] = _seconds(
                        out / "runs" / variant.folder / "seconds.json", variant, experiment, train_set, device
                    )
                rows = [_row(out, item, seeds, costs[item], seconds[item]) for item in chosen if item in seconds]
                _write(out, rows, experiment, device)
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown: means over the seeds, and standard deviations where there are several."""
    first = rows[0]
    parts = []
    for kind in [kind for kind in TITLES if kind in first.metrics[0]]:
        lines = [
            [
                "preset",
                "mimics",
                TITLES[kind],
                *SUMMARY[1:],
                "seeds",
                "parameters / 2^20",
                "multiply-adds / 2^30",
                "s / iteration",
            ],
            ["---", "---", *["---:"] * (len(SUMMARY) + 4)],
        ]
        for row in rows:
            config = row.variant.configure(Config(), 0).mimics()
            lines.append(
                [
                    f"`{row.variant.preset}`",
                    config.regions if config else "",
                    *(_mean(row.values(kind, name)) for name in SUMMARY),
                    str(len(row.seeds)),
                    f"{row.cost.parameters / 2**20:.2f}",
                    f"{row.cost.macs / 2**30:.1f}",
                    f"{row.seconds:.2f}",
                ]
            )
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts)


def _begin(out: Path, experiment: Experiment) -> None:
    """Make the folder, or see that the experiment in it is this one."""
    path = out / "experiment.json"
    described = experiment.describe()
    if path.exists():
        before = read_json(path)
        if before != described:
            raise UserError(f"{out} has an experiment with other options or data: give --out another folder")
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, described, indent=2)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None


def _train(
    config: Config,
    experiment: Experiment,
    train_set: CocoDataset,
    val_set: CocoDataset,
    folder: Path,
    device: torch.device,
) -> None:
    resume = (folder / CHECKPOINT).exists()
    if resume:
        load_checkpoint(folder / CHECKPOINT)  # a damaged one is named before anything is built
    torch.manual_seed(config.training.seed)
    model = build_detector(config.network, len(train_set.categories))
    if experiment.weights != "none" and not resume:
        load_backbone(model, experiment.weights, config.network.backbone)
    train(model, config, train_set, val_set, folder, device, resume=resume, hint="the same command goes on from there")
    # What is needed to go on is many times what is kept.
    (folder / CHECKPOINT).unlink()


def _seconds(
    path: Path, variant: Variant, experiment: Experiment, train_set: CocoDataset, device: torch.device
) -> float:
    """The median of some iterations of a trained model, the reading of images left out; measured once."""
    if not path.exists():
        config = variant.configure(experiment.config, 0)
        content = load_checkpoint(path.parent / "seed0" / MODEL)
        model = build_detector(config.network, len(train_set.categories))
        model.load_state_dict(content["model"])
        model.to(device)
        mimics = config.mimics()
        options = dataclasses.replace(config.training, workers=0)
        batches = AspectRatioBatches(train_set.sizes, options.batch_size, seed=0, group=options.group_aspect_ratios)
        trainer = Trainer(MimickingDetector(model, mimics) if mimics else model, options, device, len(batches))
        write_json(path, statistics.median(_durations(trainer, train_set, batches, device)))
    return float(read_json(path))


def _durations(
    trainer: Trainer, train_set: CocoDataset, batches: AspectRatioBatches, device: torch.device
) -> Iterator[float]:
    loader = load_batches(train_set, batches, trainer.config, device)
    try:
        for done, batch in zip(range(TIMED_ITERATIONS + 1), loader):
            begin = time.perf_counter()
            trainer.step(batch, done)  # which waits for the device
            if done or len(batches) == 1:
                yield time.perf_counter() - begin
    finally:
        loader.close()


def _row(out: Path, variant: Variant, seeds: int, cost: Count, seconds: float) -> Row:
    found = {}
    for seed in range(seeds):
        path = out / "runs" / variant.folder / f"seed{seed}" / "metrics.json"
        if path.exists():
            content = read_json(path)
            found[seed] = {kind: {name: values[name] for name in SUMMARY} for kind, values in content.items()}
    return Row(variant, tuple(found), tuple(found.values()), cost, seconds)


def _write(out: Path, rows: Sequence[Row], experiment: Experiment, device: torch.device) -> None:
    document = {
        **experiment.describe(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads",
        "rows": [
            {
                "variant": row.variant.name,
                "seeds": list(row.seeds),
                "metrics": list(row.metrics),
                **row.cost._asdict(),
                "seconds_per_iteration": row.seconds,
            }
            for row in rows
        ],
    }
    write_json(out / "results.json", document, indent=1)
    text = table(rows)
    (out / "table.md").write_text(f"{text}\n")
    print(f"\n{text}\n", flush=True)
    _plot(rows, out / "plot.png")


def _plot(rows: Sequence[Row], path: Path) -> None:
    """A panel for each kind: every run as a dot, means and standard deviations as bars; the table's order."""
    kinds = [kind for kind in TITLES if kind in rows[0].metrics[0]]
    figure = Figure(figsize=(4.6 * len(kinds) + 1.2, 0.5 * len(rows) + 1.4), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for panel, kind in zip(panels, kinds):
        for position, row in enumerate(rows):
            values = row.values(kind, "AP")
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            panel.errorbar(
                statistics.mean(values), position, xerr=spread, fmt="s", color=BLUE, capsize=4, markersize=7, zorder=2
            )
            panel.plot(values, [position] * len(values), "o", color=ORANGE, markersize=4, zorder=3)
        panel.set_xlabel(f"{TITLES[kind]}, %")
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(rows)), [_label(row) for row in rows])
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.suptitle("mean (blue) and standard deviation of the runs (orange)", fontsize=9)
    figure.savefig(path)


def _label(row: Row) -> str:
    config = row.variant.configure(Config(), 0).mimics()
    return (
        row.variant.preset
        if config is None
        else f"{row.variant.preset.removesuffix('-mimic')} + mimic {config.regions}"
    )


def _mean(values: Sequence[float]) -> str:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "-"
    spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.1f}{spread}"
