import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fer_ray import cli
from fer_ray.config.schema import (
    MAGNITUDES,
    SECTIONS,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    differences,
    flag_of,
)
from fer_ray.errors import UserError


def flags(*arguments: str) -> TrainConfig:
    parser = cli.JobParser(prog="train.py")
    cli.add_config_flags(parser)
    return cli.config_from_flags(parser.parse_args(arguments), data="/data")


def test_defaults_of_the_flags_are_those_of_the_configuration():
    assert flags() == TrainConfig(data="/data")


def test_every_field_has_a_flag_and_a_docstring():
    parser = cli.JobParser(prog="train.py")
    cli.add_config_flags(parser)
    helped = {action.dest: action.help for action in parser._actions}
    for title, section in SECTIONS.items():
        for spec in dataclasses.fields(section):
            assert helped[f"{title}.{spec.name}"], f"{title}.{spec.name} has no docstring"


def test_flags_reach_their_section():
    config = flags("--model", "efficientnet_b2", "--learning-rate", "0.5", "--no-flip-at-test")
    assert config.model.name == "efficientnet_b2"
    assert config.optimizer.learning_rate == 0.5
    assert not config.schedule.flip_at_test


@given(
    st.integers(1, 500),
    st.sampled_from(["sgd", "adamw"]),
    st.one_of(st.none(), st.floats(1e-6, 1.0)),
)
def test_a_configuration_survives_the_way_to_a_worker(epochs, optimizer, rate):
    config = TrainConfig.from_dict(
        {
            "data": "/data",
            "schedule": {"epochs": epochs},
            "optimizer": {"optimizer": optimizer, "learning_rate": rate},
        }
    )
    again = TrainConfig.from_dict(config.to_dict())
    assert again == config
    assert again.optimizer.optimizer == optimizer
    assert again.schedule.epochs == epochs


def other_than_default(spec: dataclasses.Field) -> object:
    if "allowed" in spec.metadata:
        return spec.metadata["allowed"][-1 if spec.default == spec.metadata["allowed"][0] else 0]
    if isinstance(spec.default, bool):
        return not spec.default
    if isinstance(spec.default, str):
        return "file.pth"
    low, high = spec.metadata["low"], spec.metadata["high"] or 50
    return (type(spec.default) if spec.default is not None else float)(max(low, high / 4) or 1)


def test_every_flag_reaches_its_field():
    """--optimizer once did not: its section has the same name."""
    for title, section in SECTIONS.items():
        for spec in dataclasses.fields(section):
            value, flag = other_than_default(spec), flag_of(spec)
            given = [flag, str(value)]
            if isinstance(value, bool):
                given = [flag if value else flag.replace("--", "--no-", 1)]
            extra = ["--epochs", "60000"] if spec.name == "warmup_epochs" else []
            extra += ["--global-batch-size", "60000"] if spec.name == "num_workers" else []
            found = getattr(getattr(flags(*given, *extra), title), spec.name)
            assert found == value and found != spec.default, flag


def test_the_learning_rate_follows_the_optimizer_unless_given():
    assert OptimizerConfig().learning_rate == 0.1
    assert OptimizerConfig(optimizer="adamw").learning_rate == 0.001
    assert OptimizerConfig(optimizer="adamw", learning_rate=0.3).learning_rate == 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs: 0 is not from 1"),
        (["--model", "efficientnet"], "did you mean 'efficientnet_b2'?"),
        (["--normalization", "minimax"], "none, minmax, standardize, dataset"),
        (["--dropout", "1.5"], "--dropout: 1.5 is not from 0 to 0.95"),
        (["--learning-rate", "nan"], "--learning-rate: nan is not"),
        (["--time-limit-s", "inf"], "--time-limit-s: inf is not"),
        (["--optimizer", "adam"], "did you mean 'adamw'?"),
        (["--global-batch-size", "1", "--num-workers", "2"], "cannot be shared by 2 workers"),
        (["--epochs", "2", "--warmup-epochs", "3"], "--warmup-epochs: 3 is more than --epochs 2"),
    ],
)
def test_impossible_values_name_flag_value_and_what_is_allowed(arguments, message):
    with pytest.raises(UserError) as raised:
        flags(*arguments)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("arguments", [["--epochs", "many"], ["--epoch", "3"], ["stray"]])
def test_unknown_flags_and_wrong_types_end_in_one_line_and_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        flags(*arguments)
    assert raised.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_unknown_keys_are_refused():
    with pytest.raises(UserError, match="did you mean 'width'"):
        TrainConfig.from_dict({"data": "/data", "model": {"widht": 8}})


def test_differences_leave_out_where_the_work_runs():
    one = TrainConfig(data="/data").to_dict()
    other = flags("--num-workers", "7", "--width", "8").to_dict()
    assert differences(one, other) == ["model.width: 0 -> 8"]


def test_a_section_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().width = 3


def test_strengths_are_the_presets_unless_given_and_survive_a_round_trip():
    config = flags("--augmentation", "strong", "--blur", "0")
    assert config.transforms.blur == 0 and config.transforms.mixup == 0.2
    assert TrainConfig.from_dict(config.to_dict()) == config
    plain = config.transforms.with_preset("none")
    assert all(getattr(plain, name) == 0 for name in MAGNITUDES)
    # replacing the name alone keeps them: that is what `with_preset` is for
    assert dataclasses.replace(config.transforms, augmentation="none").mixup == 0.2
