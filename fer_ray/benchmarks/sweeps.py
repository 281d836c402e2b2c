"""What a sweep costs beyond its training, and what successive halving saves, on synthetic faces.

Both train small networks, whatever the benchmark's model is: the sweep is measured, not the model.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fer_ray import storage
from fer_ray.config import overrides
from fer_ray.config.schema import ScalingConfig, TrainConfig
from fer_ray.preparation.plan import plan_preparation
from fer_ray.preparation.run import prepare
from fer_ray.sweeps import store
from fer_ray.sweeps.plan import Limits, plan_sweep
from fer_ray.sweeps.run import run_sweep
from fer_ray.sweeps.store import SweepFolder

_OVERHEAD_TRIALS = 10
_OVERHEAD_IMAGES = 1_000
_HALVING_IMAGES = 2_000
_HALVING_EPOCHS = 9
_GRID: dict[str, list[Any]] = {
    "optimizer.learning_rate": [0.0005, 0.003, 0.02],
    "transforms.normalization": ["none", "minmax", "dataset"],
    "transforms.augmentation": ["none", "standard", "strong"],
}
"""27 configurations: some are poor from the first epoch, others only later."""


def overhead(folder: str, log: Callable[[str], None]) -> dict[str, Any]:
    """Seconds per trial beyond its epochs, with single-process trials one after the other.

    The time from the start of Ray Tune to its end, the first process and its imports included,
    minus the seconds of all epochs (training and validation), divided by the number of trials.

    Args:
        folder: an empty folder to write in.
        log: receives lines of progress.

    Returns:
        ``sweep_overhead_s``, and ``sweep`` with what it is computed from.
    """
    log(f"the overhead of {_OVERHEAD_TRIALS} trials")
    data = _synthetic_faces(folder, _OVERHEAD_IMAGES)
    sweep = _sweep_file(folder, "overhead", {"transforms.normalization": ["none"]})
    plan = plan_sweep(
        _config(data, width=4, epochs=2),
        sweep=sweep,
        storage_path=storage.join(folder, "sweeps"),
        num_seeds=_OVERHEAD_TRIALS,
        limits=Limits(max_concurrent=1),
    )
    start = time.monotonic()
    run_sweep(plan, log=lambda line: None)
    seconds = time.monotonic() - start
    trials = plan.files.trials()
    trained_s = sum(row["seconds"] for trial in trials for row in trial.history)
    return {
        "rounds": {},
        "sweep_overhead_s": (seconds - trained_s) / len(trials),
        "sweep": {"trials": len(trials), "seconds": seconds, "epochs_s": trained_s},
    }


def halving(folder: str, log: Callable[[str], None]) -> dict[str, Any]:
    """Compares ASHA with a full grid of the same 27 trials.

    Args:
        folder: an empty folder to write in.
        log: receives lines of progress.

    Returns:
        ``asha_saving`` (ASHA's epochs divided by the grid's), ``asha_loss`` (best validation
        accuracy of the grid minus ASHA's), and ``asha`` with what they are computed from.
    """
    data = _synthetic_faces(folder, _HALVING_IMAGES)
    config = _config(data, width=8, epochs=_HALVING_EPOCHS)
    log("27 trials in full")
    grid = plan_sweep(
        config,
        sweep=_sweep_file(folder, "grid", _GRID),
        storage_path=storage.join(folder, "sweeps"),
        num_seeds=1,
        limits=Limits(),
    )
    run_sweep(grid, log=lambda line: None)
    log("the same 27 trials with ASHA")
    search = plan_sweep(
        config,
        sweep=_sweep_file(folder, "halved", _GRID, method="search"),
        storage_path=storage.join(folder, "sweeps"),
        num_trials=len(grid.space.arms),
        limits=Limits(),
    )
    names = list(_GRID)
    for number, values in enumerate(itertools.product(*_GRID.values())):
        chosen = {**dict(zip(names, values)), "schedule.seed": config.schedule.seed}
        search.files.create(store.Trial(number=number, arm=None, options=chosen))
    run_sweep(search, log=lambda line: None)
    full, halved = (_outcome(plan.folder) for plan in (grid, search))
    return {
        "rounds": {},
        "asha_saving": halved["epochs"] / full["epochs"],
        "asha_loss": full["best"] - halved["best"],
        "asha": {"full": full, "halved": halved, "epochs_a_trial": _HALVING_EPOCHS},
    }


def _outcome(sweep: str) -> dict[str, Any]:
    trials = SweepFolder(sweep).trials()
    scores = [
        trial.history[-1]["validation_accuracy"]
        for trial in trials
        if trial.status == store.FINISHED
    ]
    return {
        "trials": len(trials),
        "finished": len(scores),
        "epochs": sum(len(trial.history) for trial in trials),
        "best": max(scores),
    }


def _config(data: str, *, width: int, epochs: int) -> TrainConfig:
    return overrides.changed(
        TrainConfig(data=data, scaling=ScalingConfig(num_workers=1)),
        {
            "model.width": width,
            "schedule.epochs": epochs,
            "schedule.global_batch_size": 32,
            "optimizer.optimizer": "adamw",
        },
    )


def _synthetic_faces(folder: str, num_images: int) -> str:
    path = storage.join(folder, "faces")
    plan = plan_preparation(source="synthetic", output=path, num_images=num_images)
    prepare(plan, log=lambda line: None)
    return path


def _sweep_file(folder: str, name: str, space: dict[str, Any], method: str = "grid") -> str:
    path = Path(folder) / f"{name}.json"
    path.write_text(json.dumps({"method": method, "space": space}))
    return str(path)
