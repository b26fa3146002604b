"""Demo of the whole program on a small synthetic data set: ``make demo``."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from dcnops.adapters.torch.spatial_support import offset_statistics

from ..config import Config, NetworkConfig, TrainingConfig
from ..data import CocoDataset, load_train_and_val, to_picture, write_synthetic
from ..engine import MODEL, build_and_train, session
from ..errors import UserError, cannot_write
from ..model import load_detector
from ..predict import (
    Prediction,
    contact_sheet,
    draw_detections,
    draw_spatial_support,
    encode_rle,
    predict,
    write_predictions,
)
from ..spatial_support_view import SpatialSupportView

TRAIN_IMAGES, VAL_IMAGES, SIZE = 400, 80, 128
DEFORMATION = 0.6  # strength that can be learnt in a few minutes
SHOWN, CELL = 8, 300  # number of pictures on the sheet, and their sides
CONV4 = "backbone.body.layer3"  # conv5 has only 4x4 pixels here
BUDGET = 800  # masked images in the search for a saliency region


def demo_config() -> Config:
    """Return the preset `dcnv2` with the small backbone and a schedule of minutes on two CPU cores."""
    network = NetworkConfig(
        preset="dcnv2",
        detector="mask",
        backbone="small",
        roi_mask_scale=2,
        box_loss_beta=1 / 9,  # reaches precise boxes sooner than 1
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
        # AdamW moves every weight by its learning rate. At the paper's factor of 1, the single layer of a v1 branch
        # moves its bins by hundreds of region widths before the classifier has learnt anything.
        roi_offset_lr_mult=0.1,
        clip_norm=10,
        evaluate_every=0,
        workers=0,
    )
    return Config(network, training)


def run_demo(out: Path, device_name: str) -> None:
    """Write synthetic data, train, evaluate and predict in the folder `out`, replacing an earlier demo."""
    from dcnops.adapters.torch.spatial_support.plots import plot_statistics

    begin = time.perf_counter()
    data, run, pictures = out / "data", out / "run", out / "predictions"
    with session(device_name) as device:
        _clear(out, (data, run, pictures))
        write_synthetic(data, train=TRAIN_IMAGES, val=VAL_IMAGES, size=SIZE, deformation=DEFORMATION, seed=0)
        config = demo_config()
        train_set, val_set = load_train_and_val(data, masks=True)
        metrics = build_and_train(config, train_set, val_set, run, device, hint="the next demo starts from scratch")
        assert metrics is not None
        model, _, categories = load_detector(run / MODEL, device)
        paths = [val_set.path(index) for index in range(min(SHOWN, len(val_set)))]
        predictions = list(predict(model, paths, device))
        image = val_set[_most_varied(predictions)][0].to(device)
        view = SpatialSupportView(layer=CONV4, budget=BUDGET)
        names = [item.name for item in categories]
        support = draw_spatial_support({config.network.preset: model}, image, names, view)
        offsets = plot_statistics(offset_statistics(model, image))
    write_predictions(iter(predictions), pictures, categories, inputs=paths)
    _compare_with_ground_truth(predictions, val_set).save(out / "detections.png")
    support.savefig(out / "spatial_support.png")
    offsets.savefig(out / "offsets.png")
    box, mask = metrics["bbox"], metrics["segm"]
    print(f"box AP {box.AP:.3f}, AP50 {box.AP50:.3f}; mask AP {mask.AP:.3f}, AP50 {mask.AP50:.3f}")
    print(f"{out / 'detections.png'}: detections in validation images next to the ground truth")
    print(f"{out / 'spatial_support.png'}: spatial support; {out / 'offsets.png'}: histograms of offsets and masks")
    print(f"{time.perf_counter() - begin:.0f} s in total")


def _clear(out: Path, folders: Iterable[Path]) -> None:
    """Remove an earlier demo; refuse any other folder that is not empty."""
    marker = out / ".demo"
    if out.exists() and not marker.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} must be an empty or a new folder, or one of an earlier demo")
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError as error:
        raise cannot_write(f"--out {out}", error) from None


def _most_varied(predictions: list[Prediction]) -> int:
    """Return the index of the image with the largest ratio between the areas of two detections."""

    def ratio(index: int) -> float:
        boxes = predictions[index].detections.boxes
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        return float(areas.max() / areas.min()) if len(areas) else 0.0

    return max(range(len(predictions)), key=ratio)


def _compare_with_ground_truth(predictions: list[Prediction], dataset: CocoDataset) -> Image.Image:
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
