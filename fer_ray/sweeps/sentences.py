"""A sweep's result as text: what it shows, what it does not show, and a table for the terminal.

Everything is derived from the numbers of ``summary.json``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fer_ray.config import overrides
from fer_ray.reporting.text import aligned, p_value, percent
from fer_ray.sweeps.importance import FEWEST_STABLE
from fer_ray.sweeps.space import GRID

Summary = Mapping[str, Any]
"""The content of ``summary.json``: fractions from 0 to 1, None where a number is not known."""

SMALL_MODEL = 300_000
"""Parameters: a sweep whose models are all up to this size is called a pilot."""

METHOD = (
    "Additive model of arm and seed (randomized blocks), fitted by least squares to all finished "
    "trials, with the residual variance pooled over arms; two-sided t-tests against the baseline "
    "with Holm's correction over all comparisons. An effect is shown where the corrected p-value "
    "is below 0.05. The score is the validation accuracy after the last epoch, so no epoch is "
    "chosen by its score."
)
_MOST_OPTIONS = 3


def points(fraction: float | None, signed: bool = True) -> str:
    """A difference in percentage points, such as ``+0.4`` or ``−0.2``; a dash for None."""
    if fraction is None:
        return "–"
    text = f"{100 * fraction:+.1f}"
    text = "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")
    return text if signed else text.lstrip("+")


def between(low: float | None, high: float | None) -> str:
    """An interval of differences in points, such as ``−0.2 to 1.0``; a dash for None."""
    if low is None or high is None:
        return "–"
    return f"{points(low, signed=False)} to {points(high, signed=False)}"


def named(options: Mapping[str, Any]) -> str:
    """Settings by dotted name as ``learning_rate=0.05, flip=0.5``, numbers to three digits."""
    return ", ".join(
        f"{overrides.column_of(name)}={value(option)}" for name, option in options.items()
    )


def value(setting: Any) -> str:
    """The value of a setting, a number to three digits."""
    return f"{setting:.3g}" if isinstance(setting, float) else str(setting)


def duration(seconds: float) -> str:
    """Seconds in readable units: ``48 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def trials(summary: Summary) -> str:
    """The number of trials, and how many have each status."""
    counts = summary["trials"]
    statuses = ", ".join(
        f"{count} {status}" for status, count in counts.items() if count and status != "planned"
    )
    return f"{counts['planned']} trials: {statuses}" if statuses else f"{counts['planned']} trials"


def num_seeds(summary: Summary) -> str:
    """The seeds of the arms, such as ``n = 5``, ``n = 2 of 5`` or ``n = 2 to 4 of 5``."""
    counts = [arm["num_seeds"] for arm in summary["arms"] if arm["num_seeds"]]
    fewest, most, planned = min(counts), max(counts), len(summary["seeds"])
    text = f"n = {most}" if fewest == most else f"n = {fewest} to {most}"
    return text if fewest == planned else f"{text} of {planned}"


def compared(arm: Summary, summary: Summary) -> str:
    """The comparison of an arm with the baseline, as one sentence."""
    scores, seeds, planned = arm["accuracy"], arm["num_seeds"], len(summary["seeds"])
    n = f"n = {seeds}" if seeds == planned else f"n = {seeds} of {planned}"
    if not seeds:
        return f"{arm['arm']}: no finished trial ({arm['num_failed']} failed)."
    if scores["difference"] is None:
        return f"{arm['arm']}: not compared, since no seed links it to the baseline ({n})."
    text = f"{arm['arm']}: {points(scores['difference'])} points"
    if scores["p_holm"] is None:
        return f"{text}; with {n} it cannot be tested."
    text += f" ({between(scores['difference_low'], scores['difference_high'])})"
    verdict = "no effect shown"
    if scores["shown"]:
        verdict = f"{_direction(scores)} than the baseline"
    p = f"p {_relation(scores['p_value'])}, corrected {_relation(scores['p_holm'])}"
    return f"{text}, {verdict} ({p}, {n})."


def _relation(p: float) -> str:
    """Such as ``= 0.012`` or ``< 0.001``."""
    text = p_value(p)
    return text if text.startswith("<") else f"= {text}"


def _direction(scores: Summary) -> str:
    return "better" if scores["difference"] > 0 else "worse"


def conclusions(summary: Summary) -> list[str]:
    """What the sweep shows and does not show."""
    if summary["winner"] is None:
        return ["No trial has finished yet, so there is no result."]
    if summary["method"] == GRID:
        return [_of_winning_arm(summary), *_of_effects(summary)]
    return [_of_best_trial(summary), *_of_importance(summary)]


def _subject(summary: Summary) -> str:
    return "pilot" if _pilot(summary) else "sweep"


