"""python jobs/tune.py --data data/fer2013 --model custom_cnn --sweep normalization

Trains many variants of one model on Ray Tune, or resumes the sweep of that name. A sweep is a
preset (normalization, augmentation, search) or a .toml or .json file of settings by dotted name.
"""

from __future__ import annotations

import argparse

from fer_ray import cli
from fer_ray.config import flags as config_flags


def build_parser() -> argparse.ArgumentParser:
    """The flags of this job; tests read commands in documents and manifests with it."""
    parser = cli.JobParser(description=__doc__)
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="prepared data set")
    add("--sweep", required=True, metavar="PRESET|FILE", help="normalization, augmentation, search")
    add("--run", metavar="NAME", help="name of the sweep (that of the preset or file)")
    add("--storage", default="results/sweeps", metavar="DIR", help="folder of all sweeps")
    add("--num-trials", type=cli.integer(1), help="number of trials of a search (30)")
    add("--seeds", type=cli.integer(1, 1000), help="seeds of a grid, counted from --seed (3)")
    add("--train-fraction", type=cli.number(0.0, 1.0), default=1.0, help="of each class")
    add("--max-concurrent", type=cli.integer(1), default=0, help="trials at a time; all that fit")
    add("--gpus-per-trial", type=cli.number(0.0, 1.0), default=0.0, help="below 1, trials share it")
    add("--time-budget-s", type=cli.number(0.0), default=0.0, help="stop then, to resume later")
    add("--tensorboard", action="store_true", help="write TensorBoard's files too")
    config_flags.add_config_flags(parser)
    parser.set_defaults(**{"scaling.num_workers": 1})  # one process a trial
    return parser


def main() -> None:
    flags = build_parser().parse_args()
    config = config_flags.config_from_flags(flags, data=flags.data)

    from fer_ray.sweeps.plan import Limits, plan_sweep
    from fer_ray.sweeps.run import run_sweep
    from fer_ray.sweeps.sentences import as_text

    plan = plan_sweep(
        config,
        sweep=flags.sweep,
        storage_path=cli.lasting("--storage", flags.storage),
        run=flags.run,
        num_trials=flags.num_trials,
        num_seeds=flags.seeds,
        train_fraction=flags.train_fraction,
        limits=Limits(
            max_concurrent=flags.max_concurrent,
            gpus_per_trial=flags.gpus_per_trial,
            time_budget_s=flags.time_budget_s,
            tensorboard=flags.tensorboard,
        ),
    )
    cli.start_ray()
    cli.log(as_text(run_sweep(plan, log=cli.log)))
    cli.conclude(plan.folder)


if __name__ == "__main__":
    cli.run(main)
