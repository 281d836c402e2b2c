"""The evaluation of folders of predictions: scores of each run, comparisons of the runs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from fer_ray import metrics
from fer_ray.data import predictions
from fer_ray.errors import UserError, unknown
from fer_ray.evaluation.comparisons import Comparison, compare_all
from fer_ray.evaluation.scores import Score, score


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

    def scores_on(self, split: str) -> list[Score]:
        """The scores on one split, by run."""
        return [score for score in self.scores if score.split == split]

    def comparisons_on(self, split: str) -> list[Comparison]:
        """The comparisons on one split."""
        return [comparison for comparison in self.comparisons if comparison.split == split]


def evaluate(
    paths: Sequence[str],
    *,
    baseline: str | None = None,
    resamples: int = metrics.RESAMPLES,
    seed: int = 0,
) -> Evaluation:
    """Scores every run on every split below some folders and compares the runs.

    Args:
        paths: folders of predictions, as `predictions.find` takes them.
        baseline: the run that the others are compared with; None compares every pair of runs,
            the one with the higher accuracy first.
        resamples: bootstrap resamples of each interval.
        seed: of the resampling.

    Raises:
        UserError: when there are no predictions, two folders hold the same run and split, the
            runs on a split have different classes, or no run is called `baseline`.
    """
    folders = list(dict.fromkeys(folder for path in paths for folder in predictions.find(path)))
    folder_of: dict[tuple[str, str], str] = {}
    scores: list[Score] = []
    for folder in folders:
        table = predictions.read(folder)
        other = folder_of.setdefault((table.split, table.run), folder)
        if other != folder:
            raise UserError(
                f"run {table.run!r} on split {table.split!r} is in two folders: {other} and "
                f"{folder}; give --predictions only one of them"
            )
        scores.append(score(table, folder=folder, resamples=resamples, seed=seed))
    scores.sort(key=lambda score: (score.split, score.run))
    runs = sorted({score.run for score in scores})
    if baseline is not None and baseline not in runs:
        raise unknown("--baseline", baseline, runs)
    comparisons: list[Comparison] = []
    for _, on_split in itertools.groupby(scores, key=lambda score: score.split):
        comparisons += compare_all(
            list(on_split), baseline=baseline, resamples=resamples, seed=seed
        )
    return Evaluation(
        scores=tuple(scores),
        comparisons=tuple(comparisons),
        baseline=baseline,
        resamples=resamples,
        seed=seed,
    )
