"""Import of VOC and YOLO data sets: what the tools write in practice, wrong files, and the COCO files that result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from dcnops.detector.__main__ import main
from dcnops.detector.data import CocoDataset, find_data, import_annotations, read_voc, read_yolo
from dcnops.detector.errors import UserError


def image(path: Path, width: int = 40, height: int = 20, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height)).save(path, **options)


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def voc(path: Path, *objects: str, size: str = "<width>40</width><height>20</height>", name: str = "x.jpg") -> None:
    items = "".join(f"<object>{item}</object>" for item in objects)
    text(path, f"<annotation><filename>{name}</filename><size>{size}</size>{items}</annotation>")


def voc_object(name: str, *box: float, more: str = "") -> str:
    sides = "".join(f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box))
    return f"<name>{name}</name>{more}<bndbox>{sides}</bndbox>"


def content(out: Path, split: str) -> tuple[list[tuple[str, int, int]], list[tuple[str, str, list[float], int]]]:
    """Return the images and the objects (image, category, box, crowd) of a split."""
    data = json.loads((out / "annotations" / f"instances_{split}.json").read_text())
    files = {item["id"]: item["file_name"] for item in data["images"]}
    names = {item["id"]: item["name"] for item in data["categories"]}
    return [(item["file_name"], item["width"], item["height"]) for item in data["images"]], [
        (files[item["image_id"]], names[item["category_id"]], item["bbox"], item["iscrowd"])
        for item in data["annotations"]
    ]


def test_voc_with_lists(tmp_path, capsys):
    source, out = tmp_path / "VOC2012", tmp_path / "out"
    cat = voc_object("cat", 1, 1, 40, 20)
    voc(source / "Annotations" / "a.xml", cat, voc_object("dog", 30.5, 15, 11, 5, more="<difficult>1</difficult>"))
    voc(source / "Annotations" / "b.xml", cat, voc_object("", 1, 1, 2, 2), "<name>dog</name>", size="")
    voc(source / "Annotations" / "c.xml", name="C:\\photos\\other.png")
    voc(source / "Annotations" / "d.xml", cat)
    voc(source / "Annotations" / "unlisted.xml", cat)
    (source / "SegmentationObject").mkdir()
    image(source / "JPEGImages" / "a.jpg")
    image(source / "JPEGImages" / "b.JPG", exif=_quarter_turn())
    image(source / "JPEGImages" / "other.png")
    text(source / "ImageSets" / "Main" / "train.txt", "a 1\nb -1\n\n")
    text(source / "ImageSets" / "Main" / "val.txt", "c\nd\n")
    assert main(["import", "voc", str(source), str(out)]) == 0
    printed = capsys.readouterr()
    assert f"images: train 2, val 1 in {out}" in printed.out
    assert [line.partition(" with")[0] for line in printed.err.splitlines()] == [
        *("left out 1 folder", "left out 2 objects", "left out 1 XML file"),
        "left out 1 image that no list in ImageSets/Main has, e.g. unlisted",
    ]
    images, objects = content(out, "train")
    assert images == [("train/a.jpg", 40, 20), ("train/b.JPG", 20, 40)]  # as seen, where the XML has no size
    assert objects == [
        *(("train/a.jpg", "cat", [0, 0, 40, 20], 0), ("train/a.jpg", "dog", [10, 4, 20.5, 11], 1)),
        ("train/b.JPG", "cat", [0, 0, 40, 20], 0),
    ]
    assert content(out, "val") == ([("val/other.png", 40, 20)], [])
    assert len(CocoDataset(*find_data(out, "val"), masks=False, keep_empty=True)) == 1
    assert main(["import", "voc", str(source), str(out)]) == 2
    assert "exists already: give another folder" in capsys.readouterr().err


def test_voc_next_to_the_images(tmp_path):
    """As Roboflow writes it, or LabelImg without splits."""
    for folder, number in (("train", 1), ("valid", 2), ("test", 3)):
        voc(tmp_path / "a" / folder / f"{number}.xml", voc_object("cat", 1, 1, 9, 9))
        image(tmp_path / "a" / folder / f"{number}.jpg")
    counts, notes = import_annotations(read_voc, tmp_path / "a", tmp_path / "one", val_share=0.5)
    assert (counts, notes) == ({"train": 1, "val": 1, "test": 1}, [])
    for number in range(10):
        voc(tmp_path / "b" / f"{number}.xml", voc_object("cat", 1, 1, 9, 9))
        image(tmp_path / "b" / f"{number}.png")
    counts, _ = import_annotations(read_voc, tmp_path / "b", tmp_path / "two", val_share=0.2)
    assert counts == {"train": 8, "val": 2}
    import_annotations(read_voc, tmp_path / "b", tmp_path / "three", val_share=0.2)
    assert content(tmp_path / "two", "val") == content(tmp_path / "three", "val")
    assert import_annotations(read_voc, tmp_path / "b", tmp_path / "four", val_share=0)[0] == {"train": 10}
    counts, _ = import_annotations(read_voc, tmp_path / "b", tmp_path / "five", val_share=0.01)
    assert counts == {"train": 9, "val": 1}  # at least one


def test_yolo_of_ultralytics(tmp_path):
    """Boxes, polygons, upright photographs, images without objects, equal names, and lists of images."""
    source, out = tmp_path / "yolo", tmp_path / "out"
    text(source / "data.yaml", "path: .\ntrain: [images/train, more/images]\nval: val.txt\nnames: {0: cat, 1: dog}\n")
    image(source / "images" / "train" / "a.jpg", exif=_quarter_turn())
    image(source / "images" / "train" / "empty.jpg")
    image(source / "more" / "images" / "A.jpg")
    image(source / "images" / "b.png")
    text(source / "val.txt", "./images/b.png\n")
    text(source / "labels" / "train" / "a.txt", "1 0.5 0.5 0.5 0.25\n\n0.0 0.1 0.1 0.9 0.1 0.9 1.01\n")
    text(source / "more" / "labels" / "A.txt", "0 0.5 0.5 1 1 0.87\n0 0.5 0.5 0 0.5\n")
    counts, notes = import_annotations(read_yolo, source, out, val_share=0)
    assert counts == {"train": 3, "val": 1}
    assert len(notes) == 1 and notes[0].startswith("left out 1 object without width or height, e.g.")
    images, objects = content(out, "train")
    assert images == [("train/a.jpg", 20, 40), ("train/empty.jpg", 40, 20), ("train/A-2.jpg", 40, 20)]
    assert objects[0] == ("train/a.jpg", "dog", [5, 15, 10, 10], 0)
    assert objects[1][2] == pytest.approx([2, 4, 16, 36]) and objects[2] == ("train/A-2.jpg", "cat", [0, 0, 40, 20], 0)
    polygon = json.loads((out / "annotations" / "instances_train.json").read_text())["annotations"][1]
    assert polygon["segmentation"] == [pytest.approx([2, 4, 18, 4, 18, 40])]
    assert polygon["area"] == pytest.approx(16 * 36 / 2)
    data = CocoDataset(*find_data(out, "train"), masks=True, keep_empty=True)
    assert data.categories == [(1, "cat"), (2, "dog")]


@pytest.mark.parametrize("layout", ["roboflow", "labelimg", "splits"])
def test_yolo_of_other_tools(tmp_path, layout):
    source = tmp_path / "yolo"
    if layout == "roboflow":
        text(source / "data.yaml", "train: ../train/images\nval: ../valid/images\nnc: 1\nnames: ['cat']\n")
        files = [("train/images/a.jpg", "train/labels/a.txt"), ("valid/images/a.jpg", "valid/labels/a.txt")]
    elif layout == "labelimg":
        text(source / "classes.txt", "cat\n")
        files = [("a.jpg", "a.txt"), ("b.jpg", "b.txt")]
    else:
        text(source / "classes.txt", "cat\n")
        files = [("images/train/a.jpg", "labels/train/a.txt"), ("images/val/a.jpg", "labels/a.txt")]
    for picture, labels in files:
        image(source / picture)
        text(source / labels, "0 0.5 0.5 0.5 0.5\n")
    counts, notes = import_annotations(read_yolo, source, tmp_path / "out", val_share=0.5)
    assert (counts, notes) == ({"train": 1, "val": 1}, [])
    for split in counts:
        assert [item[1:] for item in content(tmp_path / "out", split)[1]] == [("cat", [10, 5, 20, 10], 0)]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "must have data.yaml with names, classes.txt"),
        ({"data.yaml": "names: [a, a]"}, "must be a list of different names, got ['a', 'a']"),
        ({"data.yaml": "names: {1: a}"}, "must have the numbers 0 to 0, got {1: 'a'}"),
        ({"data.yaml": "names: [a"}, "data.yaml: cannot be read as YAML"),
        ({"data.yaml": "names: [a]\ntrain: other"}, "other: there is no such folder or list of images"),
        ({"classes.txt": "a"}, "no labelled image was found (it has no labels)"),
        ({"classes.txt": "a", "a.txt": "1 0 0 1 1"}, "a.txt, line 1: the class must be 0 to 0, got 1"),
        ({"classes.txt": "a", "a.txt": "\n0 20 10 30 10"}, "a.txt, line 2: coordinates must be relative to the image"),
        ({"classes.txt": "a", "a.txt": "0 0.5 0.5 nan 1"}, "a.txt, line 1: coordinates must be relative to the image"),
        ({"classes.txt": "a", "a.txt": "0 0.5 0.5 1"}, "must be a class and 4 numbers of a box or the points of a"),
        ({"classes.txt": "a", "a.txt": "cat 0 0 1 1"}, "must be a class and 4 numbers of a box or the points of a"),
    ],
)
def test_wrong_yolo(tmp_path, files, message):
    image(tmp_path / "in" / "a.jpg")
    for name, lines in files.items():
        text(tmp_path / "in" / name, lines)
    with pytest.raises(UserError) as caught:
        import_annotations(read_yolo, tmp_path / "in", tmp_path / "out", val_share=0.1)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_wrong_voc(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        import_annotations(read_voc, tmp_path / "none", tmp_path / "out", val_share=0.1)
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="must have XML files in Annotations/"):
        read_voc(tmp_path / "in")
    text(tmp_path / "in" / "a.xml", "<annotation>")
    with pytest.raises(UserError, match=r"a\.xml: cannot be read as XML"):
        read_voc(tmp_path / "in")
    voc(tmp_path / "in" / "a.xml", voc_object("cat", 1, 1, 2, 2))
    with pytest.raises(UserError, match=r"no labelled image was found \(left out 1 XML file without an image"):
        import_annotations(read_voc, tmp_path / "in", tmp_path / "out", val_share=0.1)


def _quarter_turn() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif
