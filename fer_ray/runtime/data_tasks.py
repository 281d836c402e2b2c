"""Work that Ray Data's tasks and actors do: tables in, tables out, failures as values."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa

from fer_ray import storage
from fer_ray.errors import JobFailed, UserError, first_line

Work = Callable[[pa.Table], pa.Table]
"""What a worker makes of one task, a table of one row."""


_FAILURE = (pa.field("failure", pa.string()), pa.field("mistake", pa.bool_()))
"""Columns beside a result's own: why there is none, and whether the user can mend it."""


def map_tasks(
    tasks: Iterable[dict[str, Any]], work: Work, schema: pa.Schema, **settings: Any
) -> Iterator[pa.Table]:
    """The tables that Ray Data's workers make of tasks, as they come, one task at a time each.

    Args:
        tasks: what there is to do.
        work: what makes a table of each; kept from task to task where `settings` name actors.
        schema: that of the tables.
        settings: further arguments of `map_batches`.

    Raises:
        UserError: when a worker raises one, or is refused by an object store.
        JobFailed: when a worker cannot read or write for another reason.
    """
    import ray

    quiet_ray_data()
    waiting = list(tasks)
    careful: Any = _Careful(work, schema)
    if "compute" in settings:  # of actors, which want a class
        careful = _Careful
        settings["fn_constructor_args"] = (work, schema)
    results = ray.data.from_items(waiting, override_num_blocks=len(waiting)).map_batches(
        careful, batch_size=1, batch_format="pyarrow", **settings
    )
    for batch in results.iter_batches(batch_size=None, batch_format="pyarrow"):
        assert isinstance(batch, pa.Table)
        if not batch.num_rows:
            continue
        failure, mistake = (batch[field.name][0].as_py() for field in _FAILURE)
        if failure:
            raise UserError(failure) if mistake else JobFailed(failure)
        yield batch.drop_columns([field.name for field in _FAILURE])


class _Careful:
    """Work whose failures are values: Ray buries exceptions in pages of its own."""

    def __init__(self, work: Work, schema: pa.Schema) -> None:
        self._work, self._schema = work, schema

    def __call__(self, batch: pa.Table) -> pa.Table:
        """What the work makes of a task, or one row that says why it fails."""
        try:
            table = self._work(batch)
        except UserError as error:
            return self._failed(str(error), mistake=True)
        except OSError as error:
            reason = f"a worker failed: {first_line(error)}"
            return self._failed(reason, mistake=storage.is_refusal(error))
        for field in _FAILURE:  # all tables alike, or Ray Data warns
            table = table.append_column(field, pa.nulls(len(table), field.type))
        return table

    def _failed(self, failure: str, *, mistake: bool) -> pa.Table:
        schema = pa.schema([*self._schema, *_FAILURE])
        return pa.Table.from_pylist([{"failure": failure, "mistake": mistake}], schema)


def quiet_ray_data() -> None:
    """Turns off Ray Data's bars and notes: jobs print their own progress."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # says as a warning that the bars are off
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
