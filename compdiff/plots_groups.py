"""Groups: what a group's size does to FID, every demographic cell, quality against equity, the interaction dial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy import stats

from compdiff import frames
from compdiff.attributes import Schema
from compdiff.fairness import MIN_IMAGES
from compdiff.frames import TITLES, Item, methods_in
from compdiff.plots import COLOUR, COLUMN, GREY, MARKER, PAGE, PALETTE, absent, error, figure, intervals_of, styled
from compdiff.rendering import is_inline

SIZE_PANELS = {
    "FID": "FID, raw: biased up,\nmore so in small groups",
    "FID-matched": "FID, all at n = {n}:\nthe same bias for all",
    "KID": "KID: unbiased,\nnoisier in small groups",
}


@styled
def subgroup_fid(results: pd.DataFrame, kind: str) -> Figure:
    """Each group's FID, size-matched FID and KID against its number of images; the rank correlation with it, per panel.

    The correlation is over the eligible categories within each method, averaged: -1 says that size alone orders them.
    """
    here = results[(results["stage"] == "quality") & (results["setting"] == "test") & (results["group"] != "")]
    sizes = here[here["metric"] == "KID"].set_index(["method", "group_kind", "group"])["n"]
    here = here[here["value"].notna()]
    keys = frames.trained(here, ("quality",))
    here = here[here["method"].isin(keys)]  # controls have group sizes of their own, and are not drawn
    metrics = [m for m in SIZE_PANELS if (here["metric"] == m).any()]
    if not keys or not metrics:
        return absent("subgroup FID: not available (no group has enough images)")
    fig = figure(PAGE, 2.6)
    for ax, metric in zip(np.atleast_1d(fig.subplots(1, len(metrics))), metrics, strict=True):
        ranks = []
        for key in keys:
            part = here[(here["metric"] == metric) & (here["method"] == key)]
            own = pd.MultiIndex.from_frame(part[["method", "group_kind", "group"]])
            n = sizes.reindex(own).to_numpy() if metric == "FID-matched" else part["n"].to_numpy()
            look = {"color": COLOUR[key], "marker": MARKER[key], "label": TITLES[key]}
            ax.scatter(n, part["value"], s=11, alpha=0.8, lw=0, **look)
            ours = (~part["group_kind"].isin(["cell", "held_out"]) & ~part["note"].map(is_inline)).to_numpy()
            ranks.append(rank_correlation(n[ours], part["value"].to_numpy()[ours]))
        rho = np.nanmean(ranks) if np.isfinite(ranks).any() else np.nan
        said = f"rank correlation with n: {rho:.2f}" if np.isfinite(rho) else "all categories of one size"
        ax.set_title(SIZE_PANELS[metric].format(n=number_of_images(here.loc[here["metric"] == metric, "n"])))
        ax.set(xscale="log", ylabel=Item("quality", metric).label(results))
        ax.text(0.98, 0.98, said, ha="right", va="top", fontsize=6.5, transform=ax.transAxes)
        ax.margins(y=0.18)
        _size_axis(ax, here["n"].min(), here["n"].max())
    fig.axes[len(metrics) // 2].set_xlabel(f"images in the group (n), synthetic and {kind}")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=min(5, len(keys)), handletextpad=0.2,
               columnspacing=1)  # fmt: skip
    return fig


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's, NaN where it does not exist (one value, or a constant)."""
    return stats.spearmanr(x, y).statistic if len(set(x)) > 1 and len(set(y)) > 1 else np.nan


def _size_axis(ax, low: float, high: float) -> None:
    """A logarithmic axis of group sizes with plain numbers, and the size below which a group is ineligible."""
    ticks = [t for p in range(7) for t in (10**p, 3 * 10**p) if 0.5 * low <= t <= 2 * high]
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.set_xlim(0.7 * low, 1.4 * high)
    if low < MIN_IMAGES < high:
        ax.axvline(MIN_IMAGES, color=GREY, lw=0.6, ls=":")
        ax.text(MIN_IMAGES, 0.02, "ineligible ", ha="right", color=GREY, fontsize=6, transform=ax.get_xaxis_transform())
    ax.minorticks_off()


