"""A page of pictures: what each option, preset and normalization does, engine beside engine."""

from __future__ import annotations

import ast
import base64
import dataclasses
import importlib.resources
import inspect
import textwrap
from typing import Any

import cv2
import numpy as np
import torch

from fer_ray import storage
from fer_ray.config.schema import (
    AUGMENTATIONS,
    MAGNITUDES,
    NORMALIZATIONS,
    PRESETS,
    TransformConfig,
    flag_of,
)
from fer_ray.data import synthetic
from fer_ray.errors import UserError
from fer_ray.transforms import (
    DeviceAugmenter,
    LibraryAugmenter,
    Normalizer,
    draw_mix,
    histogram,
    moments,
)
from fer_ray.transforms.albumentations_engine import fill_of

FACES = 6
"""Columns of every picture: drawn faces of different expressions."""
SAMPLES = 3
"""Rows of samples: as many epochs."""
STEPS = 20
"""Of so many batches, the one that is mixed most is shown: beta draws are often near 0 or 1."""
MIXING = ("mixup", "cutmix")
"""Options that neither engine does: they mix whole batches after normalization."""

_SIZE = 48
_SEED = 0
_CROWD = 64
"""Faces from which mean and deviation are taken."""
_GAP = 2
_GAP_GREY = 255


def write(path: str) -> str:
    """Writes the page, one HTML file without links; returns its absolute place.

    Raises:
        UserError: where a folder of that name is.
    """
    path = storage.absolute(path)
    if storage.is_directory(path):
        raise UserError(f"--show-augmentations: {path} is a folder; a file's name is wanted")
    storage.write_bytes(path, render().encode())
    return path


def render() -> str:
    """The page as HTML; the same at every call."""
    import jinja2

    crowd = faces(_CROWD)
    fill = fill_of(crowd.mean() / 255)
    shown = crowd[:FACES]
    docs = _docs()
    options = [
        _option(name, magnitude_of(name), shown, fill) | {"doc": docs[name]}
        for name in MAGNITUDES
        if name not in MIXING
    ]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates = importlib.resources.files("fer_ray.reporting") / "templates"
    source = templates / "augmentation_page.html.j2"
    return environment.from_string(source.read_text("utf-8")).render(
        original=picture(shown[None]),
        options=options,
        presets=[_preset(name, shown, fill) for name in AUGMENTATIONS],
        mixing=[_mixed(name, shown) | {"doc": docs[name]} for name in MIXING],
        normalizations=[_normalized(name, shown, crowd) for name in NORMALIZATIONS],
        samples=SAMPLES,
        steps=STEPS,
        seed=_SEED,
        size=_SIZE,
    )


def magnitude_of(name: str) -> float:
    """An option's strength in the preset `strong`, or where that has none, in another preset."""
    chosen = [PRESETS["strong"], *PRESETS.values()]
    return next(preset[name] for preset in chosen if name in preset)


def faces(count: int) -> np.ndarray:
    """(count, S, S) uint8 drawn faces, the expressions in turn."""
    labels = len(synthetic.EXPRESSIONS)
    drawn = [synthetic.draw(index % labels, _SEED, index, _SIZE) for index in range(count)]
    return np.stack(drawn)


def picture(rows: np.ndarray) -> str:
    """Faces (rows, columns, S, S) uint8 in one PNG, as a data URI."""
    padded = np.pad(
        rows, [(0, 0), (0, 0), (0, _GAP), (0, _GAP)], constant_values=_GAP_GREY
    ).transpose(0, 2, 1, 3)
    sheet = padded.reshape(padded.shape[0] * padded.shape[1], -1)[:-_GAP, :-_GAP]
    encoded = cv2.imencode(".png", np.ascontiguousarray(sheet))[1].tobytes()
    return f"data:image/png;base64,{base64.b64encode(encoded).decode()}"


