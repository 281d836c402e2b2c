"""The report's figures: SVG that takes its colours and its font from the page.

matplotlib draws with stand-in colours, which are then replaced by the page's CSS variables, so
that one figure suits light and dark. Figures are drawn about as wide as a phone, because SVG
scales its text with the rest. Runs differ in marker as well as in colour.
"""

from __future__ import annotations

import contextlib
import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fer_ray.evaluation.scores import Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = 8
"""Colours of runs; further runs begin again with the first."""

INK, MUTED, GRID = "#010101", "#020202", "#030303"
_HEAT, _HEAT_TEXT, _HEAT_LOW = "#040404", "#050505", "#070707"
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    _HEAT: "var(--heat)",
    _HEAT_TEXT: "var(--heat-text)",
    _HEAT_LOW: "var(--heat-low)",
    **{f"#0606{number:02x}": f"var(--series-{number + 1})" for number in range(SERIES)},
}
WIDTH_IN = 5.4
MARKERS = "os^DvPX*"
_DARK_CELL = 0.66
"""Rates above get the other text: here both texts have a contrast of 4.5 in either theme."""

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
    """A run's number among all runs of a page: its colour in every figure is that."""
    return list(runs).index(run) % SERIES


def accuracy_dots(scores: Sequence[Score], runs: Sequence[str]) -> str:
    """Accuracy of each run on one split with its 95 % interval."""
    with drawn(0.9 + 0.45 * len(scores)) as (figure, axes):
        for row, score in enumerate(scores):
            number = series(runs, score.run)
            one = score.accuracy
            ends = [[100 * (one.value - one.low)], [100 * (one.high - one.value)]]
            # The percentile interval of a tiny sample may leave out the estimate itself.
            axes.errorbar(
                [100 * one.value],
                [row],
                xerr=np.maximum(ends, 0),
                fmt=MARKERS[number],
                color=series_colour(number),
                markersize=8,
                linewidth=2.2,
                capsize=4,
            )
        axes.set_yticks(range(len(scores)), [short(score.run) for score in scores])
        axes.set_ylim(len(scores) - 0.4, -0.6)
        axes.set_xlabel("accuracy, % (95 % interval)")
        axes.grid(axis="x")
        summary = "; ".join(f"{s.run} {100 * s.accuracy.value:.1f} %" for s in scores)
        return as_svg(figure, f"Accuracy with 95 % intervals: {summary}")


def class_f1_bars(scores: Sequence[Score], runs: Sequence[str]) -> str:
    """F1 of each class on one split, runs side by side."""
    labels = scores[0].labels
    thickness = 0.8 / len(scores)
    height_in = 0.8 + len(labels) * (0.2 + 0.17 * len(scores)) + 0.25 * len(scores)
    with drawn(height_in) as (figure, axes):
        for row, score in enumerate(scores):
            number = series(runs, score.run)
            f1 = [score.per_class.f1[score.labels.index(label)] for label in labels]
            places = np.arange(len(labels)) + (row + 0.5) * thickness - 0.4
            percent = np.nan_to_num(100 * np.array(f1))
            colour = series_colour(number)
            axes.barh(places, percent, height=0.9 * thickness, color=colour, alpha=0.45)
            axes.plot(
                percent,
                places,
                color=colour,
                marker=MARKERS[number],
                markersize=6,
                linestyle="none",
                label=short(score.run),
                clip_on=False,
            )
        axes.set_yticks(range(len(labels)), [short(label) for label in labels])
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.set_xlabel("F1, %")
        axes.grid(axis="x")
        legend(figure, len(scores))
        names = ", ".join(score.run for score in scores)
        return as_svg(figure, f"F1 of each class for {names}; the numbers are in the table")


def confusion_heatmap(score: Score) -> str:
    """One run's confusion matrix: shade and percentage by row, the count below."""
    counts = score.confusion
    size = len(score.labels)
    rates = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    with drawn(WIDTH_IN * 0.92) as (figure, axes):
        for row, column in np.ndindex(size, size):
            _cell(axes, row, column, float(rates[row, column]), int(counts[row, column]), size)
        names = [short(label, 14) for label in score.labels]
        turned = size > 4 or max(map(len, names)) > 9
        axes.set_xticks(
            range(size),
            names,
            rotation=40 if turned else 0,
            ha="right" if turned else "center",
            rotation_mode="anchor",
        )
        axes.set_yticks(range(size), names)
        axes.set_xlim(-0.5, size - 0.5)
        axes.set_ylim(size - 0.5, -0.5)
        axes.set_aspect("equal")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        summary = ", ".join(
            f"{label} {100 * rates[index, index]:.0f} %" for index, label in enumerate(score.labels)
        )
        return as_svg(figure, f"Confusion matrix of {score.run}, rightly predicted: {summary}")


