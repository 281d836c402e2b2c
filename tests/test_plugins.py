"""What is added from outside the package: a model, an augmentation, a normalization, a schedule.

A plugin is a module that registers them. They have to show up in flags, help, sweeps, histories
and reports by themselves, in the driver and in Ray's processes. Metrics and sources have tests of
their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from fer_ray.registry import PLUGINS

ROOT = Path(__file__).resolve().parents[1]

PLUGIN = '''
"""A toy of each kind. The model and the schedule note which modules their process has loaded."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from fer_ray.config.fields import Search, number
from fer_ray.config.model import ModelConfig
from fer_ray.config.registries import AUGMENTATIONS, LR_SCHEDULES, MODELS, NORMALIZATIONS
from fer_ray.transforms.normalization import Normalization
from fer_ray.transforms.operation import Option, PixelChange


def note(name):
    loaded = sorted(module for module in sys.modules)
    (Path(os.environ["TOY_NOTES"]) / f"{name}.json").write_text(json.dumps(loaded))


class ToyNetwork(nn.Module):
    def __init__(self, hidden, num_classes, input_size):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(input_size**2, hidden),
            nn.ReLU(),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, x):
        if not self.training and "RAY_JOB_ID" in os.environ:
            note("predicting")
        return self.layers(x)


@MODELS.register("toy_net")
@dataclass(frozen=True, kw_only=True)
class ToyConfig(ModelConfig):
    """Two dense layers."""

    hidden: int = number(8, 1, 64, search=Search(factors=(0.5, 2.0)))
    """Units of the hidden layer."""

    def build(self, *, num_classes, input_size):
        return ToyNetwork(self.hidden, num_classes, input_size)


class Fog(PixelChange):
    """Moves all pixels towards white."""

    position = 55
    options = (
        Option(name="fog", doc="Largest fraction of white.", high=1, usual=0.3, search_high=0.6),
    )

    def sample(self, magnitudes, draws, height, width):
        return draws.between("fog", 0.0, magnitudes["fog"])

    def apply(self, pixels, parameters, context):
        weight = pixels.new_tensor(parameters, dtype=float).float().view(-1, 1, 1)
        return pixels.float() * (1 - weight) + 255 * weight


AUGMENTATIONS.register("fog")(Fog())
NORMALIZATIONS.register("signed")(Normalization(scale=lambda x, mean, std: x / 127.5 - 1))


@LR_SCHEDULES.register("halving")
def halving(step, total_steps, warmup_steps, peak):
    note("training")
    return peak * 0.5 ** (4 * step / total_steps)
