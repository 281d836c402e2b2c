"""A sweep's report: one page that needs nothing from outside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from fer_ray import storage
from fer_ray.config import overrides
from fer_ray.errors import UserError
from fer_ray.evaluation import tables
from fer_ray.reporting import html
from fer_ray.reporting.text import keep_together
from fer_ray.sweeps import figures, importance, sentences, store, summary
from fer_ray.sweeps.space import GRID

_PAGE = ".html"
_FIGURES = ("arms", "differences", "curves", "importance", "spent", "parallel")
"""What the template asks for; empty where there is nothing to draw."""


def place_of(sweep: str, output: str | None) -> str:
    """Where the page is written.

    Args:
        sweep: the sweep's folder.
        output: a folder or an ``.html`` file; by default the sweep's folder.

    Raises:
        UserError: where it would replace what is not a sweep's page.
    """
    path = storage.absolute(output or sweep)
    if not path.endswith(_PAGE):
        if storage.exists(path) and not storage.is_directory(path):
            raise UserError(f"--output: {path} is a file; a folder or an .html file is expected")
        if storage.exists(storage.join(path, tables.MARKER)):
            raise UserError(f"--output: {path} holds an evaluation, whose report would be lost")
        path = storage.join(path, tables.REPORT)
    if storage.is_directory(path):
        raise UserError(f"--output: {path} is a folder")
    return path


def publish(sweep: str, output: str | None = None) -> tuple[dict[str, Any], str]:
    """Writes the page.

    Args:
        sweep: the sweep's folder.
        output: as for `place_of`.

    Returns:
        The sweep's summary, made anew, and the place of the page.

    Raises:
        UserError: where the folder is no sweep, or the output holds something else.
    """
    about, trials = store.read_sweep(sweep), store.read_trials(sweep)
    path = place_of(sweep, output)
    made = summary.of_trials(about, trials)
    storage.write_bytes(path, render(made, trials).encode())
    return made, path


def render(made: Mapping[str, Any], trials: pd.DataFrame) -> str:
    """The page as HTML; everything that comes from data is escaped.

    Args:
        made: the content of ``summary.json``.
        trials: the content of ``trials.parquet``.
    """
    last = summary.last_epochs(trials)
    finished = last[(last["status"] == store.FINISHED) & last["validation_accuracy"].notna()]
    is_grid = made["method"] == GRID
    drawn = (_grid_figures if is_grid else _search_figures)(made, trials, finished)
    return html.render(
        "sweep_report.html.j2",
        {
            "points": sentences.points,
            "percent": sentences.percent,
            "p": sentences.of_p,
            "value": sentences.value,
            "column": overrides.column_of,
            "glue": keep_together,
        },
        made=made,
        is_grid=is_grid,
        figures={**dict.fromkeys(_FIGURES, ""), **drawn},
        about=_about(made),
        lead=_lead(made),
        sentences=[sentences.compared(arm, made) for arm in made["arms"][1:]] if is_grid else [],
        between=sentences.between,
        fewest_stable=importance.FEWEST_STABLE,
        timed=figures.is_timed(trials),
    )


def _grid_figures(
    made: Mapping[str, Any], trials: pd.DataFrame, finished: pd.DataFrame
) -> dict[str, str]:
    if finished.empty:
        return {}
    drawn = {
        "arms": figures.arm_dots(made, finished),
        "curves": figures.arm_curves(made, trials),
    }
    if any(arm["accuracy"]["difference"] is not None for arm in made["arms"]):
        drawn["differences"] = figures.difference_dots(made)
    return drawn


def _search_figures(
    made: Mapping[str, Any], trials: pd.DataFrame, finished: pd.DataFrame
) -> dict[str, str]:
    drawn = {}
    if made["importance"]["shares"]:
        drawn["importance"] = figures.importance_bars(made)
    if not finished.empty:
        drawn["spent"] = figures.accuracy_against_epochs(trials)
        drawn["parallel"] = figures.parallel_coordinates(made, finished)
    return drawn


def _lead(made: Mapping[str, Any]) -> str:
    """What was done, in a sentence."""
    epochs = f"{made['epochs']} {'epoch' if made['epochs'] == 1 else 'epochs'}"
    model = f"{made['model']['name']}, {made['model']['parameters'] / 1e6:.2f} M parameters"
    on = f"{epochs} on {made['train_images']:,} images, judged on {made['validation_images']:,}"
    if made["method"] != GRID:
        return f"A search of {made['trials']['planned']} trials: {model}, up to {on}."
    arms, seeds = len(made["arms"]), len(made["seeds"])
    return f"{arms} arms with {seeds} {'seed' if seeds == 1 else 'seeds'} each: {model}, {on}."


def _about(made: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The table of the sweep itself."""
    model, speed = made["model"], made["images_per_s"]
    share = f"{100 * made['train_fraction']:g} % of the train split"
    return [
        ("Trials", sentences.trials(made)),
        (
            "Model",
            f"{model['name']}: {model['parameters']:,} parameters, "
            f"{model['multiply_adds']:,} multiply-adds",
        ),
        (
            "Images",
            f"{made['train_images']:,} train ({share}), {made['validation_images']:,} validation",
        ),
        ("Seeds", ", ".join(map(str, made["seeds"]))),
        ("Epochs run", f"{made['num_epochs_run']:,}, at most {made['epochs']} a trial"),
        ("Training", f"{_duration(made['training_s'])}, all trials added up"),
        ("Speed", "–" if speed is None else f"{speed:,.0f} images/s (median of the epochs)"),
        ("Data", f"{made['data_sha256'][:12]} (SHA-256)"),
    ]


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
