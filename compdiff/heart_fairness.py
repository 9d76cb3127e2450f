"""Predictions of repeated classifiers -> rates by group, fairness criteria, and whether augmentation helped.

Method section 5. Values are means over repeats; std is over repeats; an interval resamples patients AND repeats, so it
covers both who was tested and which network was drawn. Criteria are fairlearn's; their intervals come from the same
resampled rates. Small groups are shown and marked, never dropped. A rate of exactly 0 or 1, which no resample varies,
has a Jeffreys bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from fairlearn import metrics as fairlearn
from sklearn.metrics import roc_auc_score

from compdiff import stats
from compdiff.cardiac import Studies
from compdiff.fairness import auroc_note, fpr_note, intersections

Key = tuple[str, str]  # (group_kind, group)
OVERALL: Key = ("overall", "")
MAIN = "balanced accuracy"
RATES = (MAIN, "accuracy", "F1", "FPR", "FNR", "TPR", "selection rate")
# criterion -> the rates whose differences or ratios between groups it is; the worst of them counts
CRITERIA = {
    "demographic parity": ("selection rate",),
    "equalized odds": ("TPR", "FPR"),
    "equal opportunity": ("TPR",),
}
HOW = ("difference", "ratio")
CEILING = 0.98  # balanced accuracy above which a gain cannot be seen, only harm
ENOUGH_REPEATS = 5  # fewer networks allow no verdict: how much they vary is not known


def rates(y: np.ndarray, called: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Rates of 0/1 decisions [R, n] of R repeats against labels [n], rows weighted by counts [B, n] -> {name: [B, R]}.

    NaN where a rate is over nobody. Balanced accuracy = (TPR + 1 - FPR) / 2; F1 = 2 TP / (TP + FP + P).
    """
    yes = (y == 1).astype(float)
    tp, fp = counts @ (called * yes).T, counts @ (called * (1 - yes)).T  # [B, R]
    p, n = (counts @ yes)[:, None], (counts @ (1 - yes))[:, None]  # [B, 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        tpr, fpr = tp / p, fp / n
        return {
            MAIN: (tpr + 1 - fpr) / 2, "accuracy": (tp + n - fp) / (p + n), "F1": 2 * tp / (tp + fp + p),
            "FPR": fpr, "FNR": 1 - tpr, "TPR": tpr, "selection rate": (tp + fp) / (p + n),
        }  # fmt: skip


def note_of(y: np.ndarray) -> str:
    """ "" when labels [n] hold enough of both classes for a group to be judged, else why not."""
    return auroc_note(y) or fpr_note(int((y == 0).sum()))


def group_masks(studies: Studies, rows: np.ndarray, most: int = 2) -> dict[Key, np.ndarray]:
    """Everybody, every category of every attribute, and intersections of up to `most`; bool [n] over `rows`."""
    table, names = studies.table.iloc[rows], studies.schema.names
    single = {(a, c): (table[a] == c).to_numpy() for a in names for c in studies.schema[a].categories}
    single = {k: m for k, m in single.items() if m.any()}
    return {OVERALL: np.ones(len(rows), dtype=bool)} | single | intersections(single, names, most)


@dataclass(frozen=True)
class Judged:
    """One configuration on the test patients: labels [n], decisions [R, n], and rates {key: {name: [B + 1, R]}} of
    which row 0 is the sample itself and the others are resampled patients; `drawn` [B, R] are the resampled repeats."""

    y: np.ndarray
    called: np.ndarray
    rates: Mapping[Key, Mapping[str, np.ndarray]]
    drawn: np.ndarray

    def mean(self, values: np.ndarray) -> tuple[float, np.ndarray]:
        """[B + 1, R] -> mean over repeats of the sample, and [B] means over resampled repeats."""
        return float(values[0].mean()), np.take_along_axis(values[1:], self.drawn, axis=1).mean(axis=1)


def judge(y: np.ndarray, p: np.ndarray, masks: Mapping[Key, np.ndarray], resamples: int, seed: int,
          cuts: np.ndarray | float = 0.5) -> Judged:  # fmt: skip
    """Probabilities [R, n] of R repeats on n patients, thresholds `cuts` (one, or [R, n]). Equal seeds draw equal
    patients and repeats."""
    called = (p >= cuts).astype(float)
    patients = stats.resample_patients(np.arange(len(y)), resamples, seed).counts()
    counts = np.vstack([np.ones(len(y)), patients])
    drawn = np.random.default_rng([seed, 1]).integers(len(p), size=(resamples, len(p)))
    return Judged(y, called, {k: rates(y, called, counts * m) for k, m in masks.items()}, drawn)


