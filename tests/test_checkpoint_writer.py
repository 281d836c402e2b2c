"""Checkpoints are written beside the training: nothing is lost, and nothing comes too early."""

import threading
from pathlib import Path

import pytest
import small
import torch

from fer_ray.data.run_folder import RunFolder
from fer_ray.models import checkpoint, run_checkpoints
from fer_ray.training.checkpoint_writer import CheckpointWriter
from fer_ray.training.loop import Trainer
from fer_ray.training.process_group import ProcessGroup


class SlowFolder(RunFolder):
    """A run's folder on a storage that stores once it is allowed to."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.may_store, self.calls = threading.Event(), 0

    def save_checkpoint(self, epoch, write):
        self.calls += 1
        assert self.may_store.wait(30)
        return super().save_checkpoint(epoch, write)


class FullFolder(RunFolder):
    """A run's folder on a disk that is full."""

    def save_checkpoint(self, epoch, write):
        raise OSError(28, "No space left on device")


def trainer(epochs: int = 3) -> Trainer:
    config = small.config(schedule={"epochs": epochs})
    described, images = small.info(24), small.split(24)
    return Trainer(
        config,
        described,
        small.feed(config, images, images, described=described),
        group=ProcessGroup(),
        labels={"run": "tried", "environment": {}},
        resume=None,
    )


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path):
    folder, built = SlowFolder(str(tmp_path)), trainer()
    states = []

    def report(history, snapshot):
        states.append({name: value.clone() for name, value in built.model.state_dict().items()})
        if len(history) == 2:  # the second epoch is over, and nothing has been stored yet
            assert folder.calls == 1 and not folder.checkpoint_paths()
            folder.may_store.set()
        writer.write(history, snapshot())

    with CheckpointWriter(folder, waits=False) as writer:
        built.fit(report)
    assert folder.calls == 3 and folder.read_history().num_rows == 3
    last = run_checkpoints.latest(str(tmp_path))
    assert last is not None and last.epoch == 3
    tensors = last.load_tensors(checkpoint.TRAINING)
    for name, value in states[-1].items():
        assert torch.equal(tensors[f"model.{name}"], value)


def test_a_snapshot_is_of_its_epoch_whenever_it_is_written(tmp_path: Path):
    built, snapshots, states = trainer(2), [], []

    def report(history, snapshot):
        snapshots.append(snapshot())
        states.append({name: value.clone() for name, value in built.model.state_dict().items()})

    built.fit(report)
    snapshots[0](tmp_path)
    first = checkpoint.read(str(tmp_path))
    assert first.epoch == len(first.history) == 1
    tensors = first.load_tensors(checkpoint.TRAINING)
    assert all(torch.equal(tensors[f"model.{name}"], states[0][name]) for name in states[0])


@pytest.mark.parametrize("waits", [True, False])
def test_an_error_of_writing_ends_the_training(tmp_path: Path, waits):
    built, epochs = trainer(), []

    def report(history, snapshot):
        epochs.append(len(history))
        writer.write(history, snapshot())

    with (
        pytest.raises(OSError, match="No space left"),
        CheckpointWriter(FullFolder(str(tmp_path)), waits=waits) as writer,
    ):
        built.fit(report)
    assert epochs == ([1] if waits else [1, 2])


def test_an_error_of_the_last_checkpoint_is_not_lost(tmp_path: Path):
    built = trainer(1)
    with (
        pytest.raises(OSError, match="No space left"),
        CheckpointWriter(FullFolder(str(tmp_path)), waits=False) as writer,
    ):
        built.fit(lambda history, snapshot: writer.write(history, snapshot()))
    with (
        pytest.raises(ZeroDivisionError),  # the error of training itself, which came first
        CheckpointWriter(FullFolder(str(tmp_path)), waits=False) as writer,
    ):
        built.history = [{checkpoint.SCORE: 0.5, "epoch": 1}]
        writer.write(built.history, built.snapshot())
        raise ZeroDivisionError
