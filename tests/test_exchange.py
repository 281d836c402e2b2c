"""Workers that tell each other vectors: real processes, over sockets and over gloo."""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fer_ray.training import exchange
from fer_ray.training.process_group import ProcessGroup

SIZE = 3
LONG = 4225
"""Numbers: the moments of the widest layer of efficientnet_b2, 2,112 channels."""


def own(rank: int, count: int) -> np.ndarray:
    return np.arange(count) * 0.1 + rank


def right(gather: exchange.Gather) -> bool:
    """Whether every worker is told what all of them have, whatever the length."""
    for count in (1, 3, LONG):
        expected = np.stack([own(rank, count) for rank in range(SIZE)])
        if not np.array_equal(gather(own(dist.get_rank(), count)), expected):
            return False
    return True


def names(folder: str) -> list[str]:
    return [path.name for path in Path(folder).iterdir()]


def worker(rank: int, folder: str) -> None:
    """Every way once, then the last worker is gone."""
    torch.set_num_threads(1)
    path = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=path, rank=rank, world_size=SIZE)
    exchange._TIMEOUT_S = 2
    found: dict[str, object] = {}
    group = ProcessGroup(rank=rank, size=SIZE)
    found["agreed"] = group.broadcast(f"s3://Gesichter/größe {rank}"), group.broadcast("")
    tempfile.tempdir = f"{folder}/sockets"
    near = exchange.connect()
    found["near"] = type(near).__name__, right(near), names(tempfile.gettempdir())
    tempfile.tempdir = f"{folder}/{'long' * 40}"  # no socket's path is so long
    long = exchange.connect()
    found["long"] = long.__name__, right(long), names(tempfile.gettempdir())
    tempfile.tempdir = f"{folder}/absent"
    found["absent"] = exchange.connect().__name__
    exchange._machine = lambda: str(rank > 0)
    found["far"] = exchange.connect().__name__
    if rank < SIZE - 1:
        with pytest.raises(TimeoutError, match="worker 2 has not answered for 2 s"):
            near(own(rank, 3))
        Path(folder, f"{rank}.json").write_text(json.dumps(found))
    else:
        dist.barrier()  # when the others have waited
        os._exit(0)
    dist.barrier()
    with pytest.raises(ConnectionError):
        near(own(rank, 3))


def test_workers_are_told_what_all_have_by_the_quickest_way_there_is(tmp_path):
    for name in ("sockets", "long" * 40):
        (tmp_path / name).mkdir()
    mp.spawn(worker, (str(tmp_path),), nprocs=SIZE)
    for rank in range(SIZE - 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == {
            "agreed": ["s3://Gesichter/größe 0", ""],
            "near": ["Sockets", True, []],
            "long": ["_gather_by_gloo", True, []],
            "absent": "_gather_by_gloo",
            "far": "_gather_by_gloo",
        }
