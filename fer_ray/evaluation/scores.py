"""From folders of predictions to scores of each run and comparisons of each pair of runs.

Runs are compared on the images that both predicted, joined by ``image_id`` and never by the
order of rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from fer_ray import metrics
from fer_ray.data import predictions
from fer_ray.data.labels import probability_column
from fer_ray.data.predictions import Predictions
from fer_ray.errors import UserError, unknown

LEVEL = 0.05
"""A difference is called shown when its corrected p-value is below."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A metric with its 95 % interval; all NaN where nothing was scored."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Score:
    """How one run did on one split."""

    run: str
    split: str
    model: str
    checkpoint: str
    labels: tuple[str, ...]
    """The classes, in the order of the confusion matrix."""
    num_images: int
    """Rows: predicted or not, labelled or not."""
    num_errors: int
    """Rows that carry an error: not scored."""
    num_unlabelled: int
    """Rows that were predicted but have no label: not scored."""
    confusion: np.ndarray
    """int64 of shape (K, K), [true, predicted]."""
    accuracy: Estimate
    macro_f1: Estimate
    balanced_accuracy: Estimate
    nll: Estimate
    """Negative log-likelihood in nats per image."""
    per_class: metrics.PerClass
    rows: pd.DataFrame
    """The scored rows by ``image_id``: pixel_sha256, label, predicted, confidence, right."""
    predicted_at: str
    """The day of the first prediction (UTC), YYYY-MM-DD; empty where unknown."""

    @property
    def num_scored(self) -> int:
        """Rows with a label and a prediction: what every metric is computed from."""
        return len(self.rows)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two runs on the images of a split that both predicted; differences are first - second."""

    split: str
    first_run: str
    second_run: str
    num_first: int
    """Scored images of the first run."""
    num_second: int
    num_common: int
    """Scored images of both with the same label and pixels: what is compared."""
    num_conflicting: int
    """Images under the same ``image_id`` with another label or other pixels: left out."""
    first_accuracy: float
    """On the common images."""
    second_accuracy: float
    only_first_right: int
    only_second_right: int
    difference: float
    """Of the accuracies, -1 to 1."""
    difference_low: float
    difference_high: float
    p_value: float
    """McNemar's exact test."""
    p_holm: float
    """Corrected for all comparisons on the split; the same where there is one."""

    @property
    def shown(self) -> bool:
        """Whether the data show a difference."""
        return self.p_holm < LEVEL


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything that was computed, sorted by split and run."""

    scores: tuple[Score, ...]
    comparisons: tuple[Comparison, ...]
    baseline: str | None
    resamples: int
    seed: int

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits, sorted."""
        return tuple(sorted({score.split for score in self.scores}))

    def of_split(self, split: str) -> list[Score]:
        """The scores on one split, by run."""
        return [score for score in self.scores if score.split == split]

    def compared_on(self, split: str) -> list[Comparison]:
        """The comparisons on one split."""
        return [comparison for comparison in self.comparisons if comparison.split == split]


def evaluate(
    places: Sequence[str],
    *,
    baseline: str | None = None,
    resamples: int = metrics.RESAMPLES,
    seed: int = 0,
) -> Evaluation:
    """Scores every run on every split found at some places and compares the runs.

    Args:
        places: folders that `predictions.find` understands.
        baseline: the run that the others are compared with; without it, every pair of runs is
            compared, the one with the higher accuracy first.
        resamples: bootstrap resamples of each interval.
        seed: of the resampling.

    Raises:
        UserError: when there are no predictions, two folders hold the same run and split, the
            runs on a split have different classes, or no run is called `baseline`.
    """
    folders = list(dict.fromkeys(f for path in places for f in predictions.find(path)))
    read: dict[tuple[str, str], str] = {}
    scores: list[Score] = []
    for folder in folders:
        one = predictions.read(folder)
        other = read.setdefault((one.split, one.run), folder)
        if other != folder:
            raise UserError(
                f"run {one.run!r} on split {one.split!r} is in two folders: {other} and {folder}"
            )
        scores.append(score(one, folder=folder, resamples=resamples, seed=seed))
    scores.sort(key=lambda one: (one.split, one.run))
    runs = sorted({one.run for one in scores})
    if baseline is not None and baseline not in runs:
        raise unknown("--baseline", baseline, runs)
    compared: list[Comparison] = []
    for _, group in itertools.groupby(scores, key=lambda one: one.split):
        compared += _compare_all(list(group), baseline, resamples, seed)
    return Evaluation(
        scores=tuple(scores),
        comparisons=tuple(compared),
        baseline=baseline,
        resamples=resamples,
        seed=seed,
    )


