"""The files of a run's folder, ``<storage>/<run>/``, and of a sweep's trial alike.

``config.json`` holds the resolved settings, ``history.parquet`` one row an epoch, ``run.json``
the result of a run that has finished, and ``checkpoint_<epoch>/`` the best checkpoint and the
last. Three files serve one session or the next: ``failure.json``, why the workers failed;
``row_groups.json``, the row groups that a stream reads in an order of its own; and
``placement_group.json``, which workers a trial has started.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from fer_ray import storage
from fer_ray.data.history import read_history, write_history
from fer_ray.data.json_values import Record

CONFIG = "config.json"
HISTORY = "history.parquet"
RESULT = "run.json"
CHECKPOINT_INDEX = "checkpoint.json"
"""The file that is written last into a checkpoint; without it a folder is no checkpoint."""
FILES = (CONFIG, HISTORY, RESULT)
"""What remains of interest when the checkpoints are gone."""

_FAILURE = "failure.json"
_ROW_GROUPS = "row_groups.json"
_PLACEMENT_GROUP = "placement_group.json"
_CHECKPOINT = "checkpoint_"


class RunFolder:
    """One run's folder; nothing else reads or writes its files by name."""

    def __init__(self, path: str) -> None:
        """Takes the folder's absolute local path or URI; the folder need not exist."""
        self.path = path

    @property
    def name(self) -> str:
        """The run's name."""
        return storage.name_of(self.path)

    @property
    def config(self) -> dict[str, Any] | None:
        """The content of ``config.json``; None for a run that has not begun."""
        if (record := self._read(CONFIG)) is None:
            return None
        record.record("config"), record.text("data_sha256"), record.text("loading")
        return record.value

    def write_config(self, config: Mapping[str, Any], *, data_sha256: str, loading: str) -> None:
        """Writes ``config.json``.

        Args:
            config: `TrainConfig.to_dict`.
            data_sha256: identifies the images.
            loading: ``memory`` or ``stream``; a resumed run loads in the same way.
        """
        value = {"config": config, "data_sha256": data_sha256, "loading": loading}
        self._write(CONFIG, value)

    @property
    def result(self) -> dict[str, Any] | None:
        """The content of ``run.json``; None for a run that has not finished."""
        record = self._read(RESULT)
        return record.value if record else None

    @property
    def best_checkpoint(self) -> tuple[str, str] | None:
        """Path and `Checkpoint.sha256` of the best checkpoint; None without ``run.json``."""
        if (record := self._read(RESULT)) is None:
            return None
        path = storage.join(self.path, record.name("best_checkpoint"))
        return path, record.sha256("checkpoint_sha256")

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Writes ``run.json``, which marks the run as finished."""
        self._write(RESULT, result)

    @property
    def history_path(self) -> str:
        """Path of ``history.parquet``."""
        return storage.join(self.path, HISTORY)

    def read_history(self) -> pa.Table | None:
        """The content of ``history.parquet``; None before the first epoch.

        Raises:
            UserError: where the file is damaged.
        """
        return read_history(self.history_path) if storage.exists(self.history_path) else None

    def write_history(self, rows: Sequence[dict[str, Any]]) -> None:
        """Writes ``history.parquet``; `rows` are those of the last checkpoint."""
        write_history(self.history_path, rows)

    @property
    def failure(self) -> str | None:
        """Why the workers failed, where one of them knew it."""
        record = self._read(_FAILURE)
        return record.text("reason") if record else None

    @property
    def failed_node(self) -> str | None:
        """Ray's id of the node whose GPU failed, where that is why the workers failed."""
        record = self._read(_FAILURE)
        if record is None or "node" not in record.value:
            return None
        return record.get("node", "a text or null", _is_text_or_null)

    def write_failure(self, reason: str, node: str | None = None) -> None:
        """Records why this worker fails; `node`: as `failed_node`."""
        self._write(_FAILURE, {"reason": reason, "node": node})

    def clear_failure(self) -> None:
        """Removes the reason of an earlier attempt."""
        storage.remove(storage.join(self.path, _FAILURE))

    @property
    def row_groups(self) -> dict[str, list[int]] | None:
        """By split, the last row of each row group that a stream reads; None without a stream."""
        record = self._read(_ROW_GROUPS)
        return {split: record.list(split) for split in record.value} if record else None

    def write_row_groups(self, rows: Mapping[str, list[int]]) -> None:
        """Records the row groups: a resumed stream needs the same ones."""
        self._write(_ROW_GROUPS, rows)

    @property
    def placement_group(self) -> str | None:
        """Id, in hexadecimal, of the placement group of the workers that were started last."""
        record = self._read(_PLACEMENT_GROUP)
        return record.get("id", "hexadecimal", _is_hexadecimal) if record else None

    def write_placement_group(self, group_id: str) -> None:
        """Records the workers' placement group, so that another process can remove it."""
        self._write(_PLACEMENT_GROUP, {"id": group_id})

    def checkpoint_paths(self) -> list[str]:
        """The folders of complete checkpoints, sorted by name; their content may be damaged."""
        names = [name for name in storage.list_names(self.path) if name.startswith(_CHECKPOINT)]
        paths = [storage.join(self.path, name) for name in names]
        return [path for path in paths if storage.exists(storage.join(path, CHECKPOINT_INDEX))]

    def save_checkpoint(self, epoch: int, write: Callable[[Path], None]) -> str:
        """Saves a checkpoint completely or not at all; a reader never sees half of one.

        Args:
            epoch: the number of finished epochs.
            write: writes the checkpoint into an existing local folder.

        Returns:
            The checkpoint's folder.
        """
        path = storage.join(self.path, _checkpoint_name(epoch))
        if storage.is_uri(path):
            _upload(path, write)
        else:
            with storage.staged_directory(path) as unfinished:
                write(Path(unfinished))
        return path

    def remove_checkpoints(self, *, but: Collection[int] = ()) -> None:
        """Removes all checkpoints, incomplete ones too, but those of some epochs."""
        kept = {_checkpoint_name(epoch) for epoch in but}
        for name in storage.list_names(self.path):
            if name.lstrip(".").startswith(_CHECKPOINT) and name not in kept:
                storage.remove(storage.join(self.path, name))

    def _read(self, name: str) -> Record | None:
        path = storage.join(self.path, name)
        return Record(path, storage.read_json(path)) if storage.exists(path) else None

    def _write(self, name: str, value: Any) -> None:
        storage.write_json(storage.join(self.path, name), value)


def _is_text_or_null(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_hexadecimal(value: Any) -> bool:
    return isinstance(value, str) and bool(re.fullmatch("([0-9a-f]{2})+", value))


def _checkpoint_name(epoch: int) -> str:
    return f"{_CHECKPOINT}{epoch:06d}"


def _upload(path: str, write: Callable[[Path], None]) -> None:
    """Uploads the index last, since object stores cannot rename a folder."""
    with tempfile.TemporaryDirectory() as temporary:
        write(Path(temporary))
        fs, inner = storage.filesystem(path)
        fs.create_dir(inner, recursive=True)
        files = sorted(Path(temporary).iterdir(), key=lambda file: file.name == CHECKPOINT_INDEX)
        for file in files:
            pafs.copy_files(str(file), f"{inner}/{file.name}", destination_filesystem=fs)
