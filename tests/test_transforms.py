"""Both engines mean the same by one configuration, and each is keyed by (seed, epoch, sample)."""

from __future__ import annotations

import functools

import cv2
import numpy as np
import pytest
import torch
from augmentation_probes import (
    COUNT,
    ENGINES,
    FILL,
    OTHERS,
    PROBES,
    SETTINGS,
    SIDE,
    UNMIXED,
    augment,
    distances,
    measured,
    textures,
)
from scipy import ndimage

from fer_ray.config.registries import AUGMENTATIONS
from fer_ray.config.transforms import PRESETS, TransformConfig, magnitude_settings
from fer_ray.models.forward import resize
from fer_ray.transforms import keyed_random
from fer_ray.transforms.device_engine import DeviceAugmenter, draw_warps
from fer_ray.transforms.operation import Draws, PixelChange


def test_every_option_has_a_probe():
    assert set(PROBES) == set(SETTINGS) == {s.field for s in magnitude_settings()} - set(UNMIXED)


@pytest.mark.parametrize(("option", "magnitude"), [*SETTINGS.items(), *OTHERS])
def test_both_engines_draw_an_option_from_the_same_distribution(option, magnitude):
    found = distances(*(measured(engine, option, magnitude) for engine in ENGINES))
    assert max(found.values()) < 1, found


@pytest.mark.parametrize("factor", [1 / 1.2, 1.2])
@pytest.mark.parametrize("option", PROBES)
def test_a_fifth_more_or_less_of_an_option_would_be_seen(option, factor):
    other = measured("device", option, SETTINGS[option] * factor)
    found = distances(measured("albumentations", option, SETTINGS[option]), other)
    assert max(found.values()) > 1, found


QUARTER = np.log(4 / 3)
BLURRED = 0.5 * (1.5 - 2 / 7) / 1.4
"""Half of the images, but deviations from 0.1 to 2/7 change nothing: their kernel is one pixel."""
RANGES = {
    "flip": {},
    "rotation": {"angle": (-36, 36, 0.2)},
    "translation": {"x": (-5, 5, 0), "y": (-5, 5, 0)},
    "zoom": {"scale": (0.88, 1.12, 0.01), "scale_y": (0.88, 1.12, 0.01)},
    "crop": {
        "area": (0.65, 1, 0.02),
        "ratio": (-QUARTER, QUARTER, 0.03),
        "length_x": (34, 48, 1),
        "length_y": (34, 48, 1),
    },
    "brightness": {"added": (-51, 51, 0)},
    "contrast": {"factor": (0.7, 1.3, 0.01)},
    "blur": {"sigma": (0.1, 1.5, 0.03), "sigma_y": (0.1, 1.5, 0.03)},
    "noise": {"sigma": (0, 12.75, 0.5)},
    "erasing": {"length_x": (4, 19, 0), "length_y": (4, 19, 0)},
}
"""The least and the most of each quantity under `SETTINGS`, and how exactly it is measured."""
SHARES = {"flip": ("flipped", 0.5), "erasing": ("erased", 0.5), "noise": ("noisy", 0.5)}
SHARES |= {"blur": ("blurred", BLURRED), "translation": ("x", 1 - 2 / (2 * 0.12 * 48))}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("option", PROBES)
def test_an_option_reaches_its_range_and_not_further(engine, option):
    found = measured(engine, option, SETTINGS[option])
    for name, (low, high, tolerance) in RANGES[option].items():
        values, reach = found[name], 0.02 * (high - low) + 1e-3
        assert low - tolerance - 1e-3 <= values.min() <= low + tolerance + reach, name
        assert high - tolerance - reach <= values.max() <= high + tolerance + 1e-3, name
    if option in SHARES:
        name, share = SHARES[option]
        assert np.mean(np.abs(found[name]) > 0.01) == pytest.approx(share, abs=0.04)
    if option == "crop":  # a third wider as often as a third higher
        assert abs(measured(engine, option, 0.9)["ratio"].mean()) < 0.013
    pair = {"translation": ("x", "y"), "erasing": ("length_x", "length_y")}.get(option)
    if pair:
        assert abs(np.corrcoef(*(found[name] for name in pair))[0, 1]) < 0.13


