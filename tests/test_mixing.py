from dataclasses import replace

import numpy as np
import pytest
import small
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fer_ray.config.transforms import TransformConfig
from fer_ray.training.feed import Batch
from fer_ray.training.optimization import summed_loss
from fer_ray.training.process_group import ProcessGroup
from fer_ray.transforms.mixing import Mix, MixPlan, draw_mix

CPU = torch.device("cpu")
magnitudes = st.one_of(st.just(0.0), st.floats(0, 10), st.sampled_from([1e-300, 1e-6, 10.0]))


def plan(count: int, *, mixup=0.0, cutmix=0.0, key=(0, 0, 0), size: int = 12) -> MixPlan:
    config = TransformConfig(augmentation="none", mixup=mixup, cutmix=cutmix)
    found = draw_mix(config, key, count, size)
    assert found is not None
    return found


def areas(found: MixPlan) -> np.ndarray:
    left, top, right, bottom = found.box.T
    return (right - left) * (bottom - top)


def test_without_strengths_nothing_is_mixed():
    assert draw_mix(TransformConfig(augmentation="standard"), (0, 0, 0), 8, 12) is None


@settings(max_examples=100, deadline=None)
@given(magnitudes, magnitudes, st.integers(0, 20), st.integers(1, 60), st.integers(0, 2**31 - 1))
def test_shares_and_boxes_are_in_bounds(mixup, cutmix, count, size, seed):
    if mixup == cutmix == 0:
        return
    found = plan(count, mixup=mixup, cutmix=cutmix, key=(seed, 1, 2), size=size)
    assert sorted(found.partner) == list(range(count))
    for share in (found.own_fraction, found.blend):
        assert np.isfinite(share).all() and (share >= 0).all() and (share <= 1).all()
    left, top, right, bottom = found.box.T
    assert (found.box >= 0).all() and (found.box <= size).all()
    assert (left <= right).all() and (top <= bottom).all()
    # an image is blended or has a rectangle, never both, and its target's share is that of pixels
    cut = areas(found) > 0
    assert (found.blend[cut] == 1).all()
    assert np.array_equal(
        found.own_fraction, np.where(cut, 1 - areas(found) / size**2, found.blend)
    )
    if mixup == 0:
        assert (found.blend == 1).all()
    if cutmix == 0:
        assert not found.box.any()


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixup_draws_its_share_from_a_beta_distribution(alpha):
    found = plan(4000, mixup=alpha)
    assert stats.kstest(found.own_fraction, stats.beta(alpha, alpha).cdf).pvalue > 0.01
    assert stats.kstest(found.own_fraction, stats.beta(alpha * 1.5, alpha * 1.5).cdf).pvalue < 0.01
    assert abs(np.corrcoef(found.own_fraction, found.partner)[0, 1]) < 0.06


