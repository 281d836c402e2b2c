"""Splits in Ray's object store: read once, then shared by all processes of a node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fer_ray.data.dataset import DatasetInfo, load_split
from fer_ray.data.labels import UNKNOWN_LABEL


def shared_images(
    info: DatasetInfo, fractions: Mapping[str, float], *, seed: int = 0
) -> dict[str, Any]:
    """Loads splits into the object store; each node keeps one copy.

    This process reads them: the start of another one takes longer than most data sets.

    Args:
        info: the dataset.
        fractions: by split, the fraction of its images to load, above 0 and at most 1.
        seed: decides which images are loaded where the fraction is below 1.

    Returns:
        By split, a reference to a tuple of images, (N, S, S) uint8, and labels, (N,) int64.

    Raises:
        UserError: when files of the dataset cannot be read.
    """
    import ray

    references = {}
    for name, fraction in fractions.items():
        split = load_split(info, name)
        images, labels = split.images, split.labels
        if fraction < 1.0:
            selected = stratified(labels, fraction, seed)
            images, labels = images[selected], labels[selected]
        references[name] = ray.put((images, labels))
    return references


def stratified(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Draws the same fraction of each class at random.

    Args:
        labels: (N,) int64; images without a label are left out.
        fraction: above 0 and at most 1; see `stratum_size` for the rounding.
        seed: decides which images are drawn.

    Returns:
        Sorted indices into `labels`, (M,) int64.
    """
    random = np.random.default_rng((seed, 0x5EED))
    selected = []
    for label in np.unique(labels[labels != UNKNOWN_LABEL]):
        members = np.flatnonzero(labels == label)
        selected.append(random.permutation(members)[: stratum_size(len(members), fraction)])
    return np.sort(np.concatenate(selected))


def stratum_size(count: int, fraction: float) -> int:
    """Returns how many of a class's images are drawn: rounded, at least 1 unless there are none."""
    return max(round(count * fraction), 1) if count else 0
