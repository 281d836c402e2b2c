"""What the benchmark reports of training steps: profile, counts, limits, seconds to an accuracy."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fake_cuda
import pytest
import small
import torch

from fer_ray.benchmarks import loops, peaks, run, steps, to_accuracy, trace
from fer_ray.benchmarks import plan as planning
from fer_ray.benchmarks.loops import WorkerContext
from fer_ray.benchmarks.steps import ByteCounter, fractions
from fer_ray.benchmarks.targets import table
from fer_ray.config.schema import TrainConfig
from fer_ray.data.run_folder import RunFolder
from fer_ray.errors import UserError
from fer_ray.models import registry
from fer_ray.preparation.plan import plan_preparation
from fer_ray.preparation.run import prepare
from fer_ray.training.feed import Images
from fer_ray.training.process_group import ProcessGroup

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
H200 = peaks.PEAKS["NVIDIA H200"]


def context(device: torch.device = CPU, **sections) -> WorkerContext:
    split = small.split(48)
    images = Images(pixels=split.images, labels=split.labels)
    return WorkerContext(
        config=loops.for_measuring(small.config(**sections)),
        info=small.info(48),
        group=ProcessGroup(device=device),
        threads=1,
        train=images,
        validation=images,
    )


# the trace


@pytest.fixture(scope="module")
def events(tmp_path_factory) -> list[dict]:
    """The events of a trace of steps on the CPU; the trainer is afterwards as before."""
    here = context()
    trainer = here.trainer(here.feed(trace.STEPS_TO_RUN))
    before = (trainer.feed, trainer.forward, torch.Tensor.backward)
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    trace.record(trainer, 0, path)
    assert (trainer.feed, trainer.forward, torch.Tensor.backward) == before
    assert trainer.callback is None
    return trace.read(path)


def test_a_trace_names_the_parts_of_each_step(events):
    named = [event for event in events if event.get("cat") == "user_annotation"]
    starts = {"optimizer": "Optimizer.step#SGD.step"}
    begun = [event for event in named if event["name"].startswith("ProfilerStep#")]
    assert len(begun) == trace.STEPS
    for step in begun:
        inside = [
            event["name"]
            for event in sorted(named, key=lambda event: event["ts"])
            if step["ts"] < event["ts"] and event["ts"] + event["dur"] <= step["ts"] + step["dur"]
        ]
        names = [starts.get(name, name) for name in trace.RANGES]
        assert [name for name in inside if name in names] == names
    assert any(event["name"] == "aten::convolution_backward" for event in events)


def test_a_trace_of_a_cpu_has_the_time_of_each_part_and_nothing_of_a_gpu(events):
    summary = trace.summarize(events)
    assert summary["profiled_steps"] == trace.STEPS
    assert list(summary["range_ms"]) == list(trace.RANGES)
    assert all(ms > 0 for ms in summary["range_ms"].values())
    steps_ms = [event["dur"] / 1e3 for event in events if "ProfilerStep#" in event["name"]]
    assert sum(summary["range_ms"].values()) < sum(steps_ms) / trace.STEPS
    assert summary["kernels"] is None and summary["host_synchronizations"] is None


def event(cat: str, name: str, ts: float, dur: float, correlation: int | None = None) -> dict:
    """An event as Kineto writes it."""
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}


ON_A_GPU = [
    # two steps of 1 ms each
    event("user_annotation", "ProfilerStep#1", 1000.0, 1000.0),
    event("user_annotation", "ProfilerStep#2", 2000.0, 1000.0),
    event("gpu_user_annotation", "ProfilerStep#1", 1500.0, 9000.0),
    event("user_annotation", "forward", 1100.0, 300.0),
    event("user_annotation", "forward", 2100.0, 100.0),
    event("user_annotation", "forward", 900.0, 50.0),
    event("user_annotation", "Optimizer.step#SGD.step", 1800.0, 80.0),
    event("user_annotation", "Optimizer.zero_grad#SGD.zero_grad", 1700.0, 80.0),
    # started by the step before, which is not one of the two
    event("cuda_runtime", "cudaLaunchKernel", 950.0, 5.0, 1),
    event("kernel", "convolve", 1010.0, 400.0, 1),
    event("cuda_runtime", "cudaMemcpyAsync", 1020.0, 5.0, 2),
    event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 1450.0, 50.0, 2),
    event("cuda_runtime", "cudaLaunchKernel", 1130.0, 5.0, 3),
    event("kernel", "convolve", 1480.0, 100.0, 3),
    event("cuda_driver", "cuLaunchKernelEx", 1140.0, 5.0, 4),
    event("kernel", "triton", 1500.0, 20.0, 4),
    event("cuda_runtime", "cudaMemcpyAsync", 2050.0, 200.0, 5),
    event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 2060.0, 10.0, 5),
    event("cuda_runtime", "cudaStreamSynchronize", 2260.0, 100.0, 6),
    event("cuda_runtime", "cudaStreamWaitEvent", 2370.0, 1.0, 7),
    # the GPU is behind: it computes this after the last step
    event("cuda_runtime", "cudaLaunchKernel", 2990.0, 5.0, 8),
    event("kernel", "convolve", 3500.0, 300.0, 8),
    # what the profiler itself does afterwards
    event("cuda_runtime", "cudaDeviceSynchronize", 3010.0, 900.0, 9),
    {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "python"}},
    {"ph": "f", "cat": "ac2g", "name": "ac2g", "id": 3, "ts": 1480.0},
]


def test_a_trace_of_a_gpu_is_summarized():
    summary = trace.summarize(ON_A_GPU)
    assert summary["profiled_steps"] == 2
    assert summary["range_ms"] == pytest.approx(
        {"input": 0.0, "forward": 0.2, "backward": 0.0, "optimizer": 0.04}
    )
    assert summary["kernels"] == 3 / 2
    # 1450 to 1580 (three that overlap), 2060 to 2070, 3500 to 3800: 440 us in two steps
    assert summary["gpu_ms"] == pytest.approx(0.22)
    assert summary["synchronizing_calls"] == {"cudaStreamSynchronize": 1 / 2}
    assert summary["host_synchronizations"] == 1 / 2 == summary["pageable_copies"]
    assert summary["top_kernels"] == [
        {"name": "convolve", "ms": pytest.approx(0.2), "calls": 1.0},
        {"name": "triton", "ms": pytest.approx(0.01), "calls": 0.5},
    ]


# counts and limits


def test_bytes_are_those_that_operations_read_and_write():
    a, b = torch.ones(1000), torch.ones(1000)

    def moved(work) -> int:
        with ByteCounter(CPU) as counter:
            work()
        return counter.num_bytes

    assert moved(lambda: a + b) == 3 * 4000
    assert moved(lambda: a.mul_(2.0)) == 2 * 4000
    assert moved(lambda: a.view(10, 100).t()) == 0
    assert moved(lambda: torch.empty(1000)) == 0
    assert moved(lambda: a.to(torch.bfloat16)) == 4000 + 2000
    assert moved(lambda: torch._foreach_add([a, b], 1.0)) == 4 * 4000
    assert moved(lambda: torch.ones(1).expand(1000) + a) == 4 + (4 + 4000 + 4000)
    with ByteCounter(GPU) as counter:
        assert (a + b).sum() > 0
    assert counter.num_bytes == 0


def test_a_step_computes_three_times_a_forward_pass_on_a_cpu_and_on_a_gpu():
    """Backward computes two gradients of each layer, but for the image's."""
    here = context(schedule={"precision": "float32"})
    flops, num_bytes = steps._Steps(here).counts()
    network = registry.build(here.config.model, num_classes=3, image_size=12)
    forward = 2 * registry.cost(network, 12).multiply_adds * 8
    assert 2.5 * forward < flops < 3 * forward
    with fake_cuda.fake_cuda():
        on_gpu = steps._Steps(context(GPU, schedule={"precision": "float32"})).counts()
    assert on_gpu[0] == flops
    weights = sum(p.numel() for p in network.parameters())
    # batch norm in groups is one operation on a CPU, and several on a GPU
    assert 4 * 10 * weights < num_bytes < on_gpu[1] < 2 * num_bytes


