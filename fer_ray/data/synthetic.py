"""Drawing of synthetic faces with seven expressions.

A face is drawn from polygons at a higher resolution and scaled down. The expression changes
brows, eyes, nose and mouth as in people, by a varying intensity (the combinations follow the
action units of Ekman and Friesen's Facial Action Coding System). Identity, pose, light and noise
vary independently of the expression. Only the seed and the index decide what is drawn, so any
worker can draw any image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import cv2
import numpy as np

from fer_ray.data.labels import FER2013_LABELS

_CANVAS = 192
"""Smallest side of the canvas, in pixels: four times that of a 48-pixel image."""

_SHIFT = 4
"""Fractional bits of the coordinates that OpenCV receives."""

_TURN = np.linspace(0, 2 * np.pi, 20, endpoint=False)
_CIRCLE = np.stack([np.cos(_TURN), np.sin(_TURN)], axis=1)
_SPAN = np.linspace(-1, 1, 9)


@dataclass(frozen=True, kw_only=True)
class Expression:
    """How an expression changes a face. Lengths are in units of half the face's width."""

    brow_inner: float = 0.0
    """How far the inner ends of the brows are raised; negative: lowered."""
    brow_outer: float = 0.0
    """How far the outer ends of the brows are raised."""
    brow_pinch: float = 0.0
    """How far each brow moves towards the middle."""
    eye_open: float = 0.115
    """Half the height of the open eye."""
    eye_slant: float = 0.0
    """How far the outer corner of the eye is lowered."""
    mouth_curve: float = 0.0
    """How far the corners of the mouth are above its middle: positive for a smile."""
    mouth_open: float = 0.0
    """Half the height of the open mouth, at its middle."""
    mouth_width: float = 0.34
    """Half the width of the mouth."""
    mouth_square: float = 0.0
    """Shape of the open mouth: 0 for pointed corners, 1 for nearly rectangular."""
    upper_lip: float = 0.0
    """How far the middle of the upper lip is raised."""
    teeth: float = 0.0
    """Fraction of the open mouth that the teeth cover, from above, 0 to 1."""
    nose_wrinkle: float = 0.0
    """Depth of the wrinkles across the nose and of the folds beside it, 0 to 1."""
    cheeks: float = 0.0
    """Depth of the folds below the eyes when smiling, 0 to 1."""


_REST = Expression()

EXPRESSIONS = {
    "angry": Expression(
        brow_inner=-0.17, brow_outer=0.07, brow_pinch=0.07, eye_open=0.085, eye_slant=-0.03,
        mouth_curve=-0.06, mouth_open=0.065, mouth_width=0.33, mouth_square=0.9, teeth=1.0,
    ),
    "disgust": Expression(
        brow_inner=-0.10, brow_outer=-0.04, brow_pinch=0.03, eye_open=0.05,
        mouth_curve=-0.10, mouth_open=0.035, mouth_width=0.30, upper_lip=0.12, teeth=0.4,
        nose_wrinkle=1.0,
    ),
    "fear": Expression(
        brow_inner=0.17, brow_outer=0.05, brow_pinch=0.05, eye_open=0.19, eye_slant=0.02,
        mouth_curve=-0.07, mouth_open=0.09, mouth_width=0.42, mouth_square=0.5, teeth=0.35,
    ),
    "happy": Expression(
        brow_inner=0.03, brow_outer=0.04, eye_open=0.08, mouth_curve=0.17, mouth_open=0.10,
        mouth_width=0.46, teeth=0.6, cheeks=1.0,
    ),
    "neutral": _REST,
    "sad": Expression(
        brow_inner=0.15, brow_outer=-0.09, brow_pinch=0.03, eye_open=0.075, eye_slant=0.05,
        mouth_curve=-0.14, mouth_width=0.29,
    ),
    "surprise": Expression(
        brow_inner=0.19, brow_outer=0.19, eye_open=0.185, mouth_open=0.23, mouth_width=0.21,
        mouth_square=0.25, teeth=0.12,
    ),
}  # fmt: skip
"""Each label's expression at full intensity; most faces are drawn between it and rest."""


