"""Batches for the training loop from Ray Data, for splits that do not fit into memory.

Each worker reads its shard of every epoch again: row groups in an order that (seed, epoch)
decide, augmented in Ray Data's tasks where the engine is `albumentations`, then a shuffle buffer.
Memory is bounded by the buffer and by a few blocks that are read ahead.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from fer_ray import storage
from fer_ray.config.schema import TrainConfig
from fer_ray.data.dataset import DatasetInfo, label_indices, stack
from fer_ray.data.row_groups import RowGroupSlice, take_rows
from fer_ray.runtime.data_tasks import quiet_ray_data
from fer_ray.training.feed import (
    EVALUATION_BATCH_SIZE,
    Augmentation,
    Batch,
    albumentations_augmenter,
    as_tensor,
    own_part,
)
from fer_ray.training.process_group import ProcessGroup
from fer_ray.transforms.albumentations_engine import AlbumentationsAugmenter
from fer_ray.transforms.mixing import draw_mix

_BATCHES_AHEAD = 4
"""Batches that are prepared before they are needed."""

_BYTES_AHEAD = 128 * 2**20
"""Bytes of the object store that a worker's blocks may take, unless a few blocks need more."""

_LEAST_BLOCKS_AHEAD = 8
_WARN_AFTER_S = 60.0


