"""What the training loop asks of a feed of batches, and what its implementations share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from fer_ray.config.schema import TrainConfig
from fer_ray.data.dataset import DatasetInfo
from fer_ray.data.labels import UNKNOWN_LABEL
from fer_ray.training.process_group import ProcessGroup
from fer_ray.transforms.albumentations_engine import AlbumentationsAugmenter, fill_of
from fer_ray.transforms.device_engine import DeviceAugmenter
from fer_ray.transforms.mixing import Mix

EVALUATION_BATCH_SIZE = 256


@dataclass(frozen=True, kw_only=True)
class Images:
    """Labelled images in memory."""

    pixels: np.ndarray
    """(N, S, S) uint8; may be read-only."""
    labels: np.ndarray
    """(N,) int64, none of them unknown."""

    @classmethod
    def known(cls, pixels: np.ndarray, labels: np.ndarray) -> Images:
        """The images whose label is known; nothing is copied where all labels are."""
        keep = np.flatnonzero(labels != UNKNOWN_LABEL)
        if len(keep) == len(labels):
            return cls(pixels=pixels, labels=labels)
        return cls(pixels=pixels[keep], labels=labels[keep])


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One worker's shard of a global batch, on its device."""

    images: torch.Tensor
    """(M, S, S) uint8, augmented: the worker's own N, then those that are only mixed in."""
    targets: torch.Tensor
    """(M,) int64."""
    mix: Mix | None
    """How the first N are mixed; None: not at all, and N is M."""


def own_part(config: TrainConfig, group: ProcessGroup) -> slice:
    """This worker's part of each global batch: whole groups of batch norm.

    Parts of different workers differ by at most one group.
    """
    unit = config.images_per_unit
    units = group.shard(config.schedule.global_batch_size // unit)
    return slice(units.start * unit, units.stop * unit)


class Feed(Protocol):
    """Batches of one worker, from memory (`MemoryFeed`) or from Ray Data (`StreamFeed`)."""

    steps_per_epoch: int
    """Global batches in an epoch; images that do not fill one are left out."""
    class_counts: np.ndarray
    """(classes,) images of the train split."""

    def train(self, epoch: int) -> Iterator[Batch]:
        """This worker's shard of each global batch of an epoch, from 0."""
        ...

    def validation(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This worker's shard of the validation split: (N, S, S) uint8 and (N,) int64."""
        ...

    def histogram(self, count: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
        """The sum of `count`, an int64 histogram, over this worker's shard of the train split."""
        ...


def albumentations_augmenter(
    config: TrainConfig, pixel_mean: float, size: int
) -> AlbumentationsAugmenter:
    """The `albumentations` engine for a data set's images."""
    seed, fill = config.schedule.seed, fill_of(pixel_mean)
    return AlbumentationsAugmenter(config.transforms, seed=seed, fill=fill, image_size=size)


class Augmentation:
    """The engine that a configuration asks for, on the worker's device."""

    def __init__(self, config: TrainConfig, info: DatasetInfo, device: torch.device) -> None:
        self.device = device
        self.on_cpu: AlbumentationsAugmenter | None = None
        self.on_device: DeviceAugmenter | None = None
        if config.transforms.engine == "albumentations":
            self.on_cpu = albumentations_augmenter(config, info.pixel_mean, info.image_size)
        else:
            seed, fill = config.schedule.seed, fill_of(info.pixel_mean)
            self.on_device = DeviceAugmenter(config.transforms, seed=seed, fill=fill)

    def finish(self, images: torch.Tensor, samples: np.ndarray, epoch: int) -> torch.Tensor:
        """Moves images to the device and, with the engine `device`, augments them there."""
        images = images.to(self.device, non_blocking=True)
        return self.on_device(images, samples, epoch) if self.on_device else images


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor on an array's memory, which may be read-only, as shared memory is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