def spread(values: np.ndarray) -> float:
    """Standard deviation over repeats of the sample's values [R]; NaN for one repeat."""
    return stats.over_seeds(values)[1]


def exact_interval(name: str, value: float, y: np.ndarray) -> stats.Interval:
    """Interval of a rate that is exactly 0 or 1 on labels [n]: the far end is that of the Jeffreys interval over the
    patients of the rate; balanced accuracy takes the mean of its two rates' ends. F1 has none: NaN."""
    ill, well = int((y == 1).sum()), int((y == 0).sum())
    of = {"TPR": ill, "FNR": ill, "FPR": well, "accuracy": ill + well, "selection rate": ill + well}
    if name == MAIN:
        far = np.mean([stats.jeffreys(n * value, n).lo if value else stats.jeffreys(0, n).hi for n in (ill, well)])
    elif name in of:
        far = stats.jeffreys(of[name], of[name]).lo if value else stats.jeffreys(0, of[name]).hi
    else:
        return stats.Interval(value, np.nan, np.nan)
    return stats.Interval(value, float(far) if value else 0.0, 1.0 if value else float(far))


def auroc_row(y: np.ndarray, p: np.ndarray) -> dict:
    """Everybody's AUROC of probabilities [R, n], mean and spread over repeats: what no threshold can spoil."""
    each = np.array([roc_auc_score(y, one) for one in p])
    return {"group_kind": "overall", "group": "", "n": len(y), "positives": int(y.sum()), "metric": "AUROC",
            "value": each.mean(), "std": spread(each), "lo": np.nan, "hi": np.nan, "repeats": len(p), "note": ""}  # fmt: skip


def rate_rows(judged: Judged, masks: Mapping[Key, np.ndarray]) -> list[dict]:
    """One row per group and rate: group_kind, group, metric, value, std, lo, hi, n, positives, repeats, note."""
    out = []
    for key, mask in masks.items():
        who = {"group_kind": key[0], "group": key[1], "n": int(mask.sum()), "positives": int(judged.y[mask].sum())}
        for name, values in judged.rates[key].items():
            made = stats.percentile_interval(*judged.mean(values))
            if made.value in (0, 1):
                made = exact_interval(name, made.value, judged.y[mask])
            note = note_of(judged.y[mask])
            if not np.isfinite(made.value):
                note = f"not available: no patient to take it over; {note}"
            number = {"value": made.value, "std": spread(values[0]), "lo": made.lo, "hi": made.hi}
            out.append(who | number | {"metric": name, "repeats": len(judged.called), "note": note})
    return out


# --- criteria ---------------------------------------------------------------------------------------------------------
def criterion(judged: Judged, keys: Sequence[Key], name: str, how: str) -> np.ndarray:
    """Difference (largest - smallest) or ratio (smallest / largest) of group rates, the worst rate's -> [B + 1, R]."""
    found = []
    for rate in CRITERIA[name]:
        values = np.stack([judged.rates[k][rate] for k in keys])  # [G, B + 1, R]
        with np.errstate(invalid="ignore", divide="ignore"):
            low, high = values.min(0), values.max(0)
            found.append(high - low if how == "difference" else low / high)
    return np.maximum.reduce(found) if how == "difference" else np.minimum.reduce(found)


def parity_rows(judged: Judged, masks: Mapping[Key, np.ndarray]) -> list[dict]:
    """fairlearn's criteria of every kind of group. Groups too small to judge are left out and named; where fewer than
    two remain, all with both labels take part and the row is marked ineligible."""
    out = []
    for kind in dict.fromkeys(k[0] for k in masks if k != OVERALL):
        mine = [k for k in masks if k[0] == kind]
        good = [k for k in mine if not note_of(judged.y[masks[k]])]
        note = f"without {', '.join(k[1] for k in mine if k not in good)}" if len(good) < len(mine) else ""
        if len(good) < 2:
            good = [k for k in mine if 0 < judged.y[masks[k]].sum() < masks[k].sum()]
            note = "ineligible: fewer than two groups are large enough; all groups with both labels are taken"
        if len(good) < 2:
            why = "not available: fewer than two groups with both labels"
            out.append({"group_kind": kind, "group": "", "metric": "demographic parity difference", "value": np.nan,
                        "repeats": len(judged.called), "note": why})  # fmt: skip
            continue
        inside = np.logical_or.reduce([masks[k] for k in good])
        names = np.empty(len(judged.y), dtype=object)
        for k in good:
            names[masks[k]] = k[1]
        columns = {"y_true": judged.y[inside], "sensitive_features": names[inside].astype(str)}
        for name in CRITERIA:
            for how in HOW:
                each = [getattr(fairlearn, f"{name.replace(' ', '_')}_{how}")(y_pred=c[inside], **columns)
                        for c in judged.called]  # fmt: skip
                _, resampled = judged.mean(criterion(judged, good, name, how))
                made = stats.percentile_interval(float(np.mean(each)), resampled)
                why = note if np.isfinite(made.value) else f"not available: a ratio of rates that are all 0; {note}"
                out.append({"group_kind": kind, "group": "", "metric": f"{name} {how}", "value": made.value,
                            "std": spread(np.array(each)), "lo": made.lo, "hi": made.hi, "n": int(inside.sum()),
                            "positives": int(judged.y[inside].sum()), "repeats": len(each), "note": why})  # fmt: skip
    return out


