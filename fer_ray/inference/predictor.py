"""The predicting actor: reads the images of a part, predicts, and writes the rows as Parquet.

Rows are built column by column: a Python object a row would take longer than a small network.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import nn

from fer_ray.data import dataset, decoding, parquet, predictions, sources
from fer_ray.data.dataset import DatasetInfo
from fer_ray.data.labels import probability_column
from fer_ray.errors import UserError
from fer_ray.models import checkpoint
from fer_ray.models.checkpoint import Checkpoint
from fer_ray.models.forward import Forward
from fer_ray.runtime.process import out_of_memory
from fer_ray.transforms.tensors import move

COUNTS = pa.schema([("rows", pa.int64()), ("errors", pa.int64())])
"""What an actor returns for each part: its rows, and how many of them have an error."""

_CPU_BATCH_SIZE = 256
_GPU_BATCH_SIZE = 1024
"""Images in a forward pass on a GPU: a small network takes longer to start than to compute fewer
of them."""
_GPU_BATCH_PIXELS = 1024 * 128**2
"""Largest number of pixels in a forward pass on a GPU: `custom_cnn` with its setting `full` keeps
at most some 4 x 64 float32 numbers a pixel, 16 GiB for as many pixels."""

_REPEATED = ["label", "predicted", "error", "run", "split", "model", "checkpoint", "predicted_at"]
"""Columns whose values repeat. To look for repetitions in the others, which is what Parquet does by
default, takes a third of the time of writing and makes the file larger."""


def default_batch_size(checkpoint: Checkpoint, device: torch.device) -> int:
    """Number of images in a forward pass where the user sets none.

    Args:
        checkpoint: the network that predicts.
        device: where it predicts.

    Returns:
        256 on CPUs. On GPUs 1,024 of up to 128 pixels a side; of larger ones fewer, but 256.
    """
    if device.type == "cpu":
        return _CPU_BATCH_SIZE
    side = checkpoint.model.input_size or checkpoint.image_size
    return max(min(_GPU_BATCH_PIXELS // side**2, _GPU_BATCH_SIZE), _CPU_BATCH_SIZE)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """What is known about the images of a part before they are predicted."""

    columns: dict[str, pa.Array | pa.ChunkedArray]
    """N strings each: ``image_id``, ``pixel_sha256``, ``label`` and ``error``; null: there is
    none."""
    images: np.ndarray
    """(M, S, S) uint8: the images of the rows without an error, in their order."""


class Predictor:
    """Predicts and writes parts, in an actor; loads the network with the first part.

    Args:
        path: the checkpoint's folder.
        row: what is the same in all rows: ``run``, ``split`` and ``predicted_at``.
        source: where loose images are; None for a prepared data set.
        data: the prepared data set; None for loose images.
        staging: the folder to write to.
        device: where the network computes.
        batch_size: number of images in a forward pass.
    """

    def __init__(
        self,
        *,
        path: str,
        row: dict[str, Any],
        source: sources.FileSource | None,
        data: DatasetInfo | None,
        staging: str,
        device: torch.device,
        batch_size: int,
    ) -> None:
        self._path, self._device, self._batch_size = path, device, batch_size
        self._row, self._source, self._data, self._staging = row, source, data, staging

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        return checkpoint.read(self._path)

    @cached_property
    def _model(self) -> nn.Module:
        torch.set_num_threads(1)  # one actor per CPU: more threads would only compete
        return self._checkpoint.load_model(self._device)

    @cached_property
    def _forward(self) -> Forward:
        return self._checkpoint.forward(self._device)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Predicts the part that one of `Plan.tasks` describes, and writes it.

        Raises:
            UserError: where the input is damaged, the network gives no probabilities, or memory
                ran out.
        """
        (task,) = batch.to_pylist()
        size = self._checkpoint.image_size
        if self._data is not None:
            part = _read_prepared(self._data, self._row["split"], task["file"], size)
        else:
            assert self._source is not None
            part = _read_loose(self._source, task, size)
        table = self._table(part, self._probabilities(part.images))
        parquet.write_table(table, self._staging, task["part"], use_dictionary=_REPEATED)
        errors = len(table) - len(part.images)
        return pa.table([[len(table)], [errors]], schema=COUNTS)

    def _probabilities(self, images: np.ndarray) -> np.ndarray:
        """(N, classes) float32 of (N, S, S) uint8."""
        try:
            probabilities = self._predict(images)
        except Exception as error:
            if reason := out_of_memory(error):
                raise UserError(
                    f"--batch-size: {self._batch_size:,} images at a time are too many for this "
                    f"{self._device.type}: {reason}; give fewer"
                ) from error
            raise
        if not ((probabilities >= 0) & (probabilities <= predictions.MAX_PROBABILITY)).all():
            raise UserError(
                f"{self._path}: the network gives probabilities that are no numbers between 0 and "
                "1: this checkpoint cannot predict"
            )
        return probabilities

    def _predict(self, images: np.ndarray) -> np.ndarray:
        forward, size = self._forward, self._batch_size
        probabilities = [torch.zeros(0, len(self._checkpoint.labels), device=self._device)]
        for start in range(0, len(images), size):
            batch = move(torch.from_numpy(images[start : start + size]), self._device)
            probabilities.append(forward.probabilities(self._model, batch))
        # joined on the device: the host waits for a GPU once a part
        return torch.cat(probabilities).cpu().numpy()

    def _table(self, part: _Part, probabilities: np.ndarray) -> pa.Table:
        """The part's rows as the contract has them; `probabilities` skip rows with an error."""
        labels, columns = self._checkpoint.labels, dict(part.columns)
        count, has_image = len(columns["error"]), columns["error"].is_null().to_numpy(False)
        # the position of each row among those with an image; null for the others
        positions = pa.array(np.cumsum(has_image) - 1, pa.int64(), mask=~has_image)
        best = probabilities.argmax(axis=1)
        for index, label in enumerate(labels):
            columns[probability_column(label)] = pa.array(probabilities[:, index]).take(positions)
        columns["confidence"] = pa.array(probabilities.max(axis=1)).take(positions)
        columns["predicted"] = pa.array(labels, pa.string()).take(pa.array(best).take(positions))
        columns["correct"] = pc.equal(columns["label"], columns["predicted"])
        model, sha256 = self._checkpoint.model.name, self._checkpoint.sha256
        constants = {**self._row, "model": model, "checkpoint": sha256}
        schema = predictions.schema(labels)
        for name, value in constants.items():
            columns[name] = pa.repeat(pa.scalar(value, schema.field(name).type), count)
        return pa.table([columns[name] for name in schema.names], schema=schema)


