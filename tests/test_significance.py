"""DeLong by hand, against all pairs and on the published example; the permutation test, Holm and seeds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from sklearn.metrics import average_precision_score, roc_auc_score

from compdiff import significance, stats


# --- DeLong -----------------------------------------------------------------------------------------------------------
def test_delong_by_hand():
    # Positives 3 and 5, negatives 1, 3 and 4. Below 3: 1 and half of the tie = 1.5 of 3; below 5: all. AUROC 0.75.
    # Above the negatives: 1, (0.5 + 1) / 2 and 1/2 of the positives. Variances: of (0.5, 1) 1/8, of (1, 0.75, 0.5) 1/16.
    # Var = 1/8 / 2 + 1/16 / 3 = 1/12.
    auc, cov = significance.delong(np.array([1, 1, 0, 0, 0]), np.array([3, 5, 1, 3, 4]))
    assert auc == pytest.approx([0.75]) and cov == pytest.approx(np.array([[1 / 12]]))
    half = 1.959964 / np.sqrt(12)
    linear = significance.delong_interval(np.array([1, 1, 0, 0, 0]), np.array([3, 5, 1, 3, 4]), scale="linear")
    assert (linear.lo, linear.hi) == pytest.approx((0.75 - half, 0.75 + half), abs=1e-6)
    logit = significance.delong_interval(np.array([1, 1, 0, 0, 0]), np.array([3, 5, 1, 3, 4]))
    bound = np.log(3) + half / (0.75 * 0.25)  # logit(0.75) = log 3, its derivative 1 / (0.75 * 0.25)
    assert logit.hi == pytest.approx(1 / (1 + np.exp(-bound)), abs=1e-6) and 0 < logit.lo < logit.hi < 1


def all_pairs(y, score, patients):
    """AUROC and its variance from the [m, n] table of wins, one patient's rows summed (Obuchowski 1997)."""
    pos, neg = score[y == 1], score[y == 0]
    wins = np.array([[(p > q) + 0.5 * (p == q) for q in neg] for p in pos])
    m, n, auc = len(pos), len(neg), wins.mean()
    who_pos, who_neg, names = patients[y == 1], patients[y == 0], np.unique(patients)
    a = np.array([(wins.mean(1)[who_pos == g] - auc).sum() for g in names])
    b = np.array([(wins.mean(0)[who_neg == g] - auc).sum() for g in names])
    k10, k01, k = len(np.unique(who_pos)), len(np.unique(who_neg)), len(names)
    return auc, (a @ a * k10 / (k10 - 1) / m**2 + b @ b * k01 / (k01 - 1) / n**2 + 2 * a @ b * k / (k - 1) / (m * n))


@settings(max_examples=50)
@given(seed=st.integers(0, 10_000), levels=st.integers(2, 20), images=st.integers(1, 3))
def test_midranks_give_what_all_pairs_give(seed, levels, images):
    rng = np.random.default_rng(seed)
    patients = rng.permutation(np.repeat(np.arange(14), images))
    y, score = rng.integers(0, 2, len(patients)), rng.integers(0, levels, len(patients))
    y[[np.flatnonzero(patients == p)[0] for p in range(4)]] = 0, 0, 1, 1
    auc, cov = significance.delong(y, score, patients)
    expected = all_pairs(y, score, patients)
    assert (auc[0], cov[0, 0]) == pytest.approx(expected, abs=1e-12)
    assert auc[0] == pytest.approx(roc_auc_score(y, score))


# Albumin, total protein, K-G score and outcome (0/1) of 43 ovarian cancer patients: the complete records of DeLong,
# DeLong and Clarke-Pearson, Biometrics 44 (1988), and the areas and errors that the manual of PROC LOGISTIC prints.
OVARIAN = np.array("""
3.0 5.8 10 0 3.2 6.3 5 1 3.9 6.8 3 1 2.8 4.8 6 0 3.2 5.8 3 1 0.9 4.0 5 0 2.5 5.7 8 0 1.6 5.6 5 1 3.8 5.7 5 1 3.7 6.7 6 1
3.2 5.4 4 1 3.8 6.6 6 1 4.1 6.6 5 1 3.6 5.7 5 1 4.3 7.0 4 1 3.6 6.7 4 0 2.3 4.4 6 1 4.2 7.6 4 0 4.0 6.6 6 0 3.5 5.8 6 1
3.8 6.8 7 1 3.0 4.7 8 0 4.5 7.4 5 1 3.7 7.4 5 1 3.1 6.6 6 1 4.1 8.2 6 1 4.3 7.0 5 1 4.3 6.5 4 1 3.2 5.1 5 1 2.6 4.7 6 1
3.3 6.8 6 0 1.7 4.0 7 0 3.7 6.1 5 1 3.3 6.3 7 1 4.2 7.7 6 1 3.5 6.2 5 1 2.9 5.7 9 0 2.1 4.8 7 1 2.8 6.2 8 0 4.0 7.0 7 1
3.3 5.7 6 1 3.7 6.9 5 1 3.6 6.6 5 1""".split(), dtype=float).reshape(-1, 4).T  # fmt: skip


