"""Random changes of training images: boxes and masks follow the pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dcnops.detector.config import Config
from dcnops.detector.data import Augmentation
from dcnops.detector.data.augmentation import GREY, rescale

HEIGHT, WIDTH = 60, 80
BOXES = [[4, 6, 30, 26], [50, 10, 76, 50], [8, 40, 20, 56]]


def sample(masks: bool = True):
    """Black image with white rectangles, a box and a mask for each."""
    image = torch.zeros(3, HEIGHT, WIDTH)
    target = {"boxes": torch.tensor(BOXES, dtype=torch.float32), "labels": torch.tensor([1, 2, 3]), "image_id": 7}
    shapes = torch.zeros(len(BOXES), HEIGHT, WIDTH, dtype=torch.uint8)
    for shape, (x1, y1, x2, y2) in zip(shapes, BOXES):
        shape[y1:y2, x1:x2] = 1
        image[:, y1:y2, x1:x2] = 1
    return image, {**target, "masks": shapes} if masks else target


@pytest.mark.parametrize("place", [(0, 0), (1, 1), (0.3, 0.6)])
@pytest.mark.parametrize("factor", [0.2, 0.5, 0.9, 1.5, 3])
@pytest.mark.parametrize("min_size", [30, 120])
def test_boxes_and_masks_follow_the_pixels(factor, place, min_size):
    image, target = rescale(sample(), factor, *place, min_size=min_size, max_size=10_000)
    assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"]) and target["image_id"] == 7
    assert target["boxes"].dtype == torch.float32 and target["masks"].dtype == torch.uint8
    assert type(target["boxes"]) is type(target["masks"]) is type(image) is torch.Tensor
    assert target["masks"].shape[1:] == image.shape[1:]
    assert image.shape[2] / image.shape[1] == pytest.approx(WIDTH / HEIGHT, rel=0.05)
    # Objects appear `factor` times as large once the network has resized the image.
    if factor < 1:
        side = (BOXES[1][3] - BOXES[1][1]) / HEIGHT * factor
        boxes = target["boxes"]
        assert (boxes[1, 3] - boxes[1, 1]).item() / image.shape[1] == pytest.approx(side, abs=0.03)
        assert len(boxes) == 3 and GREY in image
        assert image.shape[1] == pytest.approx(min(min_size, HEIGHT / factor), abs=1)
    for box, mask in zip(target["boxes"], target["masks"]):
        rows, columns = mask.nonzero().T
        bounds = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert (box - bounds).abs().max() <= 1
        assert (image[0][mask.bool()] > 0.4).float().mean() > 0.9  # the object's own pixels
    white = (image[0] > GREY).sum().item()
    assert target["masks"].sum().item() == pytest.approx(white, rel=0.25, abs=9)


def test_objects_outside_of_the_crop_are_dropped():
    for masks in (True, False):
        image, target = rescale(sample(masks), 2, 0, 0, min_size=60, max_size=80)
        assert image.shape[1:] == (30, 40)
        assert target["labels"].tolist() == [1] and target["boxes"].tolist() == [[4, 6, 30, 26]]
        image, target = rescale(sample(masks), 4, 0, 0.35, min_size=60, max_size=80)  # rows 16 to 30, columns 0 to 19
        assert target["boxes"].tolist() == [[4, 0, 20, 10]]


def test_a_cut_box_fits_the_mask():
    """The right half of an L has only its foot."""
    image, target = sample()
    target = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in target.items()}
    target["boxes"], target["masks"] = torch.tensor([[0.0, 0, 80, 60]]), torch.zeros(1, 60, 80, dtype=torch.uint8)
    target["masks"][0, :, :10] = target["masks"][0, 50:] = 1
    _, cut = rescale((image, target), 2, 1, 1, min_size=60, max_size=80)
    assert cut["boxes"].tolist() == [[0, 20, 40, 30]]
    _, cut = rescale((image, target), 2, 1, 0, min_size=60, max_size=80)
    assert len(cut["boxes"]) == len(cut["labels"]) == len(cut["masks"]) == 0


def test_changes_depend_on_the_generator_only():
    options = ["training.flip=0.5", "training.scale_jitter=0.5,2", "training.color_jitter=0.4"]
    change = Augmentation.of(Config().set(options))

    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed + 5)
        before = torch.random.get_rng_state()
        image, _ = change(sample(), np.random.default_rng(seed))
        assert torch.equal(torch.random.get_rng_state(), before)
        return image

    torch.manual_seed(1)
    first = change(sample(), np.random.default_rng(3))[0]
    assert torch.equal(first, drawn(3)) and len({drawn(seed).shape for seed in range(9)}) > 5
    assert first.min() >= 0 and first.max() <= 1


def test_colours_change_and_nothing_else():
    image, target = sample()
    image = torch.rand_like(image)
    changed, same = Augmentation(color_jitter=0.4)((image, target), np.random.default_rng(0))
    assert same is target and changed.shape == image.shape and not torch.allclose(changed, image, atol=0.02)
    unchanged, _ = Augmentation()((image, target), np.random.default_rng(0))
    assert torch.equal(unchanged, image)
