"""The training loop of one worker.

It uses `torch.distributed` but not Ray: it reports through callbacks, so that a worker of Ray
Train, a trial of a sweep and a test all run the same loop.
"""

from __future__ import annotations

import datetime
import enum
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from fer_ray.config.schema import ScheduleConfig, TrainConfig
from fer_ray.data.dataset import DatasetInfo
from fer_ray.metrics import training_metrics
from fer_ray.models import checkpoint, precision, registry
from fer_ray.models.checkpoint import Checkpoint
from fer_ray.models.forward import Forward
from fer_ray.training import batch_norm, compilation, optimization
from fer_ray.training.data_parallel import data_parallel
from fer_ray.training.feed import Batch, Feed, own_part
from fer_ray.training.process_group import ProcessGroup
from fer_ray.transforms.normalization import Normalizer, histogram, moments, needs_statistics

PROGRESS_EVERY_S = 15.0
"""Seconds between progress messages within an epoch."""

Snapshot = Callable[[], Callable[[Path], None]]
"""Copies the state, and returns a function that writes the copy as a checkpoint into a folder."""
Report = Callable[[list[dict[str, Any]], Snapshot], None]
"""Takes the history so far, and how to copy the state that belongs to it."""


class Callback(Protocol):
    """Is notified of every step and epoch, on every worker."""

    def on_step(self, epoch: int, step: int, images: int, loss: torch.Tensor) -> None:
        """After a step: epoch and step of the run, both from 1, this worker's number of images and
        the sum of their losses."""

    def on_epoch(self, step: int, row: dict[str, Any]) -> None:
        """After an epoch: its last step of the run, from 1, and its row of the history."""


def train(
    config: TrainConfig,
    info: DatasetInfo,
    feed: Feed,
    *,
    group: ProcessGroup,
    run: str,
    report: Report,
    environment: dict[str, Any] | None = None,
    resume: Checkpoint | None = None,
    until: int | None = None,
    log: Callable[[str], None] | None = None,
    callback: Callback | None = None,
) -> None:
    """Trains to the end of the schedule, or until it is stopped early.

    Args:
        config: everything that decides the result.
        info: the prepared data set.
        feed: where the batches come from.
        group: the workers that train together.
        run: the run's name, kept in its checkpoints.
        environment: hardware and versions, kept in its checkpoints.
        report: called by every worker after each epoch.
        resume: a checkpoint of the same run to resume from.
        until: the epoch after which to pause; None: not at all.
        log: optional; receives a progress message now and then within a long epoch.
        callback: optional; is notified of every step and epoch.
    """
    labels = {"run": run, "environment": environment or {}}
    trainer = Trainer(
        config,
        info,
        feed,
        group=group,
        labels=labels,
        resume=resume,
        log=log,
        callback=callback,
    )
    trainer.fit(report, until)


