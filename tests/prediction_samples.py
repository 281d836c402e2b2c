"""Generated predictions that several test modules write and read."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import rewriting

from fer_ray.data import dataset, history, predictions
from fer_ray.data.labels import FER2013_LABELS, probability_column

WHEN = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)


def table(
    true: Sequence[str | None],
    probabilities: np.ndarray,
    *,
    run: str = "one",
    split: str = "validation",
    model: str = "custom_cnn",
    labels: Sequence[str] = FER2013_LABELS,
    image_ids: Sequence[str] | None = None,
    failed: Sequence[int] = (),
) -> pa.Table:
    """One row an image; those numbered in `failed` carry an error instead of a prediction."""
    rows = []
    for number, (label, row) in enumerate(zip(true, np.asarray(probabilities, np.float32))):
        error = number in failed
        predicted = None if error else labels[int(row.argmax())]
        known = label is not None and not error
        rows.append(
            {
                "image_id": image_ids[number] if image_ids else f"images/{number:05d}.jpg",
                "pixel_sha256": None if error else f"{number:064x}",
                "label": label,
                "predicted": predicted,
                "confidence": None if error else row.max(),
                "correct": predicted == label if known else None,
                **{
                    probability_column(name): None if error else value
                    for name, value in zip(labels, row)
                },
                "error": "not an image" if error else None,
                "run": run,
                "split": split,
                "model": model,
                "checkpoint": "0123abcd",
                "predicted_at": WHEN,
            }
        )
    return pa.Table.from_pylist(rows, schema=predictions.schema(labels))


def save(
    root: Path, rows: pa.Table, labels: Sequence[str] = FER2013_LABELS, *, parts: int = 2
) -> Path:
    """Writes a table as `parts` files and a manifest to ``<root>/<run>/<split>``."""
    folder = root / rows["run"][0].as_py() / rows["split"][0].as_py()
    folder.mkdir(parents=True)
    files = []
    for number, indices in enumerate(np.array_split(np.arange(rows.num_rows), parts)):
        files.append(f"part-{number:05d}.parquet")
        pq.write_table(rows.take(indices), folder / files[-1])
    predictions.write_manifest(
        str(folder),
        rows=rows.num_rows,
        files=files,
        labels=labels,
        checkpoint="0123abcd",
        config={"model": {"name": "custom_cnn"}},
    )
    return folder


def random_table(seed: int, count: int, *, skill: float = 2.0, **settings) -> pa.Table:
    """Predictions of a model whose accuracy rises with its `skill`.

    The true labels depend on `count` and the labels alone, so that two runs share them.
    """
    labels = settings.get("labels", FER2013_LABELS)
    true = np.random.default_rng(99).integers(len(labels), size=count)
    logits = np.random.default_rng(seed).normal(size=(count, len(labels)))
    logits[np.arange(count), true] += skill
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return table([labels[index] for index in true], probabilities, **settings)


def save_dataset(
    root: Path, rows: pa.Table, images: np.ndarray, labels: Sequence[str] = FER2013_LABELS
) -> Path:
    """Writes a prepared dataset with one split: the images of predictions.

    Args:
        root: the folder; created.
        rows: predictions, whose ids, labels and hashes are taken.
        images: uint8 of shape (N, S, S), in the order of `rows`.
        labels: the dataset's labels.
    """
    split = rows["split"][0].as_py()
    size = images.shape[1]
    table = pa.table(
        {
            "image_id": rows["image_id"],
            "split": rows["split"],
            "label": rows["label"],
            "image": [image.tobytes() for image in images],
            "height": [size] * rows.num_rows,
            "width": [size] * rows.num_rows,
            "pixel_sha256": pc.fill_null(rows["pixel_sha256"], "unreadable"),
        },
        schema=dataset.SCHEMA,
    )
    (root / split).mkdir(parents=True)
    pq.write_table(table, root / split / "part-00000.parquet")
    file = f"{split}/part-00000.parquet"
    part = {"rows": rows.num_rows, "files": [file], "parts": {file: rewriting.part(root / file)}}
    info = {
        "labels": list(labels),
        "image_size": size,
        "splits": {split: {**part, "classes": {}, "unlabelled": 0}},
        "pixel_mean": 0.5,
        "pixel_std": 0.25,
        "data_sha256": "0" * 64,
    }
    dataset.write_info(str(root), info)
    return root


def save_history(runs: Path, run: str, epochs: int = 5) -> Path:
    """Writes a run's ``history.parquet`` and ``run.json``."""
    folder = runs / run
    folder.mkdir(parents=True)
    epoch = np.arange(1, epochs + 1)
    gained = 1 - np.exp(-epoch / 4)
    columns = {
        "epoch": epoch,
        "train_loss": 1.95 - 1.2 * gained,
        "train_accuracy": 0.15 + 0.6 * gained,
        "train_macro_f1": 0.1 + 0.6 * gained,
        "validation_loss": 1.95 - gained,
        "validation_accuracy": 0.15 + 0.5 * gained,
        "validation_macro_f1": 0.1 + 0.5 * gained,
        "learning_rate": 0.1 * (1 - gained),
        "images_per_s": np.full(epochs, 1234.5),
        "seconds": np.full(epochs, 12.0),
    }
    rows = pa.table(columns).to_pylist()
    for row in rows:
        row["ended_at"] = f"2026-01-01T00:00:{12 * row['epoch'] % 60:02}+00:00"
    history.write_history(str(folder / "history.parquet"), rows)
    (folder / "run.json").write_text(json.dumps({"hardware": {"processor": "two cores"}}))
    return folder
