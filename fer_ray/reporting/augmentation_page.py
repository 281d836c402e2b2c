"""A page of images: what each augmentation, preset and normalization does, engine by engine."""

from __future__ import annotations

import base64
from typing import Any

import cv2
import numpy as np
import torch

from fer_ray import storage
from fer_ray.config.registries import AUGMENTATIONS, NORMALIZATIONS
from fer_ray.config.transforms import PRESETS, TransformConfig
from fer_ray.data import synthetic
from fer_ray.errors import UserError
from fer_ray.reporting import html
from fer_ray.transforms.albumentations_engine import AlbumentationsAugmenter, fill_of
from fer_ray.transforms.device_engine import DeviceAugmenter
from fer_ray.transforms.mixing import draw_mix
from fer_ray.transforms.normalization import Normalizer, histogram, moments
from fer_ray.transforms.operation import Augmentation, Mixing, Option

FACES = 6
"""Columns of every sheet: synthetic faces of different expressions."""
SAMPLES = 3
"""Rows of samples: one for each epoch."""
STEPS = 20
"""Batches of which the most mixed one is shown: beta draws are often near 0 or 1."""

_SIZE = 48
_SEED = 0
_NUM_FOR_STATISTICS = 64
"""Faces from which mean and standard deviation are computed."""
_GAP = 2
_GAP_GREY = 255


def write(path: str) -> str:
    """Writes the page, one HTML file without links; returns its absolute path.

    Raises:
        UserError: where a folder of that name is.
    """
    path = storage.absolute(path)
    if storage.is_directory(path):
        raise UserError(f"--show-augmentations: {path} is a folder: give the name of a file")
    storage.write_bytes(path, render().encode())
    return path


def render() -> str:
    """The page as HTML; the same at every call."""
    many = synthetic_faces(_NUM_FOR_STATISTICS)
    fill = fill_of(many.mean() / 255)
    faces = many[:FACES]
    options = [(entry, option) for entry in AUGMENTATIONS.values() for option in entry.options]
    return html.render(
        "augmentation_page.html.j2",
        {},
        original=sheet(faces[None]),
        options=[
            _option(entry, option, faces, fill)
            for entry, option in options
            if not isinstance(entry, Mixing)
        ],
        mixing=[_mixed(option, faces) for entry, option in options if isinstance(entry, Mixing)],
        presets=[_preset(name, faces, fill) for name in PRESETS],
        normalizations=[_normalized(name, faces, many) for name in NORMALIZATIONS],
        samples=SAMPLES,
        steps=STEPS,
        seed=_SEED,
        size=_SIZE,
    )


def synthetic_faces(count: int) -> np.ndarray:
    """(count, S, S) uint8 synthetic faces, the expressions in turn."""
    labels = len(synthetic.EXPRESSIONS)
    return np.stack([synthetic.draw(index % labels, _SEED, index, _SIZE) for index in range(count)])


def sheet(rows: np.ndarray) -> str:
    """Faces (rows, columns, S, S) uint8 in one PNG, as a data URI."""
    padded = np.pad(
        rows, [(0, 0), (0, 0), (0, _GAP), (0, _GAP)], constant_values=_GAP_GREY
    ).transpose(0, 2, 1, 3)
    pixels = padded.reshape(padded.shape[0] * padded.shape[1], -1)[:-_GAP, :-_GAP]
    encoded = cv2.imencode(".png", np.ascontiguousarray(pixels))[1].tobytes()
    return f"data:image/png;base64,{base64.b64encode(encoded).decode()}"


def _engines(config: TransformConfig, faces: np.ndarray, fill: int) -> dict[str, str]:
    """A sheet of samples by engine; a row an epoch."""
    samples = np.arange(len(faces))
    device = DeviceAugmenter(config, seed=_SEED, fill=fill)
    images = torch.from_numpy(faces)
    rows = {"device": [device(images, samples, epoch).numpy() for epoch in range(SAMPLES)]}
    on = [entry for entry in AUGMENTATIONS.values() if entry.is_on(config.magnitudes)]
    if all(entry.in_albumentations for entry in on):
        library = AlbumentationsAugmenter(config, seed=_SEED, fill=fill, image_size=_SIZE)
        rows["albumentations"] = [library(faces, samples, epoch) for epoch in range(SAMPLES)]
    return {engine: sheet(np.stack(rows[engine])) for engine in sorted(rows)}


def _flag(name: str, magnitude: float) -> str:
    return f"--{name.replace('_', '-')} {magnitude:g}"


def _option(
    augmentation: Augmentation, option: Option, faces: np.ndarray, fill: int
) -> dict[str, Any]:
    config = TransformConfig.from_dict({"augmentation": "none", option.name: option.usual})
    return {
        "name": option.name,
        "flag": _flag(option.name, option.usual),
        "doc": option.doc.replace("`", ""),
        "engines": _engines(config, faces, fill),
    }


def _preset(name: str, faces: np.ndarray, fill: int) -> dict[str, Any]:
    mixing = {
        option.name
        for entry in AUGMENTATIONS.values()
        if isinstance(entry, Mixing)
        for option in entry.options
    }
    return {
        "name": name,
        "flag": f"--augmentation {name}",
        "doc": ", ".join(_flag(key, value) for key, value in PRESETS[name].items()),
        "mixes": [key for key in PRESETS[name] if key in mixing],
        "engines": _engines(TransformConfig(augmentation=name), faces, fill),
    }


def _mixed(option: Option, faces: np.ndarray) -> dict[str, Any]:
    """The faces, what each is mixed with, and the result; a batch of the faces alone."""
    config = TransformConfig.from_dict({"augmentation": "none", option.name: option.usual})
    plans = [draw_mix(config, (_SEED, 0, step), len(faces), _SIZE) for step in range(STEPS)]
    plan = max(
        filter(None, plans), key=lambda plan: (plan.own_fraction * (1 - plan.own_fraction)).sum()
    )
    mix = plan.of(slice(0, len(faces)), torch.device("cpu"))
    batch = torch.from_numpy(faces).unsqueeze(1).float()
    mixed = mix.apply(batch).squeeze(1).round().to(torch.uint8).numpy()
    percent = [f"{100 * fraction:.0f}\u00a0%" for fraction in plan.own_fraction]
    return {
        "name": option.name,
        "flag": _flag(option.name, option.usual),
        "doc": option.doc.replace("`", ""),
        "image": sheet(np.stack([faces, faces[plan.partner], mixed])),
        "fractions": ", ".join(percent),
    }


def _normalized(name: str, faces: np.ndarray, many: np.ndarray) -> dict[str, str]:
    """What the network sees, its numbers drawn as grey levels."""
    plain = Normalizer(normalization=name, mean=0.0, std=1.0)
    mean, std = moments(histogram(plain.pixel_stage(torch.from_numpy(many))))
    numbers = Normalizer(normalization=name, mean=mean, std=std)(torch.from_numpy(faces))
    is_centred = bool(numbers.min() < 0)
    grey = (numbers + 3.0) / 6.0 if is_centred else numbers
    pixels = (grey.clamp(0, 1) * 255).round().to(torch.uint8).squeeze(1).numpy()
    return {
        "name": name,
        "flag": f"--normalization {name}",
        "range": "-3 is black, 3 is white" if is_centred else "0 is black, 1 is white",
        "image": sheet(pixels[None]),
    }
