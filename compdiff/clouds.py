"""Distances between two clouds of features with the patients resampled: KID by bootstrap, FID from random halves."""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.stats import t

from compdiff.metrics import fid, kernel
from compdiff.stats import Interval, Resamples


# --- KID --------------------------------------------------------------------------------------------------------------
def _by_patient(k: np.ndarray, ra: Resamples, rb: Resamples) -> np.ndarray:
    """Kernel [n, m] summed over the images of each pair of patients -> [P_a, P_b]."""
    # [P, n], 1 where the image is the patient's
    member = [sparse.csr_array(np.arange(r.draws.shape[1])[:, None] == r.patient).astype(k.dtype) for r in (ra, rb)]
    return member[0] @ (member[1] @ k.T).T


def _pair_mean(k: np.ndarray, w: np.ndarray, v: np.ndarray, sizes_a: np.ndarray, sizes_b: np.ndarray,
               left: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None) -> np.ndarray:  # fmt: skip
    """Mean kernel over weighted pairs of images, w [R, P_a] and v [R, P_b], without what is `left` out: weights [R, m],
    the kernel's sum [m] and the number of pairs [m].
    """
    total = ((w @ k) * v).sum(1)
    pairs = (w @ sizes_a) * (v @ sizes_b)
    if left is not None:
        weights, kernels, numbers = left
        total = total - weights @ kernels
        pairs = pairs - weights @ numbers
    return np.divide(total, pairs, out=np.full(len(total), np.nan), where=pairs > 0)


def _one_patient(k: np.ndarray, w: np.ndarray, v: np.ndarray, na: np.ndarray, nb: np.ndarray) -> np.ndarray:
    """`_pair_mean` without the pairs of one patient; k [P, P] is summed by patient, the same ones on both sides."""
    return _pair_mean(k, w, v, na, nb, (w * v, np.diagonal(k), na * nb))


def _matched(k: np.ndarray, w: np.ndarray, v: np.ndarray, ra: Resamples, rb: Resamples, na: np.ndarray,
             nb: np.ndarray) -> np.ndarray:  # fmt: skip
    """Mean cross kernel k [n, n] of sets of other patients whose rows answer the same requests: over the pairs of rows
    (i, j) that a keeps within itself, and over those that b keeps, averaged. Neither keeps (i, i).
    """
    by_patient, rows, means = _by_patient(k, ra, rb), w[:, ra.patient] * v[:, rb.patient], []
    for patient, values in ((ra.patient, k), (rb.patient, k.T)):
        one = patient[:, None] == patient
        means.append(_pair_mean(by_patient, w, v, na, nb, (rows, (one * values).sum(0), one.sum(0))))
    return (means[0] + means[1]) / 2


def kid_bootstrap(a: np.ndarray, b: np.ndarray, ra: Resamples, rb: Resamples | None = None,
                  leave_out: str = "nothing") -> tuple[float, np.ndarray]:  # fmt: skip
    """KID of features [n, d] and [m, d] over pairs of DIFFERENT patients -> (value, resampled values [R]).

    The kernel is computed once; a resample weighs the pair (i, j) by c_i c_j. A patient drawn twice would put the
    same image in the sample twice, and its pair with itself would bias the unbiased estimator upwards, so pairs
    within a patient are left out (of the value too). With one image per patient the value is `metrics.kid`. rb =
    None: a and b are images of the same patients, row by row of `ra` (generated from the prompts of b), drawn
    together; then the cross term leaves them out as well. Otherwise it leaves out

    - "nothing": two samples that have nothing to do with each other;
    - "patients": pairs of one patient, for images of the same patients in another order (the draws must be the same);
    - "rows": pairs of one request, for other patients whose row i answers the request of row i of b. Both sets then
      hold the same number of images of every cell. Within a set a cell's n_c images make n_c (n_c - 1) pairs, so n_c^2
      pairs in the cross term, alike as they are, would pull KID below 0. Where patients have several images, what a
      and what b leave out within themselves is left out of one half of the cross term each.
    """
    leave_out, rb = ("patients", ra) if rb is None else (leave_out, rb)
    if len(ra.patient) != len(a) or len(rb.patient) != len(b) or len(ra.draws) != len(rb.draws):
        raise ValueError("one patient per row of features, and as many resamples for a as for b")
    if leave_out not in ("nothing", "patients", "rows") or (leave_out == "rows" and len(a) != len(b)):
        raise ValueError(f"cannot leave {leave_out} out of {len(a)} x {len(b)} pairs")
    if leave_out == "patients" and not np.array_equal(ra.draws, rb.draws):
        raise ValueError("pairs of one patient can be left out only where the same patients are drawn")
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    kaa, kbb = (_by_patient(kernel(x, x), r, r) for x, r in ((a, ra), (b, rb)))
    kab = kernel(a, b)
    na, nb = (np.bincount(r.patient, minlength=r.draws.shape[1]).astype(float) for r in (ra, rb))
    w, v = (np.vstack([np.ones(r.draws.shape[1]), r.draws]) for r in (ra, rb))  # row 0: the sample itself
    if leave_out == "rows":
        cross = _matched(kab, w, v, ra, rb, na, nb)
    else:
        mean = _one_patient if leave_out == "patients" else _pair_mean
        cross = mean(_by_patient(kab, ra, rb), w, v, na, nb)
    values = _one_patient(kaa, w, w, na, na) + _one_patient(kbb, v, v, nb, nb) - 2 * cross
    return float(values[0]), values[1:]


# --- halves, without replacement -------------------------------------------------------------------------------------
def _half_of(patients: np.ndarray, key: dict) -> np.ndarray:
    """Rows of the half of the patients with the smallest keys, boolean [n]."""
    ranked = sorted(set(patients.tolist()), key=key.__getitem__)
    return np.isin(patients, ranked[: (len(ranked) + 1) // 2])


def fid_halves(a: np.ndarray, b: np.ndarray, patients_a: np.ndarray, patients_b: np.ndarray, repeats: int,
               seed: int) -> tuple[float, np.ndarray]:  # fmt: skip
    """FID, and that of random halves of the patients, drawn WITHOUT replacement -> (value, values of halves [repeats]).

    The same half on both sides where ids are shared, and in every call with the same ids and seed.
    """
    patients_a, patients_b = np.asarray(patients_a), np.asarray(patients_b)
    names = sorted(set(patients_a.tolist()) | set(patients_b.tolist()))
    rng, halves = np.random.default_rng(seed), []
    for _ in range(repeats):
        key = dict(zip(names, rng.random(len(names)).tolist(), strict=True))
        halves.append(fid(a[_half_of(patients_a, key)], b[_half_of(patients_b, key)]))
    return fid(a, b), np.array(halves)


def halves_interval(value: float, halves: np.ndarray, least: float = 0.0, level: float = 0.95) -> Interval:
    """value +- t std(values of half-samples), not below `least`: for what resampling with replacement would bias.

    It repeats images, and FID, biased by sample size, would rise in every resample. Half-samples without replacement
    have the variance of the full sample's statistic; their bias plays no part in their spread.
    """
    spread = t.ppf((1 + level) / 2, len(halves) - 1) * np.std(halves, ddof=1)
    return Interval(float(value), max(float(value - spread), least), float(value + spread))
