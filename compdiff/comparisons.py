"""07. Each classifier against the one that saw real images only: differences on the same patients, and p-values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from compdiff import fairness, significance, stats
from compdiff.downstream import REAL
from compdiff.evaluate import result
from compdiff.frames import NOT_AVAILABLE
from compdiff.outcomes import Curves, Name, rankings

Entry = list[tuple[str, stats.Interval | float | None, str]]  # metric, value, note


def against_real(tables: Mapping[Name, pd.DataFrame], labels: Sequence[str], resamples: int, seed: int) -> list[dict]:
    """Each classifier minus that of strategy 1a on the same test set and resampled patients; intervals around 0 are
    noise. Beside every difference its p-value, adjusted by Holm over the methods of one strategy.

    macro AUROC: bootstrap (difference over its standard error). AUROC of a label: DeLong. AUPRC: permutation by
    patient. Without 1a, or with other images than its, a row says so.
    """
    out: list[dict] = []
    for (setting, method), table in tables.items():
        where = setting[len(setting.split(" on ")[0]) :]  # "" | " on external" ...
        base = tables.get((f"1a{where}", REAL))
        if base is None and where == "" or base is not None and not base["id"].equals(table["id"]):
            why = "strategy 1a was not run" if base is None else "1a was judged on other images"
            note = f"{NOT_AVAILABLE}: {why}"
            out.append(result("difference", method, ("overall", ""), "macro AUROC minus 1a", None, 0, 0, "", note, setting))
            continue
        if base is None or table.equals(base):  # on generated images nobody else is judged; 1a itself, or 5a and 5b
            continue
        shared = [label for label in labels if f"p_{label}" in table and f"y_{label}" in table]
        drawn = stats.resample_patients(table["patient"], resamples, seed)
        everyone = {("overall", ""): np.ones(len(table), dtype=bool)}
        notes = {x: fairness.auroc_note(table[f"y_{x}"].to_numpy(), table["patient"].to_numpy()) for x in shared}
        good = [label for label in shared if not notes[label]]
        found = [macro_difference(*(rankings(t, everyone, good, drawn) for t in (table, base)), good)] if good else []
        found += [label_difference(table, base, label, resamples, seed) for label in good]
        found += [[(f"AUROC:{label} minus 1a", None, note)] for label, note in notes.items() if note]
        for entry in found:
            out += [result("difference", method, ("overall", ""), metric, value, len(table), 0, "", note, setting)
                    for metric, value, note in entry]  # fmt: skip
    return adjusted(out)


def macro_difference(one: Curves, base: Curves, labels: Sequence[str]) -> Entry:
    """Difference of macro AUROC with its bootstrap interval and p."""
    a, b = (np.mean([c[("overall", ""), label][1]["AUROC"] for label in labels], axis=0) for c in (one, base))
    apart = (a[1:] - b[1:])[np.isfinite(a[1:] - b[1:])]  # a resample may lack a class
    error = float(apart.std(ddof=1)) if len(apart) > 1 else float("nan")
    if np.isnan(error):
        return [("macro AUROC minus 1a", float(a[0] - b[0]), "ineligible for an interval: too few resamples")]
    p = float(2 * scipy_stats.norm.sf(abs(a[0] - b[0]) / error)) if error > 0 else float(a[0] == b[0])
    return [("macro AUROC minus 1a", stats.difference(a[0], a[1:], b[0], b[1:]), ""),
            ("p (bootstrap, Holm) macro AUROC minus 1a", p, "")]  # fmt: skip


def label_difference(table: pd.DataFrame, base: pd.DataFrame, label: str, permutations: int, seed: int) -> Entry:
    """Differences of one label's AUROC (DeLong) and AUPRC (permutation by patient), with p."""
    y, patients = table[f"y_{label}"].to_numpy(int), table["patient"].to_numpy()
    a, b = (t[f"p_{label}"].to_numpy(float) for t in (table, base))
    auroc = significance.delong_test(y, a, b, patients)
    auprc, p = significance.permutation_test(y, a, b, patients, permutations, seed)
    return [(f"AUROC:{label} minus 1a", auroc.interval, "DeLong"), (f"AUPRC:{label} minus 1a", auprc, ""),
            (f"p (DeLong, Holm) AUROC:{label} minus 1a", auroc.p, ""),
            (f"p (permutation, Holm) AUPRC:{label} minus 1a", p, f"{permutations} permutations")]  # fmt: skip


def adjusted(rows: list[dict]) -> list[dict]:
    """The rows with each p-value adjusted over the methods of its strategy and metric; its note keeps the raw p."""
    families: dict[tuple[str, str], list[int]] = {}
    for i, r in enumerate(rows):
        if r["metric"].startswith("p ("):
            families.setdefault((r["setting"], r["metric"]), []).append(i)
    rows = list(rows)
    for members in families.values():
        raw = np.array([rows[i]["value"] for i in members])
        for i, value in zip(members, significance.holm(raw), strict=True):
            note = f"raw p = {rows[i]['value']:.3g}; Holm over {len(members)} methods"
            rows[i] = rows[i] | {"value": float(value), "note": "; ".join(filter(None, [rows[i]["note"], note]))}
    return rows
