"""A sweep's result as numbers: what ``summary.json`` holds, made from the two other files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from fer_ray import storage
from fer_ray.config import overrides
from fer_ray.config.schema import TrainConfig
from fer_ray.reporting.text import aligned
from fer_ray.sweeps import sentences, store, winner
from fer_ray.sweeps.analysis import LEVEL, POWER, Analysis, analyse
from fer_ray.sweeps.importance import importance, plain
from fer_ray.sweeps.space import GRID

FORMAT = 1
METRICS = {"accuracy": "validation_accuracy", "macro_f1": "validation_macro_f1"}
"""The column of each metric; the first is the score."""
_NUM_BEST = 10
_STATUSES = (store.FINISHED, store.STOPPED, store.FAILED)


def write(folder: str) -> dict[str, Any]:
    """Makes ``summary.json`` from a sweep's two other files, and returns its content."""
    made = summarize(folder)
    storage.write_json(storage.join(storage.absolute(folder), store.SUMMARY), made)
    return made


def summarize(folder: str) -> dict[str, Any]:
    """The content of ``summary.json``: JSON types, None where a number cannot be told.

    Raises:
        UserError: where the folder is no sweep.
    """
    return of_trials(store.read_sweep(folder), store.read_trials(folder))


def of_trials(sweep: Mapping[str, Any], trials: pd.DataFrame) -> dict[str, Any]:
    """As `summarize`, from the content of ``sweep.json`` and ``trials.parquet``."""
    base = TrainConfig.from_dict({**sweep["config"], "data": sweep["data"]})
    last = last_epochs(trials)
    finished = last[(last["status"] == store.FINISHED) & last["validation_accuracy"].notna()]
    about = {
        "format": FORMAT,
        **{key: sweep[key] for key in ("sweep", "run", "method", "data", "data_sha256")},
        "model": {
            "name": base.model.name,
            **{key: sweep[key] for key in ("parameters", "multiply_adds")},
            "most_parameters": sweep.get("most_parameters", sweep["parameters"]),
        },
        **{key: sweep[key] for key in ("train_images", "validation_images", "train_fraction")},
        "epochs": base.schedule.epochs,
        "seeds": sweep["seeds"],
        "fewer_seeds_before": sweep.get("fewer_seeds_before", []),
        "trials": _counts(sweep, last),
        "num_epochs_run": int((trials["epoch"] > 0).sum()),
        "training_s": float(trials["seconds"].sum()),
        "images_per_s": float(trials["images_per_s"].median()),
        "ran_on": _ran_on(last),
        "failures": _failures(last),
    }
    if sweep["method"] == GRID:
        part = _grid(sweep, base, last, finished)
    else:
        part = _search(sweep, base, trials, finished)
    made = _without_nan({**about, **part})
    return {**made, "conclusions": sentences.conclusions(made), "caveats": sentences.caveats(made)}


def as_text(made: Mapping[str, Any]) -> str:
    """The content of ``summary.json`` as plain text: what it shows, a table, the winner."""
    head = f"sweep {made['run']}: {sentences.trials(made)}"
    rows = _arm_rows(made) if made["method"] == GRID else _best_rows(made)
    blocks = [head, "\n".join(made["conclusions"])]
    if made["winner"]:
        blocks.append("\n".join(rows))
    blocks.append("\n".join(f"note: {line}" for line in made["caveats"]))
    if made["winner"]:
        blocks.append(f"the winner, alone:\n{made['winner']['command']}")
    return "\n\n".join(blocks)


def _arm_rows(made: Mapping[str, Any]) -> list[str]:
    rows = [
        ["arm", "n", "accuracy %", "difference", "95 % interval", "p", "corrected", "macro-F1 %"]
    ]
    for arm in made["arms"]:
        one = arm["accuracy"]
        difference = "baseline"
        if arm["arm"] != made["comparison"]["baseline"]:
            difference = sentences.points(one["difference"])
        rows.append(
            [
                arm["arm"],
                str(arm["num_seeds"]),
                sentences.percent(one["mean"]),
                difference,
                sentences.between(one["difference_low"], one["difference_high"]),
                sentences.of_p(one["p_value"]),
                sentences.of_p(one["p_holm"]),
                sentences.percent(arm["macro_f1"]["mean"]),
            ]
        )
    return aligned(rows, num_texts=1)


def _best_rows(made: Mapping[str, Any]) -> list[str]:
    rows = [["trial", "accuracy %", "macro-F1 %"]]
    rows += [
        [str(one["trial"]), *(sentences.percent(one[metric]) for metric in METRICS)]
        for one in made["best"]
    ]
    named = ["options", *(sentences.named(one["options"]) for one in made["best"])]
    lines = aligned(rows, num_texts=1)
    return [f"{line}  {options}" for line, options in zip(lines, named)]


def last_epochs(trials: pd.DataFrame) -> pd.DataFrame:
    """The row of each trial's last epoch, by trial."""
    return trials.sort_values(["trial", "epoch"]).drop_duplicates("trial", keep="last")


def _counts(sweep: Mapping[str, Any], last: pd.DataFrame) -> dict[str, int]:
    """Trials by status; those that have not begun are unfinished too."""
    counts = {status: int((last["status"] == status).sum()) for status in _STATUSES}
    planned = max(sweep["num_trials"], len(last))
    return {
        "planned": planned,
        **counts,
        store.UNFINISHED: planned - sum(counts.values()),
    }


