"""An evaluation as Parquet tables, as plain text and in sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fer_ray import storage
from fer_ray.errors import UserError
from fer_ray.evaluation.comparisons import Comparison
from fer_ray.evaluation.run import Evaluation
from fer_ray.evaluation.scores import Estimate, Score
from fer_ray.metrics import METRICS
from fer_ray.reporting.html import EVALUATION_MARKER, REPORT
from fer_ray.reporting.text import aligned, p_equals

FORMAT = "fer_ray evaluation 1"

_FIRST = ("accuracy", "macro_f1", "balanced_accuracy", "nll")
"""The metrics of every ``metrics.parquet``, whose columns come first."""


def _schema(strings: str, counts: str, numbers: str) -> pa.Schema:
    return pa.schema(
        [(name, pa.string()) for name in strings.split()]
        + [(name, pa.int64()) for name in counts.split()]
        + [(name, pa.float64()) for name in numbers.split()]
    )


def schemas() -> dict[str, pa.Schema]:
    """The columns of each ``<name>.parquet``; those of further metrics come last."""
    names = [*_FIRST, *(name for name in METRICS if name not in _FIRST)]
    return {
        "metrics": _schema(
            "run split model checkpoint",
            "num_images num_errors num_unlabelled num_scored",
            " ".join(f"{name} {name}_low {name}_high" for name in names),
        ),
        "per_class": _schema("run split label", "support", "precision recall f1"),
        "confusion": _schema("run split label predicted", "count", ""),
        "comparisons": _schema(
            "split first_run second_run",
            "num_first num_second num_common num_conflicting only_first_right only_second_right",
            "first_accuracy second_accuracy difference difference_low difference_high "
            "p_value p_holm",
        ),
    }


def check_output(path: str) -> None:
    """Refuses a folder that an evaluation must not replace.

    Raises:
        UserError: when it is a file, or holds anything but an earlier evaluation.
    """
    storage.check_bucket("--output", path)
    if storage.exists(path) and not storage.is_directory(path):
        raise UserError(f"--output: {path} is a file; give a folder")
    if storage.is_unfinished(path):  # by an evaluation that was killed
        return
    names = storage.list_names(path)
    files = {EVALUATION_MARKER, REPORT, *(f"{name}.parquet" for name in schemas())}
    others = sorted(set(names) - files)
    if others:
        raise UserError(
            f"--output: {path} is not an evaluation: it holds {others[0]!r}; give another folder"
        )
    if names and EVALUATION_MARKER not in names:
        raise UserError(
            f"--output: {path} is not empty and not an evaluation (no {EVALUATION_MARKER}); give "
            "another folder"
        )


def write(evaluation: Evaluation, folder: str) -> None:
    """Writes the four tables into a folder."""
    rows = {
        "metrics": [_metrics_row(score) for score in evaluation.scores],
        "per_class": [row for score in evaluation.scores for row in _class_rows(score)],
        "confusion": [row for score in evaluation.scores for row in _confusion_rows(score)],
        "comparisons": [vars(comparison) for comparison in evaluation.comparisons],
    }
    for name, schema in schemas().items():
        table = pa.Table.from_pylist([_without_nan(row) for row in rows[name]], schema=schema)
        fs, path = storage.filesystem(storage.join(folder, f"{name}.parquet"))
        pq.write_table(table, path, filesystem=fs)


def write_marker(evaluation: Evaluation, folder: str) -> None:
    """Writes what was evaluated and how: the last file, without paths of this machine."""
    evaluated = [
        {
            "run": score.run,
            "split": score.split,
            "checkpoint": score.checkpoint,
            "rows": score.num_images,
        }
        for score in evaluation.scores
    ]
    value = {
        "format": FORMAT,
        "evaluated": evaluated,
        "baseline": evaluation.baseline,
        "bootstrap": evaluation.resamples,
        "seed": evaluation.seed,
    }
    storage.write_json(storage.join(folder, EVALUATION_MARKER), value)


def _metrics_row(score: Score) -> dict[str, Any]:
    row = {**vars(score), "num_scored": score.num_scored}
    for name, estimate in {**score.estimates, "nll": score.nll}.items():
        row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return row


def _class_rows(score: Score) -> Iterator[dict[str, Any]]:
    per_class = score.per_class
    for index, label in enumerate(score.labels):
        yield {
            "run": score.run,
            "split": score.split,
            "label": label,
            "support": int(per_class.support[index]),
            "precision": float(per_class.precision[index]),
            "recall": float(per_class.recall[index]),
            "f1": float(per_class.f1[index]),
        }


def _confusion_rows(score: Score) -> Iterator[dict[str, Any]]:
    for label, counts in zip(score.labels, score.confusion.tolist()):
        for predicted, count in zip(score.labels, counts):
            key = {"run": score.run, "split": score.split, "label": label}
            yield {**key, "predicted": predicted, "count": count}


def _without_nan(row: dict[str, Any]) -> dict[str, Any]:
    """NaN as null: in SQL, NaN would be a number, and the greatest one."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in row.items()
    }


