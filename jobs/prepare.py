"""python jobs/prepare.py --source faces.zip --output data/faces

Turns labelled faces, or drawn ones (--source synthetic), into a prepared dataset: Parquet parts
for each split, dataset.json, quarantine.parquet and duplicates.parquet.
"""

from __future__ import annotations

from fer_ray import cli

SOURCE = (
    "folder or .zip with <split>/<class>/<file> or <class>/<file>; .csv or .parquet table with "
    "path, label and split; fer2013.csv; kaggle; synthetic"
)


def build_parser() -> cli.JobParser:
    """What the job takes."""
    parser = cli.JobParser(prog="prepare.py", description=__doc__.partition("\n\n")[2])
    add = parser.add_argument
    add("--source", required=True, help=SOURCE)
    add("--output", required=True, help="folder or URI of the prepared dataset")
    add("--image-size", type=cli.integer(8, 1024), default=48, help="height and width, in pixels")
    add("--num-images", type=cli.integer(1), help="how many faces synthetic draws (4000)")
    add("--seed", type=cli.integer(0), default=0, help="of synthetic faces and of what is held out")
    add(
        "--validation-fraction",
        type=cli.number(0, 0.99),
        metavar="SHARE",
        help="of train to hold out where no validation split is (0.1 where no splits are)",
    )
    add("--deduplicate", action="store_true", help="drop from train what another split has too")
    add("--overwrite", action="store_true", help="replace a prepared dataset at --output")
    add("--preview", metavar="FILE.html", help="draw a page of what is in it")
    return parser


def main() -> None:
    """Parses, checks, prepares, and prints where the dataset lies."""
    settings = vars(build_parser().parse_args())
    page = settings.pop("preview")

    from fer_ray.preparation import preview
    from fer_ray.preparation import run as preparation

    cli.lasting("--output", settings["output"])
    if page is not None:
        page = preview.check(cli.lasting("--preview", page))
    plan = preparation.plan(**settings)
    cli.start_ray()
    preparation.prepare(plan, log=cli.log, finish=preview.writer(page, cli.log) if page else None)
    cli.conclude(plan.output)


if __name__ == "__main__":
    cli.run(main)
