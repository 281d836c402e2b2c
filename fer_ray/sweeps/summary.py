"""A sweep's result as numbers: the content of ``summary.json``, and the winner's settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from fer_ray.config import overrides
from fer_ray.config.schema import TrainConfig
from fer_ray.errors import UserError
from fer_ray.sweeps import sentences, store
from fer_ray.sweeps.analysis import LEVEL, POWER, Analysis, analyse
from fer_ray.sweeps.importance import importance, plain
from fer_ray.sweeps.space import GRID
from fer_ray.sweeps.store import SweepFolder

FORMAT = 1
METRICS = {"accuracy": "validation_accuracy", "macro_f1": "validation_macro_f1"}
"""The column of each metric; the first is the score."""
_NUM_BEST = 10
_STATUSES = (store.FINISHED, store.STOPPED, store.FAILED)


def write(path: str) -> dict[str, Any]:
    """Writes ``summary.json`` from the other two files of a sweep's folder; returns its content."""
    content = summarize(path)
    SweepFolder(path).write_summary(content)
    return content


def summarize(path: str) -> dict[str, Any]:
    """The content of ``summary.json``: JSON types, None where a number is not known.

    Raises:
        UserError: where the folder is not a sweep's.
    """
    files = SweepFolder(path)
    return of_trials(files.read_settings(), files.read_table())


def of_trials(sweep: Mapping[str, Any], trials: pd.DataFrame) -> dict[str, Any]:
    """As `summarize`, from the content of ``sweep.json`` and ``trials.parquet``."""
    base = TrainConfig.from_dict({**sweep["config"], "data": sweep["data"]})
    last = last_epochs(trials)
    finished = last[(last["status"] == store.FINISHED) & last["validation_accuracy"].notna()]
    content = {
        "format": FORMAT,
        **{key: sweep[key] for key in ("sweep", "run", "method", "data", "data_sha256")},
        "model": {
            "name": base.model.name,
            **{key: sweep[key] for key in ("parameters", "multiply_adds", "most_parameters")},
        },
        **{key: sweep[key] for key in ("train_images", "validation_images", "train_fraction")},
        "epochs": base.schedule.epochs,
        **{key: sweep[key] for key in ("seeds", "fewer_seeds_before")},
        "trials": _counts(sweep, last),
        "num_epochs_run": int((trials["epoch"] > 0).sum()),
        "training_s": float(trials["seconds"].sum()),
        "images_per_s": float(trials["images_per_s"].median()),
        "ran_on": _ran_on(last),
        "failures": _failures(last),
    }
    if sweep["method"] == GRID:
        content |= _grid(sweep, base, last, finished)
    else:
        content |= _search(sweep, base, trials, finished)
    content = _without_nan(content)
    content["conclusions"] = sentences.conclusions(content)
    content["caveats"] = sentences.caveats(content)
    return content


def last_epochs(trials: pd.DataFrame) -> pd.DataFrame:
    """The row of each trial's last epoch, by trial."""
    return trials.sort_values(["trial", "epoch"]).drop_duplicates("trial", keep="last")


def _counts(sweep: Mapping[str, Any], last: pd.DataFrame) -> dict[str, int]:
    """Number of trials by status; those that have not begun are unfinished too."""
    counts = {status: int((last["status"] == status).sum()) for status in _STATUSES}
    planned = max(sweep["num_trials"], len(last))
    return {"planned": planned, **counts, store.UNFINISHED: planned - sum(counts.values())}


def _ran_on(last: pd.DataFrame) -> list[dict[str, Any]]:
    """The combinations of hardware, precision and versions, those of most trials first."""
    columns = ["hardware", "computed_in", "versions"]
    combinations = last.dropna(subset=columns).groupby(columns).size().reset_index(name="trials")
    groups = [
        {
            "on": f"{row['hardware']} in {row['computed_in']} ({row['versions']})",
            "trials": int(row["trials"]),
        }
        for row in combinations.to_dict("records")
    ]
    return sorted(groups, key=lambda group: -group["trials"])


