"""Writes a run's checkpoints beside the training: an object store may take seconds for one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from fer_ray.data.run_folder import RunFolder
from fer_ray.models import checkpoint


class CheckpointWriter:
    """Writes one checkpoint at a time, in the order in which they come.

    As a context manager it waits for the last one. Errors of writing are raised by the next call,
    or at the end.
    """

    def __init__(self, folder: RunFolder, *, waits: bool) -> None:
        """Takes the run's folder; `waits`: whether `write` returns only once all is written."""
        self._folder, self._waits = folder, waits
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None

    def write(self, history: list[dict[str, Any]], save: Callable[[Path], None]) -> None:
        """Writes a checkpoint and the history, and removes the checkpoints they supersede.

        Args:
            history: one row for each epoch so far.
            save: writes the checkpoint into a folder, from copies that training does not change.
        """
        self._wait()
        self._pending = self._thread.submit(self._write, list(history), save)
        if self._waits:
            self._wait()

    def _write(self, history: list[dict[str, Any]], save: Callable[[Path], None]) -> None:
        self._folder.save_checkpoint(len(history), save)
        self._folder.write_history(history)
        self._folder.remove_checkpoints(but={len(history), _best_epoch(history)})

    def _wait(self) -> None:
        if self._pending:
            pending, self._pending = self._pending, None
            pending.result()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown()
        if error is None:
            self._wait()


def _best_epoch(history: list[dict[str, Any]]) -> int:
    """The epoch with the highest score, of equal ones the last: as `run_checkpoints.find`."""
    return max((row[checkpoint.SCORE], row["epoch"]) for row in history)[1]
