import contextlib
import dataclasses
import socket
from pathlib import Path

import numpy as np
import pytest
import small
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fer_ray.config.schema import TrainConfig
from fer_ray.models import checkpoint
from fer_ray.training import loop
from fer_ray.training.process_group import ProcessGroup
from fer_ray.transforms.normalization import Normalizer


def trainer(config: TrainConfig, *, train=48, validation=21, group=None, resume=None):
    described, group = small.info(train), group or ProcessGroup()
    parts = small.split(train), small.split(validation, seed=1)
    return loop.Trainer(
        config,
        described,
        small.feed(config, *parts, described=described, group=group),
        group=group,
        labels={"run": "tried", "environment": {}},
        resume=resume,
    )


def fit(built: loop.Trainer, folder: Path | None = None, stop_after: int | None = None):
    """Runs a trainer; returns its last state dict. `stop_after` breaks off like a crash."""

    class Crash(Exception):
        pass

    def report(history, snapshot):
        if folder:
            path = folder / f"checkpoint_{len(history)}"
            path.mkdir(parents=True, exist_ok=True)
            snapshot()(path)
        if stop_after == len(history):
            raise Crash

    with contextlib.suppress(Crash):
        built.fit(report)
    return {
        **built.model.state_dict(),
        **{"average." + k: v for k, v in built.average.model.state_dict().items()},
    }


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_learns(precision):
    built = trainer(small.config(schedule={"epochs": 8, "precision": precision}), train=96)
    fit(built)
    assert built.history[-1]["validation_accuracy"] > 0.9
    assert built.history[-1]["train_loss"] < built.history[0]["train_loss"]


def test_it_overfits_one_batch():
    config = small.config(
        schedule={"epochs": 60, "global_batch_size": 9},
        transforms={"augmentation": "none"},
        optimizer={"label_smoothing": 0.0, "weight_decay": 0.0},
    )
    built = trainer(config, train=9)
    fit(built)
    assert built.history[-1]["train_loss"] < 0.05


@pytest.mark.parametrize("model", [{"width": 4}, {"name": "sequential_cnn"}])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, model, optimizer, precision):
    schedule = {"epochs": 4, "precision": precision}
    config = small.config(model=model, schedule=schedule, optimizer={"optimizer": optimizer})
    whole = trainer(config)
    assert whole.forward.precision == precision
    assert type(whole.optimizer).__name__.lower() == optimizer
    expected = fit(whole)
    fit(trainer(config), tmp_path, stop_after=2)
    resumed = trainer(config, resume=checkpoint.read(str(tmp_path / "checkpoint_2")))
    assert equal(fit(resumed), expected)
    timed = {"seconds", "images_per_s", "ended_at"}
    for one, other in zip(whole.history, resumed.history):
        assert {k: v for k, v in one.items() if k not in timed} == {
            k: v for k, v in other.items() if k not in timed
        }


def test_the_seed_decides_and_nothing_else():
    first, again = fit(trainer(small.config())), fit(trainer(small.config()))
    assert equal(first, again)
    assert not equal(first, fit(trainer(small.config(schedule={"seed": 1}))))


@pytest.mark.parametrize("normalization", ["clahe+dataset", "equalize"])
def test_inference_normalizes_as_training_did(tmp_path, normalization):
    """The statistics after the pixel stage travel in the checkpoint."""
    settings = small.config(schedule={"epochs": 1}, transforms={"normalization": normalization})
    built = trainer(settings)
    fit(built, tmp_path)
    kept = checkpoint.read(str(tmp_path / "checkpoint_1")).normalizer
    images = torch.from_numpy(small.split(48).images)
    assert torch.equal(kept(images), built.forward.normalizer(images))
    plain = Normalizer(normalization=normalization, mean=0.5, std=0.25)
    flat = plain.pixel_stage(images).double() / 255
    if normalization == "clahe+dataset":
        assert kept.mean == pytest.approx(flat.mean().item(), rel=1e-9)
        assert kept.std == pytest.approx(flat.std(correction=0).item(), rel=1e-9)
        assert abs(kept(images).mean().item()) < 1e-4
    assert torch.equal(kept(images[:5]), kept(images)[:5])


def test_parts_are_contiguous_and_cover_everything():
    for size in (1, 2, 3, 7):
        parts = [np.arange(20)[ProcessGroup(rank=r, size=size).shard(20)] for r in range(size)]
        assert np.concatenate(parts).tolist() == list(range(20))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def worker(rank: int, port: int, size: int, folder: str, config: dict) -> None:
    torch.set_num_threads(1)
    if size > 1:
        path = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=path, rank=rank, world_size=size)
    built = trainer(TrainConfig.from_dict(config), group=ProcessGroup(rank=rank, size=size))
    state = fit(built)
    torch.save({"state": state, "history": built.history}, Path(folder) / f"{size}-{rank}.pt")
    if size > 1:
        dist.destroy_process_group()