@pytest.mark.parametrize("engine", ENGINES)
def test_crops_and_erased_rectangles_touch_every_edge(engine):
    for option in ("crop", "erasing"):
        found = measured(engine, option, SETTINGS[option])
        for axis in "xy":
            assert round(found[f"begin_{axis}"].min()) == 0
            assert round(found[f"end_{axis}"].max()) == SIDE


# Whole presets, where the options meet.


def looks(images: np.ndarray, before: np.ndarray) -> dict[str, np.ndarray]:
    values = images.astype(float)
    return {
        "mean": values.mean((1, 2)),
        "deviation": values.std((1, 2)),
        "change": abs(values - before).mean((1, 2)),
        "gradient": abs(np.diff(values, axis=1)).mean((1, 2)),
        "curvature": abs(np.diff(values, n=2, axis=2)).mean((1, 2)),
        "darkest": values.min((1, 2)),
        "erased": (images == FILL).sum((1, 2)),
    }


@functools.cache
def changed(engine: str, preset: str, **other: float) -> tuple[np.ndarray, np.ndarray]:
    before = np.repeat(textures(5, smooth=0.8).clip(0, 250), COUNT // 5, 0)
    settings = {"augmentation": preset, **UNMIXED, **other}
    return augment(engine, before, **settings), before


@pytest.mark.parametrize("preset", [name for name in PRESETS if PRESETS[name]])
def test_both_engines_make_the_same_of_a_preset(preset):
    """An image interpolated once and one interpolated twice differ in their gradients."""
    one, other = (changed(engine, preset) for engine in ENGINES)
    found = distances(looks(*one), looks(*other))
    assert max(found.values()) < 1, found
    # the images' average, pixel by pixel, in units of its standard error
    each = COUNT // 5
    for group in range(5):
        a, b = (part[0][group * each : (group + 1) * each].astype(float) for part in (one, other))
        gap = (a.mean(0) - b.mean(0)) / np.sqrt((a.var(0) + b.var(0)) / each)
        assert abs(gap.mean()) < 3.5  # all pixels of an image brighten together
        assert abs(gap).max() < 5.5 and gap.std() < 1.3


@pytest.mark.parametrize(
    ("preset", "other"),
    [
        ("notebook", {"contrast": 0.13}),
        ("standard", {"erasing": 0.6}),
        ("strong", {"crop": 0.45}),
        ("strong", {"noise": 0.065}),
    ],
)
def test_another_strength_in_a_preset_would_be_seen(preset, other):
    found = distances(
        looks(*changed("albumentations", preset)), looks(*changed("device", preset, **other))
    )
    assert max(found.values()) > 1, found


# The device engine's pictures, given what was drawn.


def drawn(count: int, **settings: float) -> dict[str, np.ndarray]:
    """What is drawn for each image: the warps, and the parameters of each change that is on."""
    magnitudes = TransformConfig(augmentation="none", **settings).magnitudes
    draws = Draws(keyed_random.streams(0, 0, np.arange(count)))
    warps = draw_warps(magnitudes, draws, SIDE, SIDE)
    parameters = {f"warp {number}": warp for number, warp in enumerate(warps)}
    for name, augmentation in AUGMENTATIONS.items():
        if isinstance(augmentation, PixelChange) and augmentation.is_on(magnitudes):
            parameters[name] = augmentation.sample(magnitudes, draws, SIDE, SIDE)
    return parameters


@pytest.mark.parametrize(
    "settings",
    [
        {"flip": 0.5},
        {"rotation": 40.0, "translation": 0.3, "zoom": 0.4},
        {"crop": 0.7},
        {"flip": 0.5, "rotation": 20.0, "crop": 0.5},
    ],
)
def test_warped_pixels_are_those_of_opencv(settings):
    before = textures(40, smooth=2.0)
    result = augment("device", before, **settings)
    expected = before
    for warps in drawn(40, **settings).values():
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        expected = [
            cv2.warpAffine(
                image, warp, (SIDE, SIDE), flags=flags, borderMode=cv2.BORDER_REFLECT_101
            )
            for image, warp in zip(expected, warps)
        ]
    gap = np.abs(result.astype(int) - np.stack(expected))
    assert gap.max() <= 3 and gap.mean() < 0.5  # OpenCV rounds places to 1/32 pixel


def test_crops_are_those_of_opencv_but_for_the_edge():
    before = textures(40, smooth=2.0)
    result = augment("device", before, crop=0.7)
    for image, shown, warp in zip(before, result, drawn(40, crop=0.7)["warp 0"]):
        size = np.rint(np.diag(warp[:, :2]) * SIDE).astype(int)
        left, top = np.rint(warp[:, 2] - np.diag(warp[:, :2]) / 2 + 0.5).astype(int)
        cut = image[top : top + size[1], left : left + size[0]]
        gap = np.abs(shown.astype(int) - cv2.resize(cut, (SIDE, SIDE)))
        assert gap[2:-2, 2:-2].max() <= 2
        assert gap.max() <= 15  # the edge pixels see a little of what lies beyond them


@pytest.mark.parametrize("engine", ENGINES)
def test_flips_and_shifts_move_whole_pixels_and_reflect_at_the_border(engine):
    image = textures(1, smooth=0.5)[0]
    padded = np.pad(image, 12, mode="reflect")
    possible = {
        flipped[12 - y : 60 - y, 12 - x : 60 - x].tobytes()
        for flipped in (padded, padded[:, ::-1])
        for y in range(-5, 6)
        for x in range(-5, 6)
    }
    shown = augment(engine, np.repeat(image[None], 300, 0), flip=0.5, translation=0.12)
    found = {picture.tobytes() for picture in shown}
    assert found <= possible and len(found) > 120


def test_blurred_pixels_are_those_of_a_gaussian_kernel():
    before = textures(40, smooth=0.5)
    result = augment("device", before, blur=2.0)
    for image, shown, sigma in zip(before, result, drawn(40, blur=2.0)["blur"]):
        reach = int(3.5 * sigma)
        expected = image.astype(float)
        if reach:
            for axis in (0, 1):
                expected = ndimage.gaussian_filter1d(
                    expected, sigma, axis=axis, mode="mirror", radius=reach
                )
        assert np.abs(shown - expected).max() < 0.51


# What each engine promises.


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("preset", list(PRESETS))
def test_augmentation_is_keyed_by_seed_epoch_and_sample(engine, preset):
    change = functools.partial(augment, engine, augmentation=preset)
    count = 60
    before, samples = textures(count, smooth=0.7), np.arange(count) * 7
    result = change(before, samples, seed=1, epoch=2)
    assert result.shape == before.shape and result.dtype == np.uint8
    order = np.random.default_rng(0).permutation(count)
    again = change(before[order], samples[order], seed=1, epoch=2)
    assert np.array_equal(again, result[order])
    for size in (1, 2, 3, 5, 8):
        for begin in range(0, count - size, 11):
            part = slice(begin, begin + size)
            again = change(before[part], samples[part], seed=1, epoch=2)
            assert np.array_equal(again, result[part])
    if preset == "none":
        assert np.array_equal(result, before)
        return
    for other in ({"seed": 2, "epoch": 2}, {"seed": 1, "epoch": 3}, {"seed": 2, "epoch": 1}):
        assert (change(before, samples, **other) != result).any((1, 2)).mean() > 0.95
    assert (change(before, samples + 1, seed=1, epoch=2) != result).any((1, 2)).mean() > 0.95
    same = change(np.repeat(before[:1], count, 0), samples)
    assert len({image.tobytes() for image in same}) == count


def test_a_batch_of_another_size_gives_the_same_bits():
    """A place that is the result of a matrix product would be rounded as the batch's size has it:
    one in some thousand pixels of noise tells."""
    before, samples = np.random.default_rng(0).integers(0, 256, (60, 96, 96)), np.arange(60)
    change = functools.partial(augment, "device", rotation=30.0, zoom=0.2, contrast=0.2)
    result = change(before.astype(np.uint8), samples)
    for size in (1, 2, 3, 7):
        for begin in range(0, 60 - size, size):
            part = slice(begin, begin + size)
            again = change(before[part].astype(np.uint8), samples[part])
            assert np.array_equal(again, result[part])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("preset", list(PRESETS))
def test_the_input_stays_as_it_is_and_may_lie_anyhow(engine, preset):
    change = functools.partial(augment, engine, augmentation=preset)
    before = textures(20)
    kept, result = before.copy(), change(before)
    assert np.array_equal(before, kept)
    before.setflags(write=False)
    assert np.array_equal(change(before), result)
    layouts = {
        "transposed": before.transpose(0, 2, 1).copy().transpose(0, 2, 1),
        "batch last": before.transpose(1, 2, 0).copy().transpose(2, 0, 1),
        "every other": np.repeat(before, 2, 0)[::2],
        "part of wider rows": np.concatenate([before, before], 2)[:, :, :SIDE],
    }
    for layout, same in layouts.items():
        assert not same.flags.c_contiguous
        assert np.array_equal(change(same), result), layout


EXTREMES = {"flip": 1.0, "rotation": 180.0, "translation": 0.5, "zoom": 0.5, "crop": 0.9}
EXTREMES |= {"brightness": 1.0, "contrast": 1.0, "blur": 4.0, "noise": 0.5, "erasing": 1.0}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("side", [1, 2, 3, 5, 31])
def test_every_strength_and_size_works(engine, side):
    before = np.random.default_rng(side).integers(0, 256, (6, side, side), dtype=np.uint8)
    each: list[dict[str, float]] = [{name: most} for name, most in EXTREMES.items()]
    each += [{name: 1e-6} for name in EXTREMES]
    for settings in [*each, EXTREMES]:
        result = augment(engine, before, **settings)
        assert result.shape == before.shape and result.dtype == np.uint8, settings
        assert augment(engine, before[:0], **settings).shape == (0, side, side)
        assert np.array_equal(augment(engine, before[:1], **settings), result[:1])
    assert np.array_equal(augment(engine, before, flip=1.0), before[:, :, ::-1])


@pytest.mark.parametrize("shape", [(20, 31), (31, 20), (1, 9), (9, 1), (2, 3)])
def test_the_device_engine_takes_images_that_are_not_square(shape):
    before = np.random.default_rng(0).integers(0, 256, (9, *shape), dtype=np.uint8)
    for settings in ({"augmentation": "strong"}, EXTREMES):
        assert augment("device", before, **settings).shape == before.shape
    assert np.array_equal(augment("device", before, flip=1.0), before[:, :, ::-1])
    boxed = augment("device", np.zeros((500, 20, 40), np.uint8), erasing=1.0) == FILL
    assert boxed.any(1).sum(1).max() == 15 and boxed.any(2).sum(1).max() == 7


@pytest.mark.parametrize("engine", ENGINES)
def test_choices_of_one_image_are_independent_of_each_other(engine):
    """Seeding albumentations by `set_random_seed` makes flips and erasing one and the same."""
    image = np.full((SIDE, SIDE), 70, np.uint8)
    image[:, 24:] = 130
    settings = {"flip": 0.5, "brightness": 0.1, "contrast": 0.2, "blur": 1.5, "noise": 0.04}
    result = augment(engine, np.repeat(image[None], COUNT, 0), **settings, erasing=0.5)
    values = result.astype(float)
    dark, light = (np.median(values[:, :, half], (1, 2)) for half in (slice(20), slice(28, None)))
    step = np.abs(np.diff(np.median(values, 1), axis=1))
    quantities = {
        "flip": dark > light,
        "erasing": (result == FILL).any((1, 2)),
        "brightness": dark + light,
        "contrast": abs(light - dark),
        "blur": step[:, 23] / abs(light - dark),
        "noise": np.median(abs(np.diff(values[:, :, :20], axis=1)), (1, 2)),
    }
    assert set(quantities) == {*settings, "erasing"}
    found = np.corrcoef(np.stack([*quantities.values()]).astype(float)) - np.eye(len(quantities))
    assert abs(found).max() < 0.12


def columns(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All that was drawn, as one row a quantity and a column an image."""
    return {name: values.reshape(len(values), -1).T for name, values in found.items()}


def test_what_is_drawn_for_an_image_is_independent_of_all_else():
    magnitudes = {"flip": 0.5, "brightness": 0.2, "contrast": 0.2, "blur": 1.0, "noise": 0.1}
    found = columns(drawn(6000, rotation=20.0, translation=0.2, erasing=0.5, **magnitudes))
    warp, box = found.pop("warp 0"), found.pop("erasing")
    rows = [*np.concatenate([*found.values()]), np.sign(warp[0]), warp[3], box[2] > 0]
    # neighbouring samples too, whose keys differ by 1
    rows += [row[np.arange(1, 6001) % 6000] for row in rows]
    assert abs(np.corrcoef(np.stack(rows).astype(float)) - np.eye(len(rows))).max() < 0.06


def test_noise_is_not_made_of_the_numbers_that_decide_the_rest():
    grey = np.full((3000, SIDE, SIDE), 128, np.uint8)
    noise = augment("device", grey, noise=0.1).reshape(3000, 2, -1).astype(float) - 128
    noisy = noise.any((1, 2))
    energy = (noise**2).sum(1)[noisy] / noise.var((1, 2))[noisy, None]  # of pixels drawn together
    numbers = keyed_random.uniforms(keyed_random.streams(0, 0, np.arange(3000)), 17)[noisy]
    for column, number in zip(energy.T, numbers.T):
        assert abs(np.corrcoef(column, number)[0, 1]) < 0.1


def test_switching_an_option_on_does_not_change_what_the_others_draw():
    whole = drawn(50, **SETTINGS)
    for option in ("brightness", "contrast", "blur", "noise", "erasing"):
        alone = drawn(50, **{option: SETTINGS[option]})
        assert np.array_equal(alone[option], whole[option])
    first = whole["warp 0"]
    flipped = drawn(50, flip=0.5)["warp 0"][:, 0, 0] < 0
    assert np.array_equal(flipped, first[:, 0, 0] < 0)
    assert np.array_equal(drawn(50, crop=SETTINGS["crop"])["warp 0"], whole["warp 1"])
    turned = drawn(50, rotation=SETTINGS["rotation"])["warp 0"]
    angle = np.arctan2(turned[:, 1, 0], turned[:, 1, 1])
    assert np.allclose(angle, np.arctan2(first[:, 1, 0], first[:, 1, 1]))
    # the noise itself, not only how strong it is
    grey = np.full((50, SIDE, SIDE), 100, np.uint8)
    noise = augment("device", grey, noise=0.05).astype(int) - grey
    lit = augment("device", grey, brightness=0.1).astype(int)
    both = augment("device", grey, brightness=0.1, noise=0.05)
    assert np.abs(both - (lit + noise)).max() <= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("preset", list(PRESETS))
def test_augmentation_on_a_gpu_is_that_on_the_cpu_but_for_rounding(preset):
    before, samples = torch.from_numpy(textures(200)), np.arange(200)
    augmenter = DeviceAugmenter(TransformConfig(augmentation=preset), seed=0, fill=120)
    gap = (augmenter(before.cuda(), samples, 0).cpu().int() - augmenter(before, samples, 0)).abs()
    assert gap.max() <= 1 and (gap > 0).float().mean() < 1e-3


def test_resize_shrinks_without_aliasing_and_leaves_the_right_size_alone():
    batch = torch.rand(2, 1, 8, 8)
    assert resize(batch, 8) is batch and resize(batch, 0) is batch
    stripes = torch.tensor([0.0, 1.0]).repeat(8).expand(1, 1, 16, 16)
    assert (resize(stripes, 4) - 0.5).abs().max() < 0.1
    assert resize(batch, 20).shape == (2, 1, 20, 20)
