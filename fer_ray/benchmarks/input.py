"""The input path without a network, from memory and from a stream, beside a common baseline.

The baseline is torch's DataLoader on a folder of JPEGs, which albumentations augments one by one.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from fer_ray.benchmarks.loops import WorkerContext, now, rate, spread
from fer_ray.data.dataset import DatasetInfo, SplitInfo
from fer_ray.data.row_groups import row_group_slices
from fer_ray.models.forward import Forward, resize
from fer_ray.training.feed import Feed, Images
from fer_ray.training.stream_feed import StreamFeed
from fer_ray.transforms.albumentations_engine import AlbumentationsAugmenter, fill_of

NUM_FILES = 2048
"""JPEGs in the baseline's folder: few enough for the page cache, more than a few batches."""
_MIN_EPOCH_IMAGES = 8192
"""Images of an epoch from memory, at least: the start of an epoch then does not count."""
_JPEG_QUALITY = 95
_PREFETCH = 2  # DataLoader's default


def cores() -> int:
    """Number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


class InputBenchmark:
    """The input paths to be timed; a context manager that ends the baseline's workers.

    Args:
        context: what the worker measures with.
        settings: ``round_s``, ``spare_cpus`` for streaming, ``folder`` for the JPEGs.
    """

    def __init__(self, context: WorkerContext, settings: dict[str, Any]) -> None:
        self._context, self._settings = context, settings
        self._round_s = settings["round_s"]
        self._device = context.group.device
        self._batch_size = context.config.schedule.global_batch_size
        self._feed = context.feed(math.ceil(_MIN_EPOCH_IMAGES / self._batch_size))
        self._forward = context.trainer(self._feed).forward
        self._epochs = itertools.count()
        self._baseline: _JpegLoader | None = None
        self.stream_images = 0
        """Images of one epoch of the stream; 0 where it is not measured."""

    def __enter__(self) -> InputBenchmark:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._baseline:
            self._baseline.stop()

    def candidates(self, needs: Sequence[str]) -> dict[str, Callable[[], float]]:
        """The functions that each time one round, in images/s, by the name of their series.

        Args:
            needs: of ``input``, ``input_naive`` and ``stream``, what is to be measured.
        """
        candidates: dict[str, Callable[[], float]] = {}
        if "input" in needs:
            candidates["input_one_thread"] = lambda: self._from_memory(1)
        if "input_naive" in needs:
            candidates["input"] = lambda: self._from_memory(cores())
        if "stream" in needs:
            stream = self._stream()
            candidates["stream"] = lambda: self._rate(stream, cores(), at_least_s=0.0)
        if {"input_naive", "stream"} & set(needs):
            folder = Path(self._settings["folder"])
            baseline = self._baseline = _JpegLoader(self._context, folder, self._forward)
            candidates["input_naive"] = lambda: baseline.rate(self._round_s, self._device)
        return candidates

    def _from_memory(self, threads: int) -> float:
        return self._rate(self._feed, threads, at_least_s=self._round_s)

    def _rate(self, feed: Feed, threads: int, *, at_least_s: float) -> float:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return rate(lambda: self._consume(feed), self._device, at_least_s)
        finally:
            torch.set_num_threads(before)

    def _consume(self, feed: Feed) -> int:
        """Runs one epoch up to the network's input; returns the number of images."""
        num_images = 0
        for batch in feed.train(next(self._epochs)):
            images = resize(self._forward.normalizer(batch.images), self._forward.input_size)
            if batch.mix is not None:
                images = batch.mix.apply(images)
            num_images += len(images)
        return num_images

    def _stream(self) -> StreamFeed:
        """A stream whose epoch takes about a round; few files are read repeatedly."""
        short = self._stream_feed(passes=1)
        self._consume(short)  # Ray Data starts its processes
        start = now(self._device)
        self._consume(short)
        passes = math.ceil(self._round_s / (now(self._device) - start))
        feed = self._stream_feed(passes=max(passes, 1))
        self.stream_images = feed.steps_per_epoch * self._batch_size
        return feed

    def _stream_feed(self, *, passes: int) -> StreamFeed:
        info = repeated(self._context.info, passes)
        slices = {name: row_group_slices(info, name) for name in ("train", "validation")}
        spare, group = self._settings["spare_cpus"], self._context.group
        return StreamFeed(self._context.config, info, slices, group=group, spare_cpus=spare)


