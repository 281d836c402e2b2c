import numpy as np
import pytest
import small
import torch

from fer_ray.config.schema import TrainConfig
from fer_ray.data.dataset import Split
from fer_ray.data.labels import UNKNOWN_LABEL
from fer_ray.training import feed as loading
from fer_ray.training.feed import Batch, Images
from fer_ray.training.memory_feed import MemoryFeed
from fer_ray.training.process_group import ProcessGroup
from fer_ray.transforms import albumentations_engine
from fer_ray.transforms.albumentations_engine import AlbumentationsAugmenter
from fer_ray.transforms.device_engine import DeviceAugmenter
from fer_ray.transforms.normalization import histogram

ENGINES = ("device", "albumentations")


def config(
    *, batch: int = 8, seed: int = 0, model: dict | None = None, **transforms
) -> TrainConfig:
    settings = {"augmentation": "none", **transforms}
    schedule = {"global_batch_size": batch, "seed": seed}
    return small.config(transforms=settings, schedule=schedule, model=model or {})


def feeds(
    settings: TrainConfig, size: int = 1, *, train: int | Split = 50, validation: int | Split = 21
) -> list[MemoryFeed]:
    """Those of all workers."""
    if isinstance(train, int):
        train = small.split(train)
    if isinstance(validation, int):
        validation = small.split(validation, seed=1)
    described = small.info(len(train.labels))
    return [
        small.feed(
            settings,
            train,
            validation,
            described=described,
            group=ProcessGroup(rank=rank, size=size),
        )
        for rank in range(size)
    ]


def together(built: list[MemoryFeed], epoch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every step's own images and targets of all workers, one worker after the other."""
    size = built[0]._config.schedule.global_batch_size
    steps = []
    for parts in zip(*(feed.train(epoch) for feed in built), strict=True):
        own = [feed._group.shard(size) for feed in built]
        counts = [part.stop - part.start for part in own]
        images = [batch.images[:count] for batch, count in zip(parts, counts)]
        targets = [batch.targets[:count] for batch, count in zip(parts, counts)]
        steps.append((torch.cat(images), torch.cat(targets)))
    return steps


def equal(one: list[tuple[torch.Tensor, ...]], other: list[tuple[torch.Tensor, ...]]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) for first, second in zip(one, other) for a, b in zip(first, second)
    )


