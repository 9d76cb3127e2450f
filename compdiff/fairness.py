"""Equity: groups from one place, equity-scaled metrics, gaps, underdiagnosis, and who is eligible to be judged.

Numbers of small groups are shown and marked ineligible, never dropped and never averaged in as NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from compdiff.stats import Interval, jeffreys

MIN_CLASS = 10  # positives and negatives below which a group's AUROC or AUPRC is ineligible
MIN_NEGATIVES = 20  # negatives below which a group's false-positive rate is ineligible
MIN_IMAGES = 30  # images below which a group's image metrics are ineligible


@dataclass(frozen=True)
class Group:
    """Some rows of a table: kind = overall | an attribute | cell | held_out | a joint kind such as "sex x race"."""

    kind: str
    name: str
    mask: np.ndarray  # bool [n]


def groups(table: pd.DataFrame, names: Sequence[str], joint: Iterable[Sequence[str]] = ()) -> list[Group]:
    """All groups of a table with one column of category names per attribute, in order of first appearance of the kinds.

    overall; each category of each attribute in `names`; each cell (all attributes); held_out where that column marks
    any row; `joint` adds intersections of fewer attributes, e.g. [("sex", "race")]. Only combinations that occur are
    listed.
    """
    out = [Group("overall", "", np.ones(len(table), dtype=bool))]
    kinds = [(name, [name]) for name in names] + [(" x ".join(j), list(j)) for j in joint] + [("cell", list(names))]
    for kind, columns in kinds:
        keys = table[columns].astype(str).agg(" ".join, axis=1).to_numpy()
        out += [Group(kind, key, keys == key) for key in sorted(set(keys))]
    if "held_out" in table and (table["held_out"] == 1).any():
        out.append(Group("held_out", "", (table["held_out"] == 1).to_numpy()))
    return out


# --- eligibility ------------------------------------------------------------------------------------------------------
def auroc_note(y: np.ndarray) -> str:
    """ "" when 0/1 labels [n] hold enough of both classes for AUROC and AUPRC, else why not."""
    positives, negatives = int((y == 1).sum()), int((y == 0).sum())
    if positives < MIN_CLASS:
        return f"ineligible: {positives} positives < {MIN_CLASS}"
    return f"ineligible: {negatives} negatives < {MIN_CLASS}" if negatives < MIN_CLASS else ""


def fpr_note(negatives: int) -> str:
    """ "" when there are enough negatives for a false-positive rate, else why not."""
    return f"ineligible: {negatives} negatives < {MIN_NEGATIVES}" if negatives < MIN_NEGATIVES else ""


def images_note(n: int, least: int = MIN_IMAGES) -> str:
    """ "" when a group holds enough images for FID, KID, precision and recall, else why not."""
    return f"ineligible: n = {n} < {least}" if n < least else ""


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


@dataclass(frozen=True)
class Rate:
    """A group's rate with interval, the negatives it rests on, and "" or why it is ineligible."""

    interval: Interval
    negatives: int
    note: str


def underdiagnosis(no_finding: np.ndarray, called: np.ndarray, level: float = 0.95) -> Rate:
    """False-positive rate of No Finding: ill patients (label 0) called healthy, (FP + 0.5) / (FP + TN + 1), Jeffreys
    interval.

    no_finding, called: 0/1 [n], the truth and the thresholded prediction.
    """
    no_finding, called = np.asarray(no_finding), np.asarray(called)
    ill = no_finding == 0
    false_positives, negatives = int((called[ill] == 1).sum()), int(ill.sum())
    return Rate(jeffreys(false_positives, negatives, level), negatives, fpr_note(negatives))
