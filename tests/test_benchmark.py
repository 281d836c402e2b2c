"""The benchmark: its arithmetic, its rounds, its mistakes; and one run."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from test_jobs import job

from fer_ray.benchmarks import input as benchmark_input
from fer_ray.benchmarks import loops as benchmark_loops
from fer_ray.benchmarks import predict as benchmark_predict
from fer_ray.benchmarks import prepare as benchmark_prepare
from fer_ray.benchmarks import processes, targets
from fer_ray.benchmarks import run as benchmark
from fer_ray.benchmarks import sweeps as benchmark_sweeps
from fer_ray.benchmarks.loops import Plain, Workplace, in_turn, rate, spread, steps_for
from fer_ray.benchmarks.targets import KEYS, numbers, table
from fer_ray.config.schema import TrainConfig
from fer_ray.errors import JobFailed, UserError
from fer_ray.preparation import run as preparation
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


def test_the_default_has_rounds_of_its_own_where_another_precision_was_asked_for():
    rounds = {**MEASURED["rounds"], "train_default": [165.0]}
    found = numbers(["train_over_plain", "default_over_plain_layout"], {"rounds": rounds})
    assert found == pytest.approx({"train_over_plain": 1.1, "default_over_plain_layout": 3.0})


def test_the_table_says_which_targets_are_met_and_which_are_missed():
    result = {
        **WORKED_BY_HAND,
        "images_per_s": {"train": 110.0},
        "startup_s": {"imports": 1.5, "data": 2.0},
        "peak_memory_mib": {"driver": 100.0},
        "ray_cpu_s": {"seconds": 3.0, "raylet": 0.5, "agent": 0.25},
        "num_workers": 2,
    }
    lines = table(result)
    verdicts = {line.split()[0]: line.split()[-1] for line in lines[1 : len(KEYS) + 1]}
    missed = {name for name, verdict in verdicts.items() if verdict == "MISSED"}
    assert set(verdicts) == set(KEYS) and set(verdicts.values()) == {"met", "MISSED"}
    assert missed == {"workers_over_limit"}
    assert "seconds to the first step: 3.5 (imports 1.5, data 2.0)" in lines
    assert any(line.endswith("in 3.0 s of 2 workers: 0.75") for line in lines)
    worse = {**result, "input_us_per_image": 100.1, "train_over_plain": 0.94}
    assert sum(line.endswith("MISSED") for line in table(worse)) == 3


def test_rounds_take_turns_and_the_first_is_not_kept():
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
    assert benchmark_predict.parts_for(50.0, 3.0) == (3, 256)
    assert benchmark_predict.parts_for(400.0, 3.0) == (4, 512)
    assert benchmark_predict.parts_for(1e9, 3.0) == (64, 2048)


def path(count: int = 40, **sections) -> Workplace:
    split = small.split(count)
    images = Images(pixels=split.images, labels=split.labels)
    return Workplace(
        config=benchmark_loops.for_measuring(small.config(**sections)),
        info=small.info(count),
        group=ProcessGroup(),
        threads=1,
        train=images,
        validation=images,
    )


def test_few_images_come_again_and_many_are_spread_over_the_classes():
    images = path().train
    assert len(spread(images, 100).labels) == 100
    some = Images(pixels=images.pixels, labels=np.sort(images.labels))
    assert set(spread(some, 6).labels) == {0, 1, 2}


def test_the_plain_loop_learns_and_sees_what_the_real_one_sees():
    here = path()
    forward = here.trainer(here.feed(2)).forward
    plain = here.plain(forward, 8, 3)
    assert len(plain.batches) == 3 and plain.batches[0][0].shape == (8, 1, 12, 12)
    wanted = forward.normalizer(torch.from_numpy(spread(here.train, 24).pixels[:8]))
    assert torch.equal(plain.batches[0][0], wanted)
    before = [p.detach().clone() for p in plain._model.parameters()]
    assert plain.train(5) == 40
    assert all(not torch.equal(old, new) for old, new in zip(before, plain._model.parameters()))


def test_the_plain_loop_has_the_layout_that_was_asked_for():
    here = path()
    forward = here.trainer(here.feed(2)).forward
    batches = here.plain(forward, 8, 2).batches
    for last in (True, False):
        made = Plain(
            here.config,
            here.info,
            batches,
            ProcessGroup().device,
            bfloat16=False,
            channels_last=last,
        )
        kernels = [p for p in made._model.parameters() if p.ndim == 4 and p.shape[1] > 1]
        kernels = [p for p in kernels if p.shape[2] > 1]
        assert kernels
        layout = torch.channels_last if last else torch.contiguous_format
        assert all(p.is_contiguous(memory_format=layout) for p in kernels)


def test_the_usual_way_gives_what_a_textbook_would(tmp_path):
    here = path(transforms={"augmentation": "none"})
    files = benchmark_input.Files.write(here, here.train, tmp_path, 12)
    assert len(files) == 40 and len(list(tmp_path.rglob("*.jpg"))) == 40
    tensor, label = files[5]
    assert tensor.shape == (1, 12, 12) and tensor.dtype == torch.float32
    assert label == here.train.labels[5] and f"/{small.LABELS[label]}/" in files.paths[5]
    grey = (tensor * files.std + files.mean) * 255
    assert (grey[0] - torch.from_numpy(here.train.pixels[5])).abs().mean() < 12
    changed = benchmark_input.Files.write(path(), here.train, tmp_path / "changed", 24)
    assert changed.pipeline is not None and changed[5][0].shape == (1, 24, 24)


def test_input_is_timed_in_every_way_with_the_same_images(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_input, "_LEAST_EPOCH", 64)
    settings = {"round_s": 0.02, "folder": str(tmp_path), "spare_cpus": 1.0}
    threads = torch.get_num_threads()
    with benchmark_input.Inputs(path(), settings) as inputs:
        found = in_turn(inputs.candidates(["input", "input_naive"]), 1)
    assert set(found) == {"input_one_thread", "input", "input_naive"}
    assert all(math.isfinite(value) and value > 0 for (value,) in found.values())
    assert torch.get_num_threads() == threads


def test_a_stream_of_few_files_reads_them_again():
    described = small.info(12)
    assert benchmark_input.repeated(described, 3).split("train").rows == 36
    assert described.split("train").rows == 12


def test_prediction_is_timed_from_the_first_part_to_the_last(tmp_path):
    rows = {}
    for number, second in enumerate((12, 10, 14)):
        file = tmp_path / f"part-{number}"
        file.touch()
        os.utime(file, ns=(0, second * 10**9))
        rows[file] = 100 * (number + 1)
    assert benchmark_predict.steady_rate(rows) == pytest.approx((100 + 300) / 4)
    for file in rows:
        os.utime(file, ns=(0, 0))
    with pytest.raises(JobFailed, match="too fast"):
        benchmark_predict.steady_rate(rows)


def test_the_kinds_of_processes(monkeypatch):
    lines = {
        10: "/x/raylet/raylet --session=session_7",
        11: "ray::RayTrainWorker.run",
        12: "ray::RayTrainWorker.run",
        13: "ray::IDLE",
        20: "/x/gcs/gcs_server --log_dir=/tmp/session_8/logs",
        30: "python /x/dashboard/dashboard.py --session-dir=/tmp/session_7",
        31: "ray-dashboard-NodeHead-0",
    }
    parents = {10: 1, 11: 10, 12: 11, 13: 10, 20: 1, 30: 1, 31: 30}
    monkeypatch.setattr(processes, "_all", lambda: iter(lines))
    monkeypatch.setattr(processes, "_command_line", lines.__getitem__)
    monkeypatch.setattr(processes, "_stat", lambda p: ["S", str(parents[p])])
    found = processes.kinds("session_7")
    assert found.pop(os.getpid()) == "driver"
    assert found == {
        10: "raylet",
        11: "training worker",
        12: "data loader",
        13: "idle worker",
        30: "dashboard",
        31: "dashboard",
    }
    own = {kind for kind in found.values() if processes.is_rays_own(kind)}
    assert own == {"raylet", "idle worker", "dashboard"}


def test_this_process_is_older_than_this_test_and_has_held_memory():
    assert 0 < time.time() - processes.started_at() < 24 * 3600
    with processes.Callback(lambda: processes.kinds("no such")) as callback:
        peaks = callback.peaks_mib()
    assert set(peaks) == {"driver"} and 10 < peaks["driver"] < 100_000


WRONG = {
    "unknown key": (["--only", "train_over_plane"], "did you mean 'train_over_plain'?"),
    "rounds": (["--rounds", "0"], "'0' is not a whole number >= 1"),
    "model": (["--model", "resnet"], "custom_cnn"),
    "range": (["--rotation", "500"], "from 0 to 180"),
    "no end": (["--round-s", "inf"], "'inf' is not a number above 0"),
}


@pytest.mark.parametrize("case", WRONG, ids=list(WRONG))
def test_mistakes_end_in_one_line_and_status_2(case, tmp_path):
    arguments, message = WRONG[case]
    done = job("benchmark.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("benchmark.py: ") and message in line
    assert not done.stdout and not list(tmp_path.iterdir())


def test_a_plan_finds_mistakes(tmp_path):
    def refused(message: str, settings: TrainConfig | None = None, **arguments) -> None:
        with pytest.raises(UserError, match=message):
            benchmark.plan(settings or on_drawn_faces(num_workers=2), **arguments)

    refused("more than 0", round_s=-1.0)
    refused("and an end", round_s=float("inf"))
    refused("and an end", round_s=float("nan"))
    refused("more than 0", rounds=0)
    refused("--num-workers: workers_over_limit", on_drawn_faces(num_workers=1))
    refused("is a folder", output=str(tmp_path))
    refused("not a folder that can be written to", output="/dev/null/x.json")
    refused("is not a prepared dataset", small.config(scaling={"num_workers": 2}))
    only = ["train_over_plain", "input_us_per_image"]
    plan = benchmark.plan(on_drawn_faces(num_workers=1), only=reversed(only))
    assert list(plan.keys) == only and plan.output == ""
    with pytest.raises(UserError, match="is a folder"):
        augmentation_page.write(str(tmp_path))
    assert not list(tmp_path.iterdir())


def on_drawn_faces(**scaling) -> TrainConfig:
    return TrainConfig.from_dict({**small.config(scaling=scaling).to_dict(), "data": ""})


def test_what_the_machine_lacks_is_refused(ray_cluster):
    said: list[str] = []
    for flags, only, message in (
        ({"cpus_per_worker": 4.0}, "train_over_plain", "4 CPUs requested, the cluster has 2"),
        ({"cpus_per_worker": 1.5}, "workers_over_limit", "3 CPUs wanted"),
        ({"use_gpu": True}, "input_us_per_image", "1 GPUs requested, the cluster has 0"),
    ):
        wanted = benchmark.plan(on_drawn_faces(**{"num_workers": 2, **flags}), only=[only])
        with pytest.raises(UserError, match=message):
            benchmark.measure(wanted, start_ray=lambda: None, log=said.append)
    assert not said


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
        monkeypatch.setattr(benchmark_sweeps, name, value)


@pytest.mark.slow
def test_sweeps_are_measured_without_a_data_set(ray_cluster, small_sweeps):
    """All faces are drawn; the benchmark's and the sweeps' were once in each other's way."""
    only = ["sweep_overhead_s", "asha_saving", "asha_loss"]
    plan = benchmark.plan(on_drawn_faces(num_workers=1), only=only)
    result = benchmark.measure(plan, start_ray=lambda: None, log=lambda line: None)
    assert 0 < result["sweep_overhead_s"] < 60 and 0 < result["asha_saving"] <= 1
    assert result["asha"]["full"]["epochs"] == 12 >= result["asha"]["halved"]["epochs"] > 4
    assert result["sweep"]["trials"] == 2 and list(result["targets"]) == only
    assert result["hardware"]["cores"] and result["versions"]["ray"]
    assert any("4 trials in full: 12 epochs" in line for line in table(result))


