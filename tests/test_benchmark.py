"""The benchmark: its arithmetic, its rounds, its errors, and a whole run."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from test_jobs import job

from fer_ray.benchmarks import input as input_path
from fer_ray.benchmarks import loops, predict, prepare, processes, run, sweeps, workers
from fer_ray.benchmarks import plan as planning
from fer_ray.benchmarks.loops import PlainLoop, WorkerContext, in_turn, rate, spread, steps_for
from fer_ray.benchmarks.targets import KEYS, numbers, table
from fer_ray.config.schema import TrainConfig
from fer_ray.errors import JobFailed, UserError
from fer_ray.preparation.plan import plan_preparation
from fer_ray.preparation.run import prepare as prepare_dataset
from fer_ray.reporting import augmentation_page
from fer_ray.training.feed import Images
from fer_ray.training.process_group import ProcessGroup

MEASURED = {
    "rounds": {
        "train": [90.0, 110.0, 400.0],
        "train_plain": [100.0, 1.0, 220.0],
        "train_plain_layout": [55.0, 55.0, 44.0],
        "input_one_thread": [20_000.0, 10_000.0, 40_000.0],
        "input": [30.0, 30.0, 30.0],
        "input_naive": [3.0, 2.0, 4.0],
        "stream": [6.0, 7.0, 9.0],
        "predict": [9.0],
        "predict_plain": [10.0],
        "workers": [150.0, 190.0],
        "workers_plain": [200.0, 200.0],
        "prepare": [30.0, 60.0, 50.0],
        "prepare_plain": [10.0, 8.0, 20.0],
        "prepare_many": [45.0],
        "prepare_few": [50.0],
    },
    "prepare_memory_growth": 1.1,
    "epochs_s": [5.0, 3.0, 4.0, 100.0],
    "sweep_overhead_s": 1.5,
    "asha_saving": 0.25,
    "asha_loss": -0.001,
}
WORKED_BY_HAND = {
    "train_over_plain": 110 / 100,
    "default_over_plain_layout": 110 / 55,
    "input_us_per_image": 50.0,
    "input_over_naive": 10.0,
    "stream_over_naive": 7 / 3,
    "predict_over_plain": 0.9,
    "epoch_first_over_later": 5 / 4,
    "workers_over_limit": 170 / 200,
    "sweep_overhead_s": 1.5,
    "asha_saving": 0.25,
    "asha_loss": -0.001,
    "prepare_over_pillow": 5.0,
    "prepare_speed_kept": 0.9,
    "prepare_memory_growth": 1.1,
}


def test_the_numbers_are_ratios_of_medians():
    assert numbers(list(KEYS), MEASURED) == pytest.approx(WORKED_BY_HAND)


def test_the_default_precision_has_its_own_rounds_where_another_is_configured():
    rounds = {**MEASURED["rounds"], "train_default": [165.0]}
    found = numbers(["train_over_plain", "default_over_plain_layout"], {"rounds": rounds})
    assert found == pytest.approx({"train_over_plain": 1.1, "default_over_plain_layout": 3.0})


def test_the_table_shows_which_targets_are_met_and_which_are_missed():
    result = {
        **WORKED_BY_HAND,
        "targets": {name: key.target for name, key in KEYS.items()},
        "images_per_s": {"train": 110.0},
        "startup_s": {"imports": 1.5, "data": 2.0},
        "peak_memory_mib": {"driver": 100.0},
    }
    lines = table(result)
    verdicts = {line.split()[0]: line.split()[-1] for line in lines[1 : len(KEYS) + 1]}
    missed = {name for name, verdict in verdicts.items() if verdict == "MISSED"}
    assert set(verdicts) == set(KEYS) and set(verdicts.values()) == {"met", "MISSED"}
    assert missed == {"workers_over_limit"}
    assert "seconds to the first step: 3.5 (imports 1.5, data 2.0)" in lines
    assert "peak memory in MiB: driver 100" in lines
    worse = {**result, "input_us_per_image": 100.1, "train_over_plain": 0.94}
    assert sum(line.endswith("MISSED") for line in table(worse)) == 3


def test_rounds_alternate_and_the_first_is_dropped():
    order: list[str] = []

    def measured(name: str) -> float:
        order.append(name)
        return float(len(order))

    found = in_turn({"a": lambda: measured("a"), "b": lambda: measured("b")}, 2)
    assert order == ["a", "b"] * 3
    assert found == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_a_rate_is_images_over_the_time_of_whole_passes():
    passes = []

    def work() -> int:
        passes.append(time.sleep(0.02))
        return 10

    start = time.perf_counter()
    found = rate(work, torch.device("cpu"), at_least_s=0.05)
    # each pass sleeps 20 ms or, on a busy machine, longer
    assert 1 <= len(passes) <= 3
    assert 10 * len(passes) / (time.perf_counter() - start) <= found < 10 / 0.02


def test_rounds_have_a_size():
    assert steps_for(0.1, 3.0, 128) == 30
    assert steps_for(60.0, 3.0, 128) == 2
    assert steps_for(1e-9, 3.0, 128) * 128 <= 2**18
    assert predict.parts_for(50.0, 3.0, 256) == (3, 256)
    assert predict.parts_for(400.0, 3.0, 256) == (4, 512)
    assert predict.parts_for(1e9, 3.0, 1024) == (64, 2048)


def context(count: int = 40, **sections) -> WorkerContext:
    split = small.split(count)
    images = Images(pixels=split.images, labels=split.labels)
    return WorkerContext(
        config=loops.for_measuring(small.config(**sections)),
        info=small.info(count),
        group=ProcessGroup(),
        threads=1,
        train=images,
        validation=images,
    )


def test_few_images_are_repeated_and_many_are_spread_over_the_classes():
    images = context().train
    assert len(spread(images, 100).labels) == 100
    some = Images(pixels=images.pixels, labels=np.sort(images.labels))
    assert set(spread(some, 6).labels) == {0, 1, 2}


def test_the_plain_loop_learns_from_the_inputs_of_the_real_one():
    here = context()
    forward = here.trainer(here.feed(2)).forward
    plain = here.plain(forward, 8, 3)
    assert len(plain.batches) == 3 and plain.batches[0][0].shape == (8, 1, 12, 12)
    expected = forward.normalizer(torch.from_numpy(spread(here.train, 24).pixels[:8]))
    assert torch.equal(plain.batches[0][0], expected)
    before = [p.detach().clone() for p in plain._model.parameters()]
    assert plain.train(5) == 40
    assert all(not torch.equal(old, new) for old, new in zip(before, plain._model.parameters()))


def test_the_plain_loop_has_the_requested_memory_layout():
    here = context()
    forward = here.trainer(here.feed(2)).forward
    batches = here.plain(forward, 8, 2).batches
    for channels_last in (True, False):
        loop = PlainLoop(
            here.config,
            here.info,
            batches,
            ProcessGroup().device,
            precision="float32",
            channels_last=channels_last,
        )
        kernels = [p for p in loop._model.parameters() if p.ndim == 4 and p.shape[1] > 1]
        kernels = [p for p in kernels if p.shape[2] > 1]
        assert kernels
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert all(p.is_contiguous(memory_format=layout) for p in kernels)


def test_the_baseline_gives_normalized_images(tmp_path):
    here = context(transforms={"augmentation": "none"})
    files = input_path.JpegDataset.write(here, here.train, tmp_path, 12)
    assert len(files) == 40 and len(list(tmp_path.rglob("*.jpg"))) == 40
    tensor, label = files[5]
    assert tensor.shape == (1, 12, 12) and tensor.dtype == torch.float32
    assert label == here.train.labels[5] and f"/{small.LABELS[label]}/" in files.paths[5]
    grey = (tensor * files.std + files.mean) * 255
    assert (grey[0] - torch.from_numpy(here.train.pixels[5])).abs().mean() < 12
    changed = input_path.JpegDataset.write(context(), here.train, tmp_path / "changed", 24)
    assert changed.pipeline is not None and changed[5][0].shape == (1, 24, 24)


def test_input_is_timed_in_every_way_with_the_same_images(tmp_path, monkeypatch):
    monkeypatch.setattr(input_path, "_MIN_EPOCH_IMAGES", 64)
    settings = {"round_s": 0.02, "folder": str(tmp_path), "spare_cpus": 1.0}
    threads = torch.get_num_threads()
    with input_path.InputBenchmark(context(), settings) as inputs:
        found = in_turn(inputs.candidates(["input", "input_naive"]), 1)
    assert set(found) == {"input_one_thread", "input", "input_naive"}
    assert all(math.isfinite(value) and value > 0 for (value,) in found.values())
    assert torch.get_num_threads() == threads


def test_a_stream_of_few_files_reads_them_repeatedly():
    described = small.info(12)
    assert input_path.repeated(described, 3).split("train").rows == 36
    assert described.split("train").rows == 12


def test_prediction_is_timed_from_the_first_part_to_the_last(tmp_path):
    rows = {}
    for number, second in enumerate((12, 10, 14)):
        file = tmp_path / f"part-{number}"
        file.touch()
        os.utime(file, ns=(0, second * 10**9))
        rows[file] = 100 * (number + 1)
    assert predict.steady_rate(rows) == pytest.approx((100 + 300) / 4)
    for file in rows:
        os.utime(file, ns=(0, 0))
    with pytest.raises(JobFailed, match="too fast"):
        predict.steady_rate(rows)


PARENT = """
import subprocess, sys
held = bytearray(100 * 2**20)
subprocess.run([sys.executable, "-c", "held = bytearray(300 * 2**20); input()"])
"""


def test_the_peak_memory_of_a_process_and_of_those_that_it_starts(monkeypatch):
    monkeypatch.setattr(processes, "_POLL_S", 0.02)
    command = [sys.executable, "-c", PARENT]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as parent,
        processes.PeakMemory(parent.pid) as memory,
    ):
        deadline = time.monotonic() + 60
        while memory.peaks_mib()["largest other process"] < 300:
            assert time.monotonic() < deadline, memory.peaks_mib()
            time.sleep(0.02)
        parent.communicate("\n")
    peaks = memory.peaks_mib()
    assert 100 < peaks["driver"] < 200 and 300 < peaks["largest other process"] < 400


def test_this_process_is_older_than_this_test_and_has_held_memory():
    assert 0 < time.time() - processes.started_at() < 24 * 3600
    assert 10 < processes.own_peak_mib() < 100_000


def test_every_number_is_measured_by_something():
    needs = {key.needs for key in KEYS.values()}
    assert needs == {*workers.MEASURED_ALONE} | {
        *("workers", "predict", "sweep", "halving", "prepare", "prepare_growth"),
    }


WRONG = {
    "unknown key": (["--only", "train_over_plane"], "did you mean 'train_over_plain'?"),
    "rounds": (["--rounds", "0"], "'0' is not a whole number >= 1"),
    "model": (["--model", "resnet"], "custom_cnn"),
    "range": (["--rotation", "500"], "from 0 to 180"),
    "no end": (["--round-s", "inf"], "'inf' is not a number above 0"),
    "accuracy": (["--to-accuracy", "60", "101"], "'101' is not a number above 0, at most 100"),
    "profile": (["--profile", "."], "is a folder; give the path of a file"),
}


@pytest.mark.parametrize("case", WRONG, ids=list(WRONG))
def test_errors_end_in_one_line_and_status_2(case, tmp_path):
    arguments, message = WRONG[case]
    done = job("benchmark.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("benchmark.py: ") and message in line
    assert not done.stdout and not list(tmp_path.iterdir())


def test_a_plan_refuses_wrong_settings(tmp_path):
    def refused(message: str, settings: TrainConfig | None = None, **arguments) -> None:
        with pytest.raises(UserError, match=message):
            planning.plan(settings or on_synthetic_faces(num_workers=2), **arguments)

    refused("above 0", round_s=-1.0)
    refused("and finite", round_s=float("inf"))
    refused("and finite", round_s=float("nan"))
    refused("above 0", rounds=0)
    refused("--num-workers: workers_over_limit", on_synthetic_faces(num_workers=1))
    refused("--output: .* is a folder", output=str(tmp_path))
    refused("--profile: .* is a folder", profile=str(tmp_path))
    refused("--profile: .* is not a writable folder", profile="/dev/null/x.json")
    refused("not a writable folder", output="/dev/null/x.json")
    refused("is not a prepared dataset", small.config(scaling={"num_workers": 2}))
    only = ["train_over_plain", "input_us_per_image"]
    plan = planning.plan(on_synthetic_faces(num_workers=1), only=reversed(only))
    assert list(plan.keys) == only and plan.output == ""
    with pytest.raises(UserError, match="is a folder"):
        augmentation_page.write(str(tmp_path))
    assert not list(tmp_path.iterdir())


def on_synthetic_faces(**scaling) -> TrainConfig:
    return TrainConfig.from_dict({**small.config(scaling=scaling).to_dict(), "data": ""})


def test_resources_that_the_machine_lacks_are_refused(ray_cluster):
    logged: list[str] = []
    for flags, only, message in (
        ({"cpus_per_worker": 4.0}, "train_over_plain", "4 CPUs requested, the cluster has 2"),
        ({"cpus_per_worker": 1.5}, "workers_over_limit", "3 CPUs requested"),
        ({"use_gpu": True}, "input_us_per_image", "1 GPUs requested, the cluster has 0"),
    ):
        plan = planning.plan(on_synthetic_faces(**{"num_workers": 2, **flags}), only=[only])
        with pytest.raises(UserError, match=message):
            run.measure(plan, start_ray=lambda: None, log=logged.append)
    assert not logged


@pytest.fixture
def small_sweeps(monkeypatch):
    """Two trials for the overhead, four of three epochs for the halving."""
    grid = {
        "optimizer.learning_rate": [0.0005, 0.02],
        "transforms.normalization": ["none", "clahe"],
    }
    for name, value in {
        "_OVERHEAD_TRIALS": 2,
        "_OVERHEAD_IMAGES": 300,
        "_HALVING_IMAGES": 300,
        "_HALVING_EPOCHS": 3,
        "_GRID": grid,
    }.items():
        monkeypatch.setattr(sweeps, name, value)


@pytest.mark.slow
def test_sweeps_are_measured_without_a_data_set(ray_cluster, small_sweeps):
    """The benchmark's synthetic faces and those of its sweeps lie in separate folders."""
    only = ["sweep_overhead_s", "asha_saving", "asha_loss"]
    plan = planning.plan(on_synthetic_faces(num_workers=1), only=only)
    result = run.measure(plan, start_ray=lambda: None, log=lambda line: None)
    assert 0 < result["sweep_overhead_s"] < 60 and 0 < result["asha_saving"] <= 1
    assert result["asha"]["full"]["epochs"] == 12 >= result["asha"]["halved"]["epochs"] > 4
    assert result["sweep"]["trials"] == 2 and list(result["targets"]) == only
    assert result["hardware"]["cores"] and result["versions"]["ray"]
    assert any("4 trials in full: 12 epochs" in line for line in table(result))


