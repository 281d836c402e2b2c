"""Pages from templates: one look, everything that comes from data escaped."""

from __future__ import annotations

import base64
import importlib.resources
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

LARGEST_PICTURE = 128
"""Pixels: larger pictures are made smaller before they are put into a page."""


def render(template: str, filters: Mapping[str, Callable], **values: Any) -> str:
    """A page as HTML, from a template of this package.

    Args:
        template: file name, such as ``report.html.j2``; it may include ``page.css.j2``.
        filters: what the template may call, besides ``safe_svg``: markup made by this project.
        values: what it shows.
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
    environment.filters |= {**filters, "safe_svg": Markup}
    return environment.get_template(template).render(**values)


def png_data_uri(picture: np.ndarray) -> str:
    """A picture, uint8 of shape (H, W), as a PNG inside a data URI."""
    import cv2

    largest = max(picture.shape)
    if largest > LARGEST_PICTURE:
        factor = LARGEST_PICTURE / largest
        picture = cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    encoded = cv2.imencode(".png", np.ascontiguousarray(picture))[1].tobytes()
    return f"data:image/png;base64,{base64.b64encode(encoded).decode()}"
