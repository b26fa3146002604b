"""Prediction: unusual images, masks, pictures and the JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional
from torchvision.models.detection.roi_heads import paste_masks_in_image

from dcnops.detector.config import Config
from dcnops.detector.data import Category, find_images
from dcnops.detector.errors import UserError
from dcnops.detector.model import build_detector
from dcnops.detector.predict import (
    batching,
    contact_sheet,
    decode_rle,
    draw_detections,
    encode_rle,
    evaluating,
    infer,
    infer_in_batches,
    predict,
    write_predictions,
)
from dcnops.detector.predict import prediction as prediction_module
from dcnops.detector.predict.drawing import COLOURS
from dcnops.detector.predict.inference import paste_masks
from tests.detector.configurations import assignments

CPU = torch.device("cpu")
CATEGORIES = [Category(4, "cat"), Category(8, "dog")]


@pytest.fixture(scope="module")
def network():
    """Small Mask R-CNN with random weights that give many detections."""
    torch.manual_seed(0)
    options = "backbone=small detector=mask min_size=64 max_size=96 max_detections=8 anchor_sizes=8,16,32,64,96"
    config = Config().set(assignments(network=f"{options} score_threshold=0 proposals_test=50"))
    model = build_detector(config.network, 2)
    torch.nn.init.normal_(model.roi_heads.mask_predictor.mask_fcn_logits.weight, std=0.5)
    return model.eval()


def test_detections_are_the_networks(network):
    image = torch.rand(3, 50, 70)
    with torch.no_grad():
        expected = network([image])[0]
    with evaluating(network):
        found = infer(network, [image], [(70, 50)])[0]
    assert len(found.scores) == 8
    assert torch.equal(found.boxes, expected["boxes"])
    assert found.masks == paste_masks(expected["masks"][:, 0], expected["boxes"], (70, 50))


def masks_and_boxes(number: int, width: int, height: int) -> tuple[Tensor, Tensor]:
    """Return random smooth masks, and boxes of all sizes that overlap an image and may leave it."""
    generator = torch.Generator().manual_seed(0)
    noise = functional.avg_pool2d(torch.rand(number, 28, 28, generator=generator), 5, 1, 2)
    corner = torch.rand(number, 2, generator=generator) * torch.tensor([width, height]) * 1.2 - 12
    boxes = torch.cat([corner, corner + torch.rand(number, 2, generator=generator) ** 3 * 80 + 0.1], 1)
    boxes[:3] = torch.tensor([[0.0, 0, width, height], [10, 0, 30, height], [10, 0, width, height]])
    masks = ((noise - 0.5) * 6 + 0.5).clamp(0, 1)
    masks[:3] = 1
    inside = (boxes[:, :2] < torch.tensor([width, height]) - 1).all(1) & (boxes[:, 2:] > 1).all(1)
    return masks[inside], boxes[inside]


@pytest.mark.parametrize("aligned", [True, False])
def test_pasted_masks(aligned):
    """Aligned: pixel centres sampled by `grid_sample`; otherwise torchvision's pasting."""
    width, height = 70, 50
    masks, boxes = masks_and_boxes(300, width, height)
    assert len(masks) > 100
    if aligned:
        centres = [(torch.arange(size) + 0.5).expand(len(boxes), size) for size in (width, height)]
        x, y = (
            (centre - begin[:, None]) / (end - begin)[:, None] * 2 - 1
            for centre, begin, end in zip(centres, boxes[:, :2].T, boxes[:, 2:].T)
        )
        grid = torch.stack([x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], 3)
        expected = functional.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]
    else:
        expected = paste_masks_in_image(masks[:, None], boxes, (height, width))[:, 0]
    clear = (expected - 0.5).abs() > 1e-4
    for rle, values, sure in zip(paste_masks(masks, boxes, (width, height), aligned=aligned), expected, clear):
        mask = decode_rle(rle)
        assert np.array_equal(mask[sure], values[sure] >= 0.5)
        assert encode_rle(mask) == rle


def test_masks_outside_of_the_image_are_empty():
    boxes = torch.tensor([[-50.0, 5, -20, 20], [5, 90, 20, 95], [80, 60, 90, 70], [5, 5, 5, 5]])
    for rle in paste_masks(torch.ones(4, 28, 28), boxes, (70, 50)):
        assert not decode_rle(rle).any()
        assert encode_rle(decode_rle(rle)) == rle


