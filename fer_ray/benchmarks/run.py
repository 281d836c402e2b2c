"""How fast this machine trains and predicts, as ratios to named alternatives taken in one run.

`plan` it without Ray, then `measure` it. Every ratio is that of the medians of rounds that took
turns (A B A B …) in one process, or, where both sides need processes of their own, beside one
another. Nothing is compiled on either side.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fer_ray import storage
from fer_ray.benchmarks import predict as benchmark_predict
from fer_ray.benchmarks import prepare as benchmark_prepare
from fer_ray.benchmarks import processes as benchmark_processes
from fer_ray.benchmarks import sweeps as benchmark_sweeps
from fer_ray.benchmarks import workers as benchmark_workers
from fer_ray.benchmarks.loops import for_measuring
from fer_ray.benchmarks.targets import KEYS, numbers
from fer_ray.config.schema import TrainConfig
from fer_ray.data.dataset import DatasetInfo, read_info
from fer_ray.data.labels import FER2013_LABELS
from fer_ray.errors import UserError, unknown
from fer_ray.models import registry
from fer_ray.preparation import run as preparation
from fer_ray.runtime import environment, resources
from fer_ray.training import ray_trainer

ROUNDS = 5
ROUND_S = 3.0
_IMAGE_SIZE = 48  # of drawn faces


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A benchmark whose settings are right. Made by `plan`."""

    config: TrainConfig
    """What is measured; its data's place is absolute, or empty for drawn faces."""
    keys: tuple[str, ...]
    """The numbers to measure, of `KEYS`."""
    rounds: int
    """Rounds of each side that are kept."""
    round_s: float
    """About how many seconds each takes."""
    output: str
    """Absolute place of the JSON file; empty: none."""


def plan(
    config: TrainConfig,
    *,
    output: str = "",
    only: Iterable[str] = (),
    rounds: int = ROUNDS,
    round_s: float = ROUND_S,
) -> Plan:
    """Checks the settings, without Ray.

    Args:
        config: what to measure; without `data`, on drawn faces.
        output: place of the JSON file.
        only: some of `KEYS`; none for those of the model.
        rounds: of each side, 1 or more.
        round_s: seconds of each, above 0.

    Raises:
        UserError: for whatever is wrong about them.
    """
    keys = _chosen(set(only))
    if rounds < 1 or not 0 < round_s < math.inf:
        raise UserError(
            f"--rounds {rounds}, --round-s {round_s:g}: more than 0 is needed, and an end"
        )
    if "workers_over_limit" in keys and config.scaling.num_workers < 2:
        raise UserError("--num-workers: workers_over_limit is of 2 or more; --only leaves it out")
    labels, size = len(FER2013_LABELS), _IMAGE_SIZE
    if config.data:
        info = read_info(config.data)
        _check_data(info, keys)
        config, labels, size = replace(config, data=info.path), len(info.labels), info.image_size
    config = replace(config, model=config.model.with_absolute_files())
    registry.check(config.model, num_classes=labels, image_size=size)
    output = storage.absolute(output) if output else ""
    _check_output(output)
    return Plan(config=config, keys=keys, rounds=rounds, round_s=round_s, output=output)


def _chosen(only: set[str]) -> tuple[str, ...]:
    for key in only:
        if key not in KEYS:
            raise unknown("--only", key, KEYS)
    return tuple(key for key in KEYS if key in only or (KEYS[key].of_model and not only))


def _check_data(info: DatasetInfo, keys: Sequence[str]) -> None:
    for name in ("train", "validation"):
        split = info.split(name)
        if split.rows == split.unlabelled:
            raise UserError(f"--data: {info.path} has no labelled images in its {name} split")
        if split.unlabelled and "stream_over_naive" in keys:
            raise UserError(
                f"--data: {split.unlabelled} images of {name} have no label and cannot be "
                "streamed; --only leaves stream_over_naive out"
            )


def _check_output(output: str) -> None:
    if not output or storage.is_uri(output):
        storage.check_bucket("--output", output)
        return
    if Path(output).is_dir():
        raise UserError(f"--output: {output} is a folder; a file's name is wanted")
    above = next(path for path in Path(output).parents if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"--output: {above} is not a folder that can be written to")


