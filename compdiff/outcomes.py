"""07. Predictions -> tidy rows: one classifier on one test set, overall and per group.

Everything here is computed from saved predictions. The first label of the manifest ("No Finding", or glaucoma) is the
task by which decisions are compared between intersections of attributes. A group that is ineligible (fairness.py) has
rows without a value; their notes say why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from compdiff import fairness, scores, stats
from compdiff.datasets import Data
from compdiff.downstream import Judged
from compdiff.evaluate import result
from compdiff.fairness import HEALTHY, Key, disparity_label
from compdiff.stats import CURVES

CALLED = ("F1", "balanced accuracy", "ECE")  # at the validation threshold, or (ECE) of the probabilities
ES = {"ES-{}": "sum", "ES-{}-mean": "mean"}  # name of an equity-scaled metric: how the groups' deviations combine
AT_HALF = "threshold 0.5: no validation image has the label"
FEWER = "; its interval counts the ill patients, who are fewer than their images"
Name = tuple[str, str]  # (setting, method)
SPREADS = {"gap": "max-min", "gap90": "p90-p10", "std": "std/overall", "range": "max-min/overall"}  # as fairness.gaps
Curves = dict[tuple[Key, str], tuple[str, dict[str, np.ndarray]]]  # group, label -> ("" or why not, metric -> [1 + R])


# --- groups and thresholds --------------------------------------------------------------------------------------------
def groups_of(data: Data, rows: pd.DataFrame, conditions: bool = False) -> dict[Key, np.ndarray]:
    """Masks [n] of everything a classifier is judged on: overall, attributes, held_out, intersections of two and three
    attributes and, with `conditions`, each value of each label (kind = the label; FairDiffusion's groups).
    """
    masks = {k: m for k, m in data.group_masks(rows).items() if k[0] != "cell"}
    masks |= fairness.intersections(masks, data.schema.names)
    masks |= fairness.conditions(rows, data.manifest.labels) if conditions else {}
    return {k: m for k, m in masks.items() if m.any()}


def threshold(y: np.ndarray, p: np.ndarray) -> float:
    """The score from which F1 is largest; 0.5 where there is no positive."""
    return scores.f1_threshold(y, p) if (y == 1).any() else 0.5


def without_threshold(val: pd.DataFrame, labels: Sequence[str]) -> list[str]:
    """Labels that no validation image has, so that no F1 can choose their threshold."""
    return [label for label in labels if not (val[f"y_{label}"] == 1).any()]


# --- one classifier ---------------------------------------------------------------------------------------------------
def rows_of(judged: Judged, resamples: int, seed: int) -> list[dict]:
    """All rows of one classifier on one test set, and how it was trained ("epochs trained": the note says its start).

    Labels that the test set does not have are not judged; without any, one row says so.
    """
    j, name = judged, (judged.setting, judged.method)
    masks = groups_of(j.data, j.table, conditions=bool(j.task))
    names = j.data.schema.names
    stage = "tasks" if j.task else "downstream"
    about = result(stage, j.method, ("overall", ""), "epochs trained", j.epochs, len(j.table), 0, j.network, j.start,
                   j.setting)  # fmt: skip
    if j.task:
        return [*judge_task(name, j.task, j.table, masks, names, resamples, seed, j.network),
                about | {"metric": f"epochs trained:{j.task}"}]  # fmt: skip
    labels = [c[2:] for c in j.val if c.startswith("p_") and f"y_{c[2:]}" in j.table]
    if not labels:
        return [about, missing(j.setting, j.method, "not available: the test set has none of the labels")]
    return [*judge(name, j.table, j.val, masks, names, labels, resamples, seed), about]


def missing(setting: str, method: str, note: str) -> dict:
    """The row of a classifier, or of a test set, that is not there."""
    return row((setting, method), ("overall", ""), "macro AUROC", None, 0, note)


def row(name: Name, key: Key, metric: str, value: float | stats.Interval | None, n: int, note: str = "") -> dict:
    return result("downstream", name[1], key, metric, value, n, 0, note=note, setting=name[0])


def judge(name: Name, table: pd.DataFrame, val: pd.DataFrame, masks: Mapping[Key, np.ndarray],
          attributes: Sequence[str], labels: Sequence[str], resamples: int, seed: int) -> list[dict]:  # fmt: skip
    """All rows of one classifier. table, val: rows with y_<label> and p_<label>; masks [n] of table.

    Per group AUROC, AUPRC, F1, balanced accuracy and ECE of each label and their means over labels ("macro AUROC"); per
    kind of group its gaps and ES-AUROC, parity of decisions, underdiagnosis. Of intersections, of which there are many
    and which hold few, only the AUROC of the disparity label, its gaps and parity, and underdiagnosis.
    """
    joint = tuple(dict.fromkeys(k[0] for k in masks if " x " in k[0]))
    kinds = ("overall", *attributes, "held_out")
    groups = {k: m for k, m in masks.items() if k[0] in (*kinds, *joint) and m.any()}
    single = {k: m for k, m in groups.items() if k[0] in kinds}
    cuts = {label: threshold(val[f"y_{label}"].to_numpy(), val[f"p_{label}"].to_numpy(float)) for label in labels}
    drawn = stats.resample_patients(table["patient"], resamples, seed)
    blind = without_threshold(val, labels)
    curves = rankings(table, single, labels, drawn)
    decide(curves, table, single, labels, cuts, drawn)
    one = disparity_label(labels)
    curves |= rankings(table, {k: m for k, m in groups.items() if k[0] in joint}, [one], drawn)
    out = label_rows(curves, groups, name, blind)
    out += macro(curves, single, kinds, name, blind=blind)
    for kind in attributes:
        out += disparity(out, kind, [f"AUROC:{label}" for label in labels], name)
        out += disparity(out, kind, ["macro AUROC"], name, curves)
    for kind in joint:
        out += disparity(out, kind, [f"AUROC:{one}"], name)
    out += parity_rows(table, groups, attributes, joint, labels, cuts, name, blind)
    return out + missed(table, val, groups, (*attributes, *joint), labels, name)


def rankings(table: pd.DataFrame, groups: Mapping[Key, np.ndarray], labels: Sequence[str],
             drawn: stats.Resamples) -> Curves:  # fmt: skip
    """AUROC and AUPRC of every group and label with their resamples, or why they are ineligible."""
    y = table[[f"y_{label}" for label in labels]].to_numpy(int)
    p = table[[f"p_{label}" for label in labels]].to_numpy(float)
    notes = {(k, label): fairness.auroc_note(y[m, i], drawn.patient[m])
             for k, m in groups.items() for i, label in enumerate(labels)}  # fmt: skip
    good = {k: m for k, m in groups.items() if not all(notes[k, label] for label in labels)}
    found = {m: stats.bootstrap(m, y, p, good, drawn) for m in CURVES} if good else {}
    place = {k: g for g, k in enumerate(good)}
    out: Curves = {}
    for (key, label), note in notes.items():
        i = labels.index(label)
        out[key, label] = note, {} if note else {
            m: np.r_[whole[place[key], i], parts[:, place[key], i]] for m, (whole, parts) in found.items()}  # fmt: skip
    return out


def decide(curves: Curves, table: pd.DataFrame, groups: Mapping[Key, np.ndarray], labels: Sequence[str],
           cuts: Mapping[str, float], drawn: stats.Resamples) -> None:  # fmt: skip
    """Add F1 and balanced accuracy at the labels' thresholds, and ECE, to the eligible entries of `curves`."""
    for key, mask in groups.items():
        counts = np.vstack([np.ones(int(mask.sum()), np.float32), drawn.rows(mask).counts()])
        for label in labels:
            note, values = curves[key, label]
            if not note:
                y, p = table[f"y_{label}"].to_numpy()[mask], table[f"p_{label}"].to_numpy(float)[mask]
                table_of = scores.confusion(y, (p >= cuts[label]).astype(int), counts)
                values |= {"F1": table_of.f1, "balanced accuracy": table_of.balanced_accuracy}
                values["ECE"] = scores.ece(y, p)  # without resamples: a resample's ECE is biased upwards


def label_rows(curves: Curves, groups: Mapping[Key, np.ndarray], name: Name, blind: Sequence[str] = ()) -> list[dict]:
    """<metric>:<label> of every group; of intersections AUROC only. blind: labels of `without_threshold`."""
    out = []
    for (key, label), (note, values) in curves.items():
        for metric in ("AUROC",) if " x " in key[0] else (*CURVES, *CALLED):
            value = None if note else interval_of(metric, values[metric])
            what = note or ("10 bins of equal width" if metric == "ECE" else "")
            what = what or (AT_HALF if metric in CALLED and label in blind else "")
            out.append(row(name, key, f"{metric}:{label}", value, int(groups[key].sum()), what))
    return out


def interval_of(metric: str, values: np.ndarray) -> stats.Interval | float:
    """[1 + R]: the value and its resamples, or the value alone. AUROC and AUPRC on the logit scale, see stats.py."""
    interval = stats.logit_interval if metric in CURVES else stats.percentile_interval
    return interval(values[0], values[1:]) if len(values) > 1 else float(values[0])


def shared_labels(curves: Curves, kind: str) -> list[str]:
    """Labels that are eligible in every group of a kind."""
    here = [(label, note) for (key, label), (note, _) in curves.items() if key[0] == kind]
    return [label for label in dict.fromkeys(x for x, _ in here) if not any(note for x, note in here if x == label)]


def macro(curves: Curves, groups: Mapping[Key, np.ndarray], kinds: Sequence[str], name: Name,
          metrics: Sequence[str] = (*CURVES, *CALLED), blind: Sequence[str] = ()) -> list[dict]:  # fmt: skip
    """Means over labels. Groups of one kind are compared on the labels that are eligible in ALL of them. blind: labels
    of `without_threshold`, which the notes of what needs one name."""
    out = []
    for kind in kinds:
        keys, shared = [k for k in groups if k[0] == kind], shared_labels(curves, kind)
        why: dict[str, list[str]] = {}
        for (key, label), (reason, _) in curves.items():
            why.setdefault(label, []).extend([reason] if key[0] == kind else [])
        why_not = "ineligible: no label has enough of both classes in every group"
        note = fairness.mean_note(shared, why) if shared else why_not
        for key in keys:
            for metric in metrics:
                mean = np.mean([curves[key, label][1][metric] for label in shared], axis=0) if shared else None
                value = None if mean is None else interval_of(metric, mean)
                here = [x for x in shared if x in blind] if metric in CALLED and metric != "ECE" else []
                what = "; ".join(filter(None, [note, *[f"{AT_HALF} ({', '.join(here)})"] * bool(here)]))
                out.append(row(name, key, f"macro {metric}", value, int(groups[key].sum()), what))
    return out


def disparity(rows: Sequence[dict], kind: str, metrics: Sequence[str], name: Name,
              curves: Curves | None = None) -> list[dict]:  # fmt: skip
    """"gap <metric>" (largest minus smallest), "gap90 <metric>" (90th minus 10th percentile), "std <metric>" and
    "range <metric>" (standard deviation and largest minus smallest, both over the overall value), "ES-<metric>" (its
    deviations added) and "ES-<metric>-mean" (averaged) over the eligible groups of a kind; ineligible groups are named
    in the note.

    curves, for a mean over labels: the overall value is then that of the labels which the groups are compared on.
    """
    out = []
    for metric in metrics:
        mine = [r for r in rows if r["metric"] == metric]
        whole = next(r for r in mine if r["group_kind"] == "overall")
        if curves and (shared := shared_labels(curves, kind)):
            same = [curves[("overall", ""), label][1]["AUROC"][0] for label in shared]
            whole = whole | {"value": float(np.mean(same))}
        parts = [r for r in mine if r["group_kind"] == kind]
        good = [r["value"] for r in parts if np.isfinite(r["value"])]
        left = [r["group"] for r in parts if not np.isfinite(r["value"])]
        note = f"without {', '.join(left)} (ineligible)" if left else ""
        if len(good) < 2 or not np.isfinite(whole["value"]):
            found, note = dict.fromkeys((*SPREADS, *ES)), "ineligible: fewer than two eligible groups"
        else:
            gaps = fairness.gaps(whole["value"], good)
            found = {what: gaps[how] for what, how in SPREADS.items()}
            found |= {e: fairness.es_metric(whole["value"], good, combine=how) for e, how in ES.items()}
        titles = {what: f"{what} {metric}" for what in found} | {e: e.format(metric) for e in ES}
        out += [row(name, (kind, ""), titles[what], value, whole["n"], note) for what, value in found.items()]
    return out


def parity_rows(table: pd.DataFrame, groups: Mapping[Key, np.ndarray], attributes: Sequence[str], joint: Sequence[str],
                labels: Sequence[str], cuts: Mapping[str, float], name: Name,
                blind: Sequence[str] = ()) -> list[dict]:  # fmt: skip
    """Demographic parity, equalized odds and equal opportunity, as difference and ratio, at the validation threshold.

    Every label between the categories of each attribute, and the disparity label between intersections.
    """
    out = []
    for kind in (*attributes, *joint):
        member = np.full(len(table), "", dtype=object)
        for key, mask in groups.items():
            if key[0] == kind:
                member[mask] = key[1]
        for label in labels if kind in attributes else [disparity_label(labels)]:
            called = (table[f"p_{label}"].to_numpy(float) >= cuts[label]).astype(int)
            found = fairness.parity(table[f"y_{label}"].to_numpy(), called, member)
            values = found.values or {"equalized odds difference": None}
            for what, value in values.items():
                undefined = value is not None and not np.isfinite(value)  # a ratio where no group has a positive call
                notes = ["not available: 0 / 0, the rate is 0 in every group"] * undefined + [found.note] * bool(found.note)
                notes += [AT_HALF] * (label in blind)
                out.append(row(name, (kind, ""), f"{what}:{label}", value, len(table), "; ".join(notes)))
    return out


def missed(table: pd.DataFrame, val: pd.DataFrame, groups: Mapping[Key, np.ndarray], kinds: Sequence[str],
           labels: Sequence[str], name: Name) -> list[dict]:  # fmt: skip
    """"underdiagnosis" per group: ill patients called healthy, at the threshold of the largest F1 on real validation
    images; its gaps. Healthy: No Finding, or else the absence of the first label. The interval counts patients, and its
    note says so where they are fewer than their images.
    """
    label = disparity_label(labels)
    cut = threshold(val[f"y_{label}"].to_numpy(), val[f"p_{label}"].to_numpy(float))
    healthy, called = table[f"y_{label}"].to_numpy(), (table[f"p_{label}"].to_numpy(float) >= cut).astype(int)
    if label != HEALTHY:
        healthy, called = 1 - healthy, 1 - called
    what = f"FPR of {label}" if label == HEALTHY else f"missed {label}"
    what += f"; {AT_HALF}" * bool(without_threshold(val, [label]))
    patients, out, rates = table["patient"].to_numpy(), [], {}
    for key, mask in groups.items():
        rate = rates[key] = fairness.underdiagnosis(healthy[mask], called[mask], patients=patients[mask])
        value = None if rate.note else rate.interval
        about = what + FEWER * (rate.patients < rate.negatives)
        out.append(row(name, key, "underdiagnosis", value, rate.negatives, rate.note or about))
    for kind in kinds:
        good = [r.interval.value for k, r in rates.items() if k[0] == kind and not r.note]
        found = fairness.gaps(rates["overall", ""].interval.value, good) if len(good) > 1 else {}
        note = what if found else "ineligible: fewer than two eligible groups"
        for gap in ("gap", "gap90"):
            out.append(row(name, (kind, ""), f"{gap} underdiagnosis", found.get(SPREADS[gap]), len(table), note))
    return out


# --- FairDiffusion's tasks --------------------------------------------------------------------------------------------
def judge_task(name: Name, task: str, table: pd.DataFrame, masks: Mapping[Key, np.ndarray], attributes: Sequence[str],
               resamples: int, seed: int, network: str) -> list[dict]:  # fmt: skip
    """AUROC of one task, overall and per group (conditions included), and its gaps and ES-AUROC per attribute.

    A task of several classes: each class against the rest, and the mean over the classes that are eligible in every
    group of a kind. table: y_<task>, and p_<task> or p_<task>=<class>.
    """
    classes = [c.partition("=")[2] for c in table if c.startswith(f"p_{task}=")]
    labels = [f"{task}={c}" for c in classes] or [task]
    table = table.assign(**{f"y_{task}={c}": (table[f"y_{task}"].astype(str) == c).astype(int) for c in classes})
    kinds = tuple(dict.fromkeys(k[0] for k in masks if " x " not in k[0] and k[0] != task))
    groups = {k: m for k, m in masks.items() if k[0] in kinds}
    curves = rankings(table, groups, labels, stats.resample_patients(table["patient"], resamples, seed))
    out = macro(curves, groups, kinds, name, ("AUROC",))
    for kind in attributes:
        out += disparity(out, kind, ["macro AUROC"], name, curves)
    return [r | {"stage": "tasks", "extractor": network, "metric": r["metric"].replace("macro AUROC", f"AUROC:{task}")}
            for r in out]  # fmt: skip