def published_box(size: int, share: float, random: np.random.RandomState) -> list[int]:
    """`rand_bbox` of the authors of cutmix: https://github.com/clovaai/CutMix-PyTorch."""
    side = int(size * np.sqrt(1.0 - share))
    x, y = random.randint(size), random.randint(size)
    corners = [x - side // 2, y - side // 2, x + side // 2, y + side // 2]
    return np.clip(corners, 0, size).tolist()


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_cutmix_draws_its_rectangles_as_published(alpha):
    """But for one pixel: the authors' rectangles have even sides."""
    count, size = 3000, 48
    found = plan(count, cutmix=alpha, size=size)
    random = np.random.RandomState(0)
    shares = random.beta(alpha, alpha, count)
    expected = np.array([published_box(size, share, random) for share in shares])
    for column in range(4):
        one, other = found.box[:, column], expected[:, column]
        if column > 1:  # the odd sides' pixel
            one = np.where((one - found.box[:, column - 2]) % 2, one - 1, one)
            other = np.where((other - expected[:, column - 2]) % 2, other - 1, other)
        assert stats.ks_2samp(one, other, method="asymp").statistic < 0.05
    cut = 1 - areas(found) / size**2
    assert np.array_equal(found.own_fraction, cut)
    width, height = expected[:, 2] - expected[:, 0], expected[:, 3] - expected[:, 1]
    assert cut.mean() == pytest.approx(1 - (width * height).mean() / size**2, abs=0.03)


def test_with_both_it_is_half_of_each():
    found = plan(4000, mixup=1.0, cutmix=1.0)
    blended, cut = found.blend < 1, areas(found) > 0
    assert blended.mean() == pytest.approx(0.5, abs=0.03)
    assert cut.mean() == pytest.approx(0.5, abs=0.03)
    assert not (blended & cut).any()
    assert stats.kstest(found.own_fraction[blended], "uniform").pvalue > 0.01


def test_the_key_decides_and_the_order_of_the_images_is_drawn_from_another():
    """numpy takes (seed, epoch), the order's key, for (seed, epoch, 0, 0)."""
    keys = [(seed, epoch, step) for seed in range(3) for epoch in range(4) for step in range(3)]
    drawn = {plan(40, mixup=0.5, key=key).partner.tobytes() for key in keys}
    assert len(drawn) == len(keys)
    assert plan(40, mixup=0.5, key=keys[5]).partner.tobytes() in drawn
    orders = {
        np.random.default_rng((seed, epoch)).permutation(40).tobytes()
        for seed in range(3)
        for epoch in range(4)
    }
    assert not drawn & orders


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.data())
def test_a_worker_gets_its_images_and_the_partners_that_it_lacks(count, data):
    begin = data.draw(st.integers(0, count))
    own = slice(begin, data.draw(st.integers(begin, count)))
    found = plan(count, mixup=0.5, cutmix=0.5, key=(data.draw(st.integers(0, 99)), 0))
    needed = found.needed(own)
    mine = range(own.start, own.stop)
    assert needed[: len(mine)].tolist() == list(mine)
    assert len(set(needed)) == len(needed)
    assert set(needed) == {*mine, *found.partner[own].tolist()}
    part = found.of(own, CPU)
    assert needed[part.partner.numpy()].tolist() == found.partner[own].tolist()
    assert part.partner.dtype == part.box.dtype == torch.int64
    assert part.blend.shape == (len(mine), 1, 1, 1) and part.box.shape == (len(mine), 4)
    assert np.array_equal(part.own_fraction.numpy(), found.own_fraction[own].astype(np.float32))
    # and mixes them as one worker would mix the whole
    batch = torch.rand(count, 1, 12, 12)
    whole = found.of(slice(0, count), CPU).apply(batch)
    assert torch.equal(part.apply(batch[needed]), whole[own])


@pytest.mark.parametrize("magnitude", [{"mixup": 0.5}, {"cutmix": 1.0}, {"mixup": 1, "cutmix": 1}])
def test_targets_are_mixed_in_the_same_shares_as_pixels(magnitude):
    count = 64
    mix = plan(count, **magnitude).of(slice(0, count), CPU)
    levels = torch.rand(count)
    mixed = mix.apply(levels.view(-1, 1, 1, 1).expand(-1, 3, 12, 12).contiguous())
    expected = mix.own_fraction * levels + (1 - mix.own_fraction) * levels[mix.partner]
    torch.testing.assert_close(mixed.mean((1, 2, 3)), expected)
    assert (mix.own_fraction < 0.9).float().mean() > 0.2


def by_hand() -> Mix:
    """An image that is blended with its neighbour, one with a rectangle from it, and one alone."""
    return Mix(
        partner=torch.tensor([1, 0, 0]),
        blend=torch.tensor([0.25, 1.0, 1.0]).view(-1, 1, 1, 1),
        box=torch.tensor([[0, 0, 0, 0], [1, 0, 3, 1], [0, 0, 0, 0]]),
        own_fraction=torch.tensor([0.25, 7 / 9, 1.0]),
    )


