"""The figures of an evaluation's report: each is an ``<svg>`` element as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fer_ray.evaluation.scores import Score
from fer_ray.reporting import svg
from fer_ray.reporting.text import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DARK_CELL = 0.66
"""Cells with a higher rate get the other text colour: at this rate both colours have a contrast of
at least 4.5 in either theme."""


def accuracy_dots(scores: Sequence[Score], runs: Sequence[str]) -> str:
    """Accuracy of each run on one split with its 95 % interval."""
    with svg.drawn(0.9 + 0.45 * len(scores)) as (figure, axes):
        for row, score in enumerate(scores):
            number = svg.series(runs, score.run)
            estimate = score.accuracy
            ends = [
                [100 * (estimate.value - estimate.low)],
                [100 * (estimate.high - estimate.value)],
            ]
            # the percentile interval of a tiny sample may exclude the estimate itself
            axes.errorbar(
                [100 * estimate.value],
                [row],
                xerr=np.maximum(ends, 0),
                fmt=svg.MARKERS[number],
                color=svg.series_colour(number),
                markersize=8,
                linewidth=2.2,
                capsize=4,
            )
        axes.set_yticks(range(len(scores)), [svg.short(score.run) for score in scores])
        axes.set_ylim(len(scores) - 0.4, -0.6)
        axes.set_xlabel("accuracy, % (95 % interval)")
        axes.grid(axis="x")
        summary = "; ".join(f"{score.run} {percent(score.accuracy.value)} %" for score in scores)
        return svg.as_svg(figure, f"Accuracy with 95 % intervals: {summary}")


def class_f1_bars(scores: Sequence[Score], runs: Sequence[str]) -> str:
    """F1 of each class on one split, runs side by side."""
    labels = scores[0].labels
    thickness = 0.8 / len(scores)
    height_in = 0.8 + len(labels) * (0.2 + 0.17 * len(scores)) + 0.25 * len(scores)
    with svg.drawn(height_in) as (figure, axes):
        for row, score in enumerate(scores):
            number = svg.series(runs, score.run)
            f1 = [score.per_class.f1[score.labels.index(label)] for label in labels]
            heights = np.arange(len(labels)) + (row + 0.5) * thickness - 0.4
            percentages = np.nan_to_num(100 * np.array(f1))
            colour = svg.series_colour(number)
            axes.barh(heights, percentages, height=0.9 * thickness, color=colour, alpha=0.45)
            axes.plot(
                percentages,
                heights,
                color=colour,
                marker=svg.MARKERS[number],
                markersize=6,
                linestyle="none",
                label=svg.short(score.run),
                clip_on=False,
            )
        axes.set_yticks(range(len(labels)), [svg.short(label) for label in labels])
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.set_xlabel("F1, %")
        axes.grid(axis="x")
        svg.legend(figure, len(scores))
        names = ", ".join(score.run for score in scores)
        return svg.as_svg(figure, f"F1 of each class for {names}; the numbers are in the table")


def confusion_heatmap(score: Score) -> str:
    """One run's confusion matrix: shade and percentage of the row, the count below."""
    counts = score.confusion
    size = len(score.labels)
    rates = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    with svg.drawn(svg.WIDTH_IN * 0.92) as (figure, axes):
        for row, column in np.ndindex(size, size):
            _cell(axes, row, column, float(rates[row, column]), int(counts[row, column]), size)
        names = [svg.short(label, 14) for label in score.labels]
        is_rotated = size > 4 or max(map(len, names)) > 9
        axes.set_xticks(
            range(size),
            names,
            rotation=40 if is_rotated else 0,
            ha="right" if is_rotated else "center",
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
        return svg.as_svg(figure, f"Confusion matrix of {score.run}; recall: {summary}")


def _cell(axes: Axes, row: int, column: int, rate: float, count: int, size: int) -> None:
    from matplotlib.patches import Rectangle

    corner = (column - 0.485, row - 0.485)
    axes.add_patch(
        Rectangle(corner, 0.97, 0.97, facecolor="none", edgecolor=svg.GRID, linewidth=0.6)
    )
    if rate > 0:
        axes.add_patch(Rectangle(corner, 0.97, 0.97, facecolor=svg.HEAT, alpha=rate, linewidth=0))
    colour = svg.HEAT_TEXT if rate > _DARK_CELL else svg.HEAT_LOW
    scale = min(1.0, 7 / size)
    style: dict[str, Any] = {"ha": "center", "color": colour}
    percentage, number = f"{100 * rate:.0f} %", f"{count:,}"
    axes.text(column, row - 0.04, percentage, va="bottom", fontsize=10 * scale, **style)
    axes.text(column, row + 0.04, number, va="top", fontsize=8 * scale, **style)


def learning_curves(
    histories: Mapping[str, pd.DataFrame], name: str, title: str, unit: str, runs: Sequence[str]
) -> str:
    """A quantity of training and validation over the epochs.

    Args:
        histories: by run; one row for each epoch with ``epoch``, ``train_<name>`` and
            ``validation_<name>``.
        name: ``loss`` or that of a metric.
        title: what the axis calls it.
        unit: ``%`` multiplies by 100; empty where there is none.
        runs: every run of the page, which decides the colours.
    """
    from matplotlib.ticker import MaxNLocator

    factor = 100 if unit == "%" else 1
    with svg.drawn(3.2 + 0.25 * len(histories)) as (figure, axes):
        for run, history in histories.items():
            number = svg.series(runs, run)
            style: dict[str, Any] = {"color": svg.series_colour(number), "linewidth": 1.8}
            epochs = history["epoch"]
            axes.plot(epochs, factor * history[f"train_{name}"], linestyle=(0, (3, 2)), **style)
            axes.plot(
                epochs,
                factor * history[f"validation_{name}"],
                label=svg.short(run),
                marker=svg.MARKERS[number],
                markersize=5,
                markevery=max(1, len(history) // 12),
                **style,
            )
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.set_ylabel(f"{title}, {unit}" if unit else title)
        axes.grid()
        svg.legend(figure, len(histories))
        ends = "; ".join(
            f"{run} {factor * history[f'validation_{name}'].iloc[-1]:.3g} {unit}"
            for run, history in histories.items()
        )
        return svg.as_svg(
            figure, f"Learning curves, {title}; validation after the last epoch: {ends}"
        )