@pytest.mark.slow
def test_preparation_is_measured_on_request(ray_cluster, monkeypatch, capfd):
    monkeypatch.setattr(benchmark_prepare, "_FEW", 30)
    monkeypatch.setattr(benchmark_prepare, "_MANY", 60)
    only = [name for name, key in KEYS.items() if key.needs.startswith("prepare")]
    only = ["input_us_per_image", *only]  # without any training beside it
    plan = benchmark.plan(on_drawn_faces(num_workers=1), only=only, rounds=1, round_s=0.1)
    result = benchmark.measure(plan, start_ray=lambda: None, log=lambda line: None)
    assert list(result["targets"]) == only and all(result[name] > 0 for name in only)
    few, many = result["prepare_growth"]["peak_mib"]
    assert {"driver", "raylet", "gcs_server"} <= few.keys() & many.keys()
    assert result["prepare_memory_growth"] == max(many[k] / few[k] for k in few.keys() & many)
    sides = {name: result["rounds"][f"prepare{name}"] for name in ("", "_plain", "_limit")}
    assert all(len(rounds) == 1 for rounds in sides.values())
    assert result["prepare_limit_over_pillow"] == sides["_limit"][0] / sides["_plain"][0]
    assert result["prepare_limit_over_pillow"] > result["prepare_over_pillow"]


