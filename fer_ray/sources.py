"""Where pictures come from: a folder or a zip, on any file system that pyarrow reads.

A source lists its files once, in the driver, and is cheap to send to workers, where each opens
it again and reads its own files; a zip is read in place, never unpacked.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from fer_ray import storage
from fer_ray.errors import UserError

MAX_FILE_BYTES = 64 * 2**20
"""The largest file that is read: above, it is not a crop of a face, or a zip bomb."""

SPLIT_FOLDERS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
"""The folders that hold a split, and the split's name."""

_MAX_LEVELS_ABOVE = 2
_SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini"})


class ReadError(Exception):
    """One file of a source that cannot be read, with the reason in plain words."""


@dataclass(frozen=True, kw_only=True, order=True)
class Entry:
    """One file of a source."""

    path: str
    """Path inside the source, with ``/`` between the components; unique among the entries."""
    size: int
    """Bytes, unpacked."""


@dataclass(frozen=True, kw_only=True, order=True)
class Rejected:
    """One file that does not become a row."""

    path: str
    """Path inside the source, as in `Entry`."""
    reason: str
    """Why, in plain words."""


class Source:
    """The files of a folder or zip. Made by `open_source`."""

    kind: str
    """``folder`` or ``zip``."""

    def __init__(self, place: str) -> None:
        self.place = place

    @cached_property
    def entries(self) -> list[Entry]:
        """Every file, ordered by path; listed at the first use, not sent to workers."""
        raise NotImplementedError

    @cached_property
    def unreadable(self) -> list[Rejected]:
        """What is there but cannot be read by a path: it is not among the entries."""
        raise NotImplementedError

    def read(self, path: str) -> bytes:
        """One file's content.

        Raises:
            ReadError: for whatever prevents it, with the reason.
            UserError: when the whole source is not there.
        """
        raise NotImplementedError

    def fingerprint(self) -> str:
        """SHA-256 of a zip's bytes, or of a folder's listing (paths and sizes)."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {"place": self.place}


class FolderSource(Source):
    """The files below a folder."""

    kind = "folder"

    @property
    def entries(self) -> list[Entry]:
        """Every file below the folder, ordered by path."""
        return self._listing[0]

    @property
    def unreadable(self) -> list[Rejected]:
        """Pipes, broken links and names that are not UTF-8, ordered by path."""
        return self._listing[1]

    def read(self, path: str) -> bytes:
        """One file's content; see `Source.read`."""
        fs, root = self._filesystem
        try:
            with fs.open_input_file(f"{root}/{path}") as file:
                _check_size(file.size())
                return file.read()
        except (OSError, pa.ArrowException) as error:
            if not storage.is_directory(self.place):
                raise UserError(
                    f"--source: {self.place} is gone, or not on all machines"
                ) from error
            raise ReadError(f"cannot be read: {_first(error)}") from error

    def fingerprint(self) -> str:
        """Hash of the listing: one line a file, path, tab and size."""
        lines = "".join(f"{entry.path}\t{entry.size}\n" for entry in self.entries)
        return hashlib.sha256(lines.encode()).hexdigest()

    @cached_property
    def _listing(self) -> tuple[list[Entry], list[Rejected]]:
        fs, root = self._filesystem
        try:
            if isinstance(fs, pafs.LocalFileSystem):
                entries, rejected = _walk(root)
                return sorted(entries), sorted(rejected)
            infos = fs.get_file_info(pafs.FileSelector(root, recursive=True))
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"--source: {self.place} cannot be listed: {_first(error)}") from error
        files = (info for info in infos if info.type != pafs.FileType.Directory)
        return sorted(
            Entry(path=info.path[len(root) :].strip("/"), size=info.size) for info in files
        ), []

    @cached_property
    def _filesystem(self) -> tuple[pafs.FileSystem, str]:
        fs, root = storage.filesystem(self.place)
        return fs, root.rstrip("/")