# --- every cell -------------------------------------------------------------------------------------------------------
def cell_values(results: pd.DataFrame, schema: Schema, metric: str, method: str) -> np.ndarray:
    """One number per cell, [C_0, C_1 C_2 ...]; NaN where there is none."""
    here = results[(results["stage"] == "quality") & (results["group_kind"] == "cell") & (results["metric"] == metric)
                   & (results["method"] == method) & (results["setting"] == "test")]  # fmt: skip
    by_name = here.drop_duplicates("group").set_index("group")["value"]
    values = [by_name.get(schema.cell_name(c), np.nan) for c in schema.cells()]
    return np.array(values, dtype=float).reshape(schema.sizes[0], -1)


@styled
def cell_heat_map(results: pd.DataFrame, schema: Schema, counts: Mapping[str, int], held_out: Sequence[str], kind: str,
                  metric: str = "KID") -> Figure:  # fmt: skip
    """First attribute x the others, one panel per method, one colour scale; framed cells were in no training image.

    KID, because FID of a cell with few images is mostly a statement about their number. Last panel: training images.
    """
    keys = frames.trained(results, ("quality",))
    values = {key: cell_values(results, schema, metric, key) for key in keys}
    values = {key: v for key, v in values.items() if np.isfinite(v).any()}
    if not values:
        return absent(f"{metric} per cell: not available")
    largest = max(np.nanmax(np.abs(v)) for v in values.values())
    times = 1 if largest >= 10 else 10 if largest >= 1 else 1000  # so that two or three digits say it
    values = {key: times * v for key, v in values.items()}
    columns, lines = 3, -(-(len(values) + 1) // 3)
    fig = figure(PAGE, 0.7 + (0.75 + 0.19 * schema.sizes[0]) * lines)
    axes = fig.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flat
    finite = np.concatenate([v[np.isfinite(v)] for v in values.values()])
    scale = mpl.colors.Normalize(finite.min(), finite.max())
    for ax, (key, v) in zip(axes, values.items(), strict=False):
        drawn = _cells(ax, v, scale, "cividis_r", [f"{x:.0f}" if np.isfinite(x) else "n/a" for x in v.flat])
        ax.set_title(TITLES[key])
    train = np.array([counts.get(schema.cell_name(c), 0) for c in schema.cells()], dtype=float).reshape(v.shape)
    for ax in list(axes)[len(values) :]:
        ax.axis("off")
    ax = fig.axes[len(values)]
    ax.axis("on")
    light = mpl.colors.Normalize(0, 2 * np.log10(train.max() + 1))
    _cells(ax, np.log10(train + 1), light, "Greys", [f"{x:.0f}" for x in train.flat])
    ax.set_title("training images")
    for ax in fig.axes[: len(values) + 1]:
        _frame_cells(ax, schema, held_out)
    label = Item("quality", metric).label(results) + (f" x {times}" if times > 1 else "")
    bar = fig.colorbar(drawn, ax=fig.axes[: lines * columns], shrink=0.6, aspect=30, pad=0.01)
    bar.set_label(f"{label} (lower is better)")
    here = results[(results["stage"] == "quality") & (results["setting"] == "test") & (results["group_kind"] == "cell")]
    sizes = here.loc[(here["metric"] == metric) & here["method"].isin(values) & here["value"].notna(), "n"]
    small = f" (below {MIN_IMAGES}: a hint, no claim)" if sizes.min() < MIN_IMAGES else ""
    fig.suptitle(f"{label} of every cell, synthetic against {kind}\nn = {number_of_images(sizes)} images a cell{small}; "
                 "framed: held out", fontsize=8)  # fmt: skip
    return fig


def number_of_images(n: pd.Series) -> str:
    return f"{n.min():.0f}" if n.min() == n.max() else f"{n.min():.0f} to {n.max():.0f}"


def _cells(ax, values: np.ndarray, scale, colours: str, texts: Sequence[str]):
    drawn = ax.imshow(values, cmap=colours, norm=scale, aspect="auto")
    for (i, j), text in zip(np.ndindex(values.shape), texts, strict=True):
        r, g, b, _ = drawn.cmap(drawn.norm(values[i, j])) if np.isfinite(values[i, j]) else (1, 1, 1, 1)
        dark = 0.3 * r + 0.6 * g + 0.1 * b < 0.5
        ax.text(j, i, text, ha="center", va="center", fontsize=6.5, color="white" if dark else "black")
    return drawn


def _frame_cells(ax, schema: Schema, held_out: Sequence[str]) -> None:
    """Names of rows and columns, and a frame around each held-out cell."""
    first, others = schema.attributes[0], schema.attributes[1:]
    per_row = int(np.prod([len(a) for a in others]))
    names = [schema.cell_name(c).split(" ", 1)[1] for c in schema.cells()[:per_row]]
    short = [f"{n[0]} {n.split(' ', 1)[1]}" if " " in n else n for n in names]  # F Hispanic
    ax.set_xticks(range(per_row), short, rotation=60, ha="right", rotation_mode="anchor", fontsize=6)
    ax.set_yticks(range(len(first)), first.categories, fontsize=6.5)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    for k, cell in enumerate(schema.cells()):
        if schema.cell_name(cell) in held_out:
            corner = (k % per_row - 0.5, k // per_row - 0.5)
            ax.add_patch(Rectangle(corner, 1, 1, fill=False, ec=PALETTE[3], lw=1.4, clip_on=False))


# --- quality against equity -------------------------------------------------------------------------------------------
SHOWN_CONTROLS = {"real_train": "*", "copy": "x"}


def front(points: np.ndarray) -> np.ndarray:
    """Rows of points [n, 2] (both: lower is better) that no other row beats in one number and equals in the other."""
    points = np.asarray(points, dtype=float)
    no_worse = (points[:, None] <= points[None]).all(2) & (points[:, None] < points[None]).any(2)
    return np.flatnonzero(~no_worse.any(0))


def equity_points(results: pd.DataFrame, group_kind: str) -> tuple[pd.DataFrame, str, str]:
    """Quality and equity of every method and control: columns key, x, y and x's row; labels of both axes.

    group_kind: an attribute gives FID and ES-FID - FID, the mean distance of the groups from the whole (size-matched
    where the results hold it, without the controls that were compared at another n); "" gives KID and the KID of the
    worst eligible category of all attributes.
    """
    keys = methods_in(results, ("quality",))
    matched = group_kind and len(Item("quality", "ES-FID-matched", group_kind).rows(results).dropna(subset="value"))
    metric = ("FID-matched" if matched else "FID") if group_kind else "KID"
    whole, points = Item("quality", metric), []
    for key in keys:
        x = whole.of(results, key)
        if group_kind:
            scaled = Item("quality", f"ES-{metric}", group_kind).of(results, key)
            y = scaled["value"] - x["value"] if frames.known(x, scaled) else np.nan
            y = np.nan if frames.incomparable(results, whole, x) else y
        else:
            parts = results[(results["stage"] == "quality") & (results["metric"] == metric)]
            parts = parts[~parts["group_kind"].isin(["overall", "cell", "held_out"]) & ~parts["note"].map(is_inline)]
            y = parts.loc[parts["method"] == key, "value"].max()
        if frames.known(x) and np.isfinite(y):
            points.append({"key": key, "x": x["value"], "y": y, "row": x})
    label = whole.label(results)
    below = f"ES-{metric} − {metric}" if group_kind else f"{label}, worst category"
    return pd.DataFrame(points, columns=["key", "x", "y", "row"]), label, below


@styled
def pareto(results: pd.DataFrame, schema: Schema, kind: str) -> Figure:
    """Quality (x) against inequality (y), one panel per attribute and one for KID; lower left is better.

    The line joins the methods that no other method beats in both. Grey: the floor that real images reach (size-matched
    only where it has as many images as the methods), and a copy of the training set, which has learnt nothing.
    """
    panels = {name or "worst category": equity_points(results, name) for name in (*schema.names, "")}
    panels = {name: p for name, p in panels.items() if p[0]["key"].isin(COLOUR).any()}
    if not panels:
        return absent("quality against equity: not available (groups too small, or no results)")
    fig = figure(PAGE, 2.6)
    for ax, (name, (points, x, y)) in zip(np.atleast_1d(fig.subplots(1, len(panels))), panels.items(), strict=True):
        for p in points.to_dict("records"):
            if p["key"] in COLOUR or p["key"] in SHOWN_CONTROLS:
                look = {"marker": MARKER.get(p["key"], SHOWN_CONTROLS.get(p["key"])), "label": TITLES[p["key"]]}
                ax.errorbar(p["x"], p["y"], xerr=error(p["row"]), fmt="", ls="", ms=5, elinewidth=0.8,
                            color=COLOUR.get(p["key"], GREY), **look)  # fmt: skip
        ours = points[points["key"].isin(COLOUR)].reset_index(drop=True)
        best = ours.loc[front(ours[["x", "y"]].to_numpy())].sort_values("x")
        ax.step(best["x"], best["y"], where="post", color="black", lw=0.7, ls="--", zorder=0)
        ax.set(title=name, xlabel=x, ylabel=y if name in (next(iter(panels)), "worst category") else "")
        ax.locator_params(nbins=4)
    sizes = pd.concat([p["row"][p["key"].isin(COLOUR)] for p, _, _ in panels.values()]).map(lambda r: r["n"])
    fig.suptitle(f"Quality against equity ({kind}, n = {number_of_images(sizes)} images a method; lower left is better; "
                 f"{intervals_of(results)})", fontsize=8)  # fmt: skip
    named = [pair for ax in fig.axes for pair in zip(*ax.get_legend_handles_labels(), strict=True)]
    handles = {label: handle for handle, label in named}  # a method may lack a number in one panel
    fig.legend(handles.values(), handles, loc="outside lower center", ncols=4, handletextpad=0.2, columnspacing=1)
    return fig


# --- the dial ---------------------------------------------------------------------------------------------------------
@styled
def interaction_dial(by_dial: pd.DataFrame, kind: str) -> Figure | None:
    """Zero-shot error against the phantoms' interaction dial, from the rows of `dials.by_dial_rows`.

    Drawn are methods that were run at two settings or more; None without any: one point of a dial is no figure.
    """
    if by_dial.empty:
        return None
    by_dial = by_dial[by_dial["value"].notna()]
    by_dial = by_dial[by_dial.groupby("method")["dial"].transform("nunique") > 1]
    if by_dial.empty:
        return None
    dials = sorted(by_dial["dial"].unique())
    fig = figure(COLUMN, 2.6)
    ax = fig.subplots()
    for i, (key, part) in enumerate(by_dial.groupby("method", sort=False)):
        part = part.sort_values("dial")
        bars = np.hstack([error(row) for row in part.to_dict("records")])
        apart = part["dial"] + 0.012 * (max(dials) - min(dials)) * i  # so that no interval hides another
        ax.errorbar(apart, part["value"], yerr=bars, color=COLOUR[key], marker=MARKER[key], ms=4, capsize=2, lw=1,
                    label=TITLES[key])  # fmt: skip
    trained = int(by_dial["seeds"].min())
    ax.set(xlabel="interaction of the attributes (0 = additive)",
           ylabel=f"{Item('quality', 'KID').label(by_dial)}, held-out cells",
           title=f"Zero-shot error ({kind}, n = {by_dial['n'].min():.0f}, {trained} seed{'s' * (trained > 1)})")  # fmt: skip
    ax.set_xticks(dials, [f"{d:g}" for d in dials])
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, handletextpad=0.4)
    return fig
