"""Splits in Ray's object store: read once, then shared by all processes of a node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fer_ray.data.dataset import DatasetInfo, load_split, read_part
from fer_ray.data.labels import UNKNOWN_LABEL
from fer_ray.errors import UserError

_BYTES_PER_TASK = 256 * 2**20
"""Bytes of parts that are worth a task of their own."""


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


def verify_parts(info: DatasetInfo, splits: Sequence[str]) -> None:
    """Reads every part of some splits once, on all nodes, and checks it as `read_part` does.

    Args:
        info: the dataset.
        splits: names of the splits.

    Raises:
        UserError: for a part that is not the one that ``dataset.json`` describes.
    """
    import ray

    parts = [(name, file) for name in splits for file in info.split(name).files]
    size = sum(info.split(name).parts[file].num_bytes for name, file in parts)
    num_tasks = min(max(size // _BYTES_PER_TASK, 1), int(ray.cluster_resources().get("CPU", 1)))
    verify = ray.remote(num_cpus=0, scheduling_strategy="SPREAD")(_verify)
    problems = [verify.remote(info, parts[number::num_tasks]) for number in range(num_tasks)]
    for problem in problems:
        if reason := ray.get(problem):
            raise UserError(reason)


def _verify(info: DatasetInfo, parts: list[tuple[str, str]]) -> str:
    """Returns why one of the parts is refused, or an empty string."""
    try:
        for split, file in parts:
            read_part(info, split, file)
    except UserError as error:
        return str(error)
    return ""


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