class ZipSource(Source):
    """The files of a zip, read where they lie."""

    kind = "zip"

    @cached_property
    def entries(self) -> list[Entry]:
        """Every file of the zip, ordered by path; of equal paths the first."""
        return sorted(Entry(path=path, size=info.file_size) for path, info in self._infos.items())

    @cached_property
    def unreadable(self) -> list[Rejected]:
        """The second and further files of the same path: a zip may hold several."""
        counts = Counter(_zip_path(info) for info in self._zip.infolist() if not info.is_dir())
        reason = "another file of the zip has the same path"
        return [
            Rejected(path=path, reason=reason)
            for path, count in sorted(counts.items())
            for _ in range(count - 1)
        ]

    def read(self, path: str) -> bytes:
        """One file's content; see `Source.read`."""
        info = self._infos.get(path)
        if info is None:
            raise ReadError("the zip has no such file")
        _check_size(info.file_size)
        try:
            return self._zip.read(info)
        except Exception as error:  # damaged, encrypted, unknown compression: many types
            raise ReadError(f"cannot be unpacked: {_first(error)}") from error

    def fingerprint(self) -> str:
        """Hash of the zip's bytes."""
        fs, path = storage.filesystem(self.place)
        digest = hashlib.sha256()
        with fs.open_input_stream(path) as stream:
            while block := stream.read(2**22):
                digest.update(block)
        return digest.hexdigest()

    @cached_property
    def _zip(self) -> zipfile.ZipFile:
        fs, path = storage.filesystem(self.place)
        try:
            return zipfile.ZipFile(fs.open_input_file(path))
        except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
            raise UserError(
                f"--source: {self.place} is not a readable zip: {_first(error)}"
            ) from error

    @cached_property
    def _infos(self) -> dict[str, zipfile.ZipInfo]:
        infos: dict[str, zipfile.ZipInfo] = {}
        for info in self._zip.infolist():
            if not info.is_dir():
                infos.setdefault(_zip_path(info), info)
        return infos


def open_source(place: str) -> Source:
    """Opens a folder or a zip.

    Args:
        place: local path or URI.

    Raises:
        UserError: when it is not there, or neither a folder nor a zip.
    """
    place = storage.absolute(place)
    if storage.is_directory(place):
        return FolderSource(place)
    if not storage.exists(place):
        raise UserError(f"--source: {place} does not exist")
    if not place.lower().endswith(".zip"):
        raise UserError(f"--source: {place} is neither a folder nor a .zip")
    return ZipSource(place)


def list_files(source: Source) -> tuple[list[Entry], list[Rejected]]:
    """Every file of a source in any layout, those of the operating system set apart.

    Returns:
        The files that may be pictures, ordered by path, and the others with the reason.
    """
    files, rejected = [], list(source.unreadable)
    for entry in source.entries:
        if reason := junk_reason(entry.path):
            rejected.append(Rejected(path=entry.path, reason=reason))
        else:
            files.append(entry)
    return files, sorted(rejected)


def junk_reason(path: str) -> str | None:
    """Why a file is not a picture at all, judged by its path; None where it may be one."""
    parts = path.split("/")
    if "__MACOSX" in parts[:-1]:
        return "a file of the operating system"
    if parts[-1].lower() in _SYSTEM_FILES or parts[-1] == ".DS_Store":
        return "a file of the operating system"
    if any(part.startswith(".") for part in parts):
        return "a hidden file"
    return None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A source's files told apart by where they lie: split, class, file."""

    labels: tuple[str, ...]
    """The class folders of ``train``, alphabetical."""
    splits: dict[str, list[tuple[str, str | None]]]
    """For each split its files, path and label (None where unknown), ordered by path."""
    rejected: list[Rejected]
    """The files that lie elsewhere, ordered by path."""


