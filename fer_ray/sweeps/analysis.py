"""The statistics of a grid: each arm over its seeds, and its difference to the baseline.

Every arm is trained with the same seeds, so a seed is a block: it decides the initial weights and
the order of the images in all arms. The model of a score is the sum of an arm's effect, a seed's
effect and noise with the same variance everywhere (randomized blocks: Montgomery, "Design and
Analysis of Experiments", chapter 4). When no trial is missing, a difference is the mean of the
differences paired by seed; otherwise it is estimated by least squares from all trials. The noise is
pooled over all arms, which gives tests with few seeds enough power; the paired t-test without
pooling is computed too.

The inference is about other seeds, not about other images.
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
"""An effect is shown where its corrected p-value is below this."""
POWER = 0.8
"""The probability with which a difference of the detectable size is shown."""
_NEGLIGIBLE = 1e-12
"""Noise below this fraction of the scores is rounding error and allows no test."""


@dataclass(frozen=True, kw_only=True)
class Mean:
    """One arm over its seeds, in the unit of the score; NaN where there are too few seeds."""

    arm: str
    num_seeds: int
    """Finished trials."""
    mean: float
    deviation: float
    """Standard deviation over seeds, with n - 1."""
    low: float
    """Lower end of the 95 % t interval of the mean, from this arm's standard deviation alone."""
    high: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An arm minus the baseline, in the unit of the score; NaN where it cannot be estimated."""

    arm: str
    num_seeds: int
    """Finished trials of the arm."""
    num_pairs: int
    """Seeds with which both the arm and the baseline finished."""
    difference: float
    standard_error: float
    low: float
    """Lower end of the 95 % t interval, for this comparison alone."""
    high: float
    p_value: float
    """Two-sided, for this comparison alone."""
    p_holm: float
    """Corrected (Holm) for all comparisons."""
    paired_p_value: float
    """Of the paired t-test on the common seeds, with their noise alone; not corrected."""
    smallest_shown: float
    """The smallest difference that would be shown if no other arm differed."""
    detectable: float
    """The true difference that would then be shown with the probability `POWER`."""

    @property
    def shown(self) -> bool:
        """Whether the data show a difference; False for NaN."""
        return self.p_holm < LEVEL


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """The arms of a grid, and their comparisons with the baseline."""

    baseline: str
    arms: tuple[Mean, ...]
    """All arms in the order of the grid, those without a finished trial too."""
    comparisons: tuple[Comparison, ...]
    """Every arm but the baseline, in the same order."""
    df: int
    """Degrees of freedom of the noise; 0: nothing can be tested."""
    noise: float
    """Standard deviation of a trial around arm and seed, pooled over arms; NaN where `df` is 0."""
    smallest_shown: float
    """Median over the comparisons; NaN where there are none."""
    detectable: float
    """Median over the comparisons; NaN where there are none."""

    def comparison(self, arm: str) -> Comparison | None:
        """An arm's comparison; None for the baseline."""
        return next((compared for compared in self.comparisons if compared.arm == arm), None)


def analyse(scores: pd.DataFrame, arms: Sequence[str]) -> Analysis:
    """Estimates the mean of each arm, and compares each arm with the first.

    Args:
        scores: one row per finished trial: ``arm``, ``seed``, ``score`` (finite). Each pair of arm
            and seed at most once.
        arms: every arm's name; the first is the baseline.

    Raises:
        ValueError: for a repeated pair of arm and seed, an unknown arm or a score of NaN.
    """
    table = _table(scores, arms)
    blocks = _Blocks(table)
    compared = [_compare(blocks, table, number, arm) for number, arm in enumerate(arms) if number]
    tested = [comparison for comparison in compared if not math.isnan(comparison.p_value)]
    p_holm = metrics.holm([comparison.p_value for comparison in tested])
    corrected = {comparison.arm: p_value for comparison, p_value in zip(tested, p_holm)}
    comparisons = tuple(
        replace(
            comparison,
            p_holm=corrected.get(comparison.arm, math.nan),
            smallest_shown=smallest_shown(comparison.standard_error, blocks.df, len(tested)),
            detectable=detectable(comparison.standard_error, blocks.df, len(tested)),
        )
        for comparison in compared
    )
    return Analysis(
        baseline=arms[0],
        arms=tuple(_mean(arm, row) for arm, row in zip(arms, table)),
        comparisons=comparisons,
        df=blocks.df,
        noise=blocks.noise,
        smallest_shown=_median([comparison.smallest_shown for comparison in comparisons]),
        detectable=_median([comparison.detectable for comparison in comparisons]),
    )


