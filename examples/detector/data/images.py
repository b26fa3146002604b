"""Image files."""

from __future__ import annotations

import glob
import os
import struct
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

from ..errors import UserError

# Formats that are decoded, whatever the name of a file says. Pillow would start other programs for some formats.
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF")
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")  # of the images in a folder
LARGEST_ASPECT = 32
TOLERANCE = 0.1  # of values in 0..1, which bicubic interpolation may exceed
JPEG_FRAMES = {0xC0, 0xC1, 0xC2}  # segments with the size
JPEG_SKIPPED = {0xC4, 0xDB, 0xDD, 0xE0, 0xEE, 0xFE}  # tables, JFIF, Adobe, and comments
JPEG_SCAN = 0xDA  # the pixels follow
LARGE = 2**26  # pixels; Pillow decides which larger images are refused


def find_images(patterns: Sequence[str]) -> list[Path]:
    """Find the image files that the command line names, without duplicates, in the order of `patterns`.

    A pattern is a file; a folder, for its images (see `SUFFIXES`) in alphabetical order, without sub-folders; or a glob
    pattern including ``**``, for the images among the matches.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(os.path.expanduser(pattern))
        if os.path.isfile(path):
            found[path] = None
            continue
        is_folder = os.path.isdir(path)
        candidates = path.iterdir() if is_folder else map(Path, glob.glob(str(path), recursive=True))
        images = sorted(item for item in candidates if item.suffix.lower() in SUFFIXES and os.path.isfile(item))
        if not images:
            if is_folder:
                raise UserError(
                    f"{pattern}: there is no image in this folder (looked for {', '.join(SUFFIXES)}); for images in "
                    f"its sub-folders, give '{path}/**'"
                )
            raise UserError(f"{pattern}: there is no such image, folder or glob with images")
        found.update(dict.fromkeys(images))
    return list(found)


def open_image(path: Path) -> Image.Image:
    """Open an image file in one of `FORMATS`.

    Raises
    ------
    OSError
        The file does not exist, is a folder, a pipe or a device (which could block), or has another format.
    """
    if not os.path.isfile(path) and os.path.exists(path):
        raise OSError("it is not a regular file")
    return Image.open(path, formats=FORMATS)


def read_header(path: str) -> tuple[tuple[int, int], int]:
    """Return the size of the stored pixels and the EXIF orientation of an image file; errors as in `open_image`."""
    size = _jpeg_size(path) if os.path.isfile(path) else None
    if size:
        return size, 1
    with open_image(Path(path)) as image:
        return image.size, orientation(image)


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an opened image, 1 to 8, from its header."""
    # Pillow would decode a PNG file to look behind its pixels, and turns TIFF files upright itself.
    if image.format == "TIFF" or (image.format == "PNG" and not {"exif", "Raw profile type exif"} & set(image.info)):
        return 1
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in range(1, 9) else 1


def read_image(path: Path, largest: int | None = None, *, upright: bool = True) -> tuple[Tensor, tuple[int, int]]:
    """Read an image file as float32 RGB.

    Parameters
    ----------
    path
        Grey, palette and CMYK images are converted to RGB; white is 65535 in 16-bit grey images and 1 in
        floating-point images. Transparency is dropped. The first frame of an animation is read.
    largest
        Shrink larger images to this side while reading, which saves memory.
    upright
        Rotate the image according to its EXIF orientation.

    Returns
    -------
    float32 [3, H, W], RGB in 0..1, and the (width, height) of the file.
    """
    try:
        with warnings.catch_warnings():
            # Between once and twice the limit Pillow only warns.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with open_image(path) as file:
                width, height = file.size
                if upright and orientation(file) >= 5:  # turned by a quarter
                    width, height = height, width
                return _pixels(file, largest, upright), (width, height)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: is not an image in the format {', '.join(FORMATS[:-1])} or {FORMATS[-1]}") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise UserError(f"{path}: has more than {limit} million pixels, the most that is opened") from None
    except Exception as error:  # decoders raise all kinds of errors on damaged files
        raise UserError(f"{path}: cannot be read as an image ({error})") from None


