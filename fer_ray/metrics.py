"""Metrics of classification with their uncertainty: pure functions on numpy arrays.

Conventions, the same everywhere:

* A confusion matrix has true classes as rows and predicted ones as columns, shape (K, K).
* A class without a true image is absent: its recall and F1 are NaN, and macro-F1 and balanced
  accuracy are means over the other classes.
* The precision of a class that is never predicted is 0, and so is the F1 of a class that is
  there but never predicted rightly.
* Without any image every metric is NaN.

Intervals are percentile bootstrap intervals over images (Efron and Tibshirani, "An Introduction
to the Bootstrap", 1993, chapter 13). They speak of other images of the same kind; they do not
contain what another seed of the training would change. Of a handful of images the interval of
macro-F1 can leave out macro-F1 itself, because resamples lose classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

SMALLEST_PROBABILITY = 1e-7
"""Probabilities below are raised to it, so that one image costs at most 16.1 nats: the
probabilities are stored as float32, in which a wrong and certain model's becomes 0."""

RESAMPLES = 2_000
CONFIDENCE = 0.95
_CHUNK = 4_000_000
"""Numbers drawn at once when images are resampled one by one: 32 MB of indices."""


@dataclass(frozen=True, kw_only=True)
class PerClass:
    """Metrics of each class, arrays of shape (K,)."""

    precision: np.ndarray
    """Share of the class's predictions that are right, 0 to 1; 0 where there are none."""
    recall: np.ndarray
    """Share of the class's images that are found, 0 to 1; NaN where there are none."""
    f1: np.ndarray
    """Harmonic mean of both, 0 to 1; NaN where the class has no image."""
    support: np.ndarray
    """Images of the class, int64."""


