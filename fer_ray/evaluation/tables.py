"""An evaluation as Parquet tables, as plain text and in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fer_ray import storage
from fer_ray.errors import UserError
from fer_ray.evaluation.scores import Comparison, Estimate, Evaluation, Score

MARKER = "evaluation.json"
"""Says that a folder is an evaluation, which the next one may replace."""

FORMAT = "fer_ray evaluation 1"
REPORT = "report.html"

_METRICS = ("accuracy", "macro_f1", "balanced_accuracy", "nll")


def _schema(strings: str, counts: str, numbers: str) -> pa.Schema:
    return pa.schema(
        [(name, pa.string()) for name in strings.split()]
        + [(name, pa.int64()) for name in counts.split()]
        + [(name, pa.float64()) for name in numbers.split()]
    )


SCHEMAS = {
    "metrics": _schema(
        "run split model checkpoint",
        "num_images num_errors num_unlabelled num_scored",
        " ".join(f"{name} {name}_low {name}_high" for name in _METRICS),
    ),
    "per_class": _schema("run split label", "support", "precision recall f1"),
    "confusion": _schema("run split label predicted", "count", ""),
    "comparisons": _schema(
        "split first_run second_run",
        "num_first num_second num_common num_conflicting only_first_right only_second_right",
        "first_accuracy second_accuracy difference difference_low difference_high p_value p_holm",
    ),
}
"""The columns of each ``<name>.parquet``."""

_FILES = {MARKER, REPORT, *(f"{name}.parquet" for name in SCHEMAS)}


def check_output(path: str) -> None:
    """Refuses a folder that an evaluation must not replace.

    Raises:
        UserError: when it is a file, or holds anything else than an earlier evaluation.
    """
    storage.check_bucket("--output", path)
    if storage.exists(path) and not storage.is_directory(path):
        raise UserError(f"--output: {path} is a file, a folder is expected")
    if storage.is_unfinished(path):  # by an evaluation that was killed
        return
    names = storage.list_names(path)
    strange = sorted(set(names) - _FILES)
    if strange:
        raise UserError(f"--output: {path} is not an evaluation: it holds {strange[0]!r}")
    if names and MARKER not in names:
        raise UserError(f"--output: {path} is not empty and not an evaluation (no {MARKER})")


def write(evaluation: Evaluation, folder: str) -> None:
    """Writes the four tables into a folder."""
    rows = {
        "metrics": [_metrics_row(score) for score in evaluation.scores],
        "per_class": [row for score in evaluation.scores for row in _class_rows(score)],
        "confusion": [row for score in evaluation.scores for row in _confusion_rows(score)],
        "comparisons": [_comparison_row(one) for one in evaluation.comparisons],
    }
    for name, schema in SCHEMAS.items():
        table = pa.Table.from_pylist([_without_nan(row) for row in rows[name]], schema=schema)
        fs, path = storage.filesystem(storage.join(folder, f"{name}.parquet"))
        pq.write_table(table, path, filesystem=fs)


def write_marker(evaluation: Evaluation, folder: str) -> None:
    """Writes what was evaluated and how: the last file, without paths of this machine."""
    evaluated = [
        {"run": one.run, "split": one.split, "checkpoint": one.checkpoint, "rows": one.num_images}
        for one in evaluation.scores
    ]
    value = {
        "format": FORMAT,
        "evaluated": evaluated,
        "baseline": evaluation.baseline,
        "bootstrap": evaluation.resamples,
        "seed": evaluation.seed,
    }
    storage.write_json(storage.join(folder, MARKER), value)


def _metrics_row(score: Score) -> dict[str, Any]:
    row = {name: getattr(score, name) for name in SCHEMAS["metrics"].names if hasattr(score, name)}
    for name in _METRICS:
        estimate = getattr(score, name)
        row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return row


def _class_rows(score: Score) -> Iterator[dict[str, Any]]:
    each = score.per_class
    for number, label in enumerate(score.labels):
        yield {
            "run": score.run,
            "split": score.split,
            "label": label,
            "support": int(each.support[number]),
            "precision": float(each.precision[number]),
            "recall": float(each.recall[number]),
            "f1": float(each.f1[number]),
        }


def _confusion_rows(score: Score) -> Iterator[dict[str, Any]]:
    for label, counts in zip(score.labels, score.confusion.tolist()):
        for predicted, count in zip(score.labels, counts):
            key = {"run": score.run, "split": score.split, "label": label}
            yield {**key, "predicted": predicted, "count": count}


def _comparison_row(comparison: Comparison) -> dict[str, Any]:
    return {name: getattr(comparison, name) for name in SCHEMAS["comparisons"].names}


def _without_nan(row: dict[str, Any]) -> dict[str, Any]:
    """NaN as null: SQL would count it as a number, and as the greatest one."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in row.items()
    }


