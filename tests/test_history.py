"""The history of a run: written as a whole, read with whatever metrics a version has."""

from __future__ import annotations

import prediction_samples as samples
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fer_ray.data import history
from fer_ray.errors import UserError
from fer_ray.evaluation import report


def test_histories_with_fewer_or_more_metrics_are_read(tmp_path):
    folder = samples.save_history(tmp_path, "run")
    path = folder / "history.parquet"
    table = pq.read_table(path)
    fewer = table.drop_columns(["train_macro_f1", "validation_macro_f1", "ended_at"])
    more = fewer.append_column("validation_unknown", pa.array([0.5] * table.num_rows))
    pq.write_table(more, path)
    assert history.read_history(str(path)).column_names == more.column_names
    trainings = report.read_trainings(str(tmp_path), ["run"], [])
    drawings = report._curves(trainings, ["run"])
    assert ["accuracy" in drawing for drawing in drawings] == [False, True]  # loss and accuracy


def test_a_history_without_any_metric_still_tells_the_time(tmp_path):
    folder = samples.save_history(tmp_path, "run", epochs=3)
    path = folder / "history.parquet"
    pq.write_table(pq.read_table(path, columns=["epoch", "images_per_s", "seconds"]), path)
    (training,) = report.read_trainings(str(tmp_path), ["run"], []).values()
    assert report._curves({"run": training}, ["run"]) == []


def test_columns_of_further_metrics_come_last_and_once():
    names = ["epoch", "train_kappa", "validation_kappa", "train_kappa", "train_loss", "seconds"]
    assert history.added_metrics(names) == ["train_kappa", "validation_kappa"]
    assert history.schema(names).names == [
        *(*history.SCHEMA.names, "train_kappa", "validation_kappa"),
    ]
    assert history.schema([]).equals(history.SCHEMA)


def test_what_lacks_the_time_is_no_history(tmp_path):
    path = tmp_path / "history.parquet"
    pq.write_table(pa.table({"epoch": [1]}), path)
    with pytest.raises(UserError, match="not a training history: no column images_per_s, seconds"):
        history.read_history(str(path))