def measure(
    plan: Plan, *, start_ray: Callable[[], None], log: Callable[[str], None] = print
) -> dict[str, Any]:
    """Starts Ray, measures, and writes the JSON file.

    Args:
        plan: from `plan`.
        start_ray: connects to a cluster or starts one.
        log: receives lines of progress.

    Returns:
        The file's content: the numbers of `KEYS` at the top, beside what they are made of.

    Raises:
        UserError: where the cluster is not one machine, or lacks CPUs or GPUs.
        JobFailed: where a worker failed.
    """
    startup_s = {"imports": time.time() - benchmark_processes.started_at()}
    start = time.monotonic()
    start_ray()
    startup_s["ray"] = time.monotonic() - start
    _check_cluster(plan)
    with tempfile.TemporaryDirectory(prefix="fer_ray-benchmark-") as folder:
        run = _Run(plan, folder, log)
        with benchmark_processes.Callback(run.processes) as callback:
            found = run.everything()
            found["peak_memory_mib"] = _peaks(callback.peaks_mib(), found)
    found["startup_s"] = startup_s | found.get("startup_s", {})
    found = environment.describe(torch.device("cpu")) | found  # the workers say it better
    result = {**numbers(plan.keys, found), **_beside(plan, found, run.info)}
    result["wall_s"] = time.monotonic() - start
    if plan.output:
        storage.write_json(plan.output, result)
    return result


def _peaks(peaks_mib: dict[str, float], found: dict[str, Any]) -> dict[str, float]:
    """The most memory of each kind; a worker's by itself, without the benchmark's other loops."""
    if "epochs_peak_mib" not in found:
        return peaks_mib
    worker = benchmark_processes.WORKER
    own = {"benchmark worker": peaks_mib.get(worker, 0.0), worker: found.pop("epochs_peak_mib")}
    return dict(sorted({**peaks_mib, **own}.items()))


def _check_cluster(plan: Plan) -> None:
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) > 1:
        raise UserError(f"the benchmark measures one machine; this cluster has {len(nodes)}")
    scaling = plan.config.scaling
    demand = resources.Demand(
        each={"CPU": scaling.cpus_per_worker} | ({"GPU": 1.0} if scaling.use_gpu else {}),
        count=scaling.num_workers if "workers_over_limit" in plan.keys else 1,
        flags={"CPU": "--cpus-per-worker", "GPU": "--use-gpu"},
        hint="a fraction may fit, and --only leaves numbers out",
    )
    resources.check(demand, may_wait=False)  # what grows is no longer one machine