def draw(label: int, seed: int, index: int, size: int = 48) -> np.ndarray:
    """Draws one face; the same arguments always give the same pixels.

    Args:
        label: index into `FER2013_LABELS`.
        seed: seed of the whole dataset.
        index: number of the image within the dataset.
        size: height and width, in pixels.

    Returns:
        (size, size) uint8, grey.
    """
    rng = np.random.default_rng((seed, index))
    expression = _vary(EXPRESSIONS[FER2013_LABELS[label]], rng)
    side = _CANVAS if size <= _CANVAS // 2 else 2 * size
    sheet = _Sheet()
    background = _draw_head(sheet, expression, rng)
    canvas = np.full((side, side), background, np.uint8)
    sheet.paint(canvas, *_pose(rng, side))
    small = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)
    return _expose(small, rng)


class _Sheet:
    """Collects shapes in face coordinates, to transform all of them to pixels at once.

    The origin is the middle of the face, the unit half its width, and y points down.
    """

    def __init__(self) -> None:
        self.points: list[np.ndarray] = []
        self.tones: list[int] = []
        self.widths: list[float] = []

    def fill(self, points: np.ndarray, tone: float) -> None:
        """Adds a polygon, (N, 2), filled with a grey tone; the tone is clipped to 0..255."""
        self.line(points, tone, 0.0)

    def line(self, points: np.ndarray, tone: float, width: float) -> None:
        """Adds an open line through points, (N, 2); `width` is in face units."""
        self.points.append(points)
        self.tones.append(int(min(max(tone, 0), 255)))
        self.widths.append(width)

    def paint(self, canvas: np.ndarray, matrix: np.ndarray, offset: np.ndarray) -> None:
        """Draws every shape with its points at ``matrix @ point + offset``, in pixels."""
        posed = np.concatenate(self.points) @ matrix.T + offset
        fixed = np.rint(posed * 2**_SHIFT).astype(np.int32)
        scale = math.sqrt(abs(matrix[0, 0] * matrix[1, 1] - matrix[0, 1] * matrix[1, 0]))
        start = 0
        for points, tone, width in zip(self.points, self.tones, self.widths):
            shape = fixed[start : start + len(points)]
            start += len(points)
            if width:
                thick = max(1, round(width * scale))
                cv2.polylines(canvas, [shape], False, tone, thick, cv2.LINE_8, _SHIFT)
            else:
                cv2.fillPoly(canvas, [shape], tone, cv2.LINE_8, _SHIFT)


def _vary(full: Expression, rng: np.random.Generator) -> Expression:
    """Returns an expression at 60 to 105 % of its intensity, with noise on every field."""
    intensity = rng.uniform(0.6, 1.05)
    jitter = rng.normal(0, 1, len(fields(Expression)))
    values = {}
    for field, noise in zip(fields(Expression), jitter):
        rest, goal = getattr(_REST, field.name), getattr(full, field.name)
        spread = 0.012 + 0.12 * abs(goal - rest)
        values[field.name] = rest + intensity * (goal - rest) + spread * noise
    for name in ("mouth_open", "teeth", "nose_wrinkle", "cheeks", "mouth_square"):
        values[name] = max(0.0, values[name]) if getattr(full, name) else 0.0
    values["eye_open"] = max(0.03, values["eye_open"])
    return Expression(**values)


