"""Figures of the cardiac study: mask and image, faithfulness against distance, group matrices, rates by group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from compdiff.heart_fairness import MAIN
from compdiff.heart_report import GATE, METHODS
from compdiff.plots import GREY, MARKERS, PAGE, PALETTE, error, figure, styled
from compdiff.rendering import DAGGER

MASK_COLOURS = ListedColormap(["#000000", "#ffffff", "#888888", "#555555"])  # background, cavity, myocardium, right
SHOWN_RATES = (MAIN, "TPR", "FPR", "selection rate")


def _picture(ax, image: np.ndarray, title: str = "", mask: bool = False, contour: np.ndarray | None = None) -> None:
    look = {"cmap": MASK_COLOURS, "vmin": 0, "vmax": 3} if mask else {"cmap": "gray", "vmin": 0, "vmax": 255}
    ax.imshow(image, interpolation="nearest", **look)
    if contour is not None and contour.any():
        ax.contour(contour, levels=[0.5], colors=PALETTE[1], linewidths=0.7)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.set_title(title, fontsize=6, pad=2)


@styled
def pairs(masks: np.ndarray, images: Mapping[str, np.ndarray], rows: Sequence[str], title: str) -> Figure:
    """One line per request: mask at ED and ES, then ED and ES of every source with the requested cavity's outline.

    masks [n, S, S, 3]; images {title: stacked [n, S, S, 3]}; rows: what was asked for. `title` says what is synthetic.
    """
    n, columns = len(masks), 2 + 2 * len(images)
    fig = figure(PAGE, 0.35 + PAGE / (columns + 1) * n)
    axes = fig.subplots(n, columns, squeeze=False)
    for i in range(n):
        for phase, (channel, name) in enumerate(((0, "ED"), (1, "ES"))):
            _picture(axes[i, phase], masks[i, ..., channel], f"mask {name}" * (i == 0), mask=True)
            for k, (source, stacked) in enumerate(images.items()):
                cavity = (masks[i, ..., channel] == 1).astype(float)
                head = f"{source}\n{name}" * (i == 0)
                _picture(axes[i, 2 + 2 * k + phase], stacked[i, ..., channel], head, contour=cavity)
        axes[i, 0].set_ylabel(rows[i], rotation=0, ha="right", va="center", fontsize=6)
    fig.suptitle(title, fontsize=7)
    return fig


@styled
def faithfulness(generation: pd.DataFrame, title: str) -> Figure:
    """Dice against KID: faithful and real is the upper left corner. A pasted mask is faithful by construction; the
    finder, trained on real images, cannot read all of it, and KID puts it far away."""
    fig = figure(PAGE * 0.6, 2.6)
    ax = fig.subplots()
    for i, method in enumerate(METHODS):
        mine = generation[generation["method"] == method].set_index("metric")
        if not {"Dice", "KID"} <= set(mine.index):
            continue
        dice, kid = (mine.loc[k] for k in ("Dice", "KID"))
        ax.errorbar(kid["value"], dice["value"], xerr=error(kid), yerr=error(dice), fmt=MARKERS[i], color=PALETTE[i],
                    label=METHODS[method], capsize=2)  # fmt: skip
    ax.set(xlabel="KID to real test images (lower is closer)", ylabel="Dice, asked for against found", title=title)
    ax.set_xscale("symlog", linthresh=1)
    ax.axhline(GATE, color=GREY, linestyle=":", linewidth=0.8)
    ax.annotate(f"gate {GATE}", (0.01, GATE), (0, 2), ("axes fraction", "data"), "offset points", color=GREY, fontsize=7)
    ax.legend(loc="best")
    return fig


@styled
def matrices(matrix: pd.DataFrame, title: str) -> Figure:
    """Real groups (rows) against synthetic groups and other real patients (the floor), one scale for an attribute."""
    matrix = matrix[matrix["value"].notna()]  # the groups left out stand in the report
    names = list(matrix["attribute"].unique())
    fig = figure(PAGE, 0.6 + 1.9 * max(1, len(names)))
    axes = fig.subplots(max(1, len(names)), 2, squeeze=False)
    for line, name in zip(axes, names, strict=False):
        part = matrix[matrix["attribute"] == name]
        limits = {"vmin": part["value"].min(), "vmax": part["value"].max()}
        for ax, kind in zip(line, ("synthetic", "real"), strict=True):
            wide = part[part["kind"] == kind].pivot(index="real", columns="other", values="value")
            ax.imshow(wide, cmap="Blues", **limits)
            middle = (limits["vmin"] + limits["vmax"]) / 2
            for (i, j), value in np.ndenumerate(wide.to_numpy()):
                colour = "white" if value > middle else "black"
                ax.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=7, color=colour)
            ax.set_xticks(range(len(wide.columns)), list(wide.columns), fontsize=6)
            ax.set_xlabel("synthetic" if kind == "synthetic" else "other real patients", fontsize=6)
            ax.set_yticks(range(len(wide)), [f"real {r}" for r in wide.index], fontsize=6)
            few = f" {DAGGER}" if part["note"].fillna("").str.startswith("ineligible").any() else ""
            ax.set_title(f"{name}, n = {int(part['n'].iloc[0])}{few}", fontsize=7)
    fig.suptitle(title, fontsize=8)
    return fig


@styled
def by_group(rates: pd.DataFrame, name: str, attributes: Sequence[str], title: str) -> Figure:
    """Rates of every group with intervals, one colour per source and sampling; open where a group is too small."""
    mine = rates[(rates["input"] == name) & rates["metric"].isin(SHOWN_RATES)]
    mine = mine[mine["group_kind"].isin(["overall", *attributes])]
    groups = list(dict.fromkeys(zip(mine["group_kind"], mine["group"], strict=True)))
    configurations = list(dict.fromkeys(zip(mine["source"], mine["sampling"], strict=True)))
    fig = figure(PAGE, 0.9 + 1.25 * len(SHOWN_RATES))
    axes = fig.subplots(len(SHOWN_RATES), 1, sharex=True)
    for ax, metric in zip(axes, SHOWN_RATES, strict=True):
        for k, (source, sampling) in enumerate(configurations):
            part = mine[(mine["metric"] == metric) & (mine["source"] == source) & (mine["sampling"] == sampling)]
            part = part.set_index(["group_kind", "group"])
            for x, key in enumerate(groups):
                row = part.loc[key]
                at = x + (k - (len(configurations) - 1) / 2) * 0.8 / len(configurations)
                full = not str(row["note"]).startswith("ineligible")
                ax.errorbar(at, row["value"], yerr=error(row), fmt=MARKERS[k], color=PALETTE[k], markersize=3,
                            capsize=1.5, elinewidth=0.7, markerfacecolor=PALETTE[k] if full else "white",
                            label=f"{source}, {sampling}" if x == 0 else None)  # fmt: skip
        shown = mine.loc[mine["metric"] == metric, ["value", "lo", "hi"]]
        ax.set(ylabel=metric, ylim=(max(-0.03, shown.min().min() - 0.05), min(1.03, shown.max().max() + 0.05)))
    axes[-1].set_xticks(range(len(groups)), [g or "everybody" for _, g in groups], rotation=30, ha="right")
    axes[0].legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.02))
    fig.suptitle(title, fontsize=8)
    return fig


@styled
def change_forest(changes: pd.DataFrame, name: str, title: str) -> Figure:
    """Change of balanced accuracy against real images as found, with interval; open where nothing is decided."""
    mine = changes[changes["input"] == name]
    mine = mine[mine["group"].isin(["", "worst group", "gap"])].reset_index(drop=True)
    labels = [r["group_kind"] if r["group"] == "" else f"{r['group']} by {r['group_kind']}" for r in mine.to_dict("records")]
    fig = figure(PAGE, 0.8 + 0.17 * len(mine))
    ax = fig.subplots()
    kinds = list(dict.fromkeys(zip(mine["source"], mine["sampling"], strict=True)))
    for y, row in enumerate(mine.to_dict("records")):
        k = kinds.index((row["source"], row["sampling"]))
        ax.errorbar(row["value"], -y, xerr=error(row), fmt=MARKERS[k], color=PALETTE[k], markersize=4, capsize=2,
                    markerfacecolor=PALETTE[k] if row["verdict"] in ("helped", "harmed") else "white")  # fmt: skip
    names = [f"{s}, {w}: {g}" for s, w, g in zip(mine["source"], mine["sampling"], labels, strict=True)]
    ax.set_yticks(-np.arange(len(mine)), names)
    ax.axvline(0, color=GREY, linewidth=0.8)
    ax.set(xlabel="change of balanced accuracy (of a gap: below 0 is fairer)")
    fig.suptitle(title, fontsize=8)
    return fig


@styled
def figure_of_series(series: np.ndarray, rows: Sequence[str], title: str) -> Figure:
    """Frames or slices [R, T, S, S], one series a line."""
    count = series.shape[1]
    fig = figure(PAGE, 0.35 + PAGE / (count + 1) * len(series))
    axes = fig.subplots(len(series), count, squeeze=False)
    for (i, t), ax in np.ndenumerate(axes):
        _picture(ax, series[i, t], str(t) * (i == 0))
    for ax, name in zip(axes[:, 0], rows, strict=True):
        ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=6)
    fig.suptitle(title, fontsize=7)
    return fig
