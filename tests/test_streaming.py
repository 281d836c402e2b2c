import dataclasses
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import rewriting
import small
from hypothesis import given
from hypothesis import strategies as st

from fer_ray.config.schema import TrainConfig
from fer_ray.data.dataset import load_split, read_info
from fer_ray.data.row_groups import RowGroupSlice, row_group_slices, take_rows
from fer_ray.errors import UserError
from fer_ray.preparation.plan import plan_preparation
from fer_ray.preparation.run import prepare
from fer_ray.training import stream_feed
from fer_ray.training.feed import albumentations_augmenter
from fer_ray.training.process_group import ProcessGroup
from fer_ray.training.stream_feed import StreamFeed


@pytest.fixture(scope="module")
def data(tmp_path_factory, ray_cluster):
    """A prepared data set of 700 synthetic faces with row groups of 64."""
    folder = tmp_path_factory.mktemp("data") / "faces"
    plan = plan_preparation(source="synthetic", output=str(folder), num_images=1000)
    prepare(plan, log=lambda line: None)
    info = read_info(str(folder))
    # the groups that prepare writes are larger than this split
    for part in info.splits.values():
        for file in part.files:
            table = pq.read_table(folder / file, partitioning=None)
            pq.write_table(table, folder / file, row_group_size=64)
    rewriting.describe_again(folder)
    return read_info(str(folder))


def settings(**sections) -> TrainConfig:
    base = {"schedule": {"global_batch_size": 32, "shuffle_buffer": 256}}
    merged = {name: {**base.get(name, {}), **value} for name, value in sections.items()}
    return small.config(**{**base, **merged})


def feed(config: TrainConfig, data, rank: int = 0, size: int = 1) -> StreamFeed:
    found = {name: row_group_slices(data, name) for name in ("train", "validation")}
    return StreamFeed(config, data, found, group=ProcessGroup(rank=rank, size=size), spare_cpus=1.0)


def seen(batches) -> np.ndarray:
    return np.concatenate([batch.images.numpy() for batch in batches])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_a_cut_holds_just_the_rows_asked_for(lengths, draw):
    found, first = [], 0
    for number, rows in enumerate(lengths):
        found.append(RowGroupSlice(file="f", row_group=number, begin=0, end=rows, first=first))
        first += rows
    begin = draw.draw(st.integers(0, first))
    end = draw.draw(st.integers(begin, first))
    rows = [
        piece.first + row
        for piece in take_rows(found, begin, end)
        for row in range(piece.begin, piece.end)
    ]
    assert rows == list(range(begin, end))


def test_slices_are_the_row_groups_in_order(data):
    found = row_group_slices(data, "train")
    assert [piece.first for piece in found] == list(
        np.cumsum([0] + [piece.end for piece in found[:-1]])
    )
    assert sum(piece.end for piece in found) == data.split("train").rows
    assert len(found) > 5


def test_an_epoch_has_every_image_at_most_once_and_mixed_classes(data):
    config = settings(transforms={"augmentation": "none"})
    batches = list(feed(config, data).train(0))
    whole = load_split(data, "train")
    steps = len(whole.labels) // 32
    assert len(batches) == steps and all(len(batch.targets) == 32 for batch in batches)
    index = {image.tobytes(): label for image, label in zip(whole.images, whole.labels)}
    images = seen(batches)
    assert len({image.tobytes() for image in images}) == steps * 32
    targets = np.concatenate([batch.targets.numpy() for batch in batches])
    assert [index[image.tobytes()] for image in images] == targets.tolist()
    # prepared class after class: without the buffer, a batch would have one or two classes
    assert min(len(np.unique(batch.targets)) for batch in batches) >= 4


