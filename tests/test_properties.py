"""Properties that every metric must have whatever the data: identities, symmetry, invariance, one-sidedness."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compdiff import fairness, metrics, significance, stats

seeds = st.integers(0, 10_000)
few = settings(max_examples=25)


def features(seed, n=30, d=6, shift=0.0):
    return np.random.default_rng(seed).normal(size=(n, d)) + shift


def labelled(seed, n=50, levels=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n)
    y[:2] = 0, 1
    score = rng.normal(size=n) + y
    return y, (np.round(score * levels) / levels if levels else score)


# --- distances of image sets ------------------------------------------------------------------------------------------
@few
@given(seed=seeds, n=st.integers(3, 40), d=st.integers(1, 20))
def test_fid_of_a_set_with_itself_is_zero_and_kid_is_not_positive(seed, n, d):
    x = features(seed, n, d)
    assert metrics.fid(x, x) == pytest.approx(0, abs=1e-9 * d)
    assert metrics.kid(x, x) <= 1e-12  # the diagonal, left out of the within terms, stays in the cross term


@few
@given(seed=seeds, shift=st.floats(-2, 2))
def test_distances_are_symmetric_and_do_not_see_the_order_of_images(seed, shift):
    a, b = features(seed), features(seed + 1, n=20, shift=shift)
    order = np.random.default_rng(seed).permutation(len(a))
    for distance in (metrics.fid, metrics.kid):
        assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-9, abs=1e-9)
        assert distance(a[order], b[::-1]) == pytest.approx(distance(a, b), rel=1e-9, abs=1e-9)


@few
@given(seed=seeds, shift=st.floats(0.1, 3))
def test_fid_does_not_see_a_rotation_and_grows_by_the_square_of_a_shift(seed, shift):
    a, b = features(seed), features(seed + 1)
    turn = np.linalg.qr(features(seed + 2, n=6))[0]
    assert metrics.fid(a @ turn, b @ turn) == pytest.approx(metrics.fid(a, b), rel=1e-7, abs=1e-9)
    assert metrics.fid(a, a + shift) == pytest.approx(6 * shift**2, rel=1e-7)


def test_kid_of_small_samples_is_unbiased_where_fid_is_not():
    rng = np.random.default_rng(0)
    for n in (5, 20):
        draws = [(rng.normal(size=(n, 4)), rng.normal(size=(n, 4))) for _ in range(1500)]
        kid = np.array([metrics.kid(a, b) for a, b in draws])
        assert abs(kid.mean()) < 4 * kid.std(ddof=1) / np.sqrt(len(kid))
        fid = np.array([metrics.fid(a, b) for a, b in draws[:200]])
        assert fid.mean() > 20 * fid.std(ddof=1) / np.sqrt(len(fid))  # nothing but sample size


# --- AUROC and AUPRC --------------------------------------------------------------------------------------------------
@few
@given(seed=seeds, levels=st.sampled_from([0, 1, 4]))
def test_auroc_of_the_opposite_score_is_the_rest_to_one(seed, levels):
    y, score = labelled(seed, levels=levels)
    value = stats.auroc(y, score)[0]
    assert stats.auroc(y, 1 - score)[0] == pytest.approx(1 - value)
    assert stats.auroc(1 - y, score)[0] == pytest.approx(1 - value)
    assert 0 <= value <= 1


@few
@given(seed=seeds, levels=st.sampled_from([0, 1, 4]))
def test_ranks_are_all_that_auroc_auprc_and_delong_see(seed, levels):
    y, score = labelled(seed, levels=levels)
    for function in (stats.auroc, stats.auprc):
        for monotone in (np.exp, np.arctan, lambda s: 3 * s - 7):
            assert function(y, monotone(score))[0] == pytest.approx(function(y, score)[0], abs=1e-12)
    if min(y.sum(), (1 - y).sum()) > 1:
        np.testing.assert_allclose(significance.delong(y, np.exp(score))[1], significance.delong(y, score)[1])


@few
@given(seed=seeds)
def test_every_row_twice_changes_nothing(seed):
    y, score = labelled(seed, levels=3)
    for function in (stats.auroc, stats.auprc):
        twice = function(np.r_[y, y], np.r_[score, score])[0]
        assert twice == pytest.approx(function(y, score)[0])
        assert function(y, score, np.full((1, len(y)), 2))[0] == pytest.approx(twice)


# --- bootstrap --------------------------------------------------------------------------------------------------------
@few
@given(seed=seeds, n=st.integers(8, 40))
def test_bootstrap_depends_on_the_set_of_patients_and_not_on_the_order_of_rows(seed, n):
    rng = np.random.default_rng(seed)
    y, score = labelled(seed, n)
    patients, order = rng.integers(0, max(3, n // 2), n).astype(str), rng.permutation(n)
    masks = {"all": np.ones(n, bool), "some": rng.random(n) < 0.6}
    here = stats.bootstrap("AUROC", y[:, None], score[:, None], masks, stats.resample_patients(patients, 12, seed))
    there = stats.bootstrap("AUROC", y[order, None], score[order, None], {k: m[order] for k, m in masks.items()},
                            stats.resample_patients(patients[order], 12, seed))  # fmt: skip
    for a, b in zip(here, there, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


@few
@given(seed=seeds, n=st.integers(2, 30))
def test_every_resample_draws_as_many_patients_as_there_are(seed, n):
    drawn = stats.resample_patients(np.random.default_rng(seed).integers(0, n, 2 * n), 9, seed)
    assert set(drawn.draws.sum(1)) == {drawn.draws.shape[1]}


# --- equity -----------------------------------------------------------------------------------------------------------
values = st.lists(st.floats(0, 1), min_size=1, max_size=8)


@given(overall=st.floats(0, 1), groups=values, alpha=st.floats(0, 5), combine=st.sampled_from(["mean", "sum"]))
def test_es_metrics_never_reward_a_gap_and_do_not_see_the_order_of_groups(overall, groups, alpha, combine):
    value = fairness.es_metric(overall, groups, alpha, combine)
    assert 0 <= value <= overall and fairness.es_fid(overall, groups, combine) >= overall
    assert fairness.es_metric(overall, groups[::-1], alpha, combine) == pytest.approx(value)
    if combine == "sum":
        assert fairness.es_metric(overall, [*groups, 0.5], alpha) <= value + 1e-12  # one group more never helps


@given(groups=values, shift=st.floats(-0.4, 0.4))
def test_gaps_do_not_see_a_common_shift(groups, shift):
    here, there = fairness.gaps(0.5, groups), fairness.gaps(0.5, [g + shift for g in groups])
    assert there == pytest.approx(here, abs=1e-9)
    assert 0 <= here["p90-p10"] <= here["max-min"] + 1e-12


# --- families of tests ------------------------------------------------------------------------------------------------
@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_monotone_and_between_the_raw_p_and_bonferronis(p):
    p = np.array(p)
    found = significance.holm(p)
    assert (found >= p).all() and (found <= np.minimum(len(p) * p, 1) + 1e-12).all()
    assert (np.diff(found[np.argsort(p, kind="stable")]) >= 0).all()
    np.testing.assert_array_equal(significance.holm(p[::-1]), found[::-1])


@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=8), alpha=st.floats(0.01, 0.3))
def test_holm_rejects_what_stepping_down_rejects(p, alpha):
    p, rejected = np.array(p), 0
    for rank, value in enumerate(np.sort(p)):  # smallest first, until one is not below alpha / (those left)
        if (len(p) - rank) * value > alpha:
            break
        rejected += 1
    assert (significance.holm(p) <= alpha).sum() == rejected