def headings() -> list[str]:
    """The headings of the columns that `cells` fills: every metric, then the likelihood."""
    return [*(metric.heading for _, metric in METRICS.items()), "NLL, nats"]


def cells(score: Score) -> list[tuple[str, str]]:
    """Every metric of a run as a value and its interval, such as ``66.1`` and ``64.5 to 67.6``.

    The value is a dash where nothing was scored, the interval empty where there is none.
    """
    texts = [_cell(estimate, METRICS[name].text) for name, estimate in score.estimates.items()]
    return [*texts, _cell(score.nll, _nats)]


def _cell(estimate: Estimate, text: Callable[[float], str]) -> tuple[str, str]:
    has_interval = not math.isnan(estimate.low)
    interval = f"{text(estimate.low)} to {text(estimate.high)}" if has_interval else ""
    return text(estimate.value), interval


def _nats(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def in_brackets(cell: tuple[str, str], unit: str = "") -> str:
    """A value with its interval, such as ``66.1 (64.5 to 67.6)``."""
    value, interval = cell
    return f"{value}{unit} ({interval})" if interval else f"{value}{unit}"


def in_words(comparison: Comparison) -> str:
    """A comparison as one sentence, the more accurate run first, differences in points."""
    first, second = comparison.first_run, comparison.second_run
    if not comparison.num_common:
        return f"{first} and {second} have no labelled image in common: not compared."
    ends = (comparison.difference_low, comparison.difference_high)
    if comparison.difference < 0:
        first, second, ends = second, first, (-ends[1], -ends[0])
    points = f"{100 * abs(comparison.difference):.1f} points"
    low, high = (f"{100 * end + 0.0:.1f}".replace("-0.0", "0.0") for end in ends)
    numbers = (
        f"95 % interval {low} to {high}, {p_equals(comparison.p_holm)}, "
        f"n = {comparison.num_common:,}"
    )
    if comparison.difference == 0:
        return f"No difference shown: {first} and {second} are equally accurate ({numbers})."
    if comparison.shown:
        return f"{first} is {points} more accurate than {second} ({numbers})."
    return f"No difference shown: {first} is {points} above {second} ({numbers})."


def notes(evaluation: Evaluation) -> list[str]:
    """What a reader has to know besides the numbers: images left out, data that differ."""
    lines = [line for score in evaluation.scores for line in _left_out(score)]
    for split in evaluation.splits:
        runs = [score.run for score in evaluation.scores_on(split)]
        if evaluation.baseline and evaluation.baseline not in runs:
            lines.append(
                f"{split}: no predictions of {evaluation.baseline}, so nothing is compared."
            )
    lines += [line for comparison in evaluation.comparisons for line in _differing(comparison)]
    return lines


def _left_out(score: Score) -> Iterator[str]:
    for count, reason in (
        (score.num_errors, "could not be predicted"),
        (score.num_unlabelled, "have no label"),
    ):
        if count:
            yield (
                f"{score.run}, {score.split}: {count:,} of {score.num_images:,} images {reason} "
                "and are not scored."
            )


def _differing(comparison: Comparison) -> Iterator[str]:
    pair = f"{comparison.first_run} and {comparison.second_run}, {comparison.split}"
    if comparison.num_common < max(comparison.num_first, comparison.num_second):
        yield (
            f"{pair}: the scored images differ ({comparison.num_first:,} and "
            f"{comparison.num_second:,}); the runs are compared on the {comparison.num_common:,} "
            "images that both have."
        )
    if count := comparison.num_conflicting:
        yield (
            f"{pair}: {count:,} {'image has' if count == 1 else 'images have'} the same image_id "
            "but different labels or pixels, and are left out of the comparison."
        )


def as_text(evaluation: Evaluation) -> str:
    """The evaluation as aligned plain text: for each split a table and the comparisons."""
    blocks = []
    for split in evaluation.splits:
        rows = [["run", "model", "n", *headings()]]
        for score in evaluation.scores_on(split):
            values = [in_brackets(cell) for cell in cells(score)]
            rows.append([score.run, score.model, f"{score.num_scored:,}", *values])
        lines = [f"split {split} (95 % intervals in parentheses)", *aligned(rows)]
        lines += [in_words(comparison) for comparison in evaluation.comparisons_on(split)]
        blocks.append("\n".join(lines))
    remarks = [f"note: {line}" for line in notes(evaluation)]
    return "\n\n".join(blocks + (["\n".join(remarks)] if remarks else []))