def score(given: Predictions, *, folder: str = "", resamples: int, seed: int) -> Score:
    """Scores one run on one split.

    Args:
        given: the predictions.
        folder: where they lie, for errors.
        resamples: bootstrap resamples of each interval.
        seed: of the resampling.

    Raises:
        UserError: when a label or a prediction is not one of the model's labels.
    """
    frame = given.table.to_pandas()
    failed = frame["error"].notna() | frame["predicted"].isna()
    unlabelled = frame["label"].isna() & ~failed
    scored = frame[~failed & ~unlabelled]
    true = _indices(scored["label"], given, folder)
    predicted = _indices(scored["predicted"], given, folder)
    confusion = metrics.confusion_matrix(true, predicted, len(given.labels))
    columns = [probability_column(label) for label in given.labels]
    losses = metrics.negative_log_likelihood(true, scored[columns].to_numpy())
    chance = {"resamples": resamples, "seed": seed}
    days = frame["predicted_at"].dropna()
    rows = scored[["image_id", "pixel_sha256", "label", "predicted", "confidence"]]
    return Score(
        run=given.run,
        split=given.split,
        model=given.model,
        checkpoint=given.checkpoint,
        labels=given.labels,
        num_images=len(frame),
        num_errors=int(failed.sum()),
        num_unlabelled=int(unlabelled.sum()),
        confusion=confusion,
        accuracy=_of_confusion(confusion, "accuracy", chance),
        macro_f1=_of_confusion(confusion, "macro_f1", chance),
        balanced_accuracy=_of_confusion(confusion, "balanced_accuracy", chance),
        nll=_mean(losses, chance),
        per_class=metrics.per_class(confusion),
        rows=rows.assign(right=true == predicted).set_index("image_id"),
        predicted_at="" if days.empty else days.min().strftime("%Y-%m-%d"),
    )


def _indices(values: pd.Series, given: Predictions, folder: str) -> np.ndarray:
    indices = pd.Index(given.labels).get_indexer(pd.Index(values))
    if (indices < 0).any():
        raise UserError(
            f"{folder or given.run}: {values.name} {values[indices < 0].iloc[0]!r} is not one of "
            f"the model's labels {', '.join(given.labels)}"
        )
    return np.asarray(indices)


def _of_confusion(confusion: np.ndarray, name: str, chance: dict[str, int]) -> Estimate:
    low, high = metrics.bootstrap_interval(confusion, name, **chance)
    return Estimate(value=getattr(metrics, name)(confusion), low=low, high=high)


def _mean(values: np.ndarray, chance: dict[str, int]) -> Estimate:
    low, high = metrics.bootstrap_mean_interval(values, **chance)
    return Estimate(value=float(values.mean()) if values.size else low, low=low, high=high)


def _compare_all(
    scores: list[Score], baseline: str | None, resamples: int, seed: int
) -> list[Comparison]:
    """All comparisons on one split, their p-values corrected together."""
    for other in scores[1:]:
        if set(other.labels) != set(scores[0].labels):
            raise UserError(
                f"split {other.split!r}: {scores[0].run} knows {', '.join(scores[0].labels)} but "
                f"{other.run} knows {', '.join(other.labels)}: they cannot be compared"
            )
    ranked = sorted(scores, key=lambda one: (-np.nan_to_num(one.accuracy.value), one.run))
    pairs = list(itertools.combinations(ranked, 2))
    if baseline is not None:
        last = [one for one in ranked if one.run == baseline]
        pairs = [(one, other) for other in last for one in ranked if one is not other]
    compared = [_compare(first, second, resamples, seed) for first, second in pairs]
    tested = [one for one in compared if one.num_common]
    corrected = dict(zip(map(id, tested), metrics.holm([one.p_value for one in tested])))
    return [replace(one, p_holm=corrected.get(id(one), float("nan"))) for one in compared]


def _compare(first: Score, second: Score, resamples: int, seed: int) -> Comparison:
    """Compares two runs on one split; the p-value is not corrected yet."""
    joined = first.rows.add_suffix("_1").join(second.rows.add_suffix("_2"), how="inner")
    hashes = joined[["pixel_sha256_1", "pixel_sha256_2"]]
    same_pixels = (hashes.iloc[:, 0] == hashes.iloc[:, 1]) | hashes.isna().any(axis=1)
    same = (joined["label_1"] == joined["label_2"]) & same_pixels
    first_right = joined.loc[same, "right_1"].to_numpy(bool)
    second_right = joined.loc[same, "right_2"].to_numpy(bool)
    total = len(first_right)
    only_first = int((first_right & ~second_right).sum())
    only_second = int((~first_right & second_right).sum())
    p_value = metrics.mcnemar(only_first, only_second) if total else float("nan")
    low, high = metrics.paired_difference_interval(
        only_first, only_second, total, resamples=resamples, seed=seed
    )
    share = 1 / total if total else float("nan")
    return Comparison(
        split=first.split,
        first_run=first.run,
        second_run=second.run,
        num_first=first.num_scored,
        num_second=second.num_scored,
        num_common=total,
        num_conflicting=int((~same).sum()),
        first_accuracy=int(first_right.sum()) * share,
        second_accuracy=int(second_right.sum()) * share,
        only_first_right=only_first,
        only_second_right=only_second,
        difference=(only_first - only_second) * share,
        difference_low=low,
        difference_high=high,
        p_value=p_value,
        p_holm=p_value,
    )
