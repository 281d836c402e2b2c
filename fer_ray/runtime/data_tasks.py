"""Tasks that turn tables into tables, on Ray Data or in this process; failures are values."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa

from fer_ray import storage
from fer_ray.errors import JobFailed, UserError, first_line
from fer_ray.runtime import ray_compat

Work = Callable[[pa.Table], pa.Table]
"""Turns one task, a table of one row, into a table of results."""


_FAILURE = (pa.field("failure", pa.string()), pa.field("is_user_error", pa.bool_()))
"""Columns added to a result's own: why there is no result, and whether the user can correct it."""


def map_tasks(
    tasks: Iterable[dict[str, Any]], work: Work, schema: pa.Schema, **settings: Any
) -> Iterator[pa.Table]:
    """Runs tasks on Ray Data's workers, one at a time in each, and yields results as they come.

    Args:
        tasks: one row of values each.
        work: computes the result of a task; kept from task to task where `settings` ask for
            actors.
        schema: the schema of the results.
        settings: further arguments of `map_batches`.

    Raises:
        UserError: where a worker raises one, or an object store refuses access.
        JobFailed: where a worker cannot read or write for another reason.
    """
    import ray

    quiet_ray_data()
    rows = list(tasks)
    function: Any = _FailuresAsValues(work, schema)
    if "compute" in settings:  # actors are created from a class
        function = _FailuresAsValues
        settings["fn_constructor_args"] = (work, schema)
    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        function, batch_size=1, batch_format="pyarrow", **settings
    )
    return _without_failures(results.iter_batches(batch_size=None, batch_format="pyarrow"))


def map_here(tasks: Iterable[dict[str, Any]], work: Work, schema: pa.Schema) -> Iterator[pa.Table]:
    """Runs tasks one after the other in this process; results and errors are as of `map_tasks`."""
    function = _FailuresAsValues(work, schema)
    return _without_failures(function(pa.Table.from_pylist([task])) for task in tasks)


def _without_failures(tables: Iterable[Any]) -> Iterator[pa.Table]:
    """Yields results without the columns of failures; raises the first failure."""
    for table in tables:
        if not table.num_rows:
            continue
        failure, is_user_error = (table[field.name][0].as_py() for field in _FAILURE)
        if failure:
            raise UserError(failure) if is_user_error else JobFailed(failure)
        yield table.drop_columns([field.name for field in _FAILURE])


class _FailuresAsValues:
    """Returns failures as rows: Ray would report an exception in pages of its own."""

    def __init__(self, work: Work, schema: pa.Schema) -> None:
        self._work, self._schema = work, schema

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Returns the result of a task, or one row with the reason why it failed."""
        try:
            table = self._work(batch)
        except UserError as error:
            return self._failure(str(error), is_user_error=True)
        except OSError as error:
            reason = f"a worker failed: {first_line(error)}"
            return self._failure(reason, is_user_error=storage.is_refusal(error))
        for field in _FAILURE:  # Ray Data warns where tables differ in their columns
            table = table.append_column(field, pa.nulls(len(table), field.type))
        return table

    def _failure(self, reason: str, *, is_user_error: bool) -> pa.Table:
        row = {"failure": reason, "is_user_error": is_user_error}
        return pa.Table.from_pylist([row], pa.schema([*self._schema, *_FAILURE]))


def quiet_ray_data() -> None:
    """Turns off Ray Data's progress bars and notes: jobs print their own progress."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray_compat.hide_note_about_progress_bars()
