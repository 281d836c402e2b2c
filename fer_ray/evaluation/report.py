"""The evaluation as a folder: four tables and one page that needs nothing from outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from fer_ray import storage
from fer_ray.data import dataset, history
from fer_ray.data.run_folder import RunFolder
from fer_ray.errors import UserError
from fer_ray.evaluation import figures, tables
from fer_ray.evaluation.run import Evaluation
from fer_ray.evaluation.scores import Score
from fer_ray.metrics import METRICS, training_metrics
from fer_ray.reporting import html
from fer_ray.reporting.text import percent

MISTAKES = 24
"""Number of images in the gallery of each run and split."""

_MOST_HEADLINES = 4
"""Number of comparisons at the top of the page for each split; the tables have all."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a run's folder records about its training."""

    history: pd.DataFrame
    """One row for each epoch."""
    hardware: str
    """Empty where it is not recorded."""


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """An image that was predicted wrongly."""

    image_id: str
    label: str
    predicted: str
    confidence: float
    image: str | None
    """PNG as a data URI; None where the image is not at hand."""


def check_paths(output: str, runs: str | None, data: str | None) -> None:
    """Refuses, before any work, paths that `publish` could not use.

    Raises:
        UserError: for an output that is not an evaluation, or missing runs or data.
    """
    tables.check_output(output)
    if runs is not None and not storage.is_directory(runs):
        raise UserError(f"--runs: {runs}: no such folder; give the --storage of jobs/train.py")
    if data is not None:
        dataset.read_info(data)


def publish(
    evaluation: Evaluation, output: str, *, runs: str | None = None, data: str | None = None
) -> str:
    """Writes tables and report to a folder, which appears whole and replaces an earlier one.

    Args:
        evaluation: the scores and comparisons.
        output: path of the folder.
        runs: the folder of the training runs, for learning curves.
        data: the prepared dataset, for the images of mistakes.

    Returns:
        The path of the report.
    """
    check_paths(output, runs, data)
    page = render(evaluation, runs=runs, data=data)
    with storage.staged_directory(output) as folder:
        tables.write(evaluation, folder)
        storage.write_bytes(storage.join(folder, html.REPORT), page.encode())
        tables.write_marker(evaluation, folder)
    return storage.join(output, html.REPORT)


def render(evaluation: Evaluation, *, runs: str | None = None, data: str | None = None) -> str:
    """The page as HTML; everything that comes from data is escaped.

    Args:
        evaluation: the scores and comparisons.
        runs: the folder of the training runs, for learning curves.
        data: the prepared dataset, for the images of mistakes.
    """
    names = sorted({score.run for score in evaluation.scores})
    notes = tables.notes(evaluation)
    trainings = read_trainings(runs, names, notes) if runs is not None else {}
    return html.render(
        "report.html.j2",
        evaluation=evaluation,
        runs=names,
        headlines=_headlines(evaluation),
        headings=tables.headings(),
        metrics=[metric for _, metric in METRICS.items()],
        about=[_about(evaluation, run, trainings.get(run)) for run in names],
        trained=bool(trainings),
        sections=[_section(evaluation, split, names, data, notes) for split in evaluation.splits],
        curves=_curves(trainings, names),
        notes=notes,
    )


def _curves(trainings: Mapping[str, Training], runs: Sequence[str]) -> list[str]:
    """Learning curves of the loss and of each metric that a history has."""
    quantities = [("loss", "loss", "nats")]
    quantities += [(name, metric.title, metric.unit) for name, metric in training_metrics().items()]
    curves = []
    for name, title, unit in quantities:
        columns = [f"{split}_{name}" for split in history.SPLITS]
        histories = {
            run: training.history
            for run, training in trainings.items()
            if set(columns) <= set(training.history)
        }
        if histories:
            curves.append(figures.learning_curves(histories, name, title, unit, runs))
    return curves


def _section(
    evaluation: Evaluation,
    split: str,
    runs: Sequence[str],
    data: str | None,
    notes: list[str],
) -> dict[str, Any]:
    """What the template shows of one split."""
    scores = evaluation.scores_on(split)
    scored = [score for score in scores if score.num_scored]
    images = _images(data, split, notes)
    return {
        "split": split,
        "scores": [(score, tables.cells(score)) for score in scores],
        "labels": scores[0].labels,
        "comparisons": [
            (comparison, tables.in_words(comparison))
            for comparison in evaluation.comparisons_on(split)
        ],
        "accuracy": figures.accuracy_dots(scored, runs) if scored else "",
        "classes": figures.class_f1_bars(scored, runs) if scored else "",
        "confusions": [(score, figures.confusion_heatmap(score)) for score in scored],
        "galleries": [(score, mistakes(score, images)) for score in scored],
    }


