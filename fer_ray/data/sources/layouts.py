"""The layout of a folder or zip: which split and class each file has, according to its path."""

from __future__ import annotations

import functools
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fer_ray.data import decoding
from fer_ray.data.sources.files import (
    ENTRIES,
    Entry,
    FileSource,
    Listing,
    entries_of,
    system_file_reason,
)
from fer_ray.errors import UserError

SPLIT_FOLDERS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
"""Names of folders that hold a split, and the name of that split."""

EXPECTED = (
    "expected train/<class>/<file> and validation/<class>/<file>, or <class>/<file>, "
    "at the top or below one or two folders"
)
"""The layouts that are known, for messages."""

_MAX_LEVELS_ABOVE = 2
_MAX_FOLDERS = 10_000
"""More folders at one level are not recorded, to bound the memory; they are no classes."""
_STRAY_FRACTION = 0.1
"""A folder with fewer files than this fraction of those below its siblings is no class."""

_SYSTEM_FILE = r"(^|/)\.|__MACOSX/|(?i:(^|/)(thumbs\.db|desktop\.ini)$)"
"""Part of every path for which `system_file_reason` has a reason; a regular expression of RE2."""

Top = tuple[str, ...]
"""The names of the folders above the splits or classes."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the splits and classes of a source are."""

    top: Top
    """The folders above the splits, or above the classes where there are no splits."""
    has_splits: bool
    """True for ``<split>/<class>/<file>``; False for ``<class>/<file>``, where all is train."""


class LayoutImageSource:
    """The image files of a folder or zip, as an `ImageSource`."""

    def __init__(self, files: FileSource, source: str, layout: Layout, listing: Listing) -> None:
        """Opened by `open_layout`."""
        self._files, self._source, self._layout = files, source, layout
        self._listing = listing

    @property
    def has_splits(self) -> bool:
        """See `ImageSource.has_splits`."""
        return self._layout.has_splits

    def entries(self) -> Iterator[Entry]:
        """See `ImageSource.entries`."""
        return entries_of(self.tables())

    def tables(self) -> Iterator[pa.Table]:
        """See `image_source.ListsTables`; for the process that opened the source."""
        locate_folder = functools.lru_cache(_MAX_FOLDERS)(
            lambda folder: locate(f"{folder}/_" if folder else "_", self._layout)
        )
        for table in self._listing.tables():
            yield _locate_files(table, locate_folder)

    def grey(self, path: str, at: bytes) -> np.ndarray:
        """See `ImageSource.grey`."""
        return decoding.decode(self._files.read(path, at))

    def describe(self, listing: Iterator[tuple[str, int]]) -> dict[str, Any]:
        """See `ImageSource.describe`."""
        return {"path": self._source, "sha256": self._files.fingerprint(listing)}

    def __getstate__(self) -> dict[str, Any]:  # workers read files, they do not list them
        return {name: value for name, value in vars(self).items() if name != "_listing"}


def open_layout(files: FileSource, source: str) -> LayoutImageSource:
    """Opens files as labelled images, according to their layout; lists them once.

    Args:
        files: the files of a folder or zip.
        source: the value of ``--source``, for ``dataset.json``.

    Raises:
        UserError: when the layout is not known.
    """
    listing = Listing()
    layout = find_layout(files.path, listing.record(files.tables()))
    return LayoutImageSource(files, source, layout, listing)


@dataclass(kw_only=True)
class _Folders:
    """Folders with the same parent that hold files directly: they may be classes."""

    names: set[str] = field(default_factory=set)
    """Their names; not all of them when there are very many."""
    num_files: int = 0
    """Number of files directly in them."""


@dataclass(kw_only=True)
class _TrainFolder:
    """The files of one folder named ``train``."""

    loose: _Folders = field(default_factory=_Folders)
    """Counts the files directly in it."""
    in_classes: _Folders = field(default_factory=_Folders)
    """Counts the files in its class folders."""


