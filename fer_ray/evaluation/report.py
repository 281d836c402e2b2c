"""The evaluation as a folder: four tables and one page that needs nothing from outside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from fer_ray import storage
from fer_ray.data import dataset
from fer_ray.errors import UserError
from fer_ray.evaluation import figures, tables
from fer_ray.evaluation.scores import Evaluation, Score
from fer_ray.reporting import html

MISTAKES = 24
"""Pictures in the gallery of each run and split."""

_MOST_HEADLINES = 4
"""Comparisons told at the top for each split; the tables have all."""

_CURVES = (("loss", "nats"), ("accuracy", "%"), ("macro_f1", "%"))


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a run's storage says about its training."""

    history: pd.DataFrame
    """One row an epoch."""
    hardware: str
    """Empty where it is not recorded."""


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """An image that was predicted wrongly."""

    image_id: str
    label: str
    predicted: str
    confidence: float
    picture: str | None
    """PNG as a data URI; None without pictures."""


def check_paths(output: str, runs: str | None, data: str | None) -> None:
    """Refuses, before any work, places that `publish` could not use.

    Raises:
        UserError: for an output that is no evaluation, or missing runs or data.
    """
    tables.check_output(output)
    if runs is not None and not storage.is_directory(runs):
        raise UserError(f"--runs: {runs}: no such folder; the --storage of jobs/train.py expected")
    if data is not None:
        dataset.read_info(data)


def publish(
    evaluation: Evaluation, output: str, *, runs: str | None = None, data: str | None = None
) -> str:
    """Writes tables and report to a folder, which appears whole and replaces an earlier one.

    Args:
        evaluation: the scores and comparisons.
        output: place of the folder.
        runs: the training runs' storage, for learning curves.
        data: the prepared dataset, for the pictures of mistakes.

    Returns:
        The place of the report.
    """
    check_paths(output, runs, data)
    page = render(evaluation, runs=runs, data=data)
    with storage.staged_directory(output) as folder:
        tables.write(evaluation, folder)
        storage.write_bytes(storage.join(folder, tables.REPORT), page.encode())
        tables.write_marker(evaluation, folder)
    return storage.join(output, tables.REPORT)


def render(evaluation: Evaluation, *, runs: str | None = None, data: str | None = None) -> str:
    """The page as HTML; everything that comes from data is escaped."""
    from markupsafe import Markup

    names = sorted({score.run for score in evaluation.scores})
    remarks = tables.notes(evaluation)
    trainings = read_trainings(runs, names, remarks) if runs is not None else {}
    histories = {run: training.history for run, training in trainings.items()}
    curves = [
        Markup(figures.learning_curves(histories, quantity, unit, names))
        for quantity, unit in _CURVES
        if histories
    ]
    sections = [_section(evaluation, split, names, data, remarks) for split in evaluation.splits]
    return html.render(
        "report.html.j2",
        {"percent": tables.percent, "nats": tables.nats, "share": _share, "glue": _glue},
        evaluation=evaluation,
        runs=names,
        headlines=_headlines(evaluation),
        about=[_about(evaluation, run, trainings.get(run)) for run in names],
        trained=bool(trainings),
        sections=sections,
        curves=curves,
        notes=remarks,
    )


def _section(
    evaluation: Evaluation,
    split: str,
    runs: Sequence[str],
    data: str | None,
    remarks: list[str],
) -> dict[str, Any]:
    """What the template shows of one split."""
    scores = evaluation.of_split(split)
    scored = [score for score in scores if score.num_scored]
    pictures = _pictures(data, split, remarks)
    return {
        "split": split,
        "scores": scores,
        "labels": scores[0].labels,
        "comparisons": [
            (one, tables.in_words(one), tables.p_text(one.p_value), tables.p_text(one.p_holm))
            for one in evaluation.compared_on(split)
        ],
        "accuracy": figures.accuracy_dots(scored, runs) if scored else "",
        "classes": figures.class_f1_bars(scored, runs) if scored else "",
        "confusions": [(score, figures.confusion_heatmap(score)) for score in scored],
        "galleries": [(score, mistakes(score, pictures)) for score in scored],
    }


def mistakes(
    score: Score, pictures: Mapping[str, tuple[str | None, np.ndarray]], most: int = MISTAKES
) -> list[Mistake]:
    """The mistakes that the model was most certain of.

    Args:
        score: one run on one split.
        pictures: hash of the pixels and picture, uint8 of shape (H, W), by ``image_id``.
        most: how many.

    Returns:
        The mistakes by falling confidence; without a picture where `pictures` has none, or
        another one under the same name.
    """
    wrong = score.rows[~score.rows["right"].astype(bool)].reset_index()
    wrong = wrong.sort_values(["confidence", "image_id"], ascending=[False, True]).head(most)
    found = []
    for row in wrong.to_dict("records"):
        sha256, picture = pictures.get(row["image_id"], (None, None))
        same = picture is not None and sha256 == row["pixel_sha256"]
        found.append(
            Mistake(
                image_id=row["image_id"],
                label=row["label"],
                predicted=row["predicted"],
                confidence=float(row["confidence"]),
                picture=html.png_data_uri(picture) if same and picture is not None else None,
            )
        )
    return found


