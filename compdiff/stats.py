"""Intervals: bootstrap by PATIENT, weighted AUROC and average precision, seeds combined. Tests: significance.py.

Images of one patient are not independent, so whole patients are drawn. A resample is a row of counts (how often each
image counts), and every statistic here takes an [R, n] matrix of counts, so that R resamples cost one array
expression.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

CHUNK = 1_000_000  # counts handled at once, so that they stay in the processor's cache


@dataclass(frozen=True)
class Resamples:
    """R draws of P patients with replacement. `draws` [R, P] counts; `patient` [n] is each image's patient."""

    draws: np.ndarray
    patient: np.ndarray

    def counts(self) -> np.ndarray:
        """How often each image counts in each resample, float32 [R, n]."""
        return self.draws[:, self.patient].astype(np.float32)

    def rows(self, mask: np.ndarray) -> Resamples:
        """The same draws seen on a part of the images (a subgroup): boolean mask [n]."""
        return Resamples(self.draws, self.patient[mask])


def resample_patients(patients: np.ndarray, resamples: int, seed: int) -> Resamples:
    """Draw the distinct patients with replacement, `resamples` times. Depends on the set of ids, not on the rows'
    order."""
    names, index = np.unique(np.asarray(patients), return_inverse=True)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    return Resamples(draws, index)


