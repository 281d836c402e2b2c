"""From an image file to grey pixels: decoding, fitting into a square, hashing."""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import struct

import cv2
import numpy as np
from PIL import Image, ImageOps

from fer_ray.errors import first_line

MAX_PIXELS = 50_000_000
"""Images that declare more pixels are refused as decompression bombs."""

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
"""The formats that are decoded. Some of Pillow's other formats run external programs."""

_BLOCK_PIXELS = 2**18
"""Pixels that are scaled to 8 bits in one step: the temporary arrays are several times larger."""

_RANGE_16_BITS = (0, 65535)
_BITS_PER_SAMPLE, _MIN_SAMPLE, _MAX_SAMPLE = 258, 340, 341
"""TIFF tags BitsPerSample, SMinSampleValue and SMaxSampleValue (TIFF 6.0, pages 29 and 81)."""

# Segments of a JPEG file (ITU-T T.81, table B.1).
_START_OF_FRAME, _SCAN, _END_OF_IMAGE = (0xC0, 0xC1), b"\xff\xda", b"\xff\xd9"
_PLAIN_SEGMENTS = (0xC4, 0xDB, 0xDD, 0xE0, 0xFE)  # DHT, DQT, DRI, APP0 (JFIF), COM
_SEGMENT = struct.Struct(">BBHBHHB")
"""0xFF, marker, length; in a frame header followed by bits, height, width and channels."""
_WITHIN_SCAN = frozenset({0, *range(0xD0, 0xD8)})
"""What may follow 0xFF within a scan: a stuffed byte, or the code of a restart marker."""

_GREY_UNROTATED = cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION


class DecodeError(Exception):
    """An image that cannot be used; the message is the reason in plain words."""


def decode(content: bytes) -> np.ndarray:
    """Decodes an image file to grey.

    Colours become luma (ITU-R 601-2), 16 bits are scaled to 8, the EXIF rotation is applied. Of
    an animation only the first frame is read. Transparency is ignored.

    Args:
        content: the bytes of a file in one of `FORMATS`.

    Returns:
        (H, W) uint8, 0 to 255, in the image's own size.

    Raises:
        DecodeError: when the image cannot be decoded, for whatever reason.
    """
    if not content:
        raise DecodeError("the file is empty")
    if _is_plain_jpeg(content):
        # libjpeg-turbo, as in Pillow, but without Pillow's overhead: a quarter of the time
        grey = cv2.imdecode(np.frombuffer(content, np.uint8), _GREY_UNROTATED)
        if grey is not None:
            return grey
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DecodeError(f"{width} x {height} pixels: more than {MAX_PIXELS:,}")
            return _to_grey(image)
    except DecodeError:
        raise
    except Image.UnidentifiedImageError as error:
        raise DecodeError(f"not an image of a known format ({', '.join(FORMATS)})") from error
    except Exception as error:  # on hostile input Pillow's decoders raise nearly any type
        raise DecodeError(f"cannot be decoded: {first_line(error)}") from error


def _is_plain_jpeg(content: bytes) -> bool:
    """Whether this is a complete grey JPEG with one scan, 8 bits and no EXIF data.

    For these files OpenCV and Pillow give the same pixels, since both call libjpeg-turbo. OpenCV
    alone would also accept truncated files and files with markers among the pixels (it reports
    them on standard error only), and `_GREY_UNROTATED` ignores the EXIF rotation.
    """
    if not content.startswith(b"\xff\xd8"):
        return False
    scan = content.find(_SCAN, 2)
    if scan < 0 or len(content) - scan < _SEGMENT.size or not _is_grey_header(content[:scan]):
        return False
    start = scan + 2 + int.from_bytes(content[scan + 2 : scan + 4])
    end = content.find(b"\xff", start)
    while 0 <= end < len(content) - 1 and content[end + 1] in _WITHIN_SCAN:
        end = content.find(b"\xff", end + 2)
    return end >= 0 and content[end:] == _END_OF_IMAGE


@functools.lru_cache(64)
def _is_grey_header(header: bytes) -> bool:
    """Whether these are all segments before the scan, as `_is_plain_jpeg` demands them.

    Files from one encoder often have the same header, so the last ones are remembered.
    """
    position, is_grey = 2, False
    header += bytes(_SEGMENT.size)  # so that the last segments can be unpacked
    while position < len(header) - _SEGMENT.size:
        start, marker, length, bits, height, width, channels = _SEGMENT.unpack_from(
            header, position
        )
        if start != 0xFF:
            return False
        if marker in _START_OF_FRAME:
            is_grey = bits == 8 and channels == 1 and 0 < height * width <= MAX_PIXELS
        elif marker not in _PLAIN_SEGMENTS or length < 2:
            return False
        position += 2 + length
    return is_grey and position == len(header) - _SEGMENT.size