def _pictures(
    data: str | None, split: str, remarks: list[str]
) -> dict[str, tuple[str | None, np.ndarray]]:
    if data is None:
        return {}
    info = dataset.read_info(data)
    if split not in info.splits:
        remarks.append(f"{split}: the dataset has no such split, so its mistakes have no pictures.")
        return {}
    loaded = dataset.load_split(info, split)
    return dict(zip(loaded.image_ids, zip(loaded.pixel_sha256, loaded.images)))


def read_trainings(path: str, runs: Sequence[str], remarks: list[str]) -> dict[str, Training]:
    """Reads ``<run>/history.parquet`` and the hardware of ``<run>/run.json``.

    Args:
        path: the training runs' storage.
        runs: the runs to look for.
        remarks: gets one line for each run without a history.

    Returns:
        What was found, by run.

    Raises:
        UserError: when a history is there but cannot be read.
    """
    found = {}
    for run in runs:
        folder = storage.join(storage.absolute(path), run)
        history = storage.join(folder, "history.parquet")
        if not storage.exists(history):
            remarks.append(f"{run}: no training history was found, so it has no learning curve.")
            continue
        record = storage.join(folder, "run.json")
        about = storage.read_json(record) if storage.exists(record) else {}
        found[run] = Training(
            history=_read_history(history), hardware=_plain(about.get("hardware", ""))
        )
    return found


def _read_history(path: str) -> pd.DataFrame:
    wanted = ["epoch", "seconds", "images_per_s"]
    wanted += [f"{part}_{name}" for name, _ in _CURVES for part in ("train", "validation")]
    fs, inner = storage.filesystem(path)
    try:
        with fs.open_input_file(inner) as stream:
            return pq.ParquetFile(stream).read(columns=wanted).to_pandas()[wanted]
    except (pa.ArrowException, KeyError) as error:
        raise UserError(f"{path}: not a training history: {error}".splitlines()[0]) from error


def _plain(value: object) -> str:
    """A JSON value as words: the hardware's record may be a text or an object."""
    if isinstance(value, dict):
        known = {name: inner for name, inner in value.items() if inner is not None}
        return ", ".join(f"{name}: {_plain(inner)}" for name, inner in known.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return str(value)


def _about(evaluation: Evaluation, run: str, training: Training | None) -> dict[str, Any]:
    """One row of the table of runs."""
    of_run = [score for score in evaluation.scores if score.run == run]
    about: dict[str, Any] = {
        "run": run,
        "model": ", ".join(sorted({score.model for score in of_run})),
        "checkpoint": ", ".join(sorted({score.checkpoint[:12] for score in of_run})),
        "predicted_at": min((score.predicted_at for score in of_run), default=""),
        "epochs": "–",
        "best": "–",
        "minutes": "–",
        "speed": "–",
        "hardware": "–",
    }
    if training is None or training.history.empty:
        return about
    history = training.history
    best = history.iloc[int(history["validation_accuracy"].fillna(-1).argmax())]
    return about | {
        "epochs": f"{int(history['epoch'].max())}",
        "best": f"{100 * best['validation_accuracy']:.1f} (epoch {int(best['epoch'])})",
        "minutes": f"{history['seconds'].sum() / 60:.1f}",
        "speed": f"{history['images_per_s'].median():,.0f}",
        "hardware": training.hardware or "–",
    }


def _headlines(evaluation: Evaluation) -> list[str]:
    """What the page says first: each split's best run, and how it compares with the others."""
    lines = []
    for split in evaluation.splits:
        scored = [score for score in evaluation.of_split(split) if score.num_scored]
        if not scored:
            lines.append(f"{split}: no image has both a label and a prediction.")
            continue
        best = max(scored, key=lambda score: score.accuracy.value)
        among = "reaches" if len(scored) == 1 else f"is the most accurate of {len(scored)} runs:"
        lines.append(
            f"{split}: {best.run} {among} {tables.percent(best.accuracy, ' %')} accuracy, "
            f"{tables.percent(best.macro_f1, ' %')} macro-F1, n = {best.num_scored:,}."
        )
        compared = evaluation.compared_on(split)
        with_best = [one for one in compared if best.run in (one.first_run, one.second_run)]
        lines += [f"{split}: {tables.in_words(one)}" for one in with_best[:_MOST_HEADLINES]]
    return lines


def _share(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f}"


def _glue(text: str) -> str:
    """Spaces inside ``n = 800`` or ``95 %`` made unbreakable."""
    for sign in ("=", "<"):
        text = text.replace(f" {sign} ", f"\u00a0{sign}\u00a0")
    return text.replace(" %", "\u00a0%")
