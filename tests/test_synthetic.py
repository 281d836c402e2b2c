"""Synthetic faces: reproducible, varied, and with recognizable expressions."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from fer_ray.data import synthetic
from fer_ray.data.labels import FER2013_LABELS
from fer_ray.data.sources.synthetic import SyntheticImageSource


def test_an_image_depends_on_seed_and_index_alone():
    first = synthetic.draw(3, 0, 17)
    synthetic.draw(5, 1, 4)
    assert np.array_equal(first, synthetic.draw(3, 0, 17))
    assert not np.array_equal(first, synthetic.draw(3, 1, 17))
    assert not np.array_equal(first, synthetic.draw(3, 0, 18))


@pytest.mark.parametrize("size", [8, 48, 97, 224])
def test_any_size_is_drawn(size):
    image = synthetic.draw(0, 0, 0, size)
    assert image.shape == (size, size)
    assert image.dtype == np.uint8
    assert image.std() > 5


def test_size_changes_the_resolution_and_not_the_face():
    def blocks(size: int) -> np.ndarray:
        return synthetic.draw(6, 0, 3, size).reshape(12, size // 12, 12, size // 12).mean((1, 3))

    assert np.corrcoef(blocks(48).ravel(), blocks(240).ravel())[0, 1] > 0.97


def test_every_label_has_an_expression_of_its_own():
    assert set(synthetic.EXPRESSIONS) == set(FER2013_LABELS)
    assert len(set(synthetic.EXPRESSIONS.values())) == len(FER2013_LABELS)


def test_the_label_changes_the_middle_of_the_face_and_not_the_person():
    """With the same index the pose, hair and light are equal: the background shows it."""
    glad, sorry = (synthetic.draw(label, 0, 5).astype(int) for label in (3, 5))
    changed = np.abs(glad - sorry) > 8
    assert changed[12:44, 8:40].sum() > 40
    assert changed[:4].mean() < 0.05


def test_splits_are_80_10_10_and_balanced():
    entries = list(SyntheticImageSource(seed=0, num_images=2000, size=48).entries())
    assert len({entry.path for entry in entries}) == 2000
    splits = Counter(entry.split for entry in entries)
    assert splits == {"train": 1600, "validation": 200, "test": 200}
    for split in splits:
        counts = Counter(entry.label for entry in entries if entry.split == split)
        assert sorted(counts) == list(FER2013_LABELS)
        assert max(counts.values()) - min(counts.values()) <= 2


def test_a_path_names_its_image():
    source = SyntheticImageSource(seed=4, num_images=50, size=48)
    for entry in source.entries():
        index = int(entry.path.rsplit("/", 1)[1])
        assert entry.path.split("/")[:2] == [entry.split, entry.label]
        expected = synthetic.draw(FER2013_LABELS.index(entry.label), 4, index)
        assert np.array_equal(source.grey(entry.path, entry.at), expected)


@pytest.fixture
def one_thread():
    """Torch on one thread: on a busy machine several wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_small_network_learns_the_expressions_and_a_linear_model_does_not(one_thread):
    torch.manual_seed(0)
    images = np.stack([synthetic.draw(i % 7, 0, i) for i in range(2100)])
    pixels = torch.tensor(images, dtype=torch.float32)[:, None] / 64 - 2
    labels = torch.arange(2100) % 7
    blocks: list[nn.Module] = []
    for before, after in ((1, 16), (16, 24), (24, 32)):
        blocks += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)]
        blocks += [nn.ReLU(), nn.MaxPool2d(2)]
    network = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(32 * 36, 7))
    linear = nn.Sequential(nn.Flatten(), nn.Linear(48 * 48, 7))
    assert _held_out_accuracy(network, pixels, labels) > 0.9
    assert _held_out_accuracy(linear, pixels, labels) < 0.7


def _held_out_accuracy(model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    num_train, num_epochs = 1750, 5
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(num_epochs):
        model.train()
        for rows in torch.randperm(num_train).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(pixels[rows]), labels[rows]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        right = model(pixels[num_train:]).argmax(1) == labels[num_train:]
    return right.float().mean().item()
