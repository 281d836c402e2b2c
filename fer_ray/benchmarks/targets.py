"""The numbers of the benchmark: what each compares, its target, and how it is shown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Key:
    """One number of the benchmark."""

    target: float
    """The value to reach, in the number's unit."""
    at_most: bool = False
    """Whether the target is an upper bound; otherwise it is a lower bound."""
    needs: str
    """The measurement that the number is computed from; several numbers may share one."""
    numerator: str = ""
    """Series of rounds whose median is divided. Empty: the number is not a ratio of two series."""
    denominator: str = ""
    """Series of rounds whose median divides."""
    how: str
    """What is compared with what."""
    of_model: bool = True
    """Whether the number describes the configured model and is measured by default. The others
    describe preparation or sweeps, and are measured only on request."""

    def is_met(self, value: float) -> bool:
        """Whether a value reaches the target."""
        return value <= self.target if self.at_most else value >= self.target


KEYS = {
    "train_over_plain": Key(
        target=0.95,
        needs="train",
        numerator="train",
        denominator="train_plain",
        how="images/s of the training loop as configured, in a TorchTrainer with one worker, "
        "divided by images/s of a plain PyTorch loop on normalized float images in memory, "
        "without augmentation; both use the same model, batch size, threads, memory layout and "
        "precision",
    ),
    "default_over_plain_layout": Key(
        target=0.97,
        needs="train",
        numerator="train_default",
        denominator="train_plain_layout",
        how="images/s of the same training loop in the device's default precision, divided by "
        "images/s of the plain loop in float32 and contiguous memory layout",
    ),
    "input_us_per_image": Key(
        target=100.0,
        at_most=True,
        needs="input",
        how="microseconds per image that one thread needs from images in memory to the network's "
        "input: gather, augment, normalize, resize",
    ),
    "input_over_naive": Key(
        target=10.0,
        needs="input_naive",
        numerator="input",
        denominator="input_naive",
        how="images/s of the same input path with as many threads as cores, divided by images/s "
        "of a DataLoader with as many workers as cores (already running) on a folder of JPEGs; "
        "it opens each file with Pillow, augments it with albumentations and converts it to a "
        "tensor",
    ),
    "stream_over_naive": Key(
        target=2.0,
        needs="stream",
        numerator="stream",
        denominator="input_naive",
        how="images/s of whole epochs that Ray Data streams from Parquet, the start of each epoch "
        "included, divided by images/s of the same DataLoader",
    ),
    "predict_over_plain": Key(
        target=0.9,
        needs="predict",
        numerator="predict",
        denominator="predict_plain",
        how="images/s of batch prediction with one actor, from the first Parquet part written to "
        "the last, divided by images/s of a bare forward loop on normalized images in an actor "
        "with the same resources",
    ),
    "epoch_first_over_later": Key(
        target=1.3,
        at_most=True,
        needs="epochs",
        how="seconds of the first epoch, validation included, divided by the median of the later "
        "epochs, in a TorchTrainer with one worker; nothing is compiled",
    ),
    "workers_over_limit": Key(
        target=0.9,
        needs="workers",
        numerator="workers",
        denominator="workers_plain",
        how="images/s of the data-parallel loop with one thread per worker, divided by the summed "
        "images/s of independent plain loops with the same batch size per worker, which run at "
        "the same time in the same processes",
    ),
    "sweep_overhead_s": Key(
        target=3.0,
        at_most=True,
        needs="sweep",
        of_model=False,
        how="seconds per trial that a sweep adds to the epochs: the duration of Ray Tune's whole "
        "run on synthetic faces, one single-process trial after the other, minus the seconds of "
        "all epochs, divided by the number of trials",
    ),
    "asha_saving": Key(
        target=0.4,
        at_most=True,
        needs="halving",
        of_model=False,
        how="number of epochs that ASHA trains, divided by that of the full grid, for the same 27 "
        "trials of 9 epochs on synthetic faces",
    ),
    "asha_loss": Key(
        target=0.005,
        at_most=True,
        needs="halving",
        of_model=False,
        how="validation accuracy of the grid's best trial minus that of ASHA's best trial",
    ),
    "prepare_over_pillow": Key(
        target=5.0,
        needs="prepare",
        numerator="prepare",
        denominator="prepare_plain",
        how="images/s of preparing a zip of JPEGs with all CPUs, from listing the zip to writing "
        "dataset.json, divided by images/s of one process that opens each image with Pillow, "
        "hashes its pixels and writes Parquet",
        of_model=False,
    ),
    "prepare_speed_kept": Key(
        target=0.8,
        needs="prepare_growth",
        numerator="prepare_many",
        denominator="prepare_few",
        how="images/s of preparing 600,000 synthetic faces, divided by images/s of preparing "
        "30,000",
        of_model=False,
    ),
    "prepare_memory_growth": Key(
        target=1.2,
        at_most=True,
        needs="prepare_growth",
        how="peak memory while 600,000 synthetic faces are prepared, divided by the peak with "
        "30,000; computed for the driver and for the largest of all processes that it starts, "
        "Ray's own included, of which the larger ratio is reported",
        of_model=False,
    ),
}
"""The numbers by their names in the result."""

PREPARATION_LIMIT = (
    "Reading, decoding and hashing alone, in as many processes as there are CPUs, is {:.2f} times "
    "as fast as the one process with Pillow, which also writes."
)
"""The upper bound of `prepare_over_pillow` on a machine."""


