"""Runs a sweep on Ray Tune, or goes on with it.

A sweep is a folder, ``<storage>/<run>/`` (`records`). Trials that are over are kept, the others
go on from their last checkpoints.
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
from fer_ray.errors import UserError
from fer_ray.sweeps import images, records
from fer_ray.sweeps.planning import SweepPlan
from fer_ray.sweeps.records import Trial
from fer_ray.sweeps.space import GRID, SEARCH


def fit(plan: SweepPlan, *, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs on the connected Ray cluster what of a sweep is left to run.

    Args:
        plan: from `plan`.
        say: takes lines of progress.

    Returns:
        The content of ``summary.json``.

    Raises:
        UserError: where not a single trial fits the cluster.
        KeyboardInterrupt: when it was interrupted; the tables are written before.
    """
    from fer_ray.sweeps import summary

    at_once = trials_at_once(plan, say)
    storage.write_json(storage.join(plan.folder, records.SWEEP), plan.to_dict())
    if plan.space.method == GRID:
        _create_grid(plan)
    earlier = records.read_all(plan.folder)
    say(_announcement(plan, earlier, at_once))
    try:
        if sum(trial.is_over for trial in earlier) < plan.num_trials:
            _run_trials(plan, earlier, at_once, say)
    finally:
        trials = records.write_trials(plan.folder, plan.config)
        made = summary.write(plan.folder)
        left = plan.num_trials - sum(trial.is_over for trial in trials)
        if left:
            say(f"{left} trials are not over: the same command goes on with them")
    return made


def _create_grid(plan: SweepPlan) -> None:
    """Writes every trial down, all arms with the first seed before any with the second, so that
    what is interrupted is balanced; more seeds add trials at the end."""
    known = {trial.number for trial in records.read_all(plan.folder)}
    number = 0
    for seed in plan.seeds:
        for arm in plan.space.arms:
            if number not in known:
                chosen = {**arm.options, "schedule.seed": seed}
                records.create(plan.folder, Trial(number=number, arm=arm.name, options=chosen))
            number += 1


def _announcement(plan: SweepPlan, earlier: list[Trial], at_once: int) -> str:
    """The preflight: what there is to do, and how much of it at once."""
    epochs, space = plan.config.schedule.epochs, plan.space
    shape = f"{plan.num_trials} trials"
    if space.method == GRID:
        shape = f"{len(space.arms)} arms x {len(plan.seeds)} seeds = {shape}"
    over = [trial for trial in earlier if trial.is_over]
    done = sum(len(trial.history) for trial in earlier if not trial.is_over)
    left = (plan.num_trials - len(over)) * epochs - done
    most = " at most" if space.method == SEARCH else ""
    text = (
        f"sweep {plan.run!r}: {shape} of {epochs} epochs{most} on {plan.train_images:,} images; "
        f"{at_once} at once; {left:,} epochs to run{most}"
    )
    if over or done:
        text += f" ({len(over)} trials are over, {done:,} epochs of the others are done)"
    return text


def _wanted(plan: SweepPlan) -> dict[str, float]:
    """What one trial reserves."""
    scaling = plan.config.scaling
    wanted = {"CPU": scaling.num_workers * scaling.cpus_per_worker}
    if scaling.use_gpu:
        wanted["GPU"] = plan.limits.gpus_per_trial or float(scaling.num_workers)
    return wanted


def trials_at_once(plan: SweepPlan, say: Callable[[str], None]) -> int:
    """How many trials run side by side.

    A trial of one process has to fit a node; the workers of others may be spread.

    Raises:
        UserError: where none ever fits.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = _wanted(plan)
    if plan.config.scaling.num_workers > 1:
        nodes = [ray.cluster_resources()]
    # 1e-9: three times 0.1 fits into 0.3
    fitting = sum(
        min(int(node.get(kind, 0.0) / amount + 1e-9) for kind, amount in wanted.items())
        for node in nodes
    )
    if not fitting:
        has = ", ".join(
            f"{max(node.get(kind, 0.0) for node in nodes):g} {kind}s" for kind in wanted
        )
        asked = ", ".join(f"{amount:g} {kind}s" for kind, amount in wanted.items())
        message = f"--cpus-per-worker, --gpus-per-trial: a trial wants {asked}, a node has {has}"
        if not os.environ.get("RAY_ADDRESS"):
            raise UserError(message)
        say(f"{message}: waiting for the cluster to grow")
        fitting = 1
    return min(fitting, plan.limits.max_concurrent or fitting, plan.num_trials)


def _run_trials(
    plan: SweepPlan, earlier: list[Trial], at_once: int, say: Callable[[str], None]
) -> None:
    """One sitting of Ray Tune. Its own state is not kept: the records are enough."""
    from ray import tune

    from fer_ray.sweeps import progress

    _quieten_tune()
    limits, scaling = plan.limits, plan.config.scaling
    shown = progress.Progress(
        plan.folder, plan.config, num_trials=plan.num_trials, earlier=earlier, say=say
    )
    callbacks: list[Any] = [shown]
    if limits.tensorboard:
        callbacks.append(progress.TensorBoard(str(Path(plan.folder) / "tensorboard")))
    planner, scheduler = _search(plan, earlier)
    with tempfile.TemporaryDirectory() as temporary:
        tuner = tune.Tuner(
            _trainable(plan),
            tune_config=tune.TuneConfig(
                search_alg=planner,
                scheduler=scheduler,
                num_samples=plan.num_trials - sum(trial.is_over for trial in earlier),
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
    wanted = _wanted(plan)
    if plan.config.scaling.num_workers > 1:
        # its workers reserve what they need; a trial has to reserve something: a byte
        wanted = {"memory": 1.0}
    reserved = tune.PlacementGroupFactory([wanted])
    return tune.with_resources(tune.with_parameters(trial.run, settings=settings), reserved)


def _search(plan: SweepPlan, earlier: list[Trial]) -> tuple[Any, Any]:
    """Who says which trial comes next and which is stopped, with what is known already."""
    from fer_ray.sweeps.search import Halving, Planner, Suggestions

    waiting = [trial.number for trial in earlier if not trial.is_over]
    if plan.space.method == GRID:
        return Planner(plan.folder, waiting), None
    suggestions = Suggestions(plan.space.ranges, seed=plan.config.schedule.seed)
    for trial in earlier:
        suggestions.remember(trial)
    following = iter(range(len(earlier), plan.num_trials))

    def suggest() -> Trial:
        number = next(following)
        chosen = {**suggestions.ask(number), "schedule.seed": plan.seeds[0]}
        made = Trial(number=number, arm=None, options=chosen)
        records.create(plan.folder, made)
        return made

    planner = Planner(
        plan.folder,
        waiting,
        num_new=plan.num_trials - len(earlier),
        suggest=suggest,
        ended=suggestions.tell,
    )
    return planner, Halving(plan.folder, plan.config.schedule.epochs, earlier)
