"""The report of a sweep: one HTML page without external resources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from fer_ray import storage
from fer_ray.config import overrides
from fer_ray.errors import UserError
from fer_ray.reporting import html
from fer_ray.sweeps import figures, importance, sentences, store, summary
from fer_ray.sweeps.space import GRID
from fer_ray.sweeps.store import SweepFolder

_PAGE = ".html"
_FIGURES = ("arms", "differences", "curves", "importance", "spent", "parallel")
"""The figures of the template; empty where there is nothing to draw."""


def page_path(sweep: str, output: str | None) -> str:
    """The path of the page.

    Args:
        sweep: the sweep's folder.
        output: a folder or an ``.html`` file; by default the sweep's folder.

    Raises:
        UserError: where it would replace something other than a sweep's page.
    """
    path = storage.absolute(output or sweep)
    if not path.endswith(_PAGE):
        if storage.exists(path) and not storage.is_directory(path):
            raise UserError(f"--output: {path} is a file; a folder or an .html file is expected")
        if storage.exists(storage.join(path, html.EVALUATION_MARKER)):
            raise UserError(
                f"--output: {path} holds an evaluation, whose report would be replaced; give "
                "another folder"
            )
        path = storage.join(path, html.REPORT)
    if storage.is_directory(path):
        raise UserError(f"--output: {path} is a folder; an .html file is expected")
    return path


def publish(sweep: str, output: str | None = None) -> tuple[dict[str, Any], str]:
    """Writes the page.

    Args:
        sweep: the sweep's folder.
        output: as for `page_path`.

    Returns:
        The summary, computed from the tables, and the path of the page.

    Raises:
        UserError: where the folder is not a sweep's, or the output holds something else.
    """
    files = SweepFolder(sweep)
    settings, trials = files.read_settings(), files.read_table()
    path = page_path(sweep, output)
    content = summary.of_trials(settings, trials)
    storage.write_bytes(path, render(content, trials).encode())
    return content, path


def render(content: Mapping[str, Any], trials: pd.DataFrame) -> str:
    """The page as HTML; all text from data is escaped.

    Args:
        content: the content of ``summary.json``.
        trials: the content of ``trials.parquet``.
    """
    last = summary.last_epochs(trials)
    finished = last[(last["status"] == store.FINISHED) & last["validation_accuracy"].notna()]
    is_grid = content["method"] == GRID
    drawn = (_grid_figures if is_grid else _search_figures)(content, trials, finished)
    return html.render(
        "sweep_report.html.j2",
        {
            "points": sentences.points,
            "value": sentences.value,
            "column": overrides.column_of,
        },
        summary=content,
        is_grid=is_grid,
        figures={**dict.fromkeys(_FIGURES, ""), **drawn},
        about=_about(content),
        lead=_lead(content),
        sentences=[sentences.compared(arm, content) for arm in content.get("arms", [])[1:]],
        between=sentences.between,
        fewest_stable=importance.FEWEST_STABLE,
        timed=figures.is_timed(trials),
    )


def _grid_figures(
    content: Mapping[str, Any], trials: pd.DataFrame, finished: pd.DataFrame
) -> dict[str, str]:
    if finished.empty:
        return {}
    drawn = {
        "arms": figures.arm_dots(content, finished),
        "curves": figures.arm_curves(content, trials),
    }
    if any(arm["accuracy"]["difference"] is not None for arm in content["arms"]):
        drawn["differences"] = figures.difference_dots(content)
    return drawn


def _search_figures(
    content: Mapping[str, Any], trials: pd.DataFrame, finished: pd.DataFrame
) -> dict[str, str]:
    drawn = {}
    if content["importance"]["shares"]:
        drawn["importance"] = figures.importance_bars(content)
    if not finished.empty:
        drawn["spent"] = figures.accuracy_against_epochs(trials)
        drawn["parallel"] = figures.parallel_coordinates(content, finished)
    return drawn


def _lead(content: Mapping[str, Any]) -> str:
    """One sentence on the trials of the sweep."""
    epochs = f"{content['epochs']} {'epoch' if content['epochs'] == 1 else 'epochs'}"
    model = f"{content['model']['name']}, {content['model']['parameters'] / 1e6:.2f} M parameters"
    on = f"{epochs} on {content['train_images']:,} images"
    scored = f"scored on {content['validation_images']:,} validation images"
    if content["method"] != GRID:
        return f"A search of {content['trials']['planned']} trials: {model}, up to {on}, {scored}."
    arms, seeds = len(content["arms"]), len(content["seeds"])
    each = f"{seeds} {'seed' if seeds == 1 else 'seeds'} each"
    return f"{arms} arms with {each}: {model}, {on}, {scored}."


def _about(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The rows of the table on the sweep itself."""
    model, speed = content["model"], content["images_per_s"]
    fraction = f"{100 * content['train_fraction']:g} % of the train split"
    return [
        ("Trials", sentences.trials(content)),
        (
            "Model",
            f"{model['name']}: {model['parameters']:,} parameters, "
            f"{model['multiply_adds']:,} multiply-adds",
        ),
        (
            "Images",
            f"{content['train_images']:,} train ({fraction}), "
            f"{content['validation_images']:,} validation",
        ),
        ("Seeds", ", ".join(map(str, content["seeds"]))),
        ("Epochs run", f"{content['num_epochs_run']:,}, at most {content['epochs']} per trial"),
        ("Training", f"{sentences.duration(content['training_s'])}, the sum over all trials"),
        ("Speed", "–" if speed is None else f"{speed:,.0f} images/s (median of the epochs)"),
        ("Data", f"{content['data_sha256'][:12]} (SHA-256)"),
    ]
