import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fer_ray.config import AUGMENTATIONS, NORMALIZATIONS
from fer_ray.errors import UserError
from fer_ray.transforms import Augmenter, Normalizer, resize

images = hnp.arrays(np.uint8, st.tuples(st.integers(1, 4), st.just(6), st.just(6)))


def normalizer(name: str) -> Normalizer:
    return Normalizer(normalization=name, mean=0.5, std=0.25)


@given(images, st.sampled_from(NORMALIZATIONS))
def test_normalization_is_finite_and_keeps_to_its_range(batch, name):
    result = normalizer(name)(torch.from_numpy(batch))
    assert result.shape == (len(batch), 1, 6, 6) and result.dtype == torch.float32
    assert torch.isfinite(result).all()
    low, high = (-2.0, 2.0) if name == "dataset" else (0.0, 1.0)
    assert result.min() >= low and result.max() <= high


@given(images)
def test_minmax_touches_both_ends_and_gives_zeros_for_a_constant_image(batch):
    result = normalizer("minmax")(torch.from_numpy(batch))
    for image, pixels in zip(result, batch):
        assert image.min() == 0
        assert image.max() == (0 if pixels.min() == pixels.max() else 1)


def test_normalizations_by_hand():
    batch = torch.tensor([[[51, 102], [153, 204]]], dtype=torch.uint8)
    expected = {
        "none": [0.2, 0.4, 0.6, 0.8],
        "minmax": [0, 1 / 3, 2 / 3, 1],
        "dataset": [-1.2, -0.4, 0.4, 1.2],
    }
    for name, values in expected.items():
        torch.testing.assert_close(normalizer(name)(batch).flatten(), torch.tensor(values))


def test_normalization_goes_image_by_image():
    batch = torch.randint(0, 256, (5, 8, 8), dtype=torch.uint8)
    for name in NORMALIZATIONS:
        alone = torch.cat([normalizer(name)(batch[i : i + 1]) for i in range(5)])
        assert torch.equal(normalizer(name)(batch), alone)


def test_a_constant_data_set_does_not_divide_by_zero():
    constant = Normalizer(normalization="dataset", mean=0.0, std=0.0)
    assert torch.isfinite(constant(torch.zeros(1, 4, 4, dtype=torch.uint8))).all()


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'minmax'"):
        normalizer("min-max")
    with pytest.raises(UserError, match="did you mean 'standard'"):
        Augmenter("standart", seed=0, fill=0)


def face(count: int = 32) -> np.ndarray:
    ramp = np.linspace(40, 200, 48).astype(np.uint8)
    return np.repeat(np.add.outer(ramp // 2, ramp // 2)[None], count, axis=0)


@pytest.mark.parametrize("preset", AUGMENTATIONS)
def test_augmentation_is_keyed_by_seed_epoch_and_sample(preset):
    batch, samples = face(8), np.arange(8)
    result = Augmenter(preset, seed=1, fill=128)(batch, samples, 2)
    assert result.shape == batch.shape and result.dtype == np.uint8
    order = np.array([5, 0, 7])
    again = Augmenter(preset, seed=1, fill=128)(batch[order], samples[order], 2)
    assert np.array_equal(again, result[order])
    if preset == "none":
        assert np.array_equal(result, batch)
        return
    assert not np.array_equal(Augmenter(preset, seed=2, fill=128)(batch, samples, 2), result)
    assert not np.array_equal(Augmenter(preset, seed=1, fill=128)(batch, samples, 3), result)
    assert len({image.tobytes() for image in result}) == len(result)


def test_augmentation_leaves_its_input_alone():
    batch = face(4)
    before = batch.copy()
    Augmenter("standard", seed=0, fill=128)(batch, range(4), 0)
    assert np.array_equal(batch, before)


def test_choices_of_one_image_are_independent_of_each_other():
    """Seeding albumentations by `set_random_seed` makes flips and erasing one and the same."""
    count = 400
    batch = np.zeros((count, 48, 48), np.uint8)
    batch[:, :, 24:] = 200  # the right half is bright: a flip shows
    result = Augmenter("standard", seed=0, fill=77)(batch, range(count), 0)
    flipped = result[:, :, :12].mean(axis=(1, 2)) > result[:, :, -12:].mean(axis=(1, 2))
    erased = (result == 77).sum(axis=(1, 2)) > 16
    for share in (flipped.mean(), erased.mean()):
        assert 0.4 < share < 0.6
    assert abs((flipped & erased).mean() - flipped.mean() * erased.mean()) < 0.06


@pytest.mark.parametrize(("preset", "least", "most"), [("standard", 6, 10), ("notebook", 25, 36)])
def test_rotation_reaches_its_range_and_not_further(preset, least, most):
    """The angle of a bar, measured from its second moments."""
    bar = np.zeros((200, 48, 48), np.uint8)
    bar[:, 22:26, 8:40] = 255
    result = Augmenter(preset, seed=0, fill=0)(bar, range(200), 0)
    angles = []
    for image in result:
        y, x = np.nonzero(image > 127)
        y, x = y - y.mean(), x - x.mean()
        angles.append(abs(np.degrees(0.5 * np.arctan2(2 * (x * y).mean(), (x**2 - y**2).mean()))))
    # erased corners of the bar tilt what is left of it: take the bulk
    assert least < np.quantile(angles, 0.95) < most + 2


def test_resize_shrinks_without_aliasing_and_leaves_the_right_size_alone():
    batch = torch.rand(2, 1, 8, 8)
    assert resize(batch, 8) is batch and resize(batch, 0) is batch
    stripes = torch.tensor([0.0, 1.0]).repeat(8).expand(1, 1, 16, 16)
    assert (resize(stripes, 4) - 0.5).abs().max() < 0.1
    assert resize(batch, 20).shape == (2, 1, 20, 20)
