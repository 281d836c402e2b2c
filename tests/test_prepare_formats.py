"""Image files of every format, from file to row, through the whole of prepare."""

from __future__ import annotations

import io
import random
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from faces import image_file, prepare, split_of
from PIL import Image, ImageOps

from fer_ray.data import decoding

RAMP = np.add.outer(np.arange(0, 144, 3), np.arange(0, 96, 2)).astype(np.uint8)
"""48 x 48; no two rows or columns are equal, so that a rotation or flip changes it."""


def saved(image: Image.Image, file_format: str, **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **settings)
    return buffer.getvalue()


def colour(grey: np.ndarray) -> Image.Image:
    return Image.fromarray(np.stack([grey] * 3, axis=2))


def rotated(grey: np.ndarray) -> bytes:
    """Stored rotated, with EXIF orientation 6 (show it turned a quarter clockwise)."""
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = Image.fromarray(np.rot90(grey, 1))
    return saved(lying, "PNG", exif=exif)


def translucent(grey: np.ndarray) -> Image.Image:
    image = colour(grey).convert("RGBA")
    image.putalpha(Image.fromarray(255 - grey))
    return image


def animated(first: np.ndarray) -> bytes:
    frames = [Image.fromarray(frame) for frame in (first, np.full_like(first, 255))]
    return saved(frames[0], "PNG", save_all=True, append_images=frames[1:])


def palette(grey: np.ndarray) -> Image.Image:
    image = Image.fromarray(255 - grey, mode="L").convert("P")
    image.putpalette([255 - tone for tone in range(256) for _ in range(3)])
    return image


EXACT = {
    "grey.png": saved(Image.fromarray(RAMP), "PNG"),
    "GREY.PNG": saved(Image.fromarray(RAMP), "PNG"),
    "grey.bmp": saved(Image.fromarray(RAMP), "BMP"),
    "colour.png": saved(colour(RAMP), "PNG"),
    "alpha.png": saved(translucent(RAMP), "PNG"),
    "grey+alpha.png": saved(translucent(RAMP).convert("LA"), "PNG"),
    "16 bit.png": saved(Image.fromarray(RAMP.astype(np.uint16) * 257), "PNG"),
    "16 bit.tif": saved(Image.fromarray(RAMP.astype(np.uint16) * 257), "TIFF"),
    "palette.png": saved(palette(RAMP), "PNG"),
    "lying.png": rotated(RAMP),
    "animated.png": animated(RAMP),
    "lossless.webp": saved(colour(RAMP), "WEBP", lossless=True),
    "lächeln 笑.png": saved(Image.fromarray(RAMP), "PNG"),
}
"""Lossless files of `RAMP`: each has to give exactly these pixels."""

CLOSE = {
    "grey.jpg": saved(Image.fromarray(RAMP), "JPEG", quality=95),
    "colour.JPEG": saved(colour(RAMP), "JPEG", quality=95),
    "cmyk.jpg": saved(colour(RAMP).convert("CMYK"), "JPEG", quality=95),
    "progressive.jpg": saved(Image.fromarray(RAMP), "JPEG", quality=95, progressive=True),
    "cmyk.tif": saved(colour(RAMP).convert("CMYK"), "TIFF"),
    "animated.gif": saved(Image.fromarray(RAMP), "GIF"),
}
"""Files of `RAMP` that differ from it by rounding and JPEG's losses."""


