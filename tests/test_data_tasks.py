"""Tasks on Ray: few at a time, and none goes on after the caller has stopped."""

from __future__ import annotations

import functools
import time
from pathlib import Path

import pyarrow as pa
import pytest

from fer_ray.errors import JobFailed
from fer_ray.runtime import data_tasks

NUMBER = pa.schema([("number", pa.int64())])


def test_tasks_are_taken_when_there_is_room(ray_cluster, monkeypatch):
    monkeypatch.setattr(data_tasks, "_MIN_PENDING", 1)
    most = 2 * int(ray_cluster.cluster_resources()["CPU"])
    taken: list[int] = []

    def tasks():
        for number in range(40):
            taken.append(number)
            yield {"number": number}

    results = data_tasks.map_tasks(tasks(), lambda batch: batch, NUMBER)
    first = next(results)["number"].to_pylist()
    assert first[0] in range(most) and len(taken) == most
    rest = [number for table in results for number in table["number"].to_pylist()]
    assert sorted(first + rest) == taken == list(range(40))


def write_late(batch: pa.Table, *, folder: Path) -> pa.Table:
    (number,) = batch["number"].to_pylist()
    if number == 0:
        raise OSError("no space")
    time.sleep(1)
    (folder / str(number)).touch()
    return batch


def test_no_task_writes_after_another_has_failed(ray_cluster, tmp_path):
    ray_cluster.cloudpickle.register_pickle_by_value(__import__(__name__))
    work = functools.partial(write_late, folder=tmp_path)
    with pytest.raises(JobFailed, match="a worker failed: no space"):
        list(data_tasks.map_tasks([{"number": n} for n in range(20)], work, NUMBER))
    ray_cluster.cloudpickle.unregister_pickle_by_value(__import__(__name__))
    written = set(tmp_path.iterdir())
    time.sleep(2)
    assert set(tmp_path.iterdir()) == written and len(written) < 10
