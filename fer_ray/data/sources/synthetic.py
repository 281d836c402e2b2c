"""Synthetic faces, drawn by the workers: a dataset to try everything out with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fer_ray.data.image_source import SOURCES, ImageSource, SourceOptions, SourceType
from fer_ray.data.labels import FER2013_LABELS
from fer_ray.data.sources.files import Entry

NUM_IMAGES = 4000
"""Number of images unless ``--num-images`` is given."""


@dataclass(frozen=True, kw_only=True)
class SyntheticImageSource:
    """Drawn faces as an `ImageSource`: 80 % train, 10 % validation, 10 % test, balanced classes."""

    seed: int
    """Another seed gives other faces."""
    num_images: int
    """Number of images of all splits together."""
    size: int
    """Height and width, in pixels."""

    has_splits = True

    def entries(self) -> Iterator[Entry]:
        """Lists all images; their paths are ``<split>/<label>/<index>``."""
        for index in range(self.num_images):
            split = {8: "validation", 9: "test"}.get(index % 10, "train")
            label = FER2013_LABELS[label_of(index)]
            yield Entry(path=f"{split}/{label}/{index:07d}", split=split, label=label)

    def grey(self, path: str, at: bytes) -> np.ndarray:
        """Draws one face, (size, size) uint8, from the index in its path."""
        from fer_ray.data.synthetic import draw

        index = int(path.rsplit("/", 1)[1])
        return draw(label_of(index), self.seed, index, self.size)

    def describe(self, listing: Iterator[tuple[str, int]]) -> dict[str, Any]:
        """See `ImageSource.describe`."""
        return {"seed": self.seed, "num_images": self.num_images}


def label_of(index: int) -> int:
    """Returns an image's label; within each split the labels follow one another in turn."""
    return (index // 10 + index % 10) % len(FER2013_LABELS)


def _open(source: str, options: SourceOptions) -> ImageSource:
    count = NUM_IMAGES if options.num_images is None else options.num_images
    return SyntheticImageSource(seed=options.seed, num_images=count, size=options.image_size)


SOURCES.register("synthetic")(
    SourceType(
        description="synthetic (draws faces, see --num-images)",
        recognizes=lambda source: source == "synthetic",
        open=_open,
        is_path=False,
        is_generated=True,
    )
)
