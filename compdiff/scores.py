"""Classifiers judged at a threshold, calibration, and several classes: pure functions of labels, scores and counts.

Labels are 0/1 [n] (or class indices [n]), scores p [n], counts [R, n] as in stats.py, so that a bootstrap of any number
here is one call. AUROC and AUPRC, which need no threshold, are in stats.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compdiff import stats
from compdiff.stats import checked

BINS = 10  # calibration bins


# --- at a threshold ---------------------------------------------------------------------------------------------------
def f1_threshold(y: np.ndarray, p: np.ndarray) -> float:
    """The score t among p [n] for which calling p >= t gives the largest F1; of several, the lowest (fewest missed).

    Choose it on validation data and use it on test data. ValueError without a positive: then F1 is 0 everywhere.
    """
    y, p, _ = checked(y, p, None)
    if not (y == 1).any():
        raise ValueError("no positive label: F1 chooses no threshold")
    cut, place = np.unique(-p, return_inverse=True)  # the highest score first
    hits = np.cumsum(np.bincount(place, weights=y))
    called = np.cumsum(np.bincount(place))
    f1 = 2 * hits / (called + y.sum())
    return float(-cut[np.flatnonzero(f1 == f1.max())[-1]])


@dataclass(frozen=True)
class Confusion:
    """Weight of true and false positives and negatives, [R] each. A rate is NaN where its denominator is 0."""

    tp: np.ndarray
    fp: np.ndarray
    tn: np.ndarray
    fn: np.ndarray

    @property
    def sensitivity(self) -> np.ndarray:
        """True-positive rate, recall."""
        return _ratio(self.tp, self.tp + self.fn)

    @property
    def specificity(self) -> np.ndarray:
        """True-negative rate."""
        return _ratio(self.tn, self.tn + self.fp)

    @property
    def fpr(self) -> np.ndarray:
        return _ratio(self.fp, self.tn + self.fp)

    @property
    def fnr(self) -> np.ndarray:
        return _ratio(self.fn, self.tp + self.fn)

    @property
    def precision(self) -> np.ndarray:
        return _ratio(self.tp, self.tp + self.fp)

    @property
    def f1(self) -> np.ndarray:
        """2 TP / (2 TP + FP + FN)."""
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def accuracy(self) -> np.ndarray:
        return _ratio(self.tp + self.tn, self.tp + self.fp + self.tn + self.fn)

    @property
    def balanced_accuracy(self) -> np.ndarray:
        """Mean of sensitivity and specificity."""
        return (self.sensitivity + self.specificity) / 2

    @property
    def selection_rate(self) -> np.ndarray:
        """Share that is called positive."""
        return _ratio(self.tp + self.fp, self.tp + self.fp + self.tn + self.fn)


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.full(np.shape(b), np.nan), where=b > 0)


def confusion(y: np.ndarray, called: np.ndarray, counts: np.ndarray | None = None) -> Confusion:
    """y, called: 0/1 [n], the truth and the decision; per row of counts [R, n]."""
    y, called, counts = checked(y, called, counts)
    if not np.isin(called, (0, 1)).all():
        raise ValueError("decisions must be 0 or 1: apply a threshold first")
    cells = np.stack([(y == t) & (called == c) for t, c in ((1, 1), (0, 1), (0, 0), (1, 0))]).astype(np.float64)
    return Confusion(*(cells @ counts.T.astype(np.float64)))


def rate_interval(hits: np.ndarray, patients: np.ndarray | None = None, level: float = 0.95) -> stats.Interval:
    """Share of 0/1 hits [n]: value (hits + 0.5) / (n + 1), with its Jeffreys interval.

    patients [n]: whose images they are. Images of one patient are not independent trials, so the interval of n images
    of P < n patients is that of P trials, of which the same share are hits; the value stays. P = n: `stats.jeffreys`.
    """
    hits = np.asarray(hits)
    n, count = len(hits), int(hits.sum())
    people = n if patients is None else len(np.unique(patients))
    plain = stats.jeffreys(count, n, level)
    if people == n:
        return plain
    wide = stats.jeffreys(count * people / n, people, level)
    return stats.Interval(plain.value, wide.lo, wide.hi)


# --- calibration ------------------------------------------------------------------------------------------------------
def calibration_bins(p: np.ndarray, bins: int = BINS, kind: str = "width") -> np.ndarray:
    """Bin of each probability [n]: `bins` of equal width over 0..1, or of equal "mass" (as many images in each, ties
    kept together). A value on an edge belongs to the upper bin."""
    p = np.asarray(p, dtype=np.float64)
    if kind not in ("width", "mass"):
        raise ValueError(f"bins are of equal width or mass, not {kind!r}")
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("calibration needs probabilities in 0..1")
    inner = np.linspace(0, 1, bins + 1)[1:-1]
    return np.digitize(p, inner if kind == "width" else np.unique(np.quantile(p, inner)))


@dataclass(frozen=True)
class Reliability:
    """Points of a reliability diagram, one per bin that holds an image: mean probability, share of positives, n."""

    predicted: np.ndarray
    observed: np.ndarray
    n: np.ndarray


def reliability(y: np.ndarray, p: np.ndarray, bins: int = BINS, kind: str = "width") -> Reliability:
    """Reliability diagram of 0/1 labels [n] and probabilities [n]; points on the diagonal are perfectly calibrated."""
    y, p, _ = checked(y, p, None)
    member = calibration_bins(p, bins, kind)
    n = np.bincount(member, minlength=bins)
    predicted, observed = (np.bincount(member, weights=v, minlength=bins)[n > 0] / n[n > 0] for v in (p, y))
    return Reliability(predicted, observed, n[n > 0])


def ece(y: np.ndarray, p: np.ndarray, bins: int = BINS, kind: str = "width",
        counts: np.ndarray | None = None) -> np.ndarray:  # fmt: skip
    """Expected calibration error, sum_b (n_b / n) |share of positives_b - mean p_b|, per row of counts -> [R].

    Depends on the bins, which are those of the whole sample in every resample, and is biased upwards in small samples:
    compare groups at like n, or read the Brier score beside it.
    """
    y, p, counts = checked(y, p, counts)
    member = np.eye(bins)[calibration_bins(p, bins, kind)]  # [n, bins]
    return _ratio(np.abs(counts @ (member * (y - p)[:, None])).sum(1), counts.sum(1, dtype=np.float64))


def brier(y: np.ndarray, p: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """Mean squared error of the probability, per row of counts -> [R]; a proper score, lower is better."""
    y, p, counts = checked(y, p, counts)
    return stats.mean((p - y) ** 2, counts)


# --- several classes: y class indices [n], p probabilities [n, C] -----------------------------------------------------
def one_vs_rest(y: np.ndarray, classes: int) -> np.ndarray:
    """Class indices [n] -> 0/1 labels [n, C], the y of `stats.bootstrap`."""
    y = np.asarray(y)
    if y.ndim != 1 or not np.isin(y, np.arange(classes)).all():
        raise ValueError(f"labels must be class indices 0..{classes - 1} [n], got {y.shape}")
    return (y[:, None] == np.arange(classes)).astype(np.int8)


def macro_auroc(y: np.ndarray, p: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """Mean over classes of the AUROC of each class against the rest -> [R]; NaN where a class is absent."""
    labels = one_vs_rest(y, np.shape(p)[1])
    return np.mean([stats.auroc(labels[:, c], p[:, c], counts) for c in range(labels.shape[1])], axis=0)


def recalls(y: np.ndarray, called: np.ndarray, classes: int, counts: np.ndarray | None = None) -> np.ndarray:
    """Share of each class that is called by its name -> [R, C]; NaN where a class is absent."""
    labels, right = one_vs_rest(y, classes), (np.asarray(y) == np.asarray(called))[:, None]
    counts = np.ones((1, len(labels))) if counts is None else np.atleast_2d(counts).astype(np.float64)
    return _ratio(counts @ (labels * right), counts @ labels)


def macro_recall(y: np.ndarray, called: np.ndarray, classes: int, counts: np.ndarray | None = None) -> np.ndarray:
    """Balanced accuracy of several classes, the mean of their recalls -> [R]; NaN where a class is absent."""
    return recalls(y, called, classes, counts).mean(1)