def _of_winning_arm(summary: Summary) -> str:
    winner, comparison = summary["winner"], summary["comparison"]
    arm = next(arm for arm in summary["arms"] if arm["arm"] == winner["arm"])
    text = (
        f"Highest mean accuracy: {winner['arm']} with {percent(winner['score'])} % "
        f"(n = {arm['num_seeds']})."
    )
    baseline, subject = comparison["baseline"], _subject(summary)
    if comparison["accuracy"]["df"] < 1:
        return f"{text} With {num_seeds(summary)} no difference can be tested."
    if winner["arm"] == baseline:
        return f"{text} It is the baseline."
    if winner["differs"]:
        direction = _direction(arm["accuracy"])
        return f"{text} The {subject} shows that it is {direction} than the baseline {baseline}."
    return f"{text} The {subject} does not show that it differs from the baseline {baseline}."


def _of_effects(summary: Summary) -> list[str]:
    """How many arms differ from the baseline, and what this sweep could have shown."""
    comparison, subject = summary["comparison"], _subject(summary)
    accuracy, agreement = comparison["accuracy"], comparison["agreement"]
    if not comparison["num_comparisons"]:
        return []
    lines = [
        f"The {subject} shows {_effects(summary, 'accuracy')}.",
        f"It could show differences of {percent(accuracy['smallest_shown'])} points or more; a "
        f"true difference of {percent(accuracy['detectable'])} points is shown with a probability "
        "of 80 %. It does not show that smaller effects are absent.",
    ]
    if agreement["rank_correlation"] is not None:
        best = "the same arm is" if agreement["same_winner"] else "another arm is"
        tau = f"{agreement['rank_correlation']:.2f}".replace("-", "−")
        lines.append(
            f"By macro-F1, tested and corrected separately, the {subject} shows "
            f"{_effects(summary, 'macro_f1')}; {best} first, and the ranks of the arms correlate "
            f"with those by accuracy (Kendall's tau = {tau})."
        )
    return lines


def _effects(summary: Summary, metric: str) -> str:
    """The arms that are shown to differ from the baseline by a metric."""
    comparison = summary["comparison"]
    shown = [arm for arm in summary["arms"] if arm[metric]["shown"]]
    text = (
        f"{f'an effect in {len(shown)}' if shown else 'no effect in any'} of "
        f"{comparison['num_comparisons']} comparisons with {comparison['baseline']} "
        f"({num_seeds(summary)})"
    )
    effects = [
        f"{arm['arm']} is {_direction(arm[metric])} ({points(arm[metric]['difference'])} points)"
        for arm in shown
    ]
    return f"{text}: {', '.join(effects)}" if effects else text


def _of_best_trial(summary: Summary) -> str:
    winner, finished = summary["winner"], summary["trials"]["finished"]
    return (
        f"Highest accuracy: trial {winner['trial']} with {percent(winner['score'])} %. It is the "
        f"highest of {finished} finished trials with one seed each, on the same "
        f"{summary['validation_images']:,} validation images, so it is optimistic: expect a lower "
        "accuracy with another seed or on other images."
    )


def _of_importance(summary: Summary) -> list[str]:
    importance = summary["importance"]
    if not importance["shares"]:
        return [f"The importance of the options is not known: {importance['reason']}."]
    first = list(importance["shares"].items())[:_MOST_OPTIONS]
    options = ", ".join(f"{overrides.column_of(name)} {100 * part:.0f} %" for name, part in first)
    lines = [
        f"Importance: {options} of the explained variance, from {importance['num_trials']} trials "
        f"compared after epoch {importance['epoch']} of {summary['epochs']}."
    ]
    if importance["num_trials"] < FEWEST_STABLE:
        lines.append(
            f"With fewer than {FEWEST_STABLE} trials the importance is unstable: another search "
            "may rank the options differently."
        )
    if importance["predicted"] is None or importance["predicted"] <= 0:
        lines.append(
            "The importance is noise: its random forest does not predict trials that it was not "
            "fitted to."
        )
    return lines


def caveats(summary: Summary) -> list[str]:
    """The limits of the result."""
    epochs = f"{summary['epochs']} {'epoch' if summary['epochs'] == 1 else 'epochs'}"
    lines = [
        *_pilot(summary),
        *_interim(summary),
        *_missing_seeds(summary),
        *_mixed(summary),
        f"Trials trained for {epochs}: options that learn more slowly, such as strong "
        "augmentation, may be better in a longer training.",
        *_validation_split(summary),
    ]
    if summary["method"] == GRID and summary["comparison"]["accuracy"]["df"] > 0:
        lines.append(
            "Each interval is for one comparison alone, but an effect is shown only where the "
            "p-value that is corrected for all comparisons is below 0.05, so the two may disagree. "
            "The mean of the winner is the highest of several and therefore slightly optimistic."
        )
    failed = summary["trials"]["failed"]
    if failed:
        lines.append(
            f"{failed} of {summary['trials']['planned']} trials failed and are left out, so "
            "options that often fail look better than they are."
        )
    return lines