@dataclass(kw_only=True)
class _Survey:
    """What one pass over all paths has found, in bounded memory."""

    num_files: int = 0
    counters: dict[str, _Folders | None] = field(default_factory=dict)
    """By folder, where its files are counted; not for all folders when there are very many."""
    unreadable: Counter[str] = field(default_factory=Counter)
    """Number of files that cannot be read, by reason."""
    train: dict[Top, _TrainFolder] = field(default_factory=dict)
    """Every folder named ``train``, by the folders above it."""
    other_split: Top = ()
    """The path of a split's folder that is not ``train``."""
    classes: list[dict[Top, _Folders]] = field(
        default_factory=lambda: [{} for _ in range(_MAX_LEVELS_ABOVE + 1)]
    )
    """At each depth, the folders that may be classes, by the folders above them."""
    num_classes: list[int] = field(default_factory=lambda: [0] * (_MAX_LEVELS_ABOVE + 1))

    def add(self, folder: str, num_files: int) -> None:
        """Records a folder that holds some files directly; it may have been recorded before."""
        self.num_files += num_files
        if folder in self.counters:  # further files of a known folder are only counted
            counter = self.counters[folder]
        else:
            counter = self._add_folder(tuple(folder.split("/")) if folder else ())
            if len(self.counters) < _MAX_FOLDERS:
                self.counters[folder] = counter
        if counter:
            counter.num_files += num_files

    def _add_folder(self, folders: Top) -> _Folders | None:
        """Records the folder of a file; returns where its files are counted."""
        for depth, name in enumerate(folders[: _MAX_LEVELS_ABOVE + 1]):
            if name == "train":
                train = self.train.setdefault(folders[:depth], _TrainFolder())
                below = len(folders) - depth - 1
                return {0: train.loose, 1: train.in_classes}.get(below)
            if name in SPLIT_FOLDERS:
                self.other_split = self.other_split or folders[: depth + 1]
        depth = len(folders) - 1
        if not 0 <= depth <= _MAX_LEVELS_ABOVE:
            return None
        if self.num_classes[depth] >= _MAX_FOLDERS:
            return self.classes[depth].get(folders[:depth])
        classes = self.classes[depth].setdefault(folders[:depth], _Folders())
        self.num_classes[depth] += folders[depth] not in classes.names
        classes.names.add(folders[depth])
        return classes

    def siblings(self, folder: Top) -> list[str]:
        """Returns the names of the folders beside a split's folder that may be classes."""
        beside = self.classes[len(folder) - 1].get(folder[:-1], _Folders())
        return sorted(beside.names - set(SPLIT_FOLDERS))

    def tops(self) -> list[Top]:
        """Returns what lies above two or more class folders, at the depth with the most files.

        Of two depths with equally many files the upper one counts.
        """
        best: dict[Top, int] = {}
        for by_top in self.classes:
            candidates = {
                top: classes.num_files
                for top, classes in by_top.items()
                if len(classes.names) > 1 and not self._is_class(top, classes.num_files)
            }
            if sum(candidates.values()) > sum(best.values()):
                best = candidates
        return sorted(best)

    def _is_class(self, top: Top, num_files: int) -> bool:
        """Whether a folder is itself one of several classes, and these are not a few strays."""
        siblings = self.classes[len(top) - 1].get(top[:-1]) if top else None
        if siblings is None or len(siblings.names) < 2 or top[-1] not in siblings.names:
            return False
        return siblings.num_files > _STRAY_FRACTION * num_files


def find_layout(path: str, tables: Iterable[pa.Table]) -> Layout:
    """Finds the layout of a source from all its paths.

    Args:
        path: of the source, for messages.
        tables: its files, with the columns of `sources.files.ENTRIES`.

    Raises:
        UserError: when the layout is not known, or a folder may be a split as well as a class.
    """
    survey = _Survey()
    for table in tables:
        for count in pc.value_counts(table["reason"].drop_null()):
            survey.unreadable[count["values"].as_py()] += count["counts"].as_py()
        usable = pc.is_null(pc.coalesce(table["reason"], _system_file_reasons(table["path"])))
        folders = pc.value_counts(_folders(table["path"].filter(usable)))
        for count in folders.to_pylist():
            survey.add(count["values"], count["counts"])
    if survey.train:
        top = _only_top(path, survey.train)
        train = survey.train[top]
        if train.loose.num_files > train.in_classes.num_files:
            _check_is_split(path, survey, (*top, "train"))
        return Layout(top=top, has_splits=True)
    if split := survey.other_split:
        beside = survey.classes[len(split) - 1].get(split[:-1], _Folders())
        if split[-1] in beside.names:
            _check_is_split(path, survey, split)
    tops = survey.tops()
    if len(tops) == 1 and not survey.other_split:
        return Layout(top=tops[0], has_splits=False)
    raise UserError(f"--source: {path} has no train images: {EXPECTED}; {_describe(survey)}")


