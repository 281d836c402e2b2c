"""Metrics of classification and their uncertainty: pure functions on numpy arrays.

Conventions, the same everywhere:

* A confusion matrix has true classes as rows and predicted classes as columns, shape (C, C).
* A class without images is absent: its recall and F1 are NaN, and macro-F1 and balanced accuracy
  are means over the other classes.
* The precision of a class that is never predicted is 0, and so is the F1 of a class that has
  images but is never predicted correctly.
* Without any image every metric is NaN.

`METRICS` has every metric of a confusion matrix. To add one, write its function and register it;
it then appears in the history of runs, the progress of training, the trials of sweeps, and the
evaluation's tables, text and page. Code outside the project does the same (see
`fer_ray.registry`):

    from fer_ray import metrics

    @metrics.register("error_rate", title="error rate", higher_is_better=False)
    def error_rate(confusion):
        "Fraction of images that are predicted wrongly."
        return 1 - metrics.accuracy(confusion)

Intervals are percentile bootstrap intervals over images (Efron and Tibshirani, "An Introduction
to the Bootstrap", 1993, chapter 13). They describe what other images from the same source would
change, not what training with another seed would change. With only a handful of images the
interval of macro-F1 may exclude macro-F1 itself, because resamples lose classes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fer_ray.registry import Registry

SMALLEST_PROBABILITY = 1e-7
"""Smaller probabilities are raised to this, so that one image costs at most 16.1 nats: in the
float32 of the stored predictions, the probability of the true class can be exactly 0."""

RESAMPLES = 2_000
CONFIDENCE = 0.95
_CHUNK = 4_000_000
"""Number of image indices drawn at a time when images are resampled one by one: 32 MB."""

Function = Callable[[np.ndarray], np.ndarray]
"""Computes a metric from counts of shape (..., C, C), true classes as rows; returns float64 of
shape (...), NaN where the metric is undefined."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number that summarizes a confusion matrix, and how it is shown."""

    function: Function
    """Broadcasts over leading axes, so that all resamples are computed at once."""
    title: str
    """For tables and pages, such as ``macro-F1``."""
    unit: str
    """``%`` where values are shown times 100, otherwise empty."""
    bounds: tuple[float, float]
    """Lowest and highest possible value."""
    higher_is_better: bool
    in_training: bool
    """Whether it is computed after each epoch too, and not in evaluations alone."""

    @property
    def heading(self) -> str:
        """The title with the unit, for a table's column."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    @property
    def description(self) -> str:
        """What it measures: the docstring of its function."""
        return " ".join((inspect.getdoc(self.function) or "").split())

    def value(self, confusion: np.ndarray) -> float:
        """The metric of one matrix of shape (C, C); NaN where it is undefined."""
        return float(self.values(np.asarray(confusion)))

    def values(self, confusions: np.ndarray) -> np.ndarray:
        """The metric of many matrices of shape (..., C, C) as float64 of shape (...)."""
        with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 is NaN, as it should be
            return np.asarray(self.function(confusions), np.float64)

    def text(self, value: float, decimals: int = 1) -> str:
        """A value for a table: ``66.1`` for percentages, ``0.661`` for others, a dash for NaN.

        Args:
            value: of the metric.
            decimals: of a percentage; other values have two more.
        """
        if math.isnan(value):
            return "–"
        return f"{100 * value:.{decimals}f}" if self.unit == "%" else f"{value:.{decimals + 2}f}"


METRICS: Registry[Metric] = Registry("metric")
"""Every metric by its name, which is also its column in tables."""

_OTHER_COLUMNS = {"loss", "nll"}
"""Names that the tables use for what is not computed from a confusion matrix."""


def register(
    name: str,
    *,
    title: str,
    unit: str = "%",
    bounds: tuple[float, float] = (0.0, 1.0),
    higher_is_better: bool = True,
    in_training: bool = True,
) -> Callable[[Function], Function]:
    """Returns a decorator that adds a function to `METRICS`; its docstring is the description.

    Args:
        name: lower case, without blanks; the column of tables, such as ``validation_<name>``.
        title: for tables and pages.
        unit: ``%`` shows values times 100; an empty string shows them as they are.
        bounds: lowest and highest possible value.
        higher_is_better: False for metrics of errors.
        in_training: whether to compute it after each epoch too.

    Raises:
        ValueError: for a name that is taken or no column's name, or a function that does not
            broadcast over leading axes or leaves its bounds.
    """

    def add(function: Function) -> Function:
        if not name.isidentifier() or name in _OTHER_COLUMNS:
            raise ValueError(f"metric {name!r}: not usable as the name of a column")
        metric = Metric(
            function=function,
            title=title,
            unit=unit,
            bounds=bounds,
            higher_is_better=higher_is_better,
            in_training=in_training,
        )
        _check(name, metric)
        METRICS.register(name)(metric)
        return function

    return add


def _check(name: str, metric: Metric) -> None:
    """Tries a metric on two matrices with images in every cell."""
    values = metric.values(np.arange(1, 19).reshape(2, 3, 3))
    if values.shape != (2,):
        raise ValueError(
            f"metric {name!r}: counts of shape (2, 3, 3) give values of shape {values.shape} and "
            "not (2,): the function has to broadcast over leading axes"
        )
    low, high = metric.bounds
    if not ((low <= values) & (values <= high)).all():
        raise ValueError(f"metric {name!r}: values {values.tolist()} are not in {low} to {high}")


def training_metrics() -> dict[str, Metric]:
    """The metrics that are computed after each epoch, by name."""
    return {name: metric for name, metric in METRICS.items() if metric.in_training}


@dataclass(frozen=True, kw_only=True)
class PerClass:
    """Metrics of each class, arrays of shape (C,)."""

    precision: np.ndarray
    """Fraction of the class's predictions that are correct, 0 to 1; 0 without predictions."""
    recall: np.ndarray
    """Fraction of the class's images that are predicted correctly, 0 to 1; NaN without images."""
    f1: np.ndarray
    """Harmonic mean of precision and recall, 0 to 1; NaN without images."""
    support: np.ndarray
    """Number of images of the class, int64."""


