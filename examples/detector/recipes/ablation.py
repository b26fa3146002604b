"""Ablation: presets and mimicked regions with several seeds, as in the paper's Tables 1 and 2 at a smaller scale."""

from __future__ import annotations

import importlib
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..config import Config
from ..data import AspectRatioBatches, CocoDataset, load_batches, load_train_and_val, write_synthetic
from ..engine import CHECKPOINT, MODEL, SUMMARY, build_and_train, build_trainer, session, world_size
from ..errors import UserError, cannot_write
from ..json_files import is_finite, read_json, write_json
from ..model import Count, count, load_checkpoint, load_detector
from ..variants import ABLATION_IMAGES, Variant
from .demo import demo_config

SIZE = 128  # sides of the synthetic images
TIMED_ITERATIONS = 5
TITLES = {"bbox": "box AP", "segm": "mask AP"}
BLUE, ORANGE = "#0072b2", "#e69f00"


@dataclass(frozen=True)
class Row:
    """Results of a variant."""

    variant: Variant
    seeds: tuple[int, ...]  # of the finished runs
    metrics: tuple[dict[str, dict[str, float]], ...]  # COCO metrics of each run by kind (bbox, segm) and name, in 0..1
    cost: Count  # for an image of 800x1333
    seconds: float  # per training iteration

    def values(self, kind: str, name: str) -> list[float]:
        """Return a metric of each run in per cent; NaN without ground truth."""
        found = [run[kind][name] for run in self.metrics]
        return [math.nan if value is None else 100 * value for value in found]


@dataclass(frozen=True)
class Experiment:
    """Common settings of all runs."""

    config: Config  # before `Variant.configure`
    data: Path
    weights: str  # of the backbone, see ``train --weights``

    def describe(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {"config": self.config.to_dict(), "data": str(self.data.resolve()), "weights": self.weights}


def ablation_config(scale: Literal["reduced", "full"]) -> Config:
    """Return the demo's recipe with a longer schedule and scaled mimicking (`reduced`), or the paper's (`full`)."""
    if scale == "full":
        return Config().set(["network.detector=mask", "training.evaluate_every=0"])
    return demo_config().set(
        [
            "training.epochs=12",
            "training.lr_steps=9,11",
            "training.save_every=100",
            # The crops take 1.5 times as much work as the image, like the paper's 32 crops of 224x224 for 800x1333.
            # They are pooled from the pyramid level that detects these objects.
            "mimicking.crop=56",
            "mimicking.boxes=8",
            # With the sum, equation 3 makes all features alike before the classifiers separate the categories.
            "mimicking.reduction=mean",
        ]
    )


def run_ablation(
    out: Path,
    data: Path | None,
    *,
    variants: Sequence[str],
    seeds: int,
    scale: Literal["auto", "reduced", "full"],
    weights: str | None,
    assignments: Sequence[str],
    device_name: str,
) -> list[Row]:
    """Train and evaluate each variant with the seeds 0, 1, ...; all variants with one seed before the next seed.

    The table and the plot are updated after each run. Finished runs are kept, and an interrupted run continues from
    its checkpoint. The output folder holds ``table.md``, ``results.json``, ``plot.png``, ``runs/`` and the synthetic
    ``data/``.
    """
    importlib.import_module("matplotlib.figure")  # missing packages are reported before hours of training
    chosen = [Variant.parse(text) for text in variants]
    if len(set(chosen)) < len(chosen):
        raise UserError(f"each variant can be there once, got {' '.join(variants)}")
    with session(device_name) as device:
        if world_size() > 1:
            raise UserError("ablate runs in one process, not under torchrun")
        if scale == "auto":
            scale = "full" if device.type == "cuda" else "reduced"
        config = ablation_config(scale).set(assignments)
        weights = weights or ("none" if config.network.backbone == "small" else "imagenet")
        folder = data or out / "data"
        experiment = Experiment(config, folder, weights)
        _open_folder(out, experiment)
        if data is None and not (folder / ".complete").exists():
            train_images, val_images = ABLATION_IMAGES
            write_synthetic(folder, train=train_images, val=val_images, size=SIZE, deformation=1, seed=0)
            (folder / ".complete").touch()
        train_set, val_set = load_train_and_val(
            folder, masks=config.network.has_masks, negatives=config.training.negative_images
        )

        costs = {variant: count(variant.configure(config).network) for variant in chosen}
        seconds: dict[Variant, float] = {}
        rows: list[Row] = []
        for seed in range(seeds):
            for variant in chosen:
                runs = out / "runs" / variant.folder
                if not (runs / f"seed{seed}" / "metrics.json").exists():
                    print(f"{variant.name}, seed {seed}", flush=True)
                    run_config = variant.configure(config, seed)
                    _train(run_config, weights, train_set, val_set, runs / f"seed{seed}", device)
                if variant not in seconds:
                    seconds[variant] = _seconds_per_iteration(runs, train_set, device)
                rows = [_row(out, item, seeds, costs[item], seconds[item]) for item in chosen if item in seconds]
                _write(out, rows, experiment, device)
    return rows


def table(rows: Sequence[Row]) -> str:
    """Format the rows in Markdown: means over the seeds, and standard deviations if there are several."""
    parts = []
    for kind in [kind for kind in TITLES if kind in rows[0].metrics[0]]:
        costs = ["seeds", "parameters / 2^20", "multiply-adds / 2^30", "s / iteration"]
        lines = [["preset", "mimics", TITLES[kind], *SUMMARY[1:], *costs]]
        lines.append(["---", "---", *["---:"] * (len(SUMMARY) + len(costs))])
        for row in rows:
            means = [_mean(row.values(kind, name)) for name in SUMMARY]
            costs = [f"{row.cost.parameters / 2**20:.2f}", f"{row.cost.macs / 2**30:.1f}", f"{row.seconds:.2f}"]
            lines.append([f"`{row.variant.preset}`", row.variant.regions, *means, str(len(row.seeds)), *costs])
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts)


