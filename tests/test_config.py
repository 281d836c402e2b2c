import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fer_ray import cli
from fer_ray.config import flags, overrides
from fer_ray.config.fields import Setting
from fer_ray.config.model import model_config
from fer_ray.config.schema import SECTIONS, OptimizerConfig, TrainConfig, differences
from fer_ray.errors import UserError


def config_of(*arguments: str) -> TrainConfig:
    """The configuration that flags of jobs/train.py give."""
    parser = cli.JobParser(prog="train.py")
    flags.add_config_flags(parser)
    return flags.config_from_flags(parser.parse_args(arguments), data="/data")


def all_settings() -> list[Setting]:
    return [*overrides.settings().values(), *SECTIONS["scaling"].settings()]


def test_defaults_of_the_flags_are_those_of_the_configuration():
    assert config_of() == TrainConfig(data="/data")


def test_every_setting_has_a_flag_whose_help_names_its_range_and_its_default():
    parser = cli.JobParser(prog="train.py")
    flags.add_config_flags(parser)
    helped = {action.dest: action.help for action in parser._actions}
    for setting in all_settings():
        assert setting.doc and setting.doc.replace("%", "%%") in helped[setting.name]
        assert setting.bounds in helped[setting.name], setting.name
    assert "(at least 1; default" not in helped["schedule.patience"]
    assert "(from 0 to 100000; default: 0)" in helped["schedule.patience"]
    assert "(default: on)" in helped["schedule.flip_at_test"]
    assert "0.0 for custom_cnn, 0.3 for efficientnet_b2" in helped["model.dropout"]


def test_flags_reach_their_section():
    config = config_of("--model", "efficientnet_b2", "--learning-rate", "0.5", "--no-flip-at-test")
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


def other_than_default(setting: Setting) -> object:
    if setting.allowed is not None:
        names = list(setting.allowed)
        return names[-1 if setting.default == names[0] else 0]
    if setting.type is bool:
        return not setting.default
    if setting.type is str:
        return "file.pth"
    return setting.type(max(setting.low, (setting.high or 50) / 4) or 1)


def test_every_flag_reaches_its_field():
    """--optimizer once did not: its section has the same name."""
    for setting in all_settings():
        value = other_than_default(setting)
        given = [setting.flag, str(value)]
        if isinstance(value, bool):
            given = [setting.flag if value else setting.flag.replace("--", "--no-", 1)]
        extra = ["--epochs", "60000"] if setting.field == "warmup_epochs" else []
        if setting.field == "num_workers":
            extra += ["--global-batch-size", "60000", "--batch-norm-group", "1"]
        if setting.field == "batch_norm_group":
            extra += ["--global-batch-size", str(value), "--num-workers", "1"]
        extra += ["--model", setting.owners[0]] if setting.owners else []
        section = getattr(config_of(*given, *extra), setting.section).to_dict()
        assert section[setting.field] == value != setting.default, setting.flag


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
        config_of(*arguments)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("arguments", [["--epochs", "many"], ["--epoch", "3"], ["stray"]])
def test_unknown_flags_and_wrong_types_end_in_one_line_and_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        config_of(*arguments)
    assert raised.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_unknown_keys_are_refused():
    with pytest.raises(UserError, match="did you mean 'width'"):
        TrainConfig.from_dict({"data": "/data", "model": {"widht": 8}})


def test_differences_leave_out_where_the_work_runs():
    one = TrainConfig(data="/data").to_dict()
    other = config_of("--num-workers", "4", "--width", "8").to_dict()
    assert differences(one, other) == ["model.width: 32 -> 8"]


def test_a_section_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        model_config().width = 3  # type: ignore[attr-defined]


def test_magnitudes_are_the_presets_unless_given_and_survive_a_round_trip():
    config = config_of("--augmentation", "strong", "--blur", "0")
    magnitudes = config.transforms.magnitudes
    assert magnitudes["blur"] == 0 and magnitudes["mixup"] == 0.2
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert hash(TrainConfig.from_dict(config.to_dict())) == hash(config)
    assert not any(config.transforms.with_preset("none").magnitudes.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "sequential_cnn", "--width", "8"], "--width: --model sequential_cnn has no"),
        (
            ["--head", "hidden"],
            "--head: --model custom_cnn has no such option",
        ),
        (["--weights", "imagenet"], "--weights: --model custom_cnn has no such option"),
    ],
)
def test_an_option_of_another_model_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        config_of(*arguments)


def test_width_and_depth_follow_the_setting_unless_given():
    full = config_of("--model-setting", "full").model
    assert (full.width, full.depth) == (64, 2)
    assert config_of("--model-setting", "full", "--width", "8").model.width == 8
    changed = overrides.changed(config_of("--width", "8"), {"model.setting": "full"})
    assert (changed.model.width, changed.model.depth) == (8, 2)