def test_an_epoch_repeats_and_another_differs(data):
    config = settings()
    first, again, other = (seen(feed(config, data).train(epoch)) for epoch in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_workers_share_an_epoch_without_overlap(data):
    config = settings(transforms={"augmentation": "none"}, schedule={"global_batch_size": 33})
    parts = [list(feed(config, data, rank, 2).train(0)) for rank in (0, 1)]
    assert [len(part[0].targets) for part in parts] == [11, 22]  # groups of batch norm have 11
    assert len(parts[0]) == len(parts[1])
    images = np.concatenate([seen(part) for part in parts])
    assert len({image.tobytes() for image in images}) == len(images)


@pytest.mark.parametrize("engine", ["albumentations", "device"])
def test_images_change_by_their_place_in_the_split(data, engine):
    """As in memory: the same key, the same change."""
    config = settings(transforms={"engine": engine})
    stream = feed(config, data)
    whole = load_split(data, "train")
    samples = np.arange(len(whole.labels))
    if engine == "albumentations":
        expected = albumentations_augmenter(config, data.pixel_mean, data.image_size)(
            whole.images, samples, 3
        )
    else:
        import torch

        augmentation = stream._augmentation
        expected = augmentation.finish(torch.from_numpy(whole.images), samples, 3).numpy()
    allowed = {image.tobytes() for image in expected}
    images = seen(stream.train(3))
    assert all(image.tobytes() in allowed for image in images)


def test_validation_is_whole_in_order_and_unchanged(data):
    config = settings()
    whole = load_split(data, "validation")
    parts = []
    for rank in (0, 1, 2):
        parts += list(feed(config, data, rank, 3).validation())
    assert np.array_equal(np.concatenate([images.numpy() for images, _ in parts]), whole.images)
    assert np.concatenate([t.numpy() for _, t in parts]).tolist() == whole.labels.tolist()


def test_a_histogram_counts_every_pixel(data):
    from fer_ray.transforms.normalization import histogram

    counts = sum(feed(settings(), data, rank, 2).histogram(histogram) for rank in (0, 1))
    expected = np.bincount(load_split(data, "train").images.ravel(), minlength=256)
    assert counts.tolist() == expected.tolist()


def test_files_with_other_rows_than_promised_are_refused(data, tmp_path):
    import shutil

    shutil.copytree(data.path, tmp_path / "copy")
    info = read_info(str(tmp_path / "copy"))
    part = tmp_path / "copy" / info.split("train").files[0]
    pq.write_table(pq.read_table(part, partitioning=None).slice(1), part)
    with pytest.raises(UserError, match=rf"{part} is damaged: it has .* bytes instead of"):
        row_group_slices(info, "train")


def test_it_mixes_within_a_workers_part(data):
    config = settings(transforms={"augmentation": "strong"})
    batch = next(iter(feed(config, data, 1, 2).train(0)))
    assert batch.mix is not None and len(batch.mix.partner) == len(batch.images) == 16


def test_columns_are_flat_bytes(data):
    """Ray's own tensor columns would be copied once more."""
    reader = stream_feed._Reader(data, settings(), None)
    import pyarrow as pa

    row = dataclasses.asdict(row_group_slices(data, "train")[0])
    table = reader(pa.Table.from_pylist([row]))
    assert table.schema.field("image").type == pa.binary(data.image_size**2)


def test_it_reads_no_further_ahead_than_it_may(data, tmp_path, monkeypatch):
    """Memory is bounded by the blocks on their way, not by the size of the split."""

    class Counted(stream_feed._Reader):
        def __call__(self, batch):
            (tmp_path / str(batch["first"][0])).touch()
            return super().__call__(batch)

    monkeypatch.setattr(stream_feed, "_Reader", Counted)
    monkeypatch.setattr(stream_feed, "_BYTES_AHEAD", 1)
    monkeypatch.setattr(stream_feed, "_LEAST_BLOCKS_AHEAD", 2)
    config = settings(schedule={"global_batch_size": 8, "shuffle_buffer": 16})
    batches = feed(config, data).train(0)
    next(batches)
    time.sleep(2)
    whole = len(row_group_slices(data, "train"))
    assert len(list(tmp_path.iterdir())) < whole - 3
    assert len(list(batches)) == data.split("train").rows // 8 - 1
    assert len(list(tmp_path.iterdir())) == whole
