"""Runs a sweep on Ray Tune, or resumes it.

Trials that are over are kept; the others resume from their last checkpoints. What Ray Tune calls a
trial is a job of `halving` here: the job of a trial that pauses ends, and another job resumes the
trial from its checkpoint when it is promoted.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fer_ray.errors import JobFailed
from fer_ray.runtime import resources, termination
from fer_ray.sweeps import store
from fer_ray.sweeps.halving import Halving, rungs
from fer_ray.sweeps.losses import Losses
from fer_ray.sweeps.plan import (
    SweepPlan,
    announcement,
    concurrent_trials,
    resources_of_trial,
    share_images,
)
from fer_ray.sweeps.space import GRID
from fer_ray.sweeps.store import Trial


def run_sweep(plan: SweepPlan, *, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs the trials of a sweep that are not over, on the connected Ray cluster.

    Args:
        plan: from `plan_sweep`.
        log: receives lines of progress.

    Returns:
        The content of ``summary.json``.

    Raises:
        UserError: where not a single trial fits the cluster.
        JobFailed: where no node is left whose GPUs work, or every trial has failed.
        KeyboardInterrupt: when the sweep is interrupted. The tables are written in all cases.
    """
    from fer_ray.sweeps import summary

    num_concurrent = concurrent_trials(plan, log)
    losses = Losses(plan.config.scaling.max_failures, lambda avoided: _fits(plan, avoided))
    _write_settings(plan)
    if plan.space.method == GRID:
        _create_grid(plan)
    halving = _halving(plan)
    log(announcement(plan, halving, num_concurrent))
    try:
        if not halving.is_over:
            _run_trials(plan, halving, losses, num_concurrent, log)
        if halving.is_over:
            _stop_paused(plan, halving, log)
    finally:
        trials = plan.files.write_table(plan.config)
        content = summary.write(plan.folder)
        left = plan.num_trials - sum(trial.is_over for trial in trials)
        if left and not losses.leave_no_node:
            log(f"{left} trials are not over; run the same command to resume")
    if left and losses.leave_no_node:
        raise JobFailed(
            f"no node is left that a trial can use ({'; '.join(losses.reasons())}): {left} trials "
            "are not over; repair the nodes and run the same command to resume"
        )
    if not left and all(trial.status == store.FAILED for trial in trials):
        raise JobFailed(
            f"all {len(trials)} trials failed, the last one: {trials[-1].reason}; see {plan.folder}"
        )
    return content


def _fits(plan: SweepPlan, avoided: frozenset[str]) -> bool:
    """Whether a trial fits the living nodes of the cluster but for some."""
    num_workers = plan.config.scaling.num_workers
    each = {name: n / num_workers for name, n in resources_of_trial(plan).items()}
    return resources.fits_beside(each, avoided, count=num_workers)


def _write_settings(plan: SweepPlan) -> None:
    """Writes ``sweep.json``; it records the numbers of seeds at which results were seen."""
    files, looks = plan.files, []
    if files.exists:
        saved = files.read_settings()
        looks, count = saved["fewer_seeds_before"], len(saved["seeds"])
        has_result = any(trial.status == store.FINISHED for trial in files.trials())
        if has_result and count < len(plan.seeds) and count not in looks:
            looks = [*looks, count]
    files.write_settings({**plan.to_dict(), "fewer_seeds_before": looks})


def _create_grid(plan: SweepPlan) -> None:
    """Records every trial: all arms with the first seed, then all with the second, and so on.

    An interrupted grid is therefore balanced, and more seeds add trials at the end.
    """
    known = {trial.number for trial in plan.files.trials()}
    number = 0
    for seed in plan.seeds:
        for arm in plan.space.arms:
            if number not in known:
                options = {**arm.options, "schedule.seed": seed}
                plan.files.create(Trial(number=number, arm=arm.name, options=options))
            number += 1


