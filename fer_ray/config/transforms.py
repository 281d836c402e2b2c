"""The section of the configuration that says what happens to the pixels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from fer_ray.config.fields import FrozenMapping, Search, Section, Setting, choice
from fer_ray.config.registries import AUGMENTATIONS, NORMALIZATIONS
from fer_ray.errors import unknown

ENGINES = ("auto", "albumentations", "device")


PRESETS: dict[str, dict[str, float]] = {
    "none": {},
    # what the original notebook had
    "notebook": {"flip": 0.5, "rotation": 36.0, "translation": 0.1, "contrast": 0.1},
    "standard": {
        "flip": 0.5,
        "rotation": 10.0,
        "translation": 0.12,
        "zoom": 0.12,
        "erasing": 0.5,
    },
    "strong": {
        "flip": 0.5,
        "rotation": 15.0,
        "translation": 0.12,
        "crop": 0.35,
        "brightness": 0.2,
        "contrast": 0.3,
        "blur": 1.0,
        "noise": 0.05,
        "erasing": 0.5,
        "mixup": 0.2,
        "cutmix": 1.0,
    },
}
"""Presets of augmentation: the magnitudes that are not 0, by the augmentation's option."""


@dataclass(frozen=True, kw_only=True, init=False)
class TransformConfig(Section):
    """What happens to the pixels.

    Beside its fields it has a magnitude for each option of each augmentation in `AUGMENTATIONS`;
    0 is off. Magnitudes that are not given are the preset's.
    """

    section: ClassVar[str] = "transforms"

    normalization: str = choice("dataset", NORMALIZATIONS)
    """`none` divides by 255; `minmax` spreads each image over 0 to 1; `standardize` gives each
    image mean 0 and standard deviation 1, `dataset` does so for the train split as a whole;
    `equalize` and `clahe` equalize each image's histogram, as a whole or in tiles."""
    augmentation: str = choice("standard", tuple(PRESETS))
    """Preset of the random changes below, which are made in that order."""
    engine: str = choice("auto", ENGINES)
    """What augments: `albumentations`, image by image on CPUs, or `device`, whole batches on the
    device that trains; `auto` is `device`."""
    magnitudes: FrozenMapping = field(init=False)
    """Magnitude of each option of the augmentations."""

    def __init__(
        self,
        *,
        normalization: str = "dataset",
        augmentation: str = "standard",
        engine: str = "auto",
        **magnitudes: float | None,
    ) -> None:
        """Takes the fields, and magnitudes by option; one that is None is the preset's.

        Raises:
            UserError: for a name or a value that is not allowed.
        """
        values = {"normalization": normalization, "augmentation": augmentation, "engine": engine}
        for name, value in values.items():
            object.__setattr__(self, name, value)
        settings = {setting.field: setting for setting in self.settings()}
        for name in magnitudes:
            if name not in settings:
                raise unknown("transforms", name, settings)
        for name in values:
            settings[name].check(getattr(self, name))
        filled: dict[str, float] = {
            name: preset if (own := magnitudes.get(name)) is None else own
            for name, preset in self.derived().items()
        }
        for name, magnitude in filled.items():
            settings[name].check(magnitude)
        object.__setattr__(self, "magnitudes", FrozenMapping(filled))

    def derived(self) -> dict[str, Any]:
        """The preset's magnitude of each option."""
        preset = PRESETS[self.augmentation]
        return {setting.field: preset.get(setting.field, 0.0) for setting in magnitude_settings()}

    @classmethod
    def settings(cls) -> tuple[Setting, ...]:
        """The fields, then every option of every augmentation."""
        return (*super().settings(), *magnitude_settings())

    def to_dict(self) -> dict[str, Any]:
        """The fields and magnitudes in one dict."""
        fields = {setting.field: getattr(self, setting.field) for setting in super().settings()}
        return {**fields, **self.magnitudes}

    def with_preset(self, augmentation: str) -> TransformConfig:
        """The same with all magnitudes of another preset."""
        return TransformConfig(
            normalization=self.normalization, augmentation=augmentation, engine=self.engine
        )


def magnitude_settings() -> tuple[Setting, ...]:
    """A setting for each option of each augmentation, in the order in which they are applied."""
    return tuple(
        Setting(
            section="transforms",
            field=option.name,
            type=float,
            default=None,
            doc=option.doc,
            flag="--" + option.name.replace("_", "-"),
            low=0.0,
            high=option.high,
            search=Search(low=0.0, high=option.search_high),
        )
        for augmentation in AUGMENTATIONS.values()
        for option in augmentation.options
    )