def confusion_matrix(true: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts the pairs of true and predicted class.

    Args:
        true: class indices, integers of shape (N,), 0 to ``num_classes - 1``.
        predicted: class indices of the same shape and range.
        num_classes: K.

    Returns:
        int64 of shape (K, K): ``[true, predicted]``.

    Raises:
        ValueError: for different shapes or an index out of range.
    """
    true, predicted = np.asarray(true, np.int64), np.asarray(predicted, np.int64)
    if true.shape != predicted.shape or true.ndim != 1:
        raise ValueError(f"shapes {true.shape} and {predicted.shape} are not one and the same (N,)")
    for name, indices in (("true", true), ("predicted", predicted)):
        if indices.size and not 0 <= indices.min() <= indices.max() < num_classes:
            raise ValueError(f"{name} classes are not all between 0 and {num_classes - 1}")
    cells = np.bincount(true * num_classes + predicted, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes).astype(np.int64)


def accuracy(confusion: np.ndarray) -> float:
    """Share of right predictions, 0 to 1."""
    return float(_accuracy(np.asarray(confusion)))


def macro_f1(confusion: np.ndarray) -> float:
    """Mean F1 of the classes that have images, 0 to 1."""
    return float(_macro_f1(np.asarray(confusion)))


def balanced_accuracy(confusion: np.ndarray) -> float:
    """Mean recall of the classes that have images, 0 to 1."""
    return float(_balanced_accuracy(np.asarray(confusion)))


def per_class(confusion: np.ndarray) -> PerClass:
    """Precision, recall, F1 and support of each class of a matrix of shape (K, K)."""
    confusion = np.asarray(confusion)
    right, support, predicted = _margins(confusion)
    return PerClass(
        precision=_ratio(right, predicted, where_zero=0.0),
        recall=_recall(confusion),
        f1=_f1(confusion),
        support=support.astype(np.int64),
    )


def negative_log_likelihood(true: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """The loss of each image: minus the logarithm of its true class's probability.

    Args:
        true: class indices, integers of shape (N,).
        probabilities: shape (N, K), 0 to 1; those below `SMALLEST_PROBABILITY` count as that.

    Returns:
        float64 of shape (N,) in nats; its mean is the negative log-likelihood per image, the
        cross-entropy that training minimizes when it smooths no labels.
    """
    chosen = np.asarray(probabilities, np.float64)[np.arange(len(true)), true]
    return -np.log(np.clip(chosen, SMALLEST_PROBABILITY, 1.0))


def bootstrap_interval(
    confusion: np.ndarray, metric: str, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of a metric of the confusion matrix.

    Drawing N images with replacement and counting them is the same as drawing the matrix's
    cells from a multinomial distribution: exact, and as fast for a million images as for ten.

    Args:
        confusion: counts of shape (K, K).
        metric: ``accuracy``, ``macro_f1`` or ``balanced_accuracy``.
        resamples: matrices drawn.
        seed: the same seed gives the same interval.

    Returns:
        Low and high end, 0 to 1; NaN for an empty matrix.
    """
    confusion = np.asarray(confusion)
    total = int(confusion.sum())
    if total == 0:
        return float("nan"), float("nan")
    drawn = np.random.default_rng(seed).multinomial(total, confusion.ravel() / total, resamples)
    return _percentiles(_OF_CONFUSION[metric](drawn.reshape(resamples, *confusion.shape)))


def bootstrap_mean_interval(
    values: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of a mean over images, such as the negative log-likelihood.

    Args:
        values: one number an image, shape (N,).
        resamples: means drawn.
        seed: the same seed gives the same interval.

    Returns:
        Low and high end in the values' unit; NaN without values.
    """
    values = np.asarray(values, np.float64)
    if values.size == 0:
        return float("nan"), float("nan")
    generator = np.random.default_rng(seed)
    at_once = max(1, _CHUNK // values.size)
    means = [
        values[generator.integers(values.size, size=(count, values.size))].mean(axis=1)
        for count in _counts(resamples, at_once)
    ]
    return _percentiles(np.concatenate(means))


def mcnemar(only_first: int, only_second: int) -> float:
    """The p-value that two models which saw the same images are equally accurate.

    The exact form always: of the images that one model alone gets right, each model's share is
    binomial with one half (McNemar, Psychometrika 12, 1947, and its exact conditional form).

    Args:
        only_first: images that only the first model gets right.
        only_second: images that only the second gets right.

    Returns:
        The two-sided p-value; 1 where the models never differ.
    """
    if only_first + only_second == 0:
        return 1.0
    from scipy.stats import binomtest  # half a second to import: not for those who only count

    return float(binomtest(only_first, only_first + only_second).pvalue)


def paired_difference_interval(
    only_first: int, only_second: int, total: int, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of the difference of two accuracies on the same images.

    Images are resampled together with both models' answers, which is a multinomial draw of:
    only the first is right, only the second is, both or neither are.

    Args:
        only_first: images that only the first model gets right.
        only_second: images that only the second gets right.
        total: images that both models saw.
        resamples: differences drawn.
        seed: the same seed gives the same interval.

    Returns:
        Low and high end of first minus second, -1 to 1; NaN without images.
    """
    if total == 0:
        return float("nan"), float("nan")
    cells = np.array([only_first, only_second, total - only_first - only_second])
    drawn = np.random.default_rng(seed).multinomial(total, cells / total, resamples)
    return _percentiles((drawn[:, 0] - drawn[:, 1]) / total)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction for several tests (Scandinavian Journal of Statistics 6, 1979).

    Args:
        p_values: one for each test of the family.

    Returns:
        The adjusted p-values in the same order: rejecting those below a level keeps the chance
        of any false rejection below it.
    """
    given = np.asarray(p_values, np.float64)
    order = np.argsort(given)
    scaled = given[order] * np.arange(len(given), 0, -1)
    adjusted = np.empty_like(given)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted.tolist()


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def _counts(total: int, at_once: int) -> list[int]:
    return [min(at_once, total - start) for start in range(0, total, at_once)]


# The same formulas for one matrix and for a stack of resampled ones: shape (..., K, K).


def _margins(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right predictions, true images and predictions of each class, shape (..., K)."""
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    return right, confusion.sum(axis=-1), confusion.sum(axis=-2)


def _ratio(above: np.ndarray, below: np.ndarray, *, where_zero: float) -> np.ndarray:
    return np.where(below > 0, above / np.maximum(below, 1), where_zero)


def _recall(confusion: np.ndarray) -> np.ndarray:
    right, support, _ = _margins(confusion)
    return _ratio(right, support, where_zero=np.nan)


def _f1(confusion: np.ndarray) -> np.ndarray:
    right, support, predicted = _margins(confusion)
    f1 = _ratio(2 * right, support + predicted, where_zero=np.nan)
    return np.where(support > 0, f1, np.nan)


def _mean_of_present(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis without NaN; NaN where nothing is left (and no warning)."""
    present = ~np.isnan(values)
    total = np.where(present, values, 0.0).sum(axis=-1)
    return _ratio(total, present.sum(axis=-1), where_zero=np.nan)


def _accuracy(confusion: np.ndarray) -> np.ndarray:
    right, support, _ = _margins(confusion)
    return _ratio(right.sum(axis=-1), support.sum(axis=-1), where_zero=np.nan)


def _macro_f1(confusion: np.ndarray) -> np.ndarray:
    return _mean_of_present(_f1(confusion))


def _balanced_accuracy(confusion: np.ndarray) -> np.ndarray:
    return _mean_of_present(_recall(confusion))


_OF_CONFUSION: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "accuracy": _accuracy,
    "macro_f1": _macro_f1,
    "balanced_accuracy": _balanced_accuracy,
}
