"""From the predictions of one run on one split to its metrics with their intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from fer_ray import metrics
from fer_ray.data.labels import probability_column
from fer_ray.data.predictions import Predictions
from fer_ray.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A metric with its 95 % interval; all NaN where no image was scored."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Score:
    """How well one run predicts one split."""

    run: str
    split: str
    model: str
    checkpoint: str
    labels: tuple[str, ...]
    """The classes, in the order of the confusion matrix."""
    num_images: int
    """Number of rows, with or without a label and a prediction."""
    num_errors: int
    """Rows that carry an error instead of a prediction: not scored."""
    num_unlabelled: int
    """Rows that have a prediction but no label: not scored."""
    confusion: np.ndarray
    """int64 of shape (C, C), [true, predicted]."""
    estimates: dict[str, Estimate]
    """By the names of `fer_ray.metrics.METRICS`, in their order."""
    nll: Estimate
    """Negative log-likelihood in nats per image."""
    per_class: metrics.PerClass
    rows: pd.DataFrame
    """The scored rows by ``image_id``: pixel_sha256, label, predicted, confidence, correct."""
    predicted_at: str
    """The day of the first prediction (UTC), YYYY-MM-DD; empty where unknown."""

    @property
    def num_scored(self) -> int:
        """Number of rows with a label and a prediction: what the metrics are computed from."""
        return len(self.rows)

    @property
    def accuracy(self) -> Estimate:
        """The metric that runs are ranked and compared by."""
        return self.estimates["accuracy"]


def score(predictions: Predictions, *, folder: str = "", resamples: int, seed: int) -> Score:
    """Scores one run on one split.

    Args:
        predictions: of the run on the split.
        folder: where they were read from, for error messages.
        resamples: bootstrap resamples of each interval.
        seed: of the resampling.

    Raises:
        UserError: when a label or a prediction is not one of the model's labels.
    """
    frame = predictions.table.to_pandas()
    failed = frame["error"].notna() | frame["predicted"].isna()
    unlabelled = frame["label"].isna() & ~failed
    scored = frame[~failed & ~unlabelled]
    true = _indices(scored["label"], predictions, folder)
    predicted = _indices(scored["predicted"], predictions, folder)
    confusion = metrics.confusion_matrix(true, predicted, len(predictions.labels))
    columns = [probability_column(label) for label in predictions.labels]
    losses = metrics.negative_log_likelihood(true, scored[columns].to_numpy())
    days = frame["predicted_at"].dropna()
    rows = scored[["image_id", "pixel_sha256", "label", "predicted", "confidence"]]
    return Score(
        run=predictions.run,
        split=predictions.split,
        model=predictions.model,
        checkpoint=predictions.checkpoint,
        labels=predictions.labels,
        num_images=len(frame),
        num_errors=int(failed.sum()),
        num_unlabelled=int(unlabelled.sum()),
        confusion=confusion,
        estimates={name: _estimate(confusion, name, resamples, seed) for name in metrics.METRICS},
        nll=_mean(losses, resamples, seed),
        per_class=metrics.per_class(confusion),
        rows=rows.assign(correct=true == predicted).set_index("image_id"),
        predicted_at="" if days.empty else days.min().strftime("%Y-%m-%d"),
    )


def _indices(values: pd.Series, predictions: Predictions, folder: str) -> np.ndarray:
    indices = pd.Index(predictions.labels).get_indexer(pd.Index(values))
    if (indices < 0).any():
        raise UserError(
            f"{folder or predictions.run}: {values.name} {values[indices < 0].iloc[0]!r} is not "
            f"one of the model's labels {', '.join(predictions.labels)}"
        )
    return np.asarray(indices)


def _estimate(confusion: np.ndarray, name: str, resamples: int, seed: int) -> Estimate:
    low, high = metrics.bootstrap_interval(confusion, name, resamples=resamples, seed=seed)
    return Estimate(value=metrics.METRICS[name].value(confusion), low=low, high=high)


def _mean(values: np.ndarray, resamples: int, seed: int) -> Estimate:
    low, high = metrics.bootstrap_mean_interval(values, resamples=resamples, seed=seed)
    return Estimate(value=float(values.mean()) if values.size else low, low=low, high=high)
