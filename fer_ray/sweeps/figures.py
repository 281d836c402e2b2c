"""The figures of a sweep's report, drawn in the style of `fer_ray.reporting.svg`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fer_ray.config import overrides
from fer_ray.reporting.svg import (
    GRID,
    INK,
    MARKERS,
    MUTED,
    as_svg,
    drawn,
    legend,
    series_colour,
    short,
)
from fer_ray.reporting.text import percent
from fer_ray.sweeps import sentences, store
from fer_ray.sweeps.importance import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_CURVES = 6
"""Number of arms that are drawn in colour; the others are grey."""
_LONGEST_NAME = 26


def arm_dots(summary: Mapping[str, Any], scores: pd.DataFrame) -> str:
    """Accuracy of each arm: every seed, their mean and the 95 % interval of the mean.

    Args:
        summary: the content of ``summary.json``.
        scores: the last epochs of the finished trials, rows of ``trials.parquet``.
    """
    arms = summary["arms"]
    with drawn(0.9 + 0.42 * len(arms)) as (figure, axes):
        for row, arm in enumerate(arms):
            mean = arm["accuracy"]
            of_arm = scores[scores["arm"] == arm["arm"]]["validation_accuracy"]
            axes.plot(
                100 * of_arm,
                np.full(len(of_arm), row + 0.24),
                marker="|",
                markersize=7,
                markeredgewidth=1.5,
                linestyle="none",
                color=MUTED,
            )
            if mean["mean"] is not None:
                _interval(axes, row - 0.08, mean["mean"], mean["low"], mean["high"], True)
        base = arms[0]["accuracy"]["mean"]
        if base is not None:
            axes.axvline(100 * base, color=MUTED, linewidth=1, linestyle=(0, (3, 2)), zorder=0)
        _name_rows(axes, _short_names([arm["arm"] for arm in arms]))
        _keep_to(axes, 100 * scores["validation_accuracy"])
        axes.set_xlabel("validation accuracy, %")
        means = [(arm["arm"], arm["accuracy"]["mean"]) for arm in arms]
        values = "; ".join(f"{arm} {percent(mean)}" for arm, mean in means)
        return as_svg(figure, f"Mean accuracy over seeds with 95 % intervals, in %: {values}")


def difference_dots(summary: Mapping[str, Any]) -> str:
    """Each arm's difference to the baseline in points, with its 95 % interval."""
    arms = [arm for arm in summary["arms"][1:] if arm["accuracy"]["difference"] is not None]
    with drawn(0.9 + 0.42 * len(arms)) as (figure, axes):
        for row, arm in enumerate(arms):
            compared = arm["accuracy"]
            ends = compared["difference_low"], compared["difference_high"]
            _interval(axes, row, compared["difference"], *ends, bool(compared["shown"]))
        axes.axvline(0, color=INK, linewidth=1.2, zorder=0)
        _name_rows(axes, _short_names([arm["arm"] for arm in arms]))
        axes.set_xlabel(f"difference to {short(summary['comparison']['baseline'])}, points")
        values = "; ".join(
            f"{arm['arm']} {sentences.points(arm['accuracy']['difference'])}" for arm in arms
        )
        return as_svg(figure, f"Differences to the baseline with 95 % intervals, points: {values}")


def _interval(
    axes: Axes, row: float, value: float, low: float | None, high: float | None, filled: bool
) -> None:
    """A dot with its interval; hollow where no effect is shown."""
    ends = None
    if low is not None and high is not None:
        ends = 100 * np.array([[value - low], [high - value]])
    axes.errorbar(
        [100 * value],
        [row],
        xerr=ends,
        fmt="o",
        color=series_colour(0),
        markerfacecolor=series_colour(0) if filled else "none",
        markersize=7,
        markeredgewidth=1.8,
        linewidth=2,
        capsize=4,
    )


def _keep_to(axes: Axes, values: pd.Series) -> None:
    """Cuts off the very wide intervals of two seeds, so that the scores can be told apart."""
    low, high = axes.get_xlim()
    room = max(values.max() - values.min(), 1e-3)
    axes.set_xlim(max(low, values.min() - room), min(high, values.max() + room))


