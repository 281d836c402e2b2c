"""Small sweeps that several test modules plan and run."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import small

from fer_ray.config.schema import TrainConfig
from fer_ray.sweeps.plan import Limits, SweepPlan, plan_sweep


def config(data: str, **sections) -> TrainConfig:
    values = small.config(**sections).to_dict()
    values["schedule"]["global_batch_size"] = 16
    if values["model"]["name"] == "sequential_cnn":
        del values["schedule"]["batch_norm_group"]  # it has no batch norm
    return TrainConfig.from_dict({**values, "data": data})


def grid(folder: Path, text: str) -> str:
    """A sweep's file."""
    path = folder / "tried.toml"
    path.write_text(text)
    return str(path)


TWO = "space.transforms.normalization = ['none', 'minmax']"


def plan(data: str, folder: Path, sweep: str = TWO, **settings) -> SweepPlan:
    base = settings.pop("config", None) or config(data)
    limits = Limits(**settings.pop("limits", {}))
    return plan_sweep(
        base,
        sweep=sweep if sweep in ("normalization", "search") else grid(folder, sweep),
        storage_path=str(folder),
        limits=limits,
        **settings,
    )


def rows(folder: Path) -> pd.DataFrame:
    return pq.read_table(folder / "trials.parquet").to_pandas()


MEASURED = ["images_per_s", "seconds", "ended_at"]


def same_results(first: Path, second: Path) -> bool:
    """Whether two sweeps say the same, but for what was measured by the clock."""
    tables = [rows(folder).drop(columns=MEASURED) for folder in (first, second)]
    return tables[0].equals(tables[1])
