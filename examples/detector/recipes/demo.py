"""The whole program on a small synthetic data set: ``make demo``."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from dcnops.adapters.torch.spatial_support import offset_statistics
from dcnops.adapters.torch.spatial_support.plots import plot_statistics
from PIL import Image

from ..config import Config, NetworkConfig, TrainingConfig
from ..data import CocoDataset, find_data, to_picture, write_synthetic
from ..engine import MODEL, session, train
from ..errors import UserError
from ..model import build_detector, load_detector
from ..predict import (
    Prediction,
    View,
    contact_sheet,
    draw_detections,
    draw_support,
    encode_rle,
    predict,
    write_predictions,
)

TRAIN_IMAGES, VAL_IMAGES, SIZE = 400, 80, 128
DEFORMATION = 0.6  # of the shapes: what can be learnt in so few minutes
SHOWN, CELL = 8, 300  # pictures on the sheet, and their sides
CONV4 = "backbone.body.layer3"  # conv5 has maps of 4x4 for such small images
BUDGET = 800  # images that are run to find a saliency region


def demo_config() -> Config:
    """The preset `dcnv2` with the small backbone, and a schedule of minutes on two cores."""
    network = NetworkConfig(
        preset="dcnv2",
        detector="mask",
        backbone="small",
        mask_scale=2,
        min_size=SIZE,
        max_size=SIZE,
        anchor_sizes=(16, 32, 64, 96, 128),
        rpn_candidates_train=300,
        rpn_candidates_test=300,
        proposals_train=300,
        proposals_test=100,
        roi_batch=64,
        max_detections=20,
    )
    training = TrainingConfig(
        optimizer="adamw",
        epochs=8,
        batch_size=4,
        lr=0.002,
        lr_batch=4,
        lr_steps=(6, 7.5),
        warmup_iterations=50,
        # AdamW moves every weight by its learning rate: at the paper's factor of 1 the single layer of a v1 branch
        # throws its bins hundreds of regions away before the classifier has learnt anything.
        roi_offset_lr_mult=0.1,
        clip_norm=10,
        evaluate_every=0,
        workers=0,
    )
    return Config(network, training)


def run_demo(out: Path, device_name: str) -> None:
    """Synthesise, train, evaluate, predict; all in `out`, where an earlier demo is replaced."""
    begin = time.perf_counter()
    data, run, pictures = out / "data", out / "run", out / "predictions"
    with session(device_name) as device:
        _clear(out, (data, run, pictures))
        write_synthetic(data, train=TRAIN_IMAGES, val=VAL_IMAGES, size=SIZE, deformation=DEFORMATION, seed=0)
        config = demo_config()
        train_set = CocoDataset(*find_data(data, "train"), masks=True, keep_empty=False)
        val_set = CocoDataset(*find_data(data, "val"), masks=True, keep_empty=True)
        torch.manual_seed(config.training.seed)
        model = build_detector(config.network, len(train_set.categories))
        metrics = train(model, config, train_set, val_set, run, device, hint="the next demo begins anew")
        assert metrics is not None
        model, _, categories = load_detector(run / MODEL, device)
        paths = [val_set.path(index) for index in range(min(SHOWN, len(val_set)))]
        predictions = list(predict(model, paths, device))
        image = val_set[_most_varied(predictions)][0].to(device)
        support = draw_support(
            {config.network.preset: model},
            image,
            [item.name for item in categories],
            View(layer=CONV4, budget=BUDGET),
        )
        offsets = plot_statistics(offset_statistics(model, image))
    write_predictions(iter(predictions), pictures, categories, inputs=paths)
    _beside_ground_truth(predictions, val_set).save(out / "detections.png")
    support.savefig(out / "support.png")
    offsets.savefig(out / "offsets.png")
    box, mask = metrics["bbox"], metrics["segm"]
    print(f"box AP {box.AP:.3f}, AP50 {box.AP50:.3f}; mask AP {mask.AP:.3f}, AP50 {mask.AP50:.3f}")
    print(f"{out / 'detections.png'}: what was found in images that were not trained on, beside the truth")
    print(f"{out / 'support.png'}: where the network looks; {out / 'offsets.png'}: how far its points have moved")
    print(f"{time.perf_counter() - begin:.0f} s in all")


def _clear(out: Path, folders: Iterable[Path]) -> None:
    """Remove what an earlier demo left; a folder that is not a demo's is refused."""
    marker = out / ".demo"
    if out.exists() and not marker.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} must be an empty or a new folder, or one of an earlier demo")
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None


def _most_varied(predictions: list[Prediction]) -> int:
    """The image in which the largest object found is largest beside the smallest."""

    def ratio(index: int) -> float:
        boxes = predictions[index].detections.boxes
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        return float(areas.max() / areas.min()) if len(areas) else 0.0

    return max(range(len(predictions)), key=ratio)


def _beside_ground_truth(predictions: list[Prediction], dataset: CocoDataset) -> Image.Image:
    names = [category.name for category in dataset.categories]
    pictures = []
    for index, prediction in enumerate(predictions):
        image, target = dataset[index]
        masks = [encode_rle(mask.numpy()) for mask in target["masks"]]
        found = prediction.detections
        pictures += [
            draw_detections(to_picture(image), target["boxes"], target["labels"], None, masks, names, side=CELL),
            draw_detections(to_picture(image), found.boxes, found.labels, found.scores, found.masks, names, side=CELL),
        ]
    return contact_sheet(pictures, 4, ["ground truth", "detections"] * 2)
