"""The settings of a preparation, checked before Ray starts."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fer_ray import storage
from fer_ray.data import dataset
from fer_ray.data.image_source import (
    SOURCES,
    ImageSource,
    SourceOptions,
    find_type,
    list_tables,
)
from fer_ray.errors import UserError
from fer_ray.preparation import splitting
from fer_ray.preparation.inventory import Inventory

MAX_CLASSES = 1000
"""As many as ImageNet has; with more, the labels are probably names of files or people."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A preparation whose settings are valid, created by `plan_preparation`."""

    source_type: str
    """Name of the source's type."""
    images: ImageSource
    """Where the images come from."""
    inventory: Inventory
    """The files of the source; `run.prepare` closes it."""
    labels: tuple[str, ...]
    """The classes of train, in alphabetical order."""
    output: str
    """Absolute path or URI of the prepared dataset."""
    image_size: int
    """Height and width of all images, in pixels."""
    held_out: float = 0.0
    """Fraction of train that becomes validation; 0 for none."""
    seed: int = 0
    """Decides which images are held out."""
    deduplicate: bool = False
    """Whether images that also occur in another split are dropped from train."""


def plan_preparation(
    *,
    source: str,
    output: str,
    image_size: int = 48,
    num_images: int | None = None,
    seed: int = 0,
    validation_fraction: float | None = None,
    deduplicate: bool = False,
    overwrite: bool = False,
) -> Plan:
    """Checks the settings and lists the source; Ray is not needed.

    Args:
        source: path, URI or name that one of the types in `SOURCES` recognizes.
        output: path or URI of the prepared dataset.
        image_size: height and width of all images, in pixels.
        num_images: number of images to generate; None for the source's default.
        seed: seed of generated images, and of the choice of images to hold out.
        validation_fraction: fraction of train to hold out, between 0 and 1, where the source has
            no validation split; None: a tenth if it has no splits at all, else none.
        deduplicate: whether images that also occur in another split are dropped from train.
        overwrite: whether a prepared dataset at `output` may be replaced.

    Raises:
        UserError: when a setting or the source is not valid.
    """
    _check_numbers(image_size, validation_fraction)
    output = _check_output(storage.absolute(output), overwrite)
    options = SourceOptions(image_size=image_size, num_images=num_images, seed=seed)
    name, images = _open(source, options, output)
    inventory = Inventory()
    try:
        inventory.add_tables(list_tables(images))
        labels = _check_labels(inventory, source)
        held_out = _held_out(inventory, images, validation_fraction)
    except BaseException:
        inventory.close()
        raise
    return Plan(
        source_type=name,
        images=images,
        inventory=inventory,
        labels=labels,
        output=output,
        image_size=image_size,
        held_out=held_out,
        seed=seed,
        deduplicate=deduplicate,
    )


def _open(source: str, options: SourceOptions, output: str) -> tuple[str, ImageSource]:
    """The name of a source's type, and its images."""
    name = find_type(source)
    source_type = SOURCES[name]
    if options.num_images is not None and not source_type.is_generated:
        raise UserError(f"--num-images: the images of {source} are not generated: omit the flag")
    if source_type.is_path:
        _check_apart(storage.absolute(source), output)
    return name, source_type.open(source, options)


def _check_numbers(image_size: int, validation_fraction: float | None) -> None:
    low, high = dataset.MIN_IMAGE_SIZE, dataset.MAX_IMAGE_SIZE
    if not low <= image_size <= high:
        raise UserError(f"--image-size: {image_size} is not between {low} and {high}")
    if validation_fraction is not None and not 0 < validation_fraction < 1:
        raise UserError(f"--validation-fraction: {validation_fraction} is not between 0 and 1")


def _check_labels(inventory: Inventory, source: str) -> tuple[str, ...]:
    """Returns the classes of train, after checking those of all splits."""
    counts = inventory.counts()
    labels = inventory.labels("train")
    if not labels:
        images = [f"{count:,} images of {split}" for split, count in counts.items()]
        contents = ", ".join([*images, *inventory.summarize_reasons(3)])
        raise UserError(
            f"--source: {source}: train has no images in class folders or with labels; found "
            f"{contents or 'nothing'}"
        )
    if len(labels) == 1:
        raise UserError(
            f"--source: {source}: train has one class, {labels[0]}: two or more are needed"
        )
    if len(labels) > MAX_CLASSES:
        raise UserError(
            f"--source: {source}: train has {len(labels):,} classes, such as "
            f"{_names(labels, 3)}: at most {MAX_CLASSES:,} are allowed"
        )
    for split in counts:
        missing = sorted(set(inventory.labels(split)) - set(labels))
        if missing:
            raise UserError(
                f"--source: {source}: {split} has classes that train lacks: "
                f"{_names(missing)} (train has {_names(labels)})"
            )
    by_lower_case: dict[str, str] = {}
    for label in labels:
        if (other := by_lower_case.setdefault(label.lower(), label)) != label:
            raise UserError(
                f"--source: {source}: the classes {other!r} and {label!r} differ only in case, "
                "but the names of SQL columns are case-insensitive"
            )
    return tuple(labels)


def _names(labels: Iterable[str], most: int = 20) -> str:
    names = list(labels)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _held_out(inventory: Inventory, images: ImageSource, fraction: float | None) -> float:
    """Returns the fraction of train to hold out for validation."""
    if not images.has_splits:
        return splitting.DEFAULT_VALIDATION_FRACTION if fraction is None else fraction
    if fraction is not None and "validation" in inventory.counts():
        raise UserError("--validation-fraction: the source already has a validation split")
    return fraction or 0.0


def _check_output(output: str, overwrite: bool) -> str:
    """Returns the path or URI if a dataset may be written there."""
    storage.check_bucket("--output", output)
    if storage.exists(output) and not storage.is_directory(output):
        raise UserError(f"--output: {output} is a file")
    if not storage.is_uri(output) and Path(output).is_mount():
        raise UserError(
            f"--output: {output} is a mount point, which cannot be replaced: give a folder below it"
        )
    if storage.list_names(output) and not storage.is_unfinished(output):
        if not storage.exists(storage.join(output, dataset.INFO_NAME)):
            raise UserError(
                f"--output: {output} is not empty and not a prepared dataset, so it is never "
                "replaced: choose another folder"
            )
        if not overwrite:
            raise UserError(f"--output: {output} exists: --overwrite replaces it")
    if not storage.is_uri(output):
        above = next(path for path in Path(os.path.realpath(output)).parents if path.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise UserError(f"--output: {above} is not a writable folder")
    return output


def _check_apart(source: str, output: str) -> None:
    if storage.is_uri(source) or storage.is_uri(output):
        return
    source_path, output_path = Path(source).resolve(), Path(output).resolve()
    if source_path.is_relative_to(output_path) or output_path.is_relative_to(source_path):
        raise UserError(f"--output: {output} and --source {source}: one lies within the other")
