"""A page that shows what a prepared dataset contains: samples, class balance, duplicates."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as pads

from fer_ray import storage
from fer_ray.data import dataset
from fer_ray.errors import UserError
from fer_ray.preparation.inventory import KEPT, Inventory
from fer_ray.reporting import html, svg

NUM_SAMPLES = 12
"""Images shown of each class."""
NUM_GROUPS = 12
"""Groups of duplicates shown; those with conflicting labels come first."""
MAX_MEMBERS = 4
"""Images shown of each group."""
_BINS = 32


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """One image on the page."""

    image_id: str
    split: str
    label: str
    data_uri: str
    """PNG as a data URI."""


def check(path: str) -> str:
    """Returns the absolute path of the page.

    Raises:
        UserError: when the page cannot be written there.
    """
    path = storage.absolute(path)
    if storage.is_directory(path):
        raise UserError(f"--preview: {path} is a folder: give the name of a file")
    if not storage.name_of(path).lower().endswith((".html", ".htm")):
        raise UserError(f"--preview: {path} does not end in .html")
    if not storage.is_uri(path) and not Path(path).parent.is_dir():
        raise UserError(f"--preview: there is no folder {Path(path).parent}")
    if not storage.is_uri(path) and not os.access(Path(path).parent, os.W_OK):
        raise UserError(f"--preview: {Path(path).parent} is not writable")
    return path


def writer(
    path: str, log: Callable[[str], None]
) -> Callable[[str, Inventory, dict[str, Any]], None]:
    """Returns the function that writes the page, as the argument `finish` of `run.prepare`.

    Args:
        path: path of the page, from `check`.
        log: receives a line with the path.
    """

    def write(folder: str, inventory: Inventory, info: dict[str, Any]) -> None:
        storage.write_bytes(path, render(folder, inventory, info).encode())
        log(f"preview: {path}")

    return write


def render(folder: str, inventory: Inventory, info: dict[str, Any]) -> str:
    """Returns the page as HTML in one file, without links.

    Args:
        folder: path or URI of the prepared dataset.
        inventory: of its preparation.
        info: the content of ``dataset.json``.
    """
    splits, labels = list(info["splits"]), info["labels"]
    samples = {label: _sample(inventory, label) for label in labels}
    groups = _duplicate_groups(inventory)
    shown = [row for rows in (*samples.values(), *groups) for row in rows]
    images = _read_images(folder, shown, info["splits"])
    pixels = info["image_size"] ** 2
    brightness = f"pixel_sum / {pixels * 255.0}"
    # greatest: the variance of a nearly constant image may be rounded to just below 0
    contrast = (
        f"sqrt(greatest(pixel_sum_squares / {pixels}.0 - pow(pixel_sum / {pixels}.0, 2), 0)) / 255"
    )
    return html.render(
        "preview.html.j2",
        {},
        info=info,
        splits=splits,
        rows=sum(split["rows"] for split in info["splits"].values()),
        balance=_balance_chart(info["splits"], labels),
        brightness=_histogram(inventory, splits, brightness, 1.0, "brightness: mean of the pixels"),
        contrast=_histogram(
            inventory, splits, contrast, 0.5, "contrast: standard deviation of the pixels"
        ),
        samples={label: _thumbnails(rows, images) for label, rows in samples.items()},
        groups=[_thumbnails(rows, images) for rows in groups],
        reasons=inventory.reasons(),
    )


_Row = tuple[str, str, str | None]
"""Id, split and label of an image."""


def _sample(inventory: Inventory, label: str) -> list[_Row]:
    """Returns images of a class in the order of their hashes: random, but always the same."""
    query = (
        f"SELECT path, split, label FROM {KEPT} AND label = ? "
        f"ORDER BY row_sha256 LIMIT {NUM_SAMPLES}"
    )
    return list(inventory.rows(query, label))


def _duplicate_groups(inventory: Inventory) -> list[list[_Row]]:
    """Returns groups of duplicates: conflicting labels first, then those across splits."""
    chosen = inventory.rows(
        "SELECT pixel_sha256 FROM duplicates "
        f"ORDER BY conflicting DESC, num_splits DESC, pixel_sha256 LIMIT {NUM_GROUPS}"
    )
    query = (
        f"SELECT path, split, label FROM {KEPT} AND pixel_sha256 = ? "
        f"ORDER BY path LIMIT {MAX_MEMBERS}"
    )
    return [list(inventory.rows(query, pixel_sha256)) for (pixel_sha256,) in list(chosen)]


def _read_images(
    folder: str, rows: Sequence[_Row], splits: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Returns images, (H, W) uint8, by id; reads only the row groups that hold them."""
    fs, root = storage.filesystem(folder)
    images = {}
    for split in splits:
        ids = sorted({path for path, row_split, _ in rows if row_split == split})
        if not ids:
            continue
        files = [storage.join(root, file) for file in splits[split]["files"]]
        table = pads.dataset(files, schema=dataset.SCHEMA, filesystem=fs).to_table(
            columns=["image_id", "image", "height", "width"], filter=pc.field("image_id").isin(ids)
        )
        for row in table.to_pylist():
            shape = row["height"], row["width"]
            images[row["image_id"]] = np.frombuffer(row["image"], np.uint8).reshape(shape)
    return images


