"""Mixup and cutmix as augmentations: their options. `fer_ray.transforms.mixing` makes them."""

from __future__ import annotations

from fer_ray.config.registries import AUGMENTATIONS
from fer_ray.transforms.operation import Mixing, Option


class Mixup(Mixing):
    """Blends each image with another one (Zhang et al. 2017, arXiv:1710.09412)."""

    position, in_albumentations = 90, True  # both engines leave it to `mixing`
    options = (
        Option(
            name="mixup",
            doc="Blend with another image of the batch: both parameters of the beta distribution "
            "of the fraction.",
            high=10,
            usual=0.2,
            search_high=0.4,
        ),
    )


class CutMix(Mixing):
    """Puts a rectangle of another image into each (Yun et al. 2019, arXiv:1905.04899)."""

    position, in_albumentations = 100, True
    options = (
        Option(
            name="cutmix",
            doc="Rectangle from another image of the batch: as `mixup`; with both, half of the "
            "images each.",
            high=10,
            usual=1,
            search_high=1,
        ),
    )


AUGMENTATIONS.register("mixup")(Mixup())
AUGMENTATIONS.register("cutmix")(CutMix())
