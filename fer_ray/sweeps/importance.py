"""How much each option of a search matters, by functional ANOVA.

fANOVA (Hutter, Hoos and Leyton-Brown, ICML 2014) fits a random forest to the trials and splits
the variance of its predictions over the whole space: an option's share is what it explains by
itself, averaged over all others. Optuna's implementation is used.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from fer_ray.config import overrides
from fer_ray.sweeps import store

FEWEST_STABLE = 30
"""Below so many trials the shares change much from one search to the next."""
_REACHED_BY = 0.9
"""Share of the trials that has to have reached the epoch at which they are compared."""
_FEWEST = 4
_TREES = 64  # Optuna's default


@dataclass(frozen=True, kw_only=True)
class Importance:
    """What the options of a search explain."""

    epoch: int
    """All trials are compared by their validation accuracy after it; 0: there is none."""
    num_trials: int
    """That reached it."""
    shares: dict[str, float]
    """By dotted name, the largest first; they add up to 1. Empty where nothing can be told."""
    predicted: float
    """R² of a forest for trials that it was not fitted to: at 0 or below, the shares are noise."""
    reason: str | None = None
    """Why there are no shares."""


def distribution(name: str, given: Mapping[str, Any] | Sequence[Any]) -> Any:
    """Optuna's distribution of one setting.

    Args:
        name: the setting's dotted name.
        given: its choices, or ``low``, ``high``, ``log`` and ``step``, as in ``sweep.json``.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(given, Mapping):
        return CategoricalDistribution(list(given))
    log, step = given.get("log", False), given.get("step")
    if overrides.settings()[name].type is int:
        low, high = int(given["low"]), int(given["high"])
        return IntDistribution(low, high, log=log, step=int(step or 1))
    return FloatDistribution(float(given["low"]), float(given["high"]), log=log, step=step)


def common_epoch(trials: pd.DataFrame) -> int:
    """The last epoch that nine in ten trials reached, the failed ones not counted; 0 for none.

    Args:
        trials: the content of ``trials.parquet``.
    """
    reached = trials[trials["status"] != store.FAILED].groupby("trial")["epoch"].max()
    if reached.empty:
        return 0
    enough = math.ceil(_REACHED_BY * len(reached) - 1e-9)
    return int(np.sort(reached)[::-1][enough - 1])


def importance(trials: pd.DataFrame, space: Mapping[str, Any]) -> Importance:
    """The share of each option of a search in the variance of the accuracy.

    Args:
        trials: the content of ``trials.parquet``.
        space: choices or range by dotted name, as in ``sweep.json``.

    Returns:
        The same for the same trials: the forest's seed is fixed.
    """
    epoch = common_epoch(trials)
    compared = trials[(trials["epoch"] == epoch) & (trials["status"] != store.FAILED)]
    compared = compared[compared["validation_accuracy"].notna()] if epoch else trials[:0]
    values = compared["validation_accuracy"].to_numpy(float)
    known: dict[str, Any] = {"epoch": epoch, "num_trials": len(values)}
    reason = None
    if len(values) < _FEWEST:
        reason = f"{len(values)} trials are too few"
    elif np.ptp(values) == 0:
        reason = "all trials are equally accurate"
    try:
        shares = {} if reason else _fanova(compared, values, space)
    except RuntimeError:  # Optuna's, where no tree finds anything to split
        reason, shares = "no option tells the trials apart", {}
    predicted = math.nan if reason else _predicted(compared, values, space)
    return Importance(**known, shares=shares, predicted=predicted, reason=reason)


def _fanova(
    compared: pd.DataFrame, values: np.ndarray, space: Mapping[str, Any]
) -> dict[str, float]:
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions = {name: distribution(name, given) for name, given in space.items()}
    study = optuna.create_study(direction="maximize")
    for row, value in zip(compared.to_dict("records"), values):
        params = {name: plain(row[overrides.column_of(name)]) for name in space}
        study.add_trial(
            optuna.create_trial(params=params, distributions=distributions, value=float(value))
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental, that another is the default
        evaluator = FanovaImportanceEvaluator(n_trees=_TREES, seed=0)
        shares = get_param_importances(study, evaluator=evaluator, params=list(space))
    ranked = sorted(shares.items(), key=lambda item: -item[1])
    return {name: float(share) for name, share in ranked}


def _predicted(compared: pd.DataFrame, values: np.ndarray, space: Mapping[str, Any]) -> float:
    """R² of a like forest, of each trial by the trees that did not see it."""
    from sklearn.ensemble import RandomForestRegressor

    columns = []
    for name, given in space.items():
        column = compared[overrides.column_of(name)]
        if isinstance(given, Mapping):
            numbers = column.to_numpy(float)
            columns.append(np.log(numbers) if given.get("log") else numbers)
        else:
            columns += [column.map(plain).eq(choice).to_numpy(float) for choice in given]
    forest = RandomForestRegressor(n_estimators=256, oob_score=True, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few trials, some are seen by every tree
        forest.fit(np.stack(columns, axis=1), values)
    return float(forest.oob_score_)


def plain(value: Any) -> Any:
    """A cell of ``trials.parquet`` as JSON has it: None for a missing one, Python's numbers."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and math.isnan(value) else value
