import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fer_ray.transforms import keyed_random

MASK = 2**64 - 1
PUBLISHED = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]
"""The first outputs of SplitMix64 from 1234567, as Rosetta Code and others list them."""

keys = st.integers(0, MASK)


def splitmix64(state: int, count: int) -> list[int]:
    """As Vigna publishes it (https://prng.di.unimi.it/splitmix64.c), in whole numbers."""
    outputs = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        outputs.append(z ^ (z >> 31))
    return outputs


def bits(starts: list[int] | np.ndarray, count: int) -> np.ndarray:
    """The upper 53 bits of what `uniforms` draws: all that its numbers hold."""
    scaled = keyed_random.uniforms(np.asarray(starts, np.uint64), count) * 2.0**53
    assert (scaled == np.floor(scaled)).all()
    return scaled.astype(np.uint64)


def as_torch(starts: np.ndarray | list[int]) -> torch.Tensor:
    return torch.from_numpy(np.asarray(starts, np.uint64).view(np.int64))


def test_the_reference_is_the_published_generator():
    assert splitmix64(1234567, 5) == PUBLISHED


@settings(max_examples=50, deadline=None)
@given(st.lists(keys, min_size=1, max_size=4), st.integers(1, 8))
def test_uniforms_are_splitmix64_for_any_start(starts, count):
    expected = [[output >> 11 for output in splitmix64(start, count)] for start in starts]
    assert bits(starts, count).tolist() == expected


def test_uniforms_from_the_published_start():
    assert bits([1234567], 5)[0].tolist() == [output >> 11 for output in PUBLISHED]


@settings(max_examples=50, deadline=None)
@given(st.lists(keys, min_size=1, max_size=4), st.integers(1, 8))
def test_normals_are_made_of_the_same_64_bits(starts, half):
    """Box and Muller's transform of the two halves, by the same generator in whole numbers."""
    result = keyed_random.normals(as_torch(starts), 2 * half).double().numpy()
    assert result.shape == (len(starts), 2 * half)
    outputs = np.array([splitmix64(start, half) for start in starts], np.uint64)
    first = ((outputs >> np.uint64(40)) + np.uint64(1)) / 2**24
    angle = (outputs & np.uint64(0xFFFFFF)) / 2**24 * 2 * np.pi
    radius = np.sqrt(-2 * np.log(first))
    expected = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    np.testing.assert_allclose(result, expected, atol=4e-6)