def numbers(keys: Sequence[str], measured: Mapping[str, Any]) -> dict[str, float]:
    """Computes the numbers of `KEYS` from what was measured.

    Args:
        keys: names of the numbers to compute.
        measured: ``rounds`` (images/s of each round, by series), ``epochs_s`` (seconds of each
            epoch), and those numbers that are measured directly.
    """
    rounds = dict(measured["rounds"])
    if "train" in rounds:
        rounds.setdefault("train_default", rounds["train"])
    values = {}
    for name in keys:
        key = KEYS[name]
        if name == "input_us_per_image":
            values[name] = 1e6 / statistics.median(rounds["input_one_thread"])
        elif name in measured:
            values[name] = measured[name]
        elif name == "epoch_first_over_later":
            first, *later = measured["epochs_s"]
            values[name] = first / statistics.median(later)
        else:
            numerator = statistics.median(rounds[key.numerator])
            values[name] = numerator / statistics.median(rounds[key.denominator])
    return values


def table(result: Mapping[str, Any]) -> list[str]:
    """The numbers as lines of text (name, value, target, met or MISSED), then the details."""
    lines = [f"{'':28}{'measured':>10}{'target':>10}"] if result["targets"] else []
    for name, key in KEYS.items():
        if name in result:
            verdict = "met" if key.is_met(result[name]) else "MISSED"
            sign = "<=" if key.at_most else ">="
            lines.append(f"{name:28}{result[name]:>10.3f}{sign:>5}{key.target:>5g}  {verdict}")
    return lines + _details(result) + _steps(result) + _accuracies(result)


def _details(result: Mapping[str, Any]) -> list[str]:
    """Rates, start-up and memory, as far as they were measured."""
    lines = []
    if result["images_per_s"]:
        lines += ["", "images/s, median of the rounds:"]
    lines += [f"  {name:26}{value:>12,.1f}" for name, value in result["images_per_s"].items()]
    if "prepare_limit_over_pillow" in result:
        lines.append(PREPARATION_LIMIT.format(result["prepare_limit_over_pillow"]))
    if "asha" in result:
        full, halved = result["asha"]["full"], result["asha"]["halved"]
        lines.append(
            f"{full['trials']} trials in full: {full['epochs']} epochs, best {full['best']:.2%}; "
            f"with ASHA: {halved['epochs']} epochs, best {halved['best']:.2%}"
        )
    if "data" in result["startup_s"]:
        seconds = result["startup_s"]
        listed = ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items())
        lines.append(f"seconds to the first step: {sum(seconds.values()):.1f} ({listed})")
    peaks = ", ".join(f"{name} {mib:,.0f}" for name, mib in result["peak_memory_mib"].items())
    lines.append(f"peak memory in MiB: {peaks}")
    if "gpu_busy_share" in result:
        lines.append(
            f"fraction of the time in which the GPU computes: {result['gpu_busy_share']:.1%}"
        )
    return lines


def _steps(result: Mapping[str, Any]) -> list[str]:
    """What was measured of training steps; what is not known is left out."""
    step = result.get("step")
    if step is None:
        return []
    ranges = ", ".join(f"{name} {ms:.2f}" for name, ms in step["range_ms"].items())
    lines = [
        "",
        f"a training step in {step['precision']}: {1e3 * step['step_s']:.2f} ms, "
        f"{step['images_per_s']:,.0f} images/s",
        f"  computes {step['flops_per_step'] / 1e9:,.1f} GFLOP"
        + _of("the peak", step["fraction_of_peak_flops"]),
        f"  moves about {step['bytes_per_step'] / 2**20:,.0f} MiB in memory"
        + _of("the bandwidth", step["fraction_of_bandwidth"]),
        f"  the host's ms in a profiled step: {ranges}",
    ]
    if step["kernels"] is not None:
        lines += [
            f"  the GPU is busy {step['device_busy']:.1%} of the time, in {step['kernels']:,.0f} "
            f"kernels; {step['host_synchronizations']:g} host synchronizations, "
            f"{step['pageable_copies']:g} copies of pageable memory",
            f"  at most {step['peak_gpu_memory_mib']:,.0f} MiB of GPU memory",
        ]
    checkpoint = [f"{step[f'checkpoint_{part}_s']:.3f} s to {part}" for part in ("copy", "write")]
    pauses = f"  validation {step['validation_s']:.2f} s, a checkpoint {' and '.join(checkpoint)}"
    return [*lines, pauses]


def _of(limit: str, fraction: float | None) -> str:
    return "" if fraction is None else f", {fraction:.1%} of {limit}"


def _accuracies(result: Mapping[str, Any]) -> list[str]:
    """When a training reached each accuracy."""
    if "to_accuracy" not in result:
        return []
    measured = result["to_accuracy"]
    lines = ["", "seconds to a validation accuracy: training + validation + checkpoints"]
    for name, reached in measured["reached"].items():
        if reached is None:
            lines.append(f"  {name} %: not reached")
            continue
        parts = " + ".join(f"{reached[f'{part}_s']:,.1f}" for part in _PARTS)
        lines.append(f"  {name} %: {reached['seconds']:,.1f} = {parts}, epoch {reached['epoch']}")
    return [*lines, f"  best of {measured['epochs']} epochs: {measured['best']:.2%}"]


_PARTS = ("train", "validation", "checkpoint")
"""Of the seconds to an accuracy."""
