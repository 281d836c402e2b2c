"""One trial of a sweep: how it ends, what it holds, what it keeps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import small
import torch
from processes import wait_for
from sweeping import config

from fer_ray import storage
from fer_ray.data.run_folder import RunFolder
from fer_ray.errors import JobFailed
from fer_ray.models import checkpoint
from fer_ray.runtime import process
from fer_ray.sweeps import store, trial
from fer_ray.training import loop, ray_trainer
from fer_ray.training.process_group import ProcessGroup


@pytest.fixture(scope="module")
def data(drawn_faces):
    return drawn_faces


OUT_OF_MEMORY = [
    MemoryError("no more"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_trial_out_of_memory_is_recorded_with_its_reason(
    data, tmp_path, monkeypatch, error, num_workers
):
    """Of several workers the one that runs out leaves the reason; the trial is not repeated."""
    base = config(data, scaling={"num_workers": num_workers})
    store.create(str(tmp_path), store.Trial(number=0, arm="one", options={}))

    def ends(*arguments: object, **settings: object) -> None:
        if num_workers == 1:
            raise error
        reason = process.out_of_memory(error)
        RunFolder(store.folder_of(str(tmp_path), 0)).write_failure(reason)
        raise JobFailed("its workers failed: the actor died")

    monkeypatch.setattr(trial, "_alone", ends)
    monkeypatch.setattr(ray_trainer, "run_trainer", ends)
    # which is of a trial that Ray Tune runs
    monkeypatch.setattr("ray.tune.integration.ray_train.TuneReportCallback", lambda: None)
    settings = {"sweep": str(tmp_path), "config": base.to_dict(), "images": {}}
    trial.run({"number": 0, "until": 2}, settings=settings)
    ended = store.read_trial(str(tmp_path), 0)
    assert (ended.status, ended.reason) == ("failed", f"out of memory: {error}")


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    for error in (RuntimeError("shape mismatch"), ValueError("cannot allocate memory"), OSError()):
        assert process.out_of_memory(error) is None


def test_what_a_killed_trials_workers_hold_is_given_back(ray_cluster, tmp_path):
    """Whatever Ray Train's own helper does: it fails where two clusters run on a machine."""
    from ray.util import placement_group, placement_group_table

    group = placement_group([{"CPU": 1}])
    assert group.wait(60)
    RunFolder(store.folder_of(str(tmp_path), 7)).write_placement_group(group.id.hex())
    for _ in range(2):  # it may be gone already
        trial.free_workers(str(tmp_path), 7)
    wait_for(lambda: placement_group_table(group)["state"] == "REMOVED", 30)
    trial.free_workers(str(tmp_path), 8)  # it had no workers yet


def test_a_checkpoint_is_kept_whole_and_the_one_before_it_goes(tmp_path):
    folder = str(tmp_path / "trial")
    for path in (folder, f"file://{folder}-uri"):
        for epoch in (1, 2):
            history = [
                {"epoch": number, "learning_rate": 0.1, **dict.fromkeys(store.METRICS, 0.5)}
                for number in range(1, epoch + 1)
            ]

            def write(unfinished: Path) -> None:
                (unfinished / "model.safetensors").write_bytes(b"weights")
                (unfinished / checkpoint.INDEX).write_text("{}")

            store.save(path, epoch, history, write)
        names = storage.list_names(path)
        assert names == ["checkpoint_000002", "history.parquet"]
        assert storage.list_names(storage.join(path, "checkpoint_000002")) == [
            *("checkpoint.json", "model.safetensors")
        ]


def test_a_damaged_checkpoint_of_a_trial_is_passed_over(tmp_path):
    """It was taken for the last one, and the trial failed."""
    settings, described, images = small.config(), small.info(24), small.split(24)
    files = RunFolder(str(tmp_path))
    loop.train(
        settings,
        described,
        small.feed(settings, images, images, described=described),
        group=ProcessGroup(),
        run="tried",
        report=lambda history, save: files.save_checkpoint(len(history), save),
    )
    first, second = files.checkpoint_paths()
    Path(second, "model.safetensors").write_bytes(b"cut off")
    resumed = store.resume(str(tmp_path))
    assert resumed.path == first and resumed.epoch == 1
    assert files.read_history()["epoch"].to_pylist() == [1]


def test_what_a_crash_left_between_a_checkpoint_and_its_row_is_made_good(tmp_path, monkeypatch):
    """Where nothing is left to train, nobody else would write the row."""
    row = {**dict.fromkeys(store.METRICS, 0.5), "learning_rate": 0.1, "epoch": 1}
    folder = store.folder_of(str(tmp_path), 3)
    store.create(str(tmp_path), store.Trial(number=3, arm=None, options={}))
    latest = SimpleNamespace(epoch=1, history=[row])
    monkeypatch.setattr(checkpoint, "latest", lambda path: latest)
    assert store.resume(folder) is latest
    assert [one["epoch"] for one in store.read_trial(str(tmp_path), 3).history] == [1]