def test_detections_of_a_shrunk_image_are_at_full_size(network):
    image = torch.rand(3, 50, 70)
    small, large = (infer(network, [image], [size])[0] for size in ((70, 50), (700, 500)))
    assert torch.allclose(large.boxes, 10 * small.boxes)
    assert small.masks and large.masks
    for one, ten in zip(small.masks, large.masks):
        assert ten["size"] == [500, 700]
        assert abs(decode_rle(ten).mean() - decode_rle(one).mean()) < 0.03


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 2), (3000, 1), (1, 3000), (5000, 2)])
def test_odd_shapes(picture, network, tmp_path, width, height):
    path = picture("odd.png", width, height)
    found = write_predictions(
        predict(network, [path], CPU, threshold=0, progress=False), tmp_path / "out", CATEGORIES, inputs=[path]
    )
    report = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(report["detections"]) == found > 0
    for entry in report["detections"]:
        x, y, w, h = entry["bbox"]
        assert w > 0 and h > 0 and x >= 0 and y >= 0 and x + w <= width * 1.0001 and y + h <= height * 1.0001
        assert entry["segmentation"]["size"] == [height, width]
    with Image.open(tmp_path / "out" / "odd.png") as drawn:
        assert abs(drawn.width / drawn.height * height / width - 1) < 0.6


@pytest.mark.slow
def test_large_images_are_shrunk(picture, network, tmp_path, monkeypatch):
    monkeypatch.setattr(prediction_module, "LARGEST", 100)
    seen: list[tuple[int, ...]] = []
    hook = network.transform.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0][0].shape)))
    paths = [picture("large.jpg", 1200, 900), picture("grey.png", 900, 1200, mode="P")]
    predictions = list(predict(network, paths, CPU, threshold=0, progress=False))
    hook.remove()
    assert seen == [(3, 75, 100), (3, 100, 75)]
    assert [prediction.size for prediction in predictions] == [(1200, 900), (900, 1200)]
    assert predictions[0].detections.boxes[:, 2].max() > 600
    write_predictions(iter(predictions), tmp_path / "out", CATEGORIES, inputs=paths)
    with Image.open(tmp_path / "out" / "large.png") as drawn:
        assert drawn.size == (800, 600)


def test_unreadable_files(picture, network, tmp_path, capsys):
    good, cut = picture("in/a.png"), picture("in/b.jpg", 200, 200)
    cut.write_bytes(cut.read_bytes()[:3000])
    (tmp_path / "in" / "c.png").write_text("not an image")
    Image.new("L", (3, 3)).save(tmp_path / "in" / "d.tif")
    (tmp_path / "in" / "d.tif").write_bytes((tmp_path / "in" / "d.tif").read_bytes()[:9])
    last = picture("in/e.png")
    paths = find_images([str(tmp_path / "in")])
    assert len(paths) == 5
    with pytest.raises(UserError, match=r"3 of 5 images could not be read, the first is .*b\.jpg"):
        write_predictions(predict(network, paths, CPU, progress=False), tmp_path / "out", CATEGORIES, inputs=paths)
    report = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [image["file_name"] for image in report["images"]] == [str(good), str(last)]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    for line, words in zip(lines, ("b.jpg: cannot be read", "c.png: is not an image", "d.tif: ")):
        assert words in line
    for path, message in ((cut, "cannot be read as an image"), (tmp_path / "no.png", "there is no such file")):
        with pytest.raises(UserError, match=f"{path.name}: {message}"):
            list(predict(network, [path], CPU, progress=False))


def test_threshold_and_json(picture, network, tmp_path):
    paths = [picture("one/same.png"), picture("two/same.jpg"), picture("out/SAME.png"), picture("other.png")]
    original = paths[2].read_bytes()
    everything = list(predict(network, paths, CPU, threshold=0, progress=False))
    scores = torch.cat([prediction.detections.scores for prediction in everything])
    threshold = float(scores.median())
    predictions = predict(network, paths, CPU, threshold=threshold, progress=False)
    count = write_predictions(predictions, tmp_path / "out", CATEGORIES, inputs=paths)
    assert 0 < count == int((scores >= threshold).sum()) < len(scores)
    report = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert report["categories"] == [{"id": 4, "name": "cat"}, {"id": 8, "name": "dog"}]
    assert [image["picture"] for image in report["images"]] == ["same-2.png", "same-3.png", "SAME-4.png", "other.png"]
    assert paths[2].read_bytes() == original
    boxes = torch.cat([prediction.detections.boxes for prediction in everything])[scores >= threshold]
    labels = torch.cat([prediction.detections.labels for prediction in everything])[scores >= threshold]
    masks = [mask for prediction in everything for mask in prediction.detections.masks or []]
    masks = [mask for mask, score in zip(masks, scores) if score >= threshold]
    for entry, box, label, mask in zip(report["detections"], boxes, labels.tolist(), masks):
        assert (entry["category_id"], entry["category_name"]) == CATEGORIES[label - 1]
        assert torch.equal(torch.tensor(entry["bbox"]), torch.cat((box[:2], box[2:] - box[:2])))
        assert entry["segmentation"] == mask
    assert {entry["image_id"] for entry in report["detections"]} <= {image["id"] for image in report["images"]}
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: cannot be written"):
        write_predictions(iter(everything), tmp_path / "file", CATEGORIES, inputs=paths)