def test_mixing_by_hand():
    batch = torch.arange(4).view(4, 1, 1, 1).expand(4, 2, 3, 3) * 8.0
    before = batch.clone()
    mixed = by_hand().apply(batch)
    assert mixed.shape == (3, 2, 3, 3) and torch.equal(batch, before)
    assert (mixed[0] == 6).all() and torch.equal(mixed[2], batch[2])
    for channel in mixed[1]:
        assert channel.tolist() == [[8, 0, 0], [8, 8, 8], [8, 8, 8]]


def test_what_is_not_mixed_stays_as_it_is_bit_by_bit():
    batch = torch.randn(4, 1, 3, 3) * 10.0 ** torch.arange(-20, 20, 10).view(-1, 1, 1, 1)
    assert torch.equal(by_hand().apply(batch)[2], batch[2])
    assert torch.equal(by_hand().apply(batch)[1, :, 1:], batch[1, :, 1:])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 3.0]])
def test_the_mixed_loss_is_that_of_mixed_targets(smoothing, weights):
    logits, targets = torch.randn(3, 3, dtype=torch.float64), torch.tensor([2, 0, 1, 1])
    mix, scale, total = by_hand(), weights or [1.0, 1.0, 1.0], 0.0
    for k, logs in enumerate(logits.log_softmax(1).tolist()):
        share, partner = mix.own_fraction[k].item(), mix.partner[k]
        for part, target in ((share, targets[k]), (1 - share, targets[partner])):
            for label in range(3):
                wanted = (1 - smoothing) * float(label == target) + smoothing / 3
                total -= part * wanted * scale[label] * logs[label]
    weight = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    mix = replace(mix, own_fraction=mix.own_fraction.double())
    found = summed_loss(logits, targets, label_smoothing=smoothing, weights=weight, mix=mix)
    assert found.item() == pytest.approx(total)


def test_a_loss_mixed_with_the_own_target_is_the_plain_one():
    logits, targets = torch.randn(3, 3), torch.tensor([2, 0, 1])
    alone = replace(by_hand(), own_fraction=torch.ones(3))
    arguments = {"label_smoothing": 0.1, "weights": torch.tensor([1.0, 2.0, 3.0])}
    plain = summed_loss(logits, targets, **arguments)
    torch.testing.assert_close(summed_loss(logits, targets, **arguments, mix=alone), plain)


def mixed(feed_batches: list[list[Batch]]) -> list[tuple[torch.Tensor, ...]]:
    """Every step's images and targets, own and other, from the batches of all workers."""
    steps = []
    for parts in zip(*feed_batches):
        found = []
        for batch in parts:
            assert batch.mix is not None
            images = batch.mix.apply(batch.images.unsqueeze(1).float())
            own = batch.targets[: len(images)]
            found.append((images, own, batch.targets[batch.mix.partner], batch.mix.own_fraction))
        steps.append(tuple(torch.cat(columns) for columns in zip(*found)))
    return steps


@pytest.mark.parametrize("engine", ["device", "albumentations"])
@pytest.mark.parametrize("magnitude", [{"mixup": 0.5}, {"cutmix": 1.0}, {"mixup": 1, "cutmix": 1}])
def test_any_number_of_workers_mixes_the_same_images(engine, magnitude):
    transforms = {"augmentation": "strong", "engine": engine, "mixup": 0, "cutmix": 0, **magnitude}
    config = small.config(transforms=transforms, schedule={"global_batch_size": 11})
    train, validation = small.split(48), small.split(5, seed=1)

    def batches(size: int) -> list[list[Batch]]:
        groups = [ProcessGroup(rank=rank, size=size) for rank in range(size)]
        info = small.info(48)
        feeds = [small.feed(config, train, validation, described=info, group=g) for g in groups]
        return [list(feed.train(1)) for feed in feeds]

    alone = mixed(batches(1))
    assert len(alone) == 4 and all(len(images) == 11 for images, *_ in alone)
    for size in (2, 3, 13):  # the last: some have no image
        for one, other in zip(alone, mixed(batches(size)), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