@pytest.fixture(scope="module")
def rows(ray_cluster, tmp_path_factory) -> pd.DataFrame:
    """The rows of all files, prepared together, by file name."""
    root = tmp_path_factory.mktemp("formats")
    folder = root / "faces" / "train" / "happy"
    folder.mkdir(parents=True)
    (root / "faces" / "train" / "sad").mkdir()
    (root / "faces" / "train" / "sad" / "other.png").write_bytes(image_file(1))
    extremes = {
        "one pixel.png": saved(Image.fromarray(RAMP[:1, 5:6]), "PNG"),
        "vga.png": saved(Image.fromarray(cv2.resize(RAMP, (640, 480))), "PNG"),
        "long.png": saved(Image.fromarray(np.tile(RAMP[:2], (1, 100))), "PNG"),
        "tall.png": saved(Image.fromarray(np.tile(RAMP[:, :1], (100, 1))), "PNG"),
        "1 bit.png": saved(Image.fromarray(RAMP > 100), "PNG"),
    }
    for name, content in (EXACT | CLOSE | extremes).items():
        (folder / name).write_bytes(content)
    prepare(root / "faces", root / "out")
    assert pq.read_table(root / "out" / "quarantine.parquet").num_rows == 0
    found = split_of(root / "out", "train")
    assert len(found) == len(EXACT | CLOSE | extremes) + 1
    found["name"] = found["image_id"].str.rsplit("/", n=1).str[1]
    return found.set_index("name")


def pixels(rows: pd.DataFrame, name: str) -> np.ndarray:
    row = rows.loc[name]
    assert (row["height"], row["width"]) == (48, 48)
    return np.frombuffer(row["image"], np.uint8).reshape(48, 48)


@pytest.mark.parametrize("name", EXACT)
def test_lossless_formats_give_exactly_the_pixels(rows, name):
    assert np.array_equal(pixels(rows, name), RAMP)
    assert rows.loc[name, "pixel_sha256"] == decoding.pixel_sha256(RAMP)


@pytest.mark.parametrize("name", CLOSE)
def test_lossy_formats_give_nearly_the_pixels(rows, name):
    assert np.abs(pixels(rows, name).astype(int) - RAMP).mean() < 3


def test_extreme_shapes_are_scaled_to_fit_and_padded_with_their_edge(rows):
    assert set(pixels(rows, "one pixel.png").ravel()) == {RAMP[0, 5]}
    vga = pixels(rows, "vga.png")
    assert np.array_equal(vga[0], vga[5]) and np.array_equal(vga[-1], vga[-6])
    assert np.abs(vga[6:42].mean(axis=0) - RAMP.mean(axis=0)).mean() < 3
    long, tall = pixels(rows, "long.png"), pixels(rows, "tall.png")
    assert (long == long[0]).all() and len(set(long[0])) > 1
    assert (tall == tall[:, :1]).all() and len(set(tall[:, 0])) > 1


def test_one_bit_is_black_and_white(rows):
    assert np.array_equal(pixels(rows, "1 bit.png"), np.where(RAMP > 100, 255, 0))


def test_one_stem_with_two_extensions_is_two_rows(rows):
    assert {"grey.png", "grey.bmp", "grey.jpg"} <= set(rows.index)


TONES = np.arange(2**16)
"""All values of 16 bits."""


def declared_range(low: float, high: float) -> dict[int, float]:
    """The TIFF tags SMinSampleValue and SMaxSampleValue."""
    return {340: low, 341: high}


def deep(tones: np.ndarray) -> list[bytes]:
    """Files with 16 bits per pixel, in both byte orders, and with 32 bits and a declared range."""
    return [
        saved(Image.fromarray(tones.astype(np.uint16)), "PNG"),
        saved(Image.fromarray(tones.astype(np.uint16)), "TIFF"),
        saved(Image.frombytes("I;16B", tones.shape[::-1], tones.astype(">u2").tobytes()), "TIFF"),
        saved(Image.fromarray(tones.astype(np.int32)), "TIFF", tiffinfo=declared_range(0, 65535)),
    ]


