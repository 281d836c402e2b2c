"""Pictures with labels, whatever they lie in: what `preparation` makes a dataset of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from fer_ray import storage
from fer_ray.data import decoding
from fer_ray.data.sources import Entry, Source, kaggle, layouts, open_files, pixels, tables
from fer_ray.errors import UserError

KINDS = "a folder, a .zip, a .csv or .parquet table, fer2013.csv, kaggle or synthetic"
"""What ``--source`` may name."""


class Pictures(Protocol):
    """Where the rows come from; sent to workers, so cheap to pickle."""

    @property
    def has_splits(self) -> bool:
        """Whether the source says which split a picture belongs to; else all is train."""

    def entries(self) -> Iterator[Entry]:
        """Every file seen: with split and label, or with the reason why it is no row."""

    def grey(self, path: str, at: bytes) -> np.ndarray:
        """One picture, (H, W) uint8; raises `ReadError` or `DecodeError`."""

    def describe(self, listing: Iterator[tuple[str, int]]) -> dict[str, Any]:
        """What ``dataset.json`` says about the source; `listing` as in `Source.fingerprint`."""


class _Files:
    """Picture files, wherever they are."""

    def __init__(self, source: Source, given: str) -> None:
        self._source, self._given = source, given

    def grey(self, path: str, at: bytes) -> np.ndarray:
        """See `Pictures.grey`."""
        return decoding.decode(self._source.read(path, at))

    def describe(self, listing: Iterator[tuple[str, int]]) -> dict[str, Any]:
        """See `Pictures.describe`."""
        return {
            "kind": self._source.kind,
            "path": self._given,
            "sha256": self._source.fingerprint(listing),
        }


class FilePictures(_Files):
    """The picture files of a folder or zip, told apart by where they lie."""

    def __init__(self, source: Source, given: str) -> None:
        """Looks for the layout.

        Args:
            source: where the files are.
            given: the place as the user named it.

        Raises:
            UserError: when there is none that is known.
        """
        super().__init__(source, given)
        self._layout = layouts.find(source)

    @property
    def has_splits(self) -> bool:
        """See `Pictures.has_splits`."""
        return self._layout.has_splits

    def entries(self) -> Iterator[Entry]:
        """See `Pictures.entries`."""
        return layouts.located(self._source, self._layout)


class TablePictures(_Files):
    """The picture files that a table names."""

    _source: tables.TableSource

    @property
    def has_splits(self) -> bool:
        """See `Pictures.has_splits`."""
        return self._source.has_splits

    def entries(self) -> Iterator[Entry]:
        """See `Pictures.entries`."""
        return self._source.entries()


def open_pictures(given: str) -> Pictures:
    """Opens whatever ``--source`` names, but for the synthetic one.

    Raises:
        UserError: when it is not there, or nothing that is known.
    """
    if given == "kaggle":
        return FilePictures(open_files(kaggle.download()), given)
    path = storage.absolute(given)
    name = storage.name_of(path).lower()
    if name.endswith((".csv", ".parquet")) and not storage.is_directory(path):
        return _table(path, given)
    try:
        return FilePictures(open_files(path), given)
    except UserError as error:
        if str(error).endswith("neither a folder nor a .zip"):
            raise UserError(f"--source: {path} is none of {KINDS}") from error
        raise


def _table(path: str, given: str) -> Pictures:
    if not storage.exists(path):
        raise UserError(f"--source: {path} does not exist")
    names = tables.columns_of(path)
    if not tables.is_parquet(path) and set(names) >= pixels.COLUMNS:
        return pixels.PixelRows(path, given)
    if set(names) >= set(tables.COLUMNS):
        return TablePictures(tables.TableSource(path), given)
    raise UserError(
        f"--source: {path} has the columns {', '.join(names)[:200] or '(none)'}: expected "
        f"{' and '.join(tables.COLUMNS)}, and split if there is one, or those of fer2013.csv: "
        "emotion, pixels, Usage"
    )
