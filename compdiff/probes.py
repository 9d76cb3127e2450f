"""06. Rows of stage "probe": is a two-category attribute of the request read off the images by a linear probe?

A judge trained end to end reads what training shows it. Where one attribute almost implies another (women hardly ever
imaged AP), it takes the one for the other. A linear probe (Alain and Bengio 2016) is a logistic regression on the
extractor's frozen features z, standardised,

    P(y = 1 | z) = 1 / (1 + exp(-(w.z + b))),  w, b = argmin |w|^2 / 2 - C sum_i c_i log P(y_i | z_i),

where c_i lets both classes weigh the same. It needs few images, so one can be trained WITHIN a category of the other
attribute, where that shortcut does not exist. AUROC needs no threshold, so a shift of all scores between real and
generated images costs nothing. On NIH the AUROCs within PA move by at most 0.04 for C between 1e-4 and 1e-2.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from compdiff import stats
from compdiff.attributes import Attribute, Schema
from compdiff.evaluate import ImageSet, Reference, draws, result
from compdiff.fairness import MIN_CLASS, MIN_IMAGES, Key
from compdiff.probe_report import BLIND, STAGE

C = 1e-3  # inverse strength of L2: features outnumber the images by far; one value for all strata and datasets
# Their images are the ones that the probe was trained on: it knows them, and their score would say nothing.
LEFT_OUT = ("real_train", "copy")


def strata(schema: Schema) -> list[tuple[Attribute, Key]]:
    """Every two-category attribute, overall and within each category of every other such attribute."""
    two = [a for a in schema.attributes if len(a) == 2]
    return [(a, key) for a in two
            for key in [("overall", ""), *((b.name, c) for b in two if b is not a for c in b.categories)]]  # fmt: skip


def inside(rows: pd.DataFrame, key: Key) -> np.ndarray:
    """bool [n]: rows of the stratum, by their (requested) category."""
    return np.ones(len(rows), bool) if key[0] == "overall" else (rows[key[0]] == key[1]).to_numpy()


def too_few(rows: pd.DataFrame, attribute: Attribute, whose: str) -> list[str]:
    """Which classes have fewer than MIN_CLASS patients: ["5 training patients of Female < 10"]."""
    people = {c: rows.loc[rows[attribute.name] == c, "patient"].nunique() for c in attribute.categories}
    return [f"{n} {whose} patients of {c} < {MIN_CLASS}" for c, n in people.items() if n < MIN_CLASS]


def fit(features: np.ndarray, y: np.ndarray) -> Pipeline:
    """The probe of labels y (0/1, [n]) on features [n, d]."""
    model = LogisticRegression(C=C, class_weight="balanced", max_iter=3000)
    return make_pipeline(StandardScaler(), model).fit(features.astype(np.float64), y)


def interval(y: np.ndarray, score: np.ndarray, drawn: stats.Resamples) -> stats.Interval:
    """AUROC of scores [n] against 0/1 labels [n], resampled by patient, on the logit scale.

    Of exactly 1 (or 0), which no resample can vary, the other end is that of the Jeffreys interval over the disjoint
    pairs of a patient of each class: all of them are hits.
    """
    value = float(stats.auroc(y, score)[0])
    if value not in (0, 1):
        return stats.logit_interval(value, stats.auroc(y, score, drawn.counts()))
    pairs = min(len(np.unique(drawn.patient[y == k])) for k in (0, 1))
    wide = stats.jeffreys(pairs * value, pairs)
    return stats.Interval(value, wide.lo if value else 0.0, 1.0 if value else wide.hi)


def probed(sets: Sequence[ImageSet], ref: Reference, train: pd.DataFrame, features: np.ndarray, resamples: int,
           seed: int) -> list[dict]:  # fmt: skip
    """AUROC:<attribute> of the REQUESTED category, per stratum (`strata`) and set but LEFT_OUT; notes say on how many
    patients it rests, and of real_test whether the probe is blind.

    train: the training rows with columns `patient` and the attributes; features: theirs [m, d], of ref.extractor.
    """
    out = []
    for attribute, key in strata(ref.schema):
        here = inside(train, key)
        own, last = train[here], attribute.categories[1]
        lacks = too_few(own, attribute, "training")
        probe = None if lacks else fit(features[here], (own[attribute.name] == last).to_numpy(int))
        basis = f"probe of {len(own)} training images of {own['patient'].nunique()} patients"
        for s in sets:
            if s.method in LEFT_OUT:
                continue
            rows = ref.rows.iloc[s.at]
            mask = inside(rows, key)
            asked, n = rows[mask], int(mask.sum())
            few = [*lacks, *too_few(asked, attribute, "reference"), *([f"n = {n} < {MIN_IMAGES}"] * (n < MIN_IMAGES))]
            value, note = None, f"ineligible: {'; '.join(few)}"
            if not few:
                score = probe.decision_function(s.features[mask].astype(np.float64))  # log-odds: ranks as P(y = 1 | z)
                y = (asked[attribute.name] == last).to_numpy(int)
                value = interval(y, score, draws(s, ref, resamples, seed)[0].rows(mask))
                blind = s.method == "real_test" and not value.lo > 0.5
                note = f"{n} images of {asked['patient'].nunique()} patients; {basis}" + f"; {BLIND}" * blind
            out.append(result(STAGE, s.method, key, f"AUROC:{attribute.name}", value, n, 0, ref.extractor, note))
    return out
