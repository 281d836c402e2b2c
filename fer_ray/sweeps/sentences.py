"""What a sweep shows, and what it cannot show, as sentences made from the numbers of a summary."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fer_ray.config import overrides
from fer_ray.reporting.text import p_value
from fer_ray.sweeps.importance import FEWEST_STABLE
from fer_ray.sweeps.space import GRID

Summary = Mapping[str, Any]
"""The content of ``summary.json``: shares from 0 to 1, None where a number cannot be told."""

SMALL_MODEL = 300_000
"""Parameters: a sweep of a model up to this size is called a pilot."""

METHOD = (
    "Additive model of arm and seed (randomized blocks) by least squares on all finished trials, "
    "the noise pooled over arms; two-sided t-tests against the baseline, Holm's correction over "
    "all comparisons; an effect is shown where the corrected p-value is below 0.05. The score is "
    "the validation accuracy after the last epoch: no epoch is chosen by it."
)
_MOST_OPTIONS = 3


def points(share: float | None, signed: bool = True) -> str:
    """A difference of shares in points, such as ``+0.4`` or ``−0.2``; a dash for None."""
    if share is None:
        return "–"
    text = f"{100 * share:+.1f}"
    text = "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")
    return text if signed else text.lstrip("+")


def percent(share: float | None) -> str:
    """A share in percent without its sign, such as ``55.1``; a dash for None."""
    return "–" if share is None else f"{100 * share:.1f}"


def between(low: float | None, high: float | None) -> str:
    """An interval of differences, such as ``−0.2 to 1.0``; a dash where there is none."""
    if low is None or high is None:
        return "–"
    return f"{points(low, signed=False)} to {points(high, signed=False)}"


def of_p(value: float | None) -> str:
    """A p-value such as ``0.012`` or ``< 0.001``; a dash for None."""
    return p_value(value)


def named(chosen: Mapping[str, Any]) -> str:
    """Settings by dotted name as ``learning_rate=0.05, flip=0.5``, numbers to three digits."""
    return ", ".join(
        f"{overrides.column_of(name)}={value(given)}" for name, given in chosen.items()
    )


def value(given: Any) -> str:
    """A setting's value, a number to three digits."""
    return f"{given:.3g}" if isinstance(given, float) else str(given)


def trials(summary: Summary) -> str:
    """How many trials there are and what became of them."""
    counts = summary["trials"]
    became = ", ".join(
        f"{count} {status}" for status, count in counts.items() if count and status != "planned"
    )
    return f"{counts['planned']} trials: {became}" if became else f"{counts['planned']} trials"


def num_seeds(summary: Summary) -> str:
    """The seeds that arms have, such as ``n = 5``, ``n = 2 of 5`` or ``n = 2 to 4 of 5``."""
    counts = [arm["num_seeds"] for arm in summary["arms"] if arm["num_seeds"]]
    fewest, most, planned = min(counts), max(counts), len(summary["seeds"])
    text = f"n = {most}" if fewest == most else f"n = {fewest} to {most}"
    return text if fewest == planned else f"{text} of {planned}"


def compared(arm: Summary, summary: Summary) -> str:
    """One arm against the baseline, as one sentence."""
    one, seeds = arm["accuracy"], arm["num_seeds"]
    name, planned = arm["arm"], len(summary["seeds"])
    if not seeds:
        failed = f"{arm['num_failed']} failed" if arm["num_failed"] else "none is over yet"
        return f"{name}: no finished trial ({failed})."
    n = f"n = {seeds}" if seeds == planned else f"n = {seeds} of {planned}"
    if one["difference"] is None:
        return f"{name}: no seed links it to the baseline: not compared ({n})."
    start = f"{name}: {points(one['difference'])} points"
    if one["p_holm"] is None:
        return f"{start}; nothing can be concluded at {n}."
    start += f" ({between(one['difference_low'], one['difference_high'])})"
    p_values = f"p = {of_p(one['p_value'])}".replace("= <", "<")
    if summary["comparison"]["num_comparisons"] > 1:
        p_values += f", corrected {of_p(one['p_holm'])}"
    if not one["shown"]:
        return f"{start}, no effect shown at {n} ({p_values})."
    which = "better" if one["difference"] > 0 else "worse"
    return f"{start}, {which} than the baseline ({p_values}, {n})."