def _short_names(arms: Sequence[str]) -> list[str]:
    """The values alone, where all arms are values of the same setting."""
    settings = {arm.partition("=")[0] for arm in arms}
    if len(settings) == 1 and not any("," in arm for arm in arms):
        return [arm.partition("=")[2] or arm for arm in arms]
    return list(arms)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [short(name, _LONGEST_NAME) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x")


def arm_curves(summary: Mapping[str, Any], trials: pd.DataFrame) -> str:
    """Accuracy over the epochs, the mean over the seeds of each arm.

    The baseline and the best arms are drawn in colour.

    Args:
        summary: the content of ``summary.json``.
        trials: the content of ``trials.parquet``.
    """
    from matplotlib.ticker import MaxNLocator

    base = summary["comparison"]["baseline"]
    known = [arm for arm in summary["arms"] if arm["accuracy"]["mean"] is not None]
    ranked = sorted(known, key=lambda arm: (arm["arm"] != base, -arm["accuracy"]["mean"]))
    coloured = [arm["arm"] for arm in ranked][:MOST_CURVES]
    finished = trials[trials["status"] == store.FINISHED]
    curves = finished.groupby(["arm", "epoch"])["validation_accuracy"].mean()
    with drawn(3.2 + 0.25 * len(coloured)) as (figure, axes):
        for name in [arm["arm"] for arm in reversed(ranked)]:
            style: dict[str, Any] = {"color": MUTED, "alpha": 0.4, "linewidth": 1.2}
            if name in coloured:
                style = _curve_style(coloured.index(name), len(curves[name]))
            axes.plot(curves[name].index, 100 * curves[name], **style)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.set_ylabel("validation accuracy, %")
        axes.grid()
        # the legend follows the ranking; the best arms are drawn last, on top
        for name in coloured:
            label = short(name) + (" (baseline)" if name == base else "")
            style = _curve_style(coloured.index(name), 0)
            axes.plot([], [], label=label, **style)
        legend(figure, len(coloured))
        return as_svg(figure, f"Accuracy over the epochs, mean of the seeds of {len(known)} arms")


def _curve_style(number: int, epochs: int) -> dict[str, Any]:
    return {
        "color": series_colour(number),
        "marker": MARKERS[number],
        "markersize": 5,
        "markevery": max(1, epochs // 12),
        "linewidth": 1.8,
    }


def accuracy_against_epochs(trials: pd.DataFrame) -> str:
    """The accuracy of the best finished trial so far against the epochs run by all trials.

    Args:
        trials: the content of ``trials.parquet``; where it has no times, the trials are in the
            order of their numbers.
    """
    ended = finished_in_order(trials)
    scores = ended["validation_accuracy"]
    best = 100 * scores.cummax()
    ends = [*ended["spent"], int((trials["epoch"] > 0).sum())]
    with drawn(3.4) as (figure, axes):
        axes.plot(
            ends[:-1],
            100 * scores,
            "o",
            color=MUTED,
            markersize=4,
            alpha=0.7,
            label="finished trial",
        )
        axes.step(
            ends,
            [*best, best.iloc[-1]],
            where="post",
            color=series_colour(0),
            linewidth=2,
            label="best so far",
        )
        axes.set_xlabel("epochs run by all trials together")
        axes.set_ylabel("validation accuracy, %")
        axes.grid()
        legend(figure, 2)
        end = f"{best.iloc[-1]:.1f} % after {ends[-1]:,} epochs"
        return as_svg(figure, f"Best accuracy of a finished trial against epochs run: {end}")


def finished_in_order(trials: pd.DataFrame) -> pd.DataFrame:
    """The last rows of the finished trials, in the order in which they ended.

    The column `spent` has the epochs that all trials together had run by then.
    """
    run = trials[trials["epoch"] > 0]
    if is_timed(trials):
        run = run.sort_values(["ended_at", "trial", "epoch"])
    run = run.assign(spent=range(1, len(run) + 1))
    last = run.sort_values("epoch").drop_duplicates("trial", keep="last").sort_values("spent")
    return last[(last["status"] == store.FINISHED) & last["validation_accuracy"].notna()]


def is_timed(trials: pd.DataFrame) -> bool:
    """Whether the end of every epoch has a time."""
    run = trials[trials["epoch"] > 0]
    return bool(run["ended_at"].notna().all())


def importance_bars(summary: Mapping[str, Any]) -> str:
    """The fraction of the accuracy's variance that each option explains."""
    shares = summary["importance"]["shares"]
    names = [overrides.column_of(name) for name in shares]
    percent = [100 * fraction for fraction in shares.values()]
    with drawn(0.9 + 0.3 * len(shares)) as (figure, axes):
        axes.barh(range(len(names)), percent, height=0.62, color=series_colour(0), alpha=0.75)
        for row, value in enumerate(percent):
            axes.text(value + 0.6, row, f"{value:.0f}", va="center", fontsize=9, color=INK)
        _name_rows(axes, names)
        axes.set_xlabel("explained variance, %")
        values = "; ".join(f"{name} {value:.0f} %" for name, value in zip(names, percent))
        return as_svg(figure, f"Importance of each option: {values}")


def parallel_coordinates(summary: Mapping[str, Any], finished: pd.DataFrame) -> str:
    """One line per finished trial through the values of its options, the most important first.

    Args:
        summary: the content of ``summary.json``.
        finished: the last epochs of the finished trials, rows of ``trials.parquet``.
    """
    space = summary["space"]
    ranked = [name for name in summary["importance"]["shares"] if name in space]
    names = [*ranked, *(name for name in space if name not in ranked)]
    best = {trial["trial"] for trial in summary["best"]}
    heights = np.cumsum([0.0, *(_axis_height(space[name]) for name in names)])
    scores = 100 * finished["validation_accuracy"]
    accuracy = {"low": float(scores.min()), "high": float(scores.max())}
    with drawn(0.6 + 0.42 * float(heights[-1] + 1)) as (figure, axes):
        for name, height in zip(names, heights):
            _axis(axes, float(height), space[name])
        _axis(axes, float(heights[-1]), accuracy, "%")
        for row in finished.to_dict("records"):
            positions = [_position(space[name], row[overrides.column_of(name)]) for name in names]
            positions.append(_position(accuracy, 100 * row["validation_accuracy"]))
            style: dict[str, Any] = {"color": MUTED, "alpha": 0.35, "linewidth": 0.9, "zorder": 2}
            if row["trial"] in best:
                style = {"color": series_colour(0), "alpha": 0.8, "linewidth": 1.5, "zorder": 3}
            axes.plot(positions, heights, **style)
        axes.set_yticks(heights, [*(overrides.column_of(name) for name in names), "accuracy"])
        axes.set_ylim(heights[-1] + 0.75, -0.5)
        axes.set_xlim(-0.03, 1.03)
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        lines = f"{len(finished)} finished trials, one line each; the best {len(best)} in colour"
        return as_svg(figure, f"Options and accuracy of {lines}")


_CROWDED = 4
"""More choices than this are labelled on two levels, every other one lower."""


def _axis_height(values: Any) -> float:
    """Height of an axis with its labels, in lines."""
    return 1.0 if isinstance(values, Mapping) or len(values) <= _CROWDED else 1.45


def _axis(axes: Axes, height: float, values: Any, unit: str = "") -> None:
    """The values of an option from left to right: both ends of a range, or every choice."""
    axes.plot([0, 1], [height, height], color=GRID, linewidth=1.2, zorder=1)
    if isinstance(values, Mapping):
        ends = {0.0: values["low"], 1.0: values["high"]}
        labels = {at: f"{sentences.value(end)} {unit}".strip() for at, end in ends.items()}
    else:
        labels = {_position(values, choice): short(str(choice), 18) for choice in values}
    for number, (at, text) in enumerate(labels.items()):
        axes.plot([at], [height], marker="|", markersize=6, color=MUTED, zorder=1)
        side = "left" if at == 0 else "right" if at == 1 else "center"
        lower = 0.42 if len(labels) > _CROWDED and number % 2 else 0.0
        style: dict[str, Any] = {"va": "top", "ha": side, "fontsize": 8, "color": INK, "zorder": 4}
        axes.text(at, height + 0.14 + lower, text, **style)


def _position(values: Any, value: Any) -> float:
    """The position of a value on the axis of its option, 0 to 1."""
    if not isinstance(values, Mapping):
        choices = list(values)
        return choices.index(plain(value)) / max(len(choices) - 1, 1)
    low, high, number = values["low"], values["high"], float(value)
    if values.get("log"):
        low, high, number = np.log([low, high, number])
    return float((number - low) / (high - low)) if high > low else 0.5
