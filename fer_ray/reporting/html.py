"""Pages from templates with a common style; everything that comes from data is escaped."""

from __future__ import annotations

import base64
import importlib.resources
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fer_ray.reporting import text

REPORT = "report.html"
"""The page of an evaluation or a sweep, in its folder."""
EVALUATION_MARKER = "evaluation.json"
"""Marks a folder as an evaluation, which a later one may replace."""

LARGEST_IMAGE = 128
"""Pixels: larger images are reduced to this before they are put into a page."""


def render(template: str, filters: Mapping[str, Callable] | None = None, **values: Any) -> str:
    """Renders a page from a template of this package.

    Args:
        template: file name, such as ``report.html.j2``; it may include ``page.css.j2``.
        filters: what the template may call besides those of Jinja and of every page:
            ``safe_svg`` for markup of this project, and `text.keep_together`, `text.percent` and
            `text.p_value` by their names.
        values: what the template shows.

    Returns:
        The page as HTML.
    """
    import jinja2
    from markupsafe import Markup

    folder = importlib.resources.files("fer_ray.reporting") / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text("utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "safe_svg": Markup,
        "keep_together": text.keep_together,
        "percent": text.percent,
        "p_value": text.p_value,
        **(filters or {}),
    }
    return environment.get_template(template).render(**values)


def png_data_uri(image: np.ndarray) -> str:
    """An image, uint8 of shape (H, W), as a PNG inside a data URI."""
    import cv2

    largest = max(image.shape)
    if largest > LARGEST_IMAGE:
        factor = LARGEST_IMAGE / largest
        image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    encoded = cv2.imencode(".png", np.ascontiguousarray(image))[1].tobytes()
    return f"data:image/png;base64,{base64.b64encode(encoded).decode()}"
