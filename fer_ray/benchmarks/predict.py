"""Batch prediction in turn with a bare forward loop, each in an actor with one thread."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from fer_ray import storage
from fer_ray.benchmarks.loops import float_batches, rate
from fer_ray.config.schema import TrainConfig
from fer_ray.data import dataset, parquet
from fer_ray.data.dataset import DatasetInfo, load_split, read_info, read_part
from fer_ray.errors import JobFailed
from fer_ray.inference import plan as planning
from fer_ray.inference import run as inference
from fer_ray.inference.predictor import default_batch_size
from fer_ray.models import checkpoint
from fer_ray.models.precision import autocast
from fer_ray.preparation.shards import ROWS_PER_SHARD
from fer_ray.training.feed import Images
from fer_ray.training.loop import Trainer
from fer_ray.training.memory_feed import MemoryFeed
from fer_ray.training.process_group import ProcessGroup

_MAX_PARTS = 64
_SETTLE_S = 1.0
"""Seconds for Ray Data's processes to end, before the bare loop is timed."""


class ForwardLoop:
    """An actor that only runs the network on normalized images."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """Writes a checkpoint with freshly initialized weights, which both sides load.

        Args:
            settings: ``config``, and the ``folder`` in which ``checkpoint`` is written.
        """
        torch.set_num_threads(1)  # as the predicting actor has
        config = TrainConfig.from_dict(settings["config"])
        device = _device(config)
        info = read_info(config.data)
        split = load_split(info, "train")
        images = Images.known(split.images, split.labels)
        path = Path(settings["folder"]) / "checkpoint"
        path.mkdir()
        _save(config, info, images, device, path)
        saved = checkpoint.read(str(path))
        self._device, self._forward = device, saved.forward(device)
        batch_size = default_batch_size(saved, device)
        self._model = saved.load_model(device)
        self._batches = float_batches(
            images,
            self._forward,
            batch_size=batch_size,
            steps=ROWS_PER_SHARD // batch_size,
            device=device,
        )
        self._run(2)

    def rate(self, batches: int) -> float:
        """Images/s over a number of batches; a GPU is waited for only at the end."""
        return rate(lambda: self._run(batches), self._device)

    @torch.inference_mode()
    def _run(self, batches: int) -> int:
        num_images = 0
        for images, _ in itertools.islice(itertools.cycle(self._batches), batches):
            with autocast(self._device, self._forward.precision):
                result = self._model(images).float().softmax(1)
                if self._forward.flip_at_test:
                    result = (result + self._model(images.flip(3)).float().softmax(1)) / 2
            num_images += len(result)
        return num_images


def _device(config: TrainConfig) -> torch.device:
    """Where both sides predict."""
    return torch.device("cuda" if config.scaling.use_gpu else "cpu")


def _save(
    config: TrainConfig, info: DatasetInfo, images: Images, device: torch.device, path: Path
) -> None:
    """Writes a checkpoint as the training loop does, before the first step."""
    group = ProcessGroup(device=device)
    feed = MemoryFeed(config, info, images, images, group=group)
    labels: dict[str, Any] = {"run": "benchmark", "environment": {}}
    Trainer(config, info, feed, group=group, labels=labels, resume=None).snapshot()(path)


def measure(settings: dict[str, Any], *, rounds: int, round_s: float) -> dict[str, Any]:
    """Times batch prediction and the bare loop in turn.

    Args:
        settings: as for `ForwardLoop`.
        rounds: number of rounds of each.
        round_s: about the seconds of a round.

    Returns:
        ``rounds`` of ``predict`` and ``predict_plain`` in images/s, ``predict_parts``,
        ``predict_rows_per_part``, and ``predict_batch``, the images in a forward pass.
    """
    import ray

    # No CPU is reserved: the loop is idle while Ray Data, which needs a CPU, predicts.
    config = TrainConfig.from_dict(settings["config"])
    loop: Any = ray.remote(num_cpus=0)(ForwardLoop).remote(settings)
    speed = ray.get(loop.rate.remote(1))
    saved = checkpoint.read(storage.join(settings["folder"], "checkpoint"))
    batch_size = default_batch_size(saved, _device(config))
    batches = max(round(speed * round_s / batch_size), 2)
    parts, rows = parts_for(speed, round_s, batch_size)
    data = _write_dataset(
        read_info(config.data), storage.join(settings["folder"], "parts"), parts, rows
    )
    rates: dict[str, list[float]] = {"predict": [], "predict_plain": []}
    for _ in range(rounds):
        rates["predict"].append(_predict(data, settings["folder"], config.scaling.use_gpu))
        time.sleep(_SETTLE_S)
        rates["predict_plain"].append(ray.get(loop.rate.remote(batches)))
    ray.kill(loop)
    return {
        "rounds": rates,
        "predict_parts": parts,
        "predict_rows_per_part": rows,
        "predict_batch": batch_size,
    }


def parts_for(speed: float, round_s: float, batch_size: int) -> tuple[int, int]:
    """The number of parts to predict and the rows of each.

    The clock starts when the first part is written; at least two more take about `round_s`.

    Args:
        speed: images/s of the bare loop.
        round_s: seconds of a round.
        batch_size: number of images in a forward pass.
    """
    batches = max(round(speed * round_s / 2 / batch_size), 1)
    rows = min(batches * batch_size, ROWS_PER_SHARD)
    return min(1 + max(math.ceil(speed * round_s / rows), 2), _MAX_PARTS), rows


def _predict(data: str, folder: str, use_gpu: bool) -> float:
    """Images/s of batch prediction, from the first part written to the last."""
    plan = planning.plan(
        checkpoint_path=storage.join(folder, "checkpoint"),
        data=data,
        split="train",
        output=storage.join(folder, "predictions", "all"),
    )
    written = inference.predict(plan, num_actors=1, use_gpu=use_gpu, log=lambda line: None)
    files = [Path(written) / task["part"] for task in plan.tasks]
    speed = steady_rate({file: pq.read_metadata(file).num_rows for file in files})
    storage.remove(written)
    return speed


def steady_rate(rows: dict[Path, int]) -> float:
    """Images/s from the time at which the first part was written to that of the last.

    Args:
        rows: number of images in each part's file; two files or more.

    Raises:
        JobFailed: if all files carry the same time.
    """
    order = sorted(rows, key=lambda file: file.stat().st_mtime_ns)
    elapsed_s = (order[-1].stat().st_mtime_ns - order[0].stat().st_mtime_ns) / 1e9
    if elapsed_s <= 0:
        raise JobFailed(
            "predict_over_plain: the parts were written too fast to be timed; "
            "give a longer --round-s"
        )
    return sum(rows[file] for file in order[1:]) / elapsed_s


def _write_dataset(info: DatasetInfo, folder: str, parts: int, rows: int) -> str:
    """Writes a prepared dataset of some parts of equal size, repeating images if needed."""
    tables: list[pa.Table] = []
    for file in info.split("train").files:
        tables.append(read_part(info, "train", file))
        if sum(len(table) for table in tables) >= parts * rows:
            break
    whole = pa.concat_tables(tables)
    written = {}
    for number in range(parts):
        numbers = np.arange(number * rows, (number + 1) * rows)
        table = whole.take(numbers % len(whole))
        ids = pa.array([f"{image:07d}" for image in numbers])
        table = table.set_column(table.schema.get_field_index("image_id"), "image_id", ids)
        file = f"train/part-{number:05d}.parquet"
        (Path(folder) / "train").mkdir(parents=True, exist_ok=True)
        record = parquet.write_table(table, folder, file)
        written[file] = dataset.Part(**vars(record), rows=rows).to_dict()
    value = storage.read_json(storage.join(info.path, dataset.INFO_NAME))
    split = {"rows": parts * rows, "files": list(written), "parts": written}
    split |= {"classes": {}, "unlabelled": 0}
    dataset.write_info(folder, {**value, "splits": {"train": split}})
    return folder
