"""07. Downstream classifiers: fit once per strategy and generator, keep the predictions, judge them overall and per group.

The first label of the manifest is the task by which disparities are told: "No Finding" (chest) or glaucoma (fundus).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import precision_recall_curve

from compdiff import classify, downstream, fairness, record, sample, stats
from compdiff.datasets import Data
from compdiff.evaluate import Key, read_rows, result
from compdiff.stats import Resamples

REAL = "real_train"  # the `method` of a strategy without synthetic images
HEALTHY = "No Finding"


def binary(table: pd.DataFrame, labels: Sequence[str]) -> pd.DataFrame:
    """The table with every label as 0/1: a graded label becomes "any grade above its first"."""
    return table.assign(**{f"y_{name}": (table[f"y_{name}"].astype(float) > 0).astype(int) for name in labels})


def read_set(folder: Path, heads: Mapping[str, classify.Head], labels: Sequence[str]) -> downstream.Set:
    """A generated set as images and targets: the labels are those that its prompts asked for."""
    rows = binary(read_rows(folder), labels)
    return sample.read_images(folder, rows["id"].tolist()), classify.encode(rows, heads)


def fits(strategies: Sequence[str], generators: Sequence[str]) -> Iterator[tuple[downstream.Strategy, str]]:
    """(strategy, method) of every classifier to train: one per generator, and one in all where nothing synthetic is used."""
    for name in strategies:
        if name not in downstream.STRATEGIES:
            raise ValueError(f"unknown strategy {name!r}; known: {', '.join(downstream.STRATEGIES)}")
        strategy = downstream.STRATEGIES[name]
        yield from ((strategy, method) for method in (generators if strategy.synthetic else [REAL]))


def predict_once(folder: Path, train: downstream.Set, val: downstream.Set, heads: Mapping[str, classify.Head],
                 training: classify.Training, seed: int, judged: pd.DataFrame, images: np.ndarray) -> pd.DataFrame:  # fmt: skip
    """Fit on `train`, predict `judged` (rows of val and test, in the order of `images`); `folder`/predictions.csv outlives the model.

    Read back when it was made from the same arrays, recipe and seed.
    """
    inputs = {"train": array_sha256(*train), "val": array_sha256(*val), "judged": array_sha256(images, {}),
              "recipe": record.sha256_json([str(training), [str(h) for h in heads.values()], judged["id"].tolist()]), "seed": seed,
              "code": record.source_sha256(Path(classify.__file__))}  # fmt: skip
    file = Path(folder) / "predictions.csv"
    if not record.is_current(folder, inputs):
        with record.run_json(folder, inputs, seeds=[seed]) as run:
            model = classify.fit(*train, *val, heads, training, seed)
            with record.atomic(file) as temporary:
                downstream.predictions(model, images, judged).to_csv(temporary, index=False, float_format="%.6g")
            run.outputs.append(file)
    return pd.read_csv(file, dtype={"id": str, "patient": str}, keep_default_na=False)


def array_sha256(images: np.ndarray, targets: Mapping[str, np.ndarray]) -> str:
    """Hash of a set's images and targets."""
    parts = [("images", images), *sorted(targets.items())]
    return record.sha256_json([[name, a.shape, str(a.dtype), hashlib.sha256(np.ascontiguousarray(a)).hexdigest()] for name, a in parts])


def threshold(y: np.ndarray, p: np.ndarray) -> float:
    """The score from which F1 is largest; 0.5 where there is no positive."""
    if not (y == 1).any():
        return 0.5
    precision, recall, cut = precision_recall_curve(y, p)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return float(cut[np.argmax(f1[:-1])])


# --- rows ----------------------------------------------------------------------------------------------------------------
def judge(name: tuple[str, str], table: pd.DataFrame, val: pd.DataFrame, masks: Mapping[Key, np.ndarray], attributes: Sequence[str],
          labels: Sequence[str], resamples: int, seed: int) -> list[dict]:  # fmt: skip
    """All rows of one classifier. name: (strategy, method); table, val: real rows with y_<label> and p_<label>; masks [n] of table.

    AUROC:<label>, AUPRC:<label>, their means over eligible labels ("macro AUROC"); per attribute gaps and ES-AUROC; underdiagnosis.
    """
    setting, method = name
    drawn = stats.resample_patients(table["patient"], resamples, seed)
    kinds = (*attributes, "held_out")
    groups = {k: m for k, m in masks.items() if k[0] in ("overall", *kinds) and m.any()}
    curves = {(k, label): scores(table[m], label, drawn.rows(m)) for k, m in groups.items() for label in labels}
    out = []
    for (key, label), (note, values) in curves.items():
        n = int(groups[key].sum())
        for metric in ("AUROC", "AUPRC"):
            value = None if note else stats.percentile_interval(values[metric][0], values[metric][1:])
            out.append(result("downstream", method, key, f"{metric}:{label}", value, n, 0, note=note, setting=setting))
    out += macro(curves, groups, ("overall", *kinds), labels, name)
    for kind in attributes:
        out += disparity(out, kind, [f"AUROC:{label}" for label in labels] + ["macro AUROC"], name)
    return out + missed(table, val, groups, attributes, labels, name)


def scores(table: pd.DataFrame, label: str, drawn: Resamples) -> tuple[str, dict[str, np.ndarray]]:
    """("" or why ineligible, {metric: [1 + R] the value and its resamples}) of one label in one group."""
    y, p = table[f"y_{label}"].to_numpy(), table[f"p_{label}"].to_numpy(float)
    if note := fairness.auroc_note(y):
        return note, {}
    counts = np.vstack([np.ones(len(y), np.float32), drawn.counts()])
    return "", {"AUROC": stats.auroc(y, p, counts), "AUPRC": stats.auprc(y, p, counts)}