def _thumbnails(rows: Sequence[_Row], images: Mapping[str, np.ndarray]) -> list[Thumbnail]:
    return [
        Thumbnail(
            image_id=path,
            split=split,
            label=label or "no label",
            data_uri=html.png_data_uri(images[path]),
        )
        for path, split, label in rows
    ]


def _balance_chart(splits: Mapping[str, Any], labels: Sequence[str]) -> str:
    """Draws each class's percentage of its split, with the splits side by side."""
    thickness = 0.8 / len(splits)
    height_in = 0.8 + len(labels) * (0.15 + 0.17 * len(splits)) + 0.25 * len(splits)
    with svg.drawn(height_in) as (figure, axes):
        for number, (name, split) in enumerate(splits.items()):
            total = max(sum(split["classes"].values()), 1)
            percentages = [100 * split["classes"][label] / total for label in labels]
            positions = np.arange(len(labels)) + (number + 0.5) * thickness - 0.4
            colour = svg.series_colour(number)
            axes.barh(positions, percentages, height=0.9 * thickness, color=colour, label=name)
        axes.set_yticks(range(len(labels)), [svg.short(label, 18) for label in labels])
        axes.invert_yaxis()
        axes.set_xlabel("percentage of the split's labelled images")
        axes.grid(axis="x")
        svg.legend(figure, len(splits))
        train = splits["train"]["classes"]
        counts = ", ".join(f"{label} {train[label]:,}" for label in labels)
        return svg.as_svg(figure, f"Class balance; images of train: {counts}")


def _histogram(
    inventory: Inventory, splits: Sequence[str], measure: str, highest: float, title: str
) -> str:
    """Draws the distribution of a measure in each split.

    Args:
        inventory: of the preparation.
        splits: the splits to draw.
        measure: SQL expression over the columns of ``results``, at least 0.
        highest: end of the axis; larger values are counted in the last bin.
        title: label of the axis.
    """
    edges = np.linspace(0, highest, _BINS + 1)
    query = (
        f"SELECT least(floor(({measure}) / {highest} * {_BINS}), {_BINS - 1})::INT AS bin, "
        f"count(*) FROM {KEPT} AND split = ? GROUP BY bin"
    )
    with svg.drawn(2.9) as (figure, axes):
        medians = []
        for number, split in enumerate(splits):
            counts = np.zeros(_BINS)
            for index, count in inventory.rows(query, split):
                counts[index] = count
            percentages = 100 * counts / counts.sum()
            colour = svg.series_colour(number)
            axes.stairs(percentages, edges, color=colour, linewidth=2, label=split)
            (median,) = inventory.row(f"SELECT median({measure}) FROM {KEPT} AND split = ?", split)
            medians.append(f"{split} {median:.3f}")
        axes.set_xlabel(f"{title}, scaled to 0..1")
        axes.set_ylabel("images, %")
        axes.set_xlim(0, highest)
        axes.set_ylim(bottom=0)
        axes.grid()
        svg.legend(figure, len(splits))
        return svg.as_svg(figure, f"{title}; medians: {', '.join(medians)}")
