"""The images of a sweep: read once, shared by all trials of a node."""

from __future__ import annotations

from typing import Any

from fer_ray.data import object_store
from fer_ray.errors import UserError
from fer_ray.sweeps.plan import SweepPlan
from fer_ray.training.worker import SPLITS

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
    each = plan.info.image_size**2
    size, room = rows * each, _MEMORY_SHARE * min(stores)
    if size > room:
        left = room - plan.info.split("validation").rows * each
        most = left / (plan.info.split("train").rows * each)
        help_ = f"at most {most:.3g} fits" if most > 0 else "the validation split alone is more"
        raise UserError(
            f"--train-fraction: the images take {size / 2**20:,.0f} MiB, the trials of a node can "
            f"share {room / 2**20:,.0f}; {help_}"
        )
    return object_store.shared_images(plan.info, share, seed=plan.config.schedule.seed)
