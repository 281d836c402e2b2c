"""Figures of reports: SVG that takes its colours and its font from the page.

matplotlib draws with placeholder colours, which are then replaced by the page's CSS variables, so
that the same figure suits the light and the dark theme. Figures are drawn about as wide as a
phone's screen, because SVG scales text together with everything else. Runs differ in marker as
well as in colour.
"""

from __future__ import annotations

import contextlib
import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = 8
"""Number of colours for runs; further runs start again with the first."""

INK, MUTED, GRID = "#010101", "#020202", "#030303"
HEAT, HEAT_TEXT, HEAT_LOW = "#040404", "#050505", "#070707"
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    HEAT: "var(--heat)",
    HEAT_TEXT: "var(--heat-text)",
    HEAT_LOW: "var(--heat-low)",
    **{f"#0606{number:02x}": f"var(--series-{number + 1})" for number in range(SERIES)},
}
WIDTH_IN = 5.4
MARKERS = "os^DvPX*"

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fer_ray",
    "text.parse_math": False,  # a class or run called $x$ is a name, not a formula
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "figure.facecolor": "none",
}


def series(runs: Sequence[str], run: str) -> int:
    """A run's number among all runs of a page, which decides its colour in every figure."""
    return list(runs).index(run) % SERIES


@contextlib.contextmanager
def drawn(height_in: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure with one pair of axes in the page's style, without a window or global state."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        yield figure, figure.add_subplot()


def legend(figure: Figure, entries: int) -> None:
    """Adds a legend below the axes, where long names have room; none for a single run."""
    if entries > 1:
        figure.legend(loc="outside lower left", ncols=1, handlelength=2.4, labelspacing=0.3)


def series_colour(number: int) -> str:
    """The placeholder of a run's colour, by the run's number."""
    return f"#0606{number:02x}"


def short(name: str, most: int = 30) -> str:
    """Shortens a name to fit into a figure: the middle of a long name is left out."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-(most // 2 - 1) :]}"


_FONT_FAMILY = re.compile(r"font-family: [^;]*;? ?")  # the page's font is used
_RENAMED = {"{http://www.w3.org/1999/xlink}href": "href"}


def as_svg(figure: Figure, description: str) -> str:
    """The figure as an ``<svg>`` element for HTML, with the page's colours and unique ids.

    Args:
        figure: drawn within `drawn`.
        description: read to those who cannot see the figure; different for each of a page.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    root = ET.fromstring(buffer.getvalue())
    prefix = _prefix(description)
    for element in root.iter():
        element.tag = element.tag.rsplit("}", 1)[-1]
        element.attrib = {
            _RENAMED.get(name, name): _themed(name, value, prefix)
            for name, value in element.attrib.items()
        }
    _drop(root, {"metadata", "style"})  # a <style> element would apply to the whole page
    _, _, width, height = root.attrib["viewBox"].split()
    root.attrib = {"viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": description}
    return ET.tostring(root, encoding="unicode", short_empty_elements=False)


def _prefix(description: str) -> str:
    """A prefix for ids: different for each figure of a page, the same whenever it is drawn."""
    import zlib

    return f"f{zlib.crc32(description.encode()):08x}-"


def _themed(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return prefix + value
    if name.endswith("href"):
        return value.replace("#", f"#{prefix}")
    value = _FONT_FAMILY.sub("", value.replace("url(#", f"url(#{prefix}"))
    for colour, variable in _VARIABLES.items():
        value = value.replace(colour, variable)
    return value


def _drop(root: ET.Element, tags: set[str]) -> None:
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in tags]:
            parent.remove(child)
