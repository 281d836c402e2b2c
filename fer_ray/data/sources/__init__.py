"""Where pictures come from: folders, zips and tables, on any file system that pyarrow reads.

A source lists its files once, in the driver and one after the other, so that memory does not
grow with their number. It is cheap to send to workers, where each reads its own files by what
their entries say.
"""

from __future__ import annotations

from fer_ray import storage
from fer_ray.data.sources.files import NOT_THERE, Entry, ReadError, Source, junk_reason
from fer_ray.data.sources.folders import FolderSource
from fer_ray.data.sources.zips import ZipSource
from fer_ray.errors import UserError, first_line

__all__ = ["NOT_THERE", "Entry", "ReadError", "Source", "first_line", "list_files", "open_files"]


def open_files(path: str, *, flag: str = "--source") -> Source:
    """Opens a folder or a zip.

    Args:
        path: local path or URI.
        flag: who named it, for messages.

    Raises:
        UserError: when it is not there, or neither a folder nor a zip.
    """
    path = storage.absolute(path)
    if storage.is_directory(path):
        return FolderSource(path)
    if not storage.exists(path):
        raise UserError(f"{flag}: {path} does not exist")
    if not storage.name_of(path).lower().endswith(".zip"):
        raise UserError(f"{flag}: {path} is neither a folder nor a .zip")
    return ZipSource(path)


REPEATED = "another file or row has the same path"
"""The reason of the second and further entries of one path."""
RELABELLED = f"{REPEATED} and another label"
"""The same, where a table contradicts its first row."""


def list_files(source: Source) -> tuple[list[Entry], list[Entry]]:
    """Every file of a source in any layout, those of the operating system set apart.

    Returns:
        The files that may be pictures, ordered by path, of equal paths the first; some with the
        reason why they cannot be read. And the others, each with the reason.
    """
    files: dict[str, Entry] = {}
    others: list[Entry] = []
    for entry in source.entries():
        known = files.get(entry.path)
        if reason := junk_reason(entry.path):
            others.append(Entry(path=entry.path, reason=reason))
        elif known is None:
            files[entry.path] = entry
        elif known.reason and not entry.reason:  # what can be read has the name
            others.append(known)
            files[entry.path] = entry
        else:
            others.append(Entry(path=entry.path, reason=entry.reason or REPEATED))
    return [files[path] for path in sorted(files)], sorted(others, key=lambda one: one.path)