def mistakes(
    score: Score, images: Mapping[str, tuple[str | None, np.ndarray]], most: int = MISTAKES
) -> list[Mistake]:
    """The wrong predictions with the highest confidence.

    Args:
        score: one run on one split.
        images: hash of the pixels and image, uint8 of shape (H, W), by ``image_id``.
        most: how many.

    Returns:
        The mistakes by falling confidence; without an image where `images` has none, or a
        different one under the same ``image_id``.
    """
    wrong = score.rows[~score.rows["correct"].astype(bool)].reset_index()
    wrong = wrong.sort_values(["confidence", "image_id"], ascending=[False, True]).head(most)
    gallery = []
    for row in wrong.to_dict("records"):
        sha256, image = images.get(row["image_id"], (None, None))
        is_same = image is not None and sha256 == row["pixel_sha256"]
        gallery.append(
            Mistake(
                image_id=row["image_id"],
                label=row["label"],
                predicted=row["predicted"],
                confidence=float(row["confidence"]),
                image=html.png_data_uri(image) if is_same and image is not None else None,
            )
        )
    return gallery


def _images(
    data: str | None, split: str, notes: list[str]
) -> dict[str, tuple[str | None, np.ndarray]]:
    if data is None:
        return {}
    info = dataset.read_info(data)
    if split not in info.splits:
        notes.append(f"{split}: the dataset has no such split, so its mistakes have no images.")
        return {}
    loaded = dataset.load_split(info, split)
    return dict(zip(loaded.image_ids, zip(loaded.pixel_sha256, loaded.images)))


def read_trainings(path: str, runs: Sequence[str], notes: list[str]) -> dict[str, Training]:
    """Reads ``<run>/history.parquet`` and the hardware of ``<run>/run.json``.

    Args:
        path: the folder of the training runs.
        runs: the runs to look for.
        notes: gets one line for each run without a history.

    Returns:
        The trainings of the runs that have a history, by run.

    Raises:
        UserError: when a history cannot be read.
    """
    trainings = {}
    for run in runs:
        folder = RunFolder(storage.join(storage.absolute(path), run))
        if not storage.exists(folder.history_path):
            notes.append(f"{run}: no training history was found, so it has no learning curve.")
            continue
        result = folder.result or {}
        trainings[run] = Training(
            history=history.read_history(folder.history_path).to_pandas(),
            hardware=_plain(result.get("hardware", "")),
        )
    return trainings


def _plain(value: object) -> str:
    """A JSON value as text: the hardware's record may be a string or an object."""
    if isinstance(value, dict):
        items = {name: item for name, item in value.items() if item is not None}
        return ", ".join(f"{name}: {_plain(item)}" for name, item in items.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return str(value)


def _about(evaluation: Evaluation, run: str, training: Training | None) -> dict[str, Any]:
    """One row of the table of runs."""
    scores = [score for score in evaluation.scores if score.run == run]
    about: dict[str, Any] = {
        "run": run,
        "model": ", ".join(sorted({score.model for score in scores})),
        "checkpoint": ", ".join(sorted({score.checkpoint[:12] for score in scores})),
        "predicted_at": min((score.predicted_at for score in scores), default=""),
        **dict.fromkeys(("epochs", "best", "minutes", "speed", "hardware"), "–"),
    }
    if training is None or training.history.empty:
        return about
    epochs = training.history
    if "validation_accuracy" in epochs:
        best = epochs.iloc[int(epochs["validation_accuracy"].fillna(-1).argmax())]
        accuracy = percent(float(best["validation_accuracy"]))
        about["best"] = f"{accuracy} (epoch {int(best['epoch'])})"
    return about | {
        "epochs": f"{int(epochs['epoch'].max())}",
        "minutes": f"{epochs['seconds'].sum() / 60:.1f}",
        "speed": f"{epochs['images_per_s'].median():,.0f}",
        "hardware": training.hardware or "–",
    }


def _headlines(evaluation: Evaluation) -> list[str]:
    """The first lines of the page: each split's best run, and how it compares with others."""
    lines = []
    for split in evaluation.splits:
        scored = [score for score in evaluation.scores_on(split) if score.num_scored]
        if not scored:
            lines.append(f"{split}: no image has both a label and a prediction.")
            continue
        best = max(scored, key=lambda score: score.accuracy.value)
        verb = "reaches" if len(scored) == 1 else f"is the most accurate of {len(scored)} runs:"
        cells = dict(zip(best.estimates, tables.cells(best)))
        accuracy, macro_f1 = (
            tables.in_brackets(cells[name], " %") for name in ("accuracy", "macro_f1")
        )
        lines.append(
            f"{split}: {best.run} {verb} {accuracy} accuracy, {macro_f1} macro-F1, "
            f"n = {best.num_scored:,}."
        )
        with_best = [
            comparison
            for comparison in evaluation.comparisons_on(split)
            if best.run in (comparison.first_run, comparison.second_run)
        ]
        lines += [f"{split}: {tables.in_words(each)}" for each in with_best[:_MOST_HEADLINES]]
    return lines
