"""The input path alone, from memory and from a stream, beside the usual one: JPEGs that torch's
DataLoader reads and albumentations changes one by one."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from fer_ray.benchmarks.loops import Workplace, now, rate, spread
from fer_ray.data.dataset import DatasetInfo, SplitInfo
from fer_ray.data.row_groups import row_group_slices
from fer_ray.models.forward import Forward, resize
from fer_ray.training.feed import Feed, Images
from fer_ray.training.stream_feed import StreamFeed
from fer_ray.transforms.albumentations_engine import AlbumentationsAugmenter, fill_of

FILES = 2048
"""JPEGs in the folder of the usual way: fewer than memory caches, more than a few batches."""
_LEAST_EPOCH = 8192
"""Images of an epoch from memory: its start is then no part worth naming."""
_JPEG_QUALITY = 95
_PREFETCH = 2  # DataLoader's default


def cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


class Inputs:
    """What gives batches without a network, each way ready to be timed."""

    def __init__(self, path: Workplace, settings: dict[str, Any]) -> None:
        """Makes nothing yet.

        Args:
            path: what the worker measures with.
            settings: ``round_s``, ``spare_cpus`` to stream with, ``folder`` for the JPEGs.
        """
        self._place, self._settings = path, settings
        self._round_s = settings["round_s"]
        self._device = path.group.device
        batch_size = path.config.schedule.global_batch_size
        feed = path.feed(math.ceil(_LEAST_EPOCH / batch_size))
        trainer = path.trainer(feed)
        self._feed, self._forward = feed, trainer.forward
        self._epochs = itertools.count()
        self._usual: _Usual | None = None
        self.stream_images = 0

    def __enter__(self) -> Inputs:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._usual:
            self._usual.stop()

    def candidates(self, names: Sequence[str]) -> dict[str, Callable[[], float]]:
        """Images/s of a round of each way that the names ask for."""
        found: dict[str, Callable[[], float]] = {}
        if "input" in names:
            found["input_one_thread"] = lambda: self._memory(1)
        if "input_naive" in names:
            found["input"] = lambda: self._memory(cores())
        if "stream" in names:
            found["stream"] = self._streamed(self._stream())
        if {"input_naive", "stream"} & set(names):
            self._usual = _Usual(self._place, Path(self._settings["folder"]), self._forward)
            found["input_naive"] = lambda: self._naive()
        return found

    def _memory(self, threads: int) -> float:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return rate(lambda: self._consume(self._feed), self._device, self._round_s)
        finally:
            torch.set_num_threads(before)

    def _consume(self, feed: Feed) -> int:
        """One epoch, up to what the network would get; returns its images."""
        seen = 0
        for batch in feed.train(next(self._epochs)):
            images = resize(self._forward.normalizer(batch.images), self._forward.input_size)
            if batch.mix is not None:
                images = batch.mix.apply(images)
            seen += len(images)
        return seen

    def _naive(self) -> float:
        assert self._usual is not None
        return self._usual.rate(self._round_s, self._device)

    def _stream(self) -> StreamFeed:
        """A stream whose epoch takes a round: the files again and again if there are few."""

        def feed(passes: int) -> StreamFeed:
            info = repeated(self._place.info, passes)
            found = {name: row_group_slices(info, name) for name in ("train", "validation")}
            spare, group = self._settings["spare_cpus"], self._place.group
            return StreamFeed(self._place.config, info, found, group=group, spare_cpus=spare)

        once = feed(1)
        self._consume(once)  # Ray Data starts its processes
        start = now(self._device)
        self._consume(once)
        passes = math.ceil(self._round_s / (now(self._device) - start))
        chosen = feed(max(passes, 1))
        batch_size = self._place.config.schedule.global_batch_size
        self.stream_images = chosen.steps_per_epoch * batch_size
        return chosen

    def _streamed(self, feed: StreamFeed) -> Callable[[], float]:
        def epoch() -> float:
            before = torch.get_num_threads()
            torch.set_num_threads(cores())
            try:
                return rate(lambda: self._consume(feed), self._device)
            finally:
                torch.set_num_threads(before)

        return epoch


def repeated(info: DatasetInfo, passes: int) -> DatasetInfo:
    """A data set whose train split is the same files `passes` times."""
    train = info.split("train")
    longer = SplitInfo(
        rows=train.rows * passes,
        files=train.files * passes,
        classes={label: count * passes for label, count in train.classes.items()},
    )
    return DatasetInfo(**{**vars(info), "splits": {**info.splits, "train": longer}})


class _Usual:
    """A DataLoader over a folder of JPEGs, its workers running from the start to `stop`."""

    def __init__(self, path: Workplace, folder: Path, forward: Forward) -> None:
        images = spread(path.train, min(FILES, len(path.train.labels)))
        files = Files.write(path, images, folder / "jpegs", forward.input_size)
        self._loader: DataLoader | None = DataLoader(
            files,
            batch_size=path.config.schedule.global_batch_size,
            sampler=_Endless(len(images.labels)),
            num_workers=cores(),
            prefetch_factor=_PREFETCH,
            pin_memory=path.group.device.type == "cuda",
            persistent_workers=True,
        )
        self._batches: Iterator[list[torch.Tensor]] | None = iter(self._loader)

    def rate(self, round_s: float, device: torch.device) -> float:
        """Images/s over `round_s` seconds, after what was loaded in advance has been used up."""
        ahead = cores() * _PREFETCH
        for _ in range(ahead):
            self._next(device)
        start, seen = now(device), 0
        while (elapsed := now(device) - start) < round_s or not seen:
            seen += self._next(device)
        # the workers go on until they are ahead again: the next round is not to share with them
        time.sleep(ahead * self._batch_size * elapsed / seen)
        return seen / elapsed

    @property
    def _batch_size(self) -> int:
        assert self._loader is not None and self._loader.batch_size is not None
        return self._loader.batch_size

    def _next(self, device: torch.device) -> int:
        assert self._batches is not None
        images, _ = next(self._batches)
        return len(images.to(device, non_blocking=True))

    def stop(self) -> None:
        """Ends the workers."""
        self._batches = self._loader = None


class _Endless(Sampler):
    """All rows in random order, over and over."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng(0)
        while True:
            yield from random.permutation(self._count).tolist()


