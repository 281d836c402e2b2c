"""The numbers of the benchmark: what they compare, what they are to reach, how they are shown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Key:
    """One number of the benchmark."""

    target: float
    """What it is to reach."""
    at_most: bool = False
    """Whether smaller is better; else larger."""
    needs: str
    """What the workers are asked to measure."""
    ours: str = ""
    """Whose rounds go on top; empty where the number is no ratio of two series of rounds."""
    other: str = ""
    """Whose rounds go below."""
    how: str
    """What is compared with what."""
    of_model: bool = True
    """Whether it says something about the model that is asked for, and is measured with the
    others; else it is of preparation or of sweeps, and measured when it is named."""

    def is_met(self, value: float) -> bool:
        """Whether a value reaches the target."""
        return value <= self.target if self.at_most else value >= self.target


KEYS = {
    "train_over_plain": Key(
        target=0.95,
        needs="train",
        ours="train",
        other="train_plain",
        how="images/s of the training loop as configured, in a TorchTrainer of one worker, over a "
        "plain PyTorch loop on normalized float images in memory, without augmentation: same "
        "model, batch, threads, layout and precision",
    ),
    "default_over_plain_layout": Key(
        target=0.97,
        needs="train",
        ours="train_default",
        other="train_plain_layout",
        how="images/s of the same loop in the precision that is the device's default over the "
        "plain one in float32 and contiguous layout",
    ),
    "input_us_per_image": Key(
        target=100.0,
        at_most=True,
        needs="input",
        how="microseconds an image of one thread from images in memory to the network's input: "
        "gathered, augmented, normalized, resized",
    ),
    "input_over_naive": Key(
        target=10.0,
        needs="input_naive",
        ours="input",
        other="input_naive",
        how="images/s of that path with as many threads as cores over a DataLoader with as many "
        "workers as cores (already running) on a folder of JPEGs, each opened by PIL, changed by "
        "albumentations in the same way and made a tensor",
    ),
    "stream_over_naive": Key(
        target=2.0,
        needs="stream",
        ours="stream",
        other="input_naive",
        how="images/s of whole epochs of the stream from Parquet by Ray Data, their start "
        "included, over the same DataLoader",
    ),
    "predict_over_plain": Key(
        target=0.9,
        needs="predict",
        ours="predict",
        other="predict_plain",
        how="images/s of batch prediction with one actor, from the first written Parquet part to "
        "the last, over a bare forward loop on normalized images in an actor of the same kind",
    ),
    "epoch_first_over_later": Key(
        target=1.3,
        at_most=True,
        needs="epochs",
        how="seconds of the first epoch, validation included, over the median of the later ones "
        "in a TorchTrainer of one worker; nothing is compiled",
    ),
    "workers_over_limit": Key(
        target=0.9,
        needs="together",
        ours="workers",
        other="workers_plain",
        how="images/s of the data-parallel loop with one thread a worker over the sum of "
        "independent plain loops, side by side in the same processes, of the same batch a worker",
    ),
    "sweep_overhead_s": Key(
        target=3.0,
        at_most=True,
        needs="sweep",
        of_model=False,
        how="seconds a trial of a sweep beyond its epochs: the whole of Ray Tune's run on drawn "
        "faces, one trial of one process after the other, less their epochs, over the trials",
    ),
    "asha_saving": Key(
        target=0.4,
        at_most=True,
        needs="halving",
        of_model=False,
        how="epochs that ASHA runs over those of the full grid, the same 27 trials of 9 epochs "
        "on drawn faces",
    ),
    "asha_loss": Key(
        target=0.005,
        at_most=True,
        needs="halving",
        of_model=False,
        how="validation accuracy of the grid's best trial less that of ASHA's best",
    ),
    "prepare_over_pillow": Key(
        target=5.0,
        needs="prepare",
        ours="prepare",
        other="prepare_plain",
        how="images/s of preparing a zip of JPEGs with all CPUs, from its listing to dataset.json, "
        "over one process that opens each with Pillow, hashes the pixels and writes Parquet",
        of_model=False,
    ),
    "prepare_speed_kept": Key(
        target=0.8,
        needs="prepare_growth",
        ours="prepare_many",
        other="prepare_few",
        how="images/s of preparing 600,000 drawn faces over those of 30,000",
        of_model=False,
    ),
    "prepare_memory_growth": Key(
        target=1.2,
        at_most=True,
        needs="prepare_growth",
        how="peak memory of a process while 600,000 drawn faces are prepared over that with "
        "30,000, for the kind of process whose memory grows most, Ray's own among them",
        of_model=False,
    ),
}
"""The numbers, by their name in the result."""

LIMIT_OF_PREPARATION = (
    "Reading, decoding and hashing alone, in as many processes as CPUs, is {:.2f} times as fast "
    "as all that the one process with Pillow does."
)
"""What bounds `prepare_over_pillow` on a machine."""


def numbers(keys: Sequence[str], found: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of `KEYS` from what was measured.

    Args:
        keys: which.
        found: ``rounds``, images/s by name, and ``epochs_s``.
    """
    rounds = dict(found["rounds"])
    if "train" in rounds:
        rounds.setdefault("train_default", rounds["train"])
    values = {}
    for name in keys:
        key = KEYS[name]
        if name == "input_us_per_image":
            values[name] = 1e6 / statistics.median(rounds["input_one_thread"])
        elif name in found:
            values[name] = found[name]
        elif name == "epoch_first_over_later":
            first, *later = found["epochs_s"]
            values[name] = first / statistics.median(later)
        else:
            ours, other = (statistics.median(rounds[side]) for side in (key.ours, key.other))
            values[name] = ours / other
    return values


def table(result: Mapping[str, Any]) -> list[str]:
    """The numbers as lines of text: name, value, target, met or MISSED."""
    lines = [f"{'':28}{'measured':>10}{'target':>10}"]
    for name, key in KEYS.items():
        if name in result:
            verdict = "met" if key.is_met(result[name]) else "MISSED"
            sign = "<=" if key.at_most else ">="
            lines.append(f"{name:28}{result[name]:>10.3f}{sign:>5}{key.target:>5g}  {verdict}")
    if result["images_per_s"]:
        lines += ["", "images/s, medians of the rounds:"]
    lines += [f"  {name:26}{value:>12,.1f}" for name, value in result["images_per_s"].items()]
    if "prepare_limit_over_pillow" in result:
        lines.append(LIMIT_OF_PREPARATION.format(result["prepare_limit_over_pillow"]))
    if "asha" in result:
        full, halved = result["asha"]["full"], result["asha"]["halved"]
        lines.append(
            f"{full['trials']} trials in full: {full['epochs']} epochs, best {full['best']:.2%}; "
            f"with ASHA {halved['epochs']}, best {halved['best']:.2%}"
        )
    if "data" in result["startup_s"]:
        parts = result["startup_s"]
        listed = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
        lines.append(f"seconds to the first step: {sum(parts.values()):.1f} ({listed})")
    held = ", ".join(f"{kind} {mib:,.0f}" for kind, mib in result["peak_memory_mib"].items())
    lines.append(f"most memory of a process, MiB: {held}")
    if "ray_cpu_s" in result:
        used, workers = dict(result["ray_cpu_s"]), result["num_workers"]
        seconds = used.pop("seconds")
        lines.append(
            f"CPU seconds of Ray's own processes in {seconds:.1f} s of {workers} workers: "
            f"{sum(used.values()):.2f}"
        )
    if "gpu_busy_share" in result:
        lines.append(f"share of the time that the GPU computes: {result['gpu_busy_share']:.1%}")
    return lines
