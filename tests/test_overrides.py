"""The flat list of settings: names, columns, changes, and the command that gives them."""

from __future__ import annotations

import functools
import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fer_ray import cli
from fer_ray.config import flags, overrides
from fer_ray.config.registries import NORMALIZATIONS
from fer_ray.config.schema import TrainConfig
from fer_ray.config.transforms import PRESETS
from fer_ray.errors import UserError


@functools.cache
def parser() -> cli.JobParser:
    made = cli.JobParser()
    for flag in ("--data", "--run"):
        made.add_argument(flag)
    flags.add_config_flags(made)
    return made


def parsed(command: str) -> TrainConfig:
    """What jobs/train.py would make of a command line."""
    arguments = parser().parse_args(shlex.split(command)[2:])
    return flags.config_from_flags(arguments, data=arguments.data)


@settings(deadline=None)
@given(
    chosen=st.fixed_dictionaries(
        {},
        optional={
            "model.width": st.integers(1, 64),
            "model.dropout": st.floats(0, 0.9),
            "transforms.normalization": st.sampled_from(NORMALIZATIONS.names),
            "transforms.augmentation": st.sampled_from(list(PRESETS)),
            "transforms.flip": st.floats(0, 1),
            "transforms.mixup": st.floats(0, 1),
            "optimizer.optimizer": st.sampled_from(["sgd", "adamw"]),
            "optimizer.learning_rate": st.floats(1e-5, 1),
            "schedule.flip_at_test": st.booleans(),
            "schedule.seed": st.integers(0, 9),
        },
    )
)
def test_the_command_of_a_configuration_gives_it_back(chosen):
    config = overrides.changed(TrainConfig(data="some where"), chosen)
    command = overrides.as_command(config, run="best")
    assert parsed(command) == config
    for name, value in chosen.items():
        assert overrides.values_of(config)[overrides.column_of(name)] == value


def test_another_preset_brings_its_magnitudes_and_another_optimizer_its_rate():
    base = TrainConfig(data="d")
    strong = overrides.changed(base, {"transforms.augmentation": "strong", "transforms.blur": 0.0})
    assert (strong.transforms.magnitudes["mixup"], strong.transforms.magnitudes["blur"]) == (
        0.2,
        0.0,
    )
    assert (
        overrides.changed(base, {"optimizer.optimizer": "adamw"}).optimizer.learning_rate == 0.001
    )
    same = overrides.changed(base, {"optimizer.optimizer": "sgd"})
    assert same.optimizer.learning_rate == 0.1


def test_what_was_set_beside_a_preset_or_an_optimizer_stays_with_another():
    """Such as --flip 0 --learning-rate 0.03 of a sweep over presets and optimizers."""
    given = {"transforms.flip": 0.0, "transforms.noise": 0.05, "optimizer.learning_rate": 0.03}
    base = overrides.changed(TrainConfig(data="d"), given)
    assert overrides.own_magnitudes(base) == {"transforms.flip": 0.0, "transforms.noise": 0.05}
    for preset in PRESETS:
        found = overrides.changed(base, {"transforms.augmentation": preset}).transforms.magnitudes
        assert (found["flip"], found["noise"]) == (0.0, 0.05)
        assert found["rotation"] == PRESETS[preset].get("rotation", 0.0)
    assert overrides.changed(base, {"optimizer.optimizer": "adamw"}).optimizer.learning_rate == 0.03


@pytest.mark.parametrize(
    ("given_name", "meant"),
    [
        ("learning_rate", "optimizer.learning_rate"),
        ("model.learning_rate", "optimizer.learning_rate"),
        ("optimizer.learning_rat", "optimizer.learning_rate"),
        ("transform.normalisation", "transforms.normalization"),
        ("model_setting", "model.setting"),
    ],
)
def test_a_wrong_name_is_refused_with_the_nearest_right_one(given_name, meant):
    with pytest.raises(UserError, match=f"space.toml: '{given_name}'.*did you mean '{meant}'"):
        overrides.check_name("space.toml", given_name)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("optimizer.learning_rate", 200, "not from 1e-08 to 100; the nearest allowed value is 100"),
        ("model.width", 8.5, "not from 1 to 512; the nearest allowed value is 8"),
        ("transforms.flip", "often", "'often' is not from 0 to 1"),
        ("transforms.normalization", "clahee", "did you mean 'clahe'"),
        ("transforms.normalization", 3, "not one of none, minmax"),
        ("schedule.flip_at_test", 1, "not true or false"),
        ("schedule.seed", True, "True is not from 0"),
        ("transforms.flip", None, "null is not a value"),
        ("optimizer.learning_rate", None, "null is not a value"),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_allowed(name, value, reason):
    with pytest.raises(UserError, match=reason):
        overrides.check_value("space.toml", name, value)