def test_one_and_two_workers_agree_on_uneven_shards(tmp_path):
    """A batch of 9 is 4 and 5, the 21 validation images are 10 and 11."""
    config = small.config(
        schedule={"epochs": 3, "global_batch_size": 9},
        optimizer={"class_weights": "balanced", "learning_rate": 0.02},
    ).to_dict()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    for size in (1, 2):
        mp.spawn(worker, (port, size, str(tmp_path), config), nprocs=size)
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert equal(first["state"], second["state"])
    for one, other, same in zip(alone["history"], first["history"], second["history"]):
        assert other == same
        for name, value in one.items():
            if name not in ("seconds", "images_per_s", "ended_at"):
                assert other[name] == pytest.approx(value, rel=2e-3, abs=1e-4), name


def test_gradients_that_are_exchanged_in_bfloat16_are_rounded(tmp_path):
    """Workers still agree bit for bit; the first epoch's loss is near that of an exact exchange."""
    states, losses = [], []
    for exchange in ("float32", "bfloat16"):
        folder = tmp_path / exchange
        folder.mkdir()
        config = small.config(scaling={"num_workers": 2, "gradient_exchange": exchange})
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        mp.spawn(worker, (port, 2, str(folder), config.to_dict()), nprocs=2)
        first, second = (torch.load(folder / f"2-{rank}.pt") for rank in (0, 1))
        assert equal(first["state"], second["state"])
        states.append(first["state"])
        losses.append(first["history"][0]["train_loss"])
    assert not equal(*states)
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


def test_it_stops_at_the_step_that_is_not_finite():
    config = small.config(optimizer={"learning_rate": 1.0})
    built = trainer(config)
    forward, calls = built.forward.logits, []

    def poisoned(model, images, mix):
        calls.append(1)
        return forward(model, images, mix) * (float("nan") if len(calls) == 9 else 1.0)

    object.__setattr__(built.forward, "logits", poisoned)
    with pytest.raises(loop.NotFinite, match=r"step 9 \(epoch 2\)"):
        fit(built)
    assert len(built.history) == 1


def test_it_stops_where_only_the_validation_shows_that_it_diverged():
    """Batch norm keeps training finite while the averaged weights no longer are."""
    built = trainer(small.config(optimizer={"learning_rate": 50.0, "clip_grad_norm": 0.0}))
    with torch.no_grad():
        built.average.model.classifier.weight.fill_(float("nan"))
    with pytest.raises(loop.NotFinite, match=r"step 6 \(epoch 1\)"):
        fit(built)
    assert not built.history


def poisoned(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    built = trainer(small.config(), group=ProcessGroup(rank=rank, size=2))
    forward, calls = built.forward.logits, []

    def logits(model, images, mix):
        calls.append(1)
        bad = rank == 1 and len(calls) == 3
        return forward(model, images, mix) * (float("nan") if bad else 1.0)

    object.__setattr__(built.forward, "logits", logits)
    try:
        fit(built)
    except loop.NotFinite as error:
        (Path(folder) / f"{rank}.txt").write_text(str(error))
    dist.destroy_process_group()


def test_all_workers_stop_at_the_step_where_one_is_not_finite(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    mp.spawn(poisoned, (port, str(tmp_path)), nprocs=2)
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert said[0] == said[1] and "at step 3 (epoch 1)" in said[0]


def test_fewer_validation_images_than_workers():
    config = small.config()
    alone = trainer(config, validation=3)
    groups = [ProcessGroup(rank=rank, size=5) for rank in range(5)]
    parts = [len(range(3)[group.shard(3)]) for group in groups]
    assert sum(parts) == 3 and 0 in parts
    alone.feed._group = groups[parts.index(0)]
    alone._summarize = lambda loss, confusion: {"loss": loss, "seen": int(confusion.sum())}
    assert alone.evaluate() == {"loss": 0.0, "seen": 0}


def test_a_resumed_run_keeps_its_precision(tmp_path):
    config = small.config(schedule={"epochs": 2, "precision": "auto"})
    fit(trainer(config), tmp_path, stop_after=1)
    saved = checkpoint.read(str(tmp_path / "checkpoint_1"))
    for precision in ("bfloat16", "float32"):
        resumed = trainer(config, resume=dataclasses.replace(saved, precision=precision))
        assert resumed.forward.precision == precision


def test_early_stopping_counts_from_the_best_epoch(monkeypatch):
    scores = iter([0.5, 0.6, 0.6, 0.55, 0.9])
    built = trainer(small.config(schedule={"epochs": 9, "patience": 2}))
    monkeypatch.setattr(
        built, "evaluate", lambda: {"loss": 1.0, "accuracy": next(scores), "macro_f1": 0.1}
    )
    fit(built)
    assert len(built.history) == 4  # the best is the second, and two did not beat it


def test_the_time_limit_ends_the_run_after_the_epoch_that_passes_it():
    built = trainer(small.config(schedule={"epochs": 50, "time_limit_s": 1e-6}))
    fit(built)
    assert len(built.history) == 1


def test_metrics_are_those_of_all_validation_images():
    built = trainer(small.config(), validation=700)  # more than one batch of evaluation
    found = built.evaluate()
    split = small.split(700, seed=1)
    images = torch.from_numpy(split.images)
    probabilities = built.forward.probabilities(built.average.model, images).numpy()
    labels = split.labels
    assert found["accuracy"] == pytest.approx((probabilities.argmax(1) == labels).mean())
    expected = -np.log(probabilities[np.arange(len(labels)), labels]).mean()
    assert found["loss"] == pytest.approx(expected, rel=1e-4)
