"""The architecture, drawn from a schema, and galleries of images. Arrays in, figures out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from compdiff import galleries
from compdiff.attributes import Schema
from compdiff.frames import TITLES
from compdiff.paths import RunFolder
from compdiff.plots import GREY, PAGE, figure, styled

RED = "#B03A00"  # names of held-out cells, and of suspected copies


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
    """The Hierarchical Conditioner Network of a schema: attributes -> pairs -> one token beside the text's -> UNet."""
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
    schema: Schema, counts: Mapping[str, int], held_out: Sequence[str] = (), columns: int = 12,
    drawn: Collection[str] | None = None,
) -> list[tuple[int, ...]]:  # fmt: skip
    """At most `columns` cells for the gallery, in schema order; `drawn`: names of those that have an image, None = all.

    Every category of the second attribute, the most and least common of the third, and of the first those with the
    most held-out cells, then the most common.
    """
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
    chosen = [x for x in chosen if drawn is None or schema.cell_name(x) in drawn]
    return sorted(chosen, key=lambda x: (x[0], *x[:0:-1]))[:columns]


@styled
def gallery(
    images: Mapping[str, Mapping[str, np.ndarray]], columns: Sequence[str], held_out: Sequence[str], title: str
) -> Figure:
    """Rows of images {row title: {cell name: uint8 [S, S]}}, one column per cell; held-out cells in red italics."""
    left, top = 0.95, 0.66
    side = (PAGE - left) / max(len(columns), 6)
    fig = Figure(figsize=(left + side * len(columns), top + side * len(images)))
    width, height = fig.get_size_inches()
    for r, (row, pictures) in enumerate(images.items()):
        fig.text(
            (left - 0.06) / width,
            1 - (top + (r + 0.5) * side) / height,
            on_lines(row),
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
        fig.text((left + (c + 0.48) * side) / width, 1 - (top - 0.05) / height, name.replace(" ", "\n"), ha="center",
                 va="bottom", fontsize=6.5, color=RED if out else "black",
                 style="italic" if out else "normal")  # fmt: skip
    fig.text(0.01, 1 - 0.03 / height, title, ha="left", va="top", fontsize=7.5)
    return fig


def on_lines(title: str) -> str:
    """A method's title, broken where it may be: HCN, (CompDiff)."""
    return title.replace(" (", "\n(").replace(" + ", " +\n")


# --- copies -------------------------------------------------------------------------------------------------------
def closest_pairs(folders: Mapping[int, RunFolder], methods: Sequence[str]) -> dict[str, pd.DataFrame]:
    """{space: the pairs of memorisation_pairs.csv of all seeds and of these methods, nearest first}; {} without files.

    folders: of each seed. Columns seed and file (the generated image) are added; pairs whose image is gone are not.
    """
    tables = {seed: folder.results / "memorisation_pairs.csv" for seed, folder in folders.items()}
    parts = [pd.read_csv(table, dtype={"generated": str, "training": str}).assign(seed=seed)
             for seed, table in tables.items() if table.exists()]  # fmt: skip
    if not parts:
        return {}
    pairs = pd.concat(parts)
    pairs = pairs[pairs["method"].isin(methods)].sort_values("distance", kind="stable")
    pairs["file"] = [folders[p.seed].generated(p.method, "test") / "images" / f"{p.generated}.png"
                     for p in pairs.itertuples()]  # fmt: skip
    pairs = pairs.loc[[file.exists() for file in pairs["file"]]]
    return dict(iter(pairs.groupby("space")))


@styled
def nearest_training(
    pairs: pd.DataFrame, generated: np.ndarray, training: np.ndarray, listed: int, what: str
) -> Figure:
    """Generated images above the training images nearest to them, and the differences; red numbers: suspected copies.

    pairs: [n] rows of `closest_pairs`, of which there are `listed`; generated, training: uint8 [n, S, S]; what: as in
    `galleries.copies`, whose ValueError says that nothing but phantoms may be drawn.
    """
    names = [f"{on_lines(TITLES[p.method])}\nseed {p.seed}\n{p.distance:.3g}" for p in pairs.itertuples()]
    fig = galleries.copies(generated, training, names, what)
    plt.close(fig)  # or a notebook shows it a second time
    for ax, suspected in zip(fig.axes, pairs["distance"] < pairs["threshold"], strict=False):
        ax.title.set(fontsize=6.5, color=RED if suspected else "black")
    alarm = " or ".join(f"{t:.3g}" for t in pairs["threshold"].unique())
    means = "a copy or mere blur" if pairs["space"].iloc[0] == "pixels" else "a suspected copy"
    fig.suptitle(f"Nearest training {what}s by {pairs['space'].iloc[0]}:\nthe {len(pairs)} closest of n = {listed} pairs "
                 f"of all methods and seeds\nnumber: distance; red: below {alarm}, {means}", fontsize=8)  # fmt: skip
    return fig