def test_delong_on_the_published_example():
    albumin, protein, kg, y = OVARIAN
    auc, cov = significance.delong(y, np.stack([albumin, 10 - kg, protein], axis=1))
    assert auc == pytest.approx([0.7366, 0.7258, 0.6478], abs=5e-5)
    assert np.sqrt(np.diag(cov)) == pytest.approx([0.0927, 0.1028, 0.1000], abs=5e-5)
    for other, value, error in ((albumin, 0.0108, 0.0953), (protein, -0.0780, 0.1046)):
        found = significance.delong_test(y, other, 10 - kg)
        half = (found.interval.hi - found.interval.lo) / 2
        assert (found.interval.value, half / 1.959964) == pytest.approx((value, error), abs=5e-5)
        assert found.p == pytest.approx(2 * scipy_stats.norm.cdf(-abs(value / error)), abs=1e-3)


def test_delong_of_equal_and_of_separating_models():
    y, score = np.repeat([0, 1], 10), np.arange(20.0)
    assert significance.delong_test(y, score, 2 * score).p == 1
    perfect = significance.delong_interval(y, score)
    assert perfect.value == 1 and np.isnan(perfect.lo) and np.isnan(perfect.hi)
    with pytest.raises(ValueError, match="two patients"):
        significance.delong(np.array([0, 0, 1]), np.arange(3.0))
    with pytest.raises(ValueError, match="two patients"):
        significance.delong(y, score, np.arange(20) // 10)
    with pytest.raises(ValueError, match="NaN"):
        significance.delong(y, np.where(score == 3, np.nan, score))


def test_images_of_one_patient_count_less_than_those_of_many():
    rng = np.random.default_rng(0)
    y, score = np.repeat(rng.integers(0, 2, 60), 4), np.repeat(rng.normal(size=60), 4)
    single = significance.delong(y[::4], score[::4])[1][0, 0]
    assert significance.delong(y, score, np.arange(240) // 4)[1][0, 0] == pytest.approx(single)
    assert significance.delong(y, score)[1][0, 0] < single / 3.5


# --- permutation ------------------------------------------------------------------------------------------------------
def test_permutation_is_a_plain_loop_over_swapped_patients():
    rng = np.random.default_rng(1)
    patients = np.repeat(np.arange(12), 2)
    y = rng.integers(0, 2, 24)
    a, b = y + rng.normal(size=24), 5 * rng.normal(size=24)
    difference, p = significance.permutation_test(y, a, b, patients, 99, seed=3)
    assert difference == pytest.approx(average_precision_score(y, a) - average_precision_score(y, b), abs=1e-6)
    swap = np.random.default_rng(3).integers(0, 2, (100, 12), dtype=np.int8)[1:]
    ra, rb, extreme = scipy_stats.rankdata(a), scipy_stats.rankdata(b), 0
    for row in swap[:, patients] == 1:
        left, right = np.where(row, rb, ra), np.where(row, ra, rb)
        extreme += abs(average_precision_score(y, left) - average_precision_score(y, right)) >= abs(difference) - 1e-9
    assert p == (1 + extreme) / 100


def test_permutation_finds_a_difference_and_none_where_there_is_none():
    rng = np.random.default_rng(2)
    y = rng.integers(0, 2, 200)
    good, poor, patients = y + 0.5 * rng.normal(size=200), y + 3 * rng.normal(size=200), np.arange(200)
    assert significance.permutation_test(y, good, poor, patients, 199, 0)[1] == 1 / 200
    assert significance.permutation_test(y, good, 2 * good + 1, patients, 199, 0) == (0.0, 1.0)
    assert significance.permutation_test(y, good, poor, patients, 199, 0, stats.auroc)[0] == pytest.approx(
        roc_auc_score(y, good) - roc_auc_score(y, poor), abs=1e-6
    )
    with pytest.raises(ValueError, match="one class"):
        significance.permutation_test(np.zeros(200), good, poor, patients, 9, 0)


def test_permutation_p_values_are_uniform_when_models_are_exchangeable():
    rng = np.random.default_rng(4)
    p = []
    for seed in range(200):
        y, shared = rng.integers(0, 2, 40), rng.normal(size=40)
        a, b = (y + shared + rng.normal(size=40) for _ in range(2))
        p.append(significance.permutation_test(y, a, np.exp(b), np.arange(40) // 2, 99, seed)[1])
    assert scipy_stats.kstest(p, "uniform").pvalue > 0.01
    assert 0.01 <= np.mean(np.array(p) <= 0.05) <= 0.1


# --- families and seeds -----------------------------------------------------------------------------------------------
def test_holm_by_hand_and_in_the_order_given():
    # sorted 0.01, 0.02, 0.03, 0.4: times 4, 3, 2, 1 = 0.04, 0.06, 0.06, 0.4
    assert significance.holm([0.03, 0.01, 0.4, 0.02]) == pytest.approx([0.06, 0.04, 0.4, 0.06])
    assert significance.holm([0.6, 0.7]).tolist() == [1.0, 1.0]
    assert significance.holm([]).size == 0
    for wrong in ([0.1, np.nan], [1.2], [-0.1]):
        with pytest.raises(ValueError):
            significance.holm(wrong)


def test_seeds_interval_is_scipys_t_interval():
    values = np.array([0.71, 0.74, 0.69])
    found = stats.seeds_interval([*values, np.nan])
    expected = scipy_stats.t.interval(0.95, 2, values.mean(), scipy_stats.sem(values))
    assert (found.value, found.lo, found.hi) == pytest.approx((values.mean(), *expected))
    alone = stats.seeds_interval([0.7])
    assert alone.value == 0.7 and np.isnan(alone.lo) and np.isnan(alone.hi)
