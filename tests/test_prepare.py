"""From a source to a prepared dataset: nothing is lost, and it is the same on any machine."""

from __future__ import annotations

import io
import json
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import processes
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faces import HOSTILE, KEPT, prepare, write_classes
from PIL import Image

from fer_ray import __version__
from fer_ray.data import dataset, decoding, parquet, sources
from fer_ray.errors import JobFailed, UserError
from fer_ray.preparation import run, shards
from fer_ray.preparation.inventory import Inventory
from fer_ray.preparation.plan import Plan, plan_preparation

ROOT = Path(__file__).resolve().parents[1]
JOB = ROOT / "jobs" / "prepare.py"


def test_every_file_becomes_a_row_or_a_quarantined_one(ray_cluster, hostile, tmp_path):
    info = prepare(hostile, tmp_path / "out")
    rows = pd.concat(pd.read_parquet(tmp_path / "out" / split) for split in info["splits"])
    quarantine = pd.read_parquet(tmp_path / "out" / "quarantine.parquet")
    assert sorted([*rows["image_id"], *quarantine["path"]]) == sorted(HOSTILE)
    assert len(rows) == KEPT
    assert info["quarantined"] == len(quarantine)
    reasons = dict(zip(quarantine["path"], quarantine["reason"]))
    assert "cannot be decoded" in reasons["images/train/sad/cut.jpg"]
    assert "not an image" in reasons["images/train/sad/text.jpg"]
    assert "empty" in reasons["images/train/sad/empty.png"]
    assert "class folder" in reasons["images/train/loose.png"]
    counts = {
        name: (split["classes"], split["unlabelled"]) for name, split in info["splits"].items()
    }
    assert counts == {
        "train": ({"happy": 3, "sad": 2}, 0),
        "validation": ({"happy": 1, "sad": 1}, 0),
        "test": ({"happy": 0, "sad": 1}, 1),
    }


def test_rows_hold_the_contract(ray_cluster, hostile, tmp_path):
    prepare(hostile, tmp_path / "out")
    for part in (tmp_path / "out").glob("*/part-*.parquet"):
        assert pq.read_schema(part).remove_metadata() == dataset.SCHEMA
    info = dataset.read_info(str(tmp_path / "out"))
    split = dataset.load_split(info, "train")
    assert split.image_ids == sorted(split.image_ids)
    first = decoding.decode(HOSTILE["images/train/happy/1.png"])
    row = split.image_ids.index("images/train/happy/1.png")
    assert np.array_equal(split.images[row], first)
    large = decoding.decode(HOSTILE["images/train/sad/large.png"])
    row = split.image_ids.index("images/train/sad/large.png")
    assert np.array_equal(split.images[row], decoding.fit(large, 48))
    assert split.pixel_sha256[row] == decoding.pixel_sha256(large)
    assert info.pixel_mean == pytest.approx(split.images.mean() / 255, abs=1e-12)
    assert info.pixel_std == pytest.approx(split.images.std() / 255, abs=1e-12)
    test = dataset.load_split(info, "test")
    assert dict(zip(test.image_ids, test.labels)) == {
        "images/test/sad/known.png": 1,
        "images/test/unknown.png": -1,
    }


def test_duplicates_are_counted_within_across_and_against_each_other(
    ray_cluster, hostile, tmp_path
):
    info = prepare(hostile, tmp_path / "out")
    assert info["duplicates"] == {
        "groups": 1,
        "images": 4,
        "within": {"train": 0, "validation": 0, "test": 0},
        "across": 1,
        "conflicting_labels": 1,
        "twins_in_train": {"validation": 1, "test": 0},
    }


def test_folder_and_zip_agree(ray_cluster, hostile, hostile_zip, tmp_path):
    folder = prepare(hostile, tmp_path / "from folder")
    archive = prepare(hostile_zip, tmp_path / "from zip")
    for key in ("data_sha256", "splits", "pixel_mean", "duplicates", "quarantined"):
        assert folder[key] == archive[key]
    assert (folder["source"]["kind"], archive["source"]["kind"]) == ("folder", "zip")
    tables = [pq.read_table(tmp_path / name / "train") for name in ("from folder", "from zip")]
    assert tables[0].equals(tables[1])


