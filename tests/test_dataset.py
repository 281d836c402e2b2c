"""Decoding, fitting and hashing of one image, and reading a prepared dataset."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rewriting
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from fer_ray.data import dataset, decoding
from fer_ray.data.labels import UNKNOWN_LABEL
from fer_ray.errors import UserError

IMAGES = hnp.arrays(np.uint8, st.tuples(st.integers(1, 70), st.integers(1, 70)))


def encode(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@settings(max_examples=40, deadline=None)
@given(pixels=IMAGES, kind=st.sampled_from(["PNG", "BMP", "TIFF", "PPM"]))
def test_lossless_grey_is_decoded_to_the_same_pixels(pixels, kind):
    assert np.array_equal(decoding.decode(encode(pixels, kind)), pixels)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=300))
def test_arbitrary_bytes_never_raise_anything_but_a_decode_error(content):
    for start in (b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"BM", b"GIF89a", b"II*\0"):
        with pytest.raises(decoding.DecodeError):
            decoding.decode(start + content)


@settings(max_examples=40, deadline=None)
@given(pixels=IMAGES, cut=st.floats(0, 0.9))
def test_a_cut_file_is_never_taken_for_an_image(pixels, cut):
    content = encode(pixels)
    end_of_header = content.index(b"IDAT") + 4
    keep = int(cut * (end_of_header + (len(content) - end_of_header) // 4))
    with pytest.raises(decoding.DecodeError):
        decoding.decode(content[:keep])


def test_16_bits_are_scaled_and_not_cut():
    wide = np.array([[0, 257, 32768, 65535]], np.uint16)
    for kind in ("PNG", "TIFF", "PPM"):
        assert decoding.decode(encode(wide, kind)).tolist() == [[0, 1, 128, 255]]


def test_colour_becomes_luma():
    red = np.zeros((2, 3, 3), np.uint8)
    red[..., 0] = 255
    assert np.all(decoding.decode(encode(red)) == 76)  # 0.299 * 255


def test_the_exif_rotation_is_applied():
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: show it turned a quarter clockwise
    assert np.array_equal(decoding.decode(encode(pixels, exif=exif)), np.rot90(pixels, -1))


@pytest.mark.parametrize("mode", ["1", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_common_mode_is_decoded(mode):
    kind = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    assert decoding.decode(encode(Image.new(mode, (5, 4)), kind)).shape == (4, 5)


def test_a_decompression_bomb_is_refused_by_its_header():
    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    for side in (8_000, 60_000):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
        content = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000)))
        with pytest.raises(decoding.DecodeError, match="pixels"):
            decoding.decode(content + chunk(b"IEND", b""))


def test_reasons_are_one_plain_line():
    jpeg = encode(np.full((48, 48), 90, np.uint8), "JPEG")
    for content, message in [
        (b"", "empty"),
        (b"hello", "not an image"),
        (jpeg[:-30], "cannot be decoded"),
        (encode(Image.new("F", (3, 3)), "TIFF"), "floating-point"),
        (encode(np.full((2, 2), 70_000, np.int32), "TIFF"), "32-bit integers of unknown range"),
    ]:
        with pytest.raises(decoding.DecodeError, match=message) as caught:
            decoding.decode(content)
        assert "\n" not in str(caught.value)


@settings(max_examples=80, deadline=None)
@given(pixels=IMAGES, size=st.integers(8, 64))
def test_fit_gives_the_square_within_the_range_of_the_pixels(pixels, size):
    fitted = decoding.fit(pixels, size)
    assert fitted.shape == (size, size)
    assert fitted.dtype == np.uint8
    height, width = pixels.shape
    if height == width == size:
        assert np.array_equal(fitted, pixels)
    if max(height, width) >= size:  # area averages stay within the range, cubic ones need not
        assert fitted.min() >= pixels.min()
        assert fitted.max() <= pixels.max()


@given(tone=st.integers(0, 255), height=st.integers(1, 70), width=st.integers(1, 70))
@settings(max_examples=40, deadline=None)
def test_fit_keeps_an_even_tone(tone, height, width):
    assert np.all(decoding.fit(np.full((height, width), tone, np.uint8), 32) == tone)


@given(height=st.integers(8, 70), width=st.integers(8, 70))
@settings(max_examples=40, deadline=None)
def test_fit_does_not_stretch_and_pads_with_the_edge(height, width):
    """A ramp along the shorter side: the padding repeats its first and last value."""
    ramp = np.linspace(0, 255, min(height, width)).astype(np.uint8)
    pixels = np.empty((height, width), np.uint8)
    pixels[:] = ramp[:, None] if height < width else ramp[None, :]
    fitted = decoding.fit(pixels, 48).astype(int)
    line = fitted[:, 24] if height < width else fitted[24]
    inner = round(48 * min(height, width) / max(height, width))
    before = (48 - inner) // 2
    assert np.all(line[: before + 1] == line[0])
    assert np.all(line[before + inner - 1 :] == line[-1])
    assert np.all(np.diff(line[before : before + inner]) >= 0)
    if inner >= 8:
        assert line[-1] - line[0] > 180


def test_a_shrunken_image_is_averaged():
    checks = np.indices((96, 96)).sum(0) % 2 * 255
    assert np.all(np.abs(decoding.fit(checks.astype(np.uint8), 48).astype(int) - 128) <= 1)


def test_the_pixel_hash_covers_shape_and_pixels():
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    expected = hashlib.sha256(b"3x4:" + bytes(range(12))).hexdigest()
    assert decoding.pixel_sha256(pixels) == expected
    assert decoding.pixel_sha256(np.asfortranarray(pixels)) == expected
    assert decoding.pixel_sha256(pixels.reshape(4, 3)) != expected
    assert decoding.pixel_sha256(pixels[:, ::-1]) != expected


def write_dataset(path: Path, labels: list[str | None], *, size: int = 8, parts: int = 2) -> None:
    """A prepared dataset written by hand, as the contract says."""
    rng = np.random.default_rng(0)
    files = []
    for part, rows in enumerate(np.array_split(np.arange(len(labels)), parts)):
        table = [
            {
                "image_id": f"train/{row:03}.png",
                "split": "train",
                "label": labels[row],
                "image": rng.integers(0, 256, size * size, np.uint8).tobytes(),
                "height": size,
                "width": size,
                "pixel_sha256": f"{row:064}",
            }
            for row in rows
        ]
        files.append(f"train/part-{part:05}.parquet")
        (path / "train").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(table, dataset.SCHEMA), path / files[-1])
    split = {
        "rows": len(labels),
        "files": files,
        "parts": {file: rewriting.part(path / file) for file in files},
        "classes": {"happy": 2, "sad": 1},
        "unlabelled": 1,
    }
    info = {"labels": ["happy", "sad"], "image_size": size, "splits": {"train": split}}
    info |= {"pixel_mean": 0.5, "pixel_std": 0.25, "data_sha256": "0" * 64}
    dataset.write_info(str(path), info)


LABELS = ["sad", None, "happy", "happy"]


def test_a_split_reads_back_as_it_was_written(tmp_path):
    write_dataset(tmp_path, LABELS, parts=3)
    info = dataset.read_info(str(tmp_path))
    split = dataset.load_split(info, "train")
    rng = np.random.default_rng(0)
    expected = np.stack([rng.integers(0, 256, 64, np.uint8).reshape(8, 8) for _ in LABELS])
    assert np.array_equal(split.images, expected)
    assert split.images.flags.writeable
    assert split.labels.tolist() == [1, UNKNOWN_LABEL, 0, 0]
    assert split.labels.dtype == np.int64
    assert split.image_ids == [f"train/{row:03}.png" for row in range(4)]
    assert split.pixel_sha256[2] == f"{2:064}"
    assert (info.labels, info.image_size, info.split("train").rows) == (("happy", "sad"), 8, 4)
    assert info.split("train").unlabelled == 1


def test_a_sliced_column_is_read_from_its_own_offset():
    column = pa.chunked_array([pa.array([bytes([row] * 4) for row in range(6)], pa.binary())])
    assert dataset.stack(column.slice(2, 3), 2)[:, 0, 0].tolist() == [2, 3, 4]


def test_a_relative_path_becomes_absolute(tmp_path, monkeypatch):
    write_dataset(tmp_path / "faces", LABELS)
    monkeypatch.chdir(tmp_path)
    info = dataset.read_info("faces")
    monkeypatch.chdir("/")
    assert len(dataset.load_split(info, "train").images) == 4


def test_a_folder_above_called_key_value_is_no_column(tmp_path):
    write_dataset(tmp_path / "label=none" / "faces", LABELS)
    split = dataset.load_split(dataset.read_info(f"{tmp_path}/label=none/faces"), "train")
    assert split.labels.tolist() == [1, UNKNOWN_LABEL, 0, 0]


def test_the_message_for_an_unknown_split_lists_all_splits(tmp_path):
    write_dataset(tmp_path, LABELS)
    with pytest.raises(UserError, match=r"'trian' is not one of train .did you mean 'train'"):
        dataset.load_split(dataset.read_info(str(tmp_path)), "trian")


def test_the_message_for_a_missing_dataset_says_how_to_create_one(tmp_path):
    with pytest.raises(UserError, match=r"jobs/prepare\.py"):
        dataset.read_info(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("{}", "damaged"),
        ("[]", "damaged"),
        ('{"format": 99}', "format 99, this version reads format 2: run jobs/prepare.py again"),
        ('{"format": 1}', "format 1, this version reads format 2: run jobs/prepare.py again"),
    ],
)
def test_a_damaged_description_is_a_user_error(content, message, tmp_path):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=message):
        dataset.read_info(str(tmp_path))
