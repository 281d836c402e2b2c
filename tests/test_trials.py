"""One trial of a sweep: how it ends, what it holds, what it keeps."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import small
import torch
from processes import wait_for
from sweeping import config

from fer_ray import storage
from fer_ray.config.model import model_config
from fer_ray.data import history
from fer_ray.errors import JobFailed
from fer_ray.models import checkpoint, run_checkpoints
from fer_ray.runtime import environment, process
from fer_ray.sweeps import store, trial
from fer_ray.sweeps.losses import GpuFailed
from fer_ray.sweeps.store import SweepFolder, Trial, TrialFolder
from fer_ray.training import ray_trainer
from fer_ray.transforms.normalization import Normalizer


@pytest.fixture(scope="module")
def data(drawn_faces):
    return drawn_faces


OUT_OF_MEMORY = [
    MemoryError("no more"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_trial_out_of_memory_is_recorded_with_its_reason(
    data, tmp_path, monkeypatch, error, num_workers
):
    """Of several workers the one that runs out leaves the reason; the trial is not repeated."""
    base = config(data, scaling={"num_workers": num_workers})
    folder = TrialFolder(str(tmp_path), 0)
    SweepFolder(str(tmp_path)).create(Trial(number=0, arm="one", options={}))

    def ends(*arguments: object, **settings: object) -> None:
        if num_workers == 1:
            raise error
        reason = process.out_of_memory(error)
        folder.files.write_failure(reason)
        raise JobFailed("its workers failed: the actor died")

    monkeypatch.setattr(trial, "_train_here", ends)
    monkeypatch.setattr(ray_trainer, "run_trainer", ends)
    # needs a trial that Ray Tune runs
    monkeypatch.setattr("ray.tune.integration.ray_train.TuneReportCallback", lambda: None)
    settings = {"sweep": str(tmp_path), "config": base.to_dict(), "images": {}}
    trial.run({"number": 0, "until": 2}, settings=settings)
    ended = folder.read()
    assert (ended.status, ended.reason) == ("failed", f"out of memory: {error}")


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_gpu_that_fails_is_a_loss_and_not_the_trials_failure(
    data, ray_cluster, tmp_path, monkeypatch, num_workers
):
    """The process ends with it, and an error while it frees the GPU does not hide the reason."""
    base = config(data, scaling={"num_workers": num_workers})
    folder = TrialFolder(str(tmp_path), 0)
    SweepFolder(str(tmp_path)).create(Trial(number=0, arm="one", options={}))
    fault = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    avoided: list[object] = []

    def raises(*arguments: object) -> None:
        raise fault

    def ends(*arguments: object, avoid: object, **settings: object) -> None:
        avoided.append(avoid)
        folder.files.write_failure(*process.gpu_failure_here(fault))
        raise JobFailed("its workers failed: the actor died")

    monkeypatch.setattr(trial, "_train_here", raises)
    monkeypatch.setattr(ray_trainer, "run_trainer", ends)
    monkeypatch.setattr("ray.tune.integration.ray_train.TuneReportCallback", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", raises)
    settings = {"sweep": str(tmp_path), "config": base.to_dict(), "images": {}}
    with pytest.raises(GpuFailed, match=r"the GPU of node .* failed: .*illegal memory") as caught:
        trial.run({"number": 0, "until": 2, "avoid": ["a"]}, settings=settings)
    assert caught.value.node == ray_cluster.nodes()[0]["NodeID"]
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.reason, copy.node) == (caught.value.reason, caught.value.node)
    assert not folder.read().is_over
    assert avoided == [["a"]] * (num_workers - 1)


@pytest.mark.parametrize(("gpus_per_trial", "limits"), [(0.25, [0.25]), (1.0, []), (0.0, [])])
def test_trials_that_share_a_gpu_are_kept_to_their_fraction_of_its_memory(
    data, ray_cluster, tmp_path, monkeypatch, gpus_per_trial, limits
):
    class Stop(Exception):
        pass

    def stops(*arguments: object, **settings: object) -> None:
        raise Stop

    set_limits: list[float] = []
    monkeypatch.setattr(process, "limit_gpu_memory", set_limits.append)
    monkeypatch.setattr(trial, "MemoryFeed", stops)
    images = {name: ray_cluster.put(([], [])) for name in ("train", "validation")}
    monkeypatch.setattr(trial.Images, "known", lambda *parts: parts)
    settings = {"images": images, "info": None, "gpus_per_trial": gpus_per_trial}
    with pytest.raises(Stop):
        trial._train_here(TrialFolder(str(tmp_path), 0), config(data), settings, 1)
    assert set_limits == limits


def test_what_a_killed_trials_workers_hold_is_given_back(ray_cluster, tmp_path):
    """Whatever Ray Train's own helper does: it fails where two clusters run on a machine."""
    from ray.util import placement_group, placement_group_table

    group = placement_group([{"CPU": 1}])
    assert group.wait(60)
    folder = TrialFolder(str(tmp_path), 7)
    folder.files.write_placement_group(group.id.hex())
    for _ in range(2):  # it may be gone already
        trial.free_workers(folder)
    wait_for(lambda: placement_group_table(group)["state"] == "REMOVED", 30)
    trial.free_workers(TrialFolder(str(tmp_path), 8))  # it had no workers yet