def conclusions(summary: Summary) -> list[str]:
    """What a reader has to know first."""
    if summary["winner"] is None:
        return ["No trial has finished: there is nothing to conclude."]
    if summary["method"] == GRID:
        return [*_of_winner(summary), *_of_effects(summary), *_of_macro_f1(summary)]
    return [_of_best(summary), *_of_importance(summary)]


def _of_winner(summary: Summary) -> list[str]:
    winner, base = summary["winner"], summary["comparison"]["baseline"]
    arm = next(one for one in summary["arms"] if one["arm"] == winner["arm"])
    n = arm["num_seeds"]
    found = f"{winner['arm']}: {percent(winner['score'])} % (n = {n})"
    if summary["comparison"]["accuracy"]["df"] < 1:
        return [f"Highest accuracy: {found}, but at n = {n} nothing can be concluded from it."]
    best, others = "Highest mean accuracy", _higher(summary)
    if others:
        best += " of the arms with the most seeds"
    if winner["arm"] == base:
        return [f"{best}: {found}, which is the baseline.", *others]
    if winner["differs"]:
        # with missing seeds, the highest mean may be of an arm that is worse on the same seeds
        which = "better" if _gain(arm) > 0 else "worse"
        return [f"{best}: {found}, shown to be {which} than the baseline {base}.", *others]
    return [f"{best}: {found}, but no difference to the baseline {base} is shown.", *others]


def _higher(summary: Summary) -> list[str]:
    """The arms that are not the winner only because they lack seeds."""
    means = {arm["arm"]: arm["accuracy"]["mean"] for arm in summary["arms"] if arm["num_seeds"]}
    return [
        f"{arm['arm']} has a higher mean, {percent(means[arm['arm']])} %, but over "
        f"n = {arm['num_seeds']} only: with a trial for every seed it might be the winner."
        for arm in summary["arms"]
        if means.get(arm["arm"], 0.0) > means[summary["winner"]["arm"]]
    ]


def _of_effects(summary: Summary) -> list[str]:
    """How many arms differ, and what this sweep could have seen."""
    comparison = summary["comparison"]
    effects, total = comparison["accuracy"], comparison["num_comparisons"]
    if not total:
        return []
    n = num_seeds(summary)
    lines = [
        f"Shown to be {word} than {comparison['baseline']}: {', '.join(names)}."
        for word, names in _shown(summary, "accuracy")
    ]
    if not lines:
        lines = [f"No effect shown in any of {total} comparisons at {n}."]
    return [
        *lines,
        f"The smallest difference that {n} could have shown is "
        f"{percent(effects['smallest_shown'])} points; a true difference of "
        f"{percent(effects['detectable'])} points would be shown in 80 % of such sweeps. No effect "
        "shown does not mean no effect: smaller ones stay unseen.",
    ]


def _shown(summary: Summary, metric: str) -> list[tuple[str, list[str]]]:
    """The arms that are shown to be better than the baseline by a metric, and those worse."""
    found: list[tuple[str, list[str]]] = []
    for word, sign in (("better", 1), ("worse", -1)):
        names = [
            f"{arm['arm']} ({points(arm[metric]['difference'])} points)"
            for arm in summary["arms"]
            if arm[metric]["shown"] and sign * arm[metric]["difference"] > 0
        ]
        if names:
            found.append((word, names))
    return found


def _gain(arm: Summary) -> float:
    return arm["accuracy"]["difference"]


def _of_macro_f1(summary: Summary) -> list[str]:
    agreement = summary["comparison"]["agreement"]
    if agreement["rank_correlation"] is None or summary["comparison"]["accuracy"]["df"] < 1:
        return []
    best = "the same arm is" if agreement["same_winner"] else "another arm is"
    shown = "the same effects are" if agreement["same_conclusions"] else "other effects are"
    tau = f"{agreement['rank_correlation']:.2f}".replace("-", "−")
    lines = [
        f"By macro-F1, {best} first and {shown} shown (rank correlation of the arms, Kendall's "
        f"tau: {tau})."
    ]
    if not agreement["same_conclusions"]:
        effects = [f"{word}: {', '.join(names)}" for word, names in _shown(summary, "macro_f1")]
        lines.append(
            f"By macro-F1, with a correction of its own, shown to be {'; '.join(effects)}."
            if effects
            else "By macro-F1, no effect is shown."
        )
    return lines