@pytest.mark.parametrize("shape", [(256, 256), (13, 5041), (2**16, 1), (1, 2**16)])
@pytest.mark.parametrize("block_pixels", [100, 2**18])
def test_every_tone_of_16_bits_is_rounded_whatever_the_block_size(shape, block_pixels, monkeypatch):
    monkeypatch.setattr(decoding, "_BLOCK_PIXELS", block_pixels)
    tones = TONES[: shape[0] * shape[1]].reshape(shape)
    for content in deep(tones):
        assert np.array_equal(decoding.decode(content), (tones * 255 + 32767) // 65535)


@pytest.mark.parametrize("tone", [-1, 2**16])
def test_a_single_tone_outside_the_declared_range_is_refused(tone, monkeypatch):
    monkeypatch.setattr(decoding, "_BLOCK_PIXELS", 100)
    pixels = np.zeros((30, 30), np.int32)
    pixels[-1, -1] = tone
    content = saved(Image.fromarray(pixels), "TIFF", tiffinfo=declared_range(0, 65535))
    with pytest.raises(decoding.DecodeError, match="outside the range 0 to 65535"):
        decoding.decode(content)


@pytest.mark.parametrize(
    "tags", [{}, {340: 0.0}, declared_range(5, 5), declared_range(0, 0.5), declared_range(9, 2)]
)
def test_32_bits_without_a_usable_range_are_refused_and_not_black(tags):
    tones = Image.fromarray(RAMP.astype(np.int32))
    with pytest.raises(decoding.DecodeError, match="32-bit integers of unknown range"):
        decoding.decode(saved(tones, "TIFF", tiffinfo=tags))


@pytest.mark.parametrize(("low", "high"), [(0, 255), (0, 1000), (-128, 127), (0, 2**31 - 1)])
def test_32_bits_are_scaled_from_the_range_that_the_file_declares(low, high):
    tones = np.linspace(low, high, 300).astype(np.int32).reshape(20, 15)
    content = saved(Image.fromarray(tones), "TIFF", tiffinfo=declared_range(low, high))
    expected = np.rint((tones.astype(float) - low) * 255 / (high - low))
    assert np.abs(decoding.decode(content) - expected).max() <= 1
    assert decoding.decode(content).ravel()[[0, -1]].tolist() == [0, 255]


def test_a_large_image_of_16_bits_takes_little_memory():
    content = saved(Image.fromarray(np.full((2000, 2000), 1000, np.uint16)), "PNG")
    tracemalloc.start()
    try:
        grey = decoding.decode(content)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # its 8 bits, and a few rows
    assert peak < 3 * grey.nbytes


def damaged(content: bytes, seed: int) -> bytes:
    """The file with up to four bytes changed, and truncated in a quarter of the cases."""
    draw = random.Random(seed)
    changed = bytearray(content)
    for _ in range(draw.randrange(5)):
        changed[draw.randrange(2, len(changed))] = draw.randrange(256)
    return bytes(changed[: draw.randrange(4, len(changed))] if draw.random() < 0.25 else changed)


def by_pillow(content: bytes) -> np.ndarray | None:
    """The pixels according to Pillow; None where it refuses the file."""
    try:
        with Image.open(io.BytesIO(content), formats=decoding.FORMATS) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("L"))
    except Exception:
        return None


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("quality", [30, 75, 95])
def test_the_fast_path_for_grey_jpegs_equals_pillow(quality, progressive):
    """Intact and damaged: never other pixels, and no file that Pillow refuses."""
    noise = np.random.default_rng(quality).integers(0, 256, (37, 48), np.uint8)
    whole = saved(Image.fromarray(noise), "JPEG", quality=quality, progressive=progressive)
    assert decoding._is_plain_jpeg(whole) is not progressive
    for content in [whole, *(damaged(whole, seed) for seed in range(250))]:
        expected = by_pillow(content)
        try:
            found = decoding.decode(content)
        except decoding.DecodeError:
            found = None
        assert (found is None) == (expected is None)
        if expected is not None and expected.size <= decoding.MAX_PIXELS:
            assert np.array_equal(found, expected)


def test_a_jpeg_with_something_after_its_end_is_read(tmp_path: Path):
    whole = saved(Image.fromarray(RAMP), "JPEG")
    assert np.array_equal(decoding.decode(whole + b"\0" * 9), decoding.decode(whole))