@pytest.mark.slow
def test_preparation_is_measured_on_request(ray_cluster, monkeypatch, capfd):
    monkeypatch.setattr(prepare, "_FEW", 30)
    monkeypatch.setattr(prepare, "_MANY", 60)
    only = [name for name, key in KEYS.items() if key.needs.startswith("prepare")]
    only = ["input_us_per_image", *only]  # without any training beside it
    plan = planning.plan(on_synthetic_faces(num_workers=1), only=only, rounds=1, round_s=0.1)
    result = run.measure(plan, start_ray=lambda: None, log=lambda line: None)
    assert list(result["targets"]) == only and all(result[name] > 0 for name in only)
    few, many = result["prepare_growth"]["peak_mib"]
    assert few.keys() == many.keys() == {"driver", "largest other process"}
    assert all(peak > 50 for peak in (*few.values(), *many.values()))
    assert result["prepare_memory_growth"] == max(many[name] / few[name] for name in few)
    series = {name: result["rounds"][f"prepare{name}"] for name in ("", "_plain", "_limit")}
    assert all(len(rounds) == 1 for rounds in series.values())
    assert result["prepare_limit_over_pillow"] == series["_limit"][0] / series["_plain"][0]
    assert result["prepare_limit_over_pillow"] > result["prepare_over_pillow"]


