"""Which split and class each file of a folder or zip has, told by where it lies."""

from __future__ import annotations

import functools
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from fer_ray.data.sources.files import Entry, Source, junk_reason
from fer_ray.errors import UserError

SPLIT_FOLDERS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
"""The folders that hold a split, and the split's name."""

EXPECTED = (
    "expected train/<class>/<file> and validation/<class>/<file>, or <class>/<file>, "
    "at the top or below one or two folders"
)
"""What a folder or zip has to look like, for messages."""

_MAX_LEVELS_ABOVE = 2
_MOST_FOLDERS = 10_000
"""So many different folders at one level are no classes; bounds the memory of looking."""
_STRAYS = 0.1
"""Fewer files than this share of those below them are strays, and their folders no classes."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the files of a source are told apart."""

    top: tuple[str, ...]
    """The folders above the splits, or above the classes where there are no splits."""
    has_splits: bool
    """Whether ``<split>/<class>/<file>``; else ``<class>/<file>``, and all is train."""


@dataclass(kw_only=True)
class _Classes:
    """What may be classes: the folders below one folder that hold files themselves."""

    names: set[str] = field(default_factory=set)
    """Their names; some, when there are very many."""
    num_files: int = 0
    """How many files lie in them."""


@dataclass(kw_only=True)
class _Seen:
    """What one look through the paths has found, in bounded memory."""

    num_files: int = 0
    folders: dict[str, _Classes | None] = field(default_factory=dict)
    """Those whose files have been looked at, with where they count; some of very many."""
    refused: Counter[str] = field(default_factory=Counter)
    """Files that cannot be read at all, by reason."""
    train_tops: set[tuple[str, ...]] = field(default_factory=set)
    """The folders above each ``train``."""
    other_split: str = ""
    """A split's folder that is not train."""
    classes: list[dict[tuple[str, ...], _Classes]] = field(
        default_factory=lambda: [{} for _ in range(_MAX_LEVELS_ABOVE + 1)]
    )
    """At each depth what may be classes, by the folders above them; `_MOST_FOLDERS`."""
    num_classes: list[int] = field(default_factory=lambda: [0] * (_MAX_LEVELS_ABOVE + 1))

    def take(self, path: str) -> None:
        """Notes one path."""
        self.num_files += 1
        folder = path.rpartition("/")[0]
        if folder in self.folders:  # another file of it is one more, and says nothing else
            classes = self.folders[folder]
        else:
            classes = self._look(tuple(folder.split("/")) if folder else ())
            if len(self.folders) < _MOST_FOLDERS:
                self.folders[folder] = classes
        if classes:
            classes.num_files += 1

    def _look(self, folders: tuple[str, ...]) -> _Classes | None:
        """Notes a file's folders; returns what it counts for."""
        for depth, name in enumerate(folders[: _MAX_LEVELS_ABOVE + 1]):
            if name == "train":
                self.train_tops.add(folders[:depth])
                return None
            if name in SPLIT_FOLDERS:
                self.other_split = self.other_split or "/".join(folders[: depth + 1])
        depth = len(folders) - 1
        if not 0 <= depth <= _MAX_LEVELS_ABOVE:
            return None
        if self.num_classes[depth] >= _MOST_FOLDERS:
            return self.classes[depth].get(folders[:depth])
        classes = self.classes[depth].setdefault(folders[:depth], _Classes())
        self.num_classes[depth] += folders[depth] not in classes.names
        classes.names.add(folders[depth])
        return classes

    def _is_class(self, top: tuple[str, ...], num_files: int) -> bool:
        """Whether a folder is itself one of several classes, and not of a few strays."""
        around = self.classes[len(top) - 1].get(top[:-1]) if top else None
        if around is None or len(around.names) < 2 or top[-1] not in around.names:
            return False
        return around.num_files > _STRAYS * num_files

    def tops(self) -> list[tuple[str, ...]]:
        """What lies above two class folders or more, at the depth where these hold most files.

        A few pictures beside a folder of classes are no classes. Of equal depths it is the least.
        """
        best: dict[tuple[str, ...], int] = {}
        for by_top in self.classes:
            found = {
                top: one.num_files
                for top, one in by_top.items()
                if len(one.names) > 1 and not self._is_class(top, one.num_files)
            }
            if sum(found.values()) > sum(best.values()):
                best = found
        return sorted(best)


def find(source: Source) -> Layout:
    """Looks through all paths of a source for its layout.

    Raises:
        UserError: when it has none that is known, with what was expected and what was found.
    """
    seen = _Seen()
    for entry in source.entries():
        if entry.reason:
            seen.refused[entry.reason] += 1
        elif not junk_reason(entry.path):
            seen.take(entry.path)
    if seen.train_tops:
        return Layout(top=_one_top(source.path, seen.train_tops), has_splits=True)
    tops = seen.tops()
    if len(tops) == 1 and not seen.other_split:
        return Layout(top=tops[0], has_splits=False)
    raise UserError(f"--source: {source.path} has no train images: {EXPECTED}; {_found(seen)}")


def located(source: Source, layout: Layout) -> Iterator[Entry]:
    """Every file of a source with its split and label, or with the reason why it has none.

    Only ``test`` may hold files without a class folder: their label is unknown.
    """
    known = functools.lru_cache(_MOST_FOLDERS)(lambda folder: locate(f"{folder}/_", layout))
    for entry in source.entries():
        path, size, at = entry.path, entry.size, entry.at
        if entry.reason:
            yield entry
        elif reason := junk_reason(path):
            yield Entry(path=path, size=size, at=at, reason=reason)
        else:
            folder = path.rpartition("/")[0]
            split, label, reason = known(folder) if folder else locate(path, layout)
            yield Entry(
                path=path, size=size, at=at, split=split, label=label, reason=reason or None
            )


def locate(path: str, layout: Layout) -> tuple[str | None, str | None, str]:
    """The split and label of a path, or (None, None, the reason why it has none)."""
    parts = tuple(path.split("/"))
    depth = len(layout.top)
    inside = len(parts) > depth + 1 and parts[:depth] == layout.top
    if not layout.has_splits:
        if not inside:
            return None, None, "not in a class folder"
        if len(parts) > depth + 2:
            return None, None, "deeper than class/file"
        return "train", _label(parts[depth]), ""
    split = SPLIT_FOLDERS.get(parts[depth]) if inside else None
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
    """A class folder's name; composed, as a Mac would not write it (Unicode's NFC)."""
    return unicodedata.normalize("NFC", folder)


def _one_top(path: str, found: set[tuple[str, ...]]) -> tuple[str, ...]:
    """The folders above ``train``: the fewest."""
    fewest = min(map(len, found))
    tops = sorted(top for top in found if len(top) == fewest)
    if len(tops) > 1:
        names = " and ".join("/".join((*top, "train")) for top in tops[:2])
        raise UserError(f"--source: {path} has more than one train folder: {names}")
    return tops[0]


def _found(seen: _Seen) -> str:
    """What a source without a layout has instead."""
    if not seen.num_files:
        refused = [f"{count:,} x {reason}" for reason, count in seen.refused.most_common(3)]
        return f"found {', '.join(refused) or 'no files that may be pictures'}"
    if seen.other_split:
        return f"found {seen.other_split} but no train"
    if tops := seen.tops():
        places = ", ".join("/".join(top) for top in tops[:3])
        return f"found class folders in several places: {places}"
    for by_top in seen.classes:
        for top, one in by_top.items():
            name = "/".join((*top, *one.names))
            return f"found {seen.num_files:,} files, one class folder: {name}"
    return f"found {seen.num_files:,} files, none in a class folder"
