import io
import json
import shutil
import sys
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import processes
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rewriting
import small
import torch
from PIL import Image

from fer_ray.data import predictions
from fer_ray.data.dataset import load_split, read_info
from fer_ray.data.labels import probability_column
from fer_ray.errors import JobFailed, UserError
from fer_ray.inference import plan as planning
from fer_ray.inference import run as inference
from fer_ray.models import run_checkpoints
from fer_ray.models.forward import Forward
from fer_ray.preparation.plan import plan_preparation
from fer_ray.preparation.run import prepare
from fer_ray.runtime import resources
from fer_ray.training import loop
from fer_ray.training.process_group import ProcessGroup


@pytest.fixture(scope="module")
def data(ray_cluster, tmp_path_factory):
    """A prepared data set of 90 synthetic faces."""
    path = str(tmp_path_factory.mktemp("data") / "faces")
    plan = plan_preparation(source="synthetic", output=path, num_images=90)
    prepare(plan, log=lambda line: None)
    return read_info(path)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """The folder of a run with one checkpoint, trained for an epoch."""
    folder = tmp_path_factory.mktemp("runs") / "tried"
    config = small.config(schedule={"epochs": 1})
    parts = [load_split(data, name) for name in ("train", "validation")]
    trainer = loop.Trainer(
        config,
        data,
        small.feed(config, *parts, described=data),
        group=ProcessGroup(),
        labels={"run": "tried", "environment": {}},
        resume=None,
    )

    def report(history, snapshot):
        path = folder / "checkpoint_1"
        path.mkdir(parents=True)
        snapshot()(path)

    trainer.fit(report)
    return folder


def predict(folder: Path, output: Path, *, actors: int = 1, **given) -> predictions.Predictions:
    plan = planning.plan(
        checkpoint_path=str(folder), output=str(output), **{"split": "validation", **given}
    )
    return predictions.read(inference.predict(plan, num_actors=actors, log=lambda line: None))


def direct(run: Path, images: np.ndarray) -> np.ndarray:
    found = run_checkpoints.find(str(run))
    model = found.load_model(torch.device("cpu"))
    return found.forward(torch.device("cpu")).probabilities(model, torch.from_numpy(images)).numpy()


def probabilities(found: predictions.Predictions) -> np.ndarray:
    columns = [found.table[probability_column(label)].to_numpy() for label in found.labels]
    return np.stack(columns, axis=1)


def test_predictions_are_those_of_direct_calls_by_id(data, run, tmp_path):
    found = predict(run, tmp_path / "out", data=data.path)
    split = load_split(data, "validation")
    rows = {name: index for index, name in enumerate(found.table["image_id"].to_pylist())}
    order = [rows[name] for name in split.image_ids]
    assert sorted(order) == list(range(len(split.labels)))
    expected = direct(run, split.images)
    np.testing.assert_allclose(probabilities(found)[order], expected, rtol=1e-5, atol=1e-6)
    table = found.table.take(pa.array(order))
    assert table["predicted"].to_pylist() == [data.labels[i] for i in expected.argmax(1)]
    assert table["label"].to_pylist() == [data.labels[i] for i in split.labels]
    assert table["correct"].to_pylist() == (expected.argmax(1) == split.labels).tolist()
    assert table["confidence"].to_pylist() == pytest.approx(expected.max(1).tolist(), rel=1e-5)
    assert table["pixel_sha256"].to_pylist() == split.pixel_sha256
    assert found.checkpoint == run_checkpoints.find(str(run)).sha256


def picture(seed: int, size: int = 48) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def loose(tmp_path_factory):
    """A folder and a zip of the same 11 files, two of which are no pictures, and junk."""
    folder = tmp_path_factory.mktemp("loose") / "faces"
    files = {f"deep/{name}/{name}.png": picture(name) for name in range(9)}
    files |= {"broken.png": picture(1)[:40], "text.jpg": b"hello", ".DS_Store": b"x"}
    archive = folder.parent / "faces.zip"
    with zipfile.ZipFile(archive, "w") as target:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
            target.writestr(name, content)
    return folder, archive


def test_unreadable_images_are_rows_with_an_error(run, loose, tmp_path):
    tables = []
    for path in loose:
        found = predict(run, tmp_path / path.name, images=str(path), split="images")
        assert found.table.num_rows == 11
        rows = {row["image_id"]: row for row in found.table.to_pylist()}
        for name in ("broken.png", "text.jpg"):
            row = rows[name]
            assert row["error"] and row["predicted"] is None and row["confidence"] is None
            assert all(row[probability_column(label)] is None for label in found.labels)
        assert rows["deep/3/3.png"]["error"] is None
        assert [one["path"] for one in found.manifest["config"]["skipped"]] == [".DS_Store"]
        tables.append(found.table.drop_columns(["predicted_at"]))
    assert tables[0].equals(tables[1])


