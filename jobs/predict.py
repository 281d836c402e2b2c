"""python jobs/predict.py --checkpoint results/runs/custom_cnn --data data/faces --split validation

Predicts every image of a prepared split, or of a folder or zip of face crops (--images), and
writes one row an image as Parquet.
"""

from __future__ import annotations

import argparse

from fer_ray import cli


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser; tests also use it to check the commands in the documentation."""
    parser = cli.JobParser(prog="predict.py", description=__doc__.partition("\n\n")[2])
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a checkpoint, or a run: its best one")
    fallback = "if the best checkpoint of a run is damaged, use the best of the others"
    add("--allow-fallback", action="store_true", help=fallback)
    add("--data", metavar="DIR", help="prepared data set")
    add("--images", metavar="DIR-OR-ZIP", help="face crops in any layout, instead of --data")
    split = "split of --data (default: validation), or the name to give to --images"
    add("--split", nargs="+", metavar="NAME", help=split)
    add("--output", default="results/predictions", metavar="DIR", help="folder of all predictions")
    add("--run", metavar="NAME", help="run name in the output (default: that of the checkpoint)")
    actors = "predicting processes; 0: one per CPU, or per GPU with --use-gpu"
    add("--num-actors", type=cli.integer(0), default=0, help=actors)
    add("--use-gpu", action="store_true", help="give each process a GPU")
    add("--batch-size", type=cli.integer(0), default=0, help="images at a time; 0: by the device")
    add("--local", action="store_true", help="predict in this process, without starting Ray")
    return parser


def main() -> None:
    """Parses the flags, checks the input, predicts, and prints the path of the predictions."""
    flags = build_parser().parse_args()

    from fer_ray.inference import plan, run

    cli.lasting("--output", flags.output)
    plans = [
        plan.plan(
            checkpoint_path=flags.checkpoint,
            data=flags.data,
            images=flags.images,
            split=split,
            output=flags.output,
            run=flags.run,
            allow_fallback=flags.allow_fallback,
            log=cli.log,
        )
        for split in flags.split or ["images" if flags.images else "validation"]
    ]
    if not flags.local:
        cli.start_ray()
    settings = {"num_actors": flags.num_actors, "use_gpu": flags.use_gpu, "local": flags.local}
    settings["batch_size"] = flags.batch_size
    for planned in plans[:-1]:
        cli.log(run.predict(planned, **settings, log=cli.log))
    cli.conclude(run.predict(plans[-1], **settings, log=cli.log))


if __name__ == "__main__":
    cli.run(main, first_line="checking the checkpoint and the images")
