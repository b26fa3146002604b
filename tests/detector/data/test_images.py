"""Image files of all kinds."""

from __future__ import annotations

import os
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from dcnops.detector.data import find_images, read_image
from dcnops.detector.data.images import open_image, orientation, read_header
from dcnops.detector.errors import UserError


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK"])
def test_modes(picture, mode):
    path = picture("a.jpg" if mode == "CMYK" else "a.png", mode=mode)
    image, size = read_image(path)
    with Image.open(path) as file:
        expected = np.asarray(file.convert("RGBA" if mode == "P" else "RGB").convert("RGB"))
    assert (image.shape, image.dtype, size) == ((3, 40, 60), torch.float32, (60, 40))
    assert np.array_equal(image.permute(1, 2, 0) * 255, expected)


def test_palette_with_transparency_without_warnings(tmp_path, recwarn):
    image = Image.new("P", (4, 4))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "a.png", transparency=b"\x00\x80")
    assert (read_image(tmp_path / "a.png")[0][:, 0, 0] * 255).round().tolist() == [10, 20, 30]
    assert not recwarn.list


def test_sixteen_bits_keep_their_precision(tmp_path):
    values = np.array([[0, 1, 300, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    image, _ = read_image(tmp_path / "a.png")
    assert torch.equal(image, torch.from_numpy(values.astype(np.float32) / 65535).expand(3, 1, 4))


def test_orientation_is_followed(picture):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # turned by a quarter
    plain = read_image(picture("a.png"))[0]
    for name in ("b.png", "b.tif"):  # Pillow turns TIFF files itself
        turned = read_image(picture(name, exif=exif))
        assert turned[1] == (40, 60)
        assert torch.equal(turned[0], plain.rot90(-1, (1, 2)))
    assert read_image(picture("c.jpg", exif=exif), 30)[0].shape == (3, 30, 20)


def test_headers_are_those_of_pillow(tmp_path):
    """Also of files that are cut or damaged anywhere: sizes that are read without Pillow, and files that it refuses."""

    def pillow() -> object:
        try:
            with open_image(path) as file:
                return file.size, orientation(file)
        except Exception:
            return None

    def ours() -> object:
        try:
            return read_header(str(path))
        except Exception:
            return None

    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    kinds = [
        {},
        {"progressive": True, "comment": b"text", "dpi": (72, 72)},
        {"exif": exif},
        {"icc_profile": b"0" * 5000},
    ]
    for options in kinds:
        for mode in ("RGB", "L", "CMYK"):
            Image.new(mode, (30, 20)).save(path, "jpeg", **options)
            assert ours() == pillow() == ((30, 20), 6 if "exif" in options else 1)
    Image.new("RGB", (30, 20)).save(path, "jpeg")
    whole = path.read_bytes()
    for end in range(0, len(whole), 7):
        path.write_bytes(whole[:end])
        assert ours() == pillow(), end
    for index in range(whole.index(b"\xff\xda") + 2):
        for value in (0, 0xFF, whole[index] ^ 1):
            path.write_bytes(whole[:index] + bytes([value]) + whole[index + 1 :])
            expected = pillow()
            assert ours() == expected or not expected, index


def test_ordinary_headers_are_read_without_pillow(picture, monkeypatch):
    ordinary, other = picture("a.jpg"), picture("b.png")
    monkeypatch.setattr(Image, "open", Mock(side_effect=ZeroDivisionError))
    assert read_header(str(ordinary)) == ((60, 40), 1)
    with pytest.raises(ZeroDivisionError):
        read_header(str(other))


def test_decompression_bombs_are_refused(picture, monkeypatch):
    path = picture("large.png", 100, 60)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    assert read_image(path)[1] == (100, 60)  # Pillow would warn
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(UserError, match=r"large\.png: has more than 0 million pixels"):
        read_image(path)


@pytest.mark.parametrize("format", ["EPS", "PPM", "ICO", "TGA"])
def test_other_formats_are_not_decoded(picture, format, monkeypatch):
    """Whatever the name says: Pillow would start Ghostscript for PostScript."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("Ghostscript was started"))
    with pytest.raises(UserError, match=r"is not an image in the format JPEG, PNG, BMP, TIFF, WEBP or GIF"):
        read_image(picture("a.jpg", format=format))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "MPO"])
def test_formats_are_recognised_by_their_content(picture, format):
    assert read_image(picture("a.dat", format=format))[1] == (60, 40)


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    for path in (tmp_path / "a.jpg", tmp_path):
        with pytest.raises(UserError, match="it is not a regular file"):
            read_image(path)


def test_finding_images(picture, tmp_path):
    b, a, jpeg = picture("b.png"), picture("a.PNG"), picture("sub/c.jpeg")
    odd = picture("d.tga")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    root = str(tmp_path)
    assert find_images([root]) == [a, b]
    assert find_images([f"{root}/b.png", root, str(odd)]) == [b, a, odd]
    assert find_images([f"{root}/**/*"]) == [a, b, jpeg]
    for pattern in ("empty", "nothing.png", "*.bmp", "*.txt"):
        with pytest.raises(UserError) as caught:
            find_images([f"{root}/{pattern}"])
        assert str(caught.value).startswith(f"{root}/{pattern}: there is no")
        assert (f"sub-folders, give '{root}/empty/**'" in str(caught.value)) == (pattern == "empty")
    assert find_images([f"{root}/sub/**"]) == [jpeg]


def test_floating_point_pictures(tmp_path):
    values = np.linspace(-0.5, 1.5, 240, dtype=np.float32).reshape(12, 20)
    Image.fromarray(values).save(tmp_path / "a.tif")
    torch.testing.assert_close(read_image(tmp_path / "a.tif")[0][2], torch.from_numpy(values.clip(0, 1)))
