"""How fast this machine trains and predicts, as ratios to baselines measured in the same run.

`measure` runs what `benchmarks.plan` has checked. A ratio divides the medians of two series of
rounds that alternate (A B A B …), so that a change of the machine's speed affects both alike.
Nothing is compiled, unless `--compile on` is given, and the plain loops never are.
"""

from __future__ import annotations

import gzip
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fer_ray import storage
from fer_ray.benchmarks import predict, prepare, processes, steps, sweeps, to_accuracy, workers
from fer_ray.benchmarks.loops import for_measuring
from fer_ray.benchmarks.plan import IMAGE_SIZE, Plan
from fer_ray.benchmarks.targets import KEYS, numbers
from fer_ray.config.schema import TrainConfig
from fer_ray.data.dataset import DatasetInfo, read_info
from fer_ray.errors import UserError
from fer_ray.models import registry
from fer_ray.preparation.plan import plan_preparation
from fer_ray.preparation.run import prepare as prepare_dataset
from fer_ray.runtime import environment, resources
from fer_ray.training import ray_trainer


def measure(
    plan: Plan, *, start_ray: Callable[[], None], log: Callable[[str], None] = print
) -> dict[str, Any]:
    """Starts Ray, measures, and writes the JSON file if there is an output.

    Args:
        plan: from `plan`.
        start_ray: connects to a cluster or starts one.
        log: receives lines of progress.

    Returns:
        The file's content: the numbers of `KEYS` first, then what they are computed from.

    Raises:
        UserError: if the cluster has several machines, or too few CPUs or GPUs.
        JobFailed: if a worker failed.
    """
    startup_s = {"imports": time.time() - processes.started_at()}
    start = time.monotonic()
    start_ray()
    startup_s["ray"] = time.monotonic() - start
    _check_cluster(plan)
    with tempfile.TemporaryDirectory(prefix="fer_ray-benchmark-") as folder:
        run = _Run(plan, folder, log)
        measured = environment.describe(torch.device("cpu")) | run.everything()
    peaks = {"driver": processes.own_peak_mib()}
    if "worker_peak_mib" in measured:
        peaks["training worker"] = measured.pop("worker_peak_mib")
    measured["peak_memory_mib"] = peaks
    measured["startup_s"] = startup_s | measured.get("startup_s", {})
    result = {**numbers(plan.keys, measured), **_details(plan, measured, run.info)}
    result["wall_s"] = time.monotonic() - start
    if plan.output:
        storage.write_json(plan.output, result)
    return result


def _check_cluster(plan: Plan) -> None:
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) > 1:
        raise UserError(
            f"the benchmark measures one machine, but this cluster has {len(nodes)} nodes; run it "
            "without RAY_ADDRESS"
        )
    scaling = plan.config.scaling
    demand = resources.Demand(
        each={"CPU": scaling.cpus_per_worker} | ({"GPU": 1.0} if scaling.use_gpu else {}),
        count=scaling.num_workers if "workers_over_limit" in plan.keys else 1,
        flags={"CPU": "--cpus-per-worker", "GPU": "--use-gpu"},
        hint="a fraction of a CPU may fit; --only measures fewer numbers",
    )
    resources.check(demand, may_wait=False)  # a cluster that grows is not one machine


