"""The importance of each option of a search, by functional ANOVA.

fANOVA (Hutter, Hoos and Leyton-Brown, ICML 2014) fits a random forest to the trials and decomposes
the variance of its predictions over the whole space. The importance of an option is the fraction
that it explains by itself, averaged over the values of all others. Optuna's implementation is used.
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
"""With fewer trials the importance differs much from one search to the next."""
_REACHED_BY = 0.9
"""Fraction of the trials that reached the epoch after which they are compared."""
_FEWEST = 4
_TREES = 64  # Optuna's default


@dataclass(frozen=True, kw_only=True)
class Importance:
    """How much of the variance the options of a search explain."""

    epoch: int
    """The trials are compared by their validation accuracy after this epoch; 0: there is none."""
    num_trials: int
    """Trials that reached it."""
    shares: dict[str, float]
    """Fractions by dotted name, the largest first; they add up to 1. Empty where not known."""
    predicted: float
    """R² of a forest on trials that it was not fitted to; 0 or less: the importance is noise."""
    reason: str | None = None
    """Why the importance is not known."""


def distribution(name: str, values: Mapping[str, Any] | Sequence[Any]) -> Any:
    """Optuna's distribution of the values of a setting.

    Args:
        name: the setting's dotted name.
        values: its choices, or ``low``, ``high``, ``log`` and ``step``, as in ``sweep.json``.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(values, Mapping):
        return CategoricalDistribution(list(values))
    log, step = values.get("log", False), values.get("step")
    if overrides.settings()[name].type is int:
        low, high = int(values["low"]), int(values["high"])
        return IntDistribution(low, high, log=log, step=int(step or 1))
    return FloatDistribution(float(values["low"]), float(values["high"]), log=log, step=step)


def common_epoch(trials: pd.DataFrame) -> int:
    """The last epoch that nine in ten of the trials that did not fail reached; 0 for none.

    Args:
        trials: the content of ``trials.parquet``.
    """
    reached = trials[trials["status"] != store.FAILED].groupby("trial")["epoch"].max()
    if reached.empty:
        return 0
    enough = math.ceil(_REACHED_BY * len(reached) - 1e-9)
    return int(np.sort(reached)[::-1][enough - 1])


def importance(trials: pd.DataFrame, space: Mapping[str, Any]) -> Importance:
    """The fraction of the accuracy's variance that each option of a search explains.

    Args:
        trials: the content of ``trials.parquet``.
        space: choices or range by dotted name, as in ``sweep.json``.

    Returns:
        The same numbers for the same trials: the seed of the forest is fixed.
    """
    epoch = common_epoch(trials)
    compared = trials[(trials["epoch"] == epoch) & (trials["status"] != store.FAILED)]
    compared = compared[compared["validation_accuracy"].notna()] if epoch else trials[:0]
    values = compared["validation_accuracy"].to_numpy(float)
    reason = None
    if len(values) < _FEWEST:
        reason = f"{len(values)} trials are too few"
    elif np.ptp(values) == 0:
        reason = "all trials have the same accuracy"
    try:
        shares = {} if reason else _fanova(compared, values, space)
    except RuntimeError:  # from Optuna, where no tree can split the trials
        reason, shares = "no option distinguishes the trials", {}
    predicted = math.nan if reason else _predicted(compared, values, space)
    return Importance(
        epoch=epoch, num_trials=len(values), shares=shares, predicted=predicted, reason=reason
    )


def _fanova(
    compared: pd.DataFrame, values: np.ndarray, space: Mapping[str, Any]
) -> dict[str, float]:
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions = {name: distribution(name, choices) for name, choices in space.items()}
    study = optuna.create_study(direction="maximize")
    for row, value in zip(compared.to_dict("records"), values):
        params = {name: plain(row[overrides.column_of(name)]) for name in space}
        study.add_trial(
            optuna.create_trial(params=params, distributions=distributions, value=float(value))
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about experimental features and a new default
        evaluator = FanovaImportanceEvaluator(n_trees=_TREES, seed=0)
        shares = get_param_importances(study, evaluator=evaluator, params=list(space))
    ranked = sorted(shares.items(), key=lambda item: -item[1])
    return {name: float(fraction) for name, fraction in ranked}


def _predicted(compared: pd.DataFrame, values: np.ndarray, space: Mapping[str, Any]) -> float:
    """Out-of-bag R² of a similar forest: each trial is predicted by trees that did not see it."""
    from sklearn.ensemble import RandomForestRegressor

    columns = []
    for name, choices in space.items():
        column = compared[overrides.column_of(name)]
        if isinstance(choices, Mapping):
            numbers = column.to_numpy(float)
            columns.append(np.log(numbers) if choices.get("log") else numbers)
        else:
            columns += [column.map(plain).eq(choice).to_numpy(float) for choice in choices]
    forest = RandomForestRegressor(n_estimators=256, oob_score=True, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # with few trials, every tree sees some of them
        forest.fit(np.stack(columns, axis=1), values)
    return float(forest.oob_score_)


def plain(value: Any) -> Any:
    """A cell of ``trials.parquet`` as a JSON type: None for a missing one, Python's numbers."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and math.isnan(value) else value
