"""What a sweep varies: presets, files, and what they may not say."""

from __future__ import annotations

import json

import pytest

from fer_ray.config import overrides
from fer_ray.config.registries import NORMALIZATIONS
from fer_ray.config.schema import TrainConfig
from fer_ray.config.transforms import magnitude_settings
from fer_ray.errors import UserError
from fer_ray.sweeps import space
from fer_ray.sweeps.space import Range

BASE = TrainConfig(data="d")
MAGNITUDES = [setting.field for setting in magnitude_settings()]


def written(folder, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


def test_normalization_compares_every_one_with_dividing_by_255():
    made = space.load("normalization", BASE)
    found = [arm.options["transforms.normalization"] for arm in made.arms]
    assert found[0] == "none" and sorted(found) == sorted(NORMALIZATIONS)


def test_augmentation_turns_each_option_of_the_preset_off_and_each_other_on():
    made = space.load("augmentation", BASE)
    assert made.arms[0].options == {}
    configs = {arm.name: overrides.changed(BASE, arm.options).transforms for arm in made.arms[1:]}
    assert len(configs) == len(MAGNITUDES) + 1
    for magnitude in MAGNITUDES:
        (name,) = [name for name in configs if name.startswith(f"{magnitude}=")]
        was, now = BASE.transforms.magnitudes[magnitude], configs[name].magnitudes[magnitude]
        assert (was == 0) != (now == 0)
        others = [other for other in MAGNITUDES if other != magnitude]
        magnitudes = configs[name].magnitudes
        assert all(magnitudes[other] == BASE.transforms.magnitudes[other] for other in others)
    assert not any(configs["augmentation=none"].magnitudes.values())


def test_an_arm_without_augmentation_has_none_whatever_else_was_asked_for():
    base = overrides.changed(BASE, {"transforms.noise": 0.05, "transforms.flip": 0.25})
    none = space.load("augmentation", base).arms[-1]
    without = overrides.changed(BASE, {"transforms.flip": 0.0})
    assert space.load("augmentation", without).arms[-1].options == {
        "transforms.augmentation": "none"
    }
    assert none.name == "augmentation=none"
    found = overrides.changed(base, none.options).transforms
    assert not any(found.magnitudes.values())


def test_search_covers_the_transforms_and_the_optimizer_within_their_bounds():
    made = space.load("search", BASE)
    assert {f"transforms.{magnitude}" for magnitude in MAGNITUDES} < set(made.ranges)
    rate = made.ranges["optimizer.learning_rate"]
    assert isinstance(rate, Range) and rate.log and rate.low < 0.1 < rate.high
    assert {
        "transforms.normalization",
        "optimizer.weight_decay",
        "optimizer.label_smoothing",
    } < set(made.ranges)
    assert made.ranges["model.width"] == Range(low=16, high=48)
    other = TrainConfig.from_dict({"data": "d", "model": {"name": "sequential_cnn"}})
    assert "model.width" not in space.load("search", other).ranges


def test_a_file_may_nest_or_dot_its_names(tmp_path):
    dotted = space.load(
        written(tmp_path, 'space."transforms.flip" = [0.0, 0.5]\nspace.model.width = [4, 8]'), BASE
    )
    nested = space.load(
        written(tmp_path, "[space.transforms]\nflip = [0.0, 0.5]\n[space.model]\nwidth = [4, 8]"),
        BASE,
    )
    assert dotted == nested and dotted.name == "mine"
    assert [arm.name for arm in dotted.arms] == [
        *("flip=0.0, width=4", "flip=0.0, width=8", "flip=0.5, width=4", "flip=0.5, width=8")
    ]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"space": {"transforms.flip": [0.0, 0.5], "model.width": [4, 8]}}))
    assert space.load(str(path), BASE) == dotted


def test_a_files_baseline_comes_first(tmp_path):
    text = "space.transforms.flip = [0.0, 0.5]\nbaseline.transforms.flip = 0.5"
    assert space.load(written(tmp_path, text), BASE).arms[0].options == {"transforms.flip": 0.5}


def test_a_search_takes_lists_and_ranges(tmp_path):
    text = """
    method = "search"
    [space]
    optimizer.learning_rate = { low = 0.01, high = 0.3, log = true }
    model.width = { low = 4, high = 16, step = 4 }
    transforms.normalization = ["none", "dataset"]
    """
    ranges = space.load(written(tmp_path, text), BASE).ranges
    assert ranges["model.width"] == Range(low=4, high=16, step=4)
    assert ranges["transforms.normalization"] == ("none", "dataset")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("space.optimizer.learning_rat = [1]", "did you mean 'optimizer.learning_rate'"),
        ("space.transforms.flip = [0.0, 1.5]", "not from 0 to 1; the nearest allowed value is 1"),
        ("space.transforms.flip = 0.5", "neither a list of values nor a range"),
        ("space.transforms.flip = []", "at least one value"),
        ("space.transforms.flip = [0.5, 0.5]", "none of them twice"),
        ('space.transforms.normalization = ["minmx"]', "did you mean 'minmax'"),
        ("space.transforms.flip = {low = 0.0, high = 1.0}", "a grid takes lists"),
        ("space.schedule.epochs = [1, 2]", "use --epochs"),
        ("space.schedule.seed = [1, 2]", "is varied by --seeds"),
        ("space.schedule.time_limit_s = [60.0, 90.0]", "use --time-limit-s"),
        ('space.schedule.loading = ["memory", "stream"]', "share the images in memory"),
        ("space.schedule.shuffle_buffer = [64, 128]", "do not stream"),
        ("spaces.model.width = [1]", "did you mean 'space'"),
        ('method = "random"\nspace.model.width = [1]', "'random' is not one of grid, search"),
        ("", "'space' and 'baseline' are tables"),
        ("[space]", "'space' is empty"),
        ("space.model.width = [4]\nbaseline.model.width = 8", "8 is not in 'space'"),
        ("space = [", "mine.toml: "),
        ('method = "search"\nspace.model.width = {low = 8, high = 4}', "low has to be below high"),
        ('method = "search"\nspace.model.width = {low = 8}', "has both low and high"),
        ('method = "search"\nspace.model.width = {low=1, high=4, steps=1}', "did you mean 'step'"),
        (
            'method = "search"\nspace.model.width = {low=1, high=600}',
            "nearest allowed value is",
        ),
        ('method = "search"\nspace.model.head = {low=1, high=2}', "is not a number"),
        (
            'method = "search"\nspace.transforms.flip = {low=0, high=1, log=true}',
            "above 0 with log",
        ),
        ('method = "search"\nbaseline.model.width = 4\nspace.model.width = [4]', "no baseline"),
    ],
)
def test_what_a_file_gets_wrong_is_one_line(tmp_path, text, reason):
    with pytest.raises(UserError) as caught:
        space.load(written(tmp_path, text), BASE)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value", [[None, 0.5], {"low": None, "high": 0.5}, {"low": 0.0, "high": None}]
)
def test_json_knows_null_which_is_no_value(tmp_path, value):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"method": "search", "space": {"transforms.flip": value}}))
    with pytest.raises(UserError, match=r"transforms\.flip: null is not a value"):
        space.load(str(path), BASE)


@pytest.mark.parametrize("what", ["normalisation", "nothing.toml", "."])
def test_what_is_no_sweep_is_refused(what):
    with pytest.raises(UserError, match="--sweep"):
        space.load(what, BASE)
