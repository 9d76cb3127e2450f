"""Is a difference more than noise? DeLong for AUROC, a permutation test by PATIENT, Holm over a family of methods.

Pure functions of arrays. The bootstrap of stats.py answers the same question without a formula; benchmarks/coverage.py
compares how often their intervals hold the truth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

from compdiff.stats import Interval, auprc


@dataclass(frozen=True)
class Comparison:
    """A difference a - b with its interval and the two-sided p-value of "no difference"."""

    interval: Interval
    p: float


# --- DeLong -----------------------------------------------------------------------------------------------------------
def delong(y: np.ndarray, score: np.ndarray, patients: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """AUROC of M models and the covariance of the M estimates (DeLong et al. 1988): score [n, M] -> ([M], [M, M]).

    The placements (share of negatives below each positive, and of positives above each negative) come from midranks,
    O(n log n) instead of all pairs (Sun and Xu 2014). `patients` [n]: rows of one patient are summed before their
    products are taken, so images of one patient may be correlated (Obuchowski 1997); with one row each, or None,
    that is DeLong's estimate. ValueError: labels other than 0 and 1, NaN, or fewer than two patients with either.
    """
    y, x = np.asarray(y), np.asarray(score, dtype=np.float64)
    x = x[:, None] if x.ndim == 1 else x
    if y.ndim != 1 or len(x) != len(y) or not np.isin(y, (0, 1)).all() or np.isnan(x).any():
        raise ValueError(f"expected 0/1 labels [n] and scores [n, M] without NaN, got {y.shape} and {x.shape}")
    patient = np.arange(len(y)) if patients is None else np.unique(np.asarray(patients), return_inverse=True)[1]
    sick, well = y == 1, y == 0
    having = [len(np.unique(patient[rows])) for rows in (sick, well)]  # patients with a positive, with a negative
    if min(having) < 2:
        raise ValueError(f"DeLong needs two patients of either class, got {having[0]} and {having[1]}")
    m, n = int(sick.sum()), int(well.sum())
    rank = stats.rankdata(x, axis=0)
    above = (rank[sick] - stats.rankdata(x[sick], axis=0)) / n  # [m, M] share of negatives below each positive
    under = 1 - (rank[well] - stats.rankdata(x[well], axis=0)) / m  # [n, M] share of positives above each negative
    auc = above.mean(0)
    total = patient.max() + 1
    a, b = np.zeros((total, x.shape[1])), np.zeros((total, x.shape[1]))  # deviations summed over a patient's rows
    np.add.at(a, patient[sick], above - auc)
    np.add.at(b, patient[well], under - auc)
    factors = [k / (k - 1) for k in (*having, total)]
    both = factors[2] * a.T @ b / (m * n)  # 0 when no patient has rows of both classes
    return auc, factors[0] * a.T @ a / m**2 + factors[1] * b.T @ b / n**2 + both + both.T


def delong_interval(y: np.ndarray, score: np.ndarray, patients: np.ndarray | None = None, level: float = 0.95,
                    scale: str = "logit") -> Interval:  # fmt: skip
    """AUROC [n] with DeLong's normal interval, on the logit scale (stays inside 0..1) or "linear".

    The bounds are NaN where the AUROC is exactly 0 or 1: separation leaves no variance to go by.
    """
    if scale not in ("logit", "linear"):
        raise ValueError(f"scale must be logit or linear, got {scale!r}")
    auc, cov = delong(y, score, patients)
    value, half = float(auc[0]), stats.norm.ppf((1 + level) / 2) * np.sqrt(cov[0, 0])
    if not 0 < value < 1:
        return Interval(value, float("nan"), float("nan"))
    if scale == "linear":
        return Interval(value, float(value - half), float(value + half))
    centre, half = special.logit(value), half / (value * (1 - value))
    return Interval(value, float(special.expit(centre - half)), float(special.expit(centre + half)))


def delong_test(y: np.ndarray, a: np.ndarray, b: np.ndarray, patients: np.ndarray | None = None,
                level: float = 0.95) -> Comparison:  # fmt: skip
    """AUROC of scores a minus that of scores b on the SAME rows [n], with interval and p by z = difference / its
    standard error."""
    auc, cov = delong(y, np.stack([a, b], axis=1), patients)
    value = float(auc[0] - auc[1])
    error = float(np.sqrt(max(cov[0, 0] + cov[1, 1] - 2 * cov[0, 1], 0.0)))
    half = float(stats.norm.ppf((1 + level) / 2)) * error
    p = float(2 * stats.norm.sf(abs(value) / error)) if error > 0 else float(value == 0)
    return Comparison(Interval(value, value - half, value + half), p)


# --- permutation ------------------------------------------------------------------------------------------------------
def permutation_test(y: np.ndarray, a: np.ndarray, b: np.ndarray, patients: np.ndarray, permutations: int, seed: int,
                     metric: Callable[..., np.ndarray] = auprc) -> tuple[float, float]:  # fmt: skip
    """(difference a - b, p): `metric` (AUPRC or AUROC) of two models' scores on the same rows [n], paired by patient.

    If the models were exchangeable, swapping their scores for a random half of the patients would change nothing. Both
    are replaced by their ranks first (the metric does not see it), so that models on different scales can be swapped.
    p = (1 + #{|swapped| >= |observed|}) / (1 + permutations), two-sided and never 0.
    """
    y, rank = np.asarray(y), np.concatenate([stats.rankdata(a), stats.rankdata(b)])
    names, patient = np.unique(np.asarray(patients), return_inverse=True)
    if not len(y) == len(a) == len(b) == len(patient):
        raise ValueError(f"labels, scores and patients differ in length: {len(y)}, {len(a)}, {len(b)}, {len(patient)}")
    swap = np.random.default_rng(seed).integers(0, 2, (permutations + 1, len(names)), dtype=np.int8)
    swap[0] = 0  # the models as they are
    first = np.concatenate([1 - swap[:, patient], swap[:, patient]], axis=1).astype(np.float32)  # [1 + R, 2 n], 0 or 1
    twice = np.concatenate([y, y])  # one sort of all 2 n ranks; a permutation only chooses which of them count
    found = metric(twice, rank, first) - metric(twice, rank, 1 - first)
    if not np.isfinite(found).all():
        raise ValueError("the metric is undefined: the labels hold only one class")
    extreme = np.abs(found[1:]) >= np.abs(found[0]) - 1e-9  # equal up to rounding counts as equal
    return float(found[0]), float((1 + extreme.sum()) / (1 + permutations))


# --- families of tests ------------------------------------------------------------------------------------------------
def holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down p-values [m], in the order given: max over smaller ones of (m - i) p_(i), i from 0, at most 1.

    Rejecting where they are <= alpha bounds the chance of ANY false rejection in the family by alpha, whatever the
    dependence. ValueError for NaN or values outside 0..1: a test that could not be made is no member of the family.
    """
    p = np.asarray(p, dtype=np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p-values must be a list of numbers in 0..1, got {p.tolist()}")
    order = np.argsort(p, kind="stable")
    out = np.empty_like(p)
    out[order] = np.minimum(np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order]), 1.0)
    return out