def macro(curves: Mapping, groups: Mapping[Key, np.ndarray], kinds: Sequence[str], labels: Sequence[str],
          name: tuple[str, str]) -> list[dict]:  # fmt: skip
    """Means over labels. Groups of one kind are compared on the labels that are eligible in ALL of them."""
    setting, method = name
    out = []
    for kind in kinds:
        keys = [k for k in groups if k[0] == kind]
        shared = [label for label in labels if all(not curves[k, label][0] for k in keys)]
        note = f"mean of {', '.join(shared)}" if shared else "ineligible: no label has enough of both classes in every group"
        for key in keys:
            for metric in ("AUROC", "AUPRC"):
                value = None
                if shared:
                    mean = np.mean([curves[key, label][1][metric] for label in shared], axis=0)
                    value = stats.percentile_interval(mean[0], mean[1:])
                n = int(groups[key].sum())
                out.append(result("downstream", method, key, f"macro {metric}", value, n, 0, note=note, setting=setting))
    return out


def disparity(rows: Sequence[dict], kind: str, metrics: Sequence[str], name: tuple[str, str]) -> list[dict]:
    """"gap <metric>" (largest minus smallest), "gap90 <metric>" (90th minus 10th percentile), "std <metric>" (over the overall value)
    and "ES-<metric>" over the eligible groups of an attribute; ineligible groups are named in the note.
    """
    setting, method = name
    out = []
    for metric in metrics:
        mine = [r for r in rows if r["metric"] == metric]
        whole = next(r for r in mine if r["group_kind"] == "overall")
        parts = [r for r in mine if r["group_kind"] == kind]
        good = [r["value"] for r in parts if np.isfinite(r["value"])]
        left = [r["group"] for r in parts if not np.isfinite(r["value"])]
        note = f"without {', '.join(left)} (ineligible)" if left else ""
        if len(good) < 2 or not np.isfinite(whole["value"]):
            found, note = dict.fromkeys(("gap", "gap90", "std", "ES")), "ineligible: fewer than two eligible groups"
        else:
            gaps = fairness.gaps(whole["value"], good)
            found = {"gap": gaps["max-min"], "gap90": gaps["p90-p10"], "std": gaps["std/overall"]}
            found["ES"] = fairness.es_metric(whole["value"], good)
        out += [result("downstream", method, (kind, ""), f"ES-{metric}" if what == "ES" else f"{what} {metric}", value, whole["n"], 0,
                       note=note, setting=setting) for what, value in found.items()]  # fmt: skip
    return out


def missed(table: pd.DataFrame, val: pd.DataFrame, groups: Mapping[Key, np.ndarray], attributes: Sequence[str], labels: Sequence[str],
           name: tuple[str, str]) -> list[dict]:  # fmt: skip
    """"underdiagnosis" per group: ill patients called healthy, at the threshold of the largest F1 on real validation images; its gaps.

    Healthy: No Finding, or else the absence of the first label.
    """
    setting, method = name
    label = HEALTHY if HEALTHY in labels else labels[0]
    cut = threshold(val[f"y_{label}"].to_numpy(), val[f"p_{label}"].to_numpy(float))
    healthy, called = table[f"y_{label}"].to_numpy(), (table[f"p_{label}"].to_numpy(float) >= cut).astype(int)
    if label != HEALTHY:
        healthy, called = 1 - healthy, 1 - called
    what = f"FPR of {label}" if label == HEALTHY else f"missed {label}"
    out, rates = [], {}
    for key, mask in groups.items():
        rate = fairness.underdiagnosis(healthy[mask], called[mask])
        rates[key] = rate
        out.append(result("downstream", method, key, "underdiagnosis", None if rate.note else rate.interval, rate.negatives, 0,
                          note=rate.note or what, setting=setting))  # fmt: skip
    for kind in attributes:
        good = [r.interval.value for k, r in rates.items() if k[0] == kind and not r.note]
        value = fairness.gaps(rates["overall", ""].interval.value, good)["max-min"] if len(good) > 1 else None
        note = what if len(good) > 1 else "ineligible: fewer than two eligible groups"
        out.append(result("downstream", method, (kind, ""), "gap underdiagnosis", value, len(table), 0, note=note, setting=setting))
    return out


def against_real(tables: Mapping[tuple[str, str], pd.DataFrame], labels: Sequence[str], resamples: int, seed: int) -> list[dict]:
    """Macro AUROC of each classifier minus that of strategy 1a, on the same resampled patients; an interval around 0 is noise."""
    means = {}
    for name, table in tables.items():
        drawn = stats.resample_patients(table["patient"], resamples, seed)
        good = [v["AUROC"] for note, v in (scores(table, label, drawn) for label in labels) if not note]
        means[name] = np.mean(good, axis=0) if good else None
    base = means.get(("1a", REAL))
    return [result("difference", name[1], ("overall", ""), "macro AUROC minus 1a", stats.difference(m[0], m[1:], base[0], base[1:]),
                   len(tables[name]), 0, setting=name[0])
            for name, m in means.items() if base is not None and m is not None and name != ("1a", REAL)]  # fmt: skip


def judged_rows(data: Data) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Real rows that every classifier predicts: (val, test and zero_shot)."""
    table = binary(data.table, data.label_names)
    test = table["split"].isin(["test", "zero_shot"])
    return table[table["split"] == "val"].reset_index(drop=True), table[test].reset_index(drop=True)
