"""Small data and settings that several test modules train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fer_ray.config.schema import TrainConfig, divisors
from fer_ray.data.dataset import DatasetInfo, Split, SplitInfo
from fer_ray.training import loop
from fer_ray.training.feed import Images
from fer_ray.training.memory_feed import MemoryFeed
from fer_ray.training.process_group import ProcessGroup

LABELS = ("angry", "happy", "sad")

FLAGS = ["--width", "4", "--global-batch-size", "8", "--batch-norm-group", "4"]
FLAGS += ["--precision", "float32"]
"""A job's flags for the network and the batches of `config`."""


def split(count: int, *, seed: int = 0, size: int = 12) -> Split:
    """Images whose class shows: a bright band at a height that the label decides, and noise."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % len(LABELS)
    images = random.integers(0, 90, (count, size, size), dtype=np.uint8)
    for image, label in zip(images, labels):
        image[label * 4 : label * 4 + 3] += 150
    ids = [f"images/{number:05d}.png" for number in range(count)]
    return Split(images=images, labels=labels.astype(np.int64), image_ids=ids, pixel_sha256=ids)


def info(train: int, *, size: int = 12) -> DatasetInfo:
    """A data set's description; its place is not there."""
    part = SplitInfo(rows=train, files=(), parts={}, classes=dict.fromkeys(LABELS, train // 3))
    return DatasetInfo(
        path="/nowhere",
        labels=LABELS,
        image_size=size,
        splits={"train": part, "validation": part},
        pixel_mean=0.3,
        pixel_std=0.25,
        data_sha256="0" * 64,
    )


def feed(
    settings: TrainConfig,
    train: Split,
    validation: Split,
    *,
    described: DatasetInfo,
    group: ProcessGroup | None = None,
) -> MemoryFeed:
    """Both splits in memory."""
    parts = [Images.known(part.images, part.labels) for part in (train, validation)]
    return MemoryFeed(settings, described, *parts, group=group or ProcessGroup())


def config(**sections: dict[str, Any]) -> TrainConfig:
    """A configuration that trains within a second: width 4, batches of 2 groups of 4, float32."""
    values: dict[str, Any] = {
        "model": {"width": 4},
        "schedule": {
            "epochs": 2,
            "global_batch_size": 8,
            "warmup_epochs": 0.5,
            "precision": "float32",
        },
        "optimizer": {"learning_rate": 0.05},
        "scaling": {"num_workers": 1},
    }
    if sections.get("model", {}).get("name", "custom_cnn") != "custom_cnn":
        del values["model"]["width"]
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    # at least two groups of batch norm, so that two workers have something to do
    batch = values["schedule"]["global_batch_size"]
    if values["model"].get("name") != "sequential_cnn":
        values["schedule"].setdefault("batch_norm_group", divisors(batch)[-2] if batch > 1 else 1)
    return TrainConfig.from_dict({"data": "/nowhere", **values})


def write_checkpoint(described: DatasetInfo, path: Path) -> Path:
    """Writes a checkpoint of fresh weights, as the training loop does before its first step."""
    settings = config()
    images = split(32, size=described.image_size)
    trainer = loop.Trainer(
        settings,
        described,
        feed(settings, images, images, described=described),
        group=ProcessGroup(),
        labels={"run": "tried", "environment": {}},
        resume=None,
    )
    path.mkdir(parents=True)
    trainer.snapshot()(path)
    return path