def percent(estimate: Estimate, unit: str = "") -> str:
    """A share as ``66.1 (64.5 to 67.6)`` in percent; a dash where nothing was scored."""
    if math.isnan(estimate.value):
        return "–"
    low, high = 100 * estimate.low, 100 * estimate.high
    return f"{100 * estimate.value:.1f}{unit} ({low:.1f} to {high:.1f})"


def nats(estimate: Estimate) -> str:
    """A loss as ``1.042 (1.001 to 1.083)``; a dash where nothing was scored."""
    if math.isnan(estimate.value):
        return "–"
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"


def p_text(p_value: float) -> str:
    """A p-value as ``p = 0.012`` or ``p < 0.001``."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


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
        f"95 % interval {low} to {high}, {p_text(comparison.p_holm)}, n = {comparison.num_common:,}"
    )
    if comparison.difference == 0:
        return f"No difference shown: {first} and {second} are equally accurate ({numbers})."
    if comparison.shown:
        return f"{first} is {points} more accurate than {second} ({numbers})."
    return f"No difference shown: {first} is {points} above {second} ({numbers})."


def notes(evaluation: Evaluation) -> list[str]:
    """What a reader has to know beside the numbers: images left out, data that differ."""
    lines = []
    for one in evaluation.scores:
        for count, reason in (
            (one.num_errors, "could not be predicted"),
            (one.num_unlabelled, "have no label"),
        ):
            if count:
                lines.append(
                    f"{one.run}, {one.split}: {count:,} of {one.num_images:,} images {reason} "
                    "and are not scored."
                )
    for split in evaluation.splits:
        runs = [one.run for one in evaluation.of_split(split)]
        if evaluation.baseline and evaluation.baseline not in runs:
            lines.append(f"{split}: no predictions of {evaluation.baseline}: nothing to compare.")
    for pair in evaluation.comparisons:
        if pair.num_common < max(pair.num_first, pair.num_second):
            lines.append(
                f"{pair.first_run} and {pair.second_run}, {pair.split}: not the same images are "
                f"scored ({pair.num_first:,} and {pair.num_second:,}); compared on the "
                f"{pair.num_common:,} that both have."
            )
        if pair.num_conflicting:
            lines.append(
                f"{pair.first_run} and {pair.second_run}, {pair.split}: {pair.num_conflicting:,} "
                "images have the same image_id but another label or other pixels: left out."
            )
    return lines


def as_text(evaluation: Evaluation) -> str:
    """The evaluation as aligned plain text, one table and the comparisons a split."""
    blocks = []
    for split in evaluation.splits:
        head = ["run", "model", "n", "accuracy %", "macro-F1 %", "balanced %", "NLL nats"]
        body = [
            [
                one.run,
                one.model,
                f"{one.num_scored:,}",
                percent(one.accuracy),
                percent(one.macro_f1),
                percent(one.balanced_accuracy),
                nats(one.nll),
            ]
            for one in evaluation.of_split(split)
        ]
        lines = [f"split {split} (95 % intervals in parentheses)", *aligned([head, *body])]
        blocks.append("\n".join(lines + [in_words(one) for one in evaluation.compared_on(split)]))
    remarks = [f"note: {line}" for line in notes(evaluation)]
    return "\n\n".join(blocks + (["\n".join(remarks)] if remarks else []))


def aligned(rows: Sequence[Sequence[str]], num_texts: int = 2) -> list[str]:
    """Columns of equal width: the first `num_texts` to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < num_texts else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