def row(epoch: int, score: float = 0.5) -> dict:
    """An epoch of a history."""
    metrics = {**dict.fromkeys(store.METRICS, 0.5), "validation_accuracy": score}
    return {"epoch": epoch, "learning_rate": 0.1, **metrics}


def save(folder: TrialFolder, *scores: float) -> None:
    """Saves a trial after its last epoch, with a checkpoint of a small network."""
    history = [row(epoch, score) for epoch, score in enumerate(scores, 1)]
    network = torch.nn.Linear(2, 2)
    values = {
        "run": folder.run,
        "environment": environment.describe(torch.device("cpu")),
        "model": model_config(name="custom_cnn"),
        "labels": ("happy", "sad"),
        "image_size": 12,
        "normalizer": Normalizer(normalization="none", mean=0.0, std=1.0),
        "flip_at_test": False,
        "precision": "float32",
        "compiled": False,
        "epoch": len(history),
        "history": history,
        "config": {},
    }
    optimizer = torch.optim.SGD(network.parameters())
    folder.save(
        history,
        checkpoint.snapshot(values=values, model=network, average=network, optimizer=optimizer),
    )


def new_trial(tmp_path: Path) -> TrialFolder:
    SweepFolder(str(tmp_path)).create(Trial(number=3, arm=None, options={}))
    return TrialFolder(str(tmp_path), 3)


def test_a_checkpoint_is_kept_whole_and_the_one_before_it_goes(tmp_path):
    for sweep in (str(tmp_path / "sweep"), f"file://{tmp_path}/uri"):
        folder = TrialFolder(sweep, 3)
        save(folder, 0.5)
        save(folder, 0.5, 0.6)
        assert storage.list_names(folder.path) == ["checkpoint_000002", "history.parquet"]
        assert storage.list_names(storage.join(folder.path, "checkpoint_000002")) == [
            *("checkpoint.json", "model.safetensors", "training.safetensors")
        ]
        assert run_checkpoints.latest(folder.path).epoch == 2


def test_a_crash_between_a_checkpoint_and_its_row_loses_no_row(tmp_path):
    """Where nothing is left to train, nobody else would write the row."""
    folder, lines = new_trial(tmp_path), []
    save(folder, 0.5, 0.6)
    history.write_history(f"{folder.path}/history.parquet", [row(1)])
    assert folder.resume(lines.append).epoch == 2
    assert [epoch["epoch"] for epoch in folder.read().history] == [1, 2] and not lines


def damage(folder: TrialFolder, epoch: int) -> None:
    path = Path(folder.path) / f"checkpoint_{epoch:06d}" / "training.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def test_a_damaged_checkpoint_falls_back_to_the_one_before_it(tmp_path):
    folder, lines = new_trial(tmp_path), []
    save(folder, 0.5)
    kept = tmp_path / "kept"
    shutil.copytree(f"{folder.path}/checkpoint_000001", kept)
    save(folder, 0.5, 0.6)
    shutil.move(kept, f"{folder.path}/checkpoint_000001")  # as if it were not removed yet
    damage(folder, 2)
    assert folder.resume(lines.append).epoch == 1
    assert [epoch["epoch"] for epoch in folder.read().history] == [1]
    assert len(lines) == 1 and lines[0].endswith("training again from epoch 2")


def test_without_an_undamaged_checkpoint_a_trial_trains_from_the_start(tmp_path):
    folder, lines = new_trial(tmp_path), []
    assert folder.resume(lines.append) is None and not lines, "it has not begun"
    save(folder, 0.5, 0.6)
    damage(folder, 2)
    assert folder.resume(lines.append) is None
    assert not folder.read().history
    assert lines == [
        f"{tmp_path.name}-00003: no undamaged checkpoint after epoch 2: training again from epoch 1"
    ]
    save(folder, 0.5)
    assert storage.list_names(folder.path)[0] == "checkpoint_000001"
    assert run_checkpoints.latest(folder.path).epoch == 1


@pytest.mark.parametrize(
    ("scores", "status", "reason"),
    [
        ((0.5, 0.6, 0.4), "unfinished", None),
        ((0.6, 0.5, 0.4), "finished", "no better score for 2 epochs (--patience)"),
    ],
)
def test_patience_that_ends_at_a_rung_finishes_the_trial(
    tmp_path, monkeypatch, scores, status, reason
):
    """It was paused there, and stopped when it was not promoted."""
    folder = new_trial(tmp_path)
    base = small.config(schedule={"epochs": 9, "patience": 2})
    monkeypatch.setattr(trial, "_train_here", lambda *arguments: save(folder, *scores))
    settings = {"sweep": str(tmp_path), "config": base.to_dict()}
    trial.run({"number": 3, "until": 3}, settings=settings)
    ended = folder.read()
    assert (ended.status, ended.reason) == (status, reason)


def test_a_time_limit_that_ends_at_a_rung_finishes_the_trial(tmp_path, monkeypatch):
    folder = new_trial(tmp_path)
    base = small.config(schedule={"epochs": 9, "time_limit_s": 1.25})  # an epoch takes 0.5 s
    monkeypatch.setattr(trial, "_train_here", lambda *arguments: save(folder, 0.5, 0.6, 0.7))
    settings = {"sweep": str(tmp_path), "config": base.to_dict()}
    trial.run({"number": 3, "until": 3}, settings=settings)
    assert folder.read().reason == "time limit reached (--time-limit-s 1.25)"
