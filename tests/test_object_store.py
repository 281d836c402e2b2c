"""Sources and data in an object store, through a real S3 server on this machine."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import boto3
import pandas as pd
import pytest
from faces import HOSTILE, KEPT, prepare
from processes import kill_with_descendants

from fer_ray import storage
from fer_ray.data import dataset
from fer_ray.data.image_source import find_type, open_files
from fer_ray.data.sources import NOT_FOUND, ReadError
from fer_ray.errors import UserError
from fer_ray.preparation import run
from fer_ray.preparation.plan import plan_preparation

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def bucket(store, tmp_path_factory):
    """`s3://faces` with the hostile folder, its zip, a table of paths and fer2013.csv."""
    root = tmp_path_factory.mktemp("upload")
    for path, content in HOSTILE.items():
        target = root / "folder" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    shutil.make_archive(str(root / "faces"), "zip", root / "folder")
    rows = [
        (f"folder/{path}", path.split("/")[2], path.split("/")[1])
        for path in HOSTILE
        if path.count("/") == 3
    ]
    pd.DataFrame(rows, columns=["path", "label", "split"]).to_csv(root / "faces.csv", index=False)
    pixels = [
        (code, " ".join([str(tone)] * 2304), usage)
        for tone, (code, usage) in enumerate(
            [(0, "Training"), (3, "Training"), (3, "PublicTest"), (0, "PrivateTest")]
        )
    ]
    table = pd.DataFrame(pixels, columns=["emotion", "pixels", "Usage"])
    table.to_csv(root / "fer2013.csv", index=False)
    client = boto3.client("s3")
    client.create_bucket(Bucket="faces")
    for path in root.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "faces", path.relative_to(root).as_posix())
    return "s3://faces"


@pytest.mark.parametrize("source", ["folder", "faces.zip"])
def test_a_source_in_a_store_is_read_as_a_local_one(bucket, source, ray_cluster, tmp_path):
    info = prepare(f"{bucket}/{source}", f"{bucket}/prepared-{source}")
    assert sum(split["rows"] for split in info["splits"].values()) == KEPT
    assert info["quarantined"] == len(HOSTILE) - KEPT
    found = dataset.load_split(dataset.read_info(f"{bucket}/prepared-{source}"), "train")
    local = tmp_path / "faces"
    for path, content in HOSTILE.items():
        (local / path).parent.mkdir(parents=True, exist_ok=True)
        (local / path).write_bytes(content)
    assert info["data_sha256"] == prepare(local, tmp_path / "out")["data_sha256"]
    assert len(found.images) == info["splits"]["train"]["rows"]


def test_tables_in_a_store_are_read(bucket, ray_cluster, tmp_path):
    info = prepare(f"{bucket}/faces.csv", tmp_path / "table")
    assert info["splits"]["train"]["rows"] == 5 and info["splits"]["validation"]["rows"] == 2
    info = prepare(f"{bucket}/fer2013.csv", tmp_path / "pixels")
    assert {name: split["rows"] for name, split in info["splits"].items()} == {
        "train": 2,
        "validation": 1,
        "test": 1,
    }


def test_every_key_with_a_doubled_slash_is_quarantined_and_nothing_loops(bucket):
    client = boto3.client("s3")
    plain = ["a/1.png", "b/1.png"]
    nameless = ["/x.png", "/y.png", "//deep.png", "/a/b.png", "/a//c.png", "a//2.png", "a/b//3.png"]
    for key in (*plain, *nameless):
        client.put_object(Bucket="faces", Key=f"odd/{key}", Body=b"x")
    found = [(one.path, one.reason) for one in open_files(f"{bucket}/odd").entries()]
    assert sorted(found, key=lambda one: one[0]) == sorted(
        [
            *((path, None) for path in plain),
            *((path, "below a folder without a name") for path in nameless),
        ],
        key=lambda one: one[0],
    )


def test_a_missing_key_has_its_own_reason(bucket):
    with pytest.raises(ReadError) as caught:
        open_files(f"{bucket}/folder").read("images/absent.png", b"")
    assert str(caught.value) == NOT_FOUND


def test_a_query_after_the_name_does_not_change_the_type(bucket, store):
    host, port = store.get_host_and_port()
    query = f"?scheme=http&endpoint_override={host}:{port}"
    assert find_type(f"{bucket}/faces.zip{query}") == "zip"
    assert find_type(f"{bucket}/faces.csv{query}") == "table"
    assert find_type(f"{bucket}/fer2013.csv{query}") == "pixels"


def test_what_is_not_in_the_store_is_one_line(bucket, tmp_path):
    for source in ("s3://absent/faces", f"{bucket}/absent.zip", f"{bucket}/absent.csv"):
        with pytest.raises(UserError, match="absent") as caught:
            plan_preparation(source=source, output=str(tmp_path / "out"))
        assert "\n" not in str(caught.value)


def test_a_failure_in_a_store_leaves_nothing(bucket, ray_cluster, tmp_path, monkeypatch):
    def failing(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(run.statistics, "write_duplicates", failing)
    with pytest.raises(OSError, match="full"):
        prepare(f"{bucket}/folder", f"{bucket}/failing")
    assert not storage.list_names(f"{bucket}/failing")


def test_killed_while_it_replaces_a_data_set_the_next_run_works(bucket, ray_cluster, monkeypatch):
    path = f"{bucket}/replaced"
    prepare("synthetic", path, num_images=40, image_size=16)
    remove = storage.remove

    def breaking(name: str) -> None:
        if name.endswith("/train"):
            raise KeyboardInterrupt
        remove(name)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(storage, "remove", breaking)
        prepare("synthetic", path, num_images=40, image_size=16, overwrite=True)
    assert storage.is_unfinished(path)
    assert {"train", "dataset.json"} & set(storage.list_names(path)) == {"train"}
    prepare("synthetic", path, num_images=30, image_size=16)
    assert not storage.is_unfinished(path)
    assert len(dataset.load_split(dataset.read_info(path), "train").images) == 24


@pytest.mark.slow
def test_killed_in_a_store_it_is_no_data_set_and_the_next_run_works(bucket, tmp_path):
    path = f"{bucket}/killed"
    command = [sys.executable, "jobs/prepare.py", "--source", "synthetic"]
    command += ["--num-images", "20000", "--output", path]
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True) as job:
        while not storage.exists(f"{path}/train/part-00000.parquet"):
            assert job.poll() is None
            time.sleep(0.05)
        kill_with_descendants(job)
    assert storage.list_names(path)
    with pytest.raises(UserError, match="is not a prepared dataset"):
        dataset.read_info(path)
    command[command.index("20000")] = "70"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(dataset.load_split(dataset.read_info(path), "train").images) == 56
    assert sorted(storage.list_names(path)) == sorted(
        ["dataset.json", "duplicates.parquet", "quarantine.parquet", "train", "validation", "test"]
    )
