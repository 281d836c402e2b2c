"""The prepared dataset: its contract, how one picture becomes a row, and reading it back.

A prepared dataset is a folder with ``<split>/part-*.parquet``, ``quarantine.parquet``,
``duplicates.parquet`` and ``dataset.json``, which is written last: a folder without it is not a
prepared dataset.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from fer_ray import storage
from fer_ray.data.labels import UNKNOWN_LABEL
from fer_ray.errors import UserError, unknown

FORMAT = 1
"""The version of the folder's layout, in ``dataset.json``."""

INFO_NAME = "dataset.json"
QUARANTINE_NAME = "quarantine.parquet"
DUPLICATES_NAME = "duplicates.parquet"

MIN_IMAGE_SIZE = 8
MAX_IMAGE_SIZE = 1024

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

SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("pixel_sha256", pa.string(), nullable=False),
    ]
)
"""The columns of ``<split>/part-*.parquet``."""

QUARANTINE_SCHEMA = pa.schema(
    [pa.field("path", pa.string(), nullable=False), pa.field("reason", pa.string(), nullable=False)]
)
"""The columns of ``quarantine.parquet``."""

DUPLICATES_SCHEMA = pa.schema(
    [
        pa.field("pixel_sha256", pa.string()),
        pa.field("image_id", pa.string()),
        pa.field("split", pa.string()),
        pa.field("label", pa.string()),
        pa.field("conflicting_labels", pa.bool_()),
    ]
)
"""The columns of ``duplicates.parquet``: the images whose picture stands there more than once."""


class DecodeError(Exception):
    """A picture that cannot be used, with the reason in plain words."""


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """What ``dataset.json`` says about one split."""

    rows: int
    """Number of images."""
    files: tuple[str, ...]
    """The Parquet parts, relative to the dataset's folder, in the order of `image_id`."""
    classes: Mapping[str, int]
    """Number of images of each label, every label of the dataset named."""
    unlabelled: int = 0
    """Number of images whose label is not known."""


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """A prepared dataset, as its ``dataset.json`` describes it."""

    place: str
    """Absolute local path or URI of the folder."""
    labels: tuple[str, ...]
    """The class names, alphabetical: a label's index is its position here."""
    image_size: int
    """Height and width of every image, in pixels."""
    splits: Mapping[str, SplitInfo]
    """The splits that the dataset has."""
    pixel_mean: float
    """Mean of the train split's pixels, of 1.0."""
    pixel_std: float
    """Population standard deviation of the train split's pixels, of 1.0."""
    data_sha256: str
    """Hash of every row's id, split, label and pixels; the same however the parts are cut."""

    def split(self, name: str) -> SplitInfo:
        """One split by name.

        Raises:
            UserError: when the dataset has no such split.
        """
        if name not in self.splits:
            raise unknown(f"--split of {self.place}", name, self.splits)
        return self.splits[name]


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """One split in memory, ordered by `image_ids`."""

    images: np.ndarray
    """(N, H, W) uint8, grey, 0 to 255."""
    labels: np.ndarray
    """(N,) int64, index into the dataset's labels; `UNKNOWN_LABEL` where not known."""
    image_ids: list[str]
    """N unique names: the paths inside the source."""
    pixel_sha256: list[str]
    """N hashes of the pictures as decoded, before resizing: equal for the same picture."""


def read_info(place: str) -> DatasetInfo:
    """Reads ``dataset.json``.

    Raises:
        UserError: when the folder is not a prepared dataset, or one of another format.
    """
    place = storage.absolute(place)
    info_place = storage.join(place, INFO_NAME)
    if not storage.exists(info_place):
        raise UserError(
            f"{place} is not a prepared dataset (no {INFO_NAME}): make one with jobs/prepare.py"
        )
    try:
        value = storage.read_json(info_place)
        if value["format"] != FORMAT:
            raise UserError(
                f"{info_place}: format {value['format']}, this version reads {FORMAT}: "
                "run jobs/prepare.py again"
            )
        return _parse_info(place, value)
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise UserError(f"{info_place} is damaged ({error!r}): prepare it again") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{info_place} is not valid JSON ({error})") from error


def _parse_info(place: str, value: dict[str, Any]) -> DatasetInfo:
    splits = {
        name: SplitInfo(
            rows=split["rows"],
            files=tuple(split["files"]),
            classes=dict(split["classes"]),
            unlabelled=split["unlabelled"],
        )
        for name, split in value["splits"].items()
    }
    return DatasetInfo(
        place=place,
        labels=tuple(value["labels"]),
        image_size=value["image_size"],
        splits=splits,
        pixel_mean=value["pixel_mean"],
        pixel_std=value["pixel_std"],
        data_sha256=value["data_sha256"],
    )


def load_split(info: DatasetInfo, name: str) -> Split:
    """Reads one split into memory: `rows * image_size**2` bytes and the names.

    Raises:
        UserError: when there is no such split, or its files do not hold what ``dataset.json``
            promises.
    """
    split = info.split(name)
    fs, root = storage.filesystem(info.place)
    columns = ["image_id", "label", "image", "pixel_sha256"]
    paths = [storage.join(root, file) for file in split.files]
    try:
        # partitioning=None: a folder called key=value above the dataset is no column of it
        table = pq.read_table(paths, columns=columns, filesystem=fs, partitioning=None)
    except (OSError, pa.ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{info.place}: split {name!r} cannot be read: {reason}") from error
    if table.num_rows != split.rows:
        raise UserError(
            f"{info.place}: split {name!r} has {table.num_rows} rows, {INFO_NAME} says "
            f"{split.rows}: run jobs/prepare.py again"
        )
    return Split(
        images=stack(table["image"], info.image_size),
        labels=label_indices(table["label"], info.labels),
        image_ids=table["image_id"].to_pylist(),
        pixel_sha256=table["pixel_sha256"].to_pylist(),
    )


def stack(column: pa.ChunkedArray, size: int) -> np.ndarray:
    """The images of a binary column as one writable array, copied once, buffer by buffer."""
    images = np.empty((len(column), size, size), np.uint8)
    row = 0
    for chunk in column.chunks:
        if len(chunk) == 0:
            continue
        lengths = pc.binary_length(chunk)
        if pc.min(lengths).as_py() != size * size or pc.max(lengths).as_py() != size * size:
            raise UserError(f"an image is not {size} x {size} bytes: run jobs/prepare.py again")
        _, offsets, values = chunk.buffers()
        start = np.frombuffer(offsets, np.int32)[chunk.offset]
        flat = np.frombuffer(values, np.uint8, count=len(chunk) * size * size, offset=start)
        images[row : row + len(chunk)] = flat.reshape(len(chunk), size, size)
        row += len(chunk)
    return images


def label_indices(column: pa.ChunkedArray, labels: tuple[str, ...]) -> np.ndarray:
    indices = pc.index_in(column, value_set=pa.array(labels, pa.string()))
    if indices.null_count != column.null_count:
        raise UserError(f"a label is not one of {', '.join(labels)}: run jobs/prepare.py again")
    return pc.fill_null(indices, UNKNOWN_LABEL).to_numpy().astype(np.int64)


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
