"""Prepared data that is damaged or belongs to another dataset is refused, and the part is named."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rewriting
import small
from test_dataset import LABELS, write_dataset

from fer_ray.data import dataset, object_store
from fer_ray.data.row_groups import row_group_slices
from fer_ray.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PART = "train/part-00001.parquet"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A prepared dataset of four images of 8 pixels in two parts."""
    write_dataset(tmp_path / "faces", LABELS)
    return tmp_path / "faces"


def load(folder: Path) -> dataset.Split:
    return dataset.load_split(dataset.read_info(str(folder)), "train")


def refused(folder: Path, message: str) -> None:
    """Reading the train split ends in one line that names the file."""
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_every_flipped_bit_of_a_part_is_refused(folder):
    part = folder / PART
    content = part.read_bytes()
    for bit in np.random.default_rng(0).integers(0, 8 * len(content), 300):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        part.write_bytes(flipped)
        refused(
            folder, f"^{part} is damaged: its SHA-256 is not the one that was recorded: run jobs"
        )
    part.write_bytes(content)
    assert len(load(folder).labels) == 4


def test_every_flipped_bit_of_the_description_is_refused(folder):
    file = folder / "dataset.json"
    content = file.read_bytes()
    for bit in np.random.default_rng(0).integers(0, 8 * len(content), 300):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        refused(folder, f"{file}.*run jobs/prepare.py again$")


def test_a_part_of_another_dataset_with_as_many_rows_is_refused(folder, tmp_path):
    write_dataset(tmp_path / "other", ["sad", "sad", "sad", "sad"])
    shutil.copy(tmp_path / "other" / PART, folder / PART)
    refused(folder, f"^{folder / PART} is damaged: it")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ["sad", "happy"]}, "labels are not in alphabetical order"),
        ({"labels": [1, 2]}, r"labels is \[1, 2\], not a list of different texts"),
        ({"labels": []}, "labels are not"),
        ({"image_size": "8"}, "image_size is '8', not a whole number between 8 and 1024"),
        ({"image_size": 10**6}, "image_size is 1000000, not"),
        ({"pixel_mean": "0.5"}, "pixel_mean is '0.5', not a finite number between 0 and 1"),
        ({"pixel_std": -1}, "pixel_std is -1"),
        ({"data_sha256": "none"}, "data_sha256 is 'none', not a SHA-256"),
        ({"splits": []}, r"splits is \[\], not an object"),
        ({"splits": {"train": 3}}, "splits.train is 3, not an object"),
    ],
)
def test_a_malformed_description_is_one_line_that_names_key_and_value(folder, changes, message):
    rewriting.hash_again(folder / "dataset.json", **changes)
    refused(folder, f"dataset.json is damaged: {message}.*: run jobs/prepare.py again$")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": "4"}, "splits.train.rows is '4', not a whole number"),
        ({"rows": 5}, "the parts of train do not have its 5 rows"),
        ({"rows": 10**15}, "splits.train.rows is 10{15}, not"),
        ({"unlabelled": None}, "splits.train.unlabelled is None"),
        ({"files": [PART]}, "files and parts of train differ"),
        ({"files": [PART, PART]}, "files is"),
        ({"files": ["../../victim.parquet"]}, "'../../victim.parquet' is not the path of a part"),
        ({"files": ["train/../victim.parquet"]}, "is not the path of a part"),
        ({"files": ["/etc/passwd"]}, "'/etc/passwd' is not the path of a part"),
        ({"files": ["validation/part-00000.parquet"]}, "is not the path of a part of train"),
        ({"parts": {PART: {}}, "files": [PART]}, "num_bytes is missing"),
        ({"classes": {"happy": -1}}, "splits.train.classes.happy is -1"),
    ],
)
def test_a_malformed_split_is_one_line_that_names_key_and_value(folder, changes, message):
    split = json.loads((folder / "dataset.json").read_text())["splits"]["train"]
    rewriting.hash_again(folder / "dataset.json", splits={"train": split | changes})
    refused(folder, f"dataset.json is damaged: .*{message}")