def test_the_number_of_shards_does_not_change_the_data(ray_cluster, tmp_path, monkeypatch):
    whole = prepare("synthetic", tmp_path / "1", num_images=90, image_size=24)
    again = prepare("synthetic", tmp_path / "2", num_images=90, image_size=24)
    monkeypatch.setattr(shards, "ROWS_PER_SHARD", 10)
    cut = prepare("synthetic", tmp_path / "3", num_images=90, image_size=24)
    other = prepare("synthetic", tmp_path / "4", num_images=90, image_size=24, seed=1)
    assert whole["data_sha256"] == again["data_sha256"] == cut["data_sha256"]
    assert other["data_sha256"] != whole["data_sha256"]
    assert (len(whole["splits"]["train"]["files"]), len(cut["splits"]["train"]["files"])) == (1, 8)
    first, second = (
        dataset.load_split(dataset.read_info(str(tmp_path / name)), "train") for name in "13"
    )
    assert np.array_equal(first.images, second.images)
    assert first.image_ids == second.image_ids == sorted(first.image_ids)
    files = [(tmp_path / name / "train" / "part-00000.parquet").read_bytes() for name in "12"]
    assert files[0] == files[1]


def test_large_images_come_in_smaller_shards():
    inventory = Inventory()
    names = [f"{i:03}" for i in range(200)]
    inventory.add_files(sources.Entry(path=name, split="train", label="happy") for name in names)
    tasks = [
        shards._unpack(task["files"])["path"].to_pylist()
        for task in shards.write_tasks(inventory, 1024)
    ]
    inventory.close()
    assert max(map(len, tasks)) * 1024**2 <= shards.BYTES_PER_SHARD
    assert [name for task in tasks for name in task] == names


def test_dataset_json_records_the_source(ray_cluster, tmp_path):
    prepare("synthetic", tmp_path / "out", num_images=30, image_size=16, seed=5)
    info = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert info["source"] == {"kind": "synthetic", "seed": 5, "num_images": 30}
    assert info["versions"]["fer_ray"] == __version__
    assert {"fer_ray", "ray", "pyarrow", "pillow", "numpy"} <= set(info["versions"])
    assert pq.read_schema(tmp_path / "out" / "quarantine.parquet") == dataset.QUARANTINE_SCHEMA
    assert pq.read_metadata(tmp_path / "out" / "quarantine.parquet").num_rows == 0


def test_overwrite_replaces_the_whole_dataset(ray_cluster, tmp_path):
    prepare("synthetic", tmp_path / "out", num_images=30, image_size=16)
    (tmp_path / "out" / "train" / "part-99999.parquet").write_bytes(b"left over")
    with pytest.raises(UserError, match="--overwrite replaces it"):
        plan_preparation(source="synthetic", output=str(tmp_path / "out"))
    prepare("synthetic", tmp_path / "out", num_images=40, image_size=16, overwrite=True)
    assert dataset.read_info(str(tmp_path / "out")).split("train").rows == 32
    assert not (tmp_path / "out" / "train" / "part-99999.parquet").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@dataclass(frozen=True, kw_only=True)
class FailingImageSource:
    """A source in which reading one image (or with `only=None` each) raises `error`."""

    error: Exception
    only: str | None = "2"

    has_splits = True

    def entries(self):
        for name in "123":
            label = "happy" if name == "1" else "sad"
            yield sources.Entry(path=name, split="train", label=label)

    def grey(self, path: str, at: bytes) -> np.ndarray:
        if self.only in (path, None):
            raise self.error
        return np.full((8, 8), int(path), np.uint8)

    def describe(self, listing) -> dict[str, str]:
        return {}


def failing_plan(plan: Plan, images: FailingImageSource) -> Plan:
    """Returns the plan with other images."""
    plan.inventory.close()
    inventory = Inventory()
    inventory.add_files(images.entries())
    return replace(plan, images=images, inventory=inventory, labels=("happy", "sad"))


