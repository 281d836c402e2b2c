"""The images of a sweep: read once, shared by all trials of a node."""

from __future__ import annotations

from typing import Any

import numpy as np

from fer_ray.dataset import DatasetInfo, load_split
from fer_ray.errors import UserError
from fer_ray.labels import UNKNOWN_LABEL
from fer_ray.sweeps.planning import SweepPlan
from fer_ray.worker import SPLITS

_MEMORY_SHARE = 0.5
"""The most of a node's object store that the images may fill: all trials share them."""


def share(plan: SweepPlan) -> dict[str, Any]:
    """References to pixels and labels of each split: read once, one copy a node.

    Raises:
        UserError: for damaged files, or images that do not fit.
    """
    import ray

    share = {"train": plan.train_fraction, "validation": 1.0}
    rows = sum(plan.info.split(name).rows * share[name] for name in SPLITS)
    stores = [
        node["Resources"].get("object_store_memory", 0.0) for node in ray.nodes() if node["Alive"]
    ]
    size, room = rows * plan.info.image_size**2, _MEMORY_SHARE * min(stores)
    if size > room:
        raise UserError(
            f"--train-fraction: the images take {size / 2**20:,.0f} MiB, the trials of a node can "
            f"share {room / 2**20:,.0f}; at most {plan.train_fraction * room / size:.3g} fits"
        )
    load = ray.remote(num_cpus=0, num_returns=2)(_load)
    found: dict[str, Any] = {}
    for name in SPLITS:
        answer: Any = load.remote(plan.info, name, share[name], plan.config.schedule.seed)
        problem, found[name] = answer
        if reason := ray.get(problem):
            raise UserError(reason)
    return found


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
        count = max(round(len(where) * fraction), 1)
        kept.append(random.permutation(where)[:count])
    return np.sort(np.concatenate(kept))