def repeated(info: DatasetInfo, passes: int) -> DatasetInfo:
    """A dataset whose train split lists the same files `passes` times."""
    train = info.split("train")
    longer = SplitInfo(
        rows=train.rows * passes,
        files=train.files * passes,
        parts=train.parts,
        classes={label: count * passes for label, count in train.classes.items()},
    )
    return DatasetInfo(**{**vars(info), "splits": {**info.splits, "train": longer}})


class _JpegLoader:
    """A DataLoader on a folder of JPEGs whose workers run until `stop`."""

    def __init__(self, context: WorkerContext, folder: Path, forward: Forward) -> None:
        images = spread(context.train, min(NUM_FILES, len(context.train.labels)))
        files = JpegDataset.write(context, images, folder / "jpegs", forward.input_size)
        self._batch_size = context.config.schedule.global_batch_size
        self._loader: DataLoader | None = DataLoader(
            files,
            batch_size=self._batch_size,
            sampler=_EndlessSampler(len(images.labels)),
            num_workers=cores(),
            prefetch_factor=_PREFETCH,
            pin_memory=context.group.device.type == "cuda",
            persistent_workers=True,
        )
        self._batches: Iterator[list[torch.Tensor]] | None = iter(self._loader)

    def rate(self, round_s: float, device: torch.device) -> float:
        """Images/s over `round_s` seconds, after the batches loaded in advance are used up."""
        num_ahead = cores() * _PREFETCH
        for _ in range(num_ahead):
            self._next(device)
        start, num_images = now(device), 0
        while (elapsed := now(device) - start) < round_s or not num_images:
            num_images += self._next(device)
        # The workers load ahead again: wait for them, so that the next round has all CPUs.
        time.sleep(num_ahead * self._batch_size * elapsed / num_images)
        return num_images / elapsed

    def _next(self, device: torch.device) -> int:
        assert self._batches is not None
        images, _ = next(self._batches)
        return len(images.to(device, non_blocking=True))

    def stop(self) -> None:
        """Ends the workers."""
        self._batches = self._loader = None


class _EndlessSampler(Sampler):
    """All rows in random order, again and again."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng(0)
        while True:
            yield from random.permutation(self._count).tolist()


@dataclass(frozen=True, kw_only=True)
class JpegDataset(Dataset):
    """JPEG files that are opened, augmented and converted to a tensor one by one."""

    paths: list[str]
    labels: list[int]
    pipeline: Any
    """albumentations' `Compose` of the configured augmentation, or None."""
    mean: float
    """Mean pixel of the train split, from 0 to 1."""
    std: float
    """Standard deviation of the train split's pixels, on the same scale."""
    size: int
    """Side of the network's input in pixels."""

    @classmethod
    def write(cls, context: WorkerContext, images: Images, folder: Path, size: int) -> JpegDataset:
        """Writes images as JPEGs into a folder per class."""
        info, config = context.info, context.config
        paths = []
        for number, (pixels, label) in enumerate(zip(images.pixels, images.labels)):
            path = folder / info.labels[label] / f"{number:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, quality=_JPEG_QUALITY)
            paths.append(str(path))
        library = AlbumentationsAugmenter(
            config.transforms, seed=0, fill=fill_of(info.pixel_mean), image_size=info.image_size
        )
        return cls(
            paths=paths,
            labels=images.labels.tolist(),
            pipeline=library._pipeline,
            mean=info.pixel_mean,
            std=info.pixel_std,
            size=size,
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        """A normalized image (1, S, S) float32 and its class."""
        with Image.open(self.paths[row]) as image:
            pixels = np.array(image.convert("L"))
        if self.pipeline is not None:
            pixels = self.pipeline(image=pixels)["image"]
        if pixels.shape[0] != self.size:
            pixels = cv2.resize(pixels, (self.size, self.size), interpolation=cv2.INTER_LINEAR)
        tensor = torch.from_numpy(pixels).unsqueeze(0).float().div(255.0)
        return tensor.sub(self.mean).div(self.std), self.labels[row]
