"""Sources of labelled images: what every type of source provides, and the registry of types.

A type of source is one module in `fer_ray.data.sources`, or a module of a plugin, that registers
a `SourceType`. Its name then works in ``--source``, its description appears in ``--help`` and in
messages, and ``dataset.json`` names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from fer_ray import storage
from fer_ray.data.sources.files import Entry, FileSource, tables_of
from fer_ray.errors import UserError
from fer_ray.registry import Registry


class ImageSource(Protocol):
    """Labelled images, wherever they come from.

    It is pickled and sent to workers, so its state has to be small. A worker reads only the
    images whose entries it is given.
    """

    @property
    def has_splits(self) -> bool:
        """Whether the source assigns images to splits; otherwise all of them are train."""

    def entries(self) -> Iterator[Entry]:
        """Lists every file or row: with its split and label, or with the reason why it has none.

        Listed one by one, so that memory does not grow with the number of images.

        Raises:
            UserError: when the source cannot be listed.
        """

    def grey(self, path: str, at: bytes) -> np.ndarray:
        """Returns one image as grey pixels, (H, W) uint8.

        Args:
            path: the entry's path.
            at: the entry's location.

        Raises:
            ReadError: when the image cannot be read.
            DecodeError: when the image cannot be decoded.
            UserError: when the whole source cannot be reached.
        """

    def describe(self, listing: Iterator[tuple[str, int]]) -> dict[str, Any]:
        """Returns what ``dataset.json`` records about the source, beside the name of its type.

        Args:
            listing: paths and sizes of all entries, ordered by path.
        """


@runtime_checkable
class ListsTables(Protocol):
    """What an `ImageSource` may offer in addition, where millions of entries would take long."""

    def tables(self) -> Iterator[pa.Table]:
        """Lists what `entries` lists, in tables with the columns of `sources.files.ENTRIES`."""


def list_tables(images: ImageSource) -> Iterator[pa.Table]:
    """Lists a source in tables with the columns of `sources.files.ENTRIES`.

    Raises:
        UserError: when the source cannot be listed.
    """
    return images.tables() if isinstance(images, ListsTables) else tables_of(images.entries())


MAX_GENERATED = 10_000_000
"""Largest number of images that a source generates: each is listed on a disk first."""


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Settings of a preparation that some types of sources need."""

    image_size: int = 48
    """Height and width of the prepared images, in pixels."""
    num_images: int | None = None
    """How many images to generate; None for the source's default. Only for generated images."""
    seed: int = 0
    """Seed of generated images."""


@dataclass(frozen=True, kw_only=True)
class SourceType:
    """A type of source, registered in `SOURCES` under the name that ``dataset.json`` records."""

    description: str
    """What the user gives, as a noun phrase for ``--help`` and messages: "a .zip"."""
    recognizes: Callable[[str], bool]
    """Whether a value of ``--source`` names a source of this type."""
    open: Callable[[str, SourceOptions], ImageSource]
    """Opens a source that `recognizes` accepts; raises `UserError` when it is not usable."""
    open_files: Callable[[str], FileSource] | None = None
    """Opens the plain files of an absolute path, for ``predict --images``; None if there are
    none."""
    precedence: int = 0
    """Types with a higher value are asked first whether they recognize a source: for types that
    look into a file or folder which another type recognizes by its name."""
    is_path: bool = True
    """Whether the value of ``--source`` is a path or URI, and not just a name."""
    is_generated: bool = False
    """Whether the images are generated, so that ``--num-images`` applies."""


SOURCES: Registry[SourceType] = Registry(
    "--source", "fer_ray.data.sources", order=lambda name, _: name
)
"""All types of sources."""


def describe_types() -> str:
    """Returns the descriptions of all types, for ``--help`` and messages."""
    return "; ".join(source_type.description for _, source_type in SOURCES.items())


def find_type(source: str) -> str:
    """Returns the name of the type that recognizes a value of ``--source``.

    A type of exactly this name is asked first, then the others by their precedence.

    Raises:
        UserError: when no type does.
    """
    by_precedence = sorted(SOURCES.names, key=lambda name: -SOURCES[name].precedence)
    for name in sorted(by_precedence, key=lambda name: name != source):
        if SOURCES[name].recognizes(source):
            return name
    raise _unknown_source("--source", source, SOURCES.names)


def open_files(path: str) -> FileSource:
    """Opens the files that ``--images`` names, whatever their layout.

    Args:
        path: local path or URI.

    Raises:
        UserError: when the path does not exist, or is of no type that consists of files.
    """
    path = storage.absolute(path)
    with_files = [name for name, source_type in SOURCES.items() if source_type.open_files]
    for name in with_files:
        source_type = SOURCES[name]
        if source_type.open_files and source_type.recognizes(path):
            return source_type.open_files(path)
    raise _unknown_source("--images", path, with_files)


def _unknown_source(flag: str, source: str, names: Iterable[str]) -> UserError:
    path = storage.absolute(source)
    if not storage.exists(path):
        return UserError(f"{flag}: {path} does not exist")
    expected = "; ".join(SOURCES[name].description for name in names)
    return UserError(f"{flag}: {path} is not a known type of source; expected: {expected}")
