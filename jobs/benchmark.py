"""python jobs/benchmark.py --model custom_cnn --data data/fer2013 --output results/benchmark.json

Measures training, input and prediction, each beside a plain alternative and in turn with it; or,
with --show-augmentations, draws what each augmentation does.
"""

from __future__ import annotations

import argparse

from fer_ray import cli
from fer_ray.config import flags


def build_parser() -> argparse.ArgumentParser:
    """The flags of this job; tests read commands in documents and manifests with it."""
    parser = cli.JobParser(description=__doc__)
    add = parser.add_argument
    add("--data", default="", metavar="DIR", help="prepared data set; without it, drawn faces")
    add("--output", default="", metavar="FILE.json", help="where to write it")
    add(
        "--only",
        nargs="+",
        default=[],
        metavar="KEY",
        help="measure these numbers (the model's)",
    )
    add("--rounds", type=cli.integer(1), default=5, help="rounds of each side")
    add("--round-s", type=cli.number(0.0), default=3.0, help="seconds of a round, about")
    add("--show-augmentations", metavar="FILE.html", help="only write this page of pictures")
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

    from fer_ray.benchmarks import run as benchmark
    from fer_ray.benchmarks import targets

    plan = benchmark.plan(
        config,
        output=arguments.output and cli.lasting("--output", arguments.output),
        only=arguments.only,
        rounds=arguments.rounds,
        round_s=arguments.round_s,
    )
    result = benchmark.measure(plan, start_ray=cli.start_ray, log=cli.log)
    for line in targets.table(result):
        cli.log(line)
    cli.log(plan.output or "nothing was written: --output FILE.json keeps it")


if __name__ == "__main__":
    cli.run(main)
