"""Preparation in turn with one process that uses Pillow, and its growth with more images."""

from __future__ import annotations

import io
import multiprocessing
import os
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
_ROOT = Path(__file__).resolve().parents[2]
_JOB = """
import sys, time
from fer_ray import cli
from fer_ray.preparation import run
from fer_ray.preparation.plan import plan_preparation
count, output, seconds = sys.argv[1:]
plan = plan_preparation(source="synthetic", output=output, num_images=int(count))
cli.start_ray()
start = time.perf_counter()
run.prepare(plan, log=lambda line: None)
with open(seconds, "w") as file:
    file.write(str(time.perf_counter() - start))
"""
"""A preparation that writes its seconds into a file; it starts a cluster of its own."""
_ROWS = 2048


def against_pillow(
    info: dataset.DatasetInfo, *, folder: str, rounds: int, log: Callable[[str], None]
) -> dict[str, Any]:
    """Images/s of preparing a zip of JPEGs, in turn with one process that uses Pillow.

    Both list the zip, decode to grey, hash the pixels and write Parquet. The job also computes
    statistics, finds duplicates, verifies each row and hashes the zip.

    A third series only reads, decodes and hashes the images, in as many processes as Ray has
    CPUs: the upper bound for preparing these files on this machine.

    Args:
        info: a prepared dataset, whose train images are written as JPEGs.
        folder: an empty folder to write in.
        rounds: number of rounds of each series.
        log: receives lines of progress.

    Returns:
        ``rounds`` of the three series, and ``prepare_limit_over_pillow``.
    """
    import ray

    archive = Path(folder) / "faces.zip"
    count = _write_zip(info, archive)
    log(f"preparing a zip of {count:,} JPEGs, in turn with one process that uses Pillow")
    output, plain_output = storage.join(folder, "prepared"), Path(folder) / "plain"

    def prepare() -> None:
        plan = plan_preparation(
            source=str(archive), output=output, image_size=info.image_size, overwrite=True
        )
        run.prepare(plan, log=lambda line: None)

    def prepare_plainly() -> None:
        _prepare_plainly(archive, plain_output, info.image_size)

    with _Decoders(archive, max(1, int(ray.cluster_resources()["CPU"]))) as decoders:
        work = {
            "prepare": prepare,
            "prepare_plain": prepare_plainly,
            "prepare_limit": decoders.decode,
        }
        rates = in_turn({name: _rate_of(run, count) for name, run in work.items()}, rounds)
    limit, plain = (statistics.median(rates[name]) for name in ("prepare_limit", "prepare_plain"))
    return {"rounds": rates, "prepare_limit_over_pillow": limit / plain}


def _rate_of(work: Callable[[], None], num_images: int) -> Callable[[], float]:
    """A function that runs the work once and returns images/s."""

    def measure() -> float:
        start = time.perf_counter()
        work()
        return num_images / (time.perf_counter() - start)

    return measure


class _Decoders:
    """Processes that decode the images of a zip, each the same number of them."""

    def __init__(self, archive: Path, count: int) -> None:
        self._archive = str(archive)
        files = [(entry.path, entry.at) for entry in ZipSource(self._archive).entries()]
        self._shards = [files[number::count] for number in range(count)]
        context = multiprocessing.get_context("spawn")  # forking is unsafe beside Ray's threads
        self._pool = ProcessPoolExecutor(count, mp_context=context)

    def __enter__(self) -> _Decoders:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown()

    def decode(self) -> None:
        """Reads, decodes and hashes every image once."""
        list(self._pool.map(_decode, [self._archive] * len(self._shards), self._shards))


def _decode(archive: str, files: list[tuple[str, bytes]]) -> None:
    source = ZipSource(archive)
    for path, at in files:
        decoding.pixel_digest(decoding.decode(source.read(path, at)))


def _write_zip(info: dataset.DatasetInfo, archive: Path) -> int:
    """Writes the train images as JPEGs into the two splits that a source must have."""
    images = dataset.load_split(info, "train")
    with zipfile.ZipFile(archive, "w") as writer:
        for number, (pixels, label) in enumerate(zip(images.images, images.labels)):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG", quality=_JPEG_QUALITY)
            split = "validation" if number % 10 == 9 else "train"
            name = f"{split}/{info.labels[label]}/{number:07}.jpg"
            writer.writestr(name, buffer.getvalue())
    return len(images.images)


def _prepare_plainly(archive: Path, output: Path, size: int) -> None:
    """A straightforward preparation: one entry after the other, in one process."""
    output.mkdir(exist_ok=True)
    with zipfile.ZipFile(archive) as reader:
        names = sorted(reader.namelist())
        for start in range(0, len(names), _ROWS):
            rows = []
            for name in names[start : start + _ROWS]:
                image = Image.open(io.BytesIO(reader.read(name))).convert("L")
                digest = decoding.pixel_sha256(np.asarray(image))
                if image.size != (size, size):
                    image = image.resize((size, size))
                split, label, _ = name.split("/")
                rows.append((name, split, label, image.tobytes(), size, size, digest))
            columns = [pa.array(c, f.type) for c, f in zip(zip(*rows), dataset.SCHEMA)]
            table = pa.Table.from_arrays(columns, schema=dataset.SCHEMA)
            pq.write_table(table, output / f"{start:07}.parquet", compression="zstd")


def growth(folder: str, log: Callable[[str], None]) -> dict[str, Any]:
    """Peak memory and images/s of preparing 30,000 and 600,000 synthetic faces.

    Each is a job of its own that starts its own cluster.

    Args:
        folder: an empty folder to write in.
        log: receives lines of progress.

    Returns:
        ``rounds``, one of each size; ``prepare_growth`` with the peaks in MiB of the driver and of
        the largest other process; and ``prepare_memory_growth``, the larger of their ratios.
    """
    rates, peaks = [], []
    for count in (_FEW, _MANY):
        log(f"preparing {count:,} synthetic faces")
        output = storage.join(folder, str(count))
        rate, peaks_mib = _run_job(count, output)
        rates.append(rate)
        peaks.append(peaks_mib)
        storage.remove(output)
    few, many = peaks
    ratios = {name: many[name] / few[name] for name in few}
    return {
        "rounds": {"prepare_few": [rates[0]], "prepare_many": [rates[1]]},
        "prepare_growth": {"images": [_FEW, _MANY], "peak_mib": peaks, "ratios": ratios},
        "prepare_memory_growth": max(ratios.values()),
    }


def _run_job(count: int, output: str) -> tuple[float, dict[str, float]]:
    """Images/s of a job without the start of Ray, and the peak memory of its processes in MiB."""
    seconds = Path(f"{output}.seconds")
    command = [sys.executable, "-c", _JOB, str(count), output, str(seconds)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with (
        subprocess.Popen(command, cwd=_ROOT, env=environment, stdout=subprocess.DEVNULL) as job,
        processes.PeakMemory(job.pid) as memory,
    ):
        status = job.wait()
    if status:
        raise JobFailed(
            f"preparing {count:,} synthetic faces ended with status {status}; see the errors above"
        )
    return count / float(seconds.read_text()), memory.peaks_mib()
