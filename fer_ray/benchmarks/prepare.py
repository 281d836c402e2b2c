"""Preparation beside one process with Pillow, and how it grows with the number of images."""

from __future__ import annotations

import io
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fer_ray import storage
from fer_ray.benchmarks import processes
from fer_ray.benchmarks.loops import in_turn
from fer_ray.data import dataset, decoding
from fer_ray.data.sources.zips import ZipSource
from fer_ray.errors import JobFailed
from fer_ray.preparation import run
from fer_ray.preparation.plan import plan_preparation

_JPEG_QUALITY = 95
_FEW, _MANY = 30_000, 600_000
_JOB = Path(__file__).resolve().parents[2] / "jobs" / "prepare.py"
_ROWS = 2048


def against_pillow(
    info: dataset.DatasetInfo, *, folder: str, rounds: int, log: Callable[[str], None]
) -> dict[str, Any]:
    """Images/s of preparing a zip of JPEGs, beside the plain way in one process.

    Both list the zip, decode to grey, hash the pixels and write Parquet; only this project's
    also takes statistics, finds duplicates, verifies and hashes every row and the zip.

    A third side only reads, decodes and hashes the pictures, in as many processes as Ray has
    CPUs: what no preparation of these files could pass on this machine.

    Args:
        info: a prepared dataset, whose train images are written as JPEGs.
        folder: to write below; empty.
        rounds: of each side.
        log: receives lines of progress.

    Returns:
        ``rounds`` of the three sides, and ``prepare_limit_over_pillow``.
    """
    import ray

    archive = Path(folder) / "faces.zip"
    count = _write_zip(info, archive)
    log(f"preparing a zip of {count:,} JPEGs, beside one process with Pillow")
    ours, plain = storage.join(folder, "ours"), Path(folder) / "plain"

    def prepare() -> float:
        start = time.perf_counter()
        plan = plan_preparation(
            source=str(archive), output=ours, image_size=info.image_size, overwrite=True
        )
        run.prepare(plan, log=lambda line: None)
        return count / (time.perf_counter() - start)

    def by_hand() -> float:
        start = time.perf_counter()
        _prepare_plainly(archive, plain, info.image_size)
        return count / (time.perf_counter() - start)

    with _Decoders(archive, max(1, int(ray.cluster_resources()["CPU"]))) as decoders:

        def limit() -> float:
            start = time.perf_counter()
            decoders.decode()
            return count / (time.perf_counter() - start)

        sides = {"prepare": prepare, "prepare_plain": by_hand, "prepare_limit": limit}
        found = in_turn(sides, rounds)
    medians = {side: statistics.median(rates) for side, rates in found.items()}
    over_pillow = medians["prepare_limit"] / medians["prepare_plain"]
    return {"rounds": found, "prepare_limit_over_pillow": over_pillow}


class _Decoders:
    """Processes that share the pictures of a zip."""

    def __init__(self, archive: Path, count: int) -> None:
        self._archive = str(archive)
        files = [(entry.path, entry.at) for entry in ZipSource(self._archive).entries()]
        self._shares = [files[number::count] for number in range(count)]
        context = multiprocessing.get_context("spawn")  # this process has Ray's threads
        self._pool = ProcessPoolExecutor(count, mp_context=context)

    def __enter__(self) -> _Decoders:
        return self

    def __exit__(self, *unused: object) -> None:
        self._pool.shutdown()

    def decode(self) -> None:
        """Reads, decodes and hashes every picture once."""
        list(self._pool.map(_decode, [self._archive] * len(self._shares), self._shares))


def _decode(archive: str, files: list[tuple[str, bytes]]) -> None:
    source = ZipSource(archive)
    for path, at in files:
        decoding.pixel_digest(decoding.decode(source.read(path, at)))


def _write_zip(info: dataset.DatasetInfo, archive: Path) -> int:
    """Writes the train images as JPEGs, in both splits that a source has to have."""
    split = dataset.load_split(info, "train")
    with zipfile.ZipFile(archive, "w") as writer:
        for number, (pixels, label) in enumerate(zip(split.images, split.labels)):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG", quality=_JPEG_QUALITY)
            part = "validation" if number % 10 == 9 else "train"
            name = f"{part}/{info.labels[label]}/{number:07}.jpg"
            writer.writestr(name, buffer.getvalue())
    return len(split.images)


def _prepare_plainly(archive: Path, output: Path, size: int) -> None:
    """What one would write by hand: entry after entry, in one process."""
    output.mkdir(exist_ok=True)
    with zipfile.ZipFile(archive) as reader:
        names = sorted(reader.namelist())
        for start in range(0, len(names), _ROWS):
            rows = []
            for name in names[start : start + _ROWS]:
                picture = Image.open(io.BytesIO(reader.read(name))).convert("L")
                digest = decoding.pixel_sha256(np.asarray(picture))
                if picture.size != (size, size):
                    picture = picture.resize((size, size))
                split, label, _ = name.split("/")
                rows.append((name, split, label, picture.tobytes(), size, size, digest))
            columns = [pa.array(c, f.type) for c, f in zip(zip(*rows), dataset.SCHEMA)]
            table = pa.Table.from_arrays(columns, schema=dataset.SCHEMA)
            pq.write_table(table, output / f"{start:07}.parquet", compression="zstd")


def growth(folder: str, log: Callable[[str], None]) -> dict[str, Any]:
    """Peak memory and images/s of preparing few drawn faces, and twenty times as many.

    Each in a job of its own with a cluster of its own, all of whose processes are watched.

    Args:
        folder: to write below; empty.
        log: receives lines of progress.

    Returns:
        ``rounds`` of one each, ``prepare_growth`` with the peaks in MiB by kind of process, and
        ``prepare_memory_growth``: the largest of their ratios.
    """
    rates, peaks = [], []
    for count in (_FEW, _MANY):
        log(f"preparing {count:,} drawn faces")
        rate, peak = _watched(count, storage.join(folder, str(count)))
        rates.append(rate)
        peaks.append(peak)
        storage.remove(storage.join(folder, str(count)))
    few, many = peaks
    ratios = {kind: many[kind] / few[kind] for kind in few if kind in many}
    return {
        "rounds": {"prepare_few": [rates[0]], "prepare_many": [rates[1]]},
        "prepare_growth": {"images": [_FEW, _MANY], "peak_mib": peaks, "ratios": ratios},
        "prepare_memory_growth": max(ratios.values()),
    }


def _watched(count: int, output: str) -> tuple[float, dict[str, float]]:
    """Images/s of a job, Ray's start left out, and the peak memory of each kind of process."""
    command = [sys.executable, str(_JOB), "--source", "synthetic", "--num-images", str(count)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with subprocess.Popen(
        [*command, "--output", output], stdout=subprocess.PIPE, text=True, env=environment
    ) as job:
        with processes.Callback(lambda: processes.started_by(job.pid)) as callback:
            told, _ = job.communicate()
        peaks = callback.peaks_mib()
    found = re.search(r"^([\d,]+) images in ([\d.]+) s$", told, re.MULTILINE)
    if job.returncode or not found:
        raise JobFailed(f"jobs/prepare.py --num-images {count} ended with {job.returncode}")
    return count / float(found[2]), peaks
