""".venv/bin/python cluster/check.py --output /shared/check

Submits prepare, train, tune, predict and evaluate to the cluster at RAY_API_SERVER_ADDRESS, the
first three with `ray job submit` and the others with `JobSubmissionClient`. Follows their logs and
checks the Parquet files that they write.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fer_ray import cli, storage
from fer_ray.data import predictions, run_folder
from fer_ray.data.dataset import read_info
from fer_ray.data.labels import probability_column
from fer_ray.errors import JobFailed, UserError

ROOT = Path(__file__).resolve().parents[1]
SPLITS = ("validation",)
EPOCHS = 2
IMAGES = 600
_SWEEP = "space.transforms.normalization = ['none', 'minmax']\n"
_SMALL = ("--width", "8", "--global-batch-size", "64")
_TERMINAL = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class Step:
    """A job to submit."""

    job: str
    arguments: Sequence[str]
    by_client: bool = False
    """Whether it is submitted with `JobSubmissionClient`, not with `ray job submit`."""

    @property
    def command(self) -> list[str]:
        """The command that the cluster runs."""
        return ["python", f"jobs/{self.job}.py", *self.arguments]


def main() -> None:
    """Submits the jobs and checks their results."""
    parser = cli.JobParser(prog="check.py", description=__doc__.partition("\n\n")[2])
    add = parser.add_argument
    add(
        "--output",
        required=True,
        metavar="DIR",
        help="empty folder that all nodes share under this path",
    )
    add(
        "--run",
        default="check",
        metavar="NAME",
        help="name of the training run, and prefix of the jobs' names",
    )
    add("--num-workers", type=cli.integer(1), default=2, help="workers of the training")
    add(
        "--cpus-per-worker",
        type=cli.number(0.0),
        default=1.5,
        help="more than half of a node's CPUs puts each worker on its own node",
    )
    flags = parser.parse_args()
    jobs = os.environ.get("RAY_API_SERVER_ADDRESS")
    if not jobs:
        raise UserError(
            "RAY_API_SERVER_ADDRESS: is not set; set it to the address of the cluster's Jobs API"
        )
    storage.check_name("--run", flags.run)
    output = storage.absolute(flags.output)
    if storage.is_uri(output):
        raise UserError(f"--output: {output} is a URI; give a path that all nodes share")
    if storage.list_names(output):
        raise UserError(f"--output: {output} is not empty; give another folder")
    storage.write_bytes(storage.join(output, "sweep.toml"), _SWEEP.encode())
    scaling = ["--num-workers", str(flags.num_workers)]
    scaling += ["--cpus-per-worker", str(flags.cpus_per_worker)]
    for step in steps(output, flags.run, scaling):
        submit(step, jobs, flags.run)
        if step.job == "train":
            cli.log(f"the workers of run {flags.run!r} ran on {', '.join(workers_of(jobs))}")
    cli.log("all jobs succeeded; checked their results:")
    for line in check_results(output, flags.run):
        cli.log(line)


def steps(output: str, run: str, scaling: Sequence[str]) -> list[Step]:
    """The jobs in their order.

    Args:
        output: absolute path of the folder for all results.
        run: name of the training run.
        scaling: the training's flags for its number of workers and their CPUs.
    """
    data, runs, sweeps, predicted, evaluation = (
        storage.join(output, name)
        for name in ("faces", "runs", "sweeps", "predictions", "evaluation")
    )
    source = ["--source", "synthetic", "--num-images", str(IMAGES)]
    train = ["--data", data, "--storage", runs, "--run", run, "--epochs", str(EPOCHS), *_SMALL]
    tune = ["--data", data, "--storage", sweeps, "--sweep", storage.join(output, "sweep.toml")]
    tune += ["--run", run, "--seeds", "1", "--epochs", "1", *_SMALL]
    predict = ["--checkpoint", storage.join(runs, run), "--data", data, "--split", *SPLITS]
    evaluate = ["--predictions", predicted, "--runs", runs, "--data", data, "--output", evaluation]
    return [
        Step("prepare", [*source, "--output", data]),
        Step("train", [*train, *scaling]),
        Step("tune", tune),
        Step("predict", [*predict, "--output", predicted], by_client=True),
        Step("evaluate", evaluate, by_client=True),
    ]


def submit(step: Step, jobs: str, run: str) -> None:
    """Submits a job under the run's name, prints its log, and waits for its end.

    Raises:
        JobFailed: if the job failed, or the cluster reports another name or other metadata.
    """
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(jobs)
    name, metadata = f"{run}-{step.job}", {"run": run, "job": step.job}
    method = "JobSubmissionClient" if step.by_client else "ray job submit"
    cli.log(f"\n--- {step.job}, submitted with {method} as {name}")
    if step.by_client:
        client.submit_job(
            entrypoint=shlex.join(step.command),
            submission_id=name,
            metadata=metadata,
            runtime_env={"working_dir": str(ROOT)},
        )
        asyncio.run(_follow(client, name))
    else:
        _ray_job_submit(step, name, metadata)
    job = _ended(client, name)
    if job.status != "SUCCEEDED" or job.driver_exit_code != 0:
        raise JobFailed(f"{name}: {job.status}: {job.message}")
    if job.submission_id != name or not metadata.items() <= job.metadata.items():
        raise JobFailed(
            f"{name}: the cluster reports it as {job.submission_id} with {job.metadata}"
        )


def _ray_job_submit(step: Step, name: str, metadata: dict[str, str]) -> None:
    ray = Path(sys.executable).parent / "ray"
    command = [str(ray), "job", "submit", "--working-dir", ".", "--submission-id", name]
    command += ["--metadata-json", json.dumps(metadata), "--", *step.command]
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode:
        raise JobFailed(f"{name}: `ray job submit` ended with status {done.returncode}")


async def _follow(client: Any, name: str) -> None:
    async for lines in client.tail_job_logs(name):
        print(lines, end="", flush=True)


def _ended(client: Any, name: str) -> Any:
    """The information on a job once the cluster reports its end, which may follow its last log."""
    while (job := client.get_job_info(name)).status not in _TERMINAL:
        time.sleep(0.2)
    return job


def workers_of(jobs: str) -> list[str]:
    """Addresses of the nodes on which Ray Train has run workers, each once."""
    from ray.util.state import list_actors, list_nodes

    filters: list[tuple[str, str, str | bool | int | float]] = [
        ("class_name", "=", "RayTrainWorker")
    ]
    nodes = {node.node_id: node.node_ip for node in list_nodes(address=jobs)}
    actors = list_actors(address=jobs, filters=filters)
    return sorted({str(nodes[actor.node_id]) for actor in actors if actor.node_id in nodes})


def check_results(output: str, run: str) -> list[str]:
    """Reads and checks everything that the jobs wrote.

    Returns:
        A line for each table: its path and its number of rows.

    Raises:
        JobFailed: if rows are missing or duplicated, or tables do not match each other.
    """
    info = read_info(storage.join(output, "faces"))
    ids = {name: _rows(storage.join(info.path, name), unique="image_id") for name in info.splits}
    for name, split in info.splits.items():
        _require(
            len(ids[name]) == split.rows, f"{name}: the number of rows differs from dataset.json"
        )
    _require(
        sum(map(len, ids.values())) == IMAGES, f"{info.path}: the number of images is not {IMAGES}"
    )
    lines = [_line(storage.join(info.path, name), len(rows)) for name, rows in ids.items()]
    history = storage.join(output, "runs", run, run_folder.HISTORY)
    epochs = _rows(history, unique="epoch")["epoch"].to_pylist()
    _require(epochs == list(range(1, EPOCHS + 1)), f"{history}: epochs {epochs}")
    trials = storage.join(output, "sweeps", run, "trials.parquet")
    table = _rows(trials, unique="trial")
    _require(len(table) == 2, f"{trials}: {len(table)} trials instead of 2")
    _require(
        set(table["status"].to_pylist()) == {"finished"}, f"{trials}: not all trials are finished"
    )
    metrics = storage.join(output, "evaluation", "metrics.parquet")
    splits = _rows(metrics, unique="split")["split"].to_pylist()
    _require(sorted(splits) == sorted(SPLITS), f"{metrics}: splits {splits}")
    lines += [_line(history, len(epochs)), _line(trials, len(table))]
    for name in SPLITS:
        path = storage.join(output, "predictions", run, name)
        lines.append(_line(path, _check_predictions(path, ids[name])))
    return [*lines, _line(metrics, len(splits))]


def _line(path: str, count: int) -> str:
    return f"{path}: {count} row{'' if count == 1 else 's'}"


def _check_predictions(path: str, prepared: pa.Table) -> int:
    predicted = predictions.read(path)
    table = predicted.table
    same = sorted(table["image_id"].to_pylist()) == sorted(prepared["image_id"].to_pylist())
    _require(same, f"{path}: the images differ from the prepared ones")
    _require(table["error"].null_count == len(table), f"{path}: some images were not predicted")
    columns = [table[probability_column(label)].to_numpy() for label in predicted.labels]
    error = np.abs(np.sum(columns, axis=0) - 1).max()
    _require(error < 1e-5, f"{path}: the probabilities of an image do not add up to 1")
    return len(table)


def _rows(path: str, *, unique: str) -> pa.Table:
    fs, inner = storage.filesystem(path)
    try:
        table = pq.read_table(inner, filesystem=fs)
    except (OSError, pa.ArrowInvalid) as error:
        raise JobFailed(f"{path}: {error}") from error
    _require(len(table[unique].unique()) == len(table), f"{path}: duplicate values of {unique}")
    return table


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise JobFailed(message)


if __name__ == "__main__":
    cli.run(main)