def inverse(output: int) -> int:
    """The start from which SplitMix64 gives this output first."""

    def unshift(z: int, by: int) -> int:
        found = z
        for _ in range(64 // by + 1):
            found = z ^ (found >> by)
        return found

    z = unshift(output, 31) * pow(0x94D049BB133111EB, -1, 2**64) & MASK
    z = unshift(z, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) & MASK
    return (unshift(z, 30) - 0x9E3779B97F4A7C15) & MASK


@pytest.mark.parametrize("output", [0, 1, MASK, MASK >> 1, 1 << 63, 0xFFFFFF, MASK ^ 0xFFFFFF])
def test_the_ends_of_the_range_are_in_bounds(output):
    start = inverse(output)
    assert splitmix64(start, 1) == [output]
    assert 0 <= keyed_random.uniforms(np.array([start], np.uint64), 1)[0, 0] < 1
    pair = keyed_random.normals(as_torch([start]), 2)
    assert torch.isfinite(pair).all() and pair.abs().max() < 5.8  # sqrt(2 * 24 * log 2)


def test_uniforms_are_even_and_independent():
    numbers = keyed_random.uniforms(keyed_random.streams(0, 0, np.arange(3000)), 20)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 0.01
    for column in numbers.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    # with the next image's and the one after's as further columns
    apart = np.concatenate([np.roll(numbers, -shift, axis=0) for shift in range(3)], axis=1)
    assert abs(np.corrcoef(apart.T) - np.eye(60)).max() < 0.08
    pairs, *_ = np.histogram2d(numbers[:, 0], numbers[:, 1], bins=8, range=[[0, 1], [0, 1]])
    assert stats.chisquare(pairs.ravel()).pvalue > 0.01


def test_normals_are_normal_and_independent():
    numbers = keyed_random.normals(
        as_torch(keyed_random.streams(0, 0, np.arange(200))), 2000
    ).numpy()
    assert numbers.dtype == np.float32 and np.isfinite(numbers).all()
    assert stats.kstest(numbers.ravel(), "norm").pvalue > 0.01
    assert 4.3 < abs(numbers).max() < 5.8
    assert abs(np.corrcoef(numbers[:40]) - np.eye(40)).max() < 0.12  # image by image
    sines, cosines = numbers[:, 1000:], numbers[:, :1000]
    for one, other in ((cosines, sines), (numbers[:, 1:], numbers[:, :-1])):
        for power in (1, 2):  # not even their sizes go together
            assert abs(np.corrcoef(one.ravel() ** power, other.ravel() ** power)[0, 1]) < 0.01


def test_a_stream_does_not_depend_on_its_batch():
    starts = keyed_random.streams(3, 1, np.arange(50))
    whole, noise = keyed_random.uniforms(starts, 30), keyed_random.normals(as_torch(starts), 250)
    for part in (slice(0, 1), slice(7, 9), slice(20, 50)):
        samples = np.arange(50)[part]
        assert np.array_equal(keyed_random.streams(3, 1, samples), starts[part])
        assert np.array_equal(keyed_random.uniforms(starts[part], 12), whole[part, :12])
        assert torch.equal(keyed_random.normals(as_torch(starts[part]), 250), noise[part])
    assert keyed_random.streams(0, 0, np.arange(0)).shape == (0,)
    assert keyed_random.uniforms(starts[:0], 5).shape == (0, 5)
    assert keyed_random.normals(as_torch(starts[:0]), 4).shape == (0, 4)


@pytest.mark.filterwarnings("error")
def test_samples_may_be_of_any_integer_type():
    expected = keyed_random.streams(2**31 - 1, 7, np.arange(9))
    assert expected.dtype == np.uint64
    for kind in (np.int32, np.int64, np.uint8, np.uint64):
        assert np.array_equal(
            keyed_random.streams(2**31 - 1, 7, np.arange(9, dtype=kind)), expected
        )


def test_no_two_keys_share_a_stream():
    samples = np.arange(60)
    starts = [
        keyed_random.streams(seed, epoch, samples, purpose)
        for seed, epoch, purpose in itertools.product(range(30), range(30), range(3))
    ]
    assert len(np.unique(np.concatenate(starts))) == 30 * 30 * 3 * 60


def test_no_stream_is_a_later_part_of_another():
    """Streams walk through the same numbers in steps of one constant: they must start far apart."""
    starts = np.concatenate([keyed_random.streams(seed, 0, np.arange(3000)) for seed in range(3)])
    inverse_of_step = pow(0x9E3779B97F4A7C15, -1, 2**64)
    with np.errstate(over="ignore"):
        positions = np.sort(starts * np.uint64(inverse_of_step))
    assert np.diff(positions).min() > 2**20


@pytest.mark.parametrize("bit", [0, 1, 5, 20])
@pytest.mark.parametrize("part", ["seed", "epoch", "sample", "purpose"])
def test_one_bit_of_the_key_changes_half_of_the_start(part, bit):
    def starts(**changed: int) -> np.ndarray:
        key = {"seed": 0, "epoch": 0, "purpose": 0, "sample": 0} | changed
        samples = np.arange(500) ^ key["sample"]
        return keyed_random.streams(key["seed"], key["epoch"], samples, key["purpose"])

    differing = starts() ^ starts(**{part: 1 << bit})
    flipped = np.unpackbits(differing.view(np.uint8).reshape(-1, 8), axis=1)
    assert flipped.mean() == pytest.approx(0.5, abs=0.02)
    assert abs(flipped.mean(0) - 0.5).max() < 0.12  # every bit of the start


@pytest.mark.parametrize("part", ["seed", "epoch", "sample", "purpose"])
def test_neighbouring_keys_draw_independent_numbers(part):
    numbers = []
    for step in range(4):
        key = {"seed": 5, "epoch": 5, "purpose": 0, "sample": 0}
        key[part] += step
        samples = np.arange(3000) + key["sample"]
        starts = keyed_random.streams(key["seed"], key["epoch"], samples, key["purpose"])
        numbers.append(keyed_random.uniforms(starts, 3))
    rows = np.concatenate(numbers, axis=1).T
    assert abs(np.corrcoef(rows) - np.eye(len(rows))).max() < 0.08


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_normals_on_a_gpu_are_those_on_the_cpu_but_for_rounding():
    starts = as_torch(keyed_random.streams(0, 0, np.arange(50)))
    there = keyed_random.normals(starts.cuda(), 500).cpu()
    torch.testing.assert_close(there, keyed_random.normals(starts, 500), rtol=0, atol=1e-5)
