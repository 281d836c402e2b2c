"""What a designed sweep shows: each arm over its seeds, and its difference to the baseline.

Every arm is trained with the same seeds, so a seed is a block: it decides the initial weights and
the order of the images for all arms alike. A trial's score is taken as the sum of an arm's effect,
a seed's effect and noise that is equally large everywhere (randomized blocks: Montgomery, "Design
and Analysis of Experiments", chapter 4). With all trials there, a difference is the plain mean of
the differences paired by seed; where some are missing, least squares takes from the others what
they say. Pooling the noise over all arms is what makes few seeds say something; the paired t-test
without pooling stands beside it for who doubts that.

Everything here is about other seeds. Nothing is about other images.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from fer_ray import metrics

LEVEL = 0.05
"""An effect is called shown when its corrected p-value is below."""
POWER = 0.8
"""The chance of showing the difference that is called detectable."""
_NEGLIGIBLE = 1e-12
"""Noise below this share of the scores is rounding: nothing can be tested with it."""


@dataclass(frozen=True, kw_only=True)
class Mean:
    """One arm over its seeds, in the score's unit; NaN where there are too few."""

    arm: str
    num_seeds: int
    """Finished trials."""
    mean: float
    deviation: float
    """Standard deviation over seeds, with n - 1."""
    low: float
    """Of the 95 % t interval of the mean, from this arm's deviation alone."""
    high: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An arm minus the baseline, in the score's unit; NaN where it cannot be told."""

    arm: str
    num_seeds: int
    """Finished trials of the arm."""
    num_pairs: int
    """Seeds with which both the arm and the baseline finished."""
    difference: float
    standard_error: float
    low: float
    """Of the 95 % t interval, for this comparison alone."""
    high: float
    p_value: float
    """Two-sided, for this comparison alone."""
    p_holm: float
    """Corrected (Holm) for all comparisons."""
    paired_p_value: float
    """Of the paired t-test on the seeds in common, with its own noise only; not corrected."""
    smallest_shown: float
    """The difference that would just be called shown if no other arm differed."""
    detectable: float
    """The true difference that would then be shown with the chance `POWER`."""

    @property
    def shown(self) -> bool:
        """Whether the data show a difference; False for NaN."""
        return self.p_holm < LEVEL


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """A designed sweep's arms and comparisons."""

    baseline: str
    arms: tuple[Mean, ...]
    """All arms in the given order, those without a finished trial too."""
    comparisons: tuple[Comparison, ...]
    """Every arm but the baseline, in the same order."""
    df: int
    """Degrees of freedom of the noise; 0: nothing can be tested."""
    noise: float
    """Standard deviation of one trial about arm and seed, pooled over arms; NaN at df 0."""
    smallest_shown: float
    """Median of the comparisons'; NaN where there are none."""
    detectable: float
    """Likewise."""

    def comparison(self, arm: str) -> Comparison | None:
        """An arm's comparison; None for the baseline."""
        return next((one for one in self.comparisons if one.arm == arm), None)


def analyse(scores: pd.DataFrame, arms: Sequence[str]) -> Analysis:
    """Estimates each arm, and compares it with the first.

    Args:
        scores: one row a finished trial: ``arm``, ``seed``, ``score`` (finite). Each arm and seed
            at most once.
        arms: every arm's name; the first is the baseline.

    Raises:
        ValueError: for an arm and seed that comes twice, an unknown arm or a score of NaN.
    """
    table = _table(scores, arms)
    blocks = _Blocks(table)
    compared = [_compare(blocks, table, number, arm) for number, arm in enumerate(arms) if number]
    tested = [one for one in compared if not math.isnan(one.p_value)]
    corrected = dict(zip(map(id, tested), metrics.holm([one.p_value for one in tested])))
    finished = tuple(
        replace(
            one,
            p_holm=corrected.get(id(one), math.nan),
            smallest_shown=smallest_shown(one.standard_error, blocks.df, len(tested)),
            detectable=detectable(one.standard_error, blocks.df, len(tested)),
        )
        for one in compared
    )
    return Analysis(
        baseline=arms[0],
        arms=tuple(_mean(arm, row) for arm, row in zip(arms, table)),
        comparisons=finished,
        df=blocks.df,
        noise=blocks.noise,
        smallest_shown=_median([one.smallest_shown for one in finished]),
        detectable=_median([one.detectable for one in finished]),
    )


def smallest_shown(standard_error: float, df: int, num_comparisons: int) -> float:
    """The difference whose p-value is `LEVEL` at Holm's first and strictest step.

    Args:
        standard_error: of a difference.
        df: degrees of freedom of the noise.
        num_comparisons: that are corrected together.

    Returns:
        In the unit of the standard error; NaN where nothing can be tested.
    """
    return _critical(df, num_comparisons) * standard_error


def detectable(standard_error: float, df: int, num_comparisons: int) -> float:
    """The true difference that is shown with the chance `POWER`, at Holm's strictest step.

    The standard error is taken as the true one, so this is itself an estimate.
    """
    return _shift(df, num_comparisons) * standard_error


@functools.cache
def _shift(df: int, num_comparisons: int) -> float:
    """The detectable difference in standard errors."""
    critical = _critical(df, num_comparisons)
    if math.isnan(critical):
        return math.nan
    from scipy.optimize import brentq

    high = 2 * critical
    while _power(high, critical, df) < POWER:
        high *= 2
    return float(brentq(lambda shift: _power(shift, critical, df) - POWER, 0.0, high))


def _critical(df: int, num_comparisons: int) -> float:
    """The t value beyond which Holm's first step rejects."""
    if df < 1 or num_comparisons < 1:
        return math.nan
    from scipy.stats import t

    return float(t.isf(LEVEL / num_comparisons / 2, df))


