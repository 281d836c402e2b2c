"""The parts of Ray 2.60 that are used here although they are not public.

Each function works without them: what is missing then costs a line of output or a few seconds,
never a job. A new release of Ray is tried by running ``tests/test_ray_compat.py`` and timing a
short training run.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any


def trainer_class() -> type[Any]:
    """`ray.train.torch.TorchTrainer`, without two helper processes where Ray lets them be left out.

    One process hands datasets to the workers; the trainers here have no datasets. The other asks
    the state API once a second whether the controller still lives, to remove its placement group.
    It fails on a machine that runs two clusters. Ray removes the placement group with the job
    anyway, and a sweep removes those of its trials itself (`sweeps.trial.free_workers`). Each of
    the two takes as long to start as a worker: together 13 to 28 s of a short run on two busy
    cores.
    """
    from ray.train.torch import TorchTrainer

    try:
        from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
        from ray.train.v2._internal.callbacks.placement_group_callback import (
            PlacementGroupCleanerCallback,
        )
    except ImportError:
        return TorchTrainer
    if not hasattr(TorchTrainer, "_create_default_callbacks"):
        return TorchTrainer

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()  # type: ignore[misc]
            unwanted = (DatasetsCallback, PlacementGroupCleanerCallback)
            return [callback for callback in callbacks if not isinstance(callback, unwanted)]

    return Trainer


def hide_note_about_progress_bars() -> None:
    """Ray Data then does not warn that its progress bars are off: the jobs turn them off."""
    with contextlib.suppress(ImportError):
        from ray.util.debug import log_once

        log_once("ray_data_progress_manager_disabled")


@contextlib.contextmanager
def any_agent_port() -> Iterator[None]:
    """`ray.init` inside of the block lets the node's agent listen on any free port.

    By default the agent tries one fixed port for 3.4 s, and `ray.init` waits for it, where another
    Ray on the machine has that port. Nothing here uses it: jobs are submitted to clusters only.
    """
    try:
        from ray._private.parameter import RayParams
    except ImportError:
        yield
        return
    original = RayParams.__init__
    any_port = functools.partialmethod(original, dashboard_agent_listen_port=0)
    RayParams.__init__ = any_port  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        RayParams.__init__ = original  # type: ignore[method-assign]


def start_autoscaling_coordinator() -> None:
    """Starts the process that a `TorchTrainer` waits for first, while the caller does other work.

    Saves 3 to 7 s of a short run on two busy cores; without it the trainer starts the process.
    """
    with contextlib.suppress(Exception):
        from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator

        default_autoscaling_coordinator.get_or_create_autoscaling_coordinator()