def confusion_matrix(true: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts the pairs of true and predicted class.

    Args:
        true: class indices, integers of shape (N,), 0 to ``num_classes - 1``.
        predicted: class indices of the same shape and range.
        num_classes: C.

    Returns:
        int64 of shape (C, C): ``[true, predicted]``.

    Raises:
        ValueError: for different shapes or an index out of range.
    """
    true, predicted = np.asarray(true, np.int64), np.asarray(predicted, np.int64)
    if true.shape != predicted.shape or true.ndim != 1:
        raise ValueError(f"shapes {true.shape} and {predicted.shape} are not the same (N,)")
    for name, indices in (("true", true), ("predicted", predicted)):
        if indices.size and not 0 <= indices.min() <= indices.max() < num_classes:
            raise ValueError(f"{name} classes are not all between 0 and {num_classes - 1}")
    cells = np.bincount(true * num_classes + predicted, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes).astype(np.int64)


def _margins(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Correct predictions, images and predictions of each class, shape (..., C)."""
    confusion = np.asarray(confusion)
    correct = np.diagonal(confusion, axis1=-2, axis2=-1)
    return correct, confusion.sum(axis=-1), confusion.sum(axis=-2)


def _ratio(numerator: np.ndarray, denominator: np.ndarray, *, if_zero: float) -> np.ndarray:
    """The quotient, or `if_zero` where the denominator, a count, is 0."""
    return np.where(denominator > 0, numerator / np.maximum(denominator, 1), if_zero)


def _recall(confusion: np.ndarray) -> np.ndarray:
    correct, support, _ = _margins(confusion)
    return _ratio(correct, support, if_zero=np.nan)


def _f1(confusion: np.ndarray) -> np.ndarray:
    correct, support, predicted = _margins(confusion)
    f1 = _ratio(2 * correct, support + predicted, if_zero=np.nan)
    return np.where(support > 0, f1, np.nan)


def _mean_of_present(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis without NaN; NaN where nothing is left (and no warning)."""
    present = ~np.isnan(values)
    total = np.where(present, values, 0.0).sum(axis=-1)
    return _ratio(total, present.sum(axis=-1), if_zero=np.nan)


@register("accuracy", title="accuracy")
def accuracy(confusion: np.ndarray) -> np.ndarray:
    """Fraction of images that are predicted correctly."""
    correct, support, _ = _margins(confusion)
    return _ratio(correct.sum(axis=-1), support.sum(axis=-1), if_zero=np.nan)


@register("macro_f1", title="macro-F1")
def macro_f1(confusion: np.ndarray) -> np.ndarray:
    """Mean F1 of the classes that have images."""
    return _mean_of_present(_f1(confusion))


@register("balanced_accuracy", title="balanced accuracy", in_training=False)
def balanced_accuracy(confusion: np.ndarray) -> np.ndarray:
    """Mean recall of the classes that have images."""
    return _mean_of_present(_recall(confusion))


def per_class(confusion: np.ndarray) -> PerClass:
    """Precision, recall, F1 and support of each class of a matrix of shape (C, C)."""
    correct, support, predicted = _margins(confusion)
    return PerClass(
        precision=_ratio(correct, predicted, if_zero=0.0),
        recall=_recall(confusion),
        f1=_f1(confusion),
        support=support.astype(np.int64),
    )


def negative_log_likelihood(true: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """The loss of each image: minus the logarithm of its true class's probability.

    Args:
        true: class indices, integers of shape (N,).
        probabilities: shape (N, C), 0 to 1; smaller ones than `SMALLEST_PROBABILITY` count as
            that.

    Returns:
        float64 of shape (N,) in nats; its mean is the negative log-likelihood per image, the
        cross-entropy that training without label smoothing minimizes.
    """
    of_true = np.asarray(probabilities, np.float64)[np.arange(len(true)), true]
    return -np.log(np.clip(of_true, SMALLEST_PROBABILITY, 1.0))


def bootstrap_interval(
    confusion: np.ndarray, metric: str, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of a metric of the confusion matrix.

    Drawing N images with replacement and counting them is the same as drawing the cells of the
    matrix from a multinomial distribution: exact, and as fast for a million images as for ten.

    Args:
        confusion: counts of shape (C, C).
        metric: a name of `METRICS`.
        resamples: number of matrices that are drawn.
        seed: the same seed gives the same interval.

    Returns:
        Low and high end, within the metric's bounds; NaN for an empty matrix, and where the
        metric is undefined for a resample.

    Raises:
        UserError: for a name that is not registered.
    """
    function = METRICS[metric]
    confusion = np.asarray(confusion)
    total = int(confusion.sum())
    if total == 0:
        return float("nan"), float("nan")
    cells = np.random.default_rng(seed).multinomial(total, confusion.ravel() / total, resamples)
    return percentiles(function.values(cells.reshape(resamples, *confusion.shape)))


def bootstrap_mean_interval(
    values: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of a mean over images, such as the negative log-likelihood.

    Args:
        values: one number for each image, shape (N,).
        resamples: number of means that are drawn.
        seed: the same seed gives the same interval.

    Returns:
        Low and high end in the values' unit; NaN without values.
    """
    values = np.asarray(values, np.float64)
    if values.size == 0:
        return float("nan"), float("nan")
    generator = np.random.default_rng(seed)
    per_chunk = max(1, _CHUNK // values.size)
    means = [
        values[generator.integers(values.size, size=(count, values.size))].mean(axis=1)
        for count in _chunks(resamples, per_chunk)
    ]
    return percentiles(np.concatenate(means))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction for several tests (Scandinavian Journal of Statistics 6, 1979).

    Args:
        p_values: one for each test of the family.

    Returns:
        The adjusted p-values in the same order: rejecting those below a level keeps the
        probability of any false rejection below that level.
    """
    raw = np.asarray(p_values, np.float64)
    order = np.argsort(raw)
    scaled = raw[order] * np.arange(len(raw), 0, -1)
    adjusted = np.empty_like(raw)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted.tolist()


def percentiles(values: np.ndarray) -> tuple[float, float]:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def _chunks(total: int, size: int) -> list[int]:
    """The sizes of the chunks that a total is cut into."""
    return [min(size, total - start) for start in range(0, total, size)]
