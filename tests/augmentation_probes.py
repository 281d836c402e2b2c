"""What each augmentation does to images, measured on images where it shows."""

from __future__ import annotations

import functools
from collections.abc import Callable

import cv2
import numpy as np
from scipy import ndimage, stats

from fer_ray.config.transforms import TransformConfig
from fer_ray.training.feed import as_tensor
from fer_ray.transforms.albumentations_engine import AlbumentationsAugmenter
from fer_ray.transforms.device_engine import DeviceAugmenter

ENGINES = ("albumentations", "device")
COUNT, SIDE, FILL = 1200, 48, 255
UNMIXED = {"mixup": 0.0, "cutmix": 0.0}
CENTRE = (SIDE - 1) / 2
RAMP = np.tile(np.arange(SIDE, dtype=np.uint8) * 5, (SIDE, 1))

View = Callable[[np.ndarray], np.ndarray]
"""From one image to `COUNT` changed ones, (N, S, S): the same changes at each call."""


def augment(engine, images, samples=None, *, seed=0, epoch=0, fill=FILL, **settings) -> np.ndarray:
    config = TransformConfig(**{"augmentation": "none", **settings})
    samples = np.arange(len(images)) if samples is None else samples
    if engine == "device":
        augmenter = DeviceAugmenter(config, seed=seed, fill=fill)
        return augmenter(as_tensor(images), samples, epoch).numpy()
    library = AlbumentationsAugmenter(config, seed=seed, fill=fill, image_size=images.shape[1])
    return library(images, samples, epoch)


def textures(count: int, *, smooth: float = 1.5, seed: int = 0) -> np.ndarray:
    """Fields without a structure that a change could miss: (count, S, S) uint8."""
    random, images = np.random.default_rng(seed), []
    for _ in range(count):
        field = ndimage.gaussian_filter(random.normal(size=(SIDE, SIDE)), smooth)
        images.append(120 + 45 * (field - field.mean()) / field.std())
    return np.clip(images, 0, 255).astype(np.uint8)


# What an option does to each image, measured on images where it shows.


def places(images: np.ndarray) -> tuple[np.ndarray, ...]:
    """Centre and second moments about it of what is bright: x, y, xx, yy, xy, each (N,)."""
    weights = images / images.sum((1, 2), keepdims=True)
    across, down = weights.sum(1), weights.sum(2)
    spots = np.arange(SIDE)
    x, y = across @ spots, down @ spots
    xx, yy = across @ spots**2 - x**2, down @ spots**2 - y**2
    xy = np.einsum("nyx,y,x->n", weights, spots, spots) - x * y
    return x, y, xx, yy, xy


def flips(view: View) -> dict[str, np.ndarray]:
    result = view(RAMP)
    flipped = (result == RAMP[:, ::-1]).all((1, 2))
    assert (flipped | (result == RAMP).all((1, 2))).all()
    return {"flipped": flipped}


def angles(view: View) -> dict[str, np.ndarray]:
    bar = np.zeros((SIDE, SIDE), np.uint8)
    bar[22:26, 8:40] = 255
    x, y, xx, yy, xy = places(view(bar))
    assert abs(x - CENTRE).max() < 0.1 and abs(y - CENTRE).max() < 0.1
    return {"angle": np.degrees(0.5 * np.arctan2(2 * xy, xx - yy))}


def shifts(view: View) -> dict[str, np.ndarray]:
    spot = np.zeros((SIDE, SIDE), np.uint8)
    spot[18:24, 26:32] = 255
    x, y, *_ = places(view(spot))
    return {"x": x - 28.5, "y": y - 20.5}


def scales(view: View) -> dict[str, np.ndarray]:
    disc = np.zeros((SIDE, SIDE), np.uint8)
    cv2.circle(disc, (23, 23), 12, 255, -1)
    disc = np.maximum(disc, disc[::-1, ::-1])  # about the centre, between the pixels
    x, y, xx, yy, _ = places(view(disc))
    assert abs(x - CENTRE).max() < 0.1 and abs(y - CENTRE).max() < 0.1
    _, _, *before, _ = places(disc[None])
    across, down = np.sqrt(xx / before[0]), np.sqrt(yy / before[1])
    assert abs(across - down).max() < 0.02
    return {"scale": across, "scale_y": down}


def crops(view: View) -> dict[str, np.ndarray]:
    inner = np.arange(4, SIDE - 4)  # the edges are interpolated with what lies outside, or not
    found = {}
    ramps = {"x": view(RAMP).mean(1), "y": view(RAMP.T.copy()).mean(2)}
    for axis, profile in ramps.items():
        slope, level = np.polynomial.polynomial.polyfit(inner, profile[:, inner].T / 5, 1)[::-1]
        length, begin = slope * SIDE, level - slope / 2 + 0.5
        for values in (length, begin):  # whole pixels, but for the rounding of grey levels
            assert abs(values - np.rint(values)).max() < 0.3
        length, begin = np.rint(length), np.rint(begin)
        found |= {f"length_{axis}": length, f"begin_{axis}": begin, f"end_{axis}": begin + length}
    area, ratio = found["length_x"] * found["length_y"], found["length_x"] / found["length_y"]
    return {"area": area / SIDE**2, "ratio": np.log(ratio), **found}