class Trainer:
    """The state of one worker's training."""

    def __init__(
        self,
        config: TrainConfig,
        info: DatasetInfo,
        feed: Feed,
        *,
        group: ProcessGroup,
        labels: dict[str, Any],
        resume: Checkpoint | None,
        log: Callable[[str], None] | None = None,
        callback: Callback | None = None,
    ) -> None:
        self.config, self.info, self.group, self.labels = config, info, group, labels
        self.log, self.callback = log, callback
        self.feed, self.steps_per_epoch = feed, feed.steps_per_epoch
        self.history = list(resume.history) if resume else []
        self.forward = Forward(
            normalizer=resume.normalizer if resume else self._normalizer(),
            input_size=config.model.input_size or info.image_size,
            precision=self._precision(resume),
            flip_at_test=config.schedule.flip_at_test,
        )
        weights = optimization.class_weights(feed.class_counts, config.optimizer)
        self.class_weights = None if weights is None else weights.to(group.device)
        self._last_logged = time.monotonic()
        self._build_model(resume)

    def _normalizer(self) -> Normalizer:
        """The normalization, with statistics of the train split after the pixel stage."""
        name = self.config.transforms.normalization
        plain = Normalizer(normalization=name, mean=self.info.pixel_mean, std=self.info.pixel_std)
        if not needs_statistics(name):
            return plain
        counts = self.feed.histogram(lambda images: histogram(plain.pixel_stage(images)))
        mean, std = moments(torch.from_numpy(self.group.all_reduce(counts)))
        return Normalizer(normalization=name, mean=mean, std=std)

    def _precision(self, resume: Checkpoint | None) -> str:
        """A resumed run keeps its precision; workers on different hardware use the most exact."""
        device = self.group.device
        wanted = precision.for_training(self.config.schedule.precision, self.config.model, device)
        own = precision.ORDER.index(resume.precision if resume else wanted)
        most_exact = len(precision.ORDER) - self.group.maximum(len(precision.ORDER) - own)
        precision.set_tf32(name := precision.ORDER[int(most_exact)])
        return name

    def _build_model(self, resume: Checkpoint | None) -> None:
        torch.manual_seed(self.config.schedule.seed)
        model = registry.build(
            self.config.model, num_classes=len(self.info.labels), image_size=self.info.image_size
        )
        model = model.to(self.group.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        steps = self.config.optimizer.ema_half_life * self.steps_per_epoch
        self.average = optimization.WeightAverage(model, half_life=steps)
        self.optimizer = optimization.build_optimizer(model, self.config.optimizer)
        if resume:
            resume.restore(model, self.average.model, self.optimizer)
        self.model: nn.Module = model
        self.compiled = resume.compiled if resume else self._decides_to_compile()
        if self.compiled:
            self._check_compiler()
            if self.log:
                self.log("compiling the network, which takes minutes when it is the first time")
            model = compilation.compiled(model)
        unit = self.config.images_per_unit
        self.parallel = batch_norm.in_groups(model, size=unit, device=self.group.device)
        if self.group.size > 1:
            size = self.forward.input_size
            example = torch.zeros(unit, 1, size, size, device=self.group.device)
            layout = example.contiguous(memory_format=torch.channels_last)
            compress = self.config.scaling.gradient_exchange == "bfloat16"
            self.parallel = data_parallel(self.parallel, layout, compress=compress)

    def _decides_to_compile(self) -> bool:
        """All workers decide alike: one that cannot compile decides for all."""
        schedule, device = self.config.schedule, self.group.device
        if schedule.compile != "auto":
            return schedule.compile == "on"
        if not self.config.model.faster_compiled:
            return False
        images = schedule.epochs * self.steps_per_epoch * schedule.global_batch_size
        size = self.forward.input_size
        pays = compilation.pays(self.model, size=size, images=images, device=device)
        return not self.group.maximum(not pays)

    def _check_compiler(self) -> None:
        """Raises `CannotCompile` on every worker where one of them cannot compile."""
        reason = compilation.problem()
        if self.group.maximum(reason is not None):
            raise compilation.CannotCompile(reason)

    def fit(self, report: Report, until: int | None = None) -> None:
        """Runs the remaining epochs and reports each; raises `NotFinite` on every worker."""
        schedule = self.config.schedule
        while stop_reason(schedule, self.history) is None:
            if until is not None and len(self.history) >= until:
                return
            epoch, start = len(self.history), time.perf_counter()
            trained = self.train_epoch(epoch)
            train_s = time.perf_counter() - start
            validated = self.evaluate()
            if not math.isfinite(validated["loss"]):  # all-reduced: the same on every worker
                raise NotFinite(epoch=epoch + 1, step=(epoch + 1) * self.steps_per_epoch)
            # the slowest worker's time, so that all decide alike when the time limit is reached
            seconds = self.group.maximum(time.perf_counter() - start)
            seen = self.steps_per_epoch * self.config.schedule.global_batch_size
            self.history.append(
                {
                    "epoch": epoch + 1,
                    **{f"train_{name}": value for name, value in trained.items()},
                    **{f"validation_{name}": value for name, value in validated.items()},
                    "learning_rate": self._learning_rate(len(self.history), 0),
                    "images_per_s": seen / self.group.maximum(train_s),
                    "seconds": seconds,
                    "ended_at": self._now(),
                }
            )
            if self.callback:
                self.callback.on_epoch((epoch + 1) * self.steps_per_epoch, self.history[-1])
            report(self.history, self.snapshot)

    def _now(self) -> str:
        """The latest of the workers' clocks: the history is the same on every worker."""
        latest = self.group.maximum(time.time())
        return datetime.datetime.fromtimestamp(latest, datetime.UTC).isoformat()

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Trains one epoch, counted from 0; returns its loss and metrics over all workers."""
        seed = np.random.SeedSequence((self.config.schedule.seed, epoch, self.group.rank))
        torch.manual_seed(int(seed.generate_state(1)[0]))  # dropout
        self.model.train()
        device, classes = self.group.device, len(self.info.labels)
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
        bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        check_every = 1 if device.type == "cpu" else 50  # reading a value waits for the GPU
        for step, batch in enumerate(self.feed.train(epoch)):
            loss, logits, finite = self._step(batch, epoch, step)
            loss_sum += loss
            cells = batch.targets[: len(logits)] * classes + logits.argmax(1)
            # not `bincount`, which waits for the GPU
            confusion.scatter_add_(0, cells, torch.ones_like(cells))
            bad_step = torch.where((bad_step < 0) & ~finite, step, bad_step)
            self._progress(epoch, step)
            if self.callback:
                at = epoch * self.steps_per_epoch + step + 1
                self.callback.on_step(epoch + 1, at, len(logits), loss)
            if (step + 1) % check_every == 0 or step + 1 == self.steps_per_epoch:
                self._check_finite(epoch, int(bad_step))
        self._share_statistics()
        return self._summarize(loss_sum.item(), confusion.cpu().numpy())

    def _share_statistics(self) -> None:
        """Gives every worker the running statistics of batch norm over all workers' images."""
        own = own_part(self.config, self.group)
        fraction = (own.stop - own.start) / self.config.schedule.global_batch_size
        networks = (self.model, self.average.model)
        batch_norm.average_statistics(networks, fraction=fraction, group=self.group)

    def _step(
        self, batch: Batch, epoch: int, step: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One step; returns this worker's summed loss, its logits, and whether all is finite."""
        optimizer, settings = self.optimizer, self.config.optimizer
        for parameters in optimizer.param_groups:
            parameters["lr"] = self._learning_rate(epoch, step)
        logits = self.forward.logits(self.parallel, batch.images, batch.mix)
        loss = optimization.summed_loss(
            logits,
            batch.targets,
            label_smoothing=settings.label_smoothing,
            weights=self.class_weights,
            mix=batch.mix,
        )
        optimizer.zero_grad(set_to_none=True)
        # DistributedDataParallel averages over the workers: undo that and divide by the images
        (loss * (self.group.size / self.config.schedule.global_batch_size)).backward()
        limit = settings.clip_grad_norm or math.inf
        # gradients are all-reduced: every worker computes the same norm, and so decides alike
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        optimizer.step()
        self.average.update(epoch * self.steps_per_epoch + step)
        return loss.detach(), logits.detach(), torch.isfinite(norm)

    def evaluate(self) -> dict[str, float]:
        """Loss and metrics of the averaged weights on the whole validation split.

        The loss is the mean negative log-likelihood in nats, without smoothing or weights.
        """
        classes, device = len(self.info.labels), self.group.device
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
        for images, targets in self.feed.validation():
            probabilities = self.forward.probabilities(self.average.model, images)
            chosen = probabilities.gather(1, targets[:, None]).clamp_min(1e-12)
            loss_sum -= chosen.double().log().sum()
            cells = targets * classes + probabilities.argmax(1)
            # not `bincount`, which waits for the GPU
            confusion.scatter_add_(0, cells, torch.ones_like(cells))
        return self._summarize(loss_sum.item(), confusion.cpu().numpy())

    def _summarize(self, loss_sum: float, confusion: np.ndarray) -> dict[str, float]:
        """Loss and metrics over all workers, from this worker's sums."""
        classes = len(self.info.labels)
        matrix = self.group.all_reduce(confusion).reshape(classes, classes)
        loss = float(self.group.all_reduce(np.array([loss_sum]))[0]) / int(matrix.sum())
        values = {name: metric.value(matrix) for name, metric in training_metrics().items()}
        return {"loss": loss, **values}

    def snapshot(self) -> Callable[[Path], None]:
        """Copies the state after the last finished epoch.

        Returns:
            A function that writes the copy as a checkpoint into an existing folder, at any time
            and in any thread.
        """
        values = {
            **self.labels,
            "model": self.config.model,
            "labels": self.info.labels,
            "image_size": self.info.image_size,
            "normalizer": self.forward.normalizer,
            "flip_at_test": self.forward.flip_at_test,
            "precision": self.forward.precision,
            "compiled": self.compiled,
            "epoch": len(self.history),
            "history": list(self.history),
            "config": self.config.to_dict(),
        }
        return checkpoint.snapshot(
            values=values,
            model=self.model,
            average=self.average.model,
            optimizer=self.optimizer,
        )

    def _learning_rate(self, epoch: int, step: int) -> float:
        assert self.config.optimizer.learning_rate is not None
        return optimization.learning_rate(
            epoch * self.steps_per_epoch + step,
            steps_per_epoch=self.steps_per_epoch,
            peak=self.config.optimizer.learning_rate,
            schedule=self.config.schedule,
        )

    def _progress(self, epoch: int, step: int) -> None:
        """Logs the progress of a long epoch, on the first worker, now and then."""
        now = time.monotonic()
        if self.log is None or self.group.rank or now - self._last_logged < PROGRESS_EVERY_S:
            return
        self._last_logged = now
        epochs, steps = self.config.schedule.epochs, self.steps_per_epoch
        self.log(f"epoch {epoch + 1}/{epochs}, step {step + 1}/{steps}")

    def _check_finite(self, epoch: int, bad_step: int) -> None:
        if bad_step >= 0:
            raise NotFinite(epoch=epoch + 1, step=epoch * self.steps_per_epoch + bad_step + 1)


class StopReason(enum.Enum):
    """Why a training has ended."""

    LAST_EPOCH = "last epoch"
    TIME_LIMIT = "time limit"
    PATIENCE = "patience"


def stop_reason(
    schedule: ScheduleConfig, history: Sequence[Mapping[str, Any]]
) -> StopReason | None:
    """Why training ends after the epochs of a history; None: it goes on.

    Args:
        schedule: epochs, time limit and patience.
        history: one row per epoch, of which ``seconds`` and the score decide.
    """
    if len(history) >= schedule.epochs:
        return StopReason.LAST_EPOCH
    if not history:
        return None
    if schedule.time_limit_s and sum(row["seconds"] for row in history) > schedule.time_limit_s:
        return StopReason.TIME_LIMIT
    best = int(np.argmax([row[checkpoint.SCORE] for row in history]))
    if schedule.patience and len(history) - 1 - best >= schedule.patience:
        return StopReason.PATIENCE
    return None


class NotFinite(ArithmeticError):
    """The loss or its gradient became infinite or not a number; raised on every worker."""

    def __init__(self, *, epoch: int, step: int) -> None:
        """Names the epoch and the step of the whole run, both from 1."""
        super().__init__(
            f"the loss or its gradient is not finite at step {step} (epoch {epoch}): try a lower "
            "--learning-rate, a longer --warmup-epochs or --clip-grad-norm"
        )
