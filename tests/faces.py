"""Pictures, folders of them and what is wrong with some: sources that tests prepare."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from fer_ray.preparation import run
from fer_ray.preparation.plan import plan_preparation


def picture(tone: int, size: tuple[int, int] = (48, 48), kind: str = "PNG") -> bytes:
    """A picture that is its own: other tones give other pixels."""
    pixels = np.random.default_rng(tone).integers(0, 256, size, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


HOSTILE = {
    "images/train/happy/1.png": picture(1),
    "images/train/happy/2.jpg": picture(2, kind="JPEG"),
    "images/train/happy/same as 1.png": picture(1),
    "images/train/sad/1 again.png": picture(1),
    "images/train/sad/large.png": picture(3, (100, 60)),
    "images/train/sad/cut.jpg": picture(4, kind="JPEG")[:700],
    "images/train/sad/text.jpg": b"this is no picture",
    "images/train/sad/empty.png": b"",
    "images/train/.DS_Store": b"\0",
    "images/train/loose.png": picture(5),
    "images/readme.txt": b"about",
    "images/validation/happy/twin.png": picture(1),
    "images/validation/sad/2.png": picture(6),
    "images/test/unknown.png": picture(7),
    "images/test/sad/known.png": picture(8),
}
KEPT = 9


def split_of(path: Path, split: str) -> pd.DataFrame:
    return pd.read_parquet(path / split)


def write_classes(root: Path, count: int, labels: tuple[str, ...]) -> Path:
    """So many pictures a class, every fifth the same as the one before it."""
    for number, label in enumerate(labels):
        (root / label).mkdir(parents=True)
        for index in range(count):
            tone = 1000 * number + index - (index % 5 == 4)
            (root / label / f"{index:03}.png").write_bytes(picture(tone))
    return root


def prepare(source: object, output: Path, **settings) -> dict:
    plan = plan_preparation(source=str(source), output=str(output), **settings)
    return run.prepare(plan, log=lambda line: None)
