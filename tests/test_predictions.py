"""The contract of predictions: columns, manifest, and what is not trusted."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import prediction_samples as samples
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from fer_ray.data import predictions
from fer_ray.data.labels import FER2013_LABELS
from fer_ray.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return samples.save(tmp_path, samples.random_table(1, 20, failed=[3]))


def change_manifest(folder: Path, **changes: object) -> None:
    path = folder / predictions.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_written_is_read_back(folder: Path):
    rows = samples.random_table(1, 20, failed=[3])
    read = predictions.read(str(folder))
    assert read.table.equals(rows)
    assert (read.run, read.split, read.model, read.checkpoint) == (
        "one",
        "validation",
        "custom_cnn",
        "0123abcd",
    )
    assert read.labels == FER2013_LABELS
    assert read.manifest["rows"] == 20
    assert read.manifest["config"] == {"model": {"name": "custom_cnn"}}


def test_three_readers_agree(folder: Path):
    expected = predictions.read(str(folder)).table.sort_by("image_id")
    by_arrow = pa.dataset.dataset(folder, format="parquet").to_table().sort_by("image_id")
    assert by_arrow.equals(expected)
    by_pandas = pd.read_parquet(folder).sort_values("image_id", ignore_index=True)
    pd.testing.assert_frame_equal(by_pandas, expected.to_pandas())
    # DuckDB gives timestamps in the session's zone: the instants are compared.
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        query = f"SELECT * FROM '{folder}/*.parquet' ORDER BY image_id"
        by_duckdb = connection.sql(query).to_arrow_table()
    assert by_duckdb.cast(expected.schema).equals(expected)


def test_columns_are_plain():
    nested = (pa.types.is_nested, pa.types.is_dictionary, pa.types.is_large_string)
    for field in predictions.schema(["calm", "tense"]):
        assert not any(check(field.type) for check in nested), field


def test_find_from_each_level(tmp_path: Path):
    one = samples.save(tmp_path, samples.random_table(1, 4))
    two = samples.save(tmp_path, samples.random_table(1, 4, split="test"))
    three = samples.save(tmp_path, samples.random_table(1, 4, run="three"))
    (tmp_path / "notes.txt").write_text("beside them")
    assert predictions.find(str(one)) == [str(one)]
    assert predictions.find(str(one.parent)) == [str(two), str(one)]
    assert predictions.find(str(tmp_path)) == [str(two), str(one), str(three)]


def test_find_does_not_search_deep(tmp_path: Path):
    samples.save(tmp_path / "above", samples.random_table(1, 4))
    with pytest.raises(UserError, match="no predictions here"):
        predictions.find(str(tmp_path))


def test_unfinished_folder_is_left_out_by_name(folder: Path, tmp_path: Path, caplog):
    unfinished = tmp_path / "one" / "test"
    unfinished.mkdir()
    (unfinished / "part-00000.parquet").write_bytes((folder / "part-00000.parquet").read_bytes())
    with caplog.at_level(logging.WARNING):
        assert predictions.find(str(tmp_path)) == [str(folder)]
    assert str(unfinished) in caplog.text
    with pytest.raises(UserError, match="unfinished"):
        predictions.find(str(unfinished))


@pytest.mark.parametrize("path", ["absent", "empty"])
def test_find_without_predictions(tmp_path: Path, path: str):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"give a folder .*_manifest\.json"):
        predictions.find(str(tmp_path / path))


def lose_a_file(folder: Path) -> None:
    (folder / "part-00001.parquet").unlink()


def add_a_file(folder: Path) -> None:
    content = (folder / "part-00001.parquet").read_bytes()
    (folder / "part-00002.parquet").write_bytes(content)


def cut_a_file(folder: Path) -> None:
    content = (folder / "part-00001.parquet").read_bytes()
    (folder / "part-00001.parquet").write_bytes(content[: len(content) // 2])


def shorten_a_file(folder: Path) -> None:
    path = folder / "part-00001.parquet"
    pq.write_table(pq.ParquetFile(path).read().slice(1), path)


def repeat_a_row(folder: Path) -> None:
    path = folder / "part-00001.parquet"
    part = pq.ParquetFile(path).read()
    pq.write_table(pa.concat_tables([part.slice(0, 1), part.slice(0, 9)]), path)


def drop_a_column(folder: Path) -> None:
    path = folder / "part-00001.parquet"
    pq.write_table(pq.ParquetFile(path).read().drop_columns(["prob_sad"]), path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_a_file, r"files missing: \['part-00001.parquet'\]"),
        (add_a_file, r"not listed: \['part-00002.parquet'\]"),
        (cut_a_file, "part-00001.parquet is damaged: it cannot be read as Parquet"),
        (shorten_a_file, "19 rows instead of 20"),
        (repeat_a_row, "1 images more than once, such as 'images/00010.jpg'"),
        (drop_a_column, "part-00001.parquet: columns are"),
        (lambda folder: change_manifest(folder, rows=21), "20 rows instead of 21"),
        (lambda folder: change_manifest(folder, format="else"), "the format is not"),
        (lambda folder: change_manifest(folder, labels=["happy"]), "columns are"),
        (lambda folder: (folder / predictions.MANIFEST).write_text("{"), "not valid JSON"),
        (lambda folder: (folder / predictions.MANIFEST).unlink(), "no _manifest.json"),
    ],
)
def test_a_damaged_folder_is_not_read(folder: Path, damage, message: str):
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        predictions.read(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows.slice(1),
        lambda rows: pa.concat_tables([rows.slice(0, 19), rows.slice(0, 1)]),
        lambda rows: rows.set_column(9, "run", pa.array(["a"] * 10 + ["b"] * 10)),
        lambda rows: rows.cast(rows.schema.set(0, pa.field("image_id", pa.large_string()))),
    ],
    ids=["row lost", "image twice", "two runs", "other type"],
)
def test_no_manifest_for_incomplete_rows(tmp_path: Path, change):
    rows = change(samples.random_table(1, 20, labels=["calm", "tense"]))
    pq.write_table(rows, tmp_path / "part-0.parquet")
    with pytest.raises(RuntimeError, match="predictions are not complete"):
        predictions.write_manifest(
            str(tmp_path),
            rows=20,
            files=["part-0.parquet"],
            labels=["calm", "tense"],
            checkpoint="0123abcd",
            config={},
        )
    assert not (tmp_path / predictions.MANIFEST).exists()


def test_other_writers_string_types_are_accepted(folder: Path):
    path = folder / "part-00000.parquet"
    pd.read_parquet(path).to_parquet(path)
    assert predictions.read(str(folder)).table.schema == predictions.schema(FER2013_LABELS)


def test_error_rows_have_no_prediction(folder: Path):
    row = predictions.read(str(folder)).table.slice(3, 1).to_pylist()[0]
    assert row["error"] == "not an image"
    assert row["predicted"] is None and row["correct"] is None and row["prob_sad"] is None
    assert np.isnan(pd.read_parquet(folder)["confidence"]).sum() == 1