def test_limits_are_those_of_the_device_and_null_where_unknown(monkeypatch):
    named = {"name": "NVIDIA H200"}
    properties = lambda device: SimpleNamespace(**named)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    assert peaks.of(GPU) is H200 and peaks.of(CPU) is None
    named["name"] = "NVIDIA H200 MIG 1g.18gb"
    assert peaks.of(GPU) is None
    step = {"flops": 989_500_000_000, "num_bytes": 4_800_000_000, "step_s": 0.01}
    values = fractions(**step, precision="bfloat16", limits=H200)
    assert values["fraction_of_peak_flops"] == pytest.approx(0.1)
    assert values["fraction_of_bandwidth"] == pytest.approx(0.1)
    assert values["peaks"]["source"] == "NVIDIA H200 SXM data sheet"
    slower = fractions(**step, precision="float32", limits=H200)
    assert slower["fraction_of_peak_flops"] == pytest.approx(0.1 * 989.5 / 67)
    unknown = fractions(**step, precision="bfloat16", limits=None)
    nulls = {"fraction_of_peak_flops": None, "fraction_of_bandwidth": None, "peaks": None}
    assert unknown == {"flops_per_step": 989_500_000_000, "bytes_per_step": 4_800_000_000, **nulls}
    t4 = fractions(**step, precision="bfloat16", limits=peaks.PEAKS["Tesla T4"])
    assert t4["fraction_of_peak_flops"] is None and t4["fraction_of_bandwidth"] > 0


