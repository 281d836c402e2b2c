"""A sweep's winner as the settings of a training run."""

from __future__ import annotations

from pathlib import Path

import pytest
import sweep_samples as samples
from sweep_samples import BASE, CLAHE, MINMAX, saved, table

from fer_ray import cli
from fer_ray.config import flags
from fer_ray.config.schema import TrainConfig
from fer_ray.errors import UserError
from fer_ray.sweeps import store, summary
from fer_ray.sweeps.space import Arm


def trained(*arguments: object) -> tuple[str | None, TrainConfig]:
    """The run's name and the settings that jobs/train.py would take."""
    parser = cli.JobParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--from-sweep")
    flags.add_config_flags(parser)
    parsed = parser.parse_args(["--data", "data/faces", *map(str, arguments)])
    name, settings = cli.winner_of(parsed.from_sweep)
    return name, flags.config_from_flags(parsed, data="data/faces", base=settings)


def write_winner(folder: Path, chosen: dict) -> Path:
    """A sweep whose winner has some settings."""
    arms = (Arm(name="one", options=chosen),)
    saved(folder, lambda arm, seed: 0.5, seeds=[4], arms=arms)
    summary.write(str(folder / "sweep"))
    return folder / "sweep"


@pytest.mark.parametrize("kind", ["grid", "search"])
def test_the_winners_settings_and_its_command_are_the_same_run(kind: str, request):
    folder = request.getfixturevalue(kind)
    made = summary.write(str(folder))
    name, config = trained("--from-sweep", folder)
    assert name == f"{folder.name}-winner"
    assert samples.settings_of(config) == made["winner"]["settings"]
    words = made["winner"]["command"].split()
    assert words[:4] == [".venv/bin/python", "jobs/train.py", "--data", "data/faces"]
    assert words[4:6] == ["--run", name]
    _, pasted = trained(*words[6:])
    assert pasted == config


def test_flags_take_precedence(tmp_path: Path):
    folder = write_winner(tmp_path, {"transforms.flip": 0.25, "optimizer.learning_rate": 0.05})
    arguments = ("--from-sweep", folder, "--epochs", 9, "--flip", 0.125)
    _, config = trained(*arguments)
    assert (config.schedule.epochs, config.transforms.magnitudes["flip"]) == (9, 0.125)
    assert (config.optimizer.learning_rate, config.model.width) == (0.05, 12)
    _, config = trained("--from-sweep", folder)
    assert (config.schedule.epochs, config.schedule.seed) == (samples.EPOCHS, 0)


def test_another_preset_or_optimizer_brings_its_own(tmp_path: Path):
    chosen = {
        "transforms.blur": 0.5,
        "transforms.flip": 0.25,
        "optimizer.learning_rate": 0.05,
    }
    folder = write_winner(tmp_path, chosen)
    _, config = trained("--from-sweep", folder, "--augmentation", "strong", "--blur", "0.75")
    strong = TrainConfig(data="data/faces").transforms.with_preset("strong")
    magnitudes = config.transforms.magnitudes
    assert magnitudes["flip"] == 0.5 and magnitudes["blur"] == 0.75
    assert magnitudes["mixup"] == strong.magnitudes["mixup"]
    assert config.optimizer.learning_rate == 0.05
    _, config = trained("--from-sweep", folder, "--optimizer", "adamw")
    assert config.optimizer.learning_rate == 0.001 and config.transforms.magnitudes["flip"] == 0.25
    _, config = trained("--from-sweep", folder, "--optimizer", "adamw", "--learning-rate", "0.01")
    assert config.optimizer.learning_rate == 0.01


def test_without_a_sweep_nothing_changes():
    name, config = trained()
    assert name is None and config == TrainConfig(data="data/faces")


def test_a_sweep_without_a_winner_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"summary\.json is missing"):
        summary.read_winner(str(tmp_path))
    folder = saved(tmp_path, table({BASE: [None], MINMAX: ["a"], CLAHE: ["b"]}), seeds=[0])
    summary.write(str(folder))
    with pytest.raises(UserError, match="no trial of this sweep has finished"):
        summary.read_winner(str(folder))
    (folder / store.SUMMARY).write_text("[]")
    with pytest.raises(UserError, match="not a JSON object but a list"):
        summary.read_winner(str(folder))
