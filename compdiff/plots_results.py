"""Methods side by side: every number with its interval, and every difference between two methods."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from compdiff import frames
from compdiff.attributes import Schema
from compdiff.frames import TITLES, Item, methods_in
from compdiff.plots import COLOUR, GREY, MARKER, PAGE, PALETTE, absent, error, figure, intervals_of, styled


def short(key: str) -> str:
    """A method's title without what stands in parentheses."""
    return TITLES[key].split(" (")[0]


@styled
def quality_bars(results: pd.DataFrame, schema: Schema, kind: str) -> Figure:
    """FID and KID of every method and control, and attribute accuracy beside the judge's own score, with intervals."""
    metrics = [Item("quality", m) for m in ("FID", "KID")]
    metrics += [Item("alignment", f"accuracy:{a}") for a in schema.names]
    metrics = [item for item in metrics if len(item.rows(results))]
    if not metrics:
        return absent("quality: not available")
    keys = methods_in(results, ("quality", "alignment"))
    fig = figure(PAGE, 0.9 + 0.19 * len(keys))
    for ax, item in zip(np.atleast_1d(fig.subplots(1, len(metrics), sharey=True)), metrics, strict=True):
        rows = {key: item.of(results, key) for key in keys}
        for y, (key, row) in enumerate(rows.items()):
            if not frames.known(row):
                ax.text(0.02, y, "n/a", va="center", color=GREY, fontsize=6, transform=ax.get_yaxis_transform())
                continue
            ax.errorbar(row["value"], y, xerr=error(row), fmt=MARKER.get(key, "|"), color=COLOUR.get(key, GREY), ms=4,
                        capsize=2, lw=1)  # fmt: skip
        sizes = {f"{r['n']:.0f}" for r in rows.values() if r is not None and pd.notna(r["n"])}
        n = f"\nn = {'-'.join(sorted(sizes, key=int))}" if len(sizes) <= 2 else ""
        ax.set(title=item.label(results) + n, yticks=range(len(keys)))
        ax.set_yticklabels([TITLES[k].split(" (the")[0] for k in keys])
        ax.locator_params(axis="x", nbins=3)
        ax.grid(axis="x", lw=0.3)
    ax.invert_yaxis()
    fig.suptitle(
        f"Quality and requested attributes (synthetic against {kind}; {intervals_of(results)})", fontsize=8
    )
    return fig


COMPARED = (Item("quality", "FID"), Item("quality", "KID"), Item("alignment", "accuracy"))
WORTH_COLOUR = {"better": PALETTE[0], "worse": PALETTE[3], "within noise": GREY}


@styled
def forest(results: pd.DataFrame, kind: str) -> Figure:
    """Every pair of methods, a panel each for FID, KID and mean accuracy: difference, interval; open where it holds 0.

    Blue: the first method is better, orange: worse, whichever side that is in the panel.

    Drawn are differences with an interval of their own (same resampled patients, or same seeds).
    """
    pairs = list(combinations(frames.trained(results), 2))
    found = {item: [(p, frames.difference(results, item, *p)) for p in pairs] for item in COMPARED}
    found = {item: rows for item, rows in found.items() if any(frames.has_interval(r) for _, r in rows)}
    if not found:
        return absent("differences between methods: not available (no interval of a difference)")
    fig = figure(PAGE, 1.1 + 0.17 * len(pairs))
    for ax, (item, rows) in zip(np.atleast_1d(fig.subplots(1, len(found), sharey=True)), found.items(), strict=True):
        for y, (_, row) in enumerate(rows):
            if not frames.has_interval(row):
                ax.text(0.02, y, "n/a", va="center", color=GREY, fontsize=6, transform=ax.get_yaxis_transform())
                continue
            word = frames.word_of(row)
            marker = {"above": ">", "below": "<", "within noise": "o"}[word]
            good = {"lower": "below", "higher": "above"}[frames.better_is(item.metric)]
            worth = word if word == "within noise" else "better" if word == good else "worse"
            ax.errorbar(row["value"], y, xerr=error(row), fmt=marker, color=WORTH_COLOUR[worth], ms=4, capsize=2, lw=1,
                        mfc="white" if word == "within noise" else None)  # fmt: skip
        ax.axvline(0, color="black", lw=0.6)
        sizes = {f"{r['n']:.0f}" for _, r in rows if r is not None and pd.notna(r["n"])}
        n = "-".join(sorted(sizes, key=int))
        ax.set(title=f"{item.label(results)}, n = {n}\n{frames.beside(item.metric).strip()}", yticks=range(len(pairs)))
        ax.set_yticklabels([f"{short(a)} − {short(b)}" for a, b in pairs])
        ax.locator_params(axis="x", nbins=3)
        ax.grid(axis="x", lw=0.3)
    ax.invert_yaxis()
    fig.suptitle(f"First minus second method ({kind}; {intervals_of(results)})\n"
                 "blue: the first is better, orange: worse, open circle: within noise", fontsize=8)  # fmt: skip
    return fig
