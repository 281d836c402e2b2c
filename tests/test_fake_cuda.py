"""What a training step does on a GPU, without one: devices, waiting, copies, communication.

The host must never wait for the GPU in a step, or the GPU waits for the host afterwards.
"""

import fake_cuda
import numpy as np
import pytest
import small
import torch
from fake_cuda import Counts, Recorder
from torch import nn

from fer_ray.config.registries import AUGMENTATIONS, MODELS, NORMALIZATIONS
from fer_ray.config.schema import TrainConfig
from fer_ray.models import checkpoint, registry
from fer_ray.models.forward import Forward
from fer_ray.models.networks.custom_cnn import ConvNorm
from fer_ray.training import batch_norm, optimization, telemetry
from fer_ray.training.feed import Batch
from fer_ray.training.loop import Callback, Trainer
from fer_ray.training.process_group import ProcessGroup
from fer_ray.training.stream_feed import StreamFeed
from fer_ray.transforms import device_engine
from fer_ray.transforms.normalization import Normalizer, histogram, needs_statistics

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
STEPS = 2
BUDGETS = {"custom_cnn": 660, "sequential_cnn": 150, "efficientnet_b2": 4050}
"""Most operations of a step of each network, which cost some microseconds each: with the preset
`standard` and SGD, for EfficientNet-B2 with AdamW. What is filled with zeros is not counted: the
first step creates the optimizer's state, and EfficientNet-B2 has that step alone."""


def config(**sections) -> TrainConfig:
    """Batches of 8 in groups of 4, width 4, bfloat16."""
    sections["schedule"] = {"precision": "bfloat16", **sections.get("schedule", {})}
    return small.config(**sections)


def memory_feed(settings: TrainConfig, group: ProcessGroup, steps: int = STEPS):
    train = steps * settings.schedule.global_batch_size
    info = small.info(train)
    splits = small.split(train), small.split(21, seed=1)
    return info, small.feed(settings, *splits, described=info, group=group)


def trainer(settings: TrainConfig, group=None, *, resume=None, steps: int = STEPS) -> Trainer:
    group = group or ProcessGroup(device=GPU)
    info, feed = memory_feed(settings, group, steps)
    labels = {"run": "x", "environment": {}}
    built = Trainer(settings, info, feed, group=group, labels=labels, resume=resume)
    assert all(tensor.is_cuda for tensor in tensors_of(built))
    return built


def small_trainer(settings: TrainConfig, group=None) -> Trainer:
    """A trainer of a network with few layers, for what does not depend on the network."""

    def build(*args, **kwargs) -> nn.Module:
        return nn.Sequential(
            *(ConvNorm(1, 4), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            *(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, len(small.LABELS))),
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "build", build)
        return trainer(settings, group)


def tensors_of(built: Trainer) -> list[torch.Tensor]:
    """All tensors that live as long as a training run, but for the counters of steps."""
    state = [
        value
        for values in built.optimizer.state_dict()["state"].values()
        for name, value in values.items()
        if name != "step"
    ]
    models = [*built.model.state_dict().values(), *built.average.model.state_dict().values()]
    return [*models, *state, *(() if built.class_weights is None else [built.class_weights])]


class StepRecorder:
    """A callback that keeps what each step did."""

    def __init__(self, recorder: Recorder, inner: Callback | None = None) -> None:
        self.steps: list[Counts] = []
        self._recorder, self._inner = recorder, inner
        recorder.take()

    def on_step(self, epoch, step, images, loss):
        assert loss.is_cuda
        if self._inner:
            self._inner.on_step(epoch, step, images, loss)
        self.steps.append(self._recorder.take())

    def on_epoch(self, step, row):
        pass


def check(step: Counts) -> None:
    """What holds for each step."""
    assert not step.waits
    assert not step.blocking_copies


def train_epoch(built: Trainer, recorder: Recorder, inner: Callback | None = None) -> list[Counts]:
    """Checks each step of an epoch; returns them, then what follows them."""
    built.callback = callback = StepRecorder(recorder, inner)
    built.train_epoch(0)
    for step in callback.steps:
        check(step)
        assert step.copies > 0
    assert len(callback.steps) == built.steps_per_epoch
    assert all(tensor.is_cuda for tensor in tensors_of(built))
    return [*callback.steps, recorder.take()]


