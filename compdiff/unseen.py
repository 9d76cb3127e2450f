"""Combinations never seen in training, in sentences made from numbers: does a method compose, is HCN unsure of them?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from compdiff import frames
from compdiff.frames import NOT_AVAILABLE, TITLES, Item
from compdiff.rendering import markdown_table, said

SHARE_OF_SEEN = 0.9  # of the accuracy in seen cells that held-out cells must reach for "composes"
RARE = 10  # training images, at most, of a rare cell that was seen
GROUPS = ("held_out", "seen")
CONTROLS = ("real_test", "shuffled", "copy", "vae")  # beside which the methods are read


def apart_by(x: dict, y: dict) -> dict[str, object]:
    """x minus y of two disjoint groups of patients, from their intervals (square-and-add; Zou and Donner 2008)."""
    value = x["value"] - y["value"]
    down = np.hypot(x["value"] - x["lo"], y["hi"] - y["value"])
    up = np.hypot(x["hi"] - x["value"], y["value"] - y["lo"])
    return {"value": value, "lo": value - down, "hi": value + up}


def fall(results: pd.DataFrame, method: str, metric: str, held: dict, seen: dict) -> dict[str, object]:
    """Held-out minus seen: of several seeds paired by training (`frames.with_unseen`), of one by `apart_by`."""
    paired = Item("unseen", metric, extractor=held["extractor"]).of(results, method)
    return paired if frames.has_interval(paired) else apart_by(held, seen)


def with_n(row: dict | None) -> str:
    return said(row) + (f", n = {row['n']:.0f}" if frames.known(row) and pd.notna(row["n"]) else "")


def unread(results: pd.DataFrame) -> list[str]:
    """Attributes that the judge reads in real test images no better than in images with shuffled attributes."""
    metrics = [m for m in results.loc[results["stage"] == "alignment", "metric"].unique() if m.startswith("accuracy:")]
    rows = {m: [Item("alignment", m).of(results, control) for control in ("real_test", "shuffled")] for m in metrics}
    blind = [m for m, (real, chance) in rows.items() if frames.known(real, chance) and not frames.reads(real, chance)]
    return [m.removeprefix("accuracy:") for m in blind]


def composes(results: pd.DataFrame, method: str) -> tuple[str, str]:
    """(composes | falls short | within noise | cannot be said, why): mean attribute accuracy, held-out against seen.

    Composes: the difference's interval lies above a loss of a tenth, and the seen cells above shuffled attributes.
    A mean over attributes says nothing where the judge cannot read one of them.
    """
    if blind := unread(results):
        return "cannot be said", f"the judge cannot read {', '.join(blind)} in real test images either"
    held, seen, chance = (Item("alignment", "accuracy", "held_out", g).of(results, m)
                          for g, m in zip((*GROUPS, "seen"), (method, method, "shuffled"), strict=True))  # fmt: skip
    if not all(frames.known(r) and frames.has_interval(r) for r in (held, seen)):
        return "cannot be said", NOT_AVAILABLE
    if frames.known(chance) and seen["lo"] <= chance["value"]:
        return "cannot be said", "in seen cells, too, no better than shuffled attributes"
    found = fall(results, method, "accuracy", held, seen)
    why = f"accuracy {with_n(held)}, against {with_n(seen)}: difference {said(found)}"
    if found["hi"] < 0:
        return "falls short", why
    return ("composes" if found["lo"] > -(1 - SHARE_OF_SEEN) * seen["value"] else "within noise"), why


def distance_words(results: pd.DataFrame, method: str) -> str:
    """KID of the held-out cells against the seen ones, in words; "" without intervals."""
    held, seen = (Item("quality", "KID", "held_out", g).of(results, method) for g in GROUPS)
    if not all(frames.known(r) and frames.has_interval(r) for r in (held, seen)):
        return ""
    found = fall(results, method, "KID", held, seen)
    word = {"above": "worse", "below": "better"}.get(frames.word_of(found), "within noise")
    return f"; KID {word}: difference {said(found)}"


def composition_lines(results: pd.DataFrame) -> list[str]:
    """The section: a table of held-out against seen cells, then one sentence per method."""
    lines = ["## Combinations never seen in training", ""]
    methods = frames.trained(results, ("alignment",))
    columns = [(f"{name} ({better} is better), {word} cells", Item(stage, name, "held_out", group))
               for stage, name, better in (("alignment", "accuracy", "higher"), ("quality", "KID", "lower"))
               for group, word in zip(GROUPS, ("held-out", "seen"), strict=True)]  # fmt: skip
    if not any(frames.known(columns[0][1].of(results, m)) for m in methods):
        return [*lines, f"{NOT_AVAILABLE}: no held-out cells, or none was judged.", ""]
    rows = {TITLES[m]: {head: with_n(item.of(results, m)) for head, item in columns} for m in (*methods, *CONTROLS)}
    lines += [markdown_table(pd.DataFrame(rows).T, "method or control"), ""]
    for method in methods:
        word, why = composes(results, method)
        lines.append(f"- {TITLES[method]}: **{word}** ({why}{distance_words(results, method)}).")
    lines += ["", f"Composes = the whole interval of the difference lies above a loss of {1 - SHARE_OF_SEEN:.0%} of "
              "the accuracy in seen cells; falls short = it lies below 0; else within noise. The judge never saw these "
              "combinations, either: its own fall stands in the table. KID of a few cells and of many are distances to "
              "different clouds: read both beside the autoencoder's and the copy's.", ""]  # fmt: skip
    return lines


def uncertainty_lines(table: pd.DataFrame | None, held_out: Sequence[str], seed: int) -> list[str]:
    """HCN's sigma per cell (columns name, sigma, train_n) of one training seed: rank correlation, and held-out against
    rare seen cells."""
    lines = [f"## HCN's uncertainty (seed {seed})", ""]
    if table is None or table.empty:
        return [*lines, f"{NOT_AVAILABLE}: train/hcn/uncertainty.csv is missing.", ""]
    out = table["name"].isin(held_out)
    vary = table[["sigma", "train_n"]].nunique().min() > 1
    told = f"{stats.spearmanr(table['sigma'], table['train_n']).statistic:.2f}" if vary else "cannot be said"
    lines.append(f"- Rank correlation of sigma with the number of training images: {told} (n = {len(table)} cells; the "
                 "paper's hope is a negative one: less seen, less sure).")  # fmt: skip
    held, rare = (table.loc[m, "sigma"] for m in (out, ~out & (table["train_n"] <= RARE)))
    if not (len(held) and len(rare)):
        return [*lines, "- Held-out against rare seen cells: cannot be said, one of the two is missing.", ""]
    test = stats.mannwhitneyu(held, rare)
    side = "within noise" if test.pvalue >= 0.05 else "above" if held.median() > rare.median() else "below"
    lines.append(f"- Held-out cells: mean sigma {held.mean():.2f} (n = {len(held)}); seen cells of at most {RARE} "
                 f"training images: {rare.mean():.2f} (n = {len(rare)}). Held out is **{side}** rare (rank-sum test, "
                 f"p = {test.pvalue:.2g}); cells share their attributes, so they are not independent.")  # fmt: skip
    return [*lines, ""]