@pytest.mark.parametrize("name", peaks.PEAKS)
def test_each_data_sheet_is_plausible(name):
    """The more exact the slower; numbers with sparsity would be twice as high."""
    limits = peaks.PEAKS[name]
    speeds = [limits.flops[p] for p in ("float32", "tf32", "bfloat16") if p in limits.flops]
    assert speeds == sorted(speeds) and speeds[0] >= 8e12 and speeds[-1] < 1e15
    if len(speeds) == 3:
        assert limits.flops["bfloat16"] / limits.flops["tf32"] == pytest.approx(2, rel=0.02)
    assert 3e11 <= limits.bytes_per_s <= 4.8e12


def test_the_report_of_a_cpu_is_complete(tmp_path):
    report = steps.report(context(), rounds=2, round_s=0.02, path=tmp_path / "trace.json")
    measured = ("images_per_s", "step_s", "flops_per_step", "bytes_per_step")
    for name in (*measured, "validation_s", "checkpoint_copy_s", "checkpoint_write_s"):
        assert math.isfinite(report[name]) and report[name] > 0, name
    assert report["images_per_s"] * report["step_s"] == pytest.approx(8)
    for name in ("device_busy", "fraction_of_peak_flops", "kernels", "peak_gpu_memory_mib"):
        assert report[name] is None, name
    assert report["precision"] == "float32"
    json.dumps(report, allow_nan=False)


# seconds to an accuracy


def timed(accuracies: list[float], percentages: list[float], tmp_path, monkeypatch, **schedule):
    """Trains with prescribed accuracies; returns the result and the lines that are logged."""
    here = context()
    config = small.config(schedule={"epochs": len(accuracies), **schedule})
    here = replace(here, config=config)
    trainer = here.trainer(here.feed(2))
    remaining = iter(accuracies)
    validated = trainer.evaluate
    monkeypatch.setattr(trainer, "evaluate", lambda: {**validated(), "accuracy": next(remaining)})
    lines: list[str] = []
    run = RunFolder(str(tmp_path / "run"))
    return to_accuracy.train(trainer, percentages, run, log=lines.append), lines


def test_each_accuracy_has_the_seconds_until_it_was_reached_first(tmp_path, monkeypatch):
    accuracies = [0.5, 0.62, 0.58, 0.65, 0.64]
    result, lines = timed(accuracies, [60.0, 65.0, 70.5], tmp_path, monkeypatch)
    reached = result["reached"]
    assert list(reached) == ["60", "65", "70.5"]
    assert [reached["60"]["epoch"], reached["65"]["epoch"], reached["70.5"]] == [2, 4, None]
    for name in ("60", "65"):
        parts = [reached[name][f"{part}_s"] for part in ("train", "validation", "checkpoint")]
        assert all(part > 0 for part in parts)
        assert reached[name]["seconds"] == pytest.approx(sum(parts))
    assert reached["65"]["train_s"] > reached["60"]["train_s"]
    assert result["epochs"] == len(lines) == 5 and result["best"] == 0.65
    assert lines[1].startswith("epoch 2/5: validation accuracy 62.00% after ")


def test_training_ends_when_all_accuracies_are_reached_or_the_schedule_does(tmp_path, monkeypatch):
    accuracies = [0.5, 0.6, 0.7, 0.8]
    result, _ = timed(accuracies, [55.0, 60.0], tmp_path, monkeypatch)
    assert result["epochs"] == 2 and result["reached"]["60"]["epoch"] == 2
    accuracies = [0.5, 0.4, 0.4, 0.9]
    result, _ = timed(accuracies, [80.0], tmp_path / "2", monkeypatch, patience=2)
    assert result["epochs"] == 3 and result["reached"] == {"80": None}
    kept = RunFolder(str(tmp_path / "2" / "run")).checkpoint_paths()
    assert len(kept) == 2  # the best and the last, as in a run


# settings and lines


def on_synthetic_faces(**sections) -> TrainConfig:
    return TrainConfig.from_dict({**small.config(**sections).to_dict(), "data": ""})


