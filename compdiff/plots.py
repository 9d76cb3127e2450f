"""The papers' figures from frames: matplotlib only, no torch. Every figure says what its images are and how many there were.

Widths are those of a two-column page: COLUMN (3.4 in) and PAGE (7 in). `save` writes an SVG that is the same byte for byte for
the same numbers, and a PNG of at most MAX_PNG bytes.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image

from compdiff import config, record
from compdiff.attributes import Schema
from compdiff.fairness import MIN_IMAGES
from compdiff.tables import TITLES, Item, downstream_title, methods_in

COLUMN, PAGE = 3.4, 7.0  # inches
MAX_PNG = 150_000  # bytes
STYLE = {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7,
         "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "font.family": "DejaVu Sans", "svg.fonttype": "none",
         "svg.hashsalt": "compdiff", "axes.linewidth": 0.6, "lines.linewidth": 1.2}  # fmt: skip
# Okabe and Ito's palette: told apart by colour-blind readers; each method keeps its colour and its marker in every figure.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000", "#8A8A8A")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
COLOUR = dict(zip(config.METHODS, PALETTE, strict=True))
MARKER = dict(zip(config.METHODS, MARKERS, strict=True))
GREY = "#777777"


def figure(width: float, height: float) -> Figure:
    """An empty figure outside pyplot's state; sizes in inches."""
    with mpl.rc_context(STYLE):
        return Figure(figsize=(width, height), layout="constrained")


def styled(function):
    """Draw with STYLE, whatever the caller's settings are."""

    def wrapped(*args, **kwargs):
        with mpl.rc_context(STYLE):
            return function(*args, **kwargs)

    wrapped.__doc__, wrapped.__name__ = function.__doc__, function.__name__
    return wrapped


