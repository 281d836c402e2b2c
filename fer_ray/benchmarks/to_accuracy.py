"""How long a training takes to reach some validation accuracies, with its default schedule."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from fer_ray import storage
from fer_ray.benchmarks.loops import WorkerContext, now
from fer_ray.benchmarks.workers import RESULT
from fer_ray.data.run_folder import RunFolder
from fer_ray.runtime import environment
from fer_ray.training.checkpoint_writer import CheckpointWriter
from fer_ray.training.loop import Snapshot, Trainer, stop_reason
from fer_ray.training.memory_feed import MemoryFeed


def measure(settings: dict[str, Any]) -> None:
    """Trains in a worker of Ray Train until the accuracies are reached.

    Args:
        settings: ``config``, whose schedule is that of a real run; ``percentages`` to reach; and
            the ``folder`` for the result and the checkpoints.
    """
    context = WorkerContext.load(settings)
    images = (context.train, context.validation)
    feed = MemoryFeed(context.config, context.info, *images, group=context.group)
    run = RunFolder(storage.join(settings["folder"], "run"))
    log = functools.partial(print, flush=True)
    reached = train(context.trainer(feed), settings["percentages"], run, log=log)
    result = {"rounds": {}, "to_accuracy": reached, **environment.describe(context.group.device)}
    storage.write_json(storage.join(settings["folder"], RESULT), result)


def train(
    trainer: Trainer,
    percentages: Sequence[float],
    run: RunFolder,
    *,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Trains until all accuracies are reached, or to the end of the schedule.

    Args:
        trainer: before its first epoch.
        percentages: accuracies on the validation split, above 0 and at most 100.
        run: where the checkpoints are written, as in a run.
        log: receives a line after each epoch.

    Returns:
        ``reached``: by percentage, null where it was never reached, the ``epoch`` after which it
        was, and the seconds until then: ``train_s``, ``validation_s``, ``checkpoint_s``, in which
        training waits for checkpoints, and ``seconds``, their sum. ``epochs``: the number of those
        that were trained; ``best``: the highest accuracy, from 0 to 1.
    """
    device, schedule = trainer.group.device, trainer.config.schedule
    seconds = {"train_s": 0.0, "validation_s": 0.0, "checkpoint_s": 0.0}
    reached: dict[str, dict[str, Any] | None] = {f"{value:g}": None for value in percentages}

    def report(history: list[dict[str, Any]], snapshot: Snapshot) -> None:
        row, start = history[-1], now(device)
        writer.write(history, snapshot())
        train_s = trainer.steps_per_epoch * schedule.global_batch_size / row["images_per_s"]
        seconds["train_s"] += train_s
        seconds["validation_s"] += row["seconds"] - train_s
        seconds["checkpoint_s"] += now(device) - start
        accuracy, total = row["validation_accuracy"], sum(seconds.values())
        for name in reached:
            if reached[name] is None and accuracy >= float(name) / 100:
                reached[name] = {"epoch": len(history), **seconds, "seconds": total}
        log(
            f"epoch {len(history)}/{schedule.epochs}: validation accuracy {accuracy:.2%} after "
            f"{total:,.1f} s"
        )

    with CheckpointWriter(run, waits=False) as writer:
        while not all(reached.values()) and stop_reason(schedule, trainer.history) is None:
            trainer.fit(report, until=len(trainer.history) + 1)
    best = max(row["validation_accuracy"] for row in trainer.history)
    return {"reached": reached, "epochs": len(trainer.history), "best": best}
