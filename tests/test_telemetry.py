"""What workers tell: lines of JSON in the run's folder, and metrics that Prometheus can scrape."""

from __future__ import annotations

import json
import re
import statistics
import threading
import time
import urllib.request
from pathlib import Path

import boto3
import pandas as pd
import pytest
import small
import torch

from fer_ray import storage
from fer_ray.config.schema import TrainConfig
from fer_ray.training import loop, telemetry
from fer_ray.training import run as training
from fer_ray.training.process_group import ProcessGroup

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def train(folder: str, *, callback: bool = True, **sections) -> list[dict]:
    """Trains on 24 small images for two epochs of three steps; returns the history."""
    settings = small.config(**sections)
    described, images = small.info(24), small.split(24)
    told = telemetry.Telemetry(run="tried", rank=0, folder=folder, device=CPU)
    kept: list[dict] = []

    def report(history, save) -> None:
        kept[:] = history

    with told:
        loop.train(
            settings,
            described,
            small.feed(settings, images, images, described=described),
            group=ProcessGroup(),
            run="tried",
            report=report,
            callback=told if callback else None,
        )
    return kept


def lines(folder: str) -> list[dict]:
    path = storage.join(folder, telemetry.FOLDER)
    return [
        json.loads(line)
        for name in storage.list_names(path)
        for line in storage.read_bytes(storage.join(path, name)).decode().splitlines()
    ]


def test_each_line_is_whole_and_says_who_and_where(tmp_path, monkeypatch):
    monkeypatch.setattr(telemetry, "EVERY_S", 0.0)
    history = train(str(tmp_path))
    found = lines(str(tmp_path))
    epoch = ["step", "step", "step", "epoch"]
    assert [line["event"] for line in found] == ["start", *epoch, *epoch, "end"]
    assert all(tuple(line) == telemetry.FIELDS for line in found)
    assert {(line["run"], line["rank"]) for line in found} == {("tried", 0)}
    steps = [line for line in found if line["event"] == "step"]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in steps] == [1, 1, 1, 2, 2, 2]
    # the images of each step are as many: the mean of the steps is that of the epoch
    for row, first in zip(history, (0, 3)):
        mean = statistics.mean(line["loss"] for line in steps[first : first + 3])
        assert mean == pytest.approx(row["train_loss"], rel=1e-5)
    epochs = [line for line in found if line["event"] == "epoch"]
    assert [line["loss"] for line in epochs] == [row["train_loss"] for row in history]
    assert all(line["images_per_s"] > 0 and line["device_memory_bytes"] > 2**20 for line in epochs)


def test_a_sitting_has_a_file_of_its_own_and_pandas_reads_them(tmp_path):
    train(str(tmp_path))
    train(str(tmp_path), schedule={"epochs": 1})
    names = sorted((tmp_path / "logs").iterdir())
    assert len(names) == 2 and all(re.search(r"-rank-00000\.jsonl$", str(name)) for name in names)
    frame = pd.concat([pd.read_json(name, lines=True) for name in names])
    assert frame["event"].tolist() == ["start", "epoch", "epoch", "end", "start", "epoch", "end"]


def test_how_a_worker_failed_is_its_last_line(tmp_path):
    with pytest.raises(loop.NotFinite):
        rate = {"learning_rate": 100.0, "clip_grad_norm": 0.0}
        model, schedule = {"name": "sequential_cnn"}, {"warmup_epochs": 0}
        train(str(tmp_path), model=model, optimizer=rate, schedule=schedule)
    last = lines(str(tmp_path))[-1]
    assert last["event"] == "failed" and last["message"].startswith("NotFinite: the loss or its")


def test_storage_that_fails_stops_no_training(tmp_path):
    (tmp_path / "logs").write_text("not a folder")
    assert len(train(str(tmp_path))) == 2


def test_lines_reach_an_object_store(store, monkeypatch):
    boto3.client("s3").create_bucket(Bucket="told")
    train("s3://told/run")
    assert [line["event"] for line in lines("s3://told/run")] == ["start", "epoch", "epoch", "end"]


def test_telling_costs_less_than_a_hundredth_of_a_small_step(tmp_path, monkeypatch):
    """The step of a network of a few thousand weights, on one thread, is the shortest there is."""
    loss = torch.zeros(())
    with telemetry.Telemetry(run="tried", rank=0, folder=str(tmp_path), device=CPU) as told:
        took = []
        for _ in range(5):
            start = time.perf_counter()
            for step in range(10_000):
                told.on_step(1, step, 8, loss)
            took.append((time.perf_counter() - start) / 10_000)
    rows = train(str(tmp_path), callback=False, schedule={"epochs": 6})
    step_s = min(8 / row["images_per_s"] for row in rows)
    assert min(took) < 0.01 * step_s, f"{min(took):.1e} s of {step_s:.1e} s"


def scrape(ports: list[int]) -> str:
    """What the nodes' endpoints of metrics say."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    texts = [direct.open(f"http://127.0.0.1:{port}/metrics", timeout=10).read() for port in ports]
    return b"\n".join(texts).decode()


def values(text: str, name: str) -> dict[tuple[str, str], float]:
    """A metric's values by run and rank, from Prometheus' format of text."""
    found = {}
    for labels, value in re.findall(rf"^ray_{name}{{(.*)}} (\S+)", text, re.MULTILINE):
        pairs = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        found[pairs["run"], pairs["rank"]] = float(value)
    return found


@pytest.mark.slow
def test_the_metrics_can_be_scraped_while_two_workers_train(ray_cluster, drawn_faces, tmp_path):
    values_of = small.config(
        schedule={"epochs": 10_000, "time_limit_s": 32.0, "global_batch_size": 32},
        scaling={"num_workers": 2},
    ).to_dict()
    plan = training.plan(
        TrainConfig.from_dict({**values_of, "data": drawn_faces}),
        storage_path=str(tmp_path),
        run="scraped",
    )
    results: list[dict] = []
    thread = threading.Thread(target=lambda: results.append(training.fit(plan, log=lambda _: None)))
    thread.start()
    ports = [node["MetricsExportPort"] for node in ray_cluster.nodes() if node["Alive"]]
    both = {("scraped", "0"), ("scraped", "1")}
    text = ""
    while thread.is_alive() and not both <= values(text, "fer_ray_train_steps_total").keys():
        time.sleep(1)
        text = scrape(ports)
    thread.join()
    (result,) = results
    for name in (*telemetry.GAUGES, *(f"{name}_total" for name in telemetry.COUNTERS)):
        assert both <= values(text, name).keys(), name
    steps, images = (values(text, f"fer_ray_train_{name}_total") for name in ("steps", "images"))
    for key in both:
        assert images[key] == 16 * steps[key] > 0
    speed = sum(values(text, "fer_ray_train_images_per_s")[key] for key in both)
    assert 0.05 * result["images_per_s"] < speed < 5 * result["images_per_s"]  # of one epoch
    assert min(values(text, "fer_ray_device_memory_bytes")[key] for key in both) > 50 * 2**20
    told = lines(plan.folder)
    assert {line["rank"] for line in told} == {0, 1}
    epochs = [line["epoch"] for line in told if line["event"] == "epoch" and line["rank"] == 1]
    assert epochs == list(range(1, result["epochs"] + 1))