def _to_grey(image: Image.Image) -> np.ndarray:
    if image.mode == "F":
        raise DecodeError("the pixels are floating-point numbers of unknown range")
    if image.mode == "I" or image.mode.startswith("I;16"):
        limits = _integer_range(image)  # before the rotation, whose result has no TIFF tags
        return _scale_to_8_bits(ImageOps.exif_transpose(image), *limits)
    return np.array(ImageOps.exif_transpose(image).convert("L"), np.uint8)


def _integer_range(image: Image.Image) -> tuple[int, int]:
    """Returns the values that are black and white in an image of 16 or 32 bits.

    Raises:
        DecodeError: for 32 bits when the file does not declare its range.
    """
    tags = getattr(image, "tag_v2", {})
    if image.mode != "I" or max(_tag_values(tags, _BITS_PER_SAMPLE), default=16) <= 16:
        return _RANGE_16_BITS  # Pillow scales PPM files of any range to 16 bits
    low = _tag_values(tags, _MIN_SAMPLE)
    high = _tag_values(tags, _MAX_SAMPLE)
    limits = (*low, *high)
    if len(limits) != 2 or limits[0] >= limits[1] or any(int(value) != value for value in limits):
        raise DecodeError(
            "the pixels are 32-bit integers of unknown range: save the image with 8 or 16 bits"
        )
    return int(limits[0]), int(limits[1])


def _tag_values(tags: object, number: int) -> tuple[float, ...]:
    values = tags.get(number, ())  # type: ignore[attr-defined]
    return values if isinstance(values, tuple) else (values,)


def _scale_to_8_bits(image: Image.Image, low: int, high: int) -> np.ndarray:
    """Maps `low`..`high` linearly to 0..255, rounded to the nearest, block by block."""
    width, height = image.size
    grey = np.empty((height, width), np.uint8)
    columns = min(width, _BLOCK_PIXELS)
    rows = _BLOCK_PIXELS // columns
    span = high - low
    for top, left in itertools.product(range(0, height, rows), range(0, width, columns)):
        bottom, right = min(top + rows, height), min(left + columns, width)
        block = np.asarray(image.crop((left, top, right, bottom)))
        if block.min() < low or block.max() > high:
            raise DecodeError(f"a pixel is outside the range {low} to {high}")
        scaled = ((block.astype(np.int64) - low) * 255 + span // 2) // span
        grey[top:bottom, left:right] = scaled
    return grey


def fit(grey: np.ndarray, size: int) -> np.ndarray:
    """Scales an image to fit into a square and pads it with its edge pixels, without stretching.

    Images are shrunk by area averaging and enlarged by cubic interpolation. An image that
    already has the right shape is returned unchanged.

    Args:
        grey: (H, W) uint8.
        size: height and width of the square, in pixels.

    Returns:
        (size, size) uint8.
    """
    height, width = grey.shape
    if (height, width) == (size, size):
        return grey
    scale = size / max(height, width)
    new_height = min(size, max(1, round(height * scale)))
    new_width = min(size, max(1, round(width * scale)))
    if (new_height, new_width) != (height, width):
        method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        grey = cv2.resize(grey, (new_width, new_height), interpolation=method)
    top, left = (size - new_height) // 2, (size - new_width) // 2
    margins = ((top, size - new_height - top), (left, size - new_width - left))
    return np.pad(grey, margins, mode="edge")


def pixel_sha256(grey: np.ndarray) -> str:
    """Returns the hash by which duplicates are recognized, in hexadecimal.

    It is the SHA-256 of the ASCII text ``<height>x<width>:`` followed by the pixels, row by row.
    The shape is included so that equal bytes in another shape differ.

    Args:
        grey: (H, W) uint8, as decoded, before resizing.
    """
    return pixel_digest(grey).hex()


def pixel_digest(grey: np.ndarray) -> bytes:
    """Returns `pixel_sha256` as 32 bytes."""
    height, width = grey.shape
    digest = hashlib.sha256(f"{height}x{width}:".encode())
    digest.update(np.ascontiguousarray(grey).data)
    return digest.digest()
