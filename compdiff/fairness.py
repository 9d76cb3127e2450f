"""Equity: intersections of groups, equity-scaled metrics, gaps, parity, and who is eligible to be judged.

A group that is too small keeps its row, whose note says why it is ineligible; it is not dropped, nor averaged in as NaN.
By what a classifier is judged, and by FID, precision and recall, it has no value in that row; KID, accuracies, errors
and MS-SSIM, which a small group makes uncertain but not larger, are shown beside the note.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
import pandas as pd

from compdiff.scores import ece, rate_interval
from compdiff.stats import Interval, auroc

MIN_CLASS = 10  # positives and negatives below which a group's AUROC or AUPRC is ineligible
ONE_PATIENT = "one patient only in a class"  # no interval: a resample without that patient lacks the class
MIN_NEGATIVES = 20  # negatives below which a group's false-positive rate is ineligible
MIN_IMAGES = 30  # images below which a group's image metrics are ineligible


Key = tuple[str, str]  # (group_kind, group), as in the result rows
HEALTHY = "No Finding"


def disparity_label(labels: Sequence[str]) -> str:
    """The label whose decisions are compared between intersections: No Finding, or else the first."""
    return HEALTHY if HEALTHY in labels else labels[0]


def intersections(masks: Mapping[Key, np.ndarray], attributes: Sequence[str], most: int = 3) -> dict[Key, np.ndarray]:
    """Groups of two, ..., `most` attributes that occur: {("sex x race", "Female Black"): bool [n]}.

    masks: the single groups of `Data.group_masks`, where categories are made; other kinds in it are passed over.
    """
    out = {}
    for size in range(2, most + 1):
        for names in combinations(attributes, size):
            for keys in product(*([k for k in masks if k[0] == name] for name in names)):
                mask = np.logical_and.reduce([masks[k] for k in keys])
                if mask.any():
                    out[" x ".join(names), " ".join(k[1] for k in keys)] = mask
    return out


def conditions(rows: pd.DataFrame, labels: Mapping[str, Sequence[str]]) -> dict[Key, np.ndarray]:
    """Groups by finding: {("vision_loss", "severe vision loss"): bool [n]}, each value of each label (FairDiffusion's).

    rows: with columns y_<label>; labels: a manifest's, with a phrase per value, which names the group where the phrases
    differ and none is empty; else its number does.
    """
    out = {}
    for label, phrases in labels.items():
        names = phrases if len(set(phrases)) == len(phrases) and all(phrases) else [str(i) for i in range(len(phrases))]
        out |= {(label, name): (rows[f"y_{label}"] == i).to_numpy() for i, name in enumerate(names)}
    return out


# --- eligibility ------------------------------------------------------------------------------------------------------
def auroc_note(y: np.ndarray, patients: np.ndarray | None = None) -> str:
    """ "" when 0/1 labels [n] hold enough of both classes for AUROC and AUPRC, else why not.

    patients [n]: whose images they are, where a patient may have several; each class must be of two or more.
    """
    positives, negatives = int((y == 1).sum()), int((y == 0).sum())
    if positives < MIN_CLASS:
        return f"ineligible: {positives} positives < {MIN_CLASS}"
    if negatives < MIN_CLASS:
        return f"ineligible: {negatives} negatives < {MIN_CLASS}"
    few = patients is not None and min(len(np.unique(np.asarray(patients)[y == v])) for v in (0, 1)) < 2
    return f"ineligible: {ONE_PATIENT}" if few else ""


def mean_note(shared: Sequence[str], notes: Mapping[str, Sequence[str]]) -> str:
    """What a mean over findings is of: "mean of A, B; without C (one patient only in a class)".

    shared: the findings that take part; notes: {finding: its notes in the groups compared}. What has too few images is
    not named here: its own rows say so.
    """
    left = [label for label, why in notes.items() if label not in shared and any(ONE_PATIENT in note for note in why)]
    return f"mean of {', '.join(shared)}" + (f"; without {', '.join(left)} ({ONE_PATIENT})" if left else "")


def fpr_note(negatives: int) -> str:
    """ "" when there are enough negatives for a false-positive rate, else why not."""
    return f"ineligible: {negatives} negatives < {MIN_NEGATIVES}" if negatives < MIN_NEGATIVES else ""


def images_note(n: int, least: int = MIN_IMAGES, patients: int | None = None) -> str:
    """ "" when a group holds enough images for FID, KID, precision and recall, else why not, of how few patients."""
    whose = f" (of {patients} patients)" if patients is not None and patients < n else ""
    return f"ineligible: n = {n} < {least}{whose}" if n < least else ""


# --- equity-scaled metrics --------------------------------------------------------------------------------------------
def _deviations(overall: float, by_group: Sequence[float]) -> np.ndarray:
    by_group = np.asarray(by_group, dtype=float)
    if not by_group.size or not np.isfinite(by_group).all() or not np.isfinite(overall):
        raise ValueError(
            f"equity scaling needs finite values of at least one group, got {overall} and {by_group.tolist()}"
        )
    return np.abs(by_group - overall)


def es_fid(overall: float, by_group: Sequence[float], combine: str = "mean") -> float:
    """ES-FID = FID (1 + mean_a |FID_a - FID| / FID), so >= FID; `combine="sum"` adds instead of averaging. Also for
    KID.

    Computed as FID + mean_a |FID_a - FID|, the same number without a division (KID may be 0 or negative).
    """
    if combine not in ("mean", "sum"):
        raise ValueError(f"combine must be mean or sum, got {combine!r}")
    return float(overall + getattr(_deviations(overall, by_group), combine)())


def es_metric(overall: float, by_group: Sequence[float], alpha: float = 1.0, combine: str = "sum") -> float:
    """ES-M = M / (1 + alpha sum_a |M_a - M|) for metrics where higher is better (AUROC, accuracy), so <= M for M >=
    0."""
    if combine not in ("mean", "sum"):
        raise ValueError(f"combine must be mean or sum, got {combine!r}")
    return float(overall / (1 + alpha * getattr(_deviations(overall, by_group), combine)()))


def gaps(overall: float, by_group: Sequence[float]) -> dict[str, float]:
    """Between-group disparity of a metric: max - min, p90 - p10, and both standard deviation and range over the
    overall value.

    The standard deviation is that of the groups as a population (n in the denominator); one group has gap 0.
    """
    _deviations(overall, by_group)
    values = np.asarray(by_group, dtype=float)
    p10, p90 = np.quantile(values, [0.1, 0.9])
    spread = float(values.max() - values.min())
    return {
        "max-min": spread,
        "p90-p10": float(p90 - p10),
        "std/overall": float(values.std() / overall),
        "max-min/overall": spread / overall,
    }


# --- decisions --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Parity:
    """{"<criterion> difference" | "<criterion> ratio": value} ({} when fewer than two groups are eligible), and why."""

    values: dict[str, float]
    note: str


def parity(truth: np.ndarray, called: np.ndarray, group: np.ndarray) -> Parity:
    """Demographic parity, equalized odds and equal opportunity of 0/1 decisions [n], by fairlearn.

    group [n]: names of one attribute's categories or of an intersection. Difference: largest minus smallest group
    rate (0 = equal); ratio: smallest over largest (1 = equal). Rates: P(called), both of TPR and FPR (the worse), TPR.
    Groups with < 10 positives or < 20 negatives are left out and named: fairlearn would take a rate over nobody as 0.
    """
    from fairlearn import metrics as fairlearn  # here, because only this function needs it

    truth, called, group = np.asarray(truth), np.asarray(called), np.asarray(group).astype(str)
    labels = {g: truth[group == g] for g in np.unique(group)}
    left = [g for g, y in labels.items() if auroc_note(y) or fpr_note(int((y == 0).sum()))]
    keep = ~np.isin(group, left)
    if len(np.unique(group[keep])) < 2:
        return Parity({}, "ineligible: fewer than two eligible groups")
    columns = {"y_true": truth[keep], "y_pred": called[keep], "sensitive_features": group[keep]}
    values = {f"{criterion.replace('_', ' ')} {how}": float(getattr(fairlearn, f"{criterion}_{how}")(**columns))
              for criterion in ("demographic_parity", "equalized_odds", "equal_opportunity")
              for how in ("difference", "ratio")}  # fmt: skip
    return Parity(values, f"without {', '.join(left)} (ineligible)" if left else "")


@dataclass(frozen=True)
class Rate:
    """A group's rate with interval, the negatives it rests on and their patients, and "" or why it is ineligible."""

    interval: Interval
    negatives: int
    patients: int
    note: str


def underdiagnosis(no_finding: np.ndarray, called: np.ndarray, level: float = 0.95,
                   patients: np.ndarray | None = None) -> Rate:  # fmt: skip
    """False-positive rate of No Finding: ill patients (label 0) called healthy, (FP + 0.5) / (FP + TN + 1), Jeffreys
    interval.

    no_finding, called: 0/1 [n], the truth and the thresholded prediction. patients [n]: whose images they are; with
    fewer ill patients than images of them the interval is that of as many trials as patients (`scores.rate_interval`).
    """
    no_finding, called = np.asarray(no_finding), np.asarray(called)
    ill = no_finding == 0
    whose, negatives = None if patients is None else np.asarray(patients)[ill], int(ill.sum())
    people = negatives if whose is None else len(np.unique(whose))
    return Rate(rate_interval(called[ill] == 1, whose, level), negatives, people, fpr_note(negatives))


def card(y: np.ndarray, p: np.ndarray, group: np.ndarray, label: str = HEALTHY, cut: float = 0.5) -> dict[str, float]:
    """Quality and equity of one classifier of `label` side by side: what each says of scores without any skill.

    y: 0/1 [n], p: scores [n], called at `cut`; group [n]. Gap and ES-AUROC over the eligible groups, parity as in
    `parity`; what fewer than two groups are eligible for has no entry.
    """
    y, p, group = np.asarray(y), np.asarray(p, float), np.asarray(group).astype(str)
    whole, called = float(auroc(y, p)[0]), (p >= cut).astype(int)
    by_group = [float(auroc(y[group == g], p[group == g])[0]) for g in np.unique(group) if not auroc_note(y[group == g])]
    found = {"AUROC": whole}
    if len(by_group) >= 2:
        found |= {"gap AUROC": max(by_group) - min(by_group), "ES-AUROC": es_metric(whole, by_group)}
    found |= {name: value for name, value in parity(y, called, group).values.items() if name.endswith("difference")}
    healthy, sent_home = (y, called) if label == HEALTHY else (1 - y, 1 - called)
    return found | {"underdiagnosis": underdiagnosis(healthy, sent_home).interval.value, "ECE": float(ece(y, p)[0])}
