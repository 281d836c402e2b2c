"""One image file to grey pixels: decoding, fitting into a square, hashing."""

from __future__ import annotations

import hashlib
import io
import itertools
import re
import struct

import cv2
import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 50_000_000
"""The most pixels that a picture may declare: above, it is taken for a decompression bomb."""


_PIXELS_AT_ONCE = 2**18
"""Pixels of 16 bits that are scaled at once: meanwhile each takes several times its bytes."""


FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
"""What is decoded. A short list, because some of Pillow's other formats run programs."""


_SOF, _SOS = (0xC0, 0xC1), 0xDA


_TABLES = (0xC4, 0xDB, 0xDD, 0xE0, 0xFE)  # DHT, DQT, DRI, APP0 (JFIF), COM


_FRAME = struct.Struct(">BBHBHHB")
"""A segment's mark, kind and length; and in a SOF bits, height, width and channels."""


_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]")  # neither a stuffed byte nor a restart


_AS_IT_IS = cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION


class DecodeError(Exception):
    """A picture that cannot be used, with the reason in plain words."""


def decode(content: bytes) -> np.ndarray:
    """Decodes a picture file to grey.

    Colour becomes luma (ITU-R 601-2), 16 bits are scaled to 8, the EXIF rotation is applied,
    of an animation the first frame is taken, transparency is ignored.

    Args:
        content: the file's bytes, in one of `FORMATS`.

    Returns:
        (H, W) uint8, 0 to 255, of the picture's own size.

    Raises:
        DecodeError: for whatever cannot be decoded, with the reason.
    """
    if not content:
        raise DecodeError("the file is empty")
    if _is_plain_jpeg(content):
        # the same library as Pillow's, without what Pillow does around it: a quarter of the time
        found = cv2.imdecode(np.frombuffer(content, np.uint8), _AS_IT_IS)
        if found is not None:
            return found
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise DecodeError(f"{width} x {height} pixels: more than {MAX_PIXELS:,}")
            return _grey(ImageOps.exif_transpose(picture))
    except DecodeError:
        raise
    except Image.UnidentifiedImageError as error:
        raise DecodeError(f"not an image of a known format ({', '.join(FORMATS)})") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on hostile input
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DecodeError(f"cannot be decoded: {reason}") from error


def _is_plain_jpeg(content: bytes) -> bool:
    """Whether this is a complete JPEG of one scan, 8 bits and grey, that says nothing else.

    Both libraries then give the same pixels: both call libjpeg-turbo. OpenCV would also take a
    file that is cut, or damaged so that a marker stands among the pixels, and say so on standard
    error only; and it would not turn what EXIF says is rotated.
    """
    if not content.startswith(b"\xff\xd8"):
        return False
    position, grey = 2, False
    while position + _FRAME.size <= len(content):
        start, marker, length, bits, height, width, channels = _FRAME.unpack_from(content, position)
        if start != 0xFF:
            return False
        if marker == _SOS:
            end = _MARKER.search(content, position + 2 + length)
            return grey and end is not None and content[end.start() :] == b"\xff\xd9"
        if marker in _SOF:
            grey = bits == 8 and channels == 1 and 0 < height * width <= MAX_PIXELS
        elif marker not in _TABLES or length < 2:
            return False
        position += 2 + length
    return False


def _grey(picture: Image.Image) -> np.ndarray:
    if picture.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):
        return _scaled(picture)
    if picture.mode == "F":
        raise DecodeError("the pixels are floating-point numbers of unknown range")
    return np.array(picture.convert("L"), np.uint8)


def _scaled(picture: Image.Image) -> np.ndarray:
    """16 bits as 8, rounded to the nearest, block by block."""
    width, height = picture.size
    grey = np.empty((height, width), np.uint8)
    columns = min(width, _PIXELS_AT_ONCE)
    rows = _PIXELS_AT_ONCE // columns
    for top, left in itertools.product(range(0, height, rows), range(0, width, columns)):
        bottom, right = min(top + rows, height), min(left + columns, width)
        block = np.asarray(picture.crop((left, top, right, bottom)))
        if block.min() < 0 or block.max() > 65535:
            raise DecodeError("the pixels have more than 16 bits")
        # 65,535 x 255 is within 32 bits
        grey[top:bottom, left:right] = (block.astype(np.uint32) * 255 + 32767) // 65535
    return grey


def fit(grey: np.ndarray, size: int) -> np.ndarray:
    """Scales a picture to fit a square and pads it with its own edge; never stretches it.

    Shrinks by area averaging, enlarges by cubic interpolation; what has the right shape stays
    byte for byte.

    Args:
        grey: (H, W) uint8.
        size: the square's side in pixels.

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
    """The hash that finds the same picture under two names.

    SHA-256, in hexadecimal, of the ASCII text ``<height>x<width>:`` followed by the grey pixels
    row by row; the shape is part of it, so that equal bytes in other shapes differ.

    Args:
        grey: (H, W) uint8, as decoded, before resizing.
    """
    return pixel_digest(grey).hex()


def pixel_digest(grey: np.ndarray) -> bytes:
    """`pixel_sha256` as 32 bytes."""
    height, width = grey.shape
    return hashlib.sha256(f"{height}x{width}:".encode() + grey.tobytes()).digest()