@pytest.mark.slow
def test_names_that_cannot_be_drawn_or_written(picture, network, tmp_path):
    longest = "a" * 251
    paths = [picture(f"one/{longest}.png"), picture(f"two/{longest}.bmp"), picture("\x1b[31m\n.png")]
    paths.insert(0, picture("..jpg", format="JPEG"))
    names = [Category(4, "a\nb\x1b[31m"), Category(8, "\ud800$\\frac{$")]
    predictions = list(predict(network, paths, CPU, threshold=0, progress=False))
    write_predictions(iter(predictions), tmp_path / "out", names, inputs=paths)
    report = json.loads((tmp_path / "out" / "predictions.json").read_text())
    written = [image["picture"] for image in report["images"]]
    assert written == ["..png", f"{'a' * 240}.png", f"{'a' * 240}-2.png", "\x1b[31m\n.png"]
    assert all(Image.open(tmp_path / "out" / name).format == "PNG" for name in written)
    assert [category["name"] for category in report["categories"]] == [category.name for category in names]


def pixels_of(image: Image.Image, colour: tuple[int, int, int]) -> Any:
    return (np.asarray(image) == colour).all(2)


def test_drawing_of_boxes():
    grey = Image.new("RGB", (900, 600), (90, 90, 90))
    boxes = torch.tensor([[100.0, 200, 300, 400], [500, 100, 700, 500]])
    drawn = draw_detections(grey, boxes, torch.tensor([1, 2]), [0.87, 0.5], None, ["cat", "dog"])
    assert drawn.size == (900, 600)
    for box, colour in zip(boxes.int().tolist(), COLOURS):
        x1, y1, x2, y2 = box
        mine = pixels_of(drawn, colour)
        assert mine[(y1 + y2) // 2, [x1, x2 - 1]].all() and mine[[y1, y2 - 1], (x1 + x2) // 2].all()
        rows, columns = np.nonzero(mine)
        assert columns.min() == x1 and columns.max() == x2 - 1 and rows.max() == y2 - 1
        assert 10 < y1 - rows.min() < 30  # the label above the box
        assert not mine[y1 + 5 : y2 - 5, x1 + 5 : x2 - 5].any()
    assert np.asarray(grey).max() == 90


def test_drawing_of_masks():
    black = torch.zeros(3, 600, 900, dtype=torch.uint8)
    masks = np.zeros((2, 600, 900), np.uint8)
    masks[0, 100:500, 100:500] = 1
    masks[1, 200:300, 200:300] = 1
    boxes = torch.tensor([[100.0, 100, 500, 500], [200, 200, 300, 300]])
    rles = [encode_rle(mask) for mask in masks]
    drawn = np.asarray(draw_detections(black, boxes, [1, 1], None, rles, ["cat"])).astype(int)
    first, second = COLOURS[:2]  # neighbours of the same category
    assert np.abs(drawn[400, 400] - 0.45 * np.array(first)).max() < 3
    inside = drawn[250, 250]
    assert np.abs(inside - (0.45 * np.array(second) + 0.55 * 0.45 * np.array(first))).max() < 3  # the small one on top
    assert (drawn[300, 101] == first).all()  # the outline
    assert not drawn[550, 550].any()


def test_small_pictures_are_enlarged_and_masks_follow():
    mask = np.zeros((100, 160), np.uint8)
    mask[20:60, 40:120] = 1
    boxes = torch.tensor([[40.0, 20, 120, 60]])
    drawn = draw_detections(Image.new("RGB", (160, 100)), boxes, [1], [0.5], [encode_rle(mask)], ["cat"])
    assert drawn.size == (800, 500)
    tinted = np.asarray(drawn)[200, :, 0] > 80
    assert np.flatnonzero(tinted)[[0, -1]].tolist() == pytest.approx([200, 599], abs=2)


@pytest.mark.parametrize("size", [(900, 600), (60, 40), (3, 900), (1, 1)])
def test_tags_stay_inside_and_apart(size, monkeypatch):
    tags: list[tuple[float, ...]] = []
    original = ImageDraw.ImageDraw.rounded_rectangle

    def record(draw: ImageDraw.ImageDraw, box: Any, *rest: Any, **options: Any) -> None:
        tags.append(box)
        original(draw, box, *rest, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "rounded_rectangle", record)
    width, height = size
    points = torch.rand(60, 2, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([width, height])
    corners = points.sort(1).values.flatten(1)
    corners[0] = torch.tensor([width - 1, 0, width, height])  # at the edges
    labels = [1 + index % 9 for index in range(60)]
    names = [f"category number {index}" for index in range(9)]
    drawn = draw_detections(Image.new("RGB", size), corners, labels, torch.rand(60), None, names)
    assert len(tags) >= (5 if min(size) > 10 else 0)
    for index, (x1, y1, x2, y2) in enumerate(tags):
        assert 0 <= x1 < x2 < drawn.width and 0 <= y1 < y2 < drawn.height
        for a1, b1, a2, b2 in tags[:index]:
            assert x1 > a2 or x2 < a1 or y1 > b2 or y2 < b1


def test_nothing_to_draw():
    image = Image.effect_noise((900, 900), 50).convert("RGB")
    nothing: tuple[list[Any] | None, ...] = (None, [])
    for masks in nothing:
        drawn = draw_detections(
            image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0), masks, ["cat"]
        )
        assert drawn.tobytes() == image.tobytes()
    empty = encode_rle(np.zeros((900, 900), np.uint8))
    draw_detections(image, torch.tensor([[5.0, 5, 5, 5]]), [1], [1.0], [empty], ["cat"])


def test_contact_sheet():
    images = [Image.new("RGB", (100, 80), colour) for colour in ("red", "green", "blue")]
    sheet = contact_sheet(images, 2, ["left", "right"])
    pixels = np.asarray(sheet)
    for colour in ((255, 0, 0), (0, 128, 0), (0, 0, 255)):
        assert (pixels == colour).all(2).sum() == 8000
    assert (pixels[:20] < 100).any()  # titles
    assert contact_sheet(images, 2).height < sheet.height


def test_batches_of_equal_size_change_nothing(picture, network, tmp_path):
    sizes = [(60, 40), (40, 60), (62, 41), (41, 62), (60, 40), (90, 30), (40, 60), (61, 40), (200, 2)]
    paths = [picture(f"in/{number}.png", *size) for number, size in enumerate(sizes)]
    (tmp_path / "in" / "4.png").write_text("not an image")
    shapes: list[tuple[int, ...]] = []
    hook = network.backbone.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    with pytest.raises(UserError, match="1 of 9 images"):
        singles = []
        for prediction in predict(network, paths, CPU, threshold=0, progress=False):
            singles.append(prediction)
    alone, shapes[:] = shapes[:], []
    with pytest.raises(UserError, match="1 of 9 images"):
        together = []
        for prediction in predict(network, paths, CPU, threshold=0, batch_size=3, workers=2, progress=False):
            together.append(prediction)
    hook.remove()
    assert sorted(shape[0] for shape in shapes) == [2, 3, 3]
    assert {shape[2:] for shape in shapes} == {shape[2:] for shape in alone}  # nothing is padded further
    assert [item.path for item in together] == [item.path for item in singles] == [*paths[:4], *paths[5:]]
    for one, other in zip(singles, together):
        assert one.size == other.size
        assert torch.equal(one.detections.labels, other.detections.labels)
        torch.testing.assert_close(one.detections.boxes, other.detections.boxes, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.detections.scores, other.detections.scores, rtol=1e-4, atol=1e-5)
        assert one.detections.masks and len(one.detections.masks) == len(other.detections.masks or ())


def test_waiting_images_are_bounded_and_results_in_order(network, monkeypatch):
    """Images that find no others of their size do not collect in memory."""
    monkeypatch.setattr(batching, "MOST_WAITING", 1)
    taken: list[int] = []

    def images() -> Iterator[tuple[int, torch.Tensor, tuple[int, int]]]:
        for number, (height, width) in enumerate([(40, 40), (40, 60), (30, 90), (40, 60), (40, 40)]):
            taken.append(number)
            yield number, torch.rand(3, height, width), (width, height)

    with evaluating(network):
        results = infer_in_batches(network, images(), CPU, 2)
        assert next(results)[0] == 0
        assert taken == [0, 1, 2]  # two may wait, the third image makes the first one run
        assert [number for number, _, _ in results] == [1, 2, 3, 4]


def test_without_pictures(picture, network, tmp_path):
    paths = [picture("one.png")]
    predictions = predict(network, paths, CPU, threshold=0, progress=False)
    assert write_predictions(predictions, tmp_path / "out", CATEGORIES, inputs=paths, pictures=False) == 8
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["predictions.json"]
    assert set(json.loads((tmp_path / "out" / "predictions.json").read_text())["images"][0]) == {
        *("id", "file_name", "width", "height")
    }