def engines(config: TransformConfig, shown: np.ndarray, fill: int) -> dict[str, str]:
    """A picture of samples by each engine, by its name; a row an epoch."""
    samples = np.arange(len(shown))
    library = LibraryAugmenter(config, seed=_SEED, fill=fill, image_size=_SIZE)
    device = DeviceAugmenter(config, seed=_SEED, fill=fill)
    images = torch.from_numpy(shown)
    rows = {
        "albumentations": [library(shown, samples, epoch) for epoch in range(SAMPLES)],
        "device": [device(images, samples, epoch).numpy() for epoch in range(SAMPLES)],
    }
    return {engine: picture(np.stack(made)) for engine, made in rows.items()}


def _only(**magnitudes: float) -> TransformConfig:
    return TransformConfig(augmentation="none", **magnitudes)  # type: ignore[arg-type]


def _flags() -> dict[str, str]:
    return {spec.name: flag_of(spec) for spec in dataclasses.fields(TransformConfig)}


def _option(name: str, magnitude: float, shown: np.ndarray, fill: int) -> dict[str, Any]:
    return {
        "name": name,
        "flag": f"{_flags()[name]} {magnitude:g}",
        "engines": engines(_only(**{name: magnitude}), shown, fill),
    }


def _preset(name: str, shown: np.ndarray, fill: int) -> dict[str, Any]:
    flags = _flags()
    return {
        "name": name,
        "flag": f"--augmentation {name}",
        "doc": ", ".join(f"{flags[key]} {value:g}" for key, value in PRESETS[name].items()),
        "mixes": [key for key in MIXING if key in PRESETS[name]],
        "engines": engines(TransformConfig(augmentation=name), shown, fill),
    }


def _mixed(name: str, shown: np.ndarray) -> dict[str, Any]:
    """The faces, what each is mixed with, and the result; a batch of the faces alone."""
    magnitude = magnitude_of(name)
    config = _only(**{name: magnitude})
    drawn = [draw_mix(config, (_SEED, 0, step), len(shown), _SIZE) for step in range(STEPS)]
    plan = max(filter(None, drawn), key=lambda one: (one.own_share * (1 - one.own_share)).sum())
    mix = plan.of(slice(0, len(shown)), torch.device("cpu"))
    batch = torch.from_numpy(shown).unsqueeze(1).float()
    mixed = mix.apply(batch).squeeze(1).round().to(torch.uint8).numpy()
    return {
        "name": name,
        "flag": f"{_flags()[name]} {magnitude:g}",
        "picture": picture(np.stack([shown, shown[plan.partner], mixed])),
        "shares": ", ".join(f"{100 * share:.0f}\u00a0%" for share in plan.own_share),
    }


def _normalized(name: str, shown: np.ndarray, crowd: np.ndarray) -> dict[str, str]:
    """What the network sees, the numbers made grey again."""
    plain = Normalizer(normalization=name, mean=0.0, std=1.0)
    mean, std = moments(histogram(plain.pixel_stage(torch.from_numpy(crowd))))
    numbers = Normalizer(normalization=name, mean=mean, std=std)(torch.from_numpy(shown))
    centred = name.endswith("dataset") or name == "standardize"
    grey = (numbers + 3.0) / 6.0 if centred else numbers
    pixels = (grey.clamp(0, 1) * 255).round().to(torch.uint8).squeeze(1).numpy()
    return {
        "name": name,
        "flag": f"--normalization {name}",
        "range": "-3 is black, 3 is white" if centred else "0 is black, 1 is white",
        "picture": picture(pixels[None]),
    }


def _docs() -> dict[str, str]:
    """The string under each field of `TransformConfig`."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(TransformConfig))).body
    assert isinstance(body, ast.ClassDef)
    return {
        item.target.id: following.value.value.replace("`", "")
        for item, following in zip(body.body, body.body[1:])
        if isinstance(item, ast.AnnAssign)
        and isinstance(item.target, ast.Name)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
        and isinstance(following.value.value, str)
    }