def smallest_shown(standard_error: float, df: int, num_comparisons: int) -> float:
    """The difference whose p-value is `LEVEL` at Holm's first and strictest step.

    Args:
        standard_error: of a difference.
        df: degrees of freedom of the noise.
        num_comparisons: comparisons that are corrected together.

    Returns:
        In the unit of the standard error; NaN where nothing can be tested.
    """
    return _critical(df, num_comparisons) * standard_error


def detectable(standard_error: float, df: int, num_comparisons: int) -> float:
    """The true difference that is shown with the probability `POWER`, at Holm's strictest step.

    It is an estimate, since the estimated standard error is taken for the true one.
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
    """The probability that t, whose numerator has the mean `shift`, is beyond the critical value.

    It is averaged over quantiles of the noise's standard deviation, because scipy's noncentral t
    is NaN for some shifts.
    """
    from scipy.special import ndtr
    from scipy.stats import chi2

    probabilities = (np.arange(4000) + 0.5) / 4000
    bounds = critical * np.sqrt(chi2.ppf(probabilities, df) / df)
    return float(np.mean(ndtr(shift - bounds) + ndtr(-bounds - shift)))


def _table(scores: pd.DataFrame, arms: Sequence[str]) -> np.ndarray:
    """Scores of shape (arms, seeds), NaN for a missing trial."""
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
    """Least squares for arm + seed on a table with missing values.

    The effects of the arms are eliminated, which leaves one small system for those of the seeds
    (the intra-block analysis of incomplete blocks).
    """

    def __init__(self, table: np.ndarray) -> None:
        present = ~np.isnan(table)
        present, table = present[present.any(axis=1)], table[present.any(axis=1)]
        per_arm = present.sum(axis=1, keepdims=True)
        means = np.where(present, table, 0.0).sum(axis=1, keepdims=True) / np.maximum(per_arm, 1)
        matrix = np.diag(present.sum(axis=0)) - present.T @ (present / np.maximum(per_arm, 1))
        self._inverse = np.linalg.pinv(matrix, rcond=1e-9, hermitian=True)
        self._matrix = matrix
        self._seeds = self._inverse @ np.where(present, table - means, 0.0).sum(axis=0)
        arm_effects = means - (present / np.maximum(per_arm, 1)) @ self._seeds[:, None]
        residuals = np.where(present, table - arm_effects - self._seeds, 0.0)
        rank = len(table) + round(float(np.trace(self._inverse @ matrix)))
        self.df = int(present.sum()) - rank
        """Degrees of freedom of the noise."""
        self.noise = math.nan
        """Standard deviation of a trial around arm and seed."""
        if self.df > 0:
            noise = math.sqrt(float((residuals**2).sum()) / self.df)
            self.noise = noise if noise > _NEGLIGIBLE * float(np.abs(means).max()) else 0.0

    def difference(self, first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
        """Difference of the effects of two arms and its standard error; NaN if not estimable.

        Args:
            first: the row of one arm in the table.
            second: the row of the other.
        """
        if np.isnan(first).all() or np.isnan(second).all():
            return math.nan, math.nan
        weights = _weights(first) - _weights(second)
        if not np.allclose(self._matrix @ self._inverse @ weights, weights, atol=1e-9):
            return math.nan, math.nan  # no chain of common seeds links the arms
        difference = np.nanmean(first) - np.nanmean(second) - weights @ self._seeds
        spread = weights @ self._inverse @ weights
        spread += sum(1 / np.isfinite(row).sum() for row in (first, second))
        return float(difference), self.noise * math.sqrt(float(spread))


def _weights(row: np.ndarray) -> np.ndarray:
    present = np.isfinite(row)
    return present / present.sum()


def _compare(blocks: _Blocks, table: np.ndarray, number: int, arm: str) -> Comparison:
    """The comparison of an arm with the baseline, before the correction."""
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
    """The p-value of the paired t-test; NaN for fewer than two pairs, or without noise."""
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
