"""The statistics of designed sweeps, against hand-worked numbers and independent computations."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fer_ray.sweeps import analysis
from fer_ray.sweeps.analysis import Analysis, analyse


def scores(table: np.ndarray) -> pd.DataFrame:
    """One row a cell that is not NaN, of shape (arms, seeds)."""
    rows = [
        {"arm": f"arm {arm}", "seed": seed + 7, "score": table[arm, seed]}
        for arm, seed in np.ndindex(table.shape)
        if not np.isnan(table[arm, seed])
    ]
    frame = pd.DataFrame(rows, columns=["arm", "seed", "score"])
    return frame.sample(frac=1, random_state=0)  # the order of the rows says nothing


def analysed(table: np.ndarray) -> Analysis:
    return analyse(scores(table), [f"arm {number}" for number in range(len(table))])


def test_a_comparison_worked_by_hand():
    found = analysed(np.array([[0.50, 0.52, 0.54], [0.51, 0.54, 0.57]]))
    (one,) = found.comparisons
    # differences 0.01, 0.02, 0.03: mean 0.02, deviation 0.01; t(2, 97.5 %) = 4.3027
    assert one.difference == pytest.approx(0.02)
    assert one.standard_error == pytest.approx(0.01 / math.sqrt(3))
    assert (one.low, one.high) == pytest.approx((0.02 - 0.024841, 0.02 + 0.024841), abs=1e-6)
    assert one.p_value == pytest.approx(0.0742, abs=1e-4)  # t = 3.4641
    assert one.p_holm == one.p_value and not one.shown
    assert one.smallest_shown == pytest.approx(0.024841, abs=1e-6)
    assert (found.df, one.num_pairs) == (2, 3)
    assert found.noise == pytest.approx(0.01 / math.sqrt(2))
    mean = found.arms[1]
    assert (mean.mean, mean.deviation) == pytest.approx((0.54, 0.03))
    assert (mean.low, mean.high) == pytest.approx((0.54 - 0.074524, 0.54 + 0.074524), abs=1e-6)


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), seeds=st.integers(2, 6), effect=st.floats(-0.1, 0.1))
def test_two_arms_are_the_paired_t_test(seed, seeds, effect):
    table = np.random.default_rng(seed).normal(0.5, 0.05, (2, seeds))
    table[1] += effect
    (one,) = analysed(table).comparisons
    expected = stats.ttest_rel(table[1], table[0])
    interval = expected.confidence_interval(0.95)
    assert one.p_value == pytest.approx(expected.pvalue)
    assert one.paired_p_value == pytest.approx(expected.pvalue)
    assert (one.low, one.high) == pytest.approx((interval.low, interval.high))


def by_least_squares(table: np.ndarray) -> tuple[int, list[tuple[float, float]]]:
    """Degrees of freedom, and difference and standard error of each arm, from dummy variables."""
    arms, seeds = np.nonzero(~np.isnan(table))
    y = table[arms, seeds]
    x = np.concatenate([np.eye(len(table))[arms], np.eye(table.shape[1])[seeds]], axis=1)
    effects, _, rank, _ = np.linalg.lstsq(x, y, rcond=None)
    df = len(y) - rank
    variance = float(((y - x @ effects) ** 2).sum()) / df if df else math.nan
    found = []
    for arm in range(1, len(table)):
        contrast = np.zeros(x.shape[1])
        contrast[[arm, 0]] = 1, -1
        if np.linalg.matrix_rank(np.vstack([x, contrast])) > rank:
            found.append((math.nan, math.nan))
        else:
            spread = contrast @ np.linalg.pinv(x.T @ x) @ contrast
            found.append((float(contrast @ effects), math.sqrt(variance * spread)))
    return int(df), found


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    arms=st.integers(2, 6),
    seeds=st.integers(1, 5),
    missing=st.floats(0, 0.7),
)
def test_missing_trials_are_handled_as_least_squares_does(seed, arms, seeds, missing):
    random = np.random.default_rng(seed)
    table = random.normal(0.5, 0.02, (arms, seeds)) + random.normal(0, 0.05, seeds)
    table[random.random((arms, seeds)) < missing] = np.nan
    found = analysed(table)
    if np.isnan(table).all():
        assert all(math.isnan(one.difference) for one in found.comparisons)
        return
    df, expected = by_least_squares(table)
    assert found.df == df
    for one, (difference, error) in zip(found.comparisons, expected):
        assert one.difference == pytest.approx(difference, nan_ok=True, abs=1e-9)
        assert one.standard_error == pytest.approx(error, nan_ok=True, abs=1e-9)
        assert one.num_seeds == (~np.isnan(table[int(one.arm[4:])])).sum()


def test_the_noise_is_pooled_over_arms():
    table = np.random.default_rng(0).normal(0.5, 0.02, (8, 3)) + np.array([0.0, 0.1, -0.1])
    found = analysed(table)
    rest = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
    assert found.df == 7 * 2
    assert found.noise == pytest.approx(math.sqrt((rest**2).sum() / 14))
    for number, one in enumerate(found.comparisons, start=1):
        assert one.difference == pytest.approx((table[number] - table[0]).mean())
        assert one.standard_error == pytest.approx(found.noise * math.sqrt(2 / 3))
        assert one.paired_p_value == pytest.approx(stats.ttest_rel(table[number], table[0]).pvalue)


def test_p_values_are_corrected_for_all_comparisons():
    table = np.random.default_rng(3).normal(0.5, 0.01, (4, 5))
    found = analysed(table).comparisons
    ordered = sorted(found, key=lambda one: one.p_value)
    steps = [min(one.p_value * factor, 1.0) for one, factor in zip(ordered, (3, 2, 1))]
    expected = np.maximum.accumulate(steps)
    assert [one.p_holm for one in ordered] == pytest.approx(list(expected))
    assert [one.shown for one in ordered] == [p < 0.05 for p in expected]


def test_without_an_effect_something_is_shown_in_at_most_one_of_twenty_sweeps():
    random = np.random.default_rng(11)
    sweeps, arms, seeds = 1000, 8, 3
    hits = 0
    for _ in range(sweeps):
        table = random.normal(0.5, 0.005, (arms, seeds)) + random.normal(0, 0.02, seeds)
        hits += any(one.shown for one in analysed(table).comparisons)
    rate, error = hits / sweeps, math.sqrt(0.05 * 0.95 / sweeps)
    assert rate < 0.05 + 3 * error
    assert rate > 0.02  # else it would be too careful to show anything


def test_the_detectable_difference_is_found_in_four_of_five_sweeps():
    random = np.random.default_rng(12)
    sweeps, arms, seeds, noise = 1000, 8, 3, 0.005
    effect = analysis.detectable(noise * math.sqrt(2 / seeds), (arms - 1) * (seeds - 1), arms - 1)
    hits = 0
    for _ in range(sweeps):
        table = random.normal(0.5, noise, (arms, seeds)) + random.normal(0, 0.02, seeds)
        table[1] += effect
        hits += analysed(table).comparisons[0].p_value < analysis.LEVEL / (arms - 1)
    assert hits / sweeps == pytest.approx(0.8, abs=3 * math.sqrt(0.16 / sweeps))


@given(df=st.integers(1, 60), comparisons=st.integers(1, 30), error=st.floats(1e-4, 0.1))
@settings(deadline=None, max_examples=30)
def test_the_smallest_shown_difference_has_the_p_value_of_the_first_step(df, comparisons, error):
    smallest = analysis.smallest_shown(error, df, comparisons)
    p_value = 2 * stats.t.sf(smallest / error, df)
    assert p_value * comparisons == pytest.approx(analysis.LEVEL)
    assert analysis.detectable(error, df, comparisons) > smallest


def test_with_one_seed_nothing_is_tested():
    found = analysed(np.array([[0.5], [0.6], [0.7]]))
    assert found.df == 0 and math.isnan(found.noise)
    assert [one.difference for one in found.comparisons] == pytest.approx([0.1, 0.2])
    for one in found.comparisons:
        assert math.isnan(one.p_holm) and math.isnan(one.low) and not one.shown
        assert math.isnan(one.smallest_shown) and math.isnan(one.detectable)
    assert all(math.isnan(mean.low) for mean in found.arms)


def test_without_any_noise_nothing_is_tested():
    found = analysed(np.array([[0.5, 0.5, 0.5], [0.6, 0.6, 0.6]]))
    (one,) = found.comparisons
    assert one.difference == pytest.approx(0.1)
    assert math.isnan(one.p_holm) and math.isnan(one.paired_p_value) and not one.shown


def test_arms_without_trials_or_without_a_link_to_the_baseline_are_not_compared():
    nan = math.nan
    table = np.array(
        [[0.5, 0.52, nan, nan], [nan, nan, nan, nan], [nan, nan, 0.6, 0.7], [0.6, 0.61, nan, nan]]
    )
    empty, apart, linked = analysed(table).comparisons
    assert empty.num_seeds == 0 and math.isnan(empty.difference)
    assert apart.num_seeds == 2 and math.isnan(apart.difference)
    assert linked.difference == pytest.approx(0.095)
    assert linked.p_holm == linked.p_value  # the only comparison


def test_seeds_in_common_with_a_third_arm_link_two():
    nan = math.nan
    table = np.array([[0.50, nan, nan], [nan, 0.60, 0.62], [0.54, 0.56, 0.60]])
    one, _ = analysed(table).comparisons
    # 0.04 from the baseline to the third arm, and on average 0.03 from there
    assert one.difference == pytest.approx(0.07)
    assert one.num_pairs == 0


@pytest.mark.parametrize(
    "row",
    [
        {"arm": "a", "seed": 0, "score": 0.5},
        {"arm": "c", "seed": 0, "score": 0.5},
        {"arm": "a", "seed": 1, "score": math.nan},
    ],
)
def test_what_is_no_table_of_scores_is_refused(row):
    frame = pd.DataFrame([{"arm": "a", "seed": 0, "score": 0.5}, row])
    with pytest.raises(ValueError, match=r"two trials|unknown arm|not finite"):
        analyse(frame, ["a", "b"])
