"""Ray's metrics of a training worker, as Prometheus scrapes them."""

from __future__ import annotations

import re
import threading
import time
import urllib.request

import pytest
import small
import torch

from fer_ray.config.schema import TrainConfig
from fer_ray.training import loop, telemetry
from fer_ray.training import run as training
from fer_ray.training.process_group import ProcessGroup

CPU = torch.device("cpu")


def train(callback: loop.Callback | None, **sections) -> list[dict]:
    """Trains on 24 small images for two epochs of three steps; returns the history."""
    settings = small.config(**sections)
    described, images = small.info(24), small.split(24)
    rows: list[dict] = []

    def report(history, snapshot) -> None:
        rows[:] = history

    loop.train(
        settings,
        described,
        small.feed(settings, images, images, described=described),
        group=ProcessGroup(),
        run="tried",
        report=report,
        callback=callback,
    )
    return rows


class Recorded:
    """Stands for a metric of Ray; keeps what it is set to, or increased by."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.set = self.inc = self.values.append


@pytest.mark.parametrize("every_s", [0.0, 1e9])
def test_the_metrics_follow_the_steps_and_epochs(monkeypatch, every_s):
    monkeypatch.setattr(telemetry, "EVERY_S", every_s)
    callback = telemetry.Telemetry(run="tried", rank=0, device=CPU)
    metrics = {name: Recorded() for name in (*telemetry.GAUGES, *telemetry.COUNTERS)}
    callback._gauges = {name: metrics[name] for name in telemetry.GAUGES}
    callback._counters = {name: metrics[name] for name in telemetry.COUNTERS}
    history = train(callback)
    steps_too = every_s == 0.0
    updates = 4 if steps_too else 1  # of an epoch: its three steps, and its end
    expected = [1] * updates + [2] * updates
    assert metrics["fer_ray_train_epoch"].values == expected
    losses = metrics["fer_ray_train_loss"].values
    for number, row in enumerate(history):
        own = losses[number * updates : (number + 1) * updates]
        assert own[-1] == row["train_loss"]
        if steps_too:  # all steps have as many images: their mean is the epoch's
            assert sum(own[:3]) / 3 == pytest.approx(row["train_loss"], rel=1e-5)
    assert sum(metrics["fer_ray_train_steps"].values) == 6
    assert sum(metrics["fer_ray_train_images"].values) == 48
    assert min(metrics["fer_ray_device_memory_bytes"].values) > 50 * 2**20


def test_telemetry_costs_less_than_a_hundredth_of_a_small_step():
    """The step of a network of a few thousand weights, on one thread, is the shortest there is."""
    loss = torch.zeros(())
    callback = telemetry.Telemetry(run="tried", rank=0, device=CPU)
    took = []
    for _ in range(5):
        start = time.perf_counter()
        for step in range(10_000):
            callback.on_step(1, step, 8, loss)
        took.append((time.perf_counter() - start) / 10_000)
    rows = train(None, schedule={"epochs": 6})
    step_s = min(8 / row["images_per_s"] for row in rows)
    assert min(took) < 0.01 * step_s, f"{min(took):.1e} s of {step_s:.1e} s"


def scrape(ports: list[int]) -> str:
    """The text of the nodes' metrics endpoints."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    texts = [direct.open(f"http://127.0.0.1:{port}/metrics", timeout=10).read() for port in ports]
    return b"\n".join(texts).decode()


def values(text: str, name: str) -> dict[tuple[str, str], float]:
    """A metric's values by run and rank, from Prometheus' format of text."""
    values = {}
    for labels, value in re.findall(rf"^ray_{name}{{(.*)}} (\S+)", text, re.MULTILINE):
        pairs = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        values[pairs["run"], pairs["rank"]] = float(value)
    return values


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
