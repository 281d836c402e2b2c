"""A page of what is in a prepared dataset: samples, balance, light, the same picture twice."""

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
from fer_ray.preparation.inventory import KEPT, Ledger
from fer_ray.reporting import html, svg

SAMPLES = 12
"""Pictures of each class."""
GROUPS = 12
"""Groups of the same picture that are shown: those with conflicting labels first."""
MEMBERS = 4
"""Pictures of each group."""
_BINS = 32


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One picture of the page."""

    image_id: str
    split: str
    label: str
    picture: str
    """PNG as a data URI."""


def check(path: str) -> str:
    """The absolute place of the page.

    Raises:
        UserError: when it cannot be written.
    """
    path = storage.absolute(path)
    if storage.is_directory(path):
        raise UserError(f"--preview: {path} is a folder; a file's name is wanted")
    if not storage.name_of(path).lower().endswith((".html", ".htm")):
        raise UserError(f"--preview: {path} does not end in .html")
    if not storage.is_uri(path) and not Path(path).parent.is_dir():
        raise UserError(f"--preview: there is no folder {Path(path).parent}")
    if not storage.is_uri(path) and not os.access(Path(path).parent, os.W_OK):
        raise UserError(f"--preview: {Path(path).parent} cannot be written to")
    return path


def writer(path: str, log: Callable[[str], None]) -> Callable[[str, Ledger, dict[str, Any]], None]:
    """What `preparation.prepare` calls at its end, to write the page.

    Args:
        path: of the page, from `check`.
        log: receives a line with it.
    """

    def write(folder: str, ledger: Ledger, info: dict[str, Any]) -> None:
        storage.write_bytes(path, render(folder, ledger, info).encode())
        log(f"preview: {path}")

    return write


def render(folder: str, ledger: Ledger, info: dict[str, Any]) -> str:
    """The page as HTML, one file without links.

    Args:
        folder: the prepared dataset.
        ledger: of its preparation.
        info: the value of ``dataset.json``.
    """
    splits, labels = list(info["splits"]), info["labels"]
    samples = {label: _sample(ledger, label) for label in labels}
    groups = _groups(ledger)
    wanted = [row for rows in (*samples.values(), *groups) for row in rows]
    found = _pictures(folder, wanted, info["splits"])
    pixels = info["image_size"] ** 2
    brightness = f"pixel_sum / {pixels * 255.0}"
    # the variance of nearly constant images may come out just below zero
    contrast = (
        f"sqrt(greatest(pixel_sum_squares / {pixels}.0 - pow(pixel_sum / {pixels}.0, 2), 0)) / 255"
    )
    return html.render(
        "preview.html.j2",
        {},
        info=info,
        splits=splits,
        rows=sum(split["rows"] for split in info["splits"].values()),
        balance=_balance(info["splits"], labels),
        brightness=_histogram(ledger, splits, brightness, 1.0, "brightness: mean of the pixels"),
        contrast=_histogram(ledger, splits, contrast, 0.5, "contrast: deviation of the pixels"),
        samples={label: _shown(rows, found) for label, rows in samples.items()},
        groups=[_shown(rows, found) for rows in groups],
        reasons=ledger.reasons(),
    )


_Row = tuple[str, str, str | None]
"""Id, split and label."""


def _sample(ledger: Ledger, label: str) -> list[_Row]:
    """Some pictures of a class, all over it; the same at every call."""
    query = (
        f"SELECT path, split, label FROM {KEPT} AND label = ? ORDER BY row_sha256 LIMIT {SAMPLES}"
    )
    return list(ledger.rows(query, label))


def _groups(ledger: Ledger) -> list[list[_Row]]:
    """Some groups of the same picture, conflicting ones first, then those across splits."""
    chosen = ledger.rows(
        "SELECT pixel_sha256 FROM twins ORDER BY conflicting DESC, num_splits DESC, pixel_sha256 "
        f"LIMIT {GROUPS}"
    )
    query = (
        f"SELECT path, split, label FROM {KEPT} AND pixel_sha256 = ? ORDER BY path LIMIT {MEMBERS}"
    )
    return [list(ledger.rows(query, picture)) for (picture,) in list(chosen)]


def _pictures(
    folder: str, rows: Sequence[_Row], splits: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """(H, W) uint8 of the images asked for, by id; of the parts only the row groups they are in."""
    fs, root = storage.filesystem(folder)
    found = {}
    for split in splits:
        ids = sorted({path for path, where, _ in rows if where == split})
        if not ids:
            continue
        files = [storage.join(root, file) for file in splits[split]["files"]]
        table = pads.dataset(files, schema=dataset.SCHEMA, filesystem=fs).to_table(
            columns=["image_id", "image", "height", "width"], filter=pc.field("image_id").isin(ids)
        )
        for row in table.to_pylist():
            shape = row["height"], row["width"]
            found[row["image_id"]] = np.frombuffer(row["image"], np.uint8).reshape(shape)
    return found


def _shown(rows: Sequence[_Row], found: Mapping[str, np.ndarray]) -> list[Shown]:
    return [
        Shown(
            image_id=path,
            split=split,
            label=label or "no label",
            picture=html.png_data_uri(found[path]),
        )
        for path, split, label in rows
    ]


def _balance(splits: Mapping[str, Any], labels: Sequence[str]) -> str:
    """Each class's share of its split, splits side by side."""
    thickness = 0.8 / len(splits)
    height_in = 0.8 + len(labels) * (0.15 + 0.17 * len(splits)) + 0.25 * len(splits)
    with svg.drawn(height_in) as (figure, axes):
        for row, (name, split) in enumerate(splits.items()):
            total = max(sum(split["classes"].values()), 1)
            shares = [100 * split["classes"][label] / total for label in labels]
            places = np.arange(len(labels)) + (row + 0.5) * thickness - 0.4
            colour = svg.series_colour(row)
            axes.barh(places, shares, height=0.9 * thickness, color=colour, label=name)
        axes.set_yticks(range(len(labels)), [svg.short(label, 18) for label in labels])
        axes.invert_yaxis()
        axes.set_xlabel("share of the split's labelled images, %")
        axes.grid(axis="x")
        svg.legend(figure, len(splits))
        train = splits["train"]["classes"]
        words = ", ".join(f"{label} {train[label]:,}" for label in labels)
        return svg.as_svg(figure, f"Class balance; images of train: {words}")