def test_a_split_of_an_unknown_name_is_refused(folder):
    shutil.move(folder / "train", folder / "..x")
    split = {"rows": 0, "files": [], "parts": {}, "classes": {}, "unlabelled": 0}
    rewriting.hash_again(folder / "dataset.json", splits={"..x": split})
    refused(folder, r"there is no split '\.\.x'")


NO_OBJECTS = rewriting.NO_JSON_OBJECTS


@pytest.mark.parametrize("content", NO_OBJECTS.values(), ids=NO_OBJECTS)
def test_a_description_that_is_no_json_object_is_one_line(folder, content):
    (folder / "dataset.json").write_bytes(content)
    refused(folder, "dataset.json is damaged: .*: run jobs/prepare.py again$")


@pytest.mark.parametrize("name", ["dataset.json", PART])
def test_a_pipe_or_a_device_in_the_place_of_a_file_blocks_nobody(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, f"{folder / name} is a pipe or a device, not a file")
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    refused(folder, f"{folder / name} is a pipe or a device, not a file")


def test_a_description_that_is_too_large_is_not_read(folder, monkeypatch):
    monkeypatch.setattr("fer_ray.storage.MAX_JSON_BYTES", 100)
    refused(folder, r"dataset.json has \d+ bytes; at most 100 are read: run jobs/prepare.py again$")


def change_column(name: str, values: list, kind: pa.DataType | None = None):
    """A change of a part: another column of the same name, at the same position."""

    def change(table: pa.Table) -> pa.Table:
        index = table.schema.get_field_index(name)
        return table.set_column(
            index, name, pa.array(values, kind or table.schema.field(name).type)
        )

    return change


ROWS = [
    (change_column("split", ["test", "train"]), "split is not train in every row"),
    (change_column("label", ["joy", "sad"]), "a label is not one of happy, sad"),
    (change_column("height", [8, 9]), "height is not 8 in every row"),
    (change_column("width", [7, 7]), "width is not 8 in every row"),
    (change_column("height", [None, 8]), "height is null in 1 rows"),
    (change_column("image", [bytes(64), None]), "image is null in 1 rows"),
    (change_column("image", [bytes(64), bytes(63)]), "an image does not have 8 x 8 pixels"),
    (change_column("image", [b"", b""]), "an image does not have 8 x 8 pixels"),
    (change_column("image_id", ["a", "a"]), "an image_id occurs more than once"),
    (change_column("image_id", ["a", None]), "image_id is null in 1 rows"),
    (change_column("image", [bytes(64)] * 2, pa.large_binary()), "image large_binary"),
    (change_column("width", [8, 8], pa.int64()), "width int64"),
    (lambda table: table.drop_columns(["pixel_sha256"]), "columns are image_id string"),
    (lambda table: table.append_column("more", table["label"]), "columns are image_id string"),
]


@pytest.mark.parametrize(("change", "message"), ROWS, ids=[message for _, message in ROWS])
def test_rows_that_do_not_fit_the_dataset_are_refused(folder, change, message):
    """Although the part has the hash that the description records."""
    part = folder / PART
    pq.write_table(change(pq.read_table(part, partitioning=None)), part)
    rewriting.describe_again(folder)
    refused(folder, f"^{part} is damaged: .*{message}.*: run jobs/prepare.py again$")


def test_ids_that_two_parts_share_are_refused(folder):
    first = pq.read_table(folder / "train/part-00000.parquet", partitioning=None)
    pq.write_table(first, folder / PART)
    rewriting.describe_again(folder)
    refused(folder, "an image_id occurs more than once in train")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\xff" * 64 + b"\x40\0\0\0PAR1"])
