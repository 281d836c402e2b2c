"""python jobs/prepare.py --source faces.zip --output data/faces

Converts labelled faces from any source to a prepared dataset: Parquet shards for each split,
dataset.json, quarantine.parquet and duplicates.parquet.
"""

from __future__ import annotations

from fer_ray import cli
from fer_ray.data import dataset, image_source


def build_parser() -> cli.JobParser:
    """Returns the parser of the job's flags."""
    parser = cli.JobParser(prog="prepare.py", description=__doc__.partition("\n\n")[2])
    add = parser.add_argument
    size = cli.integer(dataset.MIN_IMAGE_SIZE, dataset.MAX_IMAGE_SIZE)
    add("--source", required=True, help=image_source.describe_types().replace("%", "%%"))
    add("--output", required=True, help="folder or URI of the prepared dataset")
    add("--image-size", type=size, default=48, help="height and width, in pixels")
    add(
        "--num-images",
        type=cli.integer(1, image_source.MAX_GENERATED),
        help="number of images that synthetic draws (4000)",
    )
    add(
        "--seed",
        type=cli.integer(0),
        default=0,
        help="of synthetic faces and held-out images",
    )
    add(
        "--validation-fraction",
        type=cli.number(0, 0.99),
        metavar="FRACTION",
        help="fraction of train to hold out if the source has no validation split (0.1 if it has "
        "no splits at all)",
    )
    add("--deduplicate", action="store_true", help="drop images from train that other splits have")
    add("--overwrite", action="store_true", help="replace a prepared dataset at --output")
    add("--preview", metavar="FILE.html", help="write a page that shows the dataset's contents")
    return parser


def main() -> None:
    """Checks the settings, prepares the dataset and prints its path."""
    settings = vars(build_parser().parse_args())
    page = settings.pop("preview")

    from fer_ray.preparation import preview
    from fer_ray.preparation.plan import plan_preparation
    from fer_ray.preparation.run import prepare

    cli.lasting("--output", settings["output"])
    if page is not None:
        page = preview.check(cli.lasting("--preview", page))
    plan = plan_preparation(**settings)
    cli.start_ray()
    prepare(plan, log=cli.log, finish=preview.writer(page, cli.log) if page else None)
    cli.conclude(plan.output)


if __name__ == "__main__":
    cli.run(main)
