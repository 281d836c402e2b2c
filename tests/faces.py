"""Image files, and folders of them with good and broken ones: sources that tests prepare."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from fer_ray.preparation import run
from fer_ray.preparation.plan import plan_preparation


def image_file(tone: int, size: tuple[int, int] = (48, 48), file_format: str = "PNG") -> bytes:
    """A noise image; another tone gives other pixels."""
    pixels = np.random.default_rng(tone).integers(0, 256, size, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format)
    return buffer.getvalue()


HOSTILE = {
    "images/train/happy/1.png": image_file(1),
    "images/train/happy/2.jpg": image_file(2, file_format="JPEG"),
    "images/train/happy/same as 1.png": image_file(1),
    "images/train/sad/1 again.png": image_file(1),
    "images/train/sad/large.png": image_file(3, (100, 60)),
    "images/train/sad/cut.jpg": image_file(4, file_format="JPEG")[:700],
    "images/train/sad/text.jpg": b"this is not an image",
    "images/train/sad/empty.png": b"",
    "images/train/.DS_Store": b"\0",
    "images/train/loose.png": image_file(5),
    "images/readme.txt": b"about",
    "images/validation/happy/duplicate.png": image_file(1),
    "images/validation/sad/2.png": image_file(6),
    "images/test/unknown.png": image_file(7),
    "images/test/sad/known.png": image_file(8),
}
KEPT = 9
"""Number of files in `HOSTILE` that become images of the dataset."""


def split_of(path: Path, split: str) -> pd.DataFrame:
    return pd.read_parquet(path / split)


def write_classes(root: Path, count: int, labels: tuple[str, ...]) -> Path:
    """`count` images of each class; every fifth is a duplicate of the one before it."""
    for number, label in enumerate(labels):
        (root / label).mkdir(parents=True)
        for index in range(count):
            tone = 1000 * number + index - (index % 5 == 4)
            (root / label / f"{index:03}.png").write_bytes(image_file(tone))
    return root


def prepare(source: object, output: Path, **settings) -> dict:
    plan = plan_preparation(source=str(source), output=str(output), **settings)
    return run.prepare(plan, log=lambda line: None)
