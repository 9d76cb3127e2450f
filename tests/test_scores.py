"""Rates, thresholds, calibration and several classes against scikit-learn, torchmetrics and plain loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from torchmetrics.functional.classification import binary_calibration_error

from compdiff import scores, stats


def sample(seed, n=80, levels=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n)
    y[:2] = 0, 1
    p = np.clip(0.5 + 0.2 * (y - 0.5) + 0.2 * rng.normal(size=n), 0, 1)
    return y, (np.round(p * levels) / levels if levels else p), rng.integers(0, 4, (3, n)) + (np.arange(n) < 2)


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), levels=st.sampled_from([0, 3, 10]))
def test_f1_threshold_is_the_best_of_all_cuts_and_the_lowest_of_equals(seed, levels):
    y, p, _ = sample(seed, 30, levels)
    tried = {t: sk.f1_score(y, p >= t) for t in np.unique(p)}
    best = scores.f1_threshold(y, p)
    assert tried[best] == pytest.approx(max(tried.values()))
    assert best == min(t for t, f1 in tried.items() if f1 >= max(tried.values()) - 1e-12)


def test_f1_threshold_needs_a_positive():
    with pytest.raises(ValueError, match="no positive"):
        scores.f1_threshold(np.zeros(4), np.arange(4) / 4)


def test_f1_threshold_of_a_tie_by_hand():
    # p 0.9: F1 = 2/3 (1 hit, 1 call); 0.5: 1/2; 0.3: 2/5; 0.1: 4/6 = 2/3 (2 hits, 4 calls). Equal: the lowest.
    assert scores.f1_threshold(np.array([1, 0, 0, 1]), np.array([0.9, 0.5, 0.3, 0.1])) == 0.1


def test_weighted_rates_are_scikit_learns():
    y, p, counts = sample(0)
    called = (p >= 0.5).astype(int)
    found = scores.confusion(y, called, counts)
    for r, w in enumerate(counts):
        expected = {
            "accuracy": sk.accuracy_score(y, called, sample_weight=w),
            "balanced_accuracy": sk.balanced_accuracy_score(y, called, sample_weight=w),
            "sensitivity": sk.recall_score(y, called, sample_weight=w),
            "specificity": sk.recall_score(y, called, pos_label=0, sample_weight=w),
            "fpr": 1 - sk.recall_score(y, called, pos_label=0, sample_weight=w),
            "fnr": 1 - sk.recall_score(y, called, sample_weight=w),
            "precision": sk.precision_score(y, called, sample_weight=w),
            "f1": sk.f1_score(y, called, sample_weight=w),
            "selection_rate": np.average(called, weights=w),
        }
        assert {name: getattr(found, name)[r] for name in expected} == pytest.approx(expected)


def test_rates_over_nobody_are_nan_and_wrong_decisions_raise():
    none = scores.confusion(np.zeros(3), np.array([0, 1, 0]))
    assert np.isnan(none.sensitivity[0]) and np.isnan(none.balanced_accuracy[0]) and none.fpr[0] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="threshold"):
        scores.confusion(np.array([0, 1]), np.array([0.2, 0.7]))


def test_ece_is_torchmetrics_and_the_sum_over_the_diagram():
    y, p, _ = sample(1, 400)
    p = np.clip(p, 0.001, 0.999)  # torchmetrics gives p = 1 a bin of its own
    expected = binary_calibration_error(torch.tensor(p), torch.tensor(y), n_bins=15, norm="l1").item()
    assert scores.ece(y, p, bins=15)[0] == pytest.approx(expected, abs=1e-6)
    for kind in ("width", "mass"):
        points = scores.reliability(y, p, 15, kind)
        gap = np.abs(points.predicted - points.observed)
        assert scores.ece(y, p, 15, kind)[0] == pytest.approx((points.n * gap).sum() / 400)


def test_reliability_points_are_scikit_learns():
    from sklearn.calibration import calibration_curve

    y, p, _ = sample(2, 300)
    for kind, strategy in (("width", "uniform"), ("mass", "quantile")):
        observed, predicted = calibration_curve(y, p, n_bins=8, strategy=strategy)
        points = scores.reliability(y, p, 8, kind)
        np.testing.assert_allclose(points.observed, observed)
        np.testing.assert_allclose(points.predicted, predicted)
    assert set(scores.reliability(y, p, 10, "mass").n) == {30}


def test_weighted_ece_and_brier_are_those_of_repeated_rows():
    y, p, counts = sample(3)
    ece, brier = scores.ece(y, p, counts=counts), scores.brier(y, p, counts)
    for r, w in enumerate(counts):
        rows = np.repeat(np.arange(len(y)), w)
        assert ece[r] == pytest.approx(scores.ece(y[rows], p[rows])[0])  # bins of equal width do not move
        assert brier[r] == pytest.approx(sk.brier_score_loss(y[rows], p[rows]))


def test_calibration_bins():
    assert scores.calibration_bins(np.array([0, 0.1, 0.25, 0.5, 1]), 4).tolist() == [0, 0, 1, 2, 3]
    assert scores.calibration_bins(np.array([0.1, 0.1, 0.1, 0.9]), 2, "mass").tolist() == [1, 1, 1, 1]  # ties together
    with pytest.raises(ValueError, match="probabilities"):
        scores.ece(np.array([0, 1]), np.array([-1.0, 2.0]))
    with pytest.raises(ValueError, match="width or mass"):
        scores.calibration_bins(np.array([0.5]), 4, "size")


def classes(seed=4, n=120, c=3):
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % c)
    logits = 1.2 * np.eye(c)[y] + rng.normal(size=(n, c))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return y, p, rng.integers(0, 4, (2, n)) + 1


def test_several_classes_are_scikit_learns():
    y, p, counts = classes()
    called = p.argmax(1)
    macro, recall, balanced = (
        scores.macro_auroc(y, p, counts), scores.recalls(y, called, 3, counts), scores.macro_recall(y, called, 3, counts),
    )  # fmt: skip
    for r, w in enumerate(counts):
        rows = np.repeat(np.arange(len(y)), w)
        assert macro[r] == pytest.approx(sk.roc_auc_score(y[rows], p[rows], multi_class="ovr"))
        assert recall[r] == pytest.approx(sk.recall_score(y, called, average=None, sample_weight=w))
        assert balanced[r] == pytest.approx(sk.balanced_accuracy_score(y, called, sample_weight=w))


def test_two_classes_are_the_binary_case_and_an_absent_class_is_nan():
    y, p, _ = sample(5)
    both = np.stack([1 - p, p], axis=1)
    assert scores.macro_auroc(y, both)[0] == pytest.approx(stats.auroc(y, p)[0])
    called = (p >= 0.5).astype(int)
    assert scores.macro_recall(y, called, 2)[0] == pytest.approx(scores.confusion(y, called).balanced_accuracy[0])
    assert np.isnan(scores.macro_recall(y, called, 3)[0])
    with pytest.raises(ValueError, match="class indices"):
        scores.one_vs_rest(np.array([0, 3]), 3)
