"""Losses of the heads, and masks that go through targets, the mask head's resolution and pasting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import RoIHeads

from dcnops.detector.config import Config
from dcnops.detector.data import CocoDataset, find_data, write_synthetic
from dcnops.detector.data.batches import mirror
from dcnops.detector.engine import coco_metrics
from dcnops.detector.model import build_detector, heads
from dcnops.detector.predict import Detections, coco_results, decode_rle, encode_rle
from dcnops.detector.predict.inference import paste_masks
from tests.detector.configurations import assignments


def network(**options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = "detector=mask backbone=small min_size=64 max_size=96 roi_batch=32 proposals_train=50"
    chosen = " ".join(f"{name}={value}" for name, value in options.items())
    return build_detector(Config().set(assignments(network=f"{sizes} {chosen}")).network, 2)


def targets() -> list[dict[str, Tensor]]:
    masks = torch.zeros(2, 48, 70, dtype=torch.uint8)
    masks[0, 10:30, 5:40] = masks[1, 3:47, 30:60] = 1
    boxes = torch.tensor([[5.0, 10, 40, 30], [30, 3, 60, 47]])
    return [{"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks}]


def test_losses_are_torchvisions_with_its_options():
    detector = network(box_loss_beta=1 / 9, aligned_masks="false").double()
    images = [torch.rand(3, 48, 70, dtype=torch.double)]
    torch.manual_seed(1)
    ours = detector(images, targets())
    detector.roi_heads.__class__ = RoIHeads
    torch.manual_seed(1)
    theirs = detector(images, targets())
    assert ours.keys() == theirs.keys()
    for name, loss in theirs.items():
        assert loss > 0
        torch.testing.assert_close(ours[name], loss)


def test_the_box_loss_is_quadratic_up_to_beta():
    deltas = torch.tensor([[0.5, 0, 0, 0], [0, 3, 0, 0], [9, 9, 9, 9]])
    predicted = torch.zeros(3, 8)
    detector = network(box_loss_beta=2)
    losses = detector.roi_heads._box_losses(torch.zeros(3, 2), predicted, torch.tensor([1, 1, 0]), deltas)
    assert losses["loss_box_reg"] == pytest.approx((0.5**2 / 4 + (3 - 1)) / 3)  # the third is background
    assert losses["loss_classifier"] == pytest.approx(np.log(2))


def test_images_without_objects_give_zero_mask_loss_with_gradients():
    detector = network()
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    losses = detector([torch.rand(3, 48, 70)], [{**empty, "masks": torch.zeros(0, 48, 70, dtype=torch.uint8)}])
    assert losses["loss_mask"] == 0
    losses["loss_mask"].backward()
    assert detector.roi_heads.mask_predictor.mask_fcn_logits.weight.grad is not None


def test_cells_of_a_target_hold_the_share_that_the_mask_covers(monkeypatch):
    masks = torch.zeros(3, 8, 12)
    masks[0, 2:6, 3:9] = 1
    masks[2, :, 6:] = 1
    boxes = torch.tensor([[2.0, 2, 10, 6], [3, 2, 9, 6], [0, 0, 12, 8], [5, 0, 9, 8]])
    matched = torch.tensor([0, 0, 1, 2])
    cut = heads.cut_masks(masks, boxes, matched, 4)
    assert cut[0].tolist() == [[0.5, 1, 1, 0.5]] * 4
    assert cut[1].ge(0.5).all() and cut[1, 1:3, 1:3].eq(1).all()  # at the border, samples are interpolated with zeros
    assert cut[2].eq(0).all()
    assert cut[3].tolist() == [[0, 1, 1, 1]] * 4
    monkeypatch.setattr(heads, "MOST_PIXELS", 100)
    assert torch.equal(heads.cut_masks(masks, boxes, matched, 4), cut)


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("size", [100, 333])
def test_a_perfect_detector_reaches_a_mask_ap_of_99(tmp_path: Path, size: int, flipped: bool):
    """True boxes and masks of drawn shapes pass through the targets of the heads and through pasting."""
    write_synthetic(tmp_path, train=0, val=6, size=100, deformation=1, seed=0)
    dataset = CocoDataset(*find_data(tmp_path, "val"), masks=True, keep_empty=True)
    detector = network(min_size=size, max_size=size)
    results = []
    for image, target in dataset:
        sample = mirror(image, target) if flipped else (image, target)
        batch, (resized,) = detector.transform([sample[0]], [sample[1]])
        number, shape = len(target["labels"]), batch.image_sizes[0]
        cut = detector.roi_heads._mask_targets(resized["masks"], resized["boxes"], torch.arange(number), shape, 28)
        masks = paste_masks(cut, sample[1]["boxes"], (image.shape[2], image.shape[1]))
        if flipped:
            masks = [encode_rle(decode_rle(mask)[:, ::-1]) for mask in masks]
        found = Detections(target["boxes"], target["labels"], torch.ones(number), masks)
        results += coco_results(found, target["image_id"], dataset.categories)
    assert coco_metrics(dataset.coco, results, dataset.image_ids, ("segm",))["segm"].AP >= 0.99
