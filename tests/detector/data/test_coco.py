"""COCO data sets: samples, invalid annotations and images, invalid files."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from pycocotools import mask as rle_tools

from dcnops.detector.data import Category, CocoDataset, find_data, has_split
from dcnops.detector.data.coco_json import CocoJson
from dcnops.detector.errors import UserError

WIDTH, HEIGHT = 20, 12
SQUARE = [2, 3, 7, 3, 7, 9, 2, 9]  # covers x 2..6 and y 3..8
SQUARE_MASK = np.zeros((HEIGHT, WIDTH), np.uint8)
SQUARE_MASK[3:9, 2:7] = 1


def compressed(mask: np.ndarray) -> dict[str, Any]:
    code = rle_tools.encode(np.asfortranarray(mask))
    return {"size": list(mask.shape), "counts": code["counts"].decode()}


def uncompressed(mask: np.ndarray) -> dict[str, Any]:
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [1 - flat[-1]]])))
    return {"size": list(mask.shape), "counts": np.diff(np.concatenate([[0], edges])).tolist()}


class Folder:
    """Data set on disk that starts with valid images."""

    def __init__(self, root: Path, images: int = 1) -> None:
        self.root = root
        (root / "annotations").mkdir()
        (root / "images").mkdir()
        self.json: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
        for index in range(images):
            self.image(index + 1, Image.new("RGB", (WIDTH, HEIGHT), (255, 102, 0)))

    def image(self, number: int, picture: Image.Image, name: str | None = None, **options: Any) -> None:
        name = name or f"{number}.png"
        picture.save(self.root / "images" / name, **options)
        self.json["images"].append({"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT})

    def annotate(self, image: int = 1, category: int = 1, **fields: Any) -> int:
        number = len(self.json["annotations"]) + 1
        fields = {"bbox": [2, 3, 5, 6], "area": 30, "iscrowd": 0, "segmentation": [SQUARE]} | fields
        fields = {key: value for key, value in fields.items() if value is not None}
        self.json["annotations"].append({"id": number, "image_id": image, "category_id": category} | fields)
        return number

    def load(self, *, masks: bool = True, keep_empty: bool = True, negatives: bool = False) -> CocoDataset:
        file = self.root / "annotations" / "instances_train.json"
        file.write_text(json.dumps(self.json))
        return CocoDataset(file, self.root / "images", masks=masks, keep_empty=keep_empty, negatives=negatives)


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def test_sample(folder):
    number = folder.annotate()
    data = folder.load()
    image, target = data[0]
    assert len(data) == 1 and data.image_ids == [1] and data.sizes == [(WIDTH, HEIGHT)] and data.report == []
    assert data.path(0) == folder.root / "images" / "1.png"
    assert image.dtype == torch.float32 and image.shape == (3, HEIGHT, WIDTH)
    torch.testing.assert_close(image[:, 0, 0], torch.tensor([1, 0.4, 0]))
    assert target["boxes"].dtype == torch.float32 and target["boxes"].tolist() == [[2, 3, 7, 9]]
    assert target["labels"].dtype == torch.int64 and target["labels"].tolist() == [1]
    assert target["masks"].dtype == torch.uint8 and np.array_equal(target["masks"][0], SQUARE_MASK)
    assert target["image_id"] == 1
    assert list(data.coco.anns) == [number]


def test_a_data_set_without_masks_has_none_and_needs_none(folder):
    folder.annotate(segmentation=None)
    folder.annotate(segmentation=[["nonsense"]])
    data = folder.load(masks=False)
    assert set(data[0][1]) == {"boxes", "labels", "image_id"} and len(data[0][1]["boxes"]) == 2 and data.report == []


def test_an_index_out_of_range(folder):
    folder.annotate()
    data = folder.load()
    assert data[-1][1]["boxes"].shape == (1, 4)
    with pytest.raises(IndexError):
        data[1]


def test_labels_follow_the_order_of_category_ids(folder):
    folder.json["categories"] = [{"id": 90, "name": "c"}, {"id": 3, "name": "a"}, {"id": 17, "name": "b"}]
    for category in (90, 3, 17):
        folder.annotate(category=category)
    data = folder.load()
    assert data.categories == [Category(3, "a"), Category(17, "b"), Category(90, "c")]
    assert data[0][1]["labels"].tolist() == [3, 1, 2]
    assert [annotation["category_id"] for annotation in data.coco.anns.values()] == [90, 3, 17]


def test_images_are_in_order_of_id_with_their_own_annotations(tmp_path):
    folder = Folder(tmp_path, images=3)
    folder.json["images"].reverse()
    for image, x in ((3, 5), (1, 1), (3, 6), (2, 3)):
        folder.annotate(image=image, bbox=[x, 1, 2, 2])
    data = folder.load()
    assert data.image_ids == [1, 2, 3]
    assert [sample["boxes"][:, 0].tolist() for _, sample in data] == [[1], [3], [5, 6]]


@pytest.mark.parametrize(
    "segmentation",
    [
        [SQUARE],
        [SQUARE, [1, 2, 3, 4]],  # a part with two points is ignored
        [[2, 3, 7, 3, 7, 6, 2, 6], [2, 6, 7, 6, 7, 9, 2, 9]],
        compressed(SQUARE_MASK),
        uncompressed(SQUARE_MASK),
    ],
    ids=["polygon", "short part", "two parts", "compressed", "uncompressed"],
)
def test_segmentations(folder, segmentation):
    folder.annotate(segmentation=segmentation)
    data = folder.load()
    assert np.array_equal(data[0][1]["masks"][0], SQUARE_MASK)
    assert np.array_equal(data.coco.annToMask(data.coco.anns[1]), SQUARE_MASK)


@pytest.mark.parametrize("seed", range(20))
def test_valid_compressed_codes_pass_the_check(tmp_path, seed):
    rng = np.random.default_rng(seed)
    folder = Folder(tmp_path)
    mask = (rng.random((HEIGHT, WIDTH)) < rng.choice([0.02, 0.5, 0.98])).astype(np.uint8)
    mask[-1, -1] = 1
    folder.annotate(segmentation=compressed(mask))
    assert np.array_equal(folder.load()[0][1]["masks"][0], mask)


@pytest.mark.parametrize("masks", [True, False])
def test_a_missing_box_comes_from_the_segmentation(folder, masks):
    folder.annotate(bbox=None, area=None, iscrowd=None)
    data = folder.load(masks=masks)
    assert data[0][1]["boxes"].tolist() == [[2, 3, 7, 9]]
    assert data.coco.anns[1]["bbox"] == [2, 3, 5, 6]
    assert data.coco.anns[1]["area"] == 30
    assert data.coco.anns[1]["iscrowd"] == 0


def test_boxes_are_clipped_for_training_only(folder):
    folder.annotate(bbox=[-3, 2.5, 100, 100])
    data = folder.load()
    assert data[0][1]["boxes"].tolist() == [[0, 2.5, WIDTH, HEIGHT]]
    assert data.coco.anns[1]["bbox"] == [-3, 2.5, 100, 100]


def test_crowds_count_in_the_evaluation_only(folder):
    folder.annotate()
    crowd = folder.annotate(iscrowd=1, segmentation=uncompressed(SQUARE_MASK))
    data = folder.load()
    assert len(data[0][1]["boxes"]) == len(data[0][1]["masks"]) == 1
    assert data.coco.anns[crowd]["iscrowd"] == 1
    assert data.report == []


NARROW = "annotations with a box of less than 0.01 pixels on a side inside the image"
NOTHING = "annotations without a usable bbox or segmentation"
NO_MASK = "annotations without a usable segmentation"
EMPTY_MASK = "annotations with an empty mask"
WRONG_COUNTS = [5, [100, 100], [250, -20, 10], [120.0, 120.0], []]
# Compressed codes that make pycocotools read or write out of bounds.
WRONG_COUNTS += ["", "zzz", "é0", "o" * 40, "me;4j75J5N1N", compressed(SQUARE_MASK)["counts"][:-1]]


@pytest.mark.parametrize(
    "fields, kind",
    [
        ({"category_id": 7}, "annotations of categories that the json does not have"),
        ({"image_id": 99}, "annotations of images that the json does not have"),
        ({"bbox": [2, 3, 0, 6]}, NARROW),
        ({"bbox": [2, 3, -5, 6]}, NARROW),
        ({"bbox": [WIDTH, 3, 5, 5]}, NARROW),
        ({"bbox": [2, -8, 5, 8]}, NARROW),
        ({"segmentation": None}, NO_MASK),
        ({"segmentation": []}, NO_MASK),
        ({"segmentation": [[1, 2, 3, 4]]}, NO_MASK),
        ({"segmentation": [[1, 2, 3, 4, 5]]}, NO_MASK),
        ({"segmentation": [[1, 2, 3, 4, float("nan"), 6]]}, NO_MASK),
        ({"segmentation": [[1, 2, 3, 4, 1e9, 6]]}, NO_MASK),
        ({"segmentation": [[1, 2, 3, 4, 10**400, 6]]}, NO_MASK),
        ({"segmentation": [[[1, 2], [3, 4], [5, 6]] * 2]}, NO_MASK),
        ({"segmentation": [[1, 2, 3, 4, "x", 6]]}, NO_MASK),
        ({"segmentation": SQUARE}, NO_MASK),
        ({"segmentation": "mask.png"}, NO_MASK),
        ({"segmentation": {"counts": compressed(SQUARE_MASK)["counts"]}}, NO_MASK),
        ({"segmentation": {"size": [WIDTH, HEIGHT], "counts": compressed(SQUARE_MASK)["counts"]}}, NO_MASK),
        *(({"segmentation": {"size": [HEIGHT, WIDTH], "counts": counts}}, NO_MASK) for counts in WRONG_COUNTS),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}}, EMPTY_MASK),
        ({"segmentation": compressed(np.zeros_like(SQUARE_MASK))}, EMPTY_MASK),
        ({"segmentation": [[30, 30, 40, 30, 40, 40]]}, EMPTY_MASK),
        ({"bbox": None, "segmentation": None}, NOTHING),
    ],
)
def test_annotations_left_out(folder, fields, kind):
    """Annotations that cannot be trained on count in the evaluation; those without a place or a category do not."""
    folder.annotate()
    for _ in range(2):
        folder.annotate(**fields)
    counts = kind in (NARROW, NO_MASK, EMPTY_MASK)
    for evaluated, verb in ((False, "left out"), (True, "kept for the evaluation only:" if counts else "left out")):
        data = folder.load(keep_empty=evaluated)
        assert data.report == [f"{verb} 2 {kind}, e.g. id 2"]
        assert len(data[0][1]["boxes"]) == len(data[0][1]["masks"]) == 1
    assert list(data.coco.anns) == ([1, 2, 3] if counts else [1])


@pytest.mark.parametrize(
    "box", [[], [2, 3, 5], [2, 3, "5", 6], [float("nan"), 3, 5, 6], [2, 3, float("inf"), 6], [2, 3, 10**400, 6]]
)
def test_unusable_boxes_come_from_the_segmentation(folder, box):
    folder.annotate(bbox=box, area=None)
    data = folder.load()
    assert data[0][1]["boxes"].tolist() == [[2, 3, 7, 9]] and data.coco.anns[1]["bbox"] == [2, 3, 5, 6]
    assert data.report[0].startswith("ignored 1 bbox without four finite numbers, e.g. [")


def test_polygons_that_turn_out_to_be_empty(folder):
    """A polygon along a line is wide and high, but covers nothing: it is left out when it is drawn."""
    folder.annotate(category=1)
    folder.annotate(segmentation=[[1, 1, 9, 9, 1, 1]])
    _, target = folder.load(keep_empty=False)[0]
    assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"]) == 1


def test_neither_box_nor_segmentation(folder):
    folder.annotate()
    folder.annotate(bbox=None, segmentation=[[1, 2]])
    assert folder.load(masks=False).report == ["left out 1 annotation without a usable bbox or segmentation, e.g. id 2"]


def test_images_without_targets(tmp_path):
    folder = Folder(tmp_path, images=3)
    folder.annotate(image=2)
    folder.annotate(image=3, iscrowd=1)
    data = folder.load(keep_empty=True)
    assert data.image_ids == [1, 2, 3] and data.report == []
    _, target = data[0]
    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)
    assert target["masks"].shape == (0, HEIGHT, WIDTH) and target["masks"].dtype == torch.uint8
    data = folder.load(keep_empty=False)
    assert data.image_ids == [2]
    assert data.report == [
        "left out 1 image without annotations to train on, e.g. 1.png",
        "left out 1 image with crowd regions only, which are not trained on, e.g. 3.png",
    ]
    assert len(data[0][1]["boxes"]) == 1


def test_negative_images(tmp_path):
    folder = Folder(tmp_path, images=4)
    folder.annotate(image=2)
    folder.annotate(image=3, iscrowd=1)
    folder.annotate(image=4, segmentation=[[1, 2]])
    data = folder.load(keep_empty=False, negatives=True)
    # Images with crowds or unusable annotations may show objects.
    assert data.image_ids == [1, 2] and data[0][1]["masks"].shape == (0, HEIGHT, WIDTH)
    del folder.json["annotations"][0]
    with pytest.raises(UserError, match="no usable image"):
        folder.load(keep_empty=False, negatives=True)


def test_only_crowds(folder):
    folder.annotate(iscrowd=1)
    with pytest.raises(UserError, match=r"no usable image \(left out 1 image with crowd regions only"):
        folder.load(keep_empty=False)


@pytest.mark.parametrize(
    "value, meaning",
    [(None, 0), (0, 0), (1, 1), (True, 1), (1.0, 1), ("0", 0), ("1", 1), ("False", 0), ("true", 1)],
)
def test_flags_of_crowds(folder, value, meaning):
    folder.annotate(iscrowd=value)
    assert folder.load().coco.anns[1]["iscrowd"] == meaning


@pytest.mark.parametrize(
    "field, value",
    [("iscrowd", value) for value in (2, -1, 0.5, float("nan"), "", "no crowd", [0], {})]
    + [("area", value) for value in ("30", -1, float("inf"), True, [30], 10**400)],
)
def test_flags_and_areas_without_a_meaning(folder, field, value):
    folder.annotate()
    folder.annotate(**{field: value})
    with pytest.raises(UserError, match=rf"instances_train\.json .*annotations\[1\] needs .* as '{field}', got"):
        folder.load()


def test_unknown_areas_are_computed(folder):
    folder.annotate(area=float("nan"))
    assert folder.load().coco.anns[1]["area"] == 30


def test_nothing_left(folder):
    with pytest.raises(UserError, match=r"no usable image.*1 image without annotations"):
        folder.load(keep_empty=False)
    folder.json["images"] = []
    with pytest.raises(UserError, match="no usable image"):
        folder.load()


# Images


def tagged(folder: Folder, number: int, orientation: int, width: int = WIDTH, height: int = HEIGHT) -> None:
    """Add a picture with an EXIF orientation, white in the upper left quarter of the stored pixels."""
    picture = Image.new("RGB", (width, height))
    picture.paste((255, 255, 255), (0, 0, width // 2, height // 2))
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    folder.image(number, picture, exif=tags)


def white_corner(image: torch.Tensor) -> tuple[int, int]:
    """Return the row and the column of the white corner of a picture, each 0 or -1."""
    return next((row, column) for row in (0, -1) for column in (0, -1) if image[0, row, column] == 1)


def test_pictures_are_turned_upright(folder):
    tagged(folder, 2, 3)  # half a turn: both sizes fit
    tagged(folder, 3, 6, HEIGHT, WIDTH)  # a quarter: only the upright size fits
    data = folder.load()
    assert data.report == [] and len(data) == 3
    assert [white_corner(data[index][0]) for index in (1, 2)] == [(-1, -1), (0, -1)]


def test_pictures_whose_json_describes_stored_pixels_are_not_turned(folder):
    tagged(folder, 2, 6)
    tagged(folder, 3, 3)  # both sizes fit, so it follows the other picture
    data = folder.load()
    assert data.report == [] and [white_corner(data[index][0]) for index in (1, 2)] == [(0, 0), (0, 0)]
    assert data[1][0].shape == (3, HEIGHT, WIDTH)


def test_wrong_sizes_name_the_orientation(folder):
    tagged(folder, 2, 6, 30, 10)
    assert folder.load().report == [
        "left out 1 picture of another size than the json says, e.g. 2.png (30x10, by EXIF upright 10x30, json 20x12)"
    ]


def test_missing_sizes_come_from_the_pictures(folder):
    tagged(folder, 2, 6, HEIGHT, WIDTH)
    first, second = folder.json["images"]
    del first["width"], first["height"]
    second["width"] = 0
    data = folder.load()
    assert data.sizes == [(WIDTH, HEIGHT)] * 2
    assert data.report == ["read the size of 2 pictures from the files, as the json does not say it, e.g. 1.png"]
    with pytest.raises(UserError, match="width and height of images are missing"):
        CocoDataset(folder.root / "annotations" / "instances_train.json", None, masks=True, keep_empty=True)


def test_many_pictures_are_checked_in_processes(tmp_path, monkeypatch):
    folder = Folder(tmp_path, images=4)
    (folder.root / "images" / "2.png").unlink()
    expected = folder.load()
    monkeypatch.setattr("dcnops.detector.data.picture_files.MANY", 1)
    started, fork = [], os.fork
    monkeypatch.setattr(os, "fork", lambda: started.append(fork()) or started[-1])
    data = folder.load()
    assert len(started) == 3  # for one, one and two pictures
    assert data.report == expected.report == ["left out 1 missing picture, e.g. 2.png"]
    assert data.image_ids == [1, 3, 4] and data.unusable_images == data.report


def test_names_that_lead_out_of_the_folder(tmp_path):
    folder = Folder(tmp_path)
    pictures = folder.root / "images"
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "secret.png")
    (pictures / "link.png").symlink_to(tmp_path / "secret.png")
    (pictures / "folder").symlink_to(tmp_path)
    names = ["../secret.png", str(tmp_path / "secret.png"), "link.png", "folder/secret.png", "sub/../../secret.png"]
    for number, name in enumerate(names, 2):
        folder.json["images"].append({"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT})
    data = folder.load()
    assert data.image_ids == [1]
    assert data.report == [
        f"left out 5 pictures outside of the folder of images, e.g. ../secret.png ({tmp_path}/secret.png)"
    ]
    # An absolute name, a link inside the folder, and a link to the folder itself lead nowhere else.
    (pictures / "inside.png").symlink_to(pictures / "1.png")
    folder.json["images"] = folder.json["images"][:1]
    for number, name in enumerate([str(pictures / "1.png"), "inside.png"], 2):
        folder.json["images"].append({"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT})
    folder.load()
    (tmp_path / "other").symlink_to(pictures)
    data = CocoDataset(tmp_path / "annotations/instances_train.json", tmp_path / "other", masks=True, keep_empty=True)
    assert len(data) == 3 and data.report == []


@pytest.mark.parametrize("name", ["pipe.png", ".", "nul\0.png", "\ud800.png", "a" * 300, "\x1b]0;title\x07\x1b[31m\n"])
def test_names_of_unusable_files(folder, name):
    os.mkfifo(folder.root / "images" / "pipe.png")
    folder.json["images"].append({"id": 2, "file_name": name, "width": WIDTH, "height": HEIGHT})
    data = folder.load()
    (line,) = data.report
    assert data.image_ids == [1] and line.isprintable()
    assert re.match("left out 1 (unreadable|missing) picture, e.g. ", line)


def test_names_in_errors_are_printable(folder):
    folder.json["images"] = [{"id": 2, "file_name": "\x1b[31m\n\ud800", "width": WIDTH, "height": HEIGHT}]
    with pytest.raises(UserError) as caught:
        folder.load()
    assert str(caught.value).isprintable() and r"\x1b[31m\n\ud800" in str(caught.value)


def test_pictures_left_out(tmp_path):
    folder = Folder(tmp_path, images=6)
    for image in range(1, 7):
        folder.annotate(image=image)
    pictures = folder.root / "images"
    (pictures / "2.png").unlink()
    (pictures / "3.png").write_bytes(b"")
    (pictures / "4.png").write_text("hello")
    Image.new("RGB", (HEIGHT, WIDTH)).save(pictures / "5.png")
    data = folder.load()
    assert data.image_ids == [1, 6]
    assert list(data.coco.imgs) == [1, 6] and list(data.coco.anns) == [1, 6]
    missing, unreadable, size = data.report
    assert missing == "left out 1 missing picture, e.g. 2.png"
    assert unreadable.startswith("left out 2 unreadable pictures, e.g. 3.png (")
    assert size == "left out 1 picture of another size than the json says, e.g. 5.png (12x20, json 20x12)"


def test_all_pictures_missing(folder):
    (folder.root / "images" / "1.png").unlink()
    with pytest.raises(
        UserError, match=r"images must have the 1 image of .*instances_train.json, got none of them, e.g. 1.png"
    ):
        folder.load()
    (folder.root / "images").rmdir()
    with pytest.raises(UserError, match="does not exist"):
        folder.load()


def test_a_picture_damaged_after_its_header(folder):
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    folder.image(2, Image.fromarray(noise), "noise.png")
    folder.annotate(image=2)
    file = folder.root / "images" / "noise.png"
    file.write_bytes(file.read_bytes()[:400])
    data = folder.load()
    data[0]
    with pytest.raises(UserError, match=r"noise.png: cannot be read"):
        data[1]


def test_a_picture_replaced_by_another(folder):
    data = folder.load()
    Image.new("RGB", (5, 5)).save(data.path(0))
    with pytest.raises(UserError, match=r"1\.png must have 20x12 pixels"):
        data[0]


# Invalid files


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "is not json"),
        ("{", "is not json"),
        ("[" * 100_000, "is not json"),
        ("[]", "must hold a JSON object, got a list"),
        ("{}", "needs a list 'images'"),
        ('{"images": [], "annotations": 3, "categories": []}', "needs a list 'annotations'"),
        ('{"images": [], "annotations": [', "is not json.*char 31"),
        ('{"images": []} 5', "is not json.*Extra data"),
        ('{"images": {}, "annotations": [], "categories": []}', "needs a list 'images'"),
        ('{"images": [], "annotations": []}', "needs a list 'categories'"),
        ('{"images": [], "annotations": [], "categories": []}', "has no categories"),
        ('{"images": [3], "annotations": [], "categories": []}', r"images\[0\] must be an object, got 3"),
    ],
)
def test_files_refused(tmp_path, text, problem):
    file = tmp_path / "instances.json"
    file.write_text(text)
    with pytest.raises(UserError, match=rf"instances\.json.*{problem}"):
        CocoDataset(file, tmp_path, masks=False, keep_empty=True)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: cannot be read"):
        CocoDataset(tmp_path / "none.json", tmp_path, masks=False, keep_empty=True)
    with pytest.raises(UserError, match="cannot be read"):
        CocoDataset(tmp_path, tmp_path, masks=False, keep_empty=True)
    (tmp_path / "binary.json").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match=r"binary\.json: is not json"):
        CocoDataset(tmp_path / "binary.json", tmp_path, masks=False, keep_empty=True)


@pytest.mark.parametrize(
    "section, field, value",
    [
        ("images", "id", "one"),
        ("images", "id", True),
        ("images", "id", 10**30),
        ("images", "file_name", None),
        ("images", "file_name", ""),
        ("images", "width", -1),
        ("images", "height", 12.5),
        ("annotations", "image_id", None),
        ("annotations", "category_id", [1]),
        ("categories", "id", 1.5),
        ("categories", "name", 3),
        ("categories", "name", float("nan")),
    ],
)
def test_wrong_types_are_refused(folder, section, field, value):
    folder.annotate()
    folder.json[section][0][field] = value
    with pytest.raises(UserError, match=rf"instances_train\.json .*{section}\[0\] needs .* as '{field}', got"):
        folder.load()


def test_numbers_are_read_leniently(folder):
    """Whole numbers as texts and floats change nothing, with one line for each kind."""
    folder.annotate()
    folder.annotate(bbox=[1, 1, 5, 5])
    expected = folder.load()
    folder.json["images"][0] |= {"id": "1", "width": 20.0, "height": "12"}
    folder.json["categories"][0]["id"] = 1.0
    for annotation in folder.json["annotations"]:
        annotation |= {"id": str(annotation["id"]), "image_id": 1.0, "category_id": "1"}
    data = folder.load()
    assert data.coco.dataset == expected.coco.dataset and data.categories == expected.categories
    assert data.image_ids == [1] and torch.equal(data[0][1]["boxes"], expected[0][1]["boxes"])
    assert set(data.report) == {
        "read 1 id of images as whole number, e.g. '1'",
        "read 1 width of images as whole number, e.g. 20.0",
        "read 1 height of images as whole number, e.g. '12'",
        "read 1 id of categories as whole number, e.g. 1.0",
        "read 2 id of annotations as whole numbers, e.g. '1'",
        "read 2 image_id of annotations as whole numbers, e.g. 1.0",
        "read 2 category_id of annotations as whole numbers, e.g. '1'",
    }


@pytest.mark.parametrize(
    "ids, line",
    [
        ([None, 5], "because of 1 without a usable id, e.g. annotations[0]"),
        (["a", {}], "because of 2 without a usable id, e.g. annotations[0]"),
        ([7, 7], "because of 1 repeated id, e.g. 7"),
        ([7, "7"], "because of 1 repeated id, e.g. 7"),
    ],
)
def test_annotations_without_usable_ids_are_numbered(folder, ids, line):
    for number in ids:
        folder.annotate()
        folder.json["annotations"][-1]["id"] = number
    data = folder.load()
    assert list(data.coco.anns) == [1, 2] and len(data[0][1]["boxes"]) == 2
    assert data.report[-1] == f"numbered the annotations 1, 2, ..., {line}"


def test_sizes_that_no_mask_can_have(folder):
    folder.json["images"][0]["width"] = 10**9
    with pytest.raises(UserError, match=rf"images\[0\] needs less than {2**31} pixels, got 1000000000x12"):
        folder.load()


@pytest.mark.parametrize("section", ["images", "categories"])
def test_repeated_ids_are_refused(folder, section):
    folder.annotate()
    folder.json[section] *= 2
    with pytest.raises(UserError, match=f"{section} has id 1 more than once"):
        folder.load()


# The data set


def test_nothing_is_printed(folder, capsys):
    folder.annotate()
    folder.load()
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_pickled_copy_gives_the_same_samples(tmp_path):
    folder = Folder(tmp_path, images=2)
    folder.annotate(image=2)
    data = folder.load()
    copy = pickle.loads(pickle.dumps(data))
    assert (copy.image_ids, copy.sizes, copy.categories) == (data.image_ids, data.sizes, data.categories)
    for (image, target), (other_image, other_target) in zip(data, copy):
        assert torch.equal(image, other_image)
        assert all(torch.equal(torch.as_tensor(target[key]), torch.as_tensor(other_target[key])) for key in target)
    assert data.coco.imgs and copy.coco.dataset == data.coco.dataset
    with pytest.raises(UserError, match="must be made with keep_empty=True"):
        assert folder.load(keep_empty=False).coco


def test_a_file_is_read_in_pieces(folder, monkeypatch):
    """The content does not depend on the places where the file is cut."""
    folder.json["info"] = {"numbers": [1234, -5.25e3]}
    folder.image(2, Image.new("RGB", (WIDTH, HEIGHT)), "ä.png")
    for comment in (["},{", {}, {}], "\ud800", None):  # not a place between annotations; no Unicode
        for _ in range(4):
            folder.annotate(comment=comment)
            folder.annotate(image=2, segmentation=compressed(SQUARE_MASK))
    expected = folder.load().coco.dataset
    for size in (1, 2, 7, 50, 300):
        monkeypatch.setattr("dcnops.detector.json_files.CHUNK", size)
        assert folder.load().coco.dataset == expected


@pytest.mark.parametrize("keep_empty", [True, False])
def test_annotations_that_are_read_together(tmp_path, monkeypatch, keep_empty):
    """One unusual annotation does not change how the others are read."""
    unusual: list[dict[str, Any]] = [{}, {"id": "9"}, {"image_id": True}, {"area": None}, {"area": float("nan")}]
    unusual += [{"iscrowd": value} for value in (1, True, 2)] + [{"area": value} for value in (-1, 1e31, 10**400)]
    unusual += [{"bbox": box} for box in (None, [1, 2, 3], "abcd", [1, 2, 3, "4"], [1, 2, 3, 1e31], [1, 2, 3, 10**400])]
    unusual += [{"segmentation": value} for value in (None, [["x"] * 6], [[1, 2, 3, float("nan"), 5, 6]], [SQUARE, 5])]
    unusual.append({"segmentation": compressed(SQUARE_MASK)})
    for number, fields in enumerate(unusual):
        root = tmp_path / str(number)
        root.mkdir()
        folder = Folder(root)
        for more in ({}, fields, {}):
            folder.annotate(**more)

        def read(folder: Folder = folder) -> object:
            try:
                data = folder.load(keep_empty=keep_empty)
            except UserError as error:
                return str(error)
            target = {name: value.tolist() for name, value in data[0][1].items() if name != "image_id"}
            return target, data.report, data.coco.dataset if keep_empty else None

        together = read()
        with monkeypatch.context() as patch:
            patch.setattr(CocoJson, "_read_usual", lambda *_: False)
            assert read() == together, fields


def test_several_files_as_one_data_set(tmp_path):
    """Equal ids of images stay apart, and categories agree by name."""
    parts = []
    for number, ids in enumerate(([4, 2], [2, 9])):
        root = tmp_path / str(number)
        root.mkdir()
        part = Folder(root, images=0)
        for image in ids:
            part.image(image, Image.new("RGB", (WIDTH, HEIGHT), (number, image, 0)))
            part.annotate(image=image, category=3, bbox=[image, 1, 5, 5], segmentation=[SQUARE])
            part.annotate(image=image, category=8, bbox=[image, 1, 5 + number, 5], segmentation=compressed(SQUARE_MASK))
        names = [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}]
        part.json["categories"] = names if number == 0 else [{"id": 3, "name": "dog"}, {"id": 8, "name": "cat"}]
        part.load()
        parts.append(part)
    files = [part.root / "annotations" / "instances_train.json" for part in parts]
    folders = [part.root / "images" for part in parts]
    data = CocoDataset(files, folders, masks=True, keep_empty=False)
    assert data.categories == [Category(3, "cat"), Category(8, "dog")]
    assert data.image_ids == [1, 2, 3, 4] and [data.path(index).name for index in range(4)] == [
        "2.png",
        "4.png",
        "2.png",
        "9.png",
    ]
    for index, (number, image) in enumerate([(0, 2), (0, 4), (1, 2), (1, 9)]):
        pixels, target = data[index]
        assert (pixels[:, 0, 0] * 255).round().tolist() == [number, image, 0]
        assert target["boxes"][:, 0].tolist() == [image, image] and target["masks"].sum((1, 2)).tolist() == [30, 30]
        assert target["labels"].tolist() == ([1, 2] if number == 0 else [2, 1])
    assert data.report == ["numbered the 4 images 1, 2, ..., as the files use the same ids, e.g. 2"]

    parts[1].json["images"][0]["id"] = 77
    parts[1].json["annotations"] = []
    parts[1].load()
    assert CocoDataset(files, folders, masks=True, keep_empty=True).image_ids == [2, 4, 9, 77]
    parts[1].json["categories"].append({"id": 9, "name": "fish"})
    parts[1].load()
    with pytest.raises(UserError, match=r"must have the same categories as .*: they differ in fish"):
        CocoDataset(files, folders, masks=True, keep_empty=True)


def test_boxes_alone_do_not_train_masks(folder):
    folder.annotate(segmentation=None)
    folder.annotate(segmentation=[])
    with pytest.raises(UserError, match=r"no annotation has a segmentation.* --detector faster or faster-fpn"):
        folder.load(keep_empty=False)
    assert folder.load(keep_empty=True).boxes_only and not folder.load(masks=False).boxes_only


def test_a_file_without_annotations(folder):
    del folder.json["annotations"]
    data = folder.load()
    assert len(data) == 1 and not data.annotated and not data.boxes_only and data.report == []


@pytest.mark.parametrize(
    "split, file, images",
    [
        ("val", "instances_val.json", "images"),
        ("val", "instances_val2017.json", "val2017"),
        ("test", "instances_test.json", "images"),
        ("test", "image_info_test-dev2017.json", "test2017"),
    ],
)
def test_find_data(tmp_path, split, file, images):
    wanted = rf"must have annotations/instances_{split}\.json with images/ or .*{split}2017"
    with pytest.raises(UserError, match=wanted):
        find_data(tmp_path, split)
    assert not has_split(tmp_path, split)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / file).touch()
    assert has_split(tmp_path, split)
    with pytest.raises(UserError, match="must be a folder with a data set, got a file"):
        find_data(tmp_path / "annotations" / file, split)
    with pytest.raises(UserError, match=wanted):
        find_data(tmp_path, split)
    (tmp_path / images).mkdir()
    assert find_data(tmp_path, split) == (tmp_path / "annotations" / file, tmp_path / images)