@pytest.mark.slow
def test_the_number_of_actors_does_not_change_a_bit(run, loose, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "IMAGES_PER_PART", 4)
    tables = [
        predict(run, tmp_path / str(n), images=str(loose[0]), split="x", actors=n).table
        for n in (1, 2)
    ]
    drop = ["predicted_at"]
    assert tables[0].drop_columns(drop).equals(tables[1].drop_columns(drop))
    assert len(list((tmp_path / "1" / "tried" / "x").glob("part-*.parquet"))) == 3


@pytest.fixture
def copy(data, tmp_path) -> tuple[str, Path]:
    """The place of a data set of its own, and a part of its validation split."""
    path = tmp_path / "copy"
    shutil.copytree(data.path, path)
    return str(path), path / data.split("validation").files[0]


def damage(part: Path, how: str) -> None:
    content = part.read_bytes()
    part.unlink()
    if how == "cut":
        part.write_bytes(content[:-100])
    if how == "another":
        pq.write_table(pq.read_table(pa.BufferReader(content)).slice(1), part)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("absent", "validation/part-00000.parquet cannot be read"),
        ("cut", "validation/part-00000.parquet is damaged: it has .* bytes instead of"),
        ("another", "validation/part-00000.parquet is damaged: it has .* bytes instead of"),
    ],
)
def test_damaged_parts_are_refused_before_any_work(run, copy, how, said, tmp_path):
    path, part = copy
    damage(part, how)
    with pytest.raises(UserError, match=said) as caught:
        planning.plan(checkpoint_path=str(run), data=path, split="validation", output=str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("how", "said"), [("absent", "cannot be read"), ("cut", "is damaged")])
def test_parts_that_workers_cannot_read_are_one_line(run, copy, how, said, tmp_path, capfd):
    place, part = copy
    output = tmp_path / "predictions"
    plan = planning.plan(
        checkpoint_path=str(run), data=place, split="validation", output=str(output)
    )
    damage(part, how)
    with pytest.raises(UserError, match=f"{part} {said}") as caught:
        inference.predict(plan, num_actors=1, log=lambda line: None)
    assert "\n" not in str(caught.value)
    assert processes.printed_by_jobs(capfd.readouterr().err) == []
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_checkpoint_that_workers_do_not_see_is_one_line(data, run, tmp_path, capfd):
    shutil.copytree(run, tmp_path / "run")
    plan = planning.plan(
        checkpoint_path=str(tmp_path / "run"),
        data=data.path,
        split="validation",
        output=str(tmp_path / "predictions"),
    )
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match="not a checkpoint"):
        inference.predict(plan, num_actors=1, log=lambda line: None)
    assert processes.printed_by_jobs(capfd.readouterr().err) == []


@dataclass(frozen=True)
class FailingSource:
    """Loose images that the disk does not give."""

    def read(self, path: str, at: bytes) -> bytes:
        raise OSError(5, "Input/output error")


def test_what_the_disk_denies_a_worker_is_one_line(ray_cluster, run, loose, tmp_path, capfd):
    output = tmp_path / "predictions"
    plan = planning.plan(
        checkpoint_path=str(run), images=str(loose[0]), split="images", output=str(output)
    )
    this = sys.modules[__name__]  # which workers cannot import
    ray_cluster.cloudpickle.register_pickle_by_value(this)
    try:
        with pytest.raises(JobFailed, match=r"a worker failed: \[Errno 5\] Input/output error$"):
            inference.predict(
                replace(plan, source=FailingSource()), num_actors=1, log=lambda line: None
            )
    finally:
        ray_cluster.cloudpickle.unregister_pickle_by_value(this)
    assert processes.printed_by_jobs(capfd.readouterr().err) == []
    assert not list(tmp_path.iterdir())


def test_labels_that_the_checkpoint_does_not_know_are_refused(data, run, tmp_path):
    path = tmp_path / "data"
    shutil.copytree(data.path, path)
    labels = [*read_info(str(path)).labels, "wondering"]
    rewriting.hash_again(path / "dataset.json", labels=labels)
    with pytest.raises(UserError, match="does not know: wondering"):
        planning.plan(checkpoint_path=str(run), data=str(path), split="train", output=str(tmp_path))


def test_a_second_run_doubles_nothing_and_leaves_nothing_unfinished(data, run, tmp_path):
    output = tmp_path / "deep" / "predictions"
    first = predict(run, output, data=data.path)
    again = predict(run, output, data=data.path)
    assert first.table.num_rows == again.table.num_rows == data.split("validation").rows
    assert pq.read_table(output).num_rows == again.table.num_rows
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    folder = "deep/predictions/tried/validation"
    assert left == [f"{folder}/_manifest.json", f"{folder}/part-00000.parquet"]


