"""python jobs/train.py --data data/fer2013 --model custom_cnn --run custom

Trains one model data-parallel on Ray, or resumes the run of that name.
"""

from __future__ import annotations

import argparse

from fer_ray import cli
from fer_ray.config import flags


def build_parser() -> argparse.ArgumentParser:
    """The flags of this job; tests read commands in documents and manifests with it."""
    parser = cli.JobParser(description=__doc__)
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="prepared data set")
    add("--run", metavar="NAME", help="name of the run; by default the model's")
    add("--storage", default="results/runs", metavar="DIR", help="folder of runs")
    add("--from-sweep", metavar="DIR", help="with the settings of its winner")
    add("--local", action="store_true", help="one worker in this process, without starting Ray")
    add("--list-models", action=cli.ListModels, help="print what each costs")
    flags.add_config_flags(parser)
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    if arguments.local and vars(arguments)["scaling.num_workers"] is None:
        vars(arguments)["scaling.num_workers"] = 1
    winner, settings = cli.winner_of(arguments.from_sweep)
    config = flags.config_from_flags(arguments, data=arguments.data, base=settings)

    from fer_ray.training import run as training

    cli.lasting("--storage", arguments.storage)
    run = arguments.run or winner or config.model.name
    plan = training.plan(config, storage_path=arguments.storage, run=run, local=arguments.local)
    if not plan.local and not plan.is_finished:
        cli.start_ray()
    result = training.fit(plan, log=cli.log)
    best = result["best"]
    cli.log(
        f"best epoch: {best['epoch']} of {result['epochs']}, validation accuracy "
        f"{best['validation_accuracy']:.2%}, macro-F1 {best['validation_macro_f1']:.2%}; "
        f"{result['images_per_s']:,.0f} images/s, {result['wall_s']:.0f} s"
    )
    cli.conclude(plan.folder)


if __name__ == "__main__":
    cli.run(main, first_line="checking the settings and the data")