@pytest.fixture(scope="module")
def shared_trainer():
    """A trainer with class weights that tests may run, but not change."""
    with fake_cuda.fake_cuda():
        return small_trainer(config(optimizer={"class_weights": "balanced"}))


# the steps of each network


@pytest.mark.parametrize("name", MODELS)
def test_a_run_of_each_network(name, tmp_path):
    """Steps, validation, a checkpoint, and a run that is resumed from it."""
    is_large = name == "efficientnet_b2"
    settings = config(model={"name": name}, optimizer={"optimizer": "adamw" if is_large else "sgd"})
    with fake_cuda.fake_cuda() as recorder:
        built = trainer(settings, steps=1 if is_large else STEPS)
        *steps, after = train_epoch(built, recorder)
        kernels = steps[-1].kernels
        computed = kernels.total() - kernels["zeros"] - kernels["zeros_like"]
        assert computed <= BUDGETS.get(name, 10_000)
        assert steps[-1].kernels["convolution_backward"] > 0
        assert not after.blocking_copies and len(after.waits) <= 3  # for the loss and the metrics
        built.evaluate()
        evaluated = recorder.take()
        # its loss and its metrics, once
        assert not evaluated.blocking_copies and len(evaluated.waits) <= 2
        if not is_large:
            built.snapshot()(tmp_path)
            assert len(recorder.take().waits) <= 4  # two files of two types of numbers
    if name == "custom_cnn":
        check_resumed(settings, tmp_path)


def check_resumed(settings, folder):
    """What a checkpoint from a GPU holds goes to the GPU again."""
    with fake_cuda.fake_cuda() as recorder:
        saved = checkpoint.read(str(folder))
        train_epoch(trainer(settings, resume=saved, steps=1), recorder)
        model = saved.load_model(torch.device("cuda"))
        images = torch.zeros(3, 12, 12, dtype=torch.uint8, device=GPU)
        probabilities = saved.forward(GPU).probabilities(model, images)
        assert probabilities.is_cuda and probabilities.shape == (3, len(small.LABELS))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_everything_on_with_images_that_stay_on_the_host(optimizer, monkeypatch):
    """Also Ray's metrics, between their updates; a GPU without a number, as sweeps have it."""
    monkeypatch.setattr(telemetry, "EVERY_S", 1e9)
    settings = config(
        transforms={"augmentation": "strong", "normalization": "clahe+dataset"},
        optimizer={"optimizer": optimizer, "class_weights": "capped", "clip_grad_norm": 0.0},
        model={"input_size": 16},
    )
    with fake_cuda.fake_cuda(free_bytes=0) as recorder:
        built = small_trainer(settings, ProcessGroup(device=torch.device("cuda")))
        train_epoch(built, recorder, telemetry.Telemetry(run="x", rank=0, device=GPU))


def test_the_number_of_operations_does_not_grow_with_the_batch(shared_trainer):
    """Batch norm computes 2 groups and 8 by the same operations."""
    with fake_cuda.fake_cuda() as recorder:
        few = train_epoch(shared_trainer, recorder)
        settings = config(
            schedule={"global_batch_size": 32, "batch_norm_group": 4},
            optimizer={"class_weights": "balanced"},
        )
        many = train_epoch(small_trainer(settings), recorder)
    assert many[1].kernels == few[1].kernels


# pixels


def first_loss(batch: Batch, forward: Forward) -> torch.Tensor:
    """The loss of a batch whose pixels are the logits."""
    logits = forward.logits(nn.Flatten(), batch.images, batch.mix)
    return optimization.summed_loss(
        logits, batch.targets, label_smoothing=0.1, weights=None, mix=batch.mix
    )