# --- weighted statistics: labels [n], scores [n], counts [R, n] -> [R] ------------------------------------------------
def checked(y: np.ndarray, score: np.ndarray, counts: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """0/1 labels [n], scores [n] and counts [R, n] as arrays; no counts = every row once. ValueError for anything
    else."""
    y, score = np.asarray(y), np.asarray(score)
    if y.shape != score.shape or y.ndim != 1 or not np.isin(y, (0, 1)).all():
        raise ValueError(f"labels must be 0 or 1 and as many as scores, got {y.shape} and {score.shape}")
    if np.isnan(score).any():
        raise ValueError("scores hold NaN")
    counts = np.ones((1, len(y))) if counts is None else np.atleast_2d(counts)
    counts = counts if counts.dtype == np.float32 else counts.astype(np.float64)
    if counts.shape[1] != len(y):
        raise ValueError(f"counts are for {counts.shape[1]} rows, labels for {len(y)}")
    return y, score, counts


@dataclass(frozen=True)
class Ranking:
    """Rows of the positives and of the negatives by ascending score, and how the positives lie among both.

    `below` and `upto` count the negatives, `before` the positives with a lower (upto: lower or equal) score than each
    positive. One sort serves every group (`part`) and every resample.
    """

    pos: np.ndarray  # int [P]
    neg: np.ndarray  # int [N]
    below: np.ndarray  # int [P]
    upto: np.ndarray  # int [P]
    before: np.ndarray  # int [P]

    @staticmethod
    def of(y: np.ndarray, score: np.ndarray) -> Ranking:
        order = np.argsort(score, kind="stable")
        pos, neg = order[y[order] == 1], order[y[order] == 0]
        below, upto = (np.searchsorted(score[neg], score[pos], side) for side in ("left", "right"))
        return Ranking(pos, neg, below, upto, np.searchsorted(score[pos], score[pos], "left"))

    def part(self, mask: np.ndarray) -> Ranking:
        """The same ranking of the rows in `mask` [n] only."""
        p, n = mask[self.pos], mask[self.neg]
        pos, neg = np.r_[0, np.cumsum(p)], np.r_[0, np.cumsum(n)]  # how many of the first k are kept
        return Ranking(self.pos[p], self.neg[n], neg[self.below[p]], neg[self.upto[p]], pos[self.before[p]])


def _cumulated(w: np.ndarray) -> np.ndarray:
    """[R, k] -> [R, k + 1]: weight of the first 0, 1, ..., k rows."""
    out = np.zeros((w.shape[0], w.shape[1] + 1), dtype=w.dtype)
    np.cumsum(w, axis=1, out=out[:, 1:])
    return out


def _auroc(rank: Ranking, counts: np.ndarray) -> np.ndarray:
    pos, neg = counts[:, rank.pos], _cumulated(counts[:, rank.neg])
    wins = np.einsum("rp,rp->r", pos, neg[:, rank.below] + neg[:, rank.upto], dtype=np.float64) / 2
    return wins / (pos.sum(1, dtype=np.float64) * neg[:, -1])


def _auprc(rank: Ranking, counts: np.ndarray) -> np.ndarray:
    weights, neg = counts[:, rank.pos], _cumulated(counts[:, rank.neg])
    pos = _cumulated(weights)
    hits = pos[:, -1:] - pos[:, rank.before]
    called = hits + neg[:, -1:] - neg[:, rank.below]
    precision = np.divide(hits, called, out=np.zeros_like(hits), where=called > 0)
    return np.einsum("rp,rp->r", weights, precision, dtype=np.float64) / pos[:, -1]


CURVES: dict[str, Callable[[Ranking, np.ndarray], np.ndarray]] = {"AUROC": _auroc, "AUPRC": _auprc}


def _chunked(metric: str, y: np.ndarray, score: np.ndarray, counts: np.ndarray | None) -> np.ndarray:
    y, score, counts = checked(y, score, counts)
    rank, step = Ranking.of(y, score), max(1, CHUNK // max(1, len(y)))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.concatenate([CURVES[metric](rank, counts[i : i + step]) for i in range(0, len(counts), step)])


def auroc(y: np.ndarray, score: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """P(score of a positive > score of a negative) + half the ties, per row of counts -> [R]; NaN where a class is
    absent."""
    return _chunked("AUROC", y, score, counts)


def auprc(y: np.ndarray, score: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """Average precision sum_k (R_k - R_{k-1}) P_k over distinct thresholds, per row of counts -> [R]; NaN without
    positives."""
    return _chunked("AUPRC", y, score, counts)


def bootstrap(metric: str, y: np.ndarray, score: np.ndarray, masks: Mapping[Hashable, np.ndarray],
              drawn: Resamples) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """AUROC or AUPRC of L labels in G groups with R patient-bootstraps -> (values [G, L], resampled [R, G, L]).

    y, score [n, L]: 0/1 labels and scores; masks: boolean [n] per group. Every group and label sees the same draws,
    so differences between them are paired. NaN where a class is absent (of a group, or of a resample).
    """
    y, score = np.asarray(y), np.asarray(score)
    if y.ndim != 2 or y.shape != score.shape or len(y) != len(drawn.patient):
        raise ValueError(f"expected [n, L] twice and n patients, got {y.shape}, {score.shape}, {len(drawn.patient)}")
    if metric not in CURVES:
        raise ValueError(f"unknown metric {metric!r}; known: {', '.join(CURVES)}")
    once, ranks = np.ones((1, len(y))), []
    for label in range(y.shape[1]):
        rank = Ranking.of(*checked(y[:, label], score[:, label], None)[:2])
        ranks += [rank.part(np.asarray(mask, dtype=bool)) for mask in masks.values()]
    step = max(1, CHUNK // max(1, len(y)))
    with np.errstate(invalid="ignore", divide="ignore"):
        values = np.array([CURVES[metric](rank, once)[0] for rank in ranks])
        resampled = np.empty((len(drawn.draws), len(ranks)))
        for i in range(0, len(resampled), step):
            counts = Resamples(drawn.draws[i : i + step], drawn.patient).counts()
            for k, rank in enumerate(ranks):
                resampled[i : i + step, k] = CURVES[metric](rank, counts)
    shape = (y.shape[1], len(masks))  # label by label, because the ranking is
    return values.reshape(shape).T, resampled.reshape(-1, *shape).swapaxes(1, 2)


def mean(values: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """Weighted mean of a per-image number [n] (1 = correct gives accuracy), per row of counts -> [R]; NaN where all
    counts are 0."""
    values = np.asarray(values, dtype=np.float64)
    counts = np.ones((1, len(values))) if counts is None else np.atleast_2d(counts)
    with np.errstate(invalid="ignore"):
        return counts @ values / counts.sum(1)


# --- intervals --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Interval:
    value: float
    lo: float
    hi: float


def _defined(resampled: np.ndarray) -> np.ndarray:
    """The finite resamples; none when more than a tenth are undefined."""
    good = resampled[np.isfinite(resampled)]
    return good if len(good) >= 0.9 * len(resampled) else good[:0]


def percentile_interval(value: float, resampled: np.ndarray, level: float = 0.95) -> Interval:
    """Percentile bootstrap interval. Undefined resamples are left out; if more than a tenth are, the interval is
    NaN."""
    good = _defined(resampled)
    if not len(good):
        return Interval(float(value), float("nan"), float("nan"))
    lo, hi = np.quantile(good, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(lo), float(hi))


def logit_interval(value: float, resampled: np.ndarray, level: float = 0.95) -> Interval:
    """Bootstrap interval of an AUROC or AUPRC on the logit scale: logit(value) +- z std(logit(resampled)).

    For AUROC it holds the truth in 94-96 % of simulated sets, also where percentiles reach 90-93 %: few positives, or
    values near 1 (benchmarks/coverage.py). A resample of exactly 0 or 1 counts as half as far from it as the nearest
    other one. The bounds are NaN where the value itself is 0 or 1 (separation leaves nothing to go by), or more than
    a tenth of the resamples are undefined.
    """
    good = _defined(resampled)
    inner = good[(good > 0) & (good < 1)]
    if not 0 < value < 1 or not len(inner):
        return Interval(float(value), float("nan"), float("nan"))
    logits = special.logit(np.clip(good, inner.min() / 2, (1 + inner.max()) / 2))
    half = stats.norm.ppf((1 + level) / 2) * logits.std(ddof=1)
    lo, hi = special.expit(special.logit(value) + np.array([-half, half]))
    return Interval(float(value), float(lo), float(hi))


def jeffreys(hits: float, trials: float, level: float = 0.95) -> Interval:
    """Proportion with Beta(1/2, 1/2) prior: posterior mean (hits + 0.5) / (trials + 1) and equal-tailed interval."""
    if not 0 <= hits <= trials:
        raise ValueError(f"{hits} hits in {trials} trials")
    posterior = stats.beta(hits + 0.5, trials - hits + 0.5)
    lo, hi = posterior.ppf([(1 - level) / 2, (1 + level) / 2])
    return Interval((hits + 0.5) / (trials + 1), float(lo), float(hi))


def share_interval(hits: np.ndarray, drawn: Resamples, level: float = 0.95) -> Interval:
    """Mean of a per-image 0/1 (or share) [n], resampled by patient; of exactly 0 or 1, which no resample can vary, the
    other end is that of the Jeffreys interval over the patients of `drawn`.
    """
    value = float(np.mean(hits))
    if value not in (0, 1):
        return percentile_interval(value, mean(hits, drawn.counts()), level)
    people = len(np.unique(drawn.patient))
    wide = jeffreys(people * value, people, level)
    return Interval(value, 0.0 if value == 0 else wide.lo, wide.hi if value == 0 else 1.0)


# --- several methods, several seeds -----------------------------------------------------------------------------------
def difference(
    value_a: float, resampled_a: np.ndarray, value_b: float, resampled_b: np.ndarray, level: float = 0.95
) -> Interval:
    """Interval of a - b when both were resampled with the SAME patients; "within noise" means that it holds 0."""
    return percentile_interval(value_a - value_b, resampled_a - resampled_b, level)


def over_seeds(values: np.ndarray) -> tuple[float, float, int]:
    """(mean, standard deviation with n - 1, number of seeds) of the finite values; the deviation of one seed is NaN."""
    good = np.asarray(values, dtype=float)
    good = good[np.isfinite(good)]
    if not len(good):
        return float("nan"), float("nan"), 0
    return float(good.mean()), float(good.std(ddof=1)) if len(good) > 1 else float("nan"), len(good)


def seeds_interval(values: np.ndarray, level: float = 0.95) -> Interval:
    """Mean over training seeds with its t-interval, mean +- t_{S-1} std / sqrt(S) of the S finite values.

    What a new seed's mean would vary by; it says nothing about the patients. One seed: the bounds are NaN (S = 1 has
    no spread).
    """
    mean, std, n = over_seeds(values)
    half = stats.t.ppf((1 + level) / 2, n - 1) * std / np.sqrt(n) if n > 1 else float("nan")
    return Interval(mean, float(mean - half), float(mean + half))
