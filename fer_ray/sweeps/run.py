"""Runs a sweep on Ray Tune, or goes on with it.

A sweep is a folder, ``<storage>/<run>/`` (`records`). Trials that are over are kept, the others
go on from their last checkpoints. What Ray Tune calls a trial is one of `halving`'s jobs here: a
trial that pauses ends there, and one that is promoted begins again from its checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fer_ray import storage
from fer_ray.sweeps import images, preflight, store
from fer_ray.sweeps.halving import Halving, rungs
from fer_ray.sweeps.plan import SweepPlan
from fer_ray.sweeps.space import GRID
from fer_ray.sweeps.store import Trial


def fit(plan: SweepPlan, *, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs on the connected Ray cluster what of a sweep is left to run.

    Args:
        plan: from `plan`.
        log: receives lines of progress.

    Returns:
        The content of ``summary.json``.

    Raises:
        UserError: where not a single trial fits the cluster.
        KeyboardInterrupt: when it was interrupted; the tables are written before.
    """
    from fer_ray.sweeps import summary

    at_once = preflight.trials_at_once(plan, log)
    _write_plan(plan)
    if plan.space.method == GRID:
        _create_grid(plan)
    halving = _halving(plan)
    log(preflight.announcement(plan, halving, at_once))
    try:
        if not halving.is_over:
            _run_trials(plan, halving, at_once, log)
        if halving.is_over:
            _leave_behind(plan, halving, log)
    finally:
        trials = store.write_trials(plan.folder, plan.config)
        made = summary.write(plan.folder)
        left = plan.num_trials - sum(trial.is_over for trial in trials)
        if left:
            log(f"{left} trials are not over: the same command goes on with them")
    return made


def _write_plan(plan: SweepPlan) -> None:
    """Writes ``sweep.json``; it remembers the numbers of seeds at which there was a result."""
    path = storage.join(plan.folder, store.SWEEP)
    looks: list[int] = []
    if storage.exists(path):
        before = storage.read_json(path)
        looks, count = before.get("fewer_seeds_before", []), len(before["seeds"])
        over = any(trial.status == store.FINISHED for trial in store.read_all(plan.folder))
        if over and count < len(plan.seeds) and count not in looks:
            looks = [*looks, count]
    storage.write_json(path, {**plan.to_dict(), "fewer_seeds_before": looks})


def _create_grid(plan: SweepPlan) -> None:
    """Writes every trial down, all arms with the first seed before any with the second, so that
    what is interrupted is balanced; more seeds add trials at the end."""
    known = {trial.number for trial in store.read_all(plan.folder)}
    number = 0
    for seed in plan.seeds:
        for arm in plan.space.arms:
            if number not in known:
                chosen = {**arm.options, "schedule.seed": seed}
                store.create(plan.folder, Trial(number=number, arm=arm.name, options=chosen))
            number += 1


def _halving(plan: SweepPlan) -> Halving:
    """Where the sweep stands; a grid has one rung, so that every trial trains to its end."""
    epochs = plan.config.schedule.epochs
    places = (epochs,) if plan.space.method == GRID else rungs(epochs)
    return Halving(places, plan.num_trials, store.read_all(plan.folder))


def _leave_behind(plan: SweepPlan, halving: Halving, log: Callable[[str], None]) -> None:
    """Ends what was not promoted: nothing else can change that any more."""
    from fer_ray.sweeps.progress import line_of

    for number, reason in halving.left_behind().items():
        store.end(plan.folder, number, store.STOPPED, reason)
        log(line_of(store.read_trial(plan.folder, number)))


def _run_trials(
    plan: SweepPlan, halving: Halving, at_once: int, log: Callable[[str], None]
) -> None:
    """One sitting of Ray Tune. Its own state is not kept: the records are enough."""
    from ray import tune

    from fer_ray.sweeps import progress

    _quieten_tune()
    limits, scaling = plan.limits, plan.config.scaling
    shown = progress.Progress(plan.folder, plan.config, halving, log=log)
    callbacks: list[Any] = [shown]
    if limits.tensorboard:
        callbacks.append(progress.TensorBoard(str(Path(plan.folder) / "tensorboard")))
    with tempfile.TemporaryDirectory() as temporary:
        tuner = tune.Tuner(
            _trainable(plan),
            tune_config=tune.TuneConfig(
                search_alg=_planner(plan, halving),
                num_samples=-1,  # until the planner says that there is nothing more
                max_concurrent_trials=at_once,
                time_budget_s=limits.time_budget_s or None,
                reuse_actors=scaling.num_workers == 1,
            ),
            run_config=tune.RunConfig(
                name=plan.run,
                storage_path=temporary,
                verbose=0,
                callbacks=callbacks,
                failure_config=tune.FailureConfig(max_failures=scaling.max_failures),
            ),
        )
        try:
            with _interrupts(shown.interrupt):
                tuner.fit()
        finally:
            shown.close()


@contextlib.contextmanager
def _interrupts(note: Callable[[], None]) -> Iterator[None]:
    """Notes the first interrupt instead of raising it wherever Python happens to be.

    In a finalizer it would be printed and lost. A second one is raised as ever.
    """

    def handle(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        note()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _quieten_tune() -> None:
    """What Ray Tune would print, and the files that it would write for each trial."""
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new one prints a banner, however quiet
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "3600"
    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"
    # each report is decided on before the next epoch
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
        "images": images.share(plan),
    }
    wanted = preflight.wanted(plan)
    if plan.config.scaling.num_workers > 1:
        # its workers reserve what they need; a trial has to reserve something: a byte
        wanted = {"memory": 1.0}
    reserved = tune.PlacementGroupFactory([wanted])
    return tune.with_resources(tune.with_parameters(trial.run, settings=settings), reserved)


def _planner(plan: SweepPlan, halving: Halving) -> Any:
    """Who tells Ray Tune what to train next; the trials of a grid are written down already."""
    from fer_ray.sweeps.search import Planner, Suggestions

    suggestions = Suggestions(plan.space.ranges, seed=plan.config.schedule.seed)

    def make(number: int) -> Trial:
        chosen = suggestions.ask(number, halving.trials.values())
        made = Trial(number=number, arm=None, options={**chosen, "schedule.seed": plan.seeds[0]})
        store.create(plan.folder, made)
        return made

    return Planner(plan.folder, halving, make)