@pytest.fixture
def failing(ray_cluster):
    """`FailingImageSource`, sent to workers whole: they cannot import this module."""
    ray_cluster.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield FailingImageSource
    ray_cluster.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_a_failing_preparation_leaves_what_was_there(failing, tmp_path):
    prepare("synthetic", tmp_path / "out", num_images=30, image_size=16)
    before = (tmp_path / "out" / "dataset.json").read_bytes()
    plan = plan_preparation(source="synthetic", output=str(tmp_path / "out"), overwrite=True)
    images = failing(error=RuntimeError("a defect"))
    plan = failing_plan(plan, images)
    with pytest.raises(Exception, match="a defect"):
        run.prepare(plan, log=lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "dataset.json").read_bytes() == before
    assert dataset.load_split(dataset.read_info(str(tmp_path / "out")), "train").images.any()


def test_no_usable_train_image_is_a_user_error(failing, tmp_path):
    plan = plan_preparation(source="synthetic", output=str(tmp_path / "out"))
    images = failing(error=decoding.DecodeError("it is green"), only=None)
    plan = failing_plan(plan, images)
    with pytest.raises(UserError, match="no train image can be used: it is green"):
        run.prepare(plan, log=lambda line: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["hostile", "hostile_zip"])
def test_a_source_that_workers_cannot_access_is_a_user_error(ray_cluster, kind, request, tmp_path):
    """The alternative would be a quarantine full of good files."""
    source = request.getfixturevalue(kind)
    plan = plan_preparation(source=str(source), output=str(tmp_path / "out"))
    source.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="--source") as caught:
        run.prepare(plan, log=lambda line: None)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def as_table(folder: Path) -> Path:
    """Writes a table of the images below a folder's ``train``."""
    paths = [path for path in sorted(folder.glob("images/train/*/*")) if path.is_file()]
    frame = pd.DataFrame({"path": map(str, paths), "label": [path.parent.name for path in paths]})
    frame.to_csv(folder.parent / "faces.csv", index=False)
    return folder.parent / "faces.csv"


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_a_file_that_only_the_driver_can_access_is_a_user_error(
    ray_cluster, kind, hostile, tmp_path
):
    """As on other machines whose disks have the source's folder, but not all of its files."""
    source = as_table(hostile) if kind == "table" else hostile
    plan = plan_preparation(source=str(source), output=str(tmp_path / "out"))
    there, away = hostile / "images/train/happy/2.jpg", tmp_path / "away.jpg"
    there.rename(away)

    def log(line: str) -> None:  # when the workers are done
        if away.exists():
            away.rename(there)

    message = r"--source: not every worker can access '.*images/train/happy/2\.jpg': .* shared disk"
    with pytest.raises(UserError, match=message) as caught:
        run.prepare(plan, log=log)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_a_file_that_no_process_can_access_is_quarantined(ray_cluster, kind, hostile, tmp_path):
    source = as_table(hostile) if kind == "table" else hostile
    plan = plan_preparation(source=str(source), output=str(tmp_path / "out"))
    (hostile / "images/train/happy/2.jpg").unlink()
    run.prepare(plan, log=lambda line: None)
    quarantine = pd.read_parquet(tmp_path / "out" / "quarantine.parquet")
    gone = quarantine[quarantine["reason"] == sources.NOT_FOUND]
    assert [Path(path).name for path in gone["path"]] == ["2.jpg"]


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (
            OSError(28, "No space left on device\nand more"),
            JobFailed,
            r"a worker failed: \[Errno 28\] No space left on device$",
        ),
        (OSError("AWS Error ACCESS_DENIED"), UserError, "a worker failed: AWS Error ACCESS_DENIED"),
    ],
)
def test_an_error_of_disk_or_store_in_a_worker_is_one_line(
    failing, error, raised, message, tmp_path, capfd
):
    plan = plan_preparation(source="synthetic", output=str(tmp_path / "out"))
    plan = failing_plan(plan, failing(error=error))
    with pytest.raises(raised, match=message):
        run.prepare(plan, log=lambda line: None)
    assert list(tmp_path.iterdir()) == []
    assert processes.printed_by_jobs(capfd.readouterr().err) == []


