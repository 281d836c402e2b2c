"""The only worker of a run, in this process itself: nothing waits for Ray to start."""

from __future__ import annotations

from typing import Any

import torch

from fer_ray.config.schema import TrainConfig
from fer_ray.data.run_folder import RunFolder
from fer_ray.errors import JobFailed, UserError, first_line
from fer_ray.runtime.process import check_gpu, out_of_memory
from fer_ray.training import worker
from fer_ray.training.process_group import ProcessGroup


def check(config: TrainConfig, files: RunFolder) -> None:
    """Checks that a run can do without Ray.

    Args:
        config: the run's settings.
        files: the run's folder, which need not exist.

    Raises:
        UserError: for several workers, for a GPU that is not there, or where images are streamed.
    """
    workers = config.scaling.num_workers
    if workers != 1:
        raise UserError(
            f"--local: trains with one worker, and {workers} are requested: give --num-workers 1, "
            "or leave --local out"
        )
    if config.scaling.use_gpu:
        check_gpu()
    saved = files.config
    if (saved["loading"] if saved else config.schedule.loading) == "stream":
        run = f"run {files.name} streams" if saved else "--loading stream streams"
        raise UserError(f"--local: {run} its images with Ray: leave --local out")


def run_worker(settings: dict[str, Any], *, use_gpu: bool, failed: str) -> None:
    """Trains to the end of the run.

    Args:
        settings: as for `worker.train`.
        use_gpu: whether to train on this process's GPU.
        failed: how the message of a failure begins.

    Raises:
        JobFailed: where memory ran out.
    """
    group = ProcessGroup(device=torch.device("cuda:0" if use_gpu else "cpu"))
    try:
        worker.train(settings, group)
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            raise JobFailed(f"{failed}: {first_line(error)}") from error
        raise