def _open_folder(out: Path, experiment: Experiment) -> None:
    """Create the folder, or check that it holds the same experiment."""
    path = out / "experiment.json"
    description = experiment.describe()
    if path.exists():
        if read_json(path) != description:
            raise UserError(f"{out} has an experiment with other options or data: give --out another folder")
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, description, indent=2)
    except OSError as error:
        raise cannot_write(f"--out {out}", error) from None


def _train(
    config: Config, weights: str, train_set: CocoDataset, val_set: CocoDataset, folder: Path, device: torch.device
) -> None:
    resume = (folder / CHECKPOINT).exists()
    if resume:
        load_checkpoint(folder / CHECKPOINT)  # reports a damaged file before anything is built
    hint = "the same command goes on from there"
    build_and_train(config, train_set, val_set, folder, device, weights=weights, resume=resume, hint=hint)
    # The state for resuming is several times larger than the model.
    (folder / CHECKPOINT).unlink()


def _seconds_per_iteration(runs: Path, train_set: CocoDataset, device: torch.device) -> float:
    """Measure once the median duration of a training iteration without data loading."""
    path = runs / "seconds.json"
    if not path.exists():
        model, config, _ = load_detector(runs / "seed0" / MODEL, device)
        write_json(path, statistics.median(_durations(model, config.set(["training.workers=0"]), train_set, device)))
    seconds = read_json(path)
    if not is_finite(seconds) or seconds <= 0:
        raise UserError(f"{path}: must hold a positive number, got {seconds!r:.40}")
    return float(seconds)


def _durations(model: torch.nn.Module, config: Config, train_set: CocoDataset, device: torch.device) -> Iterator[float]:
    training = config.training
    batches = AspectRatioBatches(train_set.sizes, training.images, seed=0, group=training.group_aspect_ratios)
    trainer = build_trainer(model, config, device, len(batches))
    loader = load_batches(train_set, batches, config, device)
    try:
        for done, batch in zip(range(TIMED_ITERATIONS + 1), loader):
            begin = time.perf_counter()
            trainer.step(batch, done)  # waits for the device
            if done or len(batches) == 1:
                yield time.perf_counter() - begin
    finally:
        loader.close()


def _row(out: Path, variant: Variant, seeds: int, cost: Count, seconds: float) -> Row:
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for seed in range(seeds):
        path = out / "runs" / variant.folder / f"seed{seed}" / "metrics.json"
        if path.exists():
            content = read_json(path)
            try:
                found[seed] = {
                    kind: {name: _metric(values[name]) for name in SUMMARY} for kind, values in content.items()
                }
            except (AttributeError, KeyError, TypeError):
                raise UserError(f"{path}: is not a file of metrics that this program has written") from None
    return Row(variant, tuple(found), tuple(found.values()), cost, seconds)


def _metric(value: object) -> float | None:
    """Check that a value is a metric, which is None without ground truth."""
    if value is None or is_finite(value):
        return value  # type: ignore[return-value]
    raise TypeError


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
    """Plot a panel per kind with the rows of the table: runs as dots, means and standard deviations as bars."""
    from matplotlib.figure import Figure

    kinds = [kind for kind in TITLES if kind in rows[0].metrics[0]]
    figure = Figure(figsize=(4.6 * len(kinds) + 1.2, 0.5 * len(rows) + 1.4), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for panel, kind in zip(panels, kinds):
        for position, row in enumerate(rows):
            values = row.values(kind, "AP")
            mean, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
            panel.errorbar(mean, position, xerr=spread, fmt="s", color=BLUE, capsize=4, markersize=7, zorder=2)
            panel.plot(values, [position] * len(values), "o", color=ORANGE, markersize=4, zorder=3)
        panel.set_xlabel(f"{TITLES[kind]}, %")
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
    labels = [
        f"{row.variant.preset.removesuffix('-mimic')} + mimic {regions}" if regions else row.variant.preset
        for row in rows
        for regions in [row.variant.regions]
    ]
    panels[0].set_yticks(range(len(rows)), labels)
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.suptitle("mean (blue) and standard deviation of the runs (orange)", fontsize=9)
    figure.savefig(path)


def _mean(values: Sequence[float]) -> str:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "-"
    spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.1f}{spread}"