class _Run:
    """The measurements of one benchmark, in a folder of their own."""

    def __init__(self, plan: Plan, folder: str, log: Callable[[str], None]) -> None:
        import ray

        self._plan, self._folder, self._log = plan, folder, log
        self.session = ray.get_runtime_context().get_session_name()
        self._needs = {KEYS[key].needs for key in plan.keys}
        config = for_measuring(plan.config)
        if not config.data:
            config = replace(config, data=_draw_faces(folder))
        self.config, self.info = config, read_info(config.data)

    def processes(self) -> dict[int, str]:
        """This benchmark's processes, and what each is."""
        return benchmark_processes.kinds(self.session)

    def everything(self) -> dict[str, Any]:
        """What was measured: ``rounds`` by name, and the rest as the workers wrote it."""
        found: dict[str, Any] = {"rounds": {}}
        parts = []
        if names := self._needs & set(benchmark_workers.MEASURED):
            parts.append(self._alone(sorted(names)))
        if "together" in self._needs:
            parts.append(self._together())
        if "predict" in self._needs:
            parts.append(self._predict())
        if "sweep" in self._needs:
            parts.append(benchmark_sweeps.overhead(self._own_folder("overhead"), self._log))
        if "halving" in self._needs:
            parts.append(benchmark_sweeps.halving(self._own_folder("halving"), self._log))
        if "prepare" in self._needs:
            path, rounds = self._own_folder("prepare"), self._plan.rounds
            parts.append(
                benchmark_prepare.against_pillow(
                    self.info, folder=path, rounds=rounds, log=self._log
                )
            )
        if "prepare_growth" in self._needs:
            parts.append(benchmark_prepare.growth(self._own_folder("growth"), self._log))
        for part in parts:
            rounds = found["rounds"] | part["rounds"]
            found = part | found | {"rounds": rounds}
        return found

    def _own_folder(self, name: str) -> str:
        folder = storage.join(self._folder, name)
        storage.make_directory(folder)
        return folder

    def _settings(self, name: str, **more: Any) -> dict[str, Any]:
        folder = self._own_folder(name)
        given = {"rounds": self._plan.rounds, "round_s": self._plan.round_s, "folder": folder}
        return {"config": self.config.to_dict(), **given, **more}

    def _alone(self, names: list[str]) -> dict[str, Any]:
        import ray

        scaling, step_s = self.config.scaling, 0.0
        if {"train", "epochs"} & set(names):
            self._log("timing a step, to size the rounds")
            calibrate = ray.remote(max_calls=1)(benchmark_workers.calibrate)
            calibrate = calibrate.options(
                num_cpus=scaling.cpus_per_worker, num_gpus=int(scaling.use_gpu)
            )
            step_s = ray.get(calibrate.remote(self.config.to_dict()))
        self._log(f"one worker: {', '.join(names)}")
        spare = ray.cluster_resources()["CPU"] - scaling.cpus_per_worker
        settings = self._settings("alone", names=names, step_s=step_s, spare_cpus=spare)
        settings["default_precision"] = self._plan.config.schedule.precision == "auto"
        start = time.time()
        found = _fit(benchmark_workers.alone, settings, self.config, workers=1)
        if "startup_s" in found:
            workers_s = found.pop("entered_at") - start
            found["startup_s"] = {"workers": workers_s, **found["startup_s"]}
        return found

    def _together(self) -> dict[str, Any]:
        workers = self.config.scaling.num_workers
        self._log(f"{workers} workers of one thread")
        settings = self._settings("together", session=self.session)
        found = _fit(benchmark_workers.together, settings, self.config, workers=workers)
        return {**found, "steps_together": found.pop("steps")}

    def _predict(self) -> dict[str, Any]:
        self._log("prediction")
        settings = self._settings("predict")
        plan = self._plan
        return benchmark_predict.measure(settings, rounds=plan.rounds, round_s=plan.round_s)


def _draw_faces(folder: str) -> str:
    path = storage.join(folder, "faces")
    plan = preparation.plan(source="synthetic", output=path, image_size=_IMAGE_SIZE)
    preparation.prepare(plan, log=lambda line: None)
    return path


def _fit(
    work: Callable[[dict[str, Any]], None],
    settings: dict[str, Any],
    config: TrainConfig,
    *,
    workers: int,
) -> dict[str, Any]:
    """Lets workers of Ray Train measure; returns what the first of them wrote."""
    ray_trainer.run_trainer(
        work,
        settings,
        replace(config.scaling, num_workers=workers, max_failures=0),
        run="benchmark",
        failed="a worker of the benchmark failed",
    )
    return storage.read_json(storage.join(settings["folder"], benchmark_workers.RESULT))


def _beside(plan: Plan, found: dict[str, Any], info: DatasetInfo) -> dict[str, Any]:
    """What the numbers are made of, and what was measured on what."""
    model = plan.config.model
    size = model.input_size or info.image_size
    fresh = model.with_fresh_weights()
    network = registry.build(fresh, num_classes=len(info.labels), image_size=info.image_size)
    cost = registry.cost(network, size)
    scaling = plan.config.scaling
    return {
        "targets": {name: KEYS[name].target for name in plan.keys},
        "met": {name: KEYS[name].is_met(v) for name, v in numbers(plan.keys, found).items()},
        "how": {name: KEYS[name].how for name in plan.keys},
        "images_per_s": {name: statistics.median(v) for name, v in found["rounds"].items()},
        "model": {**vars(model), "pixels": size, **vars(cost)},
        "batch": plan.config.schedule.global_batch_size,
        "num_workers": scaling.num_workers,
        "compiled": False,
        "data": plan.config.data or "drawn faces",
        "images": info.split("train").rows,
        "settings": for_measuring(plan.config).to_dict(),
        "git_commit": environment.git_commit(),
        **found,
    }
