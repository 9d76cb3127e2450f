"""06. Do the images show what was asked for? By judges (attributes, age, findings) and, on phantoms, by measurement."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from compdiff import fairness, stats
from compdiff.evaluate import ImageSet, Reference, draws, result
from compdiff.fairness import Key

JUDGE = "judge"  # the extractor column of these rows


def correct(predicted: Mapping[str, np.ndarray], rows: pd.DataFrame, ref: Reference) -> dict[str, np.ndarray]:
    """{attribute: 0/1 [n]}: is the judge's most likely category the requested one?"""
    asked = {a.name: rows[a.name].map(a.index).to_numpy() for a in ref.schema.attributes}
    return {name: (predicted[name].argmax(1) == want).astype(float) for name, want in asked.items()}


def alignment(s: ImageSet, ref: Reference, predicted: Mapping[str, np.ndarray], labels: tuple[str, ...], resamples: int,
              seed: int) -> list[dict]:  # fmt: skip
    """Accuracy of each attribute ("accuracy:sex") and their mean ("accuracy"), "age RMSE" in years, "AUROC:<finding>"
    and their mean ("disease AUROC") overall.

    predicted: of one judge, per head (classify.Model.predict); `labels` names the columns of its head "labels". All
    against the REQUEST of each image. Groups: overall, categories, held_out; cells for the mean accuracy only.
    """
    rows = ref.rows.iloc[s.at].reset_index(drop=True)
    drawn = draws(s, ref, resamples, seed)[0]
    counts = drawn.counts()
    hits = correct(predicted, rows, ref)
    hits = {"accuracy": np.mean(list(hits.values()), axis=0)} | {f"accuracy:{name}": h for name, h in hits.items()}
    squared = (predicted["age_years"] - rows["age_years"].to_numpy(float)) ** 2
    out = []
    for key, whole in ref.masks.items():
        mask = whole[s.at]
        if not mask.any():
            continue
        n = int(mask.sum())
        here = {"n": n, "n_ref": 0, "extractor": JUDGE, "note": fairness.images_note(n)}
        for metric, h in hits.items() if key[0] != "cell" else [("accuracy", hits["accuracy"])]:
            interval = stats.share_interval(h[mask], drawn.rows(mask))
            out.append(result("alignment", s.method, key, metric, interval, **here))
        if key[0] != "cell":
            roots = np.sqrt(stats.mean(squared[mask], counts[:, mask]))
            interval = stats.percentile_interval(np.sqrt(squared[mask].mean()), roots)
            out.append(result("alignment", s.method, key, "age RMSE", interval, **here))
    return out + findings(s, rows, predicted, labels, counts, mean="disease AUROC")


def findings(s: ImageSet, rows: pd.DataFrame, predicted: Mapping[str, np.ndarray], labels: tuple[str, ...],
             counts: np.ndarray, extractor: str = JUDGE, stage: str = "alignment",
             mean: str = "") -> list[dict]:  # fmt: skip
    """AUROC of each requested 0/1 finding; column j of predicted["labels"] [n, L] is the score of labels[j].

    mean: name of one more row, the mean over the eligible findings; a resample's value is the mean of the findings'
    values in that resample, which draws the same patients for all. A finding must be eligible among the patients of the
    requests, so that all methods are judged on the same ones, and among those whose images are resampled.
    """
    out, eligible, notes = [], {}, {}
    asked = rows["patient"].to_numpy()
    for j, label in enumerate(labels):
        y, p = rows[f"y_{label}"].to_numpy(), predicted["labels"][:, j]
        note, value = fairness.auroc_note(y, asked) or fairness.auroc_note(y, s.patients), None
        notes[label] = [note]
        if not note:
            eligible[label] = np.r_[stats.auroc(y, p), stats.auroc(y, p, counts)]
            value = stats.logit_interval(eligible[label][0], eligible[label][1:])
        out.append(result(stage, s.method, ("overall", ""), f"AUROC:{label}", value, len(y), 0, extractor, note))
    if mean and eligible:
        values, note = np.mean(list(eligible.values()), axis=0), fairness.mean_note(list(eligible), notes)
        value = stats.logit_interval(values[0], values[1:])
        out.append(result(stage, s.method, ("overall", ""), mean, value, len(rows), 0, extractor, note))
    return out


# --- measured ---------------------------------------------------------------------------------------------------------
def correlation(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Pearson correlation of x and y [n] per row of counts [R, n] -> [R]; 0 where one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    mx, my = stats.mean(x, counts), stats.mean(y, counts)
    cov = stats.mean(x * y, counts) - mx * my
    spread = np.sqrt(np.maximum((stats.mean(x * x, counts) - mx**2) * (stats.mean(y * y, counts) - my**2), 0))
    return np.divide(cov, spread, out=np.zeros_like(cov), where=spread > 1e-12)


def measured(s: ImageSet, ref: Reference, theirs: pd.DataFrame, real: pd.DataFrame, resamples: int,
             seed: int) -> list[dict]:  # fmt: skip
    """Each parameter measured on the images against the same measurement of the real image of each request.

    theirs, real: `evaluate.measure` of the set and of the reference. "r:<parameter>", "MAE:<parameter>" and
    "bias:<parameter>", the mean signed error (> 0: drawn larger than asked for); groups: overall, held out or seen. Two
    patients of one request differ by their own scatter, so the control real_train shows what can be reached.
    """
    counts = draws(s, ref, resamples, seed)[0].counts()
    keys: list[Key] = [k for k in ref.masks if k[0] in ("overall", "held_out")]
    out = []
    for name in real:
        x, y = theirs[name].to_numpy(float), real[name].to_numpy(float)[s.at]
        for key in keys:
            mask = ref.masks[key][s.at]
            n = int(mask.sum())
            if n < 2:
                continue
            c, here = counts[:, mask], {"n": n, "n_ref": n, "extractor": "pixels", "note": fairness.images_note(n)}
            r = correlation(x[mask], y[mask], np.vstack([np.ones(n), c]))
            out.append(result("measured", s.method, key, f"r:{name}", stats.percentile_interval(r[0], r[1:]), **here))
            for metric, error in (("MAE", np.abs(x - y)[mask]), ("bias", (x - y)[mask])):
                interval = stats.percentile_interval(error.mean(), stats.mean(error, c))
                out.append(result("measured", s.method, key, f"{metric}:{name}", interval, **here))
    return out