def lights(view: View) -> dict[str, np.ndarray]:
    result = view(np.full((SIDE, SIDE), 128, np.uint8)).astype(float)
    assert (result == result[:, :1, :1]).all()
    return {"added": result[:, 0, 0] - 128}


def contrasts(view: View) -> dict[str, np.ndarray]:
    levels = np.full((SIDE, SIDE), 60, np.uint8)
    levels[:, 36:] = 180  # the mean, 90, is not half-way
    result = view(levels).astype(float)
    middle = result.mean((1, 2)) - 90
    assert abs(middle).max() < 0.51 and abs(middle.mean()) < 0.05
    return {"factor": (result[:, 0, -1] - result[:, 0, 0]) / 120}


def blurs(view: View) -> dict[str, np.ndarray]:
    line = np.zeros((SIDE, SIDE), np.uint8)
    line[:, 24] = 255
    across, down = places(view(line))[2], places(view(line.T.copy()))[3]
    blurred = across > 0.01
    assert ((down > 0.01) == blurred).all()
    deviations = {"sigma": np.sqrt(across[blurred]), "sigma_y": np.sqrt(down[blurred])}
    return {"blurred": blurred, **deviations}


def noises(view: View) -> dict[str, np.ndarray]:
    noise = view(np.full((SIDE, SIDE), 128, np.uint8)).astype(float) - 128
    sigma = noise.std((1, 2))
    white = (noise / np.maximum(sigma, 1e-9)[:, None, None])[sigma > 5]
    if len(white):  # Gaussian, without a mean and without a pattern
        assert abs(white.mean()) < 0.01
        assert abs(stats.kurtosis(white.ravel())) < 0.05 and abs(stats.skew(white.ravel())) < 0.02
        for neighbours in ((white[:, 1:], white[:, :-1]), (white[:, :, 1:], white[:, :, :-1])):
            assert abs((neighbours[0] * neighbours[1]).mean()) < 0.01
        assert abs((white[1:] * white[:-1]).mean()) < 0.01
    return {"noisy": sigma > 0, "sigma": sigma[sigma > 0]}


def boxes(view: View) -> dict[str, np.ndarray]:
    filled = view(np.zeros((SIDE, SIDE), np.uint8)) == FILL
    erased = filled.any((1, 2))
    across, down = filled[erased].any(1), filled[erased].any(2)
    assert (filled[erased] == down[:, :, None] & across[:, None]).all()
    found = {"erased": erased}
    for axis, inside in (("x", across), ("y", down)):
        begin, end = inside.argmax(1), SIDE - inside[:, ::-1].argmax(1)
        assert (inside.sum(1) == end - begin).all()  # in one piece
        found |= {f"begin_{axis}": begin, f"end_{axis}": end, f"length_{axis}": end - begin}
    return found


PROBES = {
    "flip": flips,
    "rotation": angles,
    "translation": shifts,
    "zoom": scales,
    "crop": crops,
    "brightness": lights,
    "contrast": contrasts,
    "blur": blurs,
    "noise": noises,
    "erasing": boxes,
}
SETTINGS = {"flip": 0.5, "rotation": 36.0, "translation": 0.12, "zoom": 0.12, "crop": 0.35}
SETTINGS |= {"brightness": 0.2, "contrast": 0.3, "blur": 1.5, "noise": 0.05, "erasing": 0.5}
OTHERS = [("flip", 0.2), ("translation", 0.3), ("crop", 0.9), ("blur", 3.0), ("noise", 0.01)]


@functools.cache
def measured(engine: str, option: str, magnitude: float) -> dict[str, np.ndarray]:
    def view(image: np.ndarray) -> np.ndarray:
        return augment(engine, np.repeat(image[None], COUNT, 0), **{option: magnitude})

    return PROBES[option](view)


def distances(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, float]:
    """Kolmogorov-Smirnov statistics as multiples of what one in a thousand exceeds.

    Of the quantities, and of their distances to the middle: a wider range of something that goes
    either way hardly changes the former.
    """
    found = {}
    for name in one:
        a, b = (np.round(np.asarray(values[name], float), 3) for values in (one, other))
        middle = 1.0 if name in ("factor", "scale", "scale_y") else 0.0
        sizes = [np.abs(values - middle) for values in (a, b)]
        farthest = max(stats.ks_2samp(*two, method="asymp").statistic for two in ((a, b), sizes))
        found[name] = farthest / (1.95 * np.sqrt((len(a) + len(b)) / (len(a) * len(b))))
    return found