# --- did augmentation help? -------------------------------------------------------------------------------------------
def changes(before: Judged, after: Judged, masks: Mapping[Key, np.ndarray], attributes: Sequence[str]) -> list[dict]:
    """Balanced accuracy after - before: overall, of every group, and of the worst group and the gap of each attribute.

    Both were judged on the same patients with the same draws, so the differences are paired. ValueError otherwise.
    The gap is that of two named groups (`extremes`), best minus worst: the largest difference of resampled groups is
    never below 0, so noise alone would widen it. Columns besides those of a row: before, verdict, repeats.
    """
    if not np.array_equal(before.y, after.y) or not np.array_equal(before.drawn, after.drawn):
        raise ValueError("paired differences need the same patients, the same repeats and the same seed")
    repeats, out = len(before.called), []

    def row(key: Key, what: str, a: np.ndarray, b: np.ndarray, note: str, full: bool | None = None) -> None:
        (value_b, draws_b), (value_a, draws_a) = after.mean(b), before.mean(a)
        made = stats.difference(value_b, draws_b, value_a, draws_a)
        word = verdict(made, higher_is_better=what != "gap")
        if repeats < ENOUGH_REPEATS:
            word = "undecided"
        elif full or (full is None and word == "undecided" and value_a > CEILING):
            word = "saturated"
        out.append({"group_kind": key[0], "group": key[1], "metric": what, "before": value_a, "value": made.value,
                    "lo": made.lo, "hi": made.hi, "verdict": word, "repeats": repeats, "note": note})  # fmt: skip

    for key, mask in masks.items():
        if key[0] in ("overall", *attributes):
            row(key, MAIN, before.rates[key][MAIN], after.rates[key][MAIN], note_of(before.y[mask]))
    for name in attributes:
        mine = [k for k in masks if k[0] == name]
        keys = [k for k in mine if not note_of(before.y[masks[k]])]
        note = f"without {', '.join(k[1] for k in mine if k not in keys)}" if len(keys) < len(mine) else ""
        if len(keys) < 2:
            keys = [k for k in mine if 0 < before.y[masks[k]].sum() < masks[k].sum()]
            note = "ineligible: fewer than two groups are large enough; all groups with both labels are taken"
        if len(keys) > 1:
            a, b = (np.stack([j.rates[k][MAIN] for k in keys]) for j in (before, after))  # [groups, B + 1, R]
            row((name, "worst group"), "worst group", a.min(0), b.min(0), note)
            best, worst = extremes(a, b)
            full = any((x[:, 0].mean(axis=1) > CEILING).all() for x in (a, b))
            named = "; ".join([*([note] if note else []), f"{keys[best][1]} minus {keys[worst][1]}"])
            row((name, "gap"), "gap", a[best] - a[worst], b[best] - b[worst], named, full)
    return out


def extremes(a: np.ndarray, b: np.ndarray) -> tuple[int, int]:
    """The best and the worst group of rates [groups, B + 1, R] before and after, by the sample's mean of both: to name
    them on one side alone would favour the other."""
    both = (a[:, 0] + b[:, 0]).mean(axis=1)
    return int(both.argmax()), int(len(both) - 1 - both[::-1].argmin())


def verdict(change: stats.Interval, higher_is_better: bool = True) -> str:
    """ "helped", "harmed", or "undecided" where the interval holds 0 or does not exist. (`changes` says "saturated"
    where a gain could not be seen, and "undecided" with fewer than ENOUGH_REPEATS repeats.)"""
    lo, hi = (change.lo, change.hi) if higher_is_better else (-change.hi, -change.lo)
    return "helped" if lo > 0 else "harmed" if hi < 0 else "undecided"