def test_a_profile_and_accuracies_are_measured_alone_unless_numbers_are_listed(tmp_path):
    config = on_synthetic_faces()
    path = str(tmp_path / "trace.json")
    assert planning.plan(config, profile=path).keys == ()
    assert planning.plan(config, to_accuracy=[60.0]).keys == ()
    both = planning.plan(config, profile=path, only=["train_over_plain"])
    assert both.keys == ("train_over_plain",) and both.profile == path and both.reports_steps
    on_gpu = on_synthetic_faces(scaling={"use_gpu": True})
    assert planning.plan(on_gpu, only=["train_over_plain"]).reports_steps
    assert not planning.plan(on_gpu, only=["input_us_per_image"]).reports_steps
    assert not planning.plan(config, only=["train_over_plain"]).reports_steps


def test_a_batch_of_more_images_than_there_are_cannot_reach_an_accuracy(drawn_faces):
    config = replace(on_synthetic_faces(schedule={"global_batch_size": 512}), data=drawn_faces)
    message = "--global-batch-size: 512 is more than the 320 labelled images of the train split"
    with pytest.raises(UserError, match=message):
        planning.plan(config, to_accuracy=[60.0])


def test_the_lines_of_a_gpu():
    step = {
        "precision": "bfloat16",
        "images_per_s": 25_600.0,
        "step_s": 0.005,
        "flops_per_step": 109e9,
        "fraction_of_peak_flops": 0.022,
        "bytes_per_step": 2**31,
        "fraction_of_bandwidth": 0.0895,
        "range_ms": {"input": 0.5, "forward": 1.25},
        "kernels": 812.0,
        "device_busy": 0.61,
        "host_synchronizations": 0.0,
        "pageable_copies": 0.1,
        "peak_gpu_memory_mib": 2048.0,
        "validation_s": 0.25,
        "checkpoint_copy_s": 0.002,
        "checkpoint_write_s": 0.02,
    }
    reached = {"epoch": 9, "train_s": 60.0, "validation_s": 2.0, "checkpoint_s": 0.5}
    accuracy = {"60": {**reached, "seconds": 62.5}, "70": None}
    result = {
        "targets": {},
        "images_per_s": {},
        "startup_s": {},
        "peak_memory_mib": {"driver": 100.0},
        "step": step,
        "to_accuracy": {"reached": accuracy, "epochs": 36, "best": 0.681},
    }
    assert table(result) == [
        "peak memory in MiB: driver 100",
        "",
        "a training step in bfloat16: 5.00 ms, 25,600 images/s",
        "  computes 109.0 GFLOP, 2.2% of the peak",
        "  moves about 2,048 MiB in memory, 8.9% of the bandwidth",
        "  the host's ms in a profiled step: input 0.50, forward 1.25",
        "  the GPU is busy 61.0% of the time, in 812 kernels; 0 host synchronizations, "
        "0.1 copies of pageable memory",
        "  at most 2,048 MiB of GPU memory",
        "  validation 0.25 s, a checkpoint 0.002 s to copy and 0.020 s to write",
        "",
        "seconds to a validation accuracy: training + validation + checkpoints",
        "  60 %: 62.5 = 60.0 + 2.0 + 0.5, epoch 9",
        "  70 %: not reached",
        "  best of 36 epochs: 68.10%",
    ]


@pytest.mark.slow
def test_a_profile_and_accuracies_of_a_whole_run(ray_cluster, tmp_path):
    data = str(tmp_path / "faces")
    prepared = plan_preparation(source="synthetic", output=data, num_images=400)
    prepare(prepared, log=lambda line: None)
    config = replace(on_synthetic_faces(schedule={"epochs": 1}), data=data)
    profile, output = tmp_path / "out" / "trace.json.gz", str(tmp_path / "out" / "benchmark.json")
    plan = planning.plan(
        config,
        profile=str(profile),
        to_accuracy=[1.0, 100.0],
        output=output,
        rounds=1,
        round_s=0.1,
    )
    run.measure(plan, start_ray=lambda: None, log=lambda line: None)
    events = json.loads(gzip.decompress(profile.read_bytes()))
    assert {"input", "forward", "backward"} <= {e["name"] for e in events["traceEvents"]}
    result = json.loads(Path(output).read_text())
    assert result["profile"] == str(profile) and result["targets"] == {}
    assert result["step"]["images_per_s"] > 0 and result["step"]["profiled_steps"] == trace.STEPS
    assert result["to_accuracy"]["reached"]["1"]["epoch"] == 1
    assert result["to_accuracy"]["reached"]["100"] is None
    assert result["to_accuracy"]["epochs"] == 1
    assert table(result)