def test_an_output_that_a_worker_cannot_access_is_a_user_error(tmp_path):
    staging, shard = tmp_path / "absent" / "out", "train/part-00000.parquet"
    message = f"--output: not every worker can access {staging.parent}"
    with pytest.raises(UserError, match=message):
        parquet.write_table(dataset.SCHEMA.empty_table(), str(staging), shard)
    rows = shards._pack(pa.table([["1.png"], ["validation"]], schema=shards._TASK_ROWS))
    with pytest.raises(UserError, match=message):
        shards.rewrite_shard(
            pa.Table.from_pylist([{"shard": shard, "rows": rows}]), staging=str(staging)
        )


def test_the_job_s_last_line_is_the_path(ray_cluster, hostile, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(JOB), "--source", "faces", "--output", "out"])
    runpy.run_path(str(JOB), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["source"]["path"] == "faces"


def test_the_table_shows_every_count(ray_cluster, hostile, tmp_path):
    lines: list[str] = []
    plan = plan_preparation(source=str(hostile), output=str(tmp_path / "out"))
    run.prepare(plan, log=lines.append)
    cells = {line.split()[0]: line.split()[1:] for line in lines}
    assert cells["split"] == ["happy", "sad", "unlabelled", "total"]
    assert cells["train"] == ["3", "2", "0", "5"]
    assert cells["test"] == ["0", "1", "1", "2"]
    assert f"quarantined: {len(HOSTILE) - KEPT}" in lines
    assert any("1 x the file is empty" in line for line in lines)
    assert any(line.startswith("  conflict: happy images/train/happy/1.png") for line in lines)
    assert max(map(len, lines)) < 200


def test_fer2013_is_counted_exactly(ray_cluster, real_images, tmp_path):
    info = prepare(real_images, tmp_path / "out")
    splits = info["splits"]
    assert splits["train"]["classes"] == {
        "angry": 3995,
        "disgust": 436,
        "fear": 4097,
        "happy": 7215,
        "neutral": 4965,
        "sad": 4830,
        "surprise": 3171,
    }
    assert list(splits["validation"]["classes"].values()) == [467, 56, 496, 895, 607, 653, 415]
    assert (splits["train"]["rows"], splits["validation"]["rows"]) == (28709, 3589)
    assert (round(info["pixel_mean"], 5), round(info["pixel_std"], 5)) == (0.50774, 0.25508)
    assert info["duplicates"] == {
        "groups": 1273,
        "images": 2805,
        "within": {"train": 987, "validation": 16},
        "across": 270,
        "conflicting_labels": 47,
        "twins_in_train": {"validation": 280},
    }
    assert info["quarantined"] == 0
    split = dataset.load_split(dataset.read_info(str(tmp_path / "out")), "train")
    assert split.image_ids == sorted(split.image_ids)
    assert Counter(split.labels.tolist())[1] == 436
    row = 12345
    with zipfile.ZipFile(real_images) as archive:
        stored = np.array(Image.open(io.BytesIO(archive.read(split.image_ids[row]))))
    assert np.array_equal(split.images[row], stored)


def job(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(JOB), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_user_errors_are_one_line_and_status_2_before_ray_starts(hostile, tmp_path):
    out = tmp_path / "out"
    for arguments, message in [
        (["--source", "synthetic", "--output", out, "--image-size", 4], "between 8 and 1024"),
        (["--source", tmp_path / "absent", "--output", out], "does not exist"),
        (["--source", "synthetic", "--output", out, "--overwite"], "--overwrite"),
    ]:
        done = job(*arguments)
        assert done.returncode == 2
        assert done.stdout == ""
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    assert not out.exists()


def test_all_other_user_errors_are_raised_by_the_plan(hostile, tmp_path):
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.txt").write_text("years of work")
    one_class, strange, cases, locked = (tmp_path / f"{name}.zip" for name in "abcd")
    for archive, paths in {
        one_class: ["train/happy/1.png", "train/sad.png"],
        strange: ["train/happy/1.png", "train/sad/1.png", "val/joy/1.png"],
        cases: ["train/happy/1.png", "train/Happy/1.png"],
        locked: ["train/happy/1.png", "train/sad/1.png"],
    }.items():
        with zipfile.ZipFile(archive, "w") as writer:
            for path in paths:
                writer.writestr(path, b"x")
    raw = locked.read_bytes()
    for mark in {match.start() for match in re.finditer(b"PK\x01\x02", raw)}:
        raw = raw[: mark + 8] + b"\x01" + raw[mark + 9 :]
    locked.write_bytes(raw)
    names = tmp_path / "names.csv"  # the file's name stands where its label should
    names.write_text("path,label\n" + "".join(f"{n}.png,{n}.png\n" for n in range(1001)))
    out = str(tmp_path / "out")
    for given, message in [
        ({"source": str(hostile), "num_images": 5}, "--num-images"),
        ({"source": str(names)}, r"1,001 classes, such as 0.png, 1.png, 10.png and 998 more: at"),
        ({"source": "fer2013.csv"}, "does not exist"),
        ({"source": "synthetic", "validation_fraction": 0.1}, "already has a validation split"),
        ({"source": "synthetic", "validation_fraction": 1.0}, "--validation-fraction"),
        ({"source": str(one_class)}, "train has one class, happy: two or more"),
        ({"source": str(strange)}, "validation has classes that train lacks: joy"),
        ({"source": str(cases)}, "'Happy' and 'happy' differ only in case"),
        ({"source": str(locked)}, "found 2 x it is encrypted"),
        ({"source": "synthetic", "image_size": 2000}, "--image-size"),
        ({"source": "synthetic", "output": str(occupied)}, "not a prepared dataset"),
        ({"source": "synthetic", "output": str(occupied), "overwrite": True}, "never replaced"),
        ({"source": "synthetic", "output": str(occupied / "thesis.txt")}, "is a file"),
        ({"source": "synthetic", "output": f"{occupied}/thesis.txt/x"}, "is not a writable folder"),
        ({"source": str(hostile), "output": str(hostile / "out")}, "one lies within the other"),
        ({"source": "synthetic", "output": "/proc"}, "is a mount point"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            plan_preparation(**{"output": out, **given})
        assert "\n" not in str(caught.value)
    assert (occupied / "thesis.txt").read_text() == "years of work"


@pytest.mark.slow
def test_a_terminated_job_leaves_nothing_and_the_next_one_works(ray_cluster, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, str(JOB), "--source", "synthetic", "--output", str(out)]
    log = tmp_path / "log.txt"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, "--num-images", "200000"], stdout=stream, stderr=stream
        )
    try:
        deadline = time.monotonic() + 90
        while not list(tmp_path.glob(".out.*/train/*.parquet")):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) != 0
    finally:
        process.kill()
    assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]
    assert prepare("synthetic", out, num_images=20)["splits"]["train"]["rows"] == 16