def _failures(last: pd.DataFrame) -> list[dict[str, Any]]:
    failed = last[last["status"] == store.FAILED]
    return [
        {"trial": row["trial"], "arm": plain(row["arm"]), "reason": plain(row["stop_reason"])}
        for row in failed.to_dict("records")
    ]


# -- grids ----------------------------------------------------------------------------------


def _grid(
    sweep: Mapping[str, Any], base: TrainConfig, last: pd.DataFrame, finished: pd.DataFrame
) -> dict[str, Any]:
    """The part of the summary that only a grid has."""
    names = [arm["name"] for arm in sweep["arms"]]
    analyses = {metric: _analyse(finished, names, column) for metric, column in METRICS.items()}
    accuracy = analyses["accuracy"]
    failed = last[last["status"] == store.FAILED]["arm"].value_counts()
    arms = [
        {
            "arm": arm["name"],
            "options": arm["options"],
            "num_seeds": accuracy.arms[number].num_seeds,
            "num_failed": int(failed.get(arm["name"], 0)),
            **{metric: _arm(analysis, number) for metric, analysis in analyses.items()},
        }
        for number, arm in enumerate(sweep["arms"])
    ]
    tested = [compared for compared in accuracy.comparisons if not math.isnan(compared.p_holm)]
    return {
        "arms": arms,
        "comparison": {
            "baseline": names[0],
            "method": sentences.METHOD,
            "level": LEVEL,
            "power": POWER,
            "num_comparisons": len(tested),
            **{metric: _of_noise(analysis) for metric, analysis in analyses.items()},
            "agreement": _agreement(*analyses.values()),
        },
        "winner": _winning_arm(sweep, base, accuracy),
    }


def _analyse(finished: pd.DataFrame, names: Sequence[str], column: str) -> Analysis:
    scores = finished[["arm", "seed", column]].rename(columns={column: "score"})
    return analyse(scores.dropna(), names)


def _arm(analysis: Analysis, number: int) -> dict[str, Any]:
    """One arm's numbers by one metric; the differences of the baseline are None."""
    mean = analysis.arms[number]
    compared = analysis.comparison(mean.arm)
    numbers: dict[str, Any] = {
        name: getattr(mean, name) for name in ("mean", "deviation", "low", "high")
    }
    for name in (
        *("difference", "standard_error", "p_value", "p_holm", "paired_p_value"),
        *("num_pairs", "smallest_shown", "detectable", "shown"),
    ):
        numbers[name] = getattr(compared, name, None)
    for end in ("low", "high"):
        numbers[f"difference_{end}"] = getattr(compared, end, None)
    return numbers


def _of_noise(analysis: Analysis) -> dict[str, Any]:
    names = ("df", "noise", "smallest_shown", "detectable")
    return {name: getattr(analysis, name) for name in names}


def best_arm(analysis: Analysis) -> str | None:
    """The arm with the highest mean among those with the most seeds; None without any."""
    most = max(arm.num_seeds for arm in analysis.arms)
    if not most:
        return None
    eligible = [arm for arm in analysis.arms if arm.num_seeds == most]
    return max(eligible, key=lambda arm: arm.mean).arm


def _agreement(accuracy: Analysis, macro_f1: Analysis) -> dict[str, Any]:
    """Whether macro-F1 leads to the same conclusions as accuracy."""
    from scipy.stats import kendalltau

    means = [
        (by_accuracy.mean, by_macro_f1.mean)
        for by_accuracy, by_macro_f1 in zip(accuracy.arms, macro_f1.arms)
        if by_accuracy.num_seeds and by_macro_f1.num_seeds
    ]
    tau = kendalltau(*zip(*means)).statistic if len(means) > 1 else math.nan
    effects = [
        [(arm.arm, arm.difference > 0) for arm in analysis.comparisons if arm.shown]
        for analysis in (accuracy, macro_f1)
    ]
    return {
        "rank_correlation": float(tau),
        "same_winner": best_arm(accuracy) == best_arm(macro_f1),
        "same_conclusions": effects[0] == effects[1],
    }


