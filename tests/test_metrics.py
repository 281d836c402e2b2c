"""Metrics against hand-worked numbers, and what must hold for any matrix."""

from __future__ import annotations

import dataclasses
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fer_ray import metrics
from fer_ray.evaluation import comparisons

# True a: 5 as a, 1 as b. True b: 2 as a, 3 as b, 1 as c. True c: 0, 0, 4 as c and 4 as a.
WORKED = np.array([[5, 1, 0], [2, 3, 1], [4, 0, 4]])

matrices = st.integers(2, 5).flatmap(
    lambda k: st.lists(
        st.lists(st.integers(0, 30), min_size=k, max_size=k), min_size=k, max_size=k
    ).map(np.array)
)
filled = matrices.filter(lambda matrix: matrix.sum() > 0)
METRICS = ("accuracy", "macro_f1", "balanced_accuracy")


def test_confusion_matrix_counts_true_by_predicted():
    true = np.array([0, 0, 1, 2, 2, 2])
    predicted = np.array([0, 1, 1, 0, 2, 2])
    counted = metrics.confusion_matrix(true, predicted, 4)
    expected = [[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 2, 0], [0, 0, 0, 0]]
    assert counted.tolist() == expected
    assert counted.dtype == np.int64


@pytest.mark.parametrize(
    ("true", "predicted"), [([0, 3], [0, 1]), ([0, 1], [-1, 1]), ([0, 1], [0, 1, 1])]
)
def test_confusion_matrix_refuses_other_shapes_and_indices(true, predicted):
    with pytest.raises(ValueError):
        metrics.confusion_matrix(np.array(true), np.array(predicted), 3)


def test_hand_worked_matrix():
    assert metrics.accuracy(WORKED) == 12 / 20
    # Recalls 5/6, 3/6, 4/8.
    assert metrics.balanced_accuracy(WORKED) == pytest.approx((5 / 6 + 1 / 2 + 1 / 2) / 3)
    each = metrics.per_class(WORKED)
    assert each.precision == pytest.approx([5 / 11, 3 / 4, 4 / 5])
    assert each.recall == pytest.approx([5 / 6, 1 / 2, 1 / 2])
    # F1 = 2 right / (true + predicted): 10/17, 6/10, 8/13.
    assert each.f1 == pytest.approx([10 / 17, 6 / 10, 8 / 13])
    assert each.support.tolist() == [6, 6, 8]
    assert metrics.macro_f1(WORKED) == pytest.approx((10 / 17 + 6 / 10 + 8 / 13) / 3)


def test_absent_and_never_predicted_classes():
    # b has no image but is predicted once, c has one image and is never predicted.
    matrix = np.array([[3, 1, 0], [0, 0, 0], [1, 0, 0]])
    each = metrics.per_class(matrix)
    assert each.precision.tolist() == [3 / 4, 0.0, 0.0]
    assert each.recall[[0, 2]].tolist() == [3 / 4, 0.0] and np.isnan(each.recall[1])
    assert each.f1[[0, 2]].tolist() == [6 / 8, 0.0] and np.isnan(each.f1[1])
    assert metrics.macro_f1(matrix) == 3 / 8
    assert metrics.balanced_accuracy(matrix) == 3 / 8


def test_without_images_everything_is_nan():
    empty = np.zeros((3, 3), np.int64)
    values = [metrics.accuracy(empty), metrics.macro_f1(empty), metrics.balanced_accuracy(empty)]
    values += metrics.bootstrap_interval(empty, "macro_f1")
    values += metrics.bootstrap_mean_interval(np.array([]))
    values += comparisons.paired_difference_interval(0, 0, 0)
    assert all(math.isnan(value) for value in values)


def test_negative_log_likelihood_and_its_clip():
    probabilities = np.array([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], np.float32)
    losses = metrics.negative_log_likelihood(np.array([1, 1, 2]), probabilities)
    assert losses == pytest.approx([math.log(4), 0.0, 7 * math.log(10)])


@given(filled)
def test_metrics_are_fractions_and_1_only_on_the_diagonal(matrix):
    values = [getattr(metrics, name)(matrix) for name in METRICS]
    assert all(0 <= value <= 1 for value in values)
    diagonal = bool((matrix == np.diag(np.diagonal(matrix))).all())
    assert [math.isclose(value, 1.0) for value in values] == [diagonal] * 3


@given(st.lists(st.lists(st.integers(0, 9), min_size=9, max_size=9), min_size=4, max_size=4))
def test_every_metric_of_a_batch_is_that_of_each_matrix(cells):
    batch = np.array(cells).reshape(2, 2, 3, 3)
    for name in metrics.METRICS:
        metric = metrics.METRICS[name]
        values = metric.values(batch)
        assert values.shape == (2, 2)
        each = [[metric.value(matrix) for matrix in row] for row in batch]
        assert np.array_equal(values, each, equal_nan=True)


def test_values_are_written_in_the_metrics_unit():
    accuracy = metrics.METRICS["accuracy"]
    assert (accuracy.heading, accuracy.text(0.6613), accuracy.text(0.6613, 2)) == (
        *("accuracy, %", "66.1", "66.13"),
    )
    assert accuracy.text(math.nan) == "–"
    plain = dataclasses.replace(accuracy, title="kappa", unit="")
    assert (plain.heading, plain.text(-0.6613)) == ("kappa", "-0.661")