def test_a_part_that_is_no_parquet_is_one_line(folder, content, monkeypatch):
    (folder / PART).write_bytes(content)
    monkeypatch.setattr(
        pq, "read_metadata", lambda path, **settings: pq.ParquetFile(first).metadata
    )
    first = folder / "train/part-00000.parquet"
    rewriting.describe_again(folder)
    monkeypatch.undo()
    refused(folder, f"^{folder / PART} is damaged: it cannot be read as Parquet")
    with pytest.raises(UserError, match=f"^{folder / PART} cannot be read"):
        row_group_slices(dataset.read_info(str(folder)), "train")


def test_a_part_that_declares_too_much_is_not_decompressed(folder, monkeypatch):
    monkeypatch.setattr("fer_ray.data.parquet.MAX_TABLE_BYTES", 100)
    refused(folder, "part-00000.parquet is damaged: .* bytes uncompressed")


def test_a_missing_part_and_a_cut_one_are_named(folder):
    (folder / PART).write_bytes((folder / PART).read_bytes()[:-1])
    refused(
        folder, rf"^{folder / PART} is damaged: it has [\d,]+ bytes instead of [\d,]+: run jobs"
    )
    (folder / PART).unlink()
    refused(folder, f"^{folder / PART} cannot be read")


def test_a_damaged_part_is_refused_before_it_is_streamed(ray_cluster, folder):
    """The size alone does not show it."""
    info = dataset.read_info(str(folder))
    object_store.verify_parts(info, ["train"])
    content = bytearray((folder / PART).read_bytes())
    content[20] ^= 1  # not in the footer
    (folder / PART).write_bytes(content)
    assert row_group_slices(info, "train")
    with pytest.raises(UserError, match=f"^{folder / PART} is damaged: its SHA-256"):
        object_store.verify_parts(info, ["train"])
    with pytest.raises(UserError, match=f"^{folder / PART} is damaged: its SHA-256"):
        object_store.shared_images(info, {"train": 1.0})


@pytest.fixture(scope="module")
def faces(drawn_faces, tmp_path_factory) -> Path:
    """A copy of a prepared dataset with a flipped bit in a part of each split."""
    path = tmp_path_factory.mktemp("flipped") / "faces"
    shutil.copytree(drawn_faces, path)
    for split in ("train", "validation"):
        (part,) = (path / split).iterdir()
        content = bytearray(part.read_bytes())
        content[len(content) // 2] ^= 1
        part.write_bytes(content)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("loading", ["memory", "stream"])
def test_training_ends_with_status_2_and_names_the_part(faces, tmp_path, loading):
    command = [sys.executable, str(ROOT / "jobs/train.py"), "--data", str(faces), "--width", "4"]
    command += ["--epochs", "1", "--global-batch-size", "16", "--num-workers", "1"]
    command += ["--loading", loading, "--storage", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2, done.stderr
    part = rf"{faces}/(train|validation)/part-00000\.parquet"
    assert_one_line(done.stderr, rf"^train\.py: {part} is damaged: its SHA-256 .* again$")
    assert not list(tmp_path.glob("*/checkpoint*"))


@pytest.mark.slow
def test_prediction_ends_with_status_2_and_names_the_part(faces, drawn_faces, tmp_path):
    small.write_checkpoint(dataset.read_info(drawn_faces), tmp_path / "run" / "checkpoint_1")
    command = [sys.executable, str(ROOT / "jobs/predict.py"), "--data", str(faces)]
    command += ["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "predictions")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2, done.stderr
    part = rf"{faces}/validation/part-00000\.parquet"
    assert_one_line(done.stderr, rf"^predict\.py: {part} is damaged: its SHA-256 .* again$")
    assert not (tmp_path / "predictions").exists()


def assert_one_line(text: str, pattern: str) -> None:
    """The job's own message is one line; Ray's server may print others."""
    own = [line for line in text.splitlines() if line.startswith(("train.py", "predict.py"))]
    assert len(own) == 1 and re.match(pattern, own[0]), text
    assert "Traceback" not in text
