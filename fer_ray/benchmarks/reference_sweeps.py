"""The sweeps that are kept under version control, and the README's tables of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from fer_ray import storage
from fer_ray.sweeps import sentences, store
from fer_ray.sweeps.space import GRID

_FILES = (store.SWEEP, store.SUMMARY, store.TRIALS)


def kept(results: Path) -> list[tuple[Path, str]]:
    """The files to keep of every sweep that has a summary, and where below ``sweeps/``."""
    return [
        (summary.parent / name, f"{summary.parent.name}/{name}")
        for summary in sorted((results / "sweeps").glob(f"*/{store.SUMMARY}"))
        for name in _FILES
    ]


def tables(reference: Path) -> str:
    """A table in Markdown for every designed sweep, with what it shows and does not.

    Args:
        reference: the folder with ``sweeps``.
    """
    found = [
        storage.read_json(str(path.absolute()))
        for path in sorted((reference / "sweeps").glob(f"*/{store.SUMMARY}"))
    ]
    parts = [_of_grid(made) for made in found if made["method"] == GRID]
    return "\n\n".join(parts) or "No sweep is recorded yet."


def _of_grid(made: dict[str, Any]) -> str:
    baseline = made["comparison"]["baseline"]
    heads = [
        *("option", "n", "accuracy, mean (deviation)", f"difference to {baseline} (95 %)"),
        *("p, corrected", "effect"),
    ]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for arm in made["arms"]:
        one = arm["accuracy"]
        mean = f"{sentences.percent(one['mean'])} % ({sentences.percent(one['deviation'])})"
        difference = "–"
        if one["difference"] is not None:
            between = sentences.between(one["difference_low"], one["difference_high"])
            difference = f"{sentences.points(one['difference'])} ({between})"
        shown = {True: "shown", False: "not shown", None: "baseline"}[one["shown"]]
        cells = [f"`{arm['arm']}`", str(arm["num_seeds"]), mean, difference]
        lines.append("| " + " | ".join([*cells, sentences.of_p(one["p_holm"]), shown]) + " |")
    size = made["model"]
    head = (
        f"Sweep `{made['run']}`: `{size['name']}` of {size['parameters']:,} parameters, "
        f"{made['epochs']} epochs, {made['train_images']:,} train and "
        f"{made['validation_images']:,} validation images, "
        f"{made['trials']['finished']} trials finished in {made['training_s'] / 3600:.1f} hours of "
        f"training, {made['images_per_s']:,.0f} images/s each (median)."
    )
    notes = [f"- {line}" for line in (*made["conclusions"], *made["caveats"])]
    return "\n".join([head, "", *lines, "", *notes])


def collect(results: Path, reference: Path, copy: Any) -> None:
    """Replaces the kept sweeps that `results` has anew; the others stay.

    Args:
        results: the folder with ``sweeps``.
        reference: the folder to copy to.
        copy: copies a file to a place, without paths of the machine.
    """
    files = kept(results)
    for run in {name.split("/")[0] for _, name in files}:
        shutil.rmtree(reference / "sweeps" / run, ignore_errors=True)
    for file, name in files:
        copy(file, reference / "sweeps" / name)