def _power(shift: float, critical: float, df: int) -> float:
    """The chance that t, whose numerator has the mean `shift`, lies beyond the critical value.

    The mean over equally probable deviations of the noise, because scipy's noncentral t is NaN
    for some shifts.
    """
    from scipy.special import ndtr
    from scipy.stats import chi2

    probabilities = (np.arange(4000) + 0.5) / 4000
    bounds = critical * np.sqrt(chi2.ppf(probabilities, df) / df)
    return float(np.mean(ndtr(shift - bounds) + ndtr(-bounds - shift)))


def _table(scores: pd.DataFrame, arms: Sequence[str]) -> np.ndarray:
    """Scores of shape (arms, seeds), NaN where there is none."""
    if scores.duplicated(["arm", "seed"]).any():
        raise ValueError("an arm has two trials of one seed")
    values = scores["score"].to_numpy(float)
    if not scores["arm"].isin(arms).all() or not np.isfinite(values).all():
        raise ValueError("unknown arm, or a score that is not finite")
    seeds = sorted(scores["seed"].unique())
    table = np.full((len(arms), len(seeds)), np.nan)
    numbers = {arm: number for number, arm in enumerate(arms)}
    rows = [numbers[arm] for arm in scores["arm"]]
    table[rows, np.searchsorted(seeds, scores["seed"])] = values
    return table


class _Blocks:
    """Least squares for arm + seed on a table with holes.

    The arms' effects are eliminated, which leaves one small system for the seeds' (the
    intra-block analysis of incomplete blocks).
    """

    def __init__(self, table: np.ndarray) -> None:
        there = ~np.isnan(table)
        there, table = there[there.any(axis=1)], table[there.any(axis=1)]
        per_arm = there.sum(axis=1, keepdims=True)
        means = np.where(there, table, 0.0).sum(axis=1, keepdims=True) / np.maximum(per_arm, 1)
        matrix = np.diag(there.sum(axis=0)) - there.T @ (there / np.maximum(per_arm, 1))
        self._inverse = np.linalg.pinv(matrix, rcond=1e-9, hermitian=True)
        self._matrix = matrix
        self._seeds = self._inverse @ np.where(there, table - means, 0.0).sum(axis=0)
        arm_effects = means - (there / np.maximum(per_arm, 1)) @ self._seeds[:, None]
        residuals = np.where(there, table - arm_effects - self._seeds, 0.0)
        rank = len(table) + round(float(np.trace(self._inverse @ matrix)))
        self.df = int(there.sum()) - rank
        """Degrees of freedom of the noise."""
        self.noise = math.nan
        """Standard deviation of a trial about arm and seed."""
        if self.df > 0:
            noise = math.sqrt(float((residuals**2).sum()) / self.df)
            self.noise = noise if noise > _NEGLIGIBLE * float(np.abs(means).max()) else 0.0

    def difference(self, first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
        """Difference of two arms' effects and its standard error; NaN where it has none.

        Args:
            first: the one arm's row of the table.
            second: the other's.
        """
        if np.isnan(first).all() or np.isnan(second).all():
            return math.nan, math.nan
        weights = _weights(first) - _weights(second)
        if not np.allclose(self._matrix @ self._inverse @ weights, weights, atol=1e-9):
            return math.nan, math.nan  # no chain of common seeds links the two
        difference = np.nanmean(first) - np.nanmean(second) - weights @ self._seeds
        spread = weights @ self._inverse @ weights
        spread += sum(1 / np.isfinite(row).sum() for row in (first, second))
        return float(difference), self.noise * math.sqrt(float(spread))


def _weights(row: np.ndarray) -> np.ndarray:
    there = np.isfinite(row)
    return there / there.sum()


def _compare(blocks: _Blocks, table: np.ndarray, number: int, arm: str) -> Comparison:
    """An arm against the baseline, not corrected yet."""
    from scipy.stats import t

    difference, error = blocks.difference(table[number], table[0])
    p_value, reach = math.nan, math.nan
    if blocks.df > 0 and error > 0:
        p_value = float(2 * t.sf(abs(difference) / error, blocks.df))
        reach = float(t.isf((1 - metrics.CONFIDENCE) / 2, blocks.df)) * error
    pairs = (table[number] - table[0])[np.isfinite(table[number] - table[0])]
    return Comparison(
        arm=arm,
        num_seeds=int(np.isfinite(table[number]).sum()),
        num_pairs=len(pairs),
        difference=difference,
        standard_error=error,
        low=difference - reach,
        high=difference + reach,
        p_value=p_value,
        p_holm=p_value,
        paired_p_value=_paired(pairs),
        smallest_shown=math.nan,
        detectable=math.nan,
    )


def _paired(differences: np.ndarray) -> float:
    """The p-value of the paired t-test; NaN for fewer than two, or without any noise."""
    from scipy.stats import t

    if len(differences) < 2 or np.ptp(differences) <= _NEGLIGIBLE * np.abs(differences).max():
        return math.nan
    error = differences.std(ddof=1) / math.sqrt(len(differences))
    return float(2 * t.sf(abs(differences.mean()) / error, len(differences) - 1))


def _mean(arm: str, row: np.ndarray) -> Mean:
    values = row[np.isfinite(row)]
    count = len(values)
    mean = float(values.mean()) if count else math.nan
    deviation, reach = math.nan, math.nan
    if count > 1:
        from scipy.stats import t

        deviation = float(values.std(ddof=1))
        quantile = float(t.isf((1 - metrics.CONFIDENCE) / 2, count - 1))
        reach = quantile * deviation / math.sqrt(count)
    return Mean(
        arm=arm,
        num_seeds=count,
        mean=mean,
        deviation=deviation,
        low=mean - reach,
        high=mean + reach,
    )


def _median(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.median(known)) if known else math.nan
