"""What a sweep asks of the cluster, and what it says before it starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fer_ray.runtime import resources
from fer_ray.sweeps.halving import REDUCTION, Halving
from fer_ray.sweeps.plan import SweepPlan
from fer_ray.sweeps.space import GRID


def announcement(plan: SweepPlan, halving: Halving, at_once: int) -> str:
    """What there is to do, and how much of it at once."""
    epochs, space = plan.config.schedule.epochs, plan.space
    over = [trial for trial in halving.trials.values() if trial.is_over]
    done = sum(len(trial.history) for trial in halving.trials.values() if not trial.is_over)
    left = f"{halving.epochs_left({}):,} epochs to run"
    if space.method == GRID:
        shape = (
            f"{len(space.arms)} arms x {len(plan.seeds)} seeds = {plan.num_trials} trials of "
            f"{epochs} epochs"
        )
    else:
        most = (plan.num_trials - len(over)) * epochs - done
        pauses = halving.rungs[:-1]
        shape = f"{plan.num_trials} trials of at most {epochs} epochs"
        if pauses:
            shape += f", of which ASHA promotes about one in {REDUCTION} after {_epochs(pauses)}"
            left = f"about {left}, at most {most:,}"
    text = (
        f"sweep {plan.run!r}: {shape}, on {plan.train_images:,} images; {at_once} at once; {left}"
    )
    if over or done:
        text += f" ({len(over)} trials are over, {done:,} epochs of the others are done)"
    return text


def _epochs(numbers: Sequence[int]) -> str:
    """Such as ``epochs 3 and 10``."""
    plural = "s" if len(numbers) > 1 else ""
    return f"epoch{plural} {' and '.join(map(str, numbers))}"


def wanted(plan: SweepPlan) -> dict[str, float]:
    """What one trial reserves."""
    scaling = plan.config.scaling
    amounts = {"CPU": scaling.num_workers * scaling.cpus_per_worker}
    if scaling.use_gpu:
        amounts["GPU"] = plan.limits.gpus_per_trial or float(scaling.num_workers)
    return amounts


def trials_at_once(plan: SweepPlan, log: Callable[[str], None]) -> int:
    """How many trials run side by side, once the cluster has grown as far as it may.

    A trial of one process has to fit a node; the workers of others may be spread. Trials that
    wait for a node are what an autoscaler starts it for.

    Raises:
        UserError: where none ever fits.
    """
    scaling = plan.config.scaling
    each, flag = wanted(plan), "--gpus-per-trial"
    if scaling.num_workers > 1:
        each, flag = {kind: one / scaling.num_workers for kind, one in each.items()}, "--use-gpu"
    demand = resources.Demand(
        each=each,
        count=scaling.num_workers,
        flags={"CPU": "--cpus-per-worker", "GPU": flag},
        hint="less for each trial may fit",
    )
    nodes = resources.check(demand, log=log)
    now = max(resources.fitting(each, nodes) // scaling.num_workers, 1)
    most = plan.limits.max_concurrent or plan.num_trials
    if now < min(most, plan.num_trials):
        grown = resources.fitting_at_maximum(each)
        if grown is None:
            log(
                f"{now} trials fit at once; how far the cluster may grow is not known: "
                f"--max-concurrent N lets N of them wait for more nodes, or set {resources.MAXIMUM}"
            )
            grown = (plan.limits.max_concurrent or now) * scaling.num_workers
        now = max(now, grown // scaling.num_workers)
    return min(now, most, plan.num_trials)