def _histogram(
    ledger: Ledger, splits: Sequence[str], measure: str, highest: float, title: str
) -> str:
    """How a measure of the images, 0 to `highest`, is distributed in each split."""
    edges = np.linspace(0, highest, _BINS + 1)
    query = (
        f"SELECT least(floor(({measure}) / {highest} * {_BINS}), {_BINS - 1})::INT AS bin, "
        f"count(*) FROM {KEPT} AND split = ? GROUP BY bin"
    )
    with svg.drawn(2.9) as (figure, axes):
        medians = []
        for number, split in enumerate(splits):
            counts = np.zeros(_BINS)
            for path, count in ledger.rows(query, split):
                counts[path] = count
            shares = 100 * counts / counts.sum()
            colour = svg.series_colour(number)
            axes.stairs(shares, edges, color=colour, linewidth=2, label=split)
            (median,) = ledger.one(f"SELECT median({measure}) FROM {KEPT} AND split = ?", split)
            medians.append(f"{split} {median:.3f}")
        axes.set_xlabel(f"{title}, of 1.0")
        axes.set_ylabel("images, %")
        axes.set_xlim(0, highest)
        axes.set_ylim(bottom=0)
        axes.grid()
        svg.legend(figure, len(splits))
        return svg.as_svg(figure, f"{title}; medians: {', '.join(medians)}")