@styled
def preview(fig: Figure, dpi: int = 80, colours: int = 32) -> Image.Image:
    """The figure as a picture of few colours, so that a notebook that shows it stays small."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return (
        Image.open(buffer).convert("RGB").quantize(colours, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    )


@styled
def save(fig: Figure, folder: Path, name: str) -> None:
    """<name>.svg and <name>.png. The PNG loses resolution, then grey levels, until it has MAX_PNG bytes; ValueError if that fails."""
    text = io.StringIO()
    fig.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    record.write_text(Path(folder) / f"{name}.svg", EMBEDDED.sub(_grey, text.getvalue()))
    for dpi, colours in ((200, 0), (200, 128), (150, 128), (120, 64), (90, 32)):
        buffer = io.BytesIO()
        if colours:
            preview(fig, dpi, colours).save(buffer, format="PNG", optimize=True)
        else:
            fig.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
        if buffer.tell() <= MAX_PNG:
            break
    else:
        raise ValueError(f"{name}.png has {buffer.tell()} bytes at the lowest quality, more than {MAX_PNG}")
    with record.atomic(Path(folder) / f"{name}.png") as temporary:
        temporary.write_bytes(buffer.getvalue())


EMBEDDED = re.compile(r"(?<=data:image/png;base64,)[A-Za-z0-9+/=\s]+")


def _grey(found: re.Match[str]) -> str:
    """A picture inside an SVG as 16 greys, a fifth of its size (all our pictures are grey)."""
    image = Image.open(io.BytesIO(base64.b64decode(found[0]))).convert("L").quantize(16, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


@styled
def absent(text: str, width: float = COLUMN) -> Figure:
    """A panel that says what is not available."""
    fig = figure(width, 1.0)
    ax = fig.subplots()
    ax.axis("off")
    ax.text(0.5, 0.5, text, ha="center", va="center", color=GREY, wrap=True)
    return fig


# --- the method ---------------------------------------------------------------------------------------------------
def _box(ax, x: float, y: float, w: float, h: float, text: str, colour: str = "white") -> None:
    ax.add_patch(
        FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0.02,rounding_size=0.08", fc=colour, ec="black", lw=0.7)
    )
    ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=7)


def _arrow(ax, start: tuple[float, float], end: tuple[float, float], style: str = "-") -> None:
    ax.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=6, lw=0.7, linestyle=style, color="black", shrinkA=0, shrinkB=0
        )
    )


@styled
def architecture(schema: Schema) -> Figure:
    """The Hierarchical Conditioner Network of a schema: attributes -> pairs -> one token beside the text tokens -> UNet."""
    fig = figure(PAGE, 2.7)
    ax = fig.subplots()
    ax.axis("off")
    names = schema.names
    pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
    blue, orange, green = "#CFE5F3", "#FBE3B8", "#C9E9DE"
    ys = lambda n: [3.0 - (k + 0.5) * 3.0 / n for k in range(n)]  # noqa: E731
    for y, attribute in zip(ys(len(names)), schema.attributes, strict=True):
        _box(ax, 0, y - 0.3, 1.35, 0.6, f"{attribute.name}\n{len(attribute)} embeddings", blue)
    for y, (i, j) in zip(ys(len(pairs)), pairs, strict=True):
        _box(ax, 2.1, y - 0.3, 1.35, 0.6, f"{names[i]} × {names[j]}\nMLP", orange)
        for k in (i, j):
            _arrow(ax, (1.38, ys(len(names))[k]), (2.07, y))
        _arrow(ax, (3.48, y), (4.07, 1.5))
    _box(ax, 4.1, 1.2, 1.1, 0.6, "all pairs\nMLP" if len(names) > 2 else "single pair", orange)
    _box(ax, 5.65, 1.2, 1.25, 0.6, "μ, σ\nz = μ + σ ε", green)
    _box(ax, 7.35, 1.2, 1.15, 0.6, "project\none token", green)
    _box(ax, 7.35, 2.35, 1.15, 0.6, "text encoder\ntext tokens", blue)
    _box(ax, 9.1, 1.2, 1.2, 1.75, "UNet\ncross-\nattention", "#EEEEEE")
    _box(ax, 7.0, 0.05, 1.85, 0.6, "auxiliary classifiers\none per attribute", "white")
    _box(ax, 4.0, 0.05, 2.3, 0.6, "consistency: h near Σ e\nKL: z near N(0, 1)", "white")
    for start, end in (
        ((5.23, 1.5), (5.62, 1.5)),
        ((6.93, 1.5), (7.32, 1.5)),
        ((8.53, 1.5), (9.07, 1.5)),
        ((8.53, 2.65), (9.07, 2.65)),
    ):
        _arrow(ax, start, end)
    for start, end in (((7.92, 1.17), (7.92, 0.68)), ((4.65, 1.17), (4.65, 0.68)), ((6.0, 1.17), (6.0, 0.68))):
        _arrow(ax, start, end, "--")
    for x, text in ((0.67, "level 1"), (2.77, "level 2"), (4.65, "level 3")):
        ax.text(x, 3.2, text, ha="center", color=GREY)
    ax.set(xlim=(-0.1, 10.4), ylim=(-0.05, 3.4))
    fig.suptitle("HCN: demographics become one token (dashed: training losses)", fontsize=8)
    return fig


# --- pictures -----------------------------------------------------------------------------------------------------
def gallery_cells(
    schema: Schema, counts: Mapping[str, int], held_out: Sequence[str] = (), columns: int = 12
) -> list[tuple[int, ...]]:
    """At most `columns` cells for the gallery: every category of the second attribute, the most and least common of the third,
    and of the first those with the most held-out cells, then the most common; in schema order."""
    cells = schema.cells()
    total = lambda k, c: sum(counts.get(schema.cell_name(x), 0) for x in cells if x[k] == c)  # noqa: E731
    held = lambda c: sum(schema.cell_name(x) in held_out for x in cells if x[0] == c)  # noqa: E731
    keep = [set(range(n)) for n in schema.sizes]
    for k in range(2, len(schema)):
        ranked = sorted(keep[k], key=lambda c, k=k: total(k, c))
        keep[k] = {ranked[0], ranked[-1]}
    others = int(np.prod([len(s) for s in keep[1:]]))
    ranked = sorted(keep[0], key=lambda c: (-held(c), -total(0, c)))
    keep[0] = set(ranked[: max(1, columns // others)])
    chosen = [x for x in cells if all(c in s for c, s in zip(x, keep, strict=True))]
    return sorted(chosen, key=lambda x: (x[0], *x[:0:-1]))[:columns]


@styled
def gallery(
    images: Mapping[str, Mapping[str, np.ndarray]], columns: Sequence[str], held_out: Sequence[str], title: str
) -> Figure:
    """Rows of images {row title: {cell name: uint8 [S, S]}}, one column per cell; held-out cells' names stand in red italics."""
    left, top = 0.95, 0.66
    side = (PAGE - left) / max(len(columns), 6)
    fig = Figure(figsize=(left + side * len(columns), top + side * len(images)))
    width, height = fig.get_size_inches()
    for r, (row, pictures) in enumerate(images.items()):
        fig.text(
            (left - 0.06) / width,
            1 - (top + (r + 0.5) * side) / height,
            row.replace(" (", "\n(").replace(" + ", " +\n"),
            ha="right",
            va="center",
            fontsize=7,
        )
        for c, name in enumerate(columns):
            ax = fig.add_axes(
                (
                    (left + c * side) / width,
                    1 - (top + (r + 1) * side) / height,
                    0.97 * side / width,
                    0.97 * side / height,
                )
            )
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if name in pictures:
                ax.imshow(pictures[name], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            else:
                ax.text(0.5, 0.5, "none", ha="center", va="center", color=GREY, transform=ax.transAxes)
    for c, name in enumerate(columns):
        out = name in held_out
        fig.text((left + (c + 0.48) * side) / width, 1 - (top - 0.05) / height, name.replace(" ", "\n"), ha="center", va="bottom", fontsize=6.5,
                 color="#B03A00" if out else "black", style="italic" if out else "normal")  # fmt: skip
    fig.text(0.01, 1 - 0.03 / height, title, ha="left", va="top", fontsize=7.5)
    return fig


# --- numbers ------------------------------------------------------------------------------------------------------
def _error(row: Mapping[str, object]) -> np.ndarray:
    """Distances to the interval's ends [2, 1]; the seeds' standard deviation where there are several."""
    if pd.notna(row["std"]):
        return np.array([[row["std"]], [row["std"]]])
    ends = np.array([[row["value"] - row["lo"]], [row["hi"] - row["value"]]], dtype=float)
    return np.clip(np.nan_to_num(ends), 0, None)


@styled
def quality_bars(results: pd.DataFrame, schema: Schema, kind: str) -> Figure:
    """FID and KID of every method and control, and attribute accuracy beside the judge's own score, with intervals."""
    metrics = [
        Item("quality", "FID"),
        Item("quality", "KID"),
        *(Item("alignment", f"accuracy:{a}") for a in schema.names),
    ]
    metrics = [m for m in metrics if any(m.of(results, k) is not None for k in methods_in(results, (m.stage,)))]
    if not metrics:
        return absent("quality: not available")
    keys = methods_in(results, ("quality", "alignment"))
    fig = figure(PAGE, 0.9 + 0.19 * len(keys))
    for ax, item in zip(np.atleast_1d(fig.subplots(1, len(metrics), sharey=True)), metrics, strict=True):
        for y, key in enumerate(keys):
            row = item.of(results, key)
            if row is None or pd.isna(row["value"]):
                ax.text(0.02, y, "n/a", va="center", color=GREY, fontsize=6, transform=ax.get_yaxis_transform())
                continue
            ax.errorbar(
                row["value"],
                y,
                xerr=_error(row),
                fmt=MARKER.get(key, "|"),
                color=COLOUR.get(key, GREY),
                ms=4,
                capsize=2,
                lw=1,
            )
        rows = [r for r in (item.of(results, k) for k in keys) if r is not None]
        sizes = {f"{r['n']:.0f}" for r in rows if pd.notna(r["n"])}
        ax.set(
            title=f"{item.label(results)}\nn = {'-'.join(sorted(sizes, key=int))}"
            if len(sizes) <= 2
            else item.label(results),
            yticks=range(len(keys)),
        )
        ax.set_yticklabels([TITLES[k].split(" (the")[0] for k in keys])
        ax.locator_params(axis="x", nbins=3)
        ax.grid(axis="x", lw=0.3)
    ax.invert_yaxis()
    seeds = int(results["seeds"].max())
    fig.suptitle(
        f"Quality and requested attributes (synthetic against {kind}; "
        + ("95 % intervals, n = 1 seed)" if seeds <= 1 else f"bars: std of {seeds} seeds)"),
        fontsize=8,
    )
    return fig


@styled
def subgroup_fid(results: pd.DataFrame, kind: str) -> Figure:
    """FID of each subgroup against its number of images, which alone raises it; KID beside it, which it does not."""
    here = results[
        (results["stage"] == "quality")
        & (results["setting"] == "test")
        & results["value"].notna()
        & (results["group"] != "")
    ]
    keys = [m for m in methods_in(here, ("quality",)) if m in config.METHODS]
    metrics = [m for m in ("FID", "KID") if (here["metric"] == m).any()]
    if not keys or not metrics:
        return absent("subgroup FID: not available (no group has enough images)")
    fig = figure(PAGE, 2.5)
    for ax, metric in zip(np.atleast_1d(fig.subplots(1, len(metrics))), metrics, strict=True):
        for key in keys:
            part = here[(here["metric"] == metric) & (here["method"] == key)]
            ax.scatter(
                part["n"],
                part["value"],
                s=11,
                color=COLOUR[key],
                marker=MARKER[key],
                label=TITLES[key],
                alpha=0.8,
                lw=0,
            )
        ax.set(
            xscale="log",
            xlabel=f"images in the group (n), synthetic and {kind}",
            ylabel=Item("quality", metric).label(results),
        )
        ax.set_title(
            "FID: small groups score worse by size alone" if metric == "FID" else "KID: unbiased in the group's size"
        )
        low, high = here["n"].min(), here["n"].max()
        ticks = [t for p in range(7) for t in (10**p, 3 * 10**p) if 0.5 * low <= t <= 2 * high]
        ax.set_xticks(ticks, [str(t) for t in ticks])
        ax.set_xlim(0.7 * low, 1.4 * high)
        if low < MIN_IMAGES < high:
            ax.axvline(MIN_IMAGES, color=GREY, lw=0.6, ls=":")
            ax.text(
                MIN_IMAGES,
                1,
                "ineligible ",
                ha="right",
                va="top",
                color=GREY,
                fontsize=6,
                transform=ax.get_xaxis_transform(),
            )
        ax.minorticks_off()
    fig.legend(
        *ax.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(5, len(keys)),
        handletextpad=0.2,
        columnspacing=1,
    )
    return fig


@styled
def sigma_history(history: Mapping[str, pd.DataFrame], schema: Schema) -> Figure:
    """Sigma of every category (columns "age=0-18" ...) over the steps, one panel per attribute; the loss gap below. {method: sigma.csv}."""
    if not history:
        return absent("FairDiffusion's sigma: not available")
    rows = len(schema) + 1
    fig = figure(COLUMN if len(history) == 1 else PAGE, 0.6 + 1.15 * rows)
    axes = fig.subplots(rows, len(history), sharex="col", sharey="row", squeeze=False)
    for column, (method, frame) in enumerate(history.items()):
        for k, attribute in enumerate(schema.attributes):
            ax = axes[k, column]
            for c, category in enumerate(attribute.categories):
                ax.plot(frame["step"], frame[f"{attribute.name}={category}"], color=PALETTE[c], label=category, lw=0.9)
            ax.set(ylim=(0, 1.03), ylabel=f"σ, {attribute.name}" if column == 0 else "")
            ax.legend(loc="upper left", bbox_to_anchor=(1, 1.1), handlelength=1, labelspacing=0.2)
        updates = frame.loc[frame["update"] > 0, "step"]
        axes[-1, column].plot(frame["step"], frame["gap"], color=GREY, lw=0.7)
        axes[-1, column].plot(updates, np.zeros(len(updates)), "|", color=PALETTE[3], ms=5)
        axes[-1, column].set(xlabel="training step", ylabel="loss gap" if column == 0 else "")
        axes[0, column].set_title(f"{TITLES[method]}, n = {len(frame)} steps, {len(updates)} updates (|)", fontsize=7.5)
    return fig


@styled
def uncertainty(frame: pd.DataFrame | None, held_out: Sequence[str], kind: str) -> Figure:
    """HCN's sigma per cell against its training images (columns name, sigma, train_n); held-out cells are open, at 0."""
    if frame is None or frame.empty:
        return absent("HCN uncertainty per cell: not available\n(train/hcn/uncertainty.csv is missing)")
    fig = figure(COLUMN, 2.4)
    ax = fig.subplots()
    out = frame["name"].isin(held_out)
    ax.scatter(frame["train_n"][~out], frame["sigma"][~out], s=14, color=COLOUR["hcn"], label="seen in training", lw=0)
    ax.scatter(frame["train_n"][out], frame["sigma"][out], s=18, fc="none", ec=COLOUR["text"], label="held out", lw=1)
    ax.set_xscale("symlog", linthresh=1)
    top = max(10, int(frame["train_n"].max()))
    ticks = [0, *(10**p for p in range(int(np.log10(top)) + 1))]
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.set(
        xlim=(-0.3, 1.6 * top),
        xlabel=f"training images of the cell ({kind})",
        ylabel="mean σ of z",
        title=f"HCN's uncertainty, n = {len(frame)} cells",
    )
    ax.minorticks_off()
    ax.legend(loc="best", handletextpad=0.2)
    return fig


GAPS = ("gap macro AUROC", "gap underdiagnosis")


@styled
def downstream_gaps(results: pd.DataFrame, kind: str) -> Figure:
    """Classifiers on real test images: overall AUROC and each gap between groups, per strategy and generator."""
    here = results[(results["stage"] == "downstream") & (results["group"] == "") & results["value"].notna()]
    names = list(here[["metric", "group_kind"]].drop_duplicates().itertuples(index=False, name=None))
    shown = [n for n in names if n == ("macro AUROC", "overall")] + [
        (m, k) for m, k in names if m in GAPS and k != "overall"
    ]
    if not shown:
        return absent("downstream gaps: not available")
    pairs = set(here[["setting", "method"]].itertuples(index=False, name=None))
    rows = sorted(pairs, key=lambda p: (p[0], list(TITLES).index(p[1]) if p[1] in TITLES else len(TITLES)))
    fig = figure(PAGE, 1.0 + 0.17 * len(rows))
    for ax, (metric, group) in zip(np.atleast_1d(fig.subplots(1, len(shown), sharey=True)), shown, strict=True):
        part = here[(here["metric"] == metric) & (here["group_kind"] == group)].set_index(["setting", "method"])
        for y, key in enumerate(rows):
            if key in part.index:
                row = part.loc[key].to_dict()
                ax.errorbar(
                    row["value"],
                    y,
                    xerr=_error(row),
                    fmt=MARKER.get(key[1], "o"),
                    color=COLOUR.get(key[1], GREY),
                    ms=4,
                    capsize=2,
                    lw=1,
                )
        ax.set(
            yticks=range(len(rows)),
            title=metric.replace(" macro", "\nmacro").replace("gap under", "gap\nunder")
            + ("" if group == "overall" else f"\n{group}"),
        )
        ax.set_yticklabels([f"{s}  {downstream_title(m)}" for s, m in rows])
        ax.locator_params(axis="x", nbins=3)
        ax.grid(axis="x", lw=0.3)
    ax.invert_yaxis()
    n = here["n"].dropna()
    fig.suptitle(f"Classifiers, tested on {kind}" + (f", n = {n.max():.0f} images" if len(n) else ""), fontsize=8)
    return fig


@styled
def interaction_dial(by_dial: pd.DataFrame, kind: str) -> Figure:
    """Zero-shot error against the interaction dial: columns dial, method, value, lo, hi, std, n."""
    fig = figure(COLUMN, 2.4)
    ax = fig.subplots()
    for i, (key, part) in enumerate(by_dial.groupby("method", sort=False)):
        part = part.sort_values("dial").assign(
            dial=lambda p, i=i: p["dial"] + 0.012 * i
        )  # apart, so that no interval hides another
        error = np.hstack([_error(row) for row in part.to_dict("records")])
        ax.errorbar(
            part["dial"],
            part["value"],
            yerr=error,
            color=COLOUR[key],
            marker=MARKER[key],
            ms=4,
            capsize=2,
            label=TITLES[key],
        )
    ax.set(
        xlabel="interaction of the attributes (0 = additive)",
        ylabel="KID-lite0, held-out cells",
        title=f"Zero-shot error ({kind}), n = {by_dial['n'].min():.0f}",
    )
    ax.legend()
    return fig