@dataclass(frozen=True, kw_only=True)
class Files(Dataset):
    """JPEGs as a textbook would read them: opened, changed and made a tensor one by one."""

    paths: list[str]
    labels: list[int]
    pipeline: Any
    """albumentations' `Compose` of the configuration's options, or None."""
    mean: float
    std: float
    size: int
    """Pixels a side of what the network sees."""

    @classmethod
    def write(cls, path: Workplace, images: Images, folder: Path, size: int) -> Files:
        """Writes images as JPEGs, a folder a class, and describes them."""
        paths = []
        for number, (pixels, label) in enumerate(zip(images.pixels, images.labels)):
            inner = folder / path.info.labels[label] / f"{number:06d}.jpg"
            inner.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(inner, quality=_JPEG_QUALITY)
            paths.append(str(inner))
        info, config = path.info, path.config
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
        """(1, S, S) float32 with the train split's mean and deviation taken out, and the class."""
        with Image.open(self.paths[row]) as picture:
            pixels = np.array(picture.convert("L"))
        if self.pipeline is not None:
            pixels = self.pipeline(image=pixels)["image"]
        if pixels.shape[0] != self.size:
            pixels = cv2.resize(pixels, (self.size, self.size), interpolation=cv2.INTER_LINEAR)
        tensor = torch.from_numpy(pixels).unsqueeze(0).float().div(255.0)
        return tensor.sub(self.mean).div(self.std), self.labels[row]