def _cell(axes: Axes, row: int, column: int, rate: float, count: int, size: int) -> None:
    from matplotlib.patches import Rectangle

    corner = (column - 0.485, row - 0.485)
    axes.add_patch(Rectangle(corner, 0.97, 0.97, facecolor="none", edgecolor=GRID, linewidth=0.6))
    if rate > 0:
        axes.add_patch(Rectangle(corner, 0.97, 0.97, facecolor=_HEAT, alpha=rate, linewidth=0))
    colour = _HEAT_TEXT if rate > _DARK_CELL else _HEAT_LOW
    scale = min(1.0, 7 / size)
    place: dict[str, Any] = {"ha": "center", "color": colour}
    percentage, number = f"{100 * rate:.0f} %", f"{count:,}"
    axes.text(column, row - 0.04, percentage, va="bottom", fontsize=10 * scale, **place)
    axes.text(column, row + 0.04, number, va="top", fontsize=8 * scale, **place)


def learning_curves(
    histories: Mapping[str, pd.DataFrame], quantity: str, unit: str, runs: Sequence[str]
) -> str:
    """A quantity of training and validation over the epochs.

    Args:
        histories: one row an epoch with ``epoch``, ``train_<quantity>`` and
            ``validation_<quantity>``, by run.
        quantity: ``loss``, ``accuracy`` or ``macro_f1``.
        unit: ``%`` multiplies by 100.
        runs: every run of the page.
    """
    from matplotlib.ticker import MaxNLocator

    factor = 100 if unit == "%" else 1
    title = quantity.replace("_f1", "-F1")
    with drawn(3.2 + 0.25 * len(histories)) as (figure, axes):
        for run, history in histories.items():
            number = series(runs, run)
            style: dict[str, Any] = {"color": series_colour(number), "linewidth": 1.8}
            epochs = history["epoch"]
            axes.plot(epochs, factor * history[f"train_{quantity}"], linestyle=(0, (3, 2)), **style)
            axes.plot(
                epochs,
                factor * history[f"validation_{quantity}"],
                label=short(run),
                marker=MARKERS[number],
                markersize=5,
                markevery=max(1, len(history) // 12),
                **style,
            )
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.set_ylabel(f"{title}, {unit}")
        axes.grid()
        legend(figure, len(histories))
        ends = "; ".join(
            f"{run} {factor * history[f'validation_{quantity}'].iloc[-1]:.3g} {unit}"
            for run, history in histories.items()
        )
        return as_svg(figure, f"Learning curves, {title}; validation after the last epoch: {ends}")


@contextlib.contextmanager
def drawn(height_in: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure with one axes, drawn in the page's style; no window, no global figure."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        yield figure, figure.add_subplot()


def legend(figure: Figure, entries: int) -> None:
    """Below the axes, where names of any length have room; none for a single run."""
    if entries > 1:
        figure.legend(loc="outside lower left", ncols=1, handlelength=2.4, labelspacing=0.3)


def series_colour(number: int) -> str:
    return f"#0606{number:02x}"


def short(name: str, most: int = 30) -> str:
    """A name that fits into a figure: the middle of a long one left out."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-(most // 2 - 1) :]}"


_FONT_FAMILY = re.compile(r"font-family: [^;]*;? ?")  # the page's font is used
_RENAMED = {"{http://www.w3.org/1999/xlink}href": "href"}


def as_svg(figure: Figure, description: str) -> str:
    """The figure as an ``<svg>`` element for HTML: described, themed, its ids its own."""
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
    _drop(root, {"metadata", "style"})  # a <style> in the page would hold for all of it
    _, _, width, height = root.attrib["viewBox"].split()
    root.attrib = {"viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": description}
    return ET.tostring(root, encoding="unicode", short_empty_elements=False)


def _prefix(description: str) -> str:
    """Different for each figure of a page, and the same each time that it is drawn."""
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
