"""Generated sweeps that several test modules write and read: the folders without the training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from fer_ray.config import overrides
from fer_ray.config.schema import TrainConfig
from fer_ray.sweeps import importance, space, store
from fer_ray.sweeps.store import FAILED, FINISHED, STOPPED, UNFINISHED, Trial

EPOCHS = 4
EFFECTS = {"clahe": 0.03, "equalize": -0.02}
"""Of normalizations on the accuracy, in `normalization`."""

ARMS = tuple(
    space.Arm(name=f"normalization={one}", options={"transforms.normalization": one})
    for one in ("none", "minmax", "clahe")
)
BASE, MINMAX, CLAHE = (arm.name for arm in ARMS)


def base(**sections: Mapping[str, Any]) -> TrainConfig:
    """What all trials have in common."""
    values: dict[str, Any] = {
        "data": "/machine/data/faces",
        "model": {"name": "custom_cnn", "width": 12},
        "schedule": {"epochs": EPOCHS},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return TrainConfig.from_dict(values)


def history(score: float, epochs: int = EPOCHS, macro_f1: float | None = None) -> list[dict]:
    """Rows that rise to a validation accuracy after the last epoch."""
    rows = []
    for epoch in range(1, epochs + 1):
        part = epoch / epochs
        value = 0.15 + (score - 0.15) * part
        end = score - 0.05 if macro_f1 is None else macro_f1
        rows.append(
            {
                "epoch": epoch,
                "train_loss": 2 - part,
                "train_accuracy": value + 0.02,
                "train_macro_f1": value - 0.02,
                "validation_loss": 2.1 - part,
                "validation_accuracy": score if epoch == epochs else value,
                "validation_macro_f1": 0.1 + (end - 0.1) * part,
                "learning_rate": 0.1,
                "images_per_s": 1000.0,
                "seconds": 28.7,
            }
        )
    return rows


def save(
    folder: Path,
    trials: Sequence[Trial],
    *,
    config: TrainConfig,
    arms: Sequence[space.Arm] = (),
    ranges: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """Writes ``sweep.json`` and ``trials.parquet``.

    Args:
        folder: of the sweep; created.
        trials: with options, history, status and reason.
        config: what they have in common.
        arms: of a grid.
        ranges: of a search.
        settings: further values of ``sweep.json``.
    """
    what = space.Space(
        name="normalization" if arms else "search",
        method="grid" if arms else "search",
        arms=tuple(arms),
        ranges=dict(ranges or {}),
    )
    value = {
        "format": store.FORMAT,
        "sweep": what.name,
        "run": folder.name,
        "data": "data/faces",
        "data_sha256": "0" * 64,
        "config": config.to_dict(),
        "seeds": sorted({trial.options["schedule.seed"] for trial in trials} or {0}),
        "train_fraction": 1.0,
        "train_images": 28709,
        "validation_images": 3589,
        "num_trials": len(trials),
        "parameters": 280_000,
        "multiply_adds": 20_000_000,
        "fewer_seeds_before": [],
        **what.to_dict(),
        **settings,
    }
    value.setdefault("most_parameters", value["parameters"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / store.SWEEP).write_text(json.dumps(value))
    pq.write_table(store.table(trials, config), folder / store.TRIALS)
    return folder


def grid(
    arms: Sequence[space.Arm],
    seeds: Sequence[int],
    score: Callable[[str, int], float | str | None],
) -> list[Trial]:
    """Every arm with every seed; a score that is text is why it failed, None is unfinished."""
    trials = []
    for seed in seeds:
        for arm in arms:
            given = score(arm.name, seed)
            ended: dict[str, Any] = {"status": FINISHED}
            if given is None:
                ended = {"status": UNFINISHED}
            elif isinstance(given, str):
                ended = {"status": FAILED, "reason": given}
            else:
                ended["history"] = history(given)
            chosen = {**arm.options, "schedule.seed": seed}
            trials.append(Trial(number=len(trials), arm=arm.name, options=chosen, **ended))
    return trials


def normalization(folder: Path, *, seeds: int = 3, noise: float = 0.004, **settings: Any) -> Path:
    """The preset with known effects, a noise, and a shift of each seed."""
    config = base()
    arms = space.load("normalization", config).arms
    random = np.random.default_rng(5)
    shifts = random.normal(0, 0.01, seeds)

    def score(arm: str, seed: int) -> float:
        effect = EFFECTS.get(arm.partition("=")[2], 0.0)
        return round(0.55 + effect + shifts[seed] + random.normal(0, noise), 4)

    return save(folder, grid(arms, range(seeds), score), config=config, arms=arms, **settings)


def search(folder: Path, *, trials: int = 40, epochs: int = 9, **settings: Any) -> Path:
    """A random search in which the learning rate decides, of which most trials are stopped."""
    config = base(schedule={"epochs": epochs})
    what = space.load("search", config)
    random = np.random.default_rng(1)
    made = []
    for number in range(trials):
        chosen = {"schedule.seed": 0}
        described = what.to_dict()["space"]
        for name, given in described.items():
            chosen[name] = _drawn(importance.distribution(name, given), random)
        rate = np.log10(chosen["optimizer.learning_rate"])
        score = 0.6 - 0.12 * (rate + 1.2) ** 2 + random.normal(0, 0.01)
        score -= 0.1 * chosen["transforms.noise"]
        reached = epochs if score > 0.575 or number == 0 else int(random.choice([1, 3]))
        full = history(round(float(score), 4), epochs)[:reached]
        ended: dict[str, Any] = {"status": FINISHED, "history": full}
        if reached < epochs:
            reason = f"ASHA: not in the best third after epoch {reached}"
            ended |= {"status": STOPPED, "reason": reason}
        if number == 7:
            ended = {"status": FAILED, "reason": "the loss is not finite at step 12", "history": []}
        made.append(Trial(number=number, arm=None, options=chosen, **ended))
    return save(folder, made, config=config, ranges=what.ranges, **settings)


def _drawn(given: Any, random: np.random.Generator) -> Any:
    if hasattr(given, "choices"):
        return given.choices[random.integers(len(given.choices))]
    low, high = (np.log(given.low), np.log(given.high)) if given.log else (given.low, given.high)
    value = random.uniform(low, high)
    value = float(np.exp(value)) if given.log else float(value)
    return round(value) if "Int" in type(given).__name__ else value


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """Every setting by dotted name."""
    values = overrides.values_of(config)
    return {name: values[column] for column, name in overrides.columns().items()}


def saved(
    path: Path,
    score: Callable[[str, int], float | str | None],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    arms: Sequence[space.Arm] = ARMS,
    **settings: Any,
) -> Path:
    """A grid of three arms whose scores a function of arm and seed gives, as in `grid`."""
    return save(path / "sweep", grid(arms, seeds, score), config=base(), arms=arms, **settings)


def table(values: Mapping[str, Sequence]) -> Callable[[str, int], Any]:
    """The scores of each arm by seed, as a function."""
    return lambda arm, seed: values[arm][seed]


def read_page(folder: Path) -> str:
    return (folder / "report.html").read_text()