class StreamFeed:
    """One worker's stream of both splits."""

    def __init__(
        self,
        config: TrainConfig,
        info: DatasetInfo,
        slices: dict[str, list[RowGroupSlice]],
        *,
        group: ProcessGroup,
        spare_cpus: float,
    ) -> None:
        """Keeps what to read.

        Args:
            config: decides the order, the augmentation and the size of the buffer.
            info: the prepared data set; all images of both splits are labelled.
            slices: `row_group_slices` of ``train`` and ``validation``.
            group: the workers.
            spare_cpus: CPUs of the cluster that no worker reserves, for each worker. If there is
                less than one, reading reserves none: a task that needs a CPU which the workers
                hold would never start.
        """
        self._config, self._info, self._group = config, info, group
        self._augmentation = Augmentation(config, info, group.device)
        self._input_size = config.model.input_size or info.image_size
        self._tasks = max(1, int(spare_cpus))
        self._cpus_a_task = 1 if spare_cpus >= 1 else 0
        self._slices = slices
        self.steps_per_epoch = info.split("train").rows // config.schedule.global_batch_size
        classes = info.split("train").classes
        self.class_counts = np.array([classes.get(label, 0) for label in info.labels])

    def train(self, epoch: int) -> Iterator[Batch]:
        schedule, group = self._config.schedule, self._group
        part = own_part(self._config, group)
        random = np.random.default_rng((schedule.seed, epoch))
        order = random.permutation(len(self._slices["train"]))
        steps = self.steps_per_epoch
        own = take_rows(
            [self._slices["train"][i] for i in order], steps * part.start, steps * part.stop
        )
        size = part.stop - part.start
        assert size > 0, "a configuration has at least one image a worker and step"
        batches = self._read(
            own,
            epoch=epoch,
            batch_size=size,
            shuffle=int(random.integers(2**31)) + group.rank,
        )
        for step, rows in enumerate(batches):
            yield self._batch(rows, epoch, step)

    def _batch(self, rows: dict[str, Any], epoch: int, step: int) -> Batch:
        images, targets, samples = _unpack(rows, self._info.image_size)
        device, rank, seed = self._group.device, self._group.rank, self._config.schedule.seed
        # partners come from this worker's shard: the other images are on other workers
        plan = draw_mix(
            self._config.transforms, (seed, epoch, step, rank), len(images), self._input_size
        )
        return Batch(
            images=self._augmentation.finish(_pinned(images, device), samples, epoch),
            targets=_pinned(targets, device).to(device, non_blocking=True),
            mix=plan.of(slice(0, len(images)), device) if plan else None,
        )

    def validation(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for images, targets in self._whole("validation"):
            yield images, targets.to(self._group.device)

    def histogram(self, count: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
        total = torch.zeros(256, dtype=torch.int64)
        for images, _ in self._whole("train"):
            total += count(images).cpu()
        return total.numpy()

    def _whole(self, split: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This worker's shard of a split, in order and unchanged."""
        part = self._group.shard(self._info.split(split).rows)
        own = take_rows(self._slices[split], part.start, part.stop)
        for rows in self._read(own, batch_size=EVALUATION_BATCH_SIZE) if own else ():
            images, targets, _ = _unpack(rows, self._info.image_size)
            yield images.to(self._group.device), targets

    def _read(
        self,
        own: list[RowGroupSlice],
        *,
        batch_size: int,
        epoch: int | None = None,
        shuffle: int | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Reads and augments with Ray Data; yields batches of columns as numpy arrays."""
        import ray

        quiet_ray_data()
        rows = [asdict(slice_) for slice_ in own]
        read = _Reader(self._info, self._config, epoch)
        stream = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            read,
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=self._cpus_a_task,
            compute=ray.data.TaskPoolStrategy(size=self._tasks),
        )
        options = stream.context.execution_options
        options.preserve_order = True  # otherwise the same seed would not give the same run
        block = max(slice_.end - slice_.begin for slice_ in own) * self._info.image_size**2
        options.resource_limits = options.resource_limits.copy(
            object_store_memory=max(_BYTES_AHEAD, _LEAST_BLOCKS_AHEAD * block)
        )
        wanted: dict[str, Any] = {"batch_size": batch_size, "batch_format": "numpy"}
        if shuffle is not None:
            wanted["local_shuffle_buffer_size"] = self._config.schedule.shuffle_buffer
            wanted["local_shuffle_seed"] = shuffle
        batches: Any = stream.iter_batches(prefetch_batches=_BATCHES_AHEAD, **wanted)
        waiting = threading.Timer(_WARN_AFTER_S, _warn_of_waiting, (self._group.rank,))
        waiting.daemon = True
        waiting.start()
        try:
            for batch in batches:
                waiting.cancel()
                yield batch
        finally:
            waiting.cancel()


def _warn_of_waiting(rank: int) -> None:
    print(
        f"worker {rank} has waited {_WARN_AFTER_S:.0f} s for its first images: other jobs may hold "
        "the CPU that reading needs",
        flush=True,
    )


class _Reader:
    """Reads one row-group slice in a task of Ray Data, and augments it with albumentations."""

    def __init__(self, info: DatasetInfo, config: TrainConfig, epoch: int | None) -> None:
        self._info, self._config, self._epoch = info, config, epoch

    def __call__(self, batch: pa.Table) -> pa.Table:
        (row,) = batch.to_pylist()
        slice_, size = RowGroupSlice(**row), self._info.image_size
        fs, path = storage.filesystem(slice_.file)
        with pq.ParquetFile(path, filesystem=fs) as file:
            table = file.read_row_group(slice_.row_group, columns=["image", "label"])
        table = table.slice(slice_.begin, slice_.end - slice_.begin)
        images = stack(table["image"], size)
        samples = np.arange(slice_.begin, slice_.end) + slice_.first
        if self._epoch is not None and self._config.transforms.engine == "albumentations":
            augmenter = _augmenter(self._config, self._info.pixel_mean, size)
            images = augmenter(images, samples, self._epoch)
        flat = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(size * size), len(images), [None, pa.py_buffer(images)]
        )
        targets = label_indices(table["label"], self._info.labels)
        return pa.table({"image": flat, "target": targets, "sample": samples})


@functools.lru_cache(maxsize=2)
def _augmenter(config: TrainConfig, mean: float, size: int) -> AlbumentationsAugmenter:
    """One pipeline for each process: building it takes longer than using it."""
    return albumentations_augmenter(config, mean, size)


def _unpack(rows: dict[str, Any], size: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    pixels = np.frombuffer(b"".join(rows["image"]), np.uint8).reshape(-1, size, size)
    return as_tensor(pixels), as_tensor(rows["target"]).clone(), rows["sample"]


def _pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor if device.type == "cpu" else tensor.pin_memory()
