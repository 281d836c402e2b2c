"""python jobs/benchmark.py --model custom_cnn --data data/fer2013 --output results/benchmark.json

Measures training, input and prediction, each in turn with a plain baseline. With
--show-augmentations, writes a page that shows each augmentation instead.
"""

from __future__ import annotations

import argparse

from fer_ray import cli
from fer_ray.config import flags


def build_parser() -> argparse.ArgumentParser:
    """The flags of this job; tests check the commands in documents and manifests with it."""
    parser = cli.JobParser(description=__doc__)
    add = parser.add_argument
    add("--data", default="", metavar="DIR", help="prepared dataset; without it, synthetic faces")
    add("--output", default="", metavar="FILE.json", help="file or URI to write the result to")
    only = "numbers to measure; default: all of the model, or none with one of the next two flags"
    add("--only", nargs="+", default=[], metavar="KEY", help=only)
    trace = "write a trace of training steps, which Perfetto opens; gzipped if the name ends in .gz"
    add("--profile", default="", metavar="FILE.json", help=trace)
    accuracy = "validation accuracies to time a training to, in percent"
    percent = cli.number(0.0, 100.0)
    add("--to-accuracy", nargs="+", type=percent, default=[], metavar="PERCENT", help=accuracy)
    add("--rounds", type=cli.integer(1), default=5, help="number of rounds of each series")
    add("--round-s", type=cli.number(0.0), default=3.0, help="seconds of a round, approximately")
    add("--show-augmentations", metavar="FILE.html", help="only write this page of examples")
    flags.add_config_flags(parser)
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    config = flags.config_from_flags(arguments, data=arguments.data)

    if arguments.show_augmentations:
        from fer_ray.reporting import augmentation_page

        path = cli.lasting("--show-augmentations", arguments.show_augmentations)
        cli.log(augmentation_page.write(path))
        return

    from fer_ray.benchmarks import plan as planning
    from fer_ray.benchmarks import run, targets

    plan = planning.plan(
        config,
        output=arguments.output and cli.lasting("--output", arguments.output),
        only=arguments.only,
        profile=arguments.profile and cli.lasting("--profile", arguments.profile),
        to_accuracy=arguments.to_accuracy,
        rounds=arguments.rounds,
        round_s=arguments.round_s,
    )
    result = run.measure(plan, start_ray=cli.start_ray, log=cli.log)
    for line in targets.table(result):
        cli.log(line)
    cli.log(plan.output or "the result was not written; give --output FILE.json to keep it")


if __name__ == "__main__":
    cli.run(main)