def _ran_on(last: pd.DataFrame) -> list[dict[str, Any]]:
    """The different combinations of hardware, arithmetic and versions, most trials first."""
    known = last[last["hardware"].notna()] if "hardware" in last else last[:0]
    if known.empty:  # of sweeps from before this was kept
        return []
    alike = known.groupby(["hardware", "computed_in", "versions"]).size().reset_index(name="count")
    named = [
        {
            "on": f"{one['hardware']} in {one['computed_in']} ({one['versions']})",
            "trials": int(one["count"]),
        }
        for one in alike.to_dict("records")
    ]
    return sorted(named, key=lambda one: -one["trials"])


def _failures(last: pd.DataFrame) -> list[dict[str, Any]]:
    failed = last[last["status"] == store.FAILED]
    return [
        {"trial": row["trial"], "arm": plain(row["arm"]), "reason": plain(row["stop_reason"])}
        for row in failed.to_dict("records")
    ]


def _grid(
    sweep: Mapping[str, Any],
    base: TrainConfig,
    last: pd.DataFrame,
    finished: pd.DataFrame,
) -> dict[str, Any]:
    """What a designed sweep adds."""
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
    return {
        "arms": arms,
        "comparison": {
            "baseline": names[0],
            "method": sentences.METHOD,
            "level": LEVEL,
            "power": POWER,
            "num_comparisons": sum(not math.isnan(one.p_holm) for one in accuracy.comparisons),
            **{metric: _of_noise(analysis) for metric, analysis in analyses.items()},
            "agreement": _agreement(*analyses.values()),
        },
        "winner": _winning_arm(sweep, base, accuracy),
    }


def _analyse(finished: pd.DataFrame, names: Sequence[str], column: str) -> Analysis:
    scores = finished[["arm", "seed", column]].rename(columns={column: "score"})
    return analyse(scores.dropna(), names)


def _arm(analysis: Analysis, number: int) -> dict[str, Any]:
    """One arm's numbers by one metric; the baseline's differences are NaN."""
    mean = analysis.arms[number]
    compared = analysis.comparison(mean.arm)
    found: dict[str, Any] = {
        name: getattr(mean, name) for name in ("mean", "deviation", "low", "high")
    }
    for name in (
        *("difference", "standard_error", "p_value", "p_holm", "paired_p_value"),
        *("num_pairs", "smallest_shown", "detectable", "shown"),
    ):
        found[name] = getattr(compared, name, None)
    for end in ("low", "high"):
        found[f"difference_{end}"] = getattr(compared, end, None)
    return found


def _of_noise(analysis: Analysis) -> dict[str, Any]:
    names = ("df", "noise", "smallest_shown", "detectable")
    return {name: getattr(analysis, name) for name in names}


def best_arm(analysis: Analysis) -> str | None:
    """The arm with the highest mean among those with the most seeds; None without any."""
    most = max(one.num_seeds for one in analysis.arms)
    if not most:
        return None
    eligible = [one for one in analysis.arms if one.num_seeds == most]
    return max(eligible, key=lambda one: one.mean).arm


def _agreement(accuracy: Analysis, macro_f1: Analysis) -> dict[str, Any]:
    """Whether macro-F1 says the same as accuracy."""
    from scipy.stats import kendalltau

    means = [
        (one.mean, other.mean)
        for one, other in zip(accuracy.arms, macro_f1.arms)
        if one.num_seeds and other.num_seeds
    ]
    tau = kendalltau(*zip(*means)).statistic if len(means) > 1 else math.nan
    shown = [
        [(one.arm, one.difference > 0) for one in analysis.comparisons if one.shown]
        for analysis in (accuracy, macro_f1)
    ]
    return {
        "rank_correlation": float(tau),
        "same_winner": best_arm(accuracy) == best_arm(macro_f1),
        "same_conclusions": shown[0] == shown[1],
    }


def _winning_arm(
    sweep: Mapping[str, Any], base: TrainConfig, accuracy: Analysis
) -> dict[str, Any] | None:
    name = best_arm(accuracy)
    if name is None:
        return None
    chosen = next(arm["options"] for arm in sweep["arms"] if arm["name"] == name)
    compared = accuracy.comparison(name)
    return {
        "arm": name,
        "differs": compared.shown if compared else False,
        "score": next(one.mean for one in accuracy.arms if one.arm == name),
        **winner.described(overrides.changed(base, chosen), chosen, sweep),
    }


def _search(
    sweep: Mapping[str, Any],
    base: TrainConfig,
    trials: pd.DataFrame,
    finished: pd.DataFrame,
) -> dict[str, Any]:
    """What a search adds."""
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
    first = None
    if best:
        config = winner.config_of(ranked.iloc[0], base)
        first = {
            "trial": best[0]["trial"],
            "score": best[0]["accuracy"],
            **winner.described(config, best[0]["options"], sweep),
        }
    found = asdict(importance(trials, sweep["space"]))
    return {"space": sweep["space"], "best": best, "importance": found, "winner": first}


def _without_nan(value: Any) -> Any:
    """JSON types: NaN as None, numpy's numbers as Python's."""
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return plain(value)
