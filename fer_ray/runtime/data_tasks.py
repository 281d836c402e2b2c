"""Tasks that turn tables into tables, on Ray or in this process; failures are values."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa

from fer_ray import storage
from fer_ray.errors import JobFailed, UserError, first_line
from fer_ray.runtime import ray_compat

Work = Callable[[pa.Table], pa.Table]
"""Turns one task, a table of one row, into a table of results."""

_MIN_PENDING = 64
"""Tasks that are submitted at least, so that a cluster that can grow sees what there is to do."""
_CANCEL_S = 30.0
"""Seconds to wait for cancelled tasks to end."""

_FAILURE = (pa.field("failure", pa.string()), pa.field("is_user_error", pa.bool_()))
"""Columns added to a result's own: why there is no result, and whether the user can correct it."""


def map_tasks(tasks: Iterable[dict[str, Any]], work: Work, schema: pa.Schema) -> Iterator[pa.Table]:
    """Runs tasks on all CPUs of the cluster, and yields results in the order they are ready.

    A task is taken from `tasks` when one before it has ended, so that few are in memory at a
    time. Without Ray Data, whose start takes a second, and which pauses between tasks.

    Args:
        tasks: one row of values each.
        work: computes the result of a task, on one CPU. Ray may run it again, after a node is lost.
        schema: the schema of the results.

    Raises:
        UserError: where a worker raises one, or an object store refuses access.
        JobFailed: where a worker cannot read or write for another reason.
    """
    import ray

    # as tasks of Ray Data: tried again without limit, and spread over the nodes
    remote = ray.remote(num_cpus=1, max_retries=-1, scheduling_strategy="SPREAD")(_run)
    function = ray.put(_FailuresAsValues(work, schema))
    remaining = iter(tasks)
    pending: list[Any] = []
    try:
        while True:
            most = max(_MIN_PENDING, 2 * int(ray.cluster_resources().get("CPU", 0)))
            wanted = itertools.islice(remaining, max(0, most - len(pending)))
            pending += [remote.remote(function, task) for task in wanted]
            if not pending:
                return
            ready, pending = ray.wait(pending, num_returns=len(pending), timeout=0)
            if not ready:
                ready, pending = ray.wait(pending)
            yield from _without_failures(ray.get(reference) for reference in ready)
            del ready
    finally:
        _cancel(pending)


def _run(function: _FailuresAsValues, task: dict[str, Any]) -> pa.Table:
    return function(pa.Table.from_pylist([task]))


def _cancel(pending: list[Any]) -> None:
    """Stops tasks and waits for them, so that they write no file after the caller removes them."""
    import ray

    for reference in pending:
        ray.cancel(reference)
    if pending:
        ray.wait(pending, num_returns=len(pending), timeout=_CANCEL_S)


def map_on_actors(
    tasks: Iterable[dict[str, Any]], work: Work, schema: pa.Schema, **settings: Any
) -> Iterator[pa.Table]:
    """Runs tasks on a pool of Ray Data's actors, which keep `work` from task to task.

    Arguments and errors are those of `map_tasks`.

    Args:
        tasks: one row of values each.
        work: computes the result of a task.
        schema: the schema of the results.
        settings: further arguments of `map_batches`, with ``compute``.
    """
    import ray

    quiet_ray_data()
    rows = list(tasks)
    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _FailuresAsValues,
        fn_constructor_args=(work, schema),
        batch_size=1,
        batch_format="pyarrow",
        **settings,
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