def test_images_without_a_label_are_left_out():
    part = small.split(12)
    part.labels[[1, 5]] = UNKNOWN_LABEL
    kept = Images.known(part.images, part.labels)
    rest = [0, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert np.array_equal(kept.pixels, part.images[rest])
    assert np.array_equal(kept.labels, part.labels[rest])
    again = Images.known(kept.pixels, kept.labels)
    assert again.pixels is kept.pixels and again.labels is kept.labels
    nothing = Images.known(part.images, np.full(12, UNKNOWN_LABEL))
    assert nothing.pixels.shape == (0, 12, 12) and nothing.labels.shape == (0,)


def test_a_feed_does_not_see_images_without_a_label():
    train, validation = small.split(50), small.split(21, seed=1)
    train.labels[::5] = UNKNOWN_LABEL
    validation.labels[3] = UNKNOWN_LABEL
    (feed,) = feeds(config(batch=10), train=train, validation=validation)
    assert feed.steps_per_epoch == 4
    known = {image.tobytes() for image in train.images[train.labels != UNKNOWN_LABEL]}
    seen = torch.cat([batch.images for batch in feed.train(0)]).numpy()
    assert {image.tobytes() for image in seen} == known and len(seen) == 40
    assert feed.class_counts.tolist() == np.bincount(train.labels[train.labels >= 0]).tolist()
    assert sum(len(targets) for _, targets in feed.validation()) == 20
    assert feed.histogram(histogram).sum() == 40 * 12 * 12


@pytest.mark.parametrize("engine", ENGINES)
def test_every_epoch_has_another_order_that_covers_the_split(engine):
    train = small.split(48)
    order = np.argsort(train.labels, kind="stable")
    # class after class, as folders are read: in that order every batch would be of one class
    train.images[:], train.labels[:] = train.images[order], train.labels[order]
    label_of = {image.tobytes(): label for image, label in zip(train.images, train.labels)}
    (feed,) = feeds(config(engine=engine), train=train)
    epochs = []
    for epoch in (0, 1):
        batches = list(feed.train(epoch))
        assert len(batches) == feed.steps_per_epoch == 6
        assert all(len(batch.targets) == 8 and batch.mix is None for batch in batches)
        assert all(len(set(batch.targets.tolist())) > 1 for batch in batches)
        images = torch.cat([batch.images for batch in batches]).numpy()
        keys = [image.tobytes() for image in images]
        assert sorted(keys) == sorted(label_of)
        targets = torch.cat([batch.targets for batch in batches])
        assert targets.tolist() == [label_of[key] for key in keys]
        assert images.dtype == np.uint8 and targets.dtype == torch.int64
        epochs.append(keys)
    assert epochs[0] != epochs[1]
    (again,) = feeds(config(engine=engine), train=train)
    assert [i.tobytes() for b in again.train(1) for i in b.images.numpy()] == epochs[1]
    (other,) = feeds(config(engine=engine, seed=1), train=train)
    assert [i.tobytes() for b in other.train(1) for i in b.images.numpy()] != epochs[1]


def test_what_is_left_over_changes_from_epoch_to_epoch():
    train = small.split(50)
    (feed,) = feeds(config(batch=8), train=train)
    assert feed.steps_per_epoch == 6
    seen = set()
    for epoch in range(12):
        images = torch.cat([batch.images for batch in feed.train(epoch)]).numpy()
        assert len({image.tobytes() for image in images}) == 48
        seen |= {image.tobytes() for image in images}
    assert len(seen) == 50


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("preset", ["none", "standard", "strong"])
def test_any_number_of_workers_gets_the_same_global_batches(engine, preset):
    settings = config(engine=engine, augmentation=preset, batch=11)
    alone = together(feeds(settings), 2)
    assert len(alone) == 4 and all(len(targets) == 11 for _, targets in alone)
    for size in (2, 3, 5):
        assert equal(together(feeds(settings, size), 2), alone)
    assert not equal(together(feeds(settings), 3), alone)


@pytest.mark.parametrize("engine", ENGINES)
def test_fewer_images_than_workers_in_a_batch(engine):
    settings = config(engine=engine, augmentation="strong", batch=3)
    built = feeds(settings, 5)
    batches = [list(feed.train(0)) for feed in built]
    assert {len(found) for found in batches} == {16}
    sizes = [feed._group.shard(3).stop - feed._group.shard(3).start for feed in built]
    assert sum(sizes) == 3 and 0 in sizes
    idle = batches[sizes.index(0)][0]
    assert idle.images.shape == (0, 12, 12) and idle.targets.shape == (0,)
    assert idle.mix is not None
    assert idle.mix.apply(idle.images.unsqueeze(1).float()).shape == (0, 1, 12, 12)
    assert equal(together(built, 0), together(feeds(settings), 0))


@pytest.mark.parametrize("engine", ENGINES)
def test_images_are_changed_by_their_index_in_the_split(engine):
    settings = config(engine=engine, augmentation="standard", seed=4)
    train = small.split(50)
    (feed,) = feeds(settings, train=train)
    library = AlbumentationsAugmenter(
        settings.transforms, seed=4, fill=round(0.3 * 255), image_size=12
    )
    device = DeviceAugmenter(settings.transforms, seed=4, fill=round(0.3 * 255))
    samples = np.arange(50)
    if engine == "device":
        changed = device(torch.from_numpy(train.images), samples, 3).numpy()
    else:
        changed = library(train.images, samples, 3)
    possible = {image.tobytes(): label for image, label in zip(changed, train.labels)}
    assert len(possible) == 50
    for batch in feed.train(3):
        found = [possible[image.tobytes()] for image in batch.images.numpy()]
        assert found == batch.targets.tolist()


def test_the_library_works_ahead_with_the_same_result(monkeypatch):
    settings = config(engine="albumentations", augmentation="strong", batch=11)
    (feed,) = feeds(settings)
    ahead = [(b.images, b.targets, b.mix.box) for b in feed.train(1)]
    monkeypatch.setattr(feed, "_ahead", lambda gather: map(gather, range(feed.steps_per_epoch)))
    assert equal([(b.images, b.targets, b.mix.box) for b in feed.train(1)], ahead)


def test_what_fails_while_working_ahead_is_raised(monkeypatch):
    (feed,) = feeds(config(engine="albumentations", augmentation="standard"))
    library = feed._augmentation.on_cpu
    calls = []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise ValueError("broken image")
        return library(*arguments)

    monkeypatch.setattr(feed._augmentation, "on_cpu", failing)
    batches = feed.train(0)
    assert isinstance(next(batches), Batch) and isinstance(next(batches), Batch)
    with pytest.raises(ValueError, match="broken image"):
        next(batches)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_epoch_may_be_left_early_and_begun_again(engine):
    (feed,) = feeds(config(engine=engine, augmentation="standard"))
    first = next(feed.train(0))
    batches = feed.train(0)
    next(batches)
    batches.close()
    assert torch.equal(next(feed.train(0)).images, first.images)


@pytest.mark.parametrize("engine", ENGINES)
def test_fewer_images_than_a_batch_are_no_step(engine):
    (feed,) = feeds(config(engine=engine, augmentation="strong"), train=6)
    assert feed.steps_per_epoch == 0 and list(feed.train(0)) == []


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("preset", ["none", "standard", "strong"])
def test_read_only_images_are_used_where_they_lie(engine, preset):
    """Ray's shared memory gives arrays like these."""
    settings = config(engine=engine, augmentation=preset)
    writable = together(feeds(settings), 0)
    train, validation = small.split(50), small.split(21, seed=1)
    before = train.images.copy(), validation.images.copy()
    for part in (train, validation):
        part.images.setflags(write=False)
        part.labels.setflags(write=False)
    (feed,) = feeds(settings, train=train, validation=validation)
    assert equal(together([feed], 0), writable)
    assert feed._pixels.data_ptr() == train.images.__array_interface__["data"][0]
    assert feed.histogram(histogram).sum() == train.images.size
    assert sum(len(targets) for _, targets in feed.validation()) == 21
    assert np.array_equal(train.images, before[0])
    assert np.array_equal(validation.images, before[1])


def test_batches_may_be_changed_without_changing_the_split():
    train = small.split(50)
    before = train.images.copy(), train.labels.copy()
    (feed,) = feeds(config(), train=train)
    for batch in feed.train(0):
        batch.images.zero_()
        batch.targets.zero_()
    assert np.array_equal(train.images, before[0]) and np.array_equal(train.labels, before[1])
    assert {image.tobytes() for b in feed.train(0) for image in b.images.numpy()} <= {
        image.tobytes() for image in before[0]
    }


@pytest.mark.parametrize("count", [3, 21, 700])
def test_the_parts_of_the_validation_split_cover_it_once_and_in_order(count):
    validation = small.split(count, seed=1)
    for size in (1, 2, 5):
        found = [
            pair
            for feed in feeds(config(), size, validation=validation)
            for pair in feed.validation()
        ]
        assert all(0 < len(targets) <= loading.EVALUATION_BATCH_SIZE for _, targets in found)
        images, targets = (torch.cat(column).numpy() for column in zip(*found))
        assert np.array_equal(images, validation.images)
        assert np.array_equal(targets, validation.labels)


@pytest.mark.parametrize("count", [8, 50, 600])
def test_the_histograms_of_the_parts_add_up_to_that_of_the_split(count):
    train = small.split(count)
    expected = np.bincount(train.images.ravel(), minlength=256)
    for size in (1, 2, 5, 9):
        parts = [feed.histogram(histogram) for feed in feeds(config(), size, train=train)]
        assert all(part.dtype == np.int64 for part in parts)
        assert np.array_equal(sum(parts), expected)


def test_classes_are_counted_over_the_whole_split_on_every_worker():
    train = small.split(50)
    train.labels[train.labels == 2] = 0  # a class without images
    for feed in feeds(config(), 3, train=train):
        assert feed.class_counts.tolist() == [33, 17, 0]


def test_rectangles_are_drawn_for_the_size_that_the_network_sees():
    settings = config(cutmix=1.0, model={"input_size": 24})
    (feed,) = feeds(settings)
    boxes = torch.cat([batch.mix.box for batch in feed.train(0)])
    assert 12 < boxes.max() <= 24
    (feed,) = feeds(config(cutmix=1.0))
    assert torch.cat([batch.mix.box for batch in feed.train(0)]).max() <= 12


def test_erased_pixels_get_the_mean_of_the_train_split():
    assert [albumentations_engine.fill_of(mean) for mean in (0.0, 0.3, 0.5077, 1.0)] == [
        0,
        76,
        129,
        255,
    ]
    (feed,) = feeds(config(erasing=1.0))
    assert all((batch.images == 76).any() for batch in feed.train(0))
