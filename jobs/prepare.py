"""python jobs/prepare.py --source faces.zip --output data/faces

Turns a folder or zip of labelled faces, or drawn ones (--source synthetic), into a prepared
dataset: Parquet parts for each split, dataset.json and quarantine.parquet.
"""

from __future__ import annotations

from fer_ray import cli


def main() -> None:
    """Parses, checks, prepares, and prints where the dataset lies."""
    parser = cli.JobParser(prog="prepare.py", description=__doc__.partition("\n\n")[2])
    add = parser.add_argument
    add("--source", required=True, help="folder or .zip with <split>/<class>/<file>, or synthetic")
    add("--output", required=True, help="folder or URI of the prepared dataset")
    add("--image-size", type=cli.integer(8, 1024), default=48, help="height and width, in pixels")
    add("--num-images", type=cli.integer(1), help="how many faces synthetic draws (4000)")
    add("--seed", type=cli.integer(0), default=0, help="of the synthetic faces")
    add("--overwrite", action="store_true", help="replace a prepared dataset at --output")
    settings = vars(parser.parse_args())

    from fer_ray import preparation

    cli.lasting("--output", settings["output"])
    plan = preparation.plan(**settings)
    cli.start_ray()
    preparation.prepare(plan, say=cli.say)
    cli.say(plan.output)


if __name__ == "__main__":
    cli.run(main)