def check_batches(feed, recorder: Recorder, normalization: str = "none") -> None:
    normalizer = Normalizer(normalization=normalization, mean=0.5, std=0.25)
    forward = Forward(normalizer=normalizer, input_size=16, precision="float32", flip_at_test=False)
    recorder.take()
    batches = 0
    for batch in feed.train(1):
        assert batch.images.is_cuda and batch.targets.is_cuda
        assert batch.images.dtype == torch.uint8
        assert first_loss(batch, forward).is_cuda
        check(recorder.take())
        batches += 1
    assert batches == STEPS


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_each_augmentation(name, resident):
    usual = {option.name: option.usual for option in AUGMENTATIONS[name].options}
    settings = config(transforms={"augmentation": "none", "engine": "device", **usual})
    with fake_cuda.fake_cuda(free_bytes=2**30 if resident else 0) as recorder:
        _, feed = memory_feed(settings, ProcessGroup(device=GPU))
        check_batches(feed, recorder)


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_each_normalization(name):
    settings = config(transforms={"augmentation": "none"})
    with fake_cuda.fake_cuda() as recorder:
        _, feed = memory_feed(settings, ProcessGroup(device=GPU))
        check_batches(feed, recorder, name)
        if needs_statistics(name):
            normalizer = Normalizer(normalization=name, mean=0.5, std=0.25)
            counts = feed.histogram(lambda images: histogram(normalizer.pixel_stage(images)))
            assert counts.shape == (256,)


def test_images_that_albumentations_augments_on_the_host():
    settings = config(transforms={"augmentation": "strong", "engine": "albumentations"})
    with fake_cuda.fake_cuda() as recorder:
        _, feed = memory_feed(settings, ProcessGroup(device=GPU))
        check_batches(feed, recorder)


def test_images_that_ray_data_streams(monkeypatch):
    settings = config(transforms={"augmentation": "strong"})
    size = settings.schedule.global_batch_size
    rows = {
        "image": [bytes(12 * 12)] * size,
        "target": np.zeros(size, np.int64),
        "sample": np.arange(size),
    }
    monkeypatch.setattr(StreamFeed, "_read", lambda self, own, **options: iter([rows] * STEPS))
    with fake_cuda.fake_cuda() as recorder:
        feed = StreamFeed(
            settings,
            small.info(STEPS * size),
            {"train": [], "validation": []},
            group=ProcessGroup(device=GPU),
            spare_cpus=1,
        )
        check_batches(feed, recorder)


# two workers


def test_two_workers_communicate_alike_and_only_by_gradients_in_a_step():
    """One has one group of batch norm, the other two; a collective that one lacks would hang."""
    settings = config(
        schedule={"global_batch_size": 12, "batch_norm_group": 4, "epochs": 1},
        transforms={"normalization": "clahe+dataset"},
    )
    collectives = []
    for rank in (0, 1):
        with fake_cuda.fake_cuda() as recorder, fake_cuda.fake_group(rank=rank, size=2) as group:
            built = small_trainer(settings, group)
            started = recorder.take()
            built.callback = callback = StepRecorder(recorder)
            built.fit(lambda history, save: None)
            after = recorder.take()
        trained = sum(p.numel() for p in built.model.parameters() if p.requires_grad)
        for step in callback.steps:
            check(step)
            assert step.collectives == [("allreduce_ float32", "backward", trained)]
        floats = sum(b.numel() for b in built.model.buffers() if b.is_floating_point())
        statistics = ("allreduce_ float64", "forward", 2 * floats)  # of the average, too
        assert after.collectives.count(statistics) == 1
        # beside statistics, and loss and metrics of both splits, the times
        assert len(after.collectives) <= 8
        assert len(after.blocking_copies) <= len(after.collectives) + 3
        collectives.append([*started.collectives, *after.collectives])
    assert collectives[0] == collectives[1]


# tests of these tests


def test_a_loss_that_is_read_in_a_step_is_found(shared_trainer, monkeypatch):
    summed_loss = optimization.summed_loss

    def mutant(*args, **kwargs):
        loss = summed_loss(*args, **kwargs)
        assert float(loss.detach()) > 0
        return loss

    monkeypatch.setattr(optimization, "summed_loss", mutant)
    with (
        fake_cuda.fake_cuda() as recorder,
        pytest.raises(AssertionError, match=r"_local_scalar_dense at training/loop\.py"),
    ):
        train_epoch(shared_trainer, recorder)