def _of_best(summary: Summary) -> str:
    winner, finished = summary["winner"], summary["trials"]["finished"]
    return (
        f"Highest accuracy: trial {winner['trial']}, {percent(winner['score'])} %. It is the "
        f"highest of {finished} finished trials on the same {summary['validation_images']:,} "
        "validation images, one seed each, and so it is optimistic: expect less from another seed "
        "and from other images."
    )


def _of_importance(summary: Summary) -> list[str]:
    found = summary["importance"]
    if not found["shares"]:
        return [f"Importance of the options: nothing to tell, {found['reason']}."]
    first = list(found["shares"].items())[:_MOST_OPTIONS]
    named = ", ".join(f"{overrides.column_of(name)} {100 * share:.0f} %" for name, share in first)
    lines = [
        f"Importance: {named} of the variance that is explained, by {found['num_trials']} trials "
        f"compared after epoch {found['epoch']} of {summary['epochs']}."
    ]
    if found["num_trials"] < FEWEST_STABLE:
        lines.append(
            f"With fewer than {FEWEST_STABLE} trials these shares are unstable: another search "
            "may rank the options otherwise."
        )
    if found["predicted"] is None or found["predicted"] <= 0:
        lines.append(
            "The forest behind these shares does not predict trials that it was not fitted to: "
            "the shares are noise."
        )
    return lines


def caveats(summary: Summary) -> list[str]:
    """What the numbers do not cover."""
    lines = [*_pilot(summary), *_interim(summary), *_mixed(summary)]
    epochs, images = summary["epochs"], summary["validation_images"]
    lines.append(
        f"Trained for {epochs} {'epoch' if epochs == 1 else 'epochs'}: what learns more slowly "
        "but further, as strong augmentation does, may win a longer training."
    )
    score = summary["winner"]["score"] if summary["winner"] else None
    if score is not None and images:
        reach = 1.96 * math.sqrt(score * (1 - score) / images)
        of_what = (
            "Intervals and tests are over seeds" if summary["method"] == GRID else "All scores are"
        )
        lines.append(
            f"{of_what} on the same {images:,} validation images. They do not cover another "
            f"validation set: an accuracy of {percent(score)} % on so many images is itself known "
            f"to ±{percent(reach)} points only, though much of that is common to all trials."
        )
    if summary["method"] == GRID and summary["comparison"]["accuracy"]["df"] > 0:
        lines.append(
            "Each interval is for its comparison alone; whether an effect is shown is decided by "
            "the p-value that is corrected for all comparisons, so the two may differ."
        )
        lines.append("The winner's mean is the highest of several and so a little optimistic.")
    failed = summary["trials"]["failed"]
    if failed:
        lines.append(
            f"Failed, and left out: {failed} of {summary['trials']['planned']} trials. What fails "
            "often is not as good as its mean says."
        )
    return lines


def _pilot(summary: Summary) -> list[str]:
    why = []
    if summary["train_fraction"] < 1:
        why.append(
            f"trials see {100 * summary['train_fraction']:g} % of the train split "
            f"({summary['train_images']:,} images)"
        )
    parameters = summary["model"]["most_parameters"]
    if parameters <= SMALL_MODEL:
        why.append(f"the model is small ({parameters / 1e6:.2g} M parameters)")
    if not why:
        return []
    return [
        f"This is a pilot: {' and '.join(why)}. A full training may rank the options otherwise."
    ]


def _interim(summary: Summary) -> list[str]:
    counts, lines = summary["trials"], []
    again = "Tests that are looked at again and again until something shows are too often wrong."
    if counts["unfinished"]:
        lines.append(
            f"Interim: {counts['unfinished']} of {counts['planned']} trials are not over. {again}"
        )
    if summary["method"] == GRID and summary["fewer_seeds_before"]:
        before = " and ".join(map(str, summary["fewer_seeds_before"]))
        lines.append(
            f"Seeds were added to this sweep when there was a result with {before}: the p-values "
            f"do not know of that. {again}"
        )
    return lines


def _mixed(summary: Summary) -> list[str]:
    """Trials that were not all computed alike."""
    if len(summary["ran_on"]) < 2:
        return []
    places = "; ".join(f"{one['trials']} on {one['on']}" for one in summary["ran_on"])
    return [f"Not all trials were computed alike: {places}. Effects may come from that."]