def test_a_failure_leaves_the_older_predictions_alone(data, run, tmp_path, monkeypatch):
    output = tmp_path / "predictions"
    before = predict(run, output, data=data.path)

    def fails(*arguments, **settings):
        raise RuntimeError("disk full")

    monkeypatch.setattr(predictions, "write_manifest", fails)
    with pytest.raises(RuntimeError, match="disk full"):
        predict(run, output, data=data.path)
    assert predictions.read(str(output / "tried" / "validation")).table.equals(before.table)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions"]


def test_the_manifest_says_what_predicted_what(data, run, tmp_path):
    found = predict(run, tmp_path, data=data.path, run="renamed")
    assert found.run == "renamed"
    config = json.loads((tmp_path / "renamed" / "validation" / "_manifest.json").read_text())
    assert config["config"]["data_sha256"] == data.data_sha256
    assert config["config"]["training"]["model"]["width"] == 4
    assert config["rows"] == data.split("validation").rows


def test_the_batch_size_that_is_requested_is_used_and_recorded(data, run, tmp_path):
    plan = planning.plan(
        checkpoint_path=str(run), data=data.path, split="validation", output=str(tmp_path)
    )
    for requested, recorded in ((0, 256), (2, 2)):
        inference.predict(plan, batch_size=requested, local=True, log=lambda line: None)
        manifest = json.loads((tmp_path / "tried" / "validation" / "_manifest.json").read_text())
        assert manifest["config"]["batch_size"] == recorded


def test_memory_that_runs_out_is_one_line_and_leaves_nothing(data, run, tmp_path, monkeypatch):
    def fails(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(Forward, "probabilities", fails)
    output = tmp_path / "predictions"
    plan = planning.plan(
        checkpoint_path=str(run), data=data.path, split="validation", output=str(output)
    )
    with pytest.raises(UserError, match=r"--batch-size: 256 images .* out of memory") as caught:
        inference.predict(plan, local=True, log=lambda line: None)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"split": "holdout"}, "'holdout' is not one of train, validation, test"),
        ({"images": "absent", "data": None}, "does not exist"),
        ({"data": None}, "exactly one of the two"),
        ({"run": "a/b"}, "not a plain name"),
    ],
)
def test_wrong_input_is_refused_before_any_work(data, run, tmp_path, given, message):
    settings = {"data": data.path, "split": "validation", **given}
    with pytest.raises(UserError, match=message):
        planning.plan(checkpoint_path=str(run), output=str(tmp_path), **settings)


def test_more_actors_than_cpus_are_refused(data, run, tmp_path):
    with pytest.raises(UserError, match="--num-actors: 99 CPUs requested, the cluster has 2"):
        predict(run, tmp_path, data=data.path, actors=99)


@pytest.mark.parametrize(
    ("nodes", "maximum", "requested", "expected"),
    [
        ([], "CPU=8,GPU=4", 0, (1, 3)),  # three parts: a fourth actor would have nothing to do
        ([], "CPU=8,GPU=2", 0, (1, 2)),
        ([], "", 0, (1, 3)),
        ([1.0, 1.0], "CPU=8,GPU=4", 0, (2, 3)),
        ([4.0], "fixed", 0, (3, 3)),
        ([1.0], "fixed", 0, (1, 1)),
        ([], "CPU=8,GPU=4", 2, (2, 2)),
    ],
)
def test_the_pool_grows_with_the_cluster_within_bounds(
    monkeypatch, nodes, maximum, requested, expected
):
    """A cluster that scales from zero has no GPU when the actors are counted."""
    import ray

    gpus = [{"Alive": True, "Resources": {"CPU": 4.0, "GPU": gpu}} for gpu in nodes]
    head = {"Alive": True, "Resources": {"CPU": 8.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [head, *gpus])
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 8.0, "GPU": sum(nodes)})
    monkeypatch.setenv("RAY_ADDRESS", "ray.example:6379")
    monkeypatch.setenv(resources.MAXIMUM, maximum)
    plan = SimpleNamespace(tasks=[{}] * 3)
    assert inference._count_actors(plan, requested, True, lambda line: None) == expected


@pytest.mark.slow
def test_a_pool_that_may_grow_predicts_every_image_once(run, loose, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "IMAGES_PER_PART", 4)
    images = {"images": str(loose[0]), "split": "x"}
    fixed = predict(run, tmp_path / "fixed", **images, actors=2).table
    monkeypatch.setattr(inference, "_count_actors", lambda *arguments: (1, 2))
    grown = predict(run, tmp_path / "grown", **images, actors=0).table
    drop = ["predicted_at"]
    assert grown.drop_columns(drop).equals(fixed.drop_columns(drop))
