"""06. Differences between two methods that answered the same requests: each minus every later one; around 0: noise.

What the requests' patients vary by is common to both, so their difference varies less than either of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from compdiff import clouds, stats
from compdiff.alignment import JUDGE, correct
from compdiff.evaluate import Halves, ImageSet, Reference, draws, few_images, kid_of, result
from compdiff.stats import Interval


def row(a: str, metric: str, b: str, value: Interval | None, n: int, n_ref: int, extractor: str,
        note: str = "") -> dict:  # fmt: skip
    return result("difference", a, ("overall", ""), f"{metric} minus {b}", value, n, n_ref, extractor, note)


def kid(sets: Sequence[ImageSet], ref: Reference, resamples: int, seed: int) -> list[dict]:
    """Over the same resampled patients."""
    of = {s.method: kid_of(s, ref, np.ones(len(s.at), bool), *draws(s, ref, resamples, seed)) for s in sets}
    n = len(ref.rows)
    return [row(a, "KID", b, stats.difference(*of[a], *of[b]), n, n, ref.extractor) for a, b in combinations(of, 2)]


def fid(sets: Sequence[ImageSet], ref: Reference, halves: Mapping[str, Halves | None]) -> list[dict]:
    """FID_a - FID_b +- t std of that difference over the same random halves of the patients.

    halves: `evaluate.fid_of` each method, of one seed. No value, but the reason, where a set holds too few images.
    """
    n, out = len(ref.rows), []
    few = {s.method: few_images(s, ref, np.ones(len(s.at), bool)) for s in sets}
    for a, b in combinations(few, 2):
        note, value = few[a] or few[b], None
        if not note:
            (x, x_halves), (y, y_halves) = halves[a], halves[b]
            value = clouds.halves_interval(x - y, x_halves - y_halves, least=-np.inf)
        out.append(row(a, "FID", b, value, n, n, ref.extractor, note))
    return out


def accuracy(sets: Sequence[ImageSet], ref: Reference, predicted: Mapping[str, Mapping[str, np.ndarray]],
             resamples: int, seed: int) -> list[dict]:  # fmt: skip
    """Of each attribute, and of their mean, over the same resampled patients. predicted: by method."""
    of: dict[str, dict[str, tuple[float, np.ndarray]]] = {}  # metric -> method -> value, resampled values
    for s in sets:
        hits = correct(predicted[s.method], ref.rows.iloc[s.at], ref)
        hits = {"accuracy": np.mean(list(hits.values()), axis=0)} | {f"accuracy:{k}": h for k, h in hits.items()}
        counts = draws(s, ref, resamples, seed)[0].counts()
        for metric, h in hits.items():
            of.setdefault(metric, {})[s.method] = (h.mean(), stats.mean(h, counts))
    return [row(a, metric, b, stats.difference(*one[a], *one[b]), len(ref.rows), 0, JUDGE)
            for metric, one in of.items() for a, b in combinations(one, 2)]  # fmt: skip
