"""R-CNN feature mimicking: losses, regions, gradients, checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcnops.detector.config import Config
from dcnops.detector.data import CocoDataset, find_data, write_synthetic
from dcnops.detector.engine import CHECKPOINT, MODEL, train
from dcnops.detector.model import MimickingDetector, build_detector, load_checkpoint, load_detector
from dcnops.detector.model import mimicking as mimicking_module
from dcnops.detector.model.mimicking import cut_crops, labels_of, mimic_loss
from tests.detector.configurations import assignments

pytestmark = pytest.mark.slow

SMALL = assignments(
    network="backbone=small min_size=96 max_size=128 anchor_sizes=12,24,48,64,96 roi_batch=32 neck_channels=32 "
    "head_channels=64"
)
DETECTORS = ["faster", "mask"]

CROP = 224


def config(*assignments: str) -> Config:
    # An untrained RPN proposes no foreground.
    return Config().set([*SMALL, "network.preset=dcnv2-mimic", "mimicking.ground_truth=true", *assignments])


def build(options: Config) -> MimickingDetector:
    torch.manual_seed(0)
    detector = build_detector(options.network, 3)
    mimics = options.mimics()
    assert mimics is not None
    return MimickingDetector(detector, mimics).train()


def batch() -> tuple[list[Tensor], list[dict[str, Any]]]:
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, 96, 128, generator=generator), torch.rand(3, 96, 96, generator=generator)]
    targets = []
    for image, boxes in zip(images, ([[10.0, 12, 60, 70], [50, 20, 120, 90]], [[5.0, 5, 50, 60]])):
        masks = torch.zeros(len(boxes), *image.shape[1:], dtype=torch.uint8)
        masks[:, 20:60, 20:60] = 1
        labels = torch.arange(1, len(boxes) + 1)
        targets.append({"boxes": torch.tensor(boxes), "labels": labels, "masks": masks})
    return images, targets


def features_of(mimicking: MimickingDetector, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], list[Tensor]]:
    """Record the features of the RoIs and of the crops before the last ReLU, and retain their gradients."""
    image: list[Tensor] = []
    crops: list[Tensor] = []

    def keep(where: list[Tensor], values: Tensor) -> Tensor:
        values.retain_grad()
        where.append(values)
        return values

    layer = mimicking.detector.roi_heads.box_head.fc7
    handle = layer.register_forward_hook(lambda module, given, result: image or keep(image, result))
    inner = mimicking._crop_features

    def crop_features(pictures: Tensor) -> Tensor:
        handle.remove()
        return keep(crops, inner(pictures))

    monkeypatch.setattr(mimicking, "_crop_features", crop_features)
    return image, crops


def test_loss_is_equation_3():
    """Cosines 1, 0, -1 and 1/sqrt(2) in two images, and an image without boxes."""
    crops = torch.tensor([[1.0, 0], [1, 0], [2, 0], [3, 0]])
    boxes = torch.tensor([[5.0, 0], [0, 3], [-1, 0], [1, 1]])
    last = 1 - 1 / math.sqrt(2)
    assert mimic_loss(crops, boxes, [3, 0, 1], "sum").item() == pytest.approx((0 + 1 + 2 + 0 + last) / 3)
    assert mimic_loss(crops, boxes, [3, 0, 1], "mean").item() == pytest.approx((3 / 3 + 0 + last) / 3)
    assert mimic_loss(crops[:0], boxes[:0], [0, 0], "sum").item() == 0


def test_labels():
    truth = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]])
    boxes = torch.tensor([[0.0, 0, 10, 5], [0, 0, 10, 4.9], [21, 0, 31, 10], [50, 50, 60, 60]])
    assert labels_of(boxes, truth, torch.tensor([3, 7]), 0.5).tolist() == [3, 0, 7, 0]
    assert labels_of(boxes, truth[:0], torch.tensor([], dtype=torch.int64), 0.5).tolist() == [0] * 4


def test_crops_are_the_boxes():
    row, column = torch.meshgrid(torch.arange(60.0), torch.arange(80.0), indexing="ij")
    images = torch.stack([row, column, row + column]).expand(2, 3, 60, 80)
    crops = cut_crops(images, [torch.tensor([[8.0, 4, 64, 46]]), torch.zeros(0, 4)], CROP)
    assert crops.shape == (1, 3, CROP, CROP)
    # Pixel i of the crop is the centre of the i-th of 224 parts of the box; pixel k of the image is at k + 0.5.
    parts = (torch.arange(CROP) + 0.5) / CROP
    assert torch.allclose(crops[0, 0], (4 + 42 * parts - 0.5)[:, None].expand(CROP, CROP), atol=1e-3)
    assert torch.allclose(crops[0, 1], (8 + 56 * parts - 0.5).expand(CROP, CROP), atol=1e-3)


@pytest.mark.parametrize("detector", DETECTORS)
def test_crops_give_maps_of_14x14(detector):
    """The whole crop is pooled from conv5, or from the pyramid level of stride 16."""
    mimicking = build(config(f"network.detector={detector}"))
    pools = mimicking.detector.roi_heads.box_roi_pool.pools
    seen = []
    pools[0].register_forward_pre_hook(lambda module, given: seen.append((tuple(given[0].shape), given[1].tolist())))
    with torch.no_grad():
        assert mimicking._crop_features(torch.rand(2, 3, CROP, CROP)).shape == (2, 64)
    used = [(shape, rois) for shape, rois in seen if rois]
    assert used == [((2, 32, 14, 14), [[0, 0, 0, 14, 14], [1, 0, 0, 14, 14]])]


@pytest.mark.parametrize("detector", DETECTORS)
def test_gradients_reach_everything_that_is_shared(detector):
    mimicking = build(config(f"network.detector={detector}"))
    branch = mimicking.detector.roi_heads.box_roi_pool.pools[0].offset_fc
    with torch.no_grad():
        for layer in branch[::2]:
            layer.weight.normal_(std=0.02)
    losses = mimicking(*batch())
    assert {"loss_mimic", "loss_crop", "loss_classifier", "loss_objectness"} <= set(losses)
    for name in ("loss_mimic", "loss_crop"):
        mimicking.zero_grad()
        losses[name].backward(retain_graph=True)
        heads, body = mimicking.detector.roi_heads, mimicking.detector.backbone.body
        shared = [body.conv1.weight, body.layer3[0].conv2.weight, body.layer3[0].conv2.conv_offset.weight]
        shared += [branch[0].weight, branch[-1].weight, heads.box_head.fc6.weight, heads.box_head.fc7.weight]
        for parameter in shared:
            assert parameter.grad is not None and parameter.grad.any()
        own = mimicking.classifier.weight.grad
        assert (own is not None and bool(own.any())) == (name == "loss_crop")
        others = [heads.box_predictor.cls_score.weight.grad, mimicking.detector.rpn.head.cls_logits.weight.grad]
        assert not any(gradient is not None and gradient.any() for gradient in others)


@pytest.mark.parametrize("detach", [False, True])
def test_detached_teacher(detach, monkeypatch):
    """Image features learn from crop features, and vice versa unless detached."""
    mimicking = build(config(f"mimicking.detach={detach}"))
    image, crops = features_of(mimicking, monkeypatch)
    mimicking(*batch())["loss_mimic"].backward()
    assert image[0].grad is not None and image[0].grad.any()
    assert (crops[0].grad is not None and bool(crops[0].grad.any())) == (not detach)


@pytest.mark.parametrize("ground_truth", [False, True])
@pytest.mark.parametrize("regions", ["fg", "bg", "all"])
def test_regions(regions, ground_truth, monkeypatch):
    """Of given proposals, exactly those of the chosen kind; one of them has the coordinates of the ground truth."""
    mimicking = build(config(f"mimicking.regions={regions}", f"mimicking.ground_truth={ground_truth}"))
    images, targets = batch()
    truth = [[10.0, 12, 60, 70], [50, 20, 120, 90]]
    positive = [truth[0], [10, 12, 60, 42], [60, 20, 120, 90]]  # the second has an IoU of 30 / 58
    negative = [[10.0, 12, 60, 40], [0, 0, 20, 20]]  # the first has an IoU of 28 / 58
    proposals = [torch.tensor(positive + negative), torch.tensor([[5.0, 5, 20, 20]])]
    monkeypatch.setattr(mimicking.detector.rpn, "forward", lambda images, features, targets: (proposals, {}))
    cropped: list[list[list[float]]] = []
    inner = cut_crops

    def crop(images: Tensor, boxes: list[Tensor], side: int) -> Tensor:
        cropped.extend(item.tolist() for item in boxes)
        return inner(images, boxes, side)

    monkeypatch.setattr(mimicking_module, "cut_crops", crop)
    mimicking(images, targets)
    first = {"fg": positive, "bg": negative, "all": positive + negative}[regions]
    second = [] if regions == "fg" else proposals[1].tolist()
    if ground_truth and regions != "bg":
        first, second = first + truth, [*second, [5, 5, 50, 60]]
    assert sorted(cropped[0]) == sorted(first) and sorted(cropped[1]) == sorted(second)
    assert "subsample" not in vars(mimicking.detector.roi_heads)


def test_number_of_regions():
    mimicking = build(config("mimicking.boxes=5"))
    labels = torch.tensor([0, 2, 0, 1, 1, 1, 1, 3])
    rows = mimicking._choose(labels, torch.ones(8, dtype=torch.bool)).tolist()
    assert len(set(rows)) == 5 and set(rows) <= {1, 3, 4, 5, 6, 7}


def test_chunks_give_the_same_result():
    results = []
    for chunk in (1, 3, 100):
        mimicking = build(config(f"mimicking.chunk={chunk}", "mimicking.crop=64"))
        torch.manual_seed(3)
        losses = mimicking(*batch())
        losses["loss_mimic"].backward()
        results.append((losses["loss_mimic"].item(), mimicking.detector.roi_heads.box_head.fc6.weight.grad))
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert torch.allclose(gradient, results[0][1], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("features", ["after", "before"])
def test_features_before_and_after_the_relu(features, monkeypatch):
    mimicking = build(config(f"mimicking.features={features}", "mimicking.boxes=1"))
    image, crops = features_of(mimicking, monkeypatch)
    rows: list[Tensor] = []
    inner = mimicking._choose
    monkeypatch.setattr(mimicking, "_choose", lambda *given: rows.append(inner(*given)) or rows[-1])
    loss = mimicking(*batch())["loss_mimic"].item()
    half = len(image[0]) // 2  # both images have the same number of RoIs
    assert len(crops[0]) == 2
    cosines = []
    for row, crop in zip((rows[0], half + rows[1]), crops[0]):
        both = image[0][row][0], crop
        if features == "after":
            both = both[0].relu(), both[1].relu()
        cosines.append(torch.dot(*both) / both[0].norm() / both[1].norm())
    assert loss == pytest.approx(0.1 * (1 - sum(cosines).item() / 2), rel=1e-4)


@pytest.mark.parametrize("detector", DETECTORS)
def test_images_without_objects(detector):
    """The losses are zero, but all parameters have gradients, which data-parallel training waits for."""
    mimicking = build(config(f"network.detector={detector}"))
    images, targets = batch()
    empty = [{name: value[:0] for name, value in target.items()} for target in targets]
    losses = mimicking(images, empty)
    sum(losses.values()).backward()
    assert losses["loss_mimic"].item() == losses["loss_crop"].item() == 0
    assert [name for name, value in mimicking.named_parameters() if value.requires_grad and value.grad is None] == []


def test_parameters_are_shared_and_detections_the_same():
    mimicking = build(config())
    own = {id(value) for value in mimicking.parameters()} - {id(value) for value in mimicking.detector.parameters()}
    assert own == {id(mimicking.classifier.weight), id(mimicking.classifier.bias)}
    images, targets = batch()
    mimicking.detector.eval()
    with torch.no_grad():
        before = mimicking.detector(images)
        mimicking.train()
        mimicking(images, targets)
        after = mimicking.detector.eval()(images)
    for one, other in zip(before, after, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    hooks = [module for module in mimicking.modules() if module._forward_hooks]
    assert hooks == []


def test_the_regular_network_mimics_too():
    options = config("network.preset=regular", "mimicking.regions=fg")
    losses = build(options)(*batch())
    assert losses["loss_mimic"] > 0
    assert Config().set(["network.preset=dcnv2-mimic", "mimicking.regions=none"]).mimics() is None
    assert Config().set(["network.preset=dcnv2"]).mimics() is None


def test_loss_falls_on_a_fixed_batch():
    mimicking = build(config("mimicking.boxes=4", "mimicking.weight=1", "mimicking.crop=64"))
    optimiser = torch.optim.SGD(mimicking.parameters(), lr=0.005, momentum=0.9)
    seen = []
    for _ in range(12):
        torch.manual_seed(3)
        optimiser.zero_grad()
        losses = mimicking(*batch())
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(mimicking.parameters(), 5)
        optimiser.step()
        seen.append(losses["loss_mimic"].item())
    assert sum(seen[-3:]) < 0.7 * sum(seen[:3])


def test_resumed_training_and_final_model_without_classifier(tmp_path):
    data = tmp_path / "data"
    write_synthetic(data, train=4, val=1, size=96)
    train_set = CocoDataset(*find_data(data, "train"), masks=False, keep_empty=False)

    def run(out: Path, epochs: int, resume: bool = False) -> dict[str, Tensor]:
        options = config(f"training.epochs={epochs}", "training.workers=0", "mimicking.boxes=2", "mimicking.crop=64")
        torch.manual_seed(0)
        model = build_detector(options.network, len(train_set.categories))
        train(model, options, train_set, None, out, torch.device("cpu"), resume=resume)
        state: dict[str, Tensor] = model.state_dict()
        return state

    straight = run(tmp_path / "straight", 2)
    run(tmp_path / "parts", 1)
    resumed = run(tmp_path / "parts", 2, resume=True)
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())
    assert "crop_classifier" in load_checkpoint(tmp_path / "parts" / CHECKPOINT)
    final = load_checkpoint(tmp_path / "parts" / MODEL)
    assert "crop_classifier" not in final
    model, options, _ = load_detector(tmp_path / "parts" / MODEL, torch.device("cpu"))
    assert model.state_dict().keys() == straight.keys()
    assert options.network.preset == "dcnv2-mimic"
