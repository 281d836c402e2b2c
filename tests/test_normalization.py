import platform

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fer_ray.config.registries import NORMALIZATIONS
from fer_ray.errors import UserError
from fer_ray.transforms import normalization
from fer_ray.transforms.normalization import Normalizer, clahe, equalize, histogram, moments

sides = st.integers(1, 20)
images = hnp.arrays(np.uint8, st.tuples(st.integers(1, 4), sides, sides))
"""Batches, most of them with few grey levels: that is where Hypothesis likes to go."""

SIZES = [(48, 48), (47, 50), (64, 64), (6, 6), (2, 7), (1, 1)]
ON_X86 = platform.machine() in ("x86_64", "AMD64")


def normalizer(name: str) -> Normalizer:
    return Normalizer(normalization=name, mean=0.5, std=0.25)


def pictures(height: int, width: int) -> np.ndarray:
    """Noise, ramps, narrow ranges, two levels, one dot, constants: (N, height, width) uint8."""
    random = np.random.default_rng(height * 1000 + width)
    shape = (height, width)
    ramp = np.linspace(0, 255, height * width).reshape(shape)
    found = [
        *(random.integers(0, 256, shape) for _ in range(3)),
        *(random.normal(centre, 12, shape) for centre in (30, 128, 225)),
        *(ramp, 255 - ramp, np.sqrt(ramp) * 15, ramp // 64 * 60, 100 + ramp / 16),
        *(random.choice(levels, shape) for levels in ([0, 255], [7, 8], [254, 255])),
        *(np.full(shape, level) for level in (0, 1, 100, 254, 255)),
        *(np.where(np.arange(height * width).reshape(shape) == 0, level, 90) for level in (0, 91)),
    ]
    return np.clip(np.stack(found), 0, 255).astype(np.uint8)


def assert_same_clahe(batch: np.ndarray, clip_limit: float, num_tiles: int) -> None:
    result = clahe(torch.from_numpy(batch), clip_limit=clip_limit, num_tiles=num_tiles).numpy()
    reference = cv2.createCLAHE(clip_limit, (num_tiles, num_tiles))
    expected = np.stack([reference.apply(image) for image in batch])
    if ON_X86:  # elsewhere OpenCV may fuse products and sums
        assert np.array_equal(result, expected)
    assert np.abs(result.astype(int) - expected).max() <= 1


@settings(max_examples=60, deadline=None)
@given(images, st.sampled_from(NORMALIZATIONS.names))
def test_normalization_is_finite_and_keeps_to_its_range(batch, name):
    result = normalizer(name)(torch.from_numpy(batch))
    assert result.shape == (len(batch), 1, *batch.shape[1:]) and result.dtype == torch.float32
    assert torch.isfinite(result).all()
    if name != "standardize":
        low, high = (-2.0, 2.0) if name.endswith("dataset") else (0.0, 1.0)
        assert result.min() >= low and result.max() <= high


@settings(max_examples=60, deadline=None)
@given(images)
def test_minmax_touches_both_ends_and_gives_zeros_for_a_constant_image(batch):
    result = normalizer("minmax")(torch.from_numpy(batch))
    for image, pixels in zip(result, batch):
        assert image.min() == 0
        assert image.max() == (0 if pixels.min() == pixels.max() else 1)


@settings(max_examples=60, deadline=None)
@given(images)
def test_standardize_gives_mean_0_and_deviation_1_and_zeros_for_a_constant_image(batch):
    result = normalizer("standardize")(torch.from_numpy(batch)).squeeze(1).numpy()
    for image, pixels in zip(result, batch):
        if pixels.min() == pixels.max():
            assert not image.any()
        else:
            expected = (pixels - pixels.mean()) / pixels.std()
            np.testing.assert_allclose(image, expected, rtol=1e-6, atol=1e-5)
            assert abs(image.mean(dtype=np.float64)) < 1e-5
            assert abs(image.std(dtype=np.float64) - 1) < 1e-5


@pytest.mark.parametrize(("first", "others"), [(32, 33), (254, 255), (0, 255), (255, 254)])
def test_an_image_of_which_one_pixel_differs_is_standardized_exactly(first, others):
    image = np.full((1, 48, 48), others, dtype=np.uint8)
    for row, column in ((0, 0), (20, 30)):
        changed = image.copy()
        changed[0, row, column] = first
        expected = (changed - changed.mean()) / changed.std()
        found = normalizer("standardize")(torch.from_numpy(changed)).squeeze(1).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("level", [0, 1, 77, 255])
def test_a_large_constant_image_has_exact_statistics_too(level):
    """Its sum of squares is beyond what float32 can hold, and its square beyond float64."""
    image = torch.full((1, 700, 701), level, dtype=torch.uint8)
    assert not normalizer("standardize")(image).any()


def test_normalizations_by_hand():
    batch = torch.tensor([[[51, 102], [153, 204]]], dtype=torch.uint8)
    expected = {
        "none": [0.2, 0.4, 0.6, 0.8],
        "minmax": [0, 1 / 3, 2 / 3, 1],
        "standardize": [-1.3416408, -0.4472136, 0.4472136, 1.3416408],
        "dataset": [-1.2, -0.4, 0.4, 1.2],
        "equalize": [0, 1 / 3, 2 / 3, 1],
        "equalize+dataset": [-2, -2 / 3, 2 / 3, 2],
    }
    for name, values in expected.items():
        torch.testing.assert_close(normalizer(name)(batch).flatten(), torch.tensor(values))


def test_equalize_by_hand():
    """The darkest to 0; of the two above it one is at 20 or below, half of 255 to the even 128."""
    batch = torch.tensor([[[10, 10], [20, 30]], [[9, 9], [9, 9]]], dtype=torch.uint8)
    assert equalize(batch).tolist() == [[[0, 0], [128, 255]], [[9, 9], [9, 9]]]


@pytest.mark.parametrize("size", SIZES)
def test_equalize_is_that_of_opencv(size):
    batch = pictures(*size)
    expected = np.stack([cv2.equalizeHist(image) for image in batch])
    assert np.array_equal(equalize(torch.from_numpy(batch)).numpy(), expected)


@settings(max_examples=60, deadline=None)
@given(images)
def test_equalize_is_that_of_opencv_for_anything(batch):
    expected = np.stack([cv2.equalizeHist(image) for image in batch])
    assert np.array_equal(equalize(torch.from_numpy(batch)).numpy(), expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("clip_limit", "num_tiles"),
    [(normalization.CLIP_LIMIT, normalization.NUM_TILES), (2.0, 4), (40.0, 8), (0.0, 2), (3.3, 1)],
)
def test_clahe_is_that_of_opencv(size, clip_limit, num_tiles):
    assert_same_clahe(pictures(*size), clip_limit, num_tiles)


@settings(max_examples=60, deadline=None)
@given(images, st.sampled_from([0.0, 1.0, 2.0, 7.5, 40.0]), st.integers(1, 6))
def test_clahe_is_that_of_opencv_for_anything(batch, clip_limit, num_tiles):
    assert_same_clahe(batch, clip_limit, num_tiles)


@pytest.mark.parametrize("name", NORMALIZATIONS.names)
@pytest.mark.parametrize("size", [(48, 48), (47, 50)])
def test_normalization_goes_image_by_image_whatever_the_layout(size, name):
    batch = torch.from_numpy(pictures(*size))
    result = normalizer(name)(batch)
    alone = torch.cat([normalizer(name)(image.unsqueeze(0)) for image in batch])
    assert torch.equal(result, alone)
    layouts = {
        "transposed": batch.transpose(1, 2).contiguous().transpose(1, 2),
        "batch last": batch.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        "part of wider rows": torch.cat([batch, batch], dim=2)[:, :, : size[1]],
        "of a channel": torch.stack([batch, 255 - batch], dim=-1)[..., 0],
    }
    for layout, same in layouts.items():
        assert not same.is_contiguous() and torch.equal(same, batch)
        assert torch.equal(normalizer(name)(same), result), layout
    assert torch.equal(normalizer(name)(batch.flip(0)), result.flip(0))
    repeated = batch[:1].expand(3, -1, -1)
    assert torch.equal(normalizer(name)(repeated), result[:1].expand(3, -1, -1, -1))
    assert normalizer(name)(batch[:0]).shape == (0, 1, *size)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("name", NORMALIZATIONS.names)
def test_normalization_leaves_its_input_alone(name):
    batch = pictures(12, 13)
    before = batch.copy()
    batch.setflags(write=False)
    normalizer(name)(torch.from_numpy(batch))
    assert np.array_equal(batch, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", NORMALIZATIONS.names)
@pytest.mark.parametrize("size", SIZES)
def test_normalization_on_a_gpu_is_that_on_the_cpu(size, name):
    batch = torch.from_numpy(pictures(*size))
    chosen = Normalizer(normalization=name, mean=0.5077, std=0.2551)
    assert torch.equal(chosen(batch.cuda()).cpu(), chosen(batch))
    assert torch.equal(histogram(batch.cuda()).cpu(), histogram(batch))


def test_the_pixel_stage_is_what_comes_before_the_scaling():
    batch = torch.from_numpy(pictures(48, 48))
    stages = {"equalize": equalize(batch), "clahe": clahe(batch)}
    for name in NORMALIZATIONS:
        stage = stages.get(name.split("+")[0], batch)
        assert torch.equal(normalizer(name).pixel_stage(batch), stage)
        assert torch.equal(
            Normalizer(normalization=name, mean=0.0, std=1.0).pixel_stage(batch), stage
        )
        assert normalization.needs_statistics(name) == ("+" in name)
        if name in stages:
            assert torch.equal(normalizer(name)(batch), normalizer("none")(stage))
            name = f"{name}+dataset"
            assert torch.equal(normalizer(name)(batch), normalizer("dataset")(stage))


@settings(max_examples=60, deadline=None)
@given(images, st.integers(0, 4))
def test_moments_are_those_of_all_pixels_however_they_are_cut(batch, cut):
    parts = torch.from_numpy(batch[:cut]), torch.from_numpy(batch[cut:])
    counts = histogram(parts[0]) + histogram(parts[1])
    assert counts.dtype == torch.int64
    assert np.array_equal(counts, np.bincount(batch.ravel(), minlength=256))
    mean, std = moments(counts)
    assert mean == pytest.approx((batch / 255).mean(), abs=1e-12)
    assert std == pytest.approx((batch / 255).std(), abs=1e-9)


def test_moments_of_a_constant_are_exact_at_any_size():
    counts = torch.zeros(256, dtype=torch.int64)
    counts[51] = 10**15
    assert moments(counts) == (0.2, 0.0)


@pytest.mark.parametrize("stage", ["equalize", "clahe"])
def test_moments_after_the_stage_give_the_data_set_mean_0_and_deviation_1(stage):
    batch = torch.from_numpy(pictures(48, 48))
    mean, std = moments(
        histogram(Normalizer(normalization=stage, mean=0.0, std=1.0).pixel_stage(batch))
    )
    result = Normalizer(normalization=f"{stage}+dataset", mean=mean, std=std)(batch).double()
    assert abs(result.mean()) < 1e-6 and abs(result.std(correction=0) - 1) < 1e-6


@pytest.mark.parametrize("name", ["dataset", "equalize+dataset", "clahe+dataset"])
def test_a_constant_data_set_does_not_divide_by_zero(name):
    constant = Normalizer(normalization=name, mean=0.0, std=0.0)
    assert torch.isfinite(constant(torch.zeros(1, 4, 4, dtype=torch.uint8))).all()


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'minmax'"):
        normalizer("min-max")
    with pytest.raises(UserError, match=r"did you mean 'clahe\+dataset'"):
        normalizer("clahe-dataset")
