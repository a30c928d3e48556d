"""Pictures of every kind become the RGB they show; broken ones are found from their header and last bytes."""

import functools
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from qvl.images import MAX_PIXELS, ImageError, decode_rgb, read_header


def encoded(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def noise(width: int = 64, height: int = 48) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def palette_with_transparency() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    return image


@functools.cache
def png_of_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "pixels"),
    [
        pytest.param(encoded(Image.new("RGB", (1, 1), (1, 2, 3))), [(1, 2, 3)], id="RGB"),
        pytest.param(encoded(Image.new("L", (1, 1), 77)), [(77, 77, 77)], id="L"),
        pytest.param(encoded(Image.new("1", (1, 1), 1)), [(255, 255, 255)], id="one bit"),
        pytest.param(encoded(palette_with_transparency()), [(10, 20, 30), (200, 100, 50)], id="palette"),
        pytest.param(
            encoded(palette_with_transparency(), transparency=0),
            [(255, 255, 255), (200, 100, 50)],
            id="palette with a transparent entry",
        ),
        pytest.param(
            encoded(palette_with_transparency(), transparency=b"\x80\xff"),
            [(132, 137, 142), (200, 100, 50)],
            id="palette with half transparency",
        ),
        pytest.param(encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 0))), [(255, 255, 255)], id="RGBA clear"),
        pytest.param(encoded(Image.new("RGBA", (1, 1), (255, 0, 0, 127))), [(255, 128, 128)], id="RGBA half"),
        pytest.param(encoded(Image.new("LA", (1, 1), (0, 51))), [(204, 204, 204)], id="LA"),
        pytest.param(
            encoded(Image.new("RGB", (1, 1), (9, 9, 9)), transparency=(9, 9, 9)), [(255, 255, 255)], id="RGB colour key"
        ),
        pytest.param(encoded(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF"), [(255, 0, 0)], id="CMYK"),
        pytest.param(
            encoded(Image.fromarray(np.array([[0, 200, 257, 32768, 65535]], dtype=np.uint16))),
            [(0, 0, 0), (1, 1, 1), (1, 1, 1), (128, 128, 128), (255, 255, 255)],
            id="16 bit grey PNG",
        ),
        pytest.param(
            encoded(Image.fromarray(np.array([[0, 30000, 65535]], dtype=np.uint16)), "TIFF"),
            [(0, 0, 0), (117, 117, 117), (255, 255, 255)],
            id="16 bit grey TIFF",
        ),
    ],
)
def test_pixels(data: bytes, pixels: list[tuple[int, int, int]]) -> None:
    image = decode_rgb(data)
    assert image.mode == "RGB"
    assert [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()] == pixels
    assert (read_header(io.BytesIO(data)).width, read_header(io.BytesIO(data)).height) == image.size


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_once(image_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = encoded(noise(), image_format, exif=exif, **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    image = decode_rgb(data)
    assert np.array_equal(np.asarray(image), np.asarray(expected))
    header = read_header(io.BytesIO(data))
    assert (header.width, header.height) == image.size == ((48, 64) if orientation > 4 else (64, 48))
    # transformers rotates what it is given, too.
    assert ImageOps.exif_transpose(image).size == image.size


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_header_pass_decodes_no_whole_file(image_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(noise(), image_format)
    calls = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: calls.append(self) or load(self))
    header = read_header(io.BytesIO(data))
    assert (header.width, header.height, header.num_bytes) == (64, 48, len(data))
    assert not calls
    decode_rgb(data)
    assert calls


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated(image_format: str, share: float) -> None:
    data = encoded(noise(), image_format)
    with pytest.raises(ImageError, match=r"truncated|corrupt|no image"):
        read_header(io.BytesIO(data[: int(len(data) * share)]))


def test_a_truncated_jpeg_with_a_whole_thumbnail_in_front_is_found() -> None:
    data = encoded(noise(), "JPEG")
    exif = Image.Exif()
    exif[0x010E] = "x" * 50 + "\xff\xd9"
    with pytest.raises(ImageError, match="truncated"):
        read_header(io.BytesIO(encoded(noise(), "JPEG", exif=exif)[: len(data) // 2 + 100]))


@pytest.mark.parametrize("trailer", [b"\0" * 200, b"phone's own trailer"])
def test_whole_jpeg_with_a_trailer_is_accepted(trailer: bytes) -> None:
    assert read_header(io.BytesIO(encoded(noise(), "JPEG") + trailer)).width == 64


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"", r"empty \(0 bytes\): copy or download it again", id="zero bytes"),
        pytest.param(b"hello", "no image that Pillow can read", id="text"),
        pytest.param(b"<!DOCTYPE html><html>", "it is a web page", id="web page"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull", id="LFS pointer"),
        pytest.param(b"<svg xmlns='x'></svg>", "convert it to PNG", id="SVG"),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n", "no image", id="EPS"),
        pytest.param(encoded(Image.new("F", (2, 2)), "TIFF"), "colour mode F.*save it as 8-bit RGB", id="floats"),
        pytest.param(png_of_size(20_000, 9_000), "178 megapixels.*magick", id="180 megapixels"),
        pytest.param(png_of_size(60_000, 60_000), "178 megapixels.*magick", id="3600 megapixels"),
    ],
)
def test_rejected(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        read_header(io.BytesIO(data))


def test_large_but_allowed_image_gives_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        header = read_header(io.BytesIO(png_of_size(12_000, 10_000)))
    assert 89_478_485 < header.width * header.height <= MAX_PIXELS


def test_corrupt_pixels_are_found_when_decoding() -> None:
    data = bytearray(encoded(noise(), "PNG"))
    middle = len(data) // 2
    data[middle : middle + 40] = bytes(40)
    with pytest.raises(ImageError, match="corrupt"):
        decode_rgb(bytes(data))


def test_32_bit_values_are_refused_not_clipped() -> None:
    data = encoded(Image.fromarray(np.array([[0, 70_000]], dtype=np.int32)), "TIFF")
    with pytest.raises(ImageError, match="from 0 to 70000, outside of 16 bits"):
        decode_rgb(data)