def _pilot(summary: Summary) -> list[str]:
    reasons = []
    if summary["train_fraction"] < 1:
        reasons.append(
            f"trials train on {100 * summary['train_fraction']:g} % of the train split "
            f"({summary['train_images']:,} images)"
        )
    parameters = summary["model"]["most_parameters"]
    if parameters <= SMALL_MODEL:
        reasons.append(f"the model is small ({parameters / 1e6:.2g} M parameters)")
    if not reasons:
        return []
    return [
        f"This is a pilot: {' and '.join(reasons)}. A full training may rank the options "
        "differently."
    ]


def _interim(summary: Summary) -> list[str]:
    counts, lines = summary["trials"], []
    again = "Repeated looks at the results make a false effect more likely."
    if counts["unfinished"]:
        lines.append(
            f"Interim result: {counts['unfinished']} of {counts['planned']} trials are not over. "
            f"{again}"
        )
    if summary["fewer_seeds_before"]:
        looks = " and ".join(map(str, summary["fewer_seeds_before"]))
        lines.append(
            f"Seeds were added after results with {looks} had been seen, which the p-values do "
            f"not account for. {again}"
        )
    return lines


def _missing_seeds(summary: Summary) -> list[str]:
    counts = {arm["arm"]: arm["num_seeds"] for arm in summary.get("arms", [])}
    most = max(counts.values(), default=0)
    fewer = [f"{arm} has {count} of {most}" for arm, count in counts.items() if count < most]
    if not fewer:
        return []
    return [
        f"Seeds are missing: {', '.join(fewer)}. The winner is chosen among the arms with the most "
        "finished seeds."
    ]


def _mixed(summary: Summary) -> list[str]:
    """Trials that were computed on different hardware, or with other precision or versions."""
    if len(summary["ran_on"]) < 2:
        return []
    groups = "; ".join(f"{group['trials']} on {group['on']}" for group in summary["ran_on"])
    return [f"Trials were computed in different ways, which may cause effects: {groups}."]


def _validation_split(summary: Summary) -> list[str]:
    """All trials are scored on the same images: the standard error of one accuracy on them."""
    images = summary["validation_images"]
    if summary["winner"] is None or not images:
        return []
    score = summary["winner"]["score"]
    reach = 1.96 * math.sqrt(score * (1 - score) / images)
    return [
        f"All scores are on the same {images:,} validation images, and no interval or test covers "
        f"the choice of these images: the 95 % interval of a single accuracy of {percent(score)} % "
        f"is ±{percent(reach)} points, much of it common to all trials."
    ]


def as_text(summary: Summary) -> str:
    """The summary as plain text: conclusions, a table, caveats, the winner's command."""
    rows = _arm_rows(summary) if summary["method"] == GRID else _trial_rows(summary)
    blocks = [f"sweep {summary['run']}: {trials(summary)}", "\n".join(summary["conclusions"])]
    if summary["winner"]:
        blocks.append("\n".join(rows))
    blocks.append("\n".join(f"note: {line}" for line in summary["caveats"]))
    if summary["winner"]:
        blocks.append(f"the winner as a training run:\n{summary['winner']['command']}")
    return "\n\n".join(blocks)


def _arm_rows(summary: Summary) -> list[str]:
    rows = [
        ["arm", "n", "accuracy %", "difference", "95 % interval", "p", "corrected", "macro-F1 %"]
    ]
    for arm in summary["arms"]:
        scores = arm["accuracy"]
        is_baseline = arm["arm"] == summary["comparison"]["baseline"]
        rows.append(
            [
                arm["arm"],
                str(arm["num_seeds"]),
                percent(scores["mean"]),
                "baseline" if is_baseline else points(scores["difference"]),
                between(scores["difference_low"], scores["difference_high"]),
                p_value(scores["p_value"]),
                p_value(scores["p_holm"]),
                percent(arm["macro_f1"]["mean"]),
            ]
        )
    return aligned(rows, num_texts=1)


def _trial_rows(summary: Summary) -> list[str]:
    rows = [["trial", "accuracy %", "macro-F1 %"]]
    rows += [
        [str(trial["trial"]), percent(trial["accuracy"]), percent(trial["macro_f1"])]
        for trial in summary["best"]
    ]
    options = ["options", *(named(trial["options"]) for trial in summary["best"])]
    lines = aligned(rows, num_texts=1)
    return [f"{line}  {text}" for line, text in zip(lines, options)]