def _winning_arm(
    sweep: Mapping[str, Any], base: TrainConfig, accuracy: Analysis
) -> dict[str, Any] | None:
    name = best_arm(accuracy)
    if name is None:
        return None
    options = next(arm["options"] for arm in sweep["arms"] if arm["name"] == name)
    compared = accuracy.comparison(name)
    return {
        "arm": name,
        "differs": compared.shown if compared else False,
        "score": next(arm.mean for arm in accuracy.arms if arm.arm == name),
        **_settings_of_winner(overrides.changed(base, options), options, sweep),
    }


# -- searches -------------------------------------------------------------------------------


def _search(
    sweep: Mapping[str, Any], base: TrainConfig, trials: pd.DataFrame, finished: pd.DataFrame
) -> dict[str, Any]:
    """The part of the summary that only a search has."""
    ranked = finished.sort_values(["validation_accuracy", "trial"], ascending=[False, True])
    best = [
        {
            "trial": row["trial"],
            "accuracy": row["validation_accuracy"],
            "macro_f1": row["validation_macro_f1"],
            "epoch": row["epoch"],
            "options": {name: plain(row[overrides.column_of(name)]) for name in sweep["space"]},
        }
        for row in ranked.head(_NUM_BEST).to_dict("records")
    ]
    winner = None
    if best:
        winner = {
            "trial": best[0]["trial"],
            "score": best[0]["accuracy"],
            **_settings_of_winner(config_of(ranked.iloc[0], base), best[0]["options"], sweep),
        }
    importances = asdict(importance(trials, sweep["space"]))
    return {"space": sweep["space"], "best": best, "importance": importances, "winner": winner}


def config_of(row: pd.Series, base: TrainConfig) -> TrainConfig:
    """The settings of a trial.

    Args:
        row: one of ``trials.parquet``.
        base: gives what has no column: the data, and where the work runs.
    """
    values: dict[str, Any] = {**base.to_dict(), "model": {}}
    for setting in overrides.settings().values():
        value = plain(row[setting.column])
        if value is not None:  # None: an option of another network
            values[setting.section][setting.field] = setting.type(value)
    return TrainConfig.from_dict(values)


# -- the winner -----------------------------------------------------------------------------


def winner_run(sweep: str) -> str:
    """The name of the run that trains the winner of a sweep."""
    return f"{sweep}-winner"


def _settings_of_winner(
    config: TrainConfig, options: Mapping[str, Any], sweep: Mapping[str, Any]
) -> dict[str, Any]:
    """The winner's settings: those that the sweep varies, all of them, and as a command."""
    values = overrides.values_of(config)
    return {
        "options": dict(options),
        "settings": {name: values[column] for column, name in overrides.columns().items()},
        "command": overrides.as_command(config, run=winner_run(sweep["run"])),
    }


def read_winner(path: str) -> tuple[str, dict[str, Any]]:
    """The winner in the ``summary.json`` of a sweep's folder.

    Returns:
        A name for the run that trains it, and the value of every setting by dotted name.

    Raises:
        UserError: where there is no summary, or no trial had finished.
    """
    try:
        content = SweepFolder(path).read_summary()
    except UserError as error:
        raise UserError(f"--from-sweep: {error}") from error
    if not isinstance(content, dict) or "winner" not in content:
        raise UserError(f"--from-sweep: {path}: {store.SUMMARY} is not the summary of a sweep")
    if content["winner"] is None:
        raise UserError(f"--from-sweep: {path}: no trial of this sweep has finished")
    return winner_run(content["run"]), content["winner"]["settings"]


def _without_nan(value: Any) -> Any:
    """JSON types: NaN as None, numpy's numbers as Python's."""
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return plain(value)