def labelled_layout(source: Source) -> Layout:
    """Reads ``<split>/<class>/<file>``, at the top or below one or two folders.

    Only ``test`` may hold files without a class folder: their label is unknown.

    Raises:
        UserError: when there is no ``train`` with class folders, or a class folder elsewhere
            that ``train`` lacks.
    """
    files, rejected = list_files(source)
    top = _top_folder(source.place, files)
    splits: dict[str, list[tuple[str, str | None]]] = {}
    for entry in files:
        split, label, reason = _locate(entry.path, top)
        if split is None:
            rejected.append(Rejected(path=entry.path, reason=reason))
        else:
            splits.setdefault(split, []).append((entry.path, label))
    labels = sorted({label for _, label in splits.get("train", []) if label is not None})
    if not labels:
        raise UserError(f"--source: {source.place}: train holds no class folder with images")
    for split, rows in splits.items():
        strange = sorted({label for _, label in rows if label is not None} - set(labels))
        if strange:
            raise UserError(
                f"--source: {source.place}: {split} has class folders that train lacks: "
                f"{', '.join(strange)} (train has {', '.join(labels)})"
            )
    return Layout(labels=tuple(labels), splits=splits, rejected=sorted(rejected))


def _walk(root: str) -> tuple[list[Entry], list[Rejected]]:
    """Every file below a local folder; pyarrow's own listing omits broken links in silence."""

    def fail(error: OSError) -> None:
        raise error

    entries, rejected = [], []
    for folder, below, names in os.walk(root or "/", followlinks=True, onerror=fail):
        # a link to a folder above would lead round in circles
        real = os.path.realpath(folder)
        below[:] = [
            name for name in below if not _leads_up(os.path.realpath(f"{folder}/{name}"), real)
        ]
        for name in names:
            file = f"{folder}/{name}"
            path = file[len(root) :].strip("/")
            shown = os.fsencode(path).decode(errors="backslashreplace")
            if shown != path:
                rejected.append(Rejected(path=shown, reason="the file's name is not UTF-8"))
            elif not Path(file).is_file():
                rejected.append(Rejected(path=path, reason="a broken link or not a plain file"))
            else:
                entries.append(Entry(path=path, size=Path(file).stat().st_size))
    return entries, rejected


def _leads_up(target: str, folder: str) -> bool:
    return folder == target or folder.startswith(target.rstrip("/") + "/")


def _top_folder(place: str, files: Iterable[Entry]) -> tuple[str, ...]:
    """The folders above ``train``: the fewest, at most two."""
    found = set()
    for entry in files:
        folders = PurePosixPath(entry.path).parts[:-1]
        for depth in range(min(len(folders), _MAX_LEVELS_ABOVE + 1)):
            if folders[depth] == "train":
                found.add(folders[:depth])
                break
    fewest = min(map(len, found), default=0)
    tops = sorted(top for top in found if len(top) == fewest)
    if not tops:
        raise UserError(
            f"--source: {place} has no train images: expected train/<class>/<file>, "
            "at the top or below images/"
        )
    if len(tops) > 1:
        names = " and ".join("/".join((*top, "train")) for top in tops[:2])
        raise UserError(f"--source: {place} has more than one train folder: {names}")
    return tops[0]


def _locate(path: str, top: tuple[str, ...]) -> tuple[str | None, str | None, str]:
    """The split and label of a path, or (None, None, the reason why it has none)."""
    parts = tuple(path.split("/"))
    depth = len(top)
    inside = len(parts) > depth + 1 and parts[:depth] == top
    split = SPLIT_FOLDERS.get(parts[depth]) if inside else None
    if split is None:
        return None, None, "not below a train, validation or test folder"
    below = parts[depth + 1 :]
    if len(below) == 2:
        return split, below[0], ""
    if len(below) > 2:
        return None, None, "deeper than split/class/file"
    if split == "test":
        return split, None, ""
    return None, None, "not in a class folder"


def _zip_path(info: zipfile.ZipInfo) -> str:
    """An entry's path with ``/``: some Windows programs write the other slash."""
    parts = info.filename.replace("\\", "/").split("/")
    return "/".join(part for part in parts if part not in ("", "."))


def _check_size(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise ReadError(f"{size:,} bytes: larger than {MAX_FILE_BYTES:,}")


def _first(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