@pytest.mark.slow
def test_a_whole_benchmark(ray_cluster, tmp_path):
    data = str(tmp_path / "faces")
    prepared = preparation.plan(source="synthetic", output=data, num_images=400)
    preparation.prepare(prepared, log=lambda line: None)
    sections = {"schedule": {"global_batch_size": 32}, "scaling": {"num_workers": 2}}
    config = TrainConfig.from_dict({**small.config(**sections).to_dict(), "data": data})
    output = str(tmp_path / "out" / "benchmark.json")
    wanted = benchmark.plan(config, output=output, rounds=1, round_s=0.1)
    before = set(Path(tmp_path).iterdir())
    returned = benchmark.measure(wanted, start_ray=lambda: None, log=lambda line: None)
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
    # the precision is float32, which is not what a user gets by default
    assert "train_default" in result["rounds"]
    assert result["batch"] == 32 and result["batch_per_worker"] == 16 and result["threads"] == 1
    assert result["model"]["multiply_adds"] > 0 and result["model"]["pixels"] == 48
    assert result["hardware"]["cores"] and result["versions"]["torch"]
    assert list(result["startup_s"]) == [
        *("imports", "ray", "workers", "data", "model", "first_step"),
    ]
    assert all(seconds >= 0 for seconds in result["startup_s"].values())
    assert {"driver", "training worker", "raylet"} <= result["peak_memory_mib"].keys()
    assert result["ray_cpu_s"]["seconds"] > 0 and "raylet" in result["ray_cpu_s"]
    assert len(result["epochs_s"]) >= 6
    assert targets.table(result)