def _halving(plan: SweepPlan) -> Halving:
    """The state of the sweep; a grid has a single rung, so every trial trains to its end."""
    epochs = plan.config.schedule.epochs
    pauses = (epochs,) if plan.space.method == GRID else rungs(epochs)
    return Halving(pauses, plan.num_trials, plan.files.trials())


def _stop_paused(plan: SweepPlan, halving: Halving, log: Callable[[str], None]) -> None:
    """Ends the trials that were not promoted; no further result can change that."""
    from fer_ray.sweeps.progress import line_of

    for number, reason in halving.left_behind().items():
        folder = plan.files.trial(number)
        folder.end(store.STOPPED, reason)
        log(line_of(folder.read()))


def _run_trials(
    plan: SweepPlan,
    halving: Halving,
    losses: Losses,
    num_concurrent: int,
    log: Callable[[str], None],
) -> None:
    """One session of Ray Tune. Its own state is not kept, since the sweep's files suffice."""
    from ray import tune

    from fer_ray.sweeps import progress

    _quieten_tune()
    limits, scaling = plan.limits, plan.config.scaling
    display = progress.Progress(plan.files, plan.config, halving, losses, log=log)
    callbacks: list[Any] = [display]
    if limits.tensorboard:
        callbacks.append(progress.TensorBoard(str(Path(plan.folder) / "tensorboard")))
    with tempfile.TemporaryDirectory() as temporary:
        tuner = tune.Tuner(
            _trainable(plan),
            tune_config=tune.TuneConfig(
                search_alg=_planner(plan, halving, losses),
                num_samples=-1,  # until the planner reports that it is finished
                max_concurrent_trials=num_concurrent,
                time_budget_s=limits.time_budget_s or None,
                reuse_actors=scaling.num_workers == 1,
            ),
            run_config=tune.RunConfig(
                name=plan.run,
                storage_path=temporary,
                verbose=0,
                callbacks=callbacks,
                # `Losses` counts them: what is retried may have to avoid a node
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        )
        raise_again = termination.defer(display.interrupt)
        try:
            tuner.fit()
        finally:
            raise_again()
            display.close()


def _quieten_tune() -> None:
    """Turns off what Ray Tune would print, and the files that it would write for each trial."""
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new output prints a banner at any verbosity
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "3600"
    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"
    # no buffer: each result is processed before the next epoch
    os.environ["TUNE_RESULT_BUFFER_LENGTH"] = "1"
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _trainable(plan: SweepPlan) -> Any:
    from ray import tune

    from fer_ray.sweeps import trial

    settings = {
        "sweep": plan.folder,
        "config": plan.config.to_dict(),
        "info": plan.info,
        "images": share_images(plan),
        "gpus_per_trial": plan.limits.gpus_per_trial,
    }
    amounts = resources_of_trial(plan)
    several = plan.config.scaling.num_workers > 1
    if several:
        # the workers reserve what they need; a trial has to reserve something, such as a byte
        amounts = {"memory": 1.0}

    def reserved(job: dict[str, Any]) -> Any:
        # several workers have reservations of their own, made by Ray Train
        selector = resources.label_selector([] if several else job["avoid"])
        further: dict[str, Any] = {"bundle_label_selector": [selector]} if selector else {}
        return tune.PlacementGroupFactory([amounts], **further)

    return tune.with_resources(tune.with_parameters(trial.run, settings=settings), reserved)


def _planner(plan: SweepPlan, halving: Halving, losses: Losses) -> Any:
    """Gives Ray Tune the next job; the trials of a search are drawn when they are needed."""
    from fer_ray.sweeps.search import Planner, Suggestions

    suggestions = Suggestions(plan.space.ranges, seed=plan.config.schedule.seed)

    def create(number: int) -> Trial:
        options = suggestions.ask(number, halving.trials.values())
        options["schedule.seed"] = plan.seeds[0]
        trial = Trial(number=number, arm=None, options=options)
        plan.files.create(trial)
        return trial

    return Planner(plan.files, halving, losses, create)