def _pose(rng: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws a pose: the (2, 2) matrix and (2,) offset from face units to pixels."""
    tilt = np.clip(rng.normal(0, 0.12), -0.35, 0.35)
    scale = side * rng.uniform(0.33, 0.43)
    stretch = rng.uniform(0.92, 1.08)
    offset = side * (0.5 + rng.uniform(-0.06, 0.06, 2))
    cos, sin = math.cos(tilt), math.sin(tilt)
    return scale * np.array([[cos * stretch, -sin], [sin * stretch, cos]]), offset


def _draw_head(sheet: _Sheet, expression: Expression, rng: np.random.Generator) -> int:
    """Draws a head with a random identity; returns the background's tone."""
    skin = rng.uniform(95, 225)
    hair = rng.uniform(15, 110) if rng.random() < 0.8 else rng.uniform(170, 235)
    background = int(rng.integers(20, 236))
    turn = np.clip(rng.normal(0, 0.08), -0.2, 0.2)  # turning the head moves its features sideways
    long, tall = rng.uniform(1.15, 1.38), rng.random()
    if tall < 0.4:  # long hair falls behind the neck
        sheet.fill(_CIRCLE * (1.22, long + 0.25) + (0, 0.1), hair)
    sheet.fill(np.array([(-0.45, 0.7), (0.45, 0.7), (0.6, 2.6), (-0.6, 2.6)]), skin * 0.8)
    for side in (-1, 1):
        sheet.fill(_CIRCLE * (0.14, 0.24) + (side * (0.98 + turn * side), 0.02), skin * 0.88)
    if tall < 0.9:
        sheet.fill(_CIRCLE * (1.08, 0.95) + (0, -0.42), hair)
    jaw = rng.uniform(0.82, 1.0)
    face = _CIRCLE * (1, long)
    face[:, 0] *= np.where(face[:, 1] > 0, 1 - (1 - jaw) * face[:, 1] / long, 1)
    fringe = rng.uniform(-0.95, -0.68)
    sheet.fill(np.maximum(face, (-9, fringe)) if tall < 0.9 else face, skin)
    for side in (-1, 1):
        _draw_eye(sheet, expression, rng, side, turn, skin, hair)
    _draw_nose(sheet, expression, rng, turn, skin)
    _draw_mouth(sheet, expression, rng, turn, skin)
    if rng.random() < 0.12:  # glasses
        for side in (-1, 1):
            rim = _CIRCLE * (0.3, 0.24) + (side * 0.4 + turn, -0.18)
            sheet.line(np.concatenate([rim, rim[:1]]), skin * 0.25, 0.035)
        sheet.line(np.array([(turn - 0.1, -0.2), (turn + 0.1, -0.2)]), skin * 0.25, 0.035)
    return background


def _draw_eye(
    sheet: _Sheet,
    expression: Expression,
    rng: np.random.Generator,
    side: int,
    turn: float,
    skin: float,
    hair: float,
) -> None:
    """Draws an eye and its brow; `side` is -1 for the left side of the image, 1 for the right."""
    center = np.array([side * 0.4 + turn, -0.18])
    half, lift = 0.21, expression.eye_open
    slant = side * expression.eye_slant * _SPAN
    lid = (1 - _SPAN**2) * lift
    upper = np.stack([_SPAN * half, slant - lid], axis=1) + center
    lower = np.stack([_SPAN * half, slant + 0.75 * lid], axis=1) + center
    sheet.fill(np.concatenate([upper, lower[::-1]]), min(250, skin * 0.35 + 165))
    gaze = np.array([turn * 0.5, 0.0])
    iris = _CIRCLE * 0.105 + gaze
    room = (1 - np.clip(iris[:, 0] / half, -1, 1) ** 2) * lift
    iris[:, 1] = np.clip(iris[:, 1], -room, 0.75 * room)
    sheet.fill(iris + center, 25)
    sheet.line(upper, skin * 0.3, 0.045)
    sheet.line(lower, skin * 0.65, 0.025)
    if expression.cheeks:
        fold = np.stack([_SPAN * 0.2, 0.2 + 0.05 * _SPAN**2], axis=1) + center
        sheet.line(fold, skin * (1 - 0.3 * min(1.0, expression.cheeks)), 0.03)
    inner = (side * (0.17 - expression.brow_pinch) + turn, -0.46 - expression.brow_inner)
    outer = (side * 0.66 + turn, -0.43 - expression.brow_outer)
    middle_y = (inner[1] + outer[1]) / 2 - 0.06
    brow = np.array([inner, (side * 0.42 + turn, middle_y), outer])
    dark = min(0.6 * skin, hair if hair < 120 else 0.5 * skin)
    sheet.line(brow, dark, rng.uniform(0.065, 0.105))


def _draw_nose(
    sheet: _Sheet, expression: Expression, rng: np.random.Generator, turn: float, skin: float
) -> None:
    length, wide = rng.uniform(0.2, 0.34), rng.uniform(0.1, 0.17)
    x = 1.4 * turn
    shadow = skin * 0.72
    side = 1 if rng.random() < 0.5 else -1
    sheet.line(np.array([(turn + side * 0.06, -0.1), (x + side * wide, length)]), shadow, 0.03)
    wings = np.stack([_SPAN * wide + x, length + 0.04 * (1 - _SPAN**2)], axis=1)
    sheet.line(wings, skin * 0.5, 0.045)
    depth = min(1.0, expression.nose_wrinkle)
    if depth:
        tone = skin * (1 - 0.55 * depth)
        for y in (-0.16, -0.06, 0.04):
            wrinkle = np.array([(turn - 0.11, y + 0.03), (turn, y - 0.03), (turn + 0.11, y + 0.03)])
            sheet.line(wrinkle, tone, 0.03)
        for sign in (-1, 1):
            fold = np.array([(0.2, length - 0.08), (0.36, length + 0.1), (0.42, length + 0.32)])
            sheet.line(fold * (sign, 1) + (x, 0), tone, 0.04)


def _draw_mouth(
    sheet: _Sheet, expression: Expression, rng: np.random.Generator, turn: float, skin: float
) -> None:
    x, y = 1.2 * turn, rng.uniform(0.60, 0.68)
    bend = expression.mouth_curve * (0.5 - _SPAN**2)  # the middle goes down as the corners rise
    round_ = 1 - np.abs(_SPAN) ** (2 + 6 * expression.mouth_square)
    raised = expression.upper_lip * np.clip(1 - 1.4 * np.abs(_SPAN), 0, 1)
    across = _SPAN * max(0.15, expression.mouth_width) + x
    open_ = expression.mouth_open
    upper = np.stack([across, y + bend - 0.8 * open_ * round_ - raised], axis=1)
    lower = np.stack([across, y + bend + 1.2 * open_ * round_ - 0.35 * raised], axis=1)
    if open_ > 0.01:
        sheet.fill(np.concatenate([upper, lower[::-1]]), 25)
        covered = min(1.0, expression.teeth)
        edge = upper + covered * (lower - upper)
        sheet.fill(np.concatenate([upper, edge[::-1]]), min(245, skin * 0.3 + 170))
        if covered > 0.9:  # clenched: a line where the rows of teeth meet
            sheet.line((upper + lower)[1:-1] / 2, 90, 0.02)
    lip = skin * rng.uniform(0.38, 0.55)
    thick = rng.uniform(0.045, 0.075)
    sheet.line(upper, lip, thick)
    sheet.line(lower, lip, thick)
    shade = np.stack([_SPAN[2:7] * 0.16 + x, lower[2:7, 1] + 0.15], axis=1)
    sheet.line(shade, skin * 0.8, 0.03)


def _expose(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Adds light from one side, exposure and sensor noise to an image, (N, N) uint8."""
    size = len(image)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    angle, slope = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.45)
    light = 1 + slope * (math.cos(angle) * ramp[None] + math.sin(angle) * ramp[:, None])
    contrast, brightness = rng.uniform(0.65, 1.05), rng.uniform(-30, 30)
    noise = rng.standard_normal((size, size), np.float32) * rng.uniform(2, 12)
    lit = (image * light - 128) * contrast + 128 + brightness + noise
    return np.clip(np.rint(lit), 0, 255).astype(np.uint8)
