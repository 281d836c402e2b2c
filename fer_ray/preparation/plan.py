"""What a preparation is asked to do, checked before Ray starts."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fer_ray import storage
from fer_ray.data import dataset, synthetic
from fer_ray.data.image_source import Pictures, open_pictures
from fer_ray.errors import UserError
from fer_ray.preparation import splitting
from fer_ray.preparation.inventory import Ledger

MAX_CLASSES = 1000
"""As many as ImageNet's: more are names of files or people, taken for labels by mistake."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A preparation whose settings are known to be right. Made by `plan`."""

    pictures: Pictures
    """Where the rows come from."""
    ledger: Ledger
    """What the source holds; `prepare` closes it."""
    labels: tuple[str, ...]
    """The classes of train, alphabetical."""
    output: str
    """Absolute place of the prepared dataset."""
    image_size: int
    """Height and width of every image, in pixels."""
    held_out: float = 0.0
    """Share of train that goes to validation; 0: none."""
    seed: int = 0
    """Decides which."""
    deduplicate: bool = False
    """Whether train loses what also stands in another split."""


def plan(
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
    """Checks the settings and lists the source; needs no Ray.

    Args:
        source: one of `pictures.KINDS`.
        output: place of the prepared dataset.
        image_size: height and width of every image, in pixels.
        num_images: for the synthetic source only; None for its default.
        seed: for the synthetic source, and for what is held out.
        validation_fraction: share of train that is held out where the source has no validation
            split, between 0 and 1; None for a tenth where it has no splits at all, else none.
        deduplicate: whether train loses what also stands in another split.
        overwrite: whether a prepared dataset at `output` may be replaced.

    Raises:
        UserError: for everything about them that is wrong.
    """
    _check_numbers(image_size, validation_fraction)
    output = storage.absolute(output)
    _check_output(output, overwrite)
    pictures: Pictures
    if source == "synthetic":
        count = synthetic.NUM_IMAGES if num_images is None else num_images
        pictures = synthetic.SyntheticPictures(seed=seed, num_images=count, size=image_size)
    else:
        if num_images is not None:
            raise UserError("--num-images: only --source synthetic has a choice of how many")
        _check_apart(source if source == "kaggle" else storage.absolute(source), output)
        pictures = open_pictures(source)
    ledger = Ledger()
    try:
        ledger.list_files(pictures.entries())
        labels = _check_labels(ledger, source)
        held_out = _held_out(ledger, pictures, validation_fraction)
    except BaseException:
        ledger.close()
        raise
    return Plan(
        pictures=pictures,
        ledger=ledger,
        labels=labels,
        output=output,
        image_size=image_size,
        held_out=held_out,
        seed=seed,
        deduplicate=deduplicate,
    )


def _check_numbers(image_size: int, validation_fraction: float | None) -> None:
    low, high = dataset.MIN_IMAGE_SIZE, dataset.MAX_IMAGE_SIZE
    if not low <= image_size <= high:
        raise UserError(f"--image-size: {image_size} is not between {low} and {high}")
    if validation_fraction is not None and not 0 < validation_fraction < 1:
        raise UserError(f"--validation-fraction: {validation_fraction} is not between 0 and 1")


def _check_labels(ledger: Ledger, source: str) -> tuple[str, ...]:
    """The classes of train, when the source as a whole makes sense."""
    counts = ledger.counts()
    labels = ledger.labels("train")
    if not labels:
        refused = [f"{count:,} x {reason}" for reason, count in ledger.reasons()[:3]]
        found = [f"{count:,} images of {split}" for split, count in counts.items()]
        raise UserError(
            f"--source: {source}: train holds no images in a class folder, or with a label; found "
            f"{', '.join([*found, *refused]) or 'nothing'}"
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
        strange = sorted(set(ledger.labels(split)) - set(labels))
        if strange:
            raise UserError(
                f"--source: {source}: {split} has classes that train lacks: "
                f"{_names(strange)} (train has {_names(labels)})"
            )
    first: dict[str, str] = {}
    for label in labels:
        if (other := first.setdefault(label.lower(), label)) != label:
            raise UserError(
                f"--source: {source}: the classes {other!r} and {label!r} differ only in case, "
                "which SQL's column names do not tell apart"
            )
    return tuple(labels)


def _names(labels: Iterable[str], most: int = 20) -> str:
    names = list(labels)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _held_out(ledger: Ledger, pictures: Pictures, fraction: float | None) -> float:
    """The share of train that is held out for validation; 0 where the source has its own."""
    if not pictures.has_splits:
        return splitting.DEFAULT_VALIDATION_FRACTION if fraction is None else fraction
    if fraction is not None and "validation" in ledger.counts():
        raise UserError("--validation-fraction: the source has a validation split of its own")
    return fraction or 0.0


def _check_output(output: str, overwrite: bool) -> None:
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
                f"--output: {output} is not empty and not a prepared dataset: "
                "it is never replaced, choose another folder"
            )
        if not overwrite:
            raise UserError(f"--output: {output} exists: --overwrite replaces it")
    if not storage.is_uri(output):
        above = next(path for path in Path(os.path.realpath(output)).parents if path.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise UserError(f"--output: {above} is not a folder that can be written to")


def _check_apart(source: str, output: str) -> None:
    if source == "kaggle" or storage.is_uri(source) or storage.is_uri(output):
        return
    inner, outer = Path(source).resolve(), Path(output).resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise UserError(f"--output: {output} and --source {source} lie one within the other")
