"""The predicting actor without Ray: its columns, its batches, and memory that runs out."""

from __future__ import annotations

import datetime
from dataclasses import replace
from types import SimpleNamespace

import fake_cuda
import numpy as np
import pyarrow as pa
import pytest
import small
import torch

from fer_ray.config.model import model_config
from fer_ray.data import predictions
from fer_ray.data.labels import probability_column
from fer_ray.errors import UserError
from fer_ray.inference import predictor as predicting
from fer_ray.inference.predictor import Predictor, default_batch_size
from fer_ray.models import checkpoint
from fer_ray.models.checkpoint import Checkpoint
from fer_ray.models.forward import Forward

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
CONSTANTS = {
    "run": "tried",
    "split": "validation",
    "predicted_at": datetime.datetime(2026, 11, 30, 12, 0, 0, 250, datetime.UTC),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Checkpoint:
    """A checkpoint of fresh weights for images of 12 pixels a side."""
    folder = tmp_path_factory.mktemp("checkpoints") / "checkpoint"
    return checkpoint.read(str(small.write_checkpoint(small.info(32), folder)))


def predictor(saved: Checkpoint, **settings) -> Predictor:
    usual = {"path": saved.path, "row": CONSTANTS, "source": None, "data": None}
    usual |= {"staging": "", "device": CPU, "batch_size": 4}
    return Predictor(**{**usual, **settings})


def rows_one_by_one(rows: list[dict], saved: Checkpoint, probabilities: np.ndarray) -> pa.Table:
    """What the columns have to be: every row written out as the contract describes it."""
    values, complete = iter(probabilities), []
    for row in rows:
        full = {**row, **CONSTANTS, "model": saved.model.name, "checkpoint": saved.sha256}
        if row["error"] is None:
            scores = next(values)
            best = int(scores.argmax())
            full |= {probability_column(name): s for name, s in zip(saved.labels, scores)}
            full |= {"predicted": saved.labels[best], "confidence": scores[best]}
            if row["label"] is not None:
                full["correct"] = row["label"] == saved.labels[best]
        complete.append(full)
    return pa.Table.from_pylist(complete, predictions.schema(saved.labels))


@pytest.mark.parametrize("failed", [set(), {0, 3, 9}, set(range(10))])
@pytest.mark.parametrize("labels", [(None,), (*small.LABELS, None)])
def test_columns_are_those_of_rows_built_one_by_one(saved, failed, labels):
    """Bit for bit: with equal probabilities, too, of which the first is the predicted one."""
    rows = [
        {
            "image_id": f"{number}.png",
            "label": labels[number % len(labels)],
            "pixel_sha256": None if number in failed else f"{number:064x}",
            "error": "cannot be decoded" if number in failed else None,
        }
        for number in range(10)
    ]
    probabilities = np.random.default_rng(0).dirichlet([1.0] * 3, 10 - len(failed))
    probabilities = probabilities.astype(np.float32)
    probabilities[:1] = 1 / 3
    part = predicting._Part(
        columns={
            name: pa.array([row[name] for row in rows], pa.string())
            for name in ("image_id", "pixel_sha256", "label", "error")
        },
        images=np.zeros((len(probabilities), 12, 12), np.uint8),
    )
    table = predictor(saved)._table(part, probabilities)
    expected = rows_one_by_one(rows, saved, probabilities)
    table.validate(full=True)
    assert table.schema.equals(expected.schema) and table.equals(expected)


def test_the_batch_size_follows_the_device_and_the_size_of_the_images(saved):
    def chosen(device: torch.device, size: int) -> int:
        return default_batch_size(replace(saved, model=model_config(input_size=size)), device)

    assert [chosen(CPU, size) for size in (0, 48, 260)] == [256] * 3
    assert [chosen(GPU, size) for size in (0, 48, 128)] == [1024] * 3
    assert 256 < chosen(GPU, 200) < 1024 and chosen(GPU, 512) == 256


def test_a_gpu_is_waited_for_once_a_part(saved, monkeypatch):
    """All batches are sent from pinned memory, and their probabilities come back together."""
    batches: list[int] = []
    probabilities = Forward.probabilities

    def recorded(forward: Forward, model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        assert images.is_cuda
        batches.append(len(images))
        return probabilities(forward, model, images)

    monkeypatch.setattr(Forward, "probabilities", recorded)
    with fake_cuda.fake_cuda() as recorder:
        on_gpu = predictor(saved, device=GPU)
        on_gpu._probabilities(np.zeros((4, 12, 12), np.uint8))  # loads the network
        recorder.take()
        batches.clear()
        shape = on_gpu._probabilities(np.zeros((11, 12, 12), np.uint8)).shape
        counts = recorder.take()
    assert shape == (11, len(small.LABELS)) and batches == [4, 4, 3]
    assert not counts.blocking_copies and counts.copies == 3
    assert [wait.split(" at ")[0] for wait in counts.waits] == ["copy to the CPU"]


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …\nmore"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["torch", "CUDA"])
def test_memory_that_runs_out_is_one_line_that_names_the_flag(saved, monkeypatch, error):
    def fails(*arguments):
        raise error

    monkeypatch.setattr(Forward, "probabilities", fails)
    images = np.zeros((4, 12, 12), np.uint8)
    with fake_cuda.fake_cuda(), pytest.raises(UserError, match=r"^--batch-size: 1,024 ") as caught:
        predictor(saved, device=GPU, batch_size=1024)._probabilities(images)
    assert "out of memory" in str(caught.value) and "give fewer" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_errors_of_a_gpu_stay_what_they_are(saved, monkeypatch):
    forward = SimpleNamespace(probabilities=lambda model, images: 1 / 0)
    monkeypatch.setattr(Checkpoint, "forward", lambda self, device: forward)
    with pytest.raises(ZeroDivisionError):
        predictor(saved)._probabilities(np.zeros((4, 12, 12), np.uint8))
