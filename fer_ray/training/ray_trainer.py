"""Workers that train together: a function in each process of a `TorchTrainer`, to its end."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Collection, Sequence
from typing import Any

from fer_ray.config.schema import ScalingConfig
from fer_ray.errors import JobFailed
from fer_ray.runtime import ray_compat, resources


def run_trainer(
    work: Callable[[dict[str, Any]], None],
    settings: dict[str, Any],
    scaling: ScalingConfig,
    *,
    run: str,
    failed: str,
    callbacks: Sequence[Any] = (),
    avoid: Collection[str] = (),
) -> None:
    """Runs a function on the workers of a `TorchTrainer`, to its end.

    Ray Train's own state is thrown away: the workers write their checkpoints themselves and find
    the latest one after a restart, so a damaged state file cannot keep a run from being resumed.

    Args:
        work: what each worker runs.
        settings: its argument.
        scaling: the number of workers, and what each reserves.
        run: the name that Ray shows.
        failed: how the message of a failure begins.
        callbacks: Ray Train's `UserCallback` objects, called in its controller.
        avoid: Ray's ids of nodes that no worker may use.

    Raises:
        JobFailed: where workers were lost too often, or failed.
    """
    import ray.train as ray_train

    from fer_ray.training.backend import Config

    with tempfile.TemporaryDirectory(prefix="fer_ray-") as state:
        trainer = ray_compat.trainer_class()(
            work,
            train_loop_config=settings,
            scaling_config=_scaling_config(scaling, avoid),
            torch_config=Config("nccl" if scaling.use_gpu else "gloo"),
            run_config=_run_config(run, state, scaling.max_failures, callbacks),
        )
        try:
            trainer.fit()
        except ray_train.TrainingFailedError as error:
            lines = filter(None, map(str.strip, str(error).splitlines()))
            raise JobFailed(f"{failed}: {[*lines][-1]}") from error
        except SystemExit as error:  # what Ray Train makes of an interrupt
            raise KeyboardInterrupt from error


def _scaling_config(scaling: ScalingConfig, avoid: Collection[str]) -> Any:
    import ray.train as ray_train

    reserved = {"CPU": scaling.cpus_per_worker, "GPU": 1.0 if scaling.use_gpu else 0.0}
    # mypy takes it for the class of Ray Train V1
    return ray_train.ScalingConfig(  # type: ignore[call-arg]
        num_workers=scaling.num_workers,
        use_gpu=scaling.use_gpu,
        resources_per_worker={name: n for name, n in reserved.items() if n},
        label_selector=resources.label_selector(avoid) or None,
    )


def _run_config(run: str, state: str, max_failures: int, callbacks: Sequence[Any]) -> Any:
    import ray.train as ray_train

    # mypy takes it for the class of Ray Train V1
    return ray_train.RunConfig(  # type: ignore[call-arg]
        name=run,
        storage_path=state,
        callbacks=list(callbacks),
        logging_config=ray_train.LoggingConfig(log_level="ERROR"),
        failure_config=ray_train.FailureConfig(max_failures=max_failures),
    )


def warm_up() -> None:
    """Starts a process that `run_trainer` waits for, and imports what it needs."""
    ray_compat.start_autoscaling_coordinator()
    importlib.import_module("ray.train.torch")  # takes about a second
