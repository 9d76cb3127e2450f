"""Pictures of the lessons: galleries, a map of all cells, the hierarchy drawn. Arrays in, pictures out."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
from IPython.display import Image
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from compdiff.attributes import Schema


def small(figure: Figure, mode: str = "RGB") -> Image:
    """The figure as a PNG of 32 greys ("L") or 64 colours ("RGB"), a third of the usual size; a cell ends with it."""
    plt.close(figure)  # or a notebook shows it a second time
    figure.savefig(drawn := io.BytesIO(), format="png", bbox_inches="tight", pad_inches=0.05)
    picture = PIL.Image.open(drawn).convert(mode)
    steps = [min(255, round(v / 8) * 8) for v in range(256)]  # even ones, so that a small bright disc keeps its shades
    picture = picture.point(steps) if mode == "L" else picture.quantize(64, PIL.Image.Quantize.MAXCOVERAGE)
    picture.save(content := io.BytesIO(), format="png", optimize=True)
    return Image(content.getvalue())


def gallery(
    images: Sequence[np.ndarray],
    titles: Sequence[str],
    columns: int,
    rows: Sequence[str] = (),
    side: float = 1.05,
    title: str = "",
) -> Image:
    """Grey images [n, S, S] in reading order, `columns` to a line; `rows` labels the lines (left), `side` is in inches."""
    lines = -(-len(images) // columns)
    above = [
        0.18 * max(t.count("\n") + bool(t) for t in titles[i : i + columns]) for i in range(0, len(images), columns)
    ]  # inches
    height = side * lines + sum(above) + (0.22 if title else 0)
    left = 0.08 * max((len(word) for label in rows for word in label.split("\n")), default=0)
    figure = Figure(figsize=(side * columns + left, height), dpi=80)
    axes = figure.subplots(lines, columns, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for ax, image, name in zip(axes.flat, images, titles, strict=False):
        ax.imshow(image, cmap="gray", vmin=0, vmax=255)
        ax.set_title(name, fontsize=7, pad=2)
    for ax, label in zip(axes[:, 0], rows, strict=False):
        ax.set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center")
    if title:
        figure.suptitle(title, fontsize=8)
    figure.tight_layout(pad=0.3)
    return small(figure, "L")


def cell_map(values: np.ndarray, schema: Schema, held_out: Sequence[tuple[int, ...]], form: str = "{:g}") -> Image:
    """One number per cell, [C_0, C_1, ...]: lines are the first attribute, columns the others, the last fastest.

    Held-out cells are hatched; the colour is logarithmic. ValueError where no number is above zero.
    """
    first, *others = schema.attributes
    wide = values.reshape(len(first), -1)
    if not (wide > 0).any():
        raise ValueError("no cell holds anything: there is no map to draw")
    names = ["\n".join(words) for words in itertools.product(*(a.categories for a in others))]
    broad = max(0.62, 0.058 * max(len(word) for name in names for word in name.split("\n")))  # inches of a column
    figure = Figure(figsize=(1.6 + broad * wide.shape[1], 0.4 + 0.1 * len(others) + 0.4 * len(first)), dpi=80)
    ax = figure.subplots()
    ax.imshow(np.log10(np.maximum(wide, wide[wide > 0].min())), cmap="Blues", aspect="auto")
    light = wide < np.sqrt(wide.max() * wide[wide > 0].min())
    for i, j in np.ndindex(wide.shape):
        ax.text(
            j,
            i,
            form.format(wide[i, j]),
            ha="center",
            va="center",
            fontsize=8,
            color="black" if light[i, j] else "white",
        )
    for i, *rest in held_out:
        j = np.ravel_multi_index(rest, schema.sizes[1:])
        corner = (j - 0.5, i - 0.5)
        ax.add_patch(Rectangle(corner, 1, 1, fill=False, hatch="////", edgecolor="#d55e00", linewidth=1.5))
    ax.set_xticks(range(len(names)), names, fontsize=7)
    ax.set_yticks(range(len(first)), first.categories, fontsize=7)
    ax.set_ylabel(first.name)
    figure.tight_layout(pad=0.4)
    return small(figure)


def hierarchy(names: Sequence[str], pairs: Sequence[tuple[int, int]]) -> Image:
    """Boxes and lines: attributes -> pairs -> whole -> token beside the text tokens."""
    figure = Figure(figsize=(6.2, 2.5), dpi=80)
    ax = figure.subplots()
    ax.set(xlim=(-0.6, 6.3), ylim=(-0.6, max(len(names), len(pairs)) - 0.4))
    ax.axis("off")
    middle = (max(len(names), len(pairs)) - 1) / 2
    spread = lambda n: [middle + (n - 1) / 2 - i for i in range(n)]  # noqa: E731  heights of n boxes, top first

    def box(x: float, y: float, text: str, colour: str) -> None:
        style = dict(boxstyle="round", facecolor=colour, edgecolor="0.4")
        ax.text(x, y, text, ha="center", va="center", fontsize=8, bbox=style, zorder=2)

    def line(x0: float, y0: float, x1: float, y1: float) -> None:
        ax.plot((x0, x1), (y0, y1), color="0.6", linewidth=1, zorder=1)

    low, high = spread(len(names)), spread(len(pairs))
    for (i, j), y in zip(pairs, high, strict=True):
        line(0, low[i], 1.7, y)
        line(0, low[j], 1.7, y)
        line(1.7, y, 3.2, middle)
        box(1.7, y, f"{names[i]} + {names[j]}", "#cfe8f3")
    for name, y in zip(names, low, strict=True):
        box(0, y, name, "#f3f3f3")
    line(3.2, middle, 5.5, middle)
    box(3.2, middle, "whole h", "#fde0b6")
    box(4.25, middle, "$\\mu, \\sigma$", "#fde0b6")
    box(5.5, middle, "token", "#d5edc8")
    for x, text in ((0, "level 1"), (1.7, "level 2"), (3.2, "level 3"), (5.5, "context")):
        ax.text(x, -0.5, text, ha="center", fontsize=7, color="0.4")
    figure.tight_layout(pad=0.2)
    return small(figure)