@given(filled, st.randoms(use_true_random=False))
def test_the_order_of_classes_does_not_matter(matrix, random):
    order = list(range(len(matrix)))
    random.shuffle(order)
    for name in METRICS:
        metric = getattr(metrics, name)
        assert metric(matrix[np.ix_(order, order)]) == pytest.approx(metric(matrix))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1), st.integers(0, 99))
def test_the_order_of_images_does_not_matter(pairs, seed):
    true, predicted = np.array(pairs).T
    order = np.random.default_rng(seed).permutation(len(pairs))
    first = metrics.confusion_matrix(true, predicted, 4)
    assert (first == metrics.confusion_matrix(true[order], predicted[order], 4)).all()
    assert first.sum() == len(pairs)
    assert (first.sum(axis=1) == np.bincount(true, minlength=4)).all()
    assert (first.sum(axis=0) == np.bincount(predicted, minlength=4)).all()


@settings(max_examples=40)
@given(filled)
def test_intervals_lie_in_range_and_around_the_accuracy(matrix):
    for name in METRICS:
        low, high = metrics.bootstrap_interval(matrix, name, resamples=500)
        assert 0 <= low <= high <= 1
    low, high = metrics.bootstrap_interval(matrix, "accuracy", resamples=500)
    assert low <= metrics.accuracy(matrix) <= high


@settings(max_examples=40)
@given(st.lists(st.floats(0, 16), min_size=1, max_size=40))
def test_interval_of_a_mean_contains_it(values):
    low, high = metrics.bootstrap_mean_interval(np.array(values), resamples=500)
    assert low - 1e-9 <= np.mean(values) <= high + 1e-9


def test_interval_widths_agree_with_theory():
    # 3,600 images, 2,160 correct: the standard error of the accuracy is sqrt(.6 * .4 / 3600).
    matrix = np.array([[1080, 720], [720, 1080]])
    standard_error = math.sqrt(0.6 * 0.4 / 3600)
    for name in METRICS:
        low, high = metrics.bootstrap_interval(matrix, name, resamples=20_000)
        assert (low + high) / 2 == pytest.approx(0.6, abs=0.001)
        assert high - low == pytest.approx(2 * 1.96 * standard_error, rel=0.05)
    correct = np.repeat([1.0, 0.0], [2160, 1440])
    low, high = metrics.bootstrap_mean_interval(correct, resamples=4_000)
    assert high - low == pytest.approx(2 * 1.96 * standard_error, rel=0.06)
    # With discordant fractions b and c, the variance of a paired difference is
    # (b + c - (b - c)^2) / n.
    low, high = comparisons.paired_difference_interval(400, 300, 3600, resamples=20_000)
    spread = math.sqrt((700 / 3600 - (100 / 3600) ** 2) / 3600)
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.05)
    assert (low + high) / 2 == pytest.approx(100 / 3600, abs=0.001)


def test_multinomial_bootstrap_equals_resampling_images():
    true = np.repeat([0, 1, 2], WORKED.sum(axis=1))
    predicted = np.concatenate([np.repeat([0, 1, 2], row) for row in WORKED])
    generator = np.random.default_rng(5)
    resampled = [
        metrics.macro_f1(metrics.confusion_matrix(true[images], predicted[images], 3))
        for images in generator.integers(20, size=(3000, 20))
    ]
    low, high = metrics.bootstrap_interval(WORKED, "macro_f1", resamples=20_000)
    assert [low, high] == pytest.approx(np.percentile(resampled, [2.5, 97.5]).tolist(), abs=0.02)


def test_the_seed_decides_the_interval():
    first = metrics.bootstrap_interval(WORKED, "macro_f1", seed=1)
    assert first == metrics.bootstrap_interval(WORKED, "macro_f1", seed=1)
    assert first != metrics.bootstrap_interval(WORKED, "macro_f1", seed=2)


def test_chunks_do_not_change_the_number_of_resamples(monkeypatch):
    values = np.arange(100.0)
    whole = metrics.bootstrap_mean_interval(values, resamples=1001)
    monkeypatch.setattr(metrics, "_CHUNK", 1_000)
    assert metrics.bootstrap_mean_interval(values, resamples=1001) == whole


def test_mcnemar_by_hand():
    # 1 of 6 discordant: 2 * (1 + 6) / 2**6.
    assert comparisons.mcnemar(1, 5) == pytest.approx(14 / 64)
    assert comparisons.mcnemar(5, 1) == pytest.approx(14 / 64)
    assert comparisons.mcnemar(0, 0) == 1.0
    assert comparisons.mcnemar(7, 7) == 1.0
    # With many, as the chi-squared form with continuity correction: (|150 - 100| - 1)^2 / 250.
    assert comparisons.mcnemar(150, 100) == pytest.approx(
        math.erfc(math.sqrt(49**2 / 250 / 2)), rel=0.1
    )


def test_holm_by_hand():
    assert metrics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert metrics.holm([0.2]) == [0.2]
    assert metrics.holm([0.6, 0.9]) == [1.0, 1.0]
    assert metrics.holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_never_lowers_and_keeps_the_order(p_values):
    adjusted = metrics.holm(p_values)
    assert all(given <= new + 1e-12 for given, new in zip(p_values, adjusted))
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= -1e-12).all()


def test_bootstrap_is_fast_whatever_the_number_of_images():
    start = time.perf_counter()
    metrics.bootstrap_interval(np.full((7, 7), 100_000), "macro_f1")
    assert time.perf_counter() - start < 2