@pytest.mark.slow
def test_a_whole_benchmark(ray_cluster, tmp_path):
    data = str(tmp_path / "faces")
    prepared = plan_preparation(source="synthetic", output=data, num_images=400)
    prepare_dataset(prepared, log=lambda line: None)
    sections = {"schedule": {"global_batch_size": 32}, "scaling": {"num_workers": 2}}
    config = TrainConfig.from_dict({**small.config(**sections).to_dict(), "data": data})
    output = str(tmp_path / "out" / "benchmark.json")
    plan = planning.plan(config, output=output, rounds=1, round_s=0.1)
    before = set(Path(tmp_path).iterdir())
    returned = run.measure(plan, start_ray=lambda: None, log=lambda line: None)
    assert {path.name for path in set(Path(tmp_path).iterdir()) - before} == {"out"}
    result = json.loads(Path(output).read_text())
    assert result == json.loads(json.dumps(returned))
    default = {name for name, key in KEYS.items() if key.of_model}
    for key in default:
        assert type(result[key]) is float and math.isfinite(result[key]), key
        assert result[key] > 0, key
    assert result["met"].keys() == result["targets"].keys() == default
    for rounds in result["rounds"].values():
        assert len(rounds) == 1 and rounds[0] > 0
    # the precision is float32, which is not the default
    assert "train_default" in result["rounds"]
    assert result["batch"] == 32 and result["batch_per_worker"] == 16 and result["threads"] == 1
    assert result["model"]["multiply_adds"] > 0 and result["model"]["pixels"] == 48
    assert result["hardware"]["cores"] and result["versions"]["torch"]
    assert list(result["startup_s"]) == [
        *("imports", "ray", "workers", "data", "model", "first_step"),
    ]
    assert all(seconds >= 0 for seconds in result["startup_s"].values())
    assert list(result["peak_memory_mib"]) == ["driver", "training worker"]
    assert all(peak > 100 for peak in result["peak_memory_mib"].values())
    assert len(result["epochs_s"]) >= 6
    assert table(result)
