"""06. Rows of stage "judges": what networks from outside (data_manifests/weights.yaml) say of the same sets.

They stand in a stage of their own, because their FID is another FID than the main extractor's. Each judge's score on
real test images (method real_test) belongs beside its opinion. Absent weights give rows without a value that say how to
obtain them; a wrong file is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from compdiff import alignment, controls, evaluate, fairness, features, stats
from compdiff.evaluate import ImageSet, Reference, draws, result
from compdiff.weights import Entry, NotAvailable, entries, standing, weight_file

STAGE = "judges"
OUTPUT_OF = {"Pleural Effusion": "Effusion"}  # our label -> the judge's output, where the names differ
Describe = Callable[[str, ImageSet], np.ndarray]  # (judge, set) -> features float32 [n, d], e.g. from features.cached


@dataclass(frozen=True)
class Judge:
    """An entry of the list with the metrics it is asked for and the folder of its file."""

    entry: Entry
    metrics: list[str]
    weights: str


def metrics_of(known: Entry, ref: Reference, labels: Sequence[str]) -> list[str]:
    """The metrics that this judge can give for this dataset; () = nothing of what it judges is there."""
    if known.judges == "findings":
        return [f"AUROC:{label}" for label in labels if OUTPUT_OF.get(label, label) in known.outputs]
    attributes = {"sex": "accuracy:sex", "race": "accuracy:race", "age": "age RMSE"}
    if known.judges in attributes:
        return [attributes[known.judges]] if known.judges in ref.schema.names else []
    return {"image quality": ["FID", "KID"], "paired similarity": ["cosine paired"]}[known.judges]


def outside(sets: Sequence[ImageSet], ref: Reference, labels: Sequence[str], modality: str, describe: Describe,
            weights: str, resamples: int, seed: int, dataset: str = "") -> list[dict]:  # fmt: skip
    """Rows of every judge and extractor of the list but the main one (`ref.extractor`), for all sets; real_test should
    be among them.

    weights: folder of the files ("" = the default). A file whose hash is not listed is named in the notes, and so is a
    judge that was trained on `dataset` (its manifest's name), whose images it may know.
    ValueError: a file that is not what the list says.
    """
    out = []
    for name, known in entries().items():
        wanted = metrics_of(known, ref, labels)
        if name == ref.extractor.partition("@")[0] or known.images not in ("any", modality) or not wanted:
            continue
        try:
            sure = standing(name, weight_file(name, weights))
        except NotAvailable as error:
            absent = {"n_ref": 0, "extractor": name, "note": error.note}
            everyone = [(s, m) for s in sets for m in wanted]
            out += [result(STAGE, s.method, ("overall", ""), m, None, len(s.at), **absent) for s, m in everyone]
            continue
        judge, judged = Judge(known, wanted, weights), OPINIONS.get(known.judges, category)
        real = replace(ref, features=describe(name, controls.real_test(ref)), extractor=name)
        for s in sets:
            rows = judged(replace(s, features=describe(name, s)), real, judge, resamples, seed)
            unsure = "" if sure == "verified" else f"weights {sure}"
            inside = f"trained on {dataset} itself" if dataset in known.trained_on else ""
            out += [r | {"note": "; ".join(filter(None, (r["note"], unsure, inside)))} for r in rows]
    return out


def cloud(s: ImageSet, real: Reference, judge: Judge, resamples: int, seed: int) -> list[dict]:
    """FID and KID in this extractor's features, overall and per group."""
    rows = evaluate.distances(s, real, resamples, seed)
    return [r | {"stage": STAGE} for r in rows if r["metric"] in judge.metrics]


def paired(s: ImageSet, real: Reference, judge: Judge, resamples: int, seed: int) -> list[dict]:
    """Mean cosine of each image's embedding with that of the real image of the same request, per group but cells."""
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (s.features, real.features[s.at]))
    cosine, counts, out = (a * b).sum(1), draws(s, real, resamples, seed)[0].counts(), []
    for key, whole in real.masks.items():
        mask = whole[s.at]
        if key[0] != "cell" and mask.any():
            interval = stats.percentile_interval(cosine[mask].mean(), stats.mean(cosine[mask], counts[:, mask]))
            n, metric = int(mask.sum()), judge.metrics[0]
            out.append(result(STAGE, s.method, key, metric, interval, n, n, real.extractor, fairness.images_note(n)))
    return out


def findings(s: ImageSet, real: Reference, judge: Judge, resamples: int, seed: int) -> list[dict]:
    """AUROC of each requested finding that is among the judge's outputs."""
    labels = tuple(m.removeprefix("AUROC:") for m in judge.metrics)
    at = [judge.entry.outputs.index(OUTPUT_OF.get(label, label)) for label in labels]
    scores = {"labels": features.logits(s.features, real.extractor, judge.weights)[:, at]}
    counts = draws(s, real, resamples, seed)[0].counts()
    return alignment.findings(s, real.rows.iloc[s.at], scores, labels, counts, real.extractor, STAGE)


def category(s: ImageSet, real: Reference, judge: Judge, resamples: int, seed: int) -> list[dict]:
    """Accuracy of an attribute, over the requests whose category is one of the judge's answers."""
    asked = real.rows[judge.entry.judges].to_numpy(str)[s.at]
    said = np.array(judge.entry.outputs)[features.logits(s.features, real.extractor, judge.weights).argmax(1)]
    answerable = np.isin(asked, judge.entry.outputs)
    right = (said == asked)[answerable].astype(float)
    drawn = draws(s, real, resamples, seed)[0].rows(answerable)
    left_out = sorted(set(asked[~answerable]))
    note = f"without {', '.join(left_out)}, no answer of this judge" if left_out else ""
    value = stats.share_interval(right, drawn) if len(right) else None
    return [result(STAGE, s.method, ("overall", ""), judge.metrics[0], value, len(right), 0, real.extractor, note)]


OPINIONS = {"image quality": cloud, "paired similarity": paired, "findings": findings}
