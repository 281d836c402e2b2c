"""python jobs/predict.py --checkpoint results/runs/custom_cnn --data data/faces --split validation

Predicts every image of a prepared split, or of a folder or zip of face crops (--images), and
writes one row an image as Parquet.
"""

from __future__ import annotations

import argparse

from fer_ray import cli


def build_parser() -> argparse.ArgumentParser:
    """The flags of this job; tests read commands in documents and manifests with it."""
    parser = cli.JobParser(prog="predict.py", description=__doc__.partition("\n\n")[2])
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a checkpoint, or a run: its best")
    add("--data", metavar="DIR", help="prepared dataset")
    add("--images", metavar="DIR-OR-ZIP", help="face crops in any layout, instead of --data")
    add("--split", nargs="+", metavar="NAME", help="of --data (validation); a name for --images")
    add("--output", default="results/predictions", metavar="DIR", help="folder of predictions")
    add("--run", metavar="NAME", help="name to predict under; by default that of the training")
    add("--num-actors", type=cli.integer(0), default=0, help="processes; 0: one a CPU or GPU")
    add("--use-gpu", action="store_true", help="give each process a GPU")
    return parser


def main() -> None:
    """Parses, checks, predicts, and prints where the predictions lie."""
    flags = build_parser().parse_args()

    from fer_ray.inference import run as inference

    cli.lasting("--output", flags.output)
    plans = [
        inference.plan(
            checkpoint_path=flags.checkpoint,
            data=flags.data,
            images=flags.images,
            split=split,
            output=flags.output,
            run=flags.run,
        )
        for split in flags.split or ["images" if flags.images else "validation"]
    ]
    cli.start_ray()
    settings = {"num_actors": flags.num_actors, "use_gpu": flags.use_gpu}
    for plan in plans[:-1]:
        cli.log(inference.predict(plan, **settings, log=cli.log))
    cli.conclude(inference.predict(plans[-1], **settings, log=cli.log))


if __name__ == "__main__":
    cli.run(main)