class _Run:
    """The measurements of one benchmark, in a temporary folder."""

    def __init__(self, plan: Plan, folder: str, log: Callable[[str], None]) -> None:
        self._plan, self._folder, self._log = plan, folder, log
        self._needs = {KEYS[key].needs for key in plan.keys}
        config = for_measuring(plan.config)
        if not config.data:
            config = replace(config, data=_synthetic_faces(folder))
        self.config, self.info = config, read_info(config.data)

    def everything(self) -> dict[str, Any]:
        """All that was measured: ``rounds`` by the name of their series, and details."""
        measurements: dict[str, Callable[[], dict[str, Any]]] = {
            "workers": self._together,
            "predict": self._predict,
            "sweep": lambda: sweeps.overhead(self._subfolder("overhead"), self._log),
            "halving": lambda: sweeps.halving(self._subfolder("halving"), self._log),
            "prepare": self._prepare,
            "prepare_growth": lambda: prepare.growth(self._subfolder("growth"), self._log),
        }
        parts = []
        if names := self._needs & set(workers.MEASURED_ALONE):
            parts.append(self._alone(sorted(names)))
        if self._plan.reports_steps:
            parts.append(self._steps())
        if self._plan.to_accuracy:
            parts.append(self._to_accuracy())
        parts += [measure() for need, measure in measurements.items() if need in self._needs]
        measured: dict[str, Any] = {"rounds": {}}
        for part in parts:
            rounds = measured["rounds"] | part["rounds"]
            measured = part | measured | {"rounds": rounds}
        return measured

    def _subfolder(self, name: str) -> str:
        folder = storage.join(self._folder, name)
        storage.make_directory(folder)
        return folder

    def _settings(self, name: str, **more: Any) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "rounds": self._plan.rounds,
            "round_s": self._plan.round_s,
            "folder": self._subfolder(name),
            **more,
        }

    def _alone(self, names: list[str]) -> dict[str, Any]:
        import ray

        scaling, step_s = self.config.scaling, 0.0
        if {"train", "epochs"} & set(names):
            self._log("timing a step, to size the rounds")
            calibrate = ray.remote(max_calls=1)(workers.calibrate)
            calibrate = calibrate.options(
                num_cpus=scaling.cpus_per_worker, num_gpus=int(scaling.use_gpu)
            )
            step_s = ray.get(calibrate.remote(self.config.to_dict()))
        self._log(f"measuring one worker: {', '.join(names)}")
        spare = ray.cluster_resources()["CPU"] - scaling.cpus_per_worker
        settings = self._settings("alone", names=names, step_s=step_s, spare_cpus=spare)
        settings["default_precision"] = self._plan.config.schedule.precision == "auto"
        start = time.time()
        measured = _fit(workers.measure_alone, settings, self.config, num_workers=1)
        if "startup_s" in measured:
            workers_s = measured.pop("entered_at") - start
            measured["startup_s"] = {"workers": workers_s, **measured["startup_s"]}
        return measured

    def _together(self) -> dict[str, Any]:
        num_workers = self.config.scaling.num_workers
        self._log(f"measuring {num_workers} workers with one thread each")
        settings = self._settings("together")
        return _fit(workers.measure_together, settings, self.config, num_workers=num_workers)

    def _steps(self) -> dict[str, Any]:
        self._log("measuring and profiling training steps")
        settings = self._settings("steps")
        measured = _fit(steps.measure, settings, self.config, num_workers=1)
        if profile := self._plan.profile:
            trace = Path(settings["folder"], steps.TRACE).read_bytes()
            storage.write_bytes(profile, gzip.compress(trace) if _is_gzip(profile) else trace)
            measured["profile"] = profile
        return measured

    def _to_accuracy(self) -> dict[str, Any]:
        percentages = self._plan.to_accuracy
        self._log(f"training to {', '.join(f'{value:g} %' for value in percentages)} accuracy")
        config = replace(self._plan.config, data=self.config.data)
        settings = self._settings("to_accuracy", percentages=percentages)
        settings["config"] = config.to_dict()
        return _fit(to_accuracy.measure, settings, config, num_workers=1)

    def _predict(self) -> dict[str, Any]:
        self._log("measuring prediction")
        rounds, round_s = self._plan.rounds, self._plan.round_s
        return predict.measure(self._settings("predict"), rounds=rounds, round_s=round_s)

    def _prepare(self) -> dict[str, Any]:
        folder, rounds = self._subfolder("prepare"), self._plan.rounds
        return prepare.against_pillow(self.info, folder=folder, rounds=rounds, log=self._log)


def _is_gzip(path: str) -> bool:
    return storage.name_of(path).endswith(".gz")


def _synthetic_faces(folder: str) -> str:
    path = storage.join(folder, "faces")
    plan = plan_preparation(source="synthetic", output=path, image_size=IMAGE_SIZE)
    prepare_dataset(plan, log=lambda line: None)
    return path


def _fit(
    work: Callable[[dict[str, Any]], None],
    settings: dict[str, Any],
    config: TrainConfig,
    *,
    num_workers: int,
) -> dict[str, Any]:
    """Measures in workers of Ray Train; returns the result that the first of them wrote."""
    ray_trainer.run_trainer(
        work,
        settings,
        replace(config.scaling, num_workers=num_workers, max_failures=0),
        run="benchmark",
        failed="a worker of the benchmark failed",
    )
    return storage.read_json(storage.join(settings["folder"], workers.RESULT))


def _details(plan: Plan, measured: dict[str, Any], info: DatasetInfo) -> dict[str, Any]:
    """What the numbers are computed from, and the conditions of the measurement."""
    model = plan.config.model
    size = model.input_size or info.image_size
    network = registry.build(
        model.with_fresh_weights(), num_classes=len(info.labels), image_size=info.image_size
    )
    cost = registry.cost(network, size)
    values = numbers(plan.keys, measured)
    return {
        "targets": {name: KEYS[name].target for name in plan.keys},
        "met": {name: KEYS[name].is_met(v) for name, v in values.items()},
        "how": {name: KEYS[name].how for name in plan.keys},
        "images_per_s": {name: statistics.median(v) for name, v in measured["rounds"].items()},
        "model": {**vars(model), "pixels": size, **vars(cost)},
        "batch": plan.config.schedule.global_batch_size,
        "num_workers": plan.config.scaling.num_workers,
        "compiled": plan.config.schedule.compile == "on",
        "data": plan.config.data or "synthetic faces",
        "images": info.split("train").rows,
        "settings": for_measuring(plan.config).to_dict(),
        "git_commit": environment.git_commit(),
        **measured,
    }