def _read_prepared(info: DatasetInfo, split: str, file: str, size: int) -> _Part:
    """A part of a prepared split, which is checked; its images are scaled to `size` pixels."""
    table = dataset.read_part(info, split, file)
    columns = {name: table[name] for name in ("image_id", "pixel_sha256", "label")}
    images = dataset.stack(table["image"], info.image_size)
    if info.image_size != size and len(images):
        images = np.stack([decoding.fit(image, size) for image in images])
    errors = pa.nulls(len(table), pa.string())
    return _Part(columns={**columns, "error": errors}, images=images.reshape(-1, size, size))


def _read_loose(source: sources.FileSource, task: dict[str, Any], size: int) -> _Part:
    """Loose images, scaled to `size` pixels; a row without one has the reason as its error."""
    hashes: list[str | None] = []
    errors: list[str | None] = []
    images = []
    for path, at, reason in zip(task["path"], task["at"], task["reason"]):
        pixel_sha256 = failure = None
        try:
            if reason:
                raise sources.ReadError(reason)
            grey = decoding.decode(source.read(path, at))
            pixel_sha256 = decoding.pixel_sha256(grey)
            images.append(decoding.fit(grey, size))
        except (sources.ReadError, decoding.DecodeError) as error:
            failure = str(error)
        hashes.append(pixel_sha256)
        errors.append(failure)
    texts = {"image_id": task["path"], "pixel_sha256": hashes, "error": errors}
    columns = {name: pa.array(values, pa.string()) for name, values in texts.items()}
    columns["label"] = pa.nulls(len(errors), pa.string())
    stacked = np.stack(images) if images else np.zeros((0, size, size), np.uint8)
    return _Part(columns=columns, images=stacked)
