"""Downstream classifiers: who gains and who is served less, and whether a predicted probability means what it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from compdiff import scores
from compdiff.frames import TITLES
from compdiff.plots import COLOUR, GREY, MARKER, PAGE, absent, error, figure, intervals_of, styled
from compdiff.rendering import number
from compdiff.tables import downstream_title

WHOLE = ("macro AUROC", "underdiagnosis")  # a row of panels each
SHORT = {"macro AUROC": "AUROC", "gap macro AUROC": "gap", "underdiagnosis": "underdiagnosis",
         "gap underdiagnosis": "gap"}  # fmt: skip
TEST = ("test", "zero_shot")  # splits of predictions.csv on which classifiers are judged
PER_BIN, MAX_BINS = 20, 10  # images at least, and bins at most, of a reliability diagram


@styled
def downstream_gaps(results: pd.DataFrame, kind: str) -> Figure:
    """Classifiers on real test images, per strategy and generator: AUROC (above) and underdiagnosis (below), overall
    and their gaps between the groups of each attribute. Gaps of intersections stand in Table 4, and what was tested on
    other images ("5a on synthetic").
    """
    here = results[(results["stage"] == "downstream") & (results["group"] == "") & results["value"].notna()]
    here = here[~here["setting"].str.contains(" on ", regex=False)]
    held = set(here[["metric", "group_kind"]].itertuples(index=False, name=None))
    kinds = [k for k in here["group_kind"].unique() if k != "overall" and " x " not in k]
    shown = [[(m, "overall"), *((f"gap {m}", k) for k in kinds)] for m in WHOLE]
    shown = [line for line in shown if held & set(line)]
    kinds = [k for k in kinds if any((f"gap {m}", k) in held for m in WHOLE)]
    if not shown:
        return absent("downstream gaps: not available")
    pairs = set(here[["setting", "method"]].itertuples(index=False, name=None))
    rows = sorted(pairs, key=lambda p: (p[0], list(TITLES).index(p[1]) if p[1] in TITLES else len(TITLES)))
    fig = figure(PAGE, 0.6 + (0.5 + 0.14 * len(rows)) * len(shown))
    axes = fig.subplots(len(shown), 1 + len(kinds), sharey=True, squeeze=False)
    for line, metrics in zip(axes, shown, strict=True):
        panels = [n for n in metrics if n[1] in ("overall", *kinds)]
        for ax, (metric, group) in zip(line, panels, strict=True):
            _classifiers(ax, here[(here["metric"] == metric) & (here["group_kind"] == group)], rows)
            ax.set_title(SHORT[metric] if group == "overall" else f"{SHORT[metric]}, {group}")
    axes[0, 0].invert_yaxis()  # shared by all
    n = here["n"].dropna()
    size = f", n = {n.max():.0f} images" if len(n) else ""
    fig.suptitle(f"Classifiers, tested on {kind}{size}; {intervals_of(here)}; only AUROC: higher is better", fontsize=8)
    fig.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    return fig


def _classifiers(ax, part: pd.DataFrame, rows: Sequence[tuple[str, str]]) -> None:
    """One panel: a number and its interval per (strategy, method); "n/a" where nobody has one."""
    part = part.set_index(["setting", "method"])
    for y, key in enumerate(rows):
        if key in part.index:
            row = part.loc[key].to_dict()
            look = {"fmt": MARKER.get(key[1], "o"), "color": COLOUR.get(key[1], GREY)}
            ax.errorbar(row["value"], y, xerr=error(row), ms=4, capsize=2, lw=1, **look)
    if part.empty:
        ax.text(0.5, 0.5, "not available", ha="center", color=GREY, fontsize=6, transform=ax.transAxes)
        ax.set_xticks([])
    ax.set_yticks(range(len(rows)), [f"{s}  {downstream_title(m)}" for s, m in rows])
    ax.xaxis.set_major_locator(MaxNLocator(2))  # at most three ticks
    ax.margins(x=0.12)
    ax.grid(axis="x", lw=0.3)


# --- reliability ------------------------------------------------------------------------------------------------------
def predictions(folder: Path, results: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    """{(strategy, method): test rows} of the <strategy>_<method>/predictions.csv in a seed's folder `downstream`.

    Only classifiers that the results hold a number of: the folder keeps those of earlier runs, too.
    """
    here = results[(results["stage"] == "downstream") & results["value"].notna()]
    held, found = set(here[["setting", "method"]].itertuples(index=False, name=None)), {}
    for file in sorted(Path(folder).glob("*/predictions.csv")):
        table = pd.read_csv(file, dtype={"id": str, "patient": str}, keep_default_na=False)
        strategy, _, method = file.parent.name.partition("_")
        if (strategy, method) in held and "split" in table:  # a third word names a task of its own classifier
            found[strategy, method] = table[table["split"].isin(TEST)].reset_index(drop=True)
    return found


def labels_of(table: pd.DataFrame) -> list[str]:
    """Labels with a truth of 0 or 1 and a probability; the one with the largest smaller class comes first."""
    names = [c.removeprefix("y_") for c in table if c.startswith("y_") and f"p_{c.removeprefix('y_')}" in table]
    names = [n for n in names if table[f"y_{n}"].isin([0, 1]).all()]
    return sorted(names, key=lambda n: -min(table[f"y_{n}"].sum(), (1 - table[f"y_{n}"]).sum()))


def reliability_bins(y: np.ndarray, p: np.ndarray, patients: np.ndarray | None = None) -> pd.DataFrame:
    """Predictions in bins of equal count: columns p (mean prediction), value, lo, hi (share of positives, Jeffreys), n.

    y: 0/1 [n], p: [n]. At least PER_BIN images a bin, at most MAX_BINS bins; equal predictions stay in one bin.
    patients [n]: whose images they are; the interval of a bin with fewer patients than images is that of as many trials
    as patients (`scores.rate_interval`).
    """
    bins = int(np.clip(len(p) // PER_BIN, 1, MAX_BINS))
    found, member = scores.reliability(y, p, bins, "mass"), scores.calibration_bins(p, bins, "mass")
    whose = np.arange(len(p)) if patients is None else np.asarray(patients)
    rates = [scores.rate_interval(y[member == b], whose[member == b]) for b in np.unique(member)]
    return pd.DataFrame({"p": found.predicted, "value": found.observed, "lo": [r.lo for r in rates],
                         "hi": [r.hi for r in rates], "n": found.n})  # fmt: skip


@styled
def reliability(tables: Mapping[tuple[str, str], pd.DataFrame], kind: str, seed: int) -> Figure:
    """Predicted probability against the share of positives, one panel per strategy; on the diagonal it is honest.

    tables: of `predictions`, one training seed. The ECE beside a curve is of the same predictions, as notebook 07
    computes it: in 10 bins of equal width, so that it does not depend on the bins drawn.
    """
    tables = {key: t for key, t in tables.items() if len(t) and labels_of(t)}
    if not tables:
        return absent("reliability of the classifiers: not available\n(no downstream/*/predictions.csv)")
    strategies = list(dict.fromkeys(s for s, _ in tables))
    label = labels_of(next(iter(tables.values())))[0]
    columns = min(4, len(strategies))
    lines = -(-len(strategies) // columns)
    fig = figure(PAGE, 0.85 + 1.75 * lines)
    axes = fig.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    handles = {}
    for ax, strategy in zip(axes.flat, strategies, strict=False):
        own = {m: t for (s, m), t in tables.items() if s == strategy and f"p_{label}" in t}
        ax.plot([0, 1], [0, 1], color=GREY, lw=0.6, ls=":")
        said = []
        for method in sorted(own, key=lambda m: list(TITLES).index(m) if m in TITLES else len(TITLES)):
            y, p = own[method][f"y_{label}"].to_numpy(), own[method][f"p_{label}"].to_numpy(float)
            bins = reliability_bins(y, p, own[method]["patient"].to_numpy())
            bars = np.clip([bins["value"] - bins["lo"], bins["hi"] - bins["value"]], 0, None)
            look = {"color": COLOUR.get(method, GREY), "marker": MARKER.get(method, "*")}
            handles[method] = ax.errorbar(bins["p"], bins["value"], yerr=bars, lw=0.9, ms=3.5, elinewidth=0.4, **look)
            said.append((method, number(scores.ece(y, p)[0])))
        for i, (method, value) in enumerate(reversed(said)):
            ax.text(0.98, 0.02 + 0.085 * i, f"ECE {value}", color=COLOUR.get(method, GREY), fontsize=6, ha="right",
                    transform=ax.transAxes)  # fmt: skip
        n = len(next(iter(own.values()))) if own else 0
        ends = {"xlim": (-0.02, 1.02), "ylim": (-0.02, 1.02), "xticks": [0, 0.5, 1], "yticks": [0, 0.5, 1]}
        ax.set(title=f"{strategy}, n = {n}", **ends)
    for ax in axes.flat[len(strategies) :]:
        ax.axis("off")
    axes[-1, 0].set(xlabel=f"predicted {label}", ylabel="share that has it")
    fig.suptitle(f"Reliability of classifiers on {kind}, seed {seed}: bins of at least {PER_BIN} images, "
                 "95 % Jeffreys intervals", fontsize=8)  # fmt: skip
    fig.legend(handles.values(), [downstream_title(m) for m in handles], loc="outside lower center", ncols=5,
               columnspacing=1)  # fmt: skip
    return fig
