"""python jobs/evaluate.py --predictions results/predictions --runs results/runs --data data/faces

Scores every run on every split, compares the runs image by image, and writes Parquet tables and
one page, report.html, with figures, learning curves (--runs) and images of mistakes (--data).
With --sweep DIR instead, writes the report of a sweep.
"""

from __future__ import annotations

import argparse

from fer_ray import cli


def build_parser() -> argparse.ArgumentParser:
    """The flags of this job; tests check the commands in documents and manifests with it."""
    parser = cli.JobParser(prog="evaluate.py", description=__doc__.partition("\n\n")[2])
    add = parser.add_argument
    add("--predictions", nargs="+", metavar="DIR", help="folders of predictions")
    add("--sweep", metavar="DIR", help="a sweep of jobs/tune.py: writes its report")
    add("--runs", metavar="DIR", help="folder of the training runs: adds learning curves")
    add("--data", metavar="DIR", help="the prepared dataset: adds images of mistakes")
    add("--output", metavar="DIR", help="folder to write (results/evaluation; the sweep's own)")
    add("--baseline", metavar="RUN", help="compare with this run only, instead of every pair")
    add("--bootstrap", type=cli.integer(100, 100_000), default=2_000, help="bootstrap resamples")
    add("--seed", type=cli.integer(0), default=0, help="of the resampling")
    return parser


def main() -> None:
    """Parses, checks, evaluates, and prints the comparison and the path of the report."""
    parser = build_parser()
    flags = parser.parse_args()
    if bool(flags.predictions) == bool(flags.sweep):
        parser.error("give exactly one of --predictions and --sweep")
    if flags.sweep:
        if flags.runs or flags.data or flags.baseline:
            parser.error("--runs, --data and --baseline go with --predictions, not with --sweep")
        report_sweep(flags.sweep, flags.output)
        return

    from fer_ray import storage
    from fer_ray.evaluation import report, run, tables

    output = storage.absolute(cli.lasting("--output", flags.output or "results/evaluation"))
    report.check_paths(output, flags.runs, flags.data)
    result = run.evaluate(
        flags.predictions, baseline=flags.baseline, resamples=flags.bootstrap, seed=flags.seed
    )
    page = report.publish(result, output, runs=flags.runs, data=flags.data)
    cli.log(f"{tables.as_text(result)}\n\n{page}")


def report_sweep(sweep: str, output: str | None) -> None:
    """Makes the report of a sweep, and prints what it shows and where the page lies."""
    from fer_ray.sweeps import report, sentences

    summary, page = report.publish(sweep, cli.lasting("--output", output) if output else None)
    cli.log(f"{sentences.as_text(summary)}\n\n{page}")


if __name__ == "__main__":
    cli.run(main)
