"""Networks that are compiled for training: the same numbers, resumed, and only where it pays."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small
import torch
from test_loop import equal, fit, trainer
from torch import nn

from fer_ray.models import checkpoint
from fer_ray.training import compilation

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.Flatten(), nn.Linear(4 * 100, 3))


def test_the_operations_of_an_image_are_counted():
    model = network().train()
    assert compilation.flops_per_image(model, 12) == 2 * (4 * 9 * 100 + 4 * 100 * 3)
    assert model.training


def test_only_long_trainings_on_cpus_are_compiled(monkeypatch):
    monkeypatch.setattr(compilation, "problem", lambda: None)
    flops = 3 * compilation.flops_per_image(network(), 12)
    enough = math.ceil(compilation.FLOPS_THAT_PAY / flops)
    assert compilation.pays(network(), size=12, images=enough, device=CPU)
    assert not compilation.pays(network(), size=12, images=enough - 1, device=CPU)
    assert not compilation.pays(network(), size=12, images=enough, device=torch.device("cuda"))
    monkeypatch.setattr(compilation, "problem", lambda: "no compiler")
    assert not compilation.pays(network(), size=12, images=enough, device=CPU)


def test_auto_compiles_long_runs_of_networks_that_are_faster_then(monkeypatch):
    monkeypatch.setattr(compilation, "problem", lambda: None)
    monkeypatch.setattr(compilation, "compiled", lambda network: network)
    config = small.config()
    assert not trainer(config).compiled
    monkeypatch.setattr(compilation, "FLOPS_THAT_PAY", 1.0)
    assert not trainer(config).compiled
    monkeypatch.setattr(type(config.model), "faster_compiled", True)
    assert trainer(config).compiled
    assert not trainer(small.config(schedule={"compile": "off"})).compiled


WITHOUT_COMPILER = """
import small, test_loop
from fer_ray.training.compilation import CannotCompile
try:
    test_loop.trainer(small.config(schedule={"compile": "on"}))
except CannotCompile as error:
    print(error)
"""


def test_without_a_compiler_a_run_that_wants_one_is_refused(tmp_path):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "CXX": "/no/compiler"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER],
        env=environment | {"XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("--compile: a C++ compiler such as g++ and Python's headers are needed")
    assert line.endswith("install them, or start a run with --compile off")


@pytest.mark.slow
def test_a_compiled_run_computes_the_same_and_resumes_bit_for_bit(tmp_path):
    config = small.config(schedule={"epochs": 3, "compile": "on"})
    whole = trainer(config)
    assert whole.compiled
    expected = fit(whole)
    fit(trainer(config), tmp_path, stop_after=1)
    kept = checkpoint.read(str(tmp_path / "checkpoint_1"))
    assert kept.compiled
    assert equal(fit(trainer(config, resume=kept)), expected)
    plain = fit(trainer(small.config(schedule={"epochs": 3, "compile": "off"})))
    for name, value in plain.items():
        assert torch.allclose(expected[name].double(), value.double(), rtol=1e-3, atol=1e-4), name
