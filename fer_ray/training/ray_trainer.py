"""Workers that train together: a function in each process of a `TorchTrainer`, to its end."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from fer_ray import storage
from fer_ray.config.schema import ScalingConfig
from fer_ray.errors import JobFailed


def run_trainer(
    work: Callable[[dict[str, Any]], None],
    settings: dict[str, Any],
    scaling: ScalingConfig,
    *,
    storage_path: str,
    run: str,
    failed: str,
    callbacks: Sequence[Any] = (),
) -> None:
    """Runs a function on the workers of a `TorchTrainer`, to its end.

    Args:
        work: what each worker runs.
        settings: what it is given.
        scaling: how many workers there are, and what each reserves.
        storage_path: the folder of all runs.
        run: the name of this one.
        failed: what a failure's message begins with.
        callbacks: of Ray Train, called in its controller.

    Raises:
        JobFailed: where workers were lost too often, or failed.
    """
    import ray.train as ray_train
    from ray.train.torch import TorchConfig

    from fer_ray.training.gloo import GlooConfig

    _remove_damaged_snapshot(storage.join(storage_path, run))
    resources = {"CPU": scaling.cpus_per_worker, "GPU": 1.0 if scaling.use_gpu else 0.0}
    trainer = _trainer_class()(
        work,
        train_loop_config=settings,
        scaling_config=ray_train.ScalingConfig(
            num_workers=scaling.num_workers,
            use_gpu=scaling.use_gpu,
            resources_per_worker={kind: amount for kind, amount in resources.items() if amount},
        ),
        torch_config=TorchConfig("nccl") if scaling.use_gpu else GlooConfig("gloo"),
        run_config=_run_config(ray_train, storage_path, run, scaling.max_failures, callbacks),
    )
    try:
        trainer.fit()
    except ray_train.TrainingFailedError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise JobFailed(f"{failed}: {lines[-1]}") from error
    except SystemExit as error:  # what Ray Train makes of an interrupt
        raise KeyboardInterrupt from error


def _remove_damaged_snapshot(folder: str) -> None:
    """Ray Train overwrites its list of checkpoints in place: a kill meanwhile leaves half of it,
    which it then refuses. Without the list, a worker goes on from the last whole checkpoint."""
    snapshot = storage.join(folder, "checkpoint_manager_snapshot.json")
    if storage.exists(snapshot):
        try:
            storage.read_json(snapshot)
        except ValueError:
            storage.remove(snapshot)


def warm_up() -> None:
    """Imports what `run_trainer` needs, and starts the process that it waits for first."""
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator

    default_autoscaling_coordinator.get_or_create_autoscaling_coordinator()
    importlib.import_module("ray.train.torch")


def _trainer_class() -> type:
    """`TorchTrainer` without two processes that each take as long to start as a worker.

    One shares datasets with the workers; nobody gives it any. The other asks Ray's dashboard
    each second whether the controller lives, to remove its placement group, and fails where a
    machine has two clusters. The group goes with the job anyway, and a sweep, whose job outlives
    its trials, removes it itself (`sweeps.trial.free_workers`).
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import (
        PlacementGroupCleanerCallback,
    )

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            given = super()._create_default_callbacks()  # type: ignore[misc]
            unwanted = (DatasetsCallback, PlacementGroupCleanerCallback)
            return [one for one in given if not isinstance(one, unwanted)]

    return Trainer


def _run_config(
    ray_train: Any, storage_path: str, run: str, max_failures: int, callbacks: Sequence[Any]
) -> Any:
    return ray_train.RunConfig(
        name=run,
        storage_path=storage_path,
        callbacks=list(callbacks),
        logging_config=ray_train.LoggingConfig(log_level="ERROR"),
        failure_config=ray_train.FailureConfig(max_failures=max_failures),
        checkpoint_config=ray_train.CheckpointConfig(
            # the last one is kept besides, whatever its score
            num_to_keep=1,
            checkpoint_score_attribute="validation_accuracy",
            checkpoint_score_order="max",
        ),
    )
