"""Paired comparisons of two runs: by accuracy, on the images that both predicted.

Images are matched by ``image_id``, never by the order of rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fer_ray import metrics
from fer_ray.errors import UserError
from fer_ray.evaluation.scores import Score

LEVEL = 0.05
"""Significance level: a difference is shown when its corrected p-value is below this."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two runs on the images of a split that both predicted; differences are first - second."""

    split: str
    first_run: str
    second_run: str
    num_first: int
    """Number of scored images of the first run."""
    num_second: int
    """Number of scored images of the second run."""
    num_common: int
    """Images scored in both runs, with the same label and pixels: these are compared."""
    num_conflicting: int
    """Images with the same ``image_id`` but different labels or pixels: left out."""
    first_accuracy: float
    """On the common images, 0 to 1."""
    second_accuracy: float
    """On the common images, 0 to 1."""
    only_first_right: int
    """Common images that only the first run predicts correctly."""
    only_second_right: int
    """Common images that only the second run predicts correctly."""
    difference: float
    """Of the accuracies, -1 to 1."""
    difference_low: float
    difference_high: float
    p_value: float
    """Of McNemar's exact test, two-sided."""
    p_holm: float
    """Corrected for all comparisons on the split; equal to `p_value` where there is one."""

    @property
    def shown(self) -> bool:
        """Whether the data show a difference."""
        return self.p_holm < LEVEL


def compare_all(
    scores: Sequence[Score], *, baseline: str | None, resamples: int, seed: int
) -> list[Comparison]:
    """All comparisons on one split, their p-values corrected together.

    Args:
        scores: of the runs on the split.
        baseline: the run that the others are compared with; None compares every pair, the run
            with the higher accuracy first.
        resamples: bootstrap resamples of each interval.
        seed: of the resampling.

    Raises:
        UserError: where the runs have different classes.
    """
    for other in scores[1:]:
        if set(other.labels) != set(scores[0].labels):
            raise UserError(
                f"split {other.split!r}: the classes of {scores[0].run} are "
                f"{', '.join(scores[0].labels)} but those of {other.run} are "
                f"{', '.join(other.labels)}: they cannot be compared; evaluate them one at a time"
            )
    ranked = sorted(scores, key=lambda score: (-np.nan_to_num(score.accuracy.value), score.run))
    pairs = list(itertools.combinations(ranked, 2))
    if baseline is not None:
        reference = [score for score in ranked if score.run == baseline]
        pairs = [(score, last) for last in reference for score in ranked if score is not last]
    comparisons = [compare(*pair, resamples=resamples, seed=seed) for pair in pairs]
    tested = [comparison for comparison in comparisons if comparison.num_common]
    corrected = metrics.holm([comparison.p_value for comparison in tested])
    p_holm = {id(comparison): p_value for comparison, p_value in zip(tested, corrected)}
    return [
        replace(comparison, p_holm=p_holm.get(id(comparison), float("nan")))
        for comparison in comparisons
    ]


def compare(first: Score, second: Score, *, resamples: int, seed: int) -> Comparison:
    """Compares two runs on one split; `p_holm` is not corrected yet."""
    joined = first.rows.add_suffix("_1").join(second.rows.add_suffix("_2"), how="inner")
    hashes = joined[["pixel_sha256_1", "pixel_sha256_2"]]
    same_pixels = (hashes.iloc[:, 0] == hashes.iloc[:, 1]) | hashes.isna().any(axis=1)
    same = (joined["label_1"] == joined["label_2"]) & same_pixels
    first_correct = joined.loc[same, "correct_1"].to_numpy(bool)
    second_correct = joined.loc[same, "correct_2"].to_numpy(bool)
    total = len(first_correct)
    only_first = int((first_correct & ~second_correct).sum())
    only_second = int((~first_correct & second_correct).sum())
    p_value = mcnemar(only_first, only_second) if total else float("nan")
    low, high = paired_difference_interval(
        only_first, only_second, total, resamples=resamples, seed=seed
    )
    per_image = 1 / total if total else float("nan")
    return Comparison(
        split=first.split,
        first_run=first.run,
        second_run=second.run,
        num_first=first.num_scored,
        num_second=second.num_scored,
        num_common=total,
        num_conflicting=int((~same).sum()),
        first_accuracy=int(first_correct.sum()) * per_image,
        second_accuracy=int(second_correct.sum()) * per_image,
        only_first_right=only_first,
        only_second_right=only_second,
        difference=(only_first - only_second) * per_image,
        difference_low=low,
        difference_high=high,
        p_value=p_value,
        p_holm=p_value,
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's test of whether two models are equally accurate on the same images.

    Always the exact form: if they are, the number of images that only the first model predicts
    correctly is binomial with probability 1/2 among those that exactly one model predicts
    correctly (McNemar, Psychometrika 12, 1947, and its exact conditional form).

    Args:
        only_first: number of images that only the first model predicts correctly.
        only_second: number of images that only the second model predicts correctly.

    Returns:
        The two-sided p-value; 1 where the models never differ.
    """
    if only_first + only_second == 0:
        return 1.0
    from scipy.stats import binomtest  # takes half a second, which other jobs do without

    return float(binomtest(only_first, only_first + only_second).pvalue)


def paired_difference_interval(
    only_first: int,
    only_second: int,
    total: int,
    *,
    resamples: int = metrics.RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """The 95 % interval of the difference of two accuracies on the same images.

    Images are resampled together with both models' predictions, which is a multinomial draw of
    three counts: only the first is correct, only the second is, both or neither are.

    Args:
        only_first: number of images that only the first model predicts correctly.
        only_second: number of images that only the second model predicts correctly.
        total: number of images that both models predicted.
        resamples: number of differences that are drawn.
        seed: the same seed gives the same interval.

    Returns:
        Low and high end of first minus second, -1 to 1; NaN without images.
    """
    if total == 0:
        return float("nan"), float("nan")
    cells = np.array([only_first, only_second, total - only_first - only_second])
    counts = np.random.default_rng(seed).multinomial(total, cells / total, resamples)
    return metrics.percentiles((counts[:, 0] - counts[:, 1]) / total)
