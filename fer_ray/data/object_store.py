"""The images of both splits, read once by Ray and shared by all processes of a node.

Apart from `training`: the process that reads has no need of torch, whose import takes longer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fer_ray.data.dataset import DatasetInfo, load_split
from fer_ray.data.labels import UNKNOWN_LABEL
from fer_ray.errors import UserError


def shared_images(
    info: DatasetInfo,
    fractions: Mapping[str, float],
    *,
    seed: int = 0,
    meanwhile: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """References to (images, labels) of each split; each node keeps one copy of them.

    Args:
        info: the data set.
        fractions: what part of each split, above 0 and at most 1.
        seed: decides which part.
        meanwhile: called while the images are read.

    Returns:
        By split, a reference to pixels (N, S, S) uint8 and labels (N,) int64.

    Raises:
        UserError: for damaged files.
    """
    import ray

    load = ray.remote(num_cpus=0, num_returns=2)(_load)
    answers: dict[str, Any] = {
        name: load.remote(info, name, fraction, seed) for name, fraction in fractions.items()
    }
    meanwhile()
    for problem, _ in answers.values():
        if reason := ray.get(problem):
            raise UserError(reason)
    return {name: images for name, (_, images) in answers.items()}


def _load(info: DatasetInfo, name: str, fraction: float, seed: int) -> tuple[str, Any]:
    """A split's pixels and labels, or a part of them, or why they cannot be read."""
    try:
        split = load_split(info, name)
    except UserError as error:
        return str(error), None
    if fraction == 1.0:
        return "", (split.images, split.labels)
    keep = stratified(split.labels, fraction, seed)
    return "", (split.images[keep], split.labels[keep])


def stratified(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Positions of a part of the images that has the same share of each class, in order.

    Args:
        labels: (N,) int64; images without a label are left out.
        fraction: above 0, at most 1; rounded for each class, at least one image.
        seed: decides which.
    """
    random = np.random.default_rng((seed, 0x5EED))
    kept = []
    for label in np.unique(labels[labels != UNKNOWN_LABEL]):
        where = np.flatnonzero(labels == label)
        kept.append(random.permutation(where)[: sample_size(len(where), fraction)])
    return np.sort(np.concatenate(kept))


def sample_size(count: int, fraction: float) -> int:
    """How many of a class's images are a fraction of them: one at least, where there are any."""
    return max(round(count * fraction), 1) if count else 0