def as_image(image: object, what: str) -> Tensor:
    """Convert an image in memory to float32 RGB [3, H, W].

    Parameters
    ----------
    image
        A Pillow image (its EXIF orientation is ignored), a NumPy array [H, W, 3] or [H, W], or a tensor [3, H, W]
        or [1, H, W]. Arrays and tensors are uint8, or floating-point in 0..1.
    what
        Name of the image in error messages.
    """
    if isinstance(image, Image.Image):
        return _pixels(image, None, upright=False)
    if isinstance(image, np.ndarray) and image.ndim in (2, 3):
        values = torch.from_numpy(np.ascontiguousarray(image)).reshape(*image.shape[:2], -1).permute(2, 0, 1)
    elif isinstance(image, Tensor) and image.ndim == 3:
        values = image.as_subclass(Tensor)
    else:
        got = f"shape {list(image.shape)}" if isinstance(image, (np.ndarray, Tensor)) else f"a {type(image).__name__}"
        raise UserError(f"{what} must be a Pillow image, an array [H, W, 3] or a tensor [3, H, W], got {got}")
    if values.shape[0] not in (1, 3) or 0 in values.shape:
        raise UserError(f"{what} must have 1 or 3 channels and at least one pixel, got the shape {list(image.shape)}")
    if values.dtype == torch.uint8:
        values = values / 255
    elif not values.is_floating_point():
        raise UserError(f"{what} must be uint8 or floating-point, got {image.dtype}")
    elif not (values.min() >= -TOLERANCE and values.max() <= 1 + TOLERANCE):  # also of NaN
        raise UserError(
            f"{what} must have values from 0 to 1, as the network normalises them, got {values.min():.4g} to "
            f"{values.max():.4g}"
        )
    return values.float().expand(3, -1, -1).contiguous()


def to_picture(image: Tensor) -> Image.Image:
    """Convert float32 [3, H, W] in 0..1 to an 8-bit picture."""
    return Image.fromarray((image * 255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy())


def pad_elongated(image: Tensor) -> Tensor:
    """Repeat the last row or column of an image [3, H, W] until no side is longer than 32 times the other.

    Otherwise the network's resizing could shrink the shorter side to less than a pixel.
    """
    height, width = image.shape[1:]
    shortest = -(-max(height, width) // LARGEST_ASPECT)
    missing = (0, max(0, shortest - width), 0, max(0, shortest - height))
    return functional.pad(image[None], missing, "replicate")[0] if any(missing) else image


def _pixels(file: Image.Image, largest: int | None, upright: bool) -> Tensor:
    if largest is not None and file.mode in ("L", "RGB"):
        file.thumbnail((largest, largest), reducing_gap=2)  # first, as a JPEG is then decoded at reduced size
    image = ImageOps.exif_transpose(file) if upright else file
    white = {"I": 65535, "F": 1}.get(image.mode.partition(";")[0])
    if white is not None:
        grey = np.nan_to_num(np.asarray(image, np.float32)) / np.float32(white)
        image = Image.fromarray(grey.clip(0, 1))
    elif "transparency" in image.info:  # Pillow warns about a direct conversion
        image = image.convert("RGBA").convert("RGB")
    else:
        image = image.convert("RGB")
    if largest is not None:
        image.thumbnail((largest, largest), reducing_gap=2)
    pixels = torch.from_numpy(np.array(image))
    if image.mode == "F":
        return pixels.expand(3, -1, -1).contiguous()
    return pixels.permute(2, 0, 1).contiguous().float().div_(255)


def _jpeg_size(path: str) -> tuple[int, int] | None:
    """Return the size of an ordinary JPEG file without EXIF data; None for any other file.

    Pillow takes several times as long, which adds up in a data set of 100,000 images.
    """
    with open(path, "rb", buffering=0) as file:
        data = file.read(4096)
    if not data.startswith(b"\xff\xd8"):
        return None
    size, position = None, 2
    with suppress(struct.error):  # at the end of the data
        while True:
            start, kind, length = struct.unpack_from(">BBH", data, position)
            if start == 0xFF and kind == JPEG_SCAN:
                return size if position + 2 + length <= len(data) else None
            if start == 0xFF and kind in JPEG_FRAMES:
                bits, height, width, channels = struct.unpack_from(">BHHB", data, position + 4)
                if bits != 8 or channels not in (1, 3) or not 0 < width * height < LARGE:
                    return None
                size = width, height
            elif start != 0xFF or kind not in JPEG_SKIPPED:
                return None
            position += 2 + length
    return None
