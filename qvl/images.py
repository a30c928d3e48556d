"""Image bytes -> RGB pictures: a cheap look at the header first, the pixels only when they are needed."""

import functools
import io
import struct
import threading
import warnings
from dataclasses import dataclass
from typing import BinaryIO, cast

from PIL import Image

from qvl.errors import UserError, first_line

MAX_PIXELS = 178_956_970
"""Pillow's own limit against decompression bombs (twice its `MAX_IMAGE_PIXELS`)."""

_TOO_LARGE = (
    f"has more than {MAX_PIXELS:,} pixels (178 megapixels), which may be an attack: scale it down, for example"
    " `magick in.png -resize 4000x4000 out.png`"
)
_TAIL_BYTES = 2048
# Only formats that Pillow decodes by itself: EPS, for one, would start Ghostscript on the file.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
_ORIENTATION = 0x0112
_TURNED_A_QUARTER = (5, 6, 7, 8)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_16_BIT_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_MODES_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa")
_CONVERTIBLE_MODES = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", *_16_BIT_MODES, *_MODES_WITH_ALPHA)
# `warnings.catch_warnings` swaps process-wide state, so only one of our threads may be inside it.
_warnings_lock = threading.Lock()


class ImageError(UserError):
    """An image that cannot be used; the message says why and what to do, the caller adds which row."""


@dataclass(frozen=True)
class ImageHeader:
    """What is known about an image without decoding it.

    Attributes:
        width: pixels, after EXIF rotation.
        height: pixels, after EXIF rotation.
        num_bytes: size of the encoded image.
    """

    width: int
    height: int
    num_bytes: int


def read_header(file: BinaryIO) -> ImageHeader:
    """Checks an encoded image by its header and its last bytes; decodes it only when those leave a doubt.

    Args:
        file: the encoded image, seekable; a few kilobytes of it are read.

    Raises:
        ImageError: empty, no image, too many pixels, truncated, or of a colour mode that has no 8-bit RGB meaning.
    """
    num_bytes = file.seek(0, io.SEEK_END)
    if num_bytes == 0:
        raise ImageError("is empty (0 bytes): copy or download it again")
    image = _open(file)
    if image.mode not in _CONVERTIBLE_MODES:
        raise ImageError(f"has colour mode {image.mode}, which has no fixed 8-bit RGB meaning: save it as 8-bit RGB")
    orientation = _orientation(image)
    width, height = image.size
    if not _ends_as_it_should(file, num_bytes, image.format):
        file.seek(0)
        _load(_open(file))
    if orientation in _TURNED_A_QUARTER:
        width, height = height, width
    return ImageHeader(width, height, num_bytes)


def decode_rgb(data: bytes) -> Image.Image:
    """Decodes an image to 8-bit RGB, EXIF rotation applied.

    Transparency is laid over white; 16-bit grey is scaled (65535 becomes 255), not clipped; of an animation the first
    frame is taken.

    Raises:
        ImageError: the bytes are no image, are corrupt, or cannot be brought to 8-bit RGB.
    """
    image = _open(io.BytesIO(data))
    orientation = _orientation(image)
    _load(image)
    rgb = _to_rgb(image)
    if orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[orientation])
    # Whoever gets the picture next, transformers' `load_image` among them, must not rotate it once more.
    rgb.info = {}
    return rgb


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)  # older Pillows come without AVIF


def _open(file: BinaryIO) -> Image.Image:
    file.seek(0)
    try:
        with _warnings_lock, warnings.catch_warnings():
            # Between half of the limit and the limit Pillow warns about an image that we accept.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file, formats=_formats())
    except Image.DecompressionBombError as error:
        raise ImageError(_TOO_LARGE) from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"is no image that Pillow can read ({_looks_like(file)}): replace it") from error
    except Exception as error:  # Pillow's plugins raise SyntaxError, struct.error, TypeError... on bad headers
        raise ImageError(f"has a corrupt header ({first_line(error)}): replace it") from error
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(_TOO_LARGE)
    return image


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except Exception as error:  # as in _open: any kind, depending on the format
        raise ImageError(f"is truncated or corrupt ({first_line(error)}): copy or download it again") from error


def _looks_like(file: BinaryIO) -> str:
    file.seek(0)
    first = file.read(256)
    start = first.lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "it is a web page"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer: run `git lfs pull`"
    if start.startswith(b"<svg") or b"<svg" in start:
        return "it is an SVG drawing: convert it to PNG"
    return f"it begins with {first[:8]!r}"


def _ends_as_it_should(file: BinaryIO, num_bytes: int, image_format: str | None) -> bool:
    """True if the last bytes show that the file is whole; False means unknown, not broken."""
    if image_format == "WEBP":
        file.seek(4)
        return int.from_bytes(file.read(4), "little") + 8 <= num_bytes
    file.seek(max(0, num_bytes - _TAIL_BYTES))
    tail = file.read(_TAIL_BYTES)
    if image_format in ("JPEG", "MPO"):
        return tail.rstrip(b"\0").endswith(b"\xff\xd9")
    if image_format == "PNG":
        return tail[-8:-4] == b"IEND"
    return image_format == "GIF" and tail.endswith(b";")


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # its plugin rotates by itself
        return 1
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys():
        return 1  # `getexif` would decode the whole file to look for a late chunk
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return 1  # a broken EXIF block says nothing about the picture; viewers show it unrotated


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _16_BIT_MODES:
        return _sixteen_bit_to_rgb(image)
    if image.mode in _MODES_WITH_ALPHA or "transparency" in image.info:
        overlay = image.convert("RGBA")
        white = Image.new("RGBA", overlay.size, "white")
        return Image.alpha_composite(white, overlay).convert("RGB")
    return image.convert("RGB")


def _sixteen_bit_to_rgb(image: Image.Image) -> Image.Image:
    wide = image.convert("I")
    low, high = (int(value) for value in cast(tuple[float, float], wide.getextrema()))
    if not 0 <= low <= high <= 65535:
        raise ImageError(f"has pixel values from {low} to {high}, outside of 16 bits: save it as 8-bit RGB")
    return wide.point(lambda value: value * (1 / 257) + 0.5).convert("L").convert("RGB")