def _check_is_split(path: str, survey: _Survey, folder: Top) -> None:
    """Refuses a folder that has a split's name and holds images itself, as its siblings do."""
    if siblings := survey.siblings(folder):
        raise UserError(
            f"--source: {path}: {'/'.join(folder)} has the name of a split, but holds images like "
            f"the class folders beside it ({', '.join(siblings[:3])}): if it is a class, rename "
            "the folder; if it is a split, put its images into class folders"
        )


def _only_top(path: str, train: dict[Top, _TrainFolder]) -> Top:
    """Returns the shortest of the tops above a ``train`` folder."""
    fewest = min(map(len, train))
    tops = sorted(top for top in train if len(top) == fewest)
    if len(tops) > 1:
        names = " and ".join("/".join((*top, "train")) for top in tops[:2])
        raise UserError(f"--source: {path} has more than one train folder: {names}")
    return tops[0]


def _describe(survey: _Survey) -> str:
    """Describes the files of a source whose layout is not known."""
    if not survey.num_files:
        reasons = survey.unreadable.most_common(3)
        unreadable = ", ".join(f"{count:,} x {reason}" for reason, count in reasons)
        return f"found {unreadable or 'no files that may be images'}"
    if survey.other_split:
        return f"found {'/'.join(survey.other_split)} but no train"
    if tops := survey.tops():
        names = ", ".join("/".join(top) for top in tops[:3])
        return f"found class folders in several places: {names}"
    for by_top in survey.classes:
        for top, classes in by_top.items():
            name = "/".join((*top, *classes.names))
            return f"found {survey.num_files:,} files, one class folder: {name}"
    return f"found {survey.num_files:,} files, none in a class folder"


def _locate_files(
    table: pa.Table, locate_folder: Callable[[str], tuple[str | None, str | None, str]]
) -> pa.Table:
    """Sets each file's split and label, or the reason for having none.

    Only ``test`` may hold files without a class folder; their label is unknown.
    """
    folders = _folders(table["path"]).dictionary_encode()
    located = [locate_folder(folder) for folder in folders.dictionary.to_pylist()]
    split, label, reason = (
        pa.array([values[i] or None for values in located], pa.string()).take(folders.indices)
        for i in range(3)
    )
    given = pc.coalesce(table["reason"], _system_file_reasons(table["path"]))
    nothing = pa.scalar(None, pa.string())
    has_none = pc.is_valid(given)
    columns = {
        "split": pc.if_else(has_none, nothing, split),
        "label": pc.if_else(has_none, nothing, label),
        "reason": pc.coalesce(given, reason),
    }
    return pa.table([columns.get(name, table[name]) for name in ENTRIES.names], schema=ENTRIES)


def _folders(paths: pa.ChunkedArray) -> pa.Array:
    """Returns the folder of each path; ``""`` for a path without one."""
    parts = pc.split_pattern(paths.combine_chunks(), "/", max_splits=1, reverse=True)
    return pc.if_else(pc.equal(pc.list_value_length(parts), 1), "", pc.list_element(parts, 0))


def _system_file_reasons(paths: pa.ChunkedArray) -> pa.Array:
    """Returns `system_file_reason` of each path."""
    candidates = pc.match_substring_regex(paths, _SYSTEM_FILE).combine_chunks()
    reasons = np.full(len(paths), None)
    for index in np.flatnonzero(candidates):
        reasons[index] = system_file_reason(paths[index].as_py())
    return pa.array(reasons, pa.string())


def locate(path: str, layout: Layout) -> tuple[str | None, str | None, str]:
    """Returns a path's split, label and "", or None, None and the reason for having neither."""
    parts = tuple(path.split("/"))
    depth = len(layout.top)
    is_below_top = len(parts) > depth + 1 and parts[:depth] == layout.top
    if not layout.has_splits:
        if not is_below_top:
            return None, None, "not in a class folder"
        if len(parts) > depth + 2:
            return None, None, "deeper than class/file"
        return "train", _label(parts[depth]), ""
    split = SPLIT_FOLDERS.get(parts[depth]) if is_below_top else None
    if split is None:
        return None, None, "not below a train, validation or test folder"
    below = parts[depth + 1 :]
    if len(below) == 2:
        return split, _label(below[0]), ""
    if len(below) > 2:
        return None, None, "deeper than split/class/file"
    if split == "test":
        return split, None, ""
    return None, None, "not in a class folder"


def _label(folder: str) -> str:
    """Returns a class folder's name in Unicode's form NFC; macOS stores names decomposed."""
    return unicodedata.normalize("NFC", folder)