def test_class_weights_that_stay_on_the_host_are_found(shared_trainer, monkeypatch):
    with fake_cuda.fake_cuda() as recorder:
        monkeypatch.setattr(shared_trainer, "class_weights", shared_trainer.class_weights.cpu())
        with pytest.raises(RuntimeError, match=r"on the same device|two different devices"):
            train_epoch(shared_trainer, recorder)


def test_copies_from_memory_that_is_not_pinned_are_found(shared_trainer, monkeypatch):
    with fake_cuda.fake_cuda() as recorder:
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
        with pytest.raises(AssertionError, match=r"_to_copy at training/memory_feed\.py"):
            train_epoch(shared_trainer, recorder)


def test_augmentation_that_draws_on_the_host_is_found(shared_trainer, monkeypatch):
    to_tensor = device_engine.to_tensor
    monkeypatch.setattr(device_engine, "to_tensor", lambda values, device: to_tensor(values, CPU))
    with fake_cuda.fake_cuda() as recorder, pytest.raises(RuntimeError, match="device"):
        train_epoch(shared_trainer, recorder)


def test_batch_norm_that_communicates_is_found(monkeypatch):
    forward = batch_norm._NormalizeGroups.forward

    def mutant(ctx, x, *rest):
        torch.distributed.all_reduce(torch.zeros(3, device=x.device))
        return forward(ctx, x, *rest)

    monkeypatch.setattr(batch_norm._NormalizeGroups, "forward", staticmethod(mutant))
    with fake_cuda.fake_cuda() as recorder, fake_cuda.fake_group(rank=0, size=2) as group:
        built = small_trainer(config(), group)
        first, *_ = train_epoch(built, recorder)
    assert ("allreduce_ float32", "forward", 3) in first.collectives


WAITING = {
    "float": float,
    "bool": bool,
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to the host": lambda x: x.to("cpu", non_blocking=True),
    "equal": lambda x: torch.equal(x, x),
    "bincount": lambda x: torch.bincount(x.long().view(1), minlength=3),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "nonzero": lambda x: x.nonzero(),
    "index by a mask": lambda x: x[x > 0],
    "new tensor": lambda x: torch.tensor([1.0], device=x.device),
    "scalar from the host": lambda x: x.fill_(torch.zeros(()).to(x.device)),
    "not pinned": lambda x: torch.zeros(2).to(x.device, non_blocking=True),
    "pinned, but blocking": lambda x: torch.zeros(2).pin_memory().to(x.device),
    "copy in place": lambda x: x.copy_(torch.zeros(())),
}


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_is_recorded(name):
    with fake_cuda.fake_cuda() as recorder:
        x = torch.zeros((), device=GPU)
        with pytest.raises(AssertionError):
            WAITING[name](x)
            check(recorder.take())


def test_what_does_not_wait_is_not_recorded():
    with fake_cuda.fake_cuda() as recorder:
        x = torch.zeros(2, 3).pin_memory().to(GPU, non_blocking=True)
        x[x > 0] = 1.0
        (x.view(6) + 1).masked_fill(x.view(6) > 0, 2.0)
        counts = recorder.take()
        check(counts)
        assert counts.copies == 1
        names = ("gt", "index_put_", "add", "masked_fill")
        assert {name for name in names if counts.kernels[name]} >= {"gt", "add", "masked_fill"}


def test_the_stand_in_for_autograd_computes_the_same():
    """On real tensors, which autograd's own engine knows."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, 3)
    )
    network = batch_norm.in_groups(network, size=2, device=GPU)
    images, targets = torch.rand(6, 1, 5, 5), torch.arange(6) % 3
    gradients = []
    for backward in (torch.Tensor.backward, fake_cuda.backward):
        network.zero_grad()
        logits = network(images)
        loss = nn.functional.cross_entropy(logits, targets) + logits.square().mean()
        backward(loss)
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    for own, expected in zip(*gradients):
        torch.testing.assert_close(own, expected)