# ------------------------------------------------------------------ killed


@pytest.mark.slow
@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_any_moment_it_leaves_all_or_nothing_and_the_next_run_works(kills, tmp_path):
    """Random moments, one in each part of the job from Ray's start to its end."""
    source = write_classes(tmp_path / "faces", 300, ("calm", "glad"))
    out = tmp_path / "out"
    command = [sys.executable, str(JOB), "--source", str(source), "--output", str(out)]
    lengths = []
    for again in ([], ["--overwrite"]):  # the first has more to load
        start = time.monotonic()
        subprocess.run([*command, *again], check=True, capture_output=True, timeout=120)
        lengths.append(time.monotonic() - start)
    length = min(lengths)
    expected = json.loads((out / "dataset.json").read_text())["data_sha256"]
    shutil.rmtree(out)
    outcomes = Counter()
    for moment in range(kills):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path
        )
        try:
            process.wait(length * (0.3 + 0.8 * (moment + random.random()) / kills))
        except subprocess.TimeoutExpired:
            processes.kill_with_descendants(process)
        complete = out.exists()
        outcomes[complete] += 1
        if complete:
            info = json.loads((out / "dataset.json").read_text())
            assert info["data_sha256"] == expected
            assert sum(split["rows"] for split in info["splits"].values()) == 600
            shutil.rmtree(out)
    assert outcomes[False] >= kills // 4, outcomes
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert json.loads((out / "dataset.json").read_text())["data_sha256"] == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faces", "out"]