'''

FORBIDDEN = {"duckdb", "matplotlib", "jinja2", "optuna"}
LOADED = {
    "training": {
        "data": "dataset history integrity json_values labels parquet row_groups run_folder",
        "runtime": "data_tasks environment process ray_compat",
        "training": "backend batch_norm checkpoint_writer compilation data_parallel feed loop "
        "lr_schedules memory_feed optimization process_group stream_feed telemetry worker",
    },
    "predicting": {
        "data": "dataset decoding history integrity json_values labels parquet predictions "
        "run_folder sources",
        "runtime": "data_tasks process ray_compat",
        "inference": "predictor",
    },
}
"""By process, the modules of the package that it has loaded, folder by folder."""
SHARED = {"config", "models", "transforms", "errors", "metrics", "registry", "storage"}
"""What both may load as a whole."""


@pytest.fixture
def plugin(tmp_path, monkeypatch) -> Path:
    """The folder of the plugin, which this process and those that it starts import."""
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "toy_plugin.py").write_text(PLUGIN)
    (tmp_path / "notes").mkdir()
    monkeypatch.setenv(PLUGINS, "toy_plugin")
    monkeypatch.setenv("TOY_NOTES", str(tmp_path / "notes"))
    paths = [str(tmp_path / "plugins"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    return tmp_path


def job(name: str, *arguments: object, status: int = 0) -> str:
    """Runs a job with the plugin; what it prints."""
    command = [sys.executable, str(ROOT / "jobs" / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_flags_help_and_messages_know_what_a_plugin_adds(plugin):
    text = " ".join(job("train.py", "--help").split())
    assert "|toy_net" in text and "|signed" in text and "|halving" in text
    assert "toy_net: Units of the hidden layer. (from 1 to 64; default: 8)" in text
    assert "Largest fraction of white. (from 0 to 1)" in text
    assert "toy_net" in job("train.py", "--list-models")
    refusal = job("train.py", "--data", "x", "--hidden", "9", status=2)
    assert "--hidden: --model custom_cnn has no such option; toy_net has it" in refusal
    refusal = job("train.py", "--data", "x", "--fog", "2", status=2)
    assert "--fog: 2.0 is not from 0 to 1; the nearest allowed value is 1" in refusal


def test_preset_sweeps_vary_what_a_plugin_adds(plugin):
    """Leaving out the magnitude of a new augmentation once raised KeyError and StopIteration."""
    script = """
import json
from fer_ray.config.schema import TrainConfig
from fer_ray.sweeps import space
base = TrainConfig.from_dict({"data": "d", "model": {"name": "toy_net"}})
spaces = {name: space.load(name, base).to_dict() for name in space.SWEEPS}
print(json.dumps(spaces))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spaces = json.loads(done.stdout)
    assert "normalization=signed" in [arm["name"] for arm in spaces["normalization"]["arms"]]
    assert "fog=0.3" in [arm["name"] for arm in spaces["augmentation"]["arms"]]
    ranges = spaces["search"]["space"]
    assert ranges["transforms.fog"]["high"] == 0.6
    assert (ranges["model.hidden"]["low"], ranges["model.hidden"]["high"]) == (4, 16)


def test_an_augmentation_without_a_counterpart_is_refused_by_albumentations(plugin, tmp_path):
    arguments = ("--data", tmp_path, "--fog", 0.5, "--engine", "albumentations")
    refusal = job("train.py", *arguments, status=2)
    assert "--engine albumentations: it does not have --fog: use --engine device" in refusal


@pytest.mark.slow
def test_a_plugin_goes_through_training_prediction_and_evaluation(plugin, drawn_faces):
    runs, predictions = plugin / "runs", plugin / "predictions"
    toy = ("--model", "toy_net", "--hidden", 4, "--fog", 0.5, "--normalization", "signed")
    toy += ("--lr-schedule", "halving", "--epochs", 2, "--num-workers", 1)
    job("train.py", "--data", drawn_faces, "--storage", runs, *toy)
    config = json.loads((runs / "toy_net" / "config.json").read_text())["config"]
    assert config["model"] == {"name": "toy_net", "input_size": 0, "hidden": 4}
    assert config["transforms"]["fog"] == 0.5
    history = pd.read_parquet(runs / "toy_net" / "history.parquet")
    assert history["learning_rate"].tolist() == pytest.approx([0.1, 0.1 / 4])
    arguments = ("--checkpoint", runs / "toy_net", "--data", drawn_faces, "--split", "validation")
    job("predict.py", *arguments, "--output", predictions)
    rows = pd.read_parquet(predictions / "toy_net" / "validation")
    assert set(rows["model"]) == {"toy_net"} and rows["error"].isna().all()
    shown = job("evaluate.py", "--predictions", predictions, "--output", plugin / "evaluation")
    assert "toy_net" in shown and "toy_net" in (plugin / "evaluation/report.html").read_text()
    for process, expected in LOADED.items():
        loaded = set(json.loads((plugin / "notes" / f"{process}.json").read_text()))
        assert not loaded & FORBIDDEN, process
        assert not {"fer_ray.data.sources.zips", "fer_ray.data.synthetic"} & loaded, process
        modules: dict[str, set[str]] = {}
        for name in loaded:
            if name.startswith("fer_ray.") and name.split(".")[1] not in SHARED:
                folder, *module = name.split(".")[1:]
                modules.setdefault(folder, set()).update(module[:1])
        assert modules == {folder: set(names.split()) for folder, names in expected.items()}


@pytest.mark.slow
def test_a_plugin_goes_through_a_sweep_and_its_report(plugin, drawn_faces):
    space = plugin / "toys.toml"
    space.write_text(
        "[space]\ntransforms.fog = [0.0, 0.5]\nmodel.hidden = [4, 8]\n"
        'transforms.normalization = ["signed"]\nschedule.learning_rate_schedule = ["halving"]\n'
    )
    arguments = ("--data", drawn_faces, "--sweep", space, "--storage", plugin / "sweeps")
    arguments += ("--model", "toy_net", "--epochs", 1, "--seeds", 1, "--train-fraction", 0.5)
    shown = job("tune.py", *arguments)
    rows = pd.read_parquet(plugin / "sweeps" / "toys" / "trials.parquet")
    assert sorted(zip(rows["fog"], rows["hidden"])) == [(0.0, 4), (0.0, 8), (0.5, 4), (0.5, 8)]
    assert set(rows["lr_schedule"]) == {"halving"} and rows["width"].isna().all()
    assert "fog=0.5" in shown
    job("evaluate.py", "--sweep", plugin / "sweeps" / "toys")
    assert "fog=0.5" in (plugin / "sweeps" / "toys" / "report.html").read_text()
