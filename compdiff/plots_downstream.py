"""Downstream classifiers: who gains and who is served less, whether a predicted probability means what it says, and
what a curve or a gap does not say (lesson 07)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from compdiff import fairness, scores, stats
from compdiff.frames import TITLES
from compdiff.plots import COLOUR, GREY, MARKER, PAGE, PALETTE, absent, error, figure, intervals_of, styled
from compdiff.rendering import number
from compdiff.tables import downstream_title

WHOLE = ("macro AUROC", "underdiagnosis")  # a row of panels each
SHORT = {"macro AUROC": "AUROC", "gap macro AUROC": "gap", "underdiagnosis": "underdiagnosis",
         "gap underdiagnosis": "gap"}  # fmt: skip
OVERLAID = ((PALETTE[5], 6.0), (PALETTE[1], 3.5), (PALETTE[7], 1.0))  # colour, width: all are seen where lines coincide
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


# --- what fools AUROC, and a gap (lesson 07) --------------------------------------------------------------------------
def curves(y: np.ndarray, p: np.ndarray, counts: np.ndarray | None = None) -> pd.DataFrame:
    """What calling every score >= `cut` gives, for each distinct score, highest first: fpr, recall, precision, f1.

    y: 0/1 labels [n] and p: scores [n]; counts: how often each image counts, [n] or [1, n]. ValueError where a class is
    absent.
    """
    y, p, counts = stats.checked(y, p, counts)
    cut, place = np.unique(-p, return_inverse=True)
    has, has_not = (np.cumsum(np.bincount(place, weights=counts[0] * (y == k))) for k in (1, 0))
    if not (has[-1] and has_not[-1]):
        raise ValueError("curves need images with and without the label")
    return pd.DataFrame({"cut": -cut, "fpr": has_not / has_not[-1], "recall": has / has[-1],
                         "precision": has / (has + has_not), "f1": 2 * has / (has + has_not + has[-1])})  # fmt: skip


@styled
def ranking(y: np.ndarray, cases: Mapping[str, tuple[np.ndarray, np.ndarray | None]], label: str) -> Figure:
    """Scores of those with and without the label (a histogram per case), ROC and precision-recall curves of all cases.

    y: 0/1 labels [n]; cases: scores [n] in [0, 1] and counts (or None) as `curves` takes them. Dots: the threshold 0.5
    (hollow) and that of the largest F1. The areas below the lines drawn are AUROC (slanted at ties) and AUPRC (steps).
    ValueError for more than three cases.
    """
    if len(cases) > len(OVERLAID):
        raise ValueError(f"{len(cases)} cases on top of each other cannot be told apart; at most {len(OVERLAID)}")
    fig = figure(PAGE, 3.8)
    grid = fig.add_gridspec(len(cases), 3)
    roc, pr = (fig.add_subplot(grid[:, k]) for k in (1, 2))
    for i, (name, (p, counts)) in enumerate(cases.items()):
        colour, width = OVERLAID[i]
        found, weight = curves(y, p, counts), stats.checked(y, p, counts)[2][0]
        best = found.loc[found["f1"].idxmax()]
        half = found[found["cut"] >= 0.5].tail(1)  # empty: nobody is called
        ax = fig.add_subplot(grid[i, 0])
        for k, who in enumerate(("without", "with")):
            at = y == k
            ax.hist(p[at], 25, (0, 1), weights=weight[at], color=(GREY, PALETTE[3])[k], alpha=0.55, label=who)
        ax.axvline(0.5, color="black", lw=1, ls=":")
        ax.axvline(best["cut"], color="black", lw=1)
        ax.set(xlim=(0, 1), xticks=[0, 0.5, 1], yticks=[])
        ax.set_title(f"{name}\nF1: {half['f1'].sum():.2f} at 0.5; {best['f1']:.2f} at {best['cut']:.2g}", fontsize=7)
        area, precise = stats.auroc(y, p, counts)[0], stats.auprc(y, p, counts)[0]
        roc.plot([0, *found["fpr"]], [0, *found["recall"]], label=f"{name}: AUROC {area:.2f}", color=colour, lw=width)
        pr.step([0, *found["recall"]], [found["precision"][0], *found["precision"]], where="pre", color=colour,
                lw=width, label=f"{name}: AUPRC {precise:.2f}")  # fmt: skip
        pr.axhline(found["precision"].iloc[-1], color=colour, lw=1, ls=":")
        for curve, across, up in ((roc, "fpr", "recall"), (pr, "recall", "precision")):
            curve.plot(half[across], half[up], "o", ms=7, mfc="white", mec=colour, mew=2, zorder=3)
            curve.plot(best[across], best[up], "o", ms=4, color=colour, mec="black", zorder=4)
    ax.set_xlabel(f"score, {label}")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.8), ncols=2, handlelength=1)
    roc.axline((0, 0), slope=1, color=GREY, lw=0.8, ls=":")
    ends = {"xlim": (-0.02, 1.02), "ylim": (-0.02, 1.02), "xticks": [0, 0.5, 1], "yticks": [0, 0.5, 1]}
    roc.set(xlabel="false-positive rate", ylabel="recall", title="ROC", **ends)
    pr.set(xlabel="recall", ylabel="precision", title="precision and recall", **ends)
    for curve in (roc, pr):
        curve.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), handlelength=1.2)
    return fig


def chance_gaps(y: np.ndarray, p: np.ndarray, group: np.ndarray, times: int,
                seed: int) -> tuple[list[str], float, np.ndarray] | None:  # fmt: skip
    """Largest minus smallest AUROC between groups -> (eligible groups, the gap, `times` gaps of exchanged names).

    y, p [n] as above, group [n] its names, one row per patient. Names are exchanged among those with the label and
    among those without it, so that every group keeps its numbers of both: what is left is what means nothing. Rows of
    ineligible groups take no part; None with fewer than two eligible ones.
    """
    names = [g for g in np.unique(group) if not fairness.auroc_note(y[group == g])]
    if len(names) < 2:
        return None
    part = np.isin(group, names)
    y, p, group = y[part], p[part], group[part]
    drawn = np.tile(group, (1 + times, 1))  # the first line stays
    rng = np.random.default_rng(seed)
    for k in (0, 1):
        drawn[1:, y == k] = rng.permuted(drawn[1:, y == k], axis=1)
    gaps = np.ptp([stats.auroc(y, p, (drawn == g).astype(np.float32)) for g in names], axis=0)
    return [str(g) for g in names], float(gaps[0]), gaps[1:]


@styled
def gaps_by_chance(found: Mapping[str, tuple[list[str], float, np.ndarray]], what: str) -> Figure:
    """One histogram per attribute of the gaps that `chance_gaps` gave by exchange; the observed gap is a line."""
    if not found:
        return absent("gaps by chance: not available\n(no attribute has two eligible groups)")
    fig = figure(PAGE, 2.0)
    axes = fig.subplots(1, max(3, len(found)), sharex=True, sharey=True)
    most = max(max(gap, drawn.max()) for _, gap, drawn in found.values())
    for ax, (attribute, (names, gap, drawn)) in zip(axes, found.items(), strict=False):
        p = (1 + (drawn >= gap).sum()) / (1 + len(drawn))
        ax.hist(drawn, 30, (0, most), color=GREY, alpha=0.7)
        ax.axvline(gap, color=PALETTE[3], lw=2)
        beside = f"p = {p:.2g}; by chance {np.median(drawn):.3f}"
        ax.set(xlim=(0, None), title=f"{attribute}, {len(names)} groups: gap {gap:.3f}\n{beside}")
    for ax in axes[len(found) :]:
        ax.axis("off")
    axes[0].set(ylabel="exchanges")
    fig.supxlabel(f"gap of {what}; line: observed", fontsize=8)
    return fig
