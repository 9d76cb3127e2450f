"""Grids of images with names at rows and columns, and the rows that show all groups on few lines. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure


def grid(images: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str, inch: float = 0.95) -> Figure:
    """Grey uint8 images [R, C, S, S] with R row and C column names; one image is `inch` wide.

    `title` must say what the images are: synthetic, phantom or real. ValueError for names that do not fit the images.
    """
    images = np.asarray(images)
    if images.shape[:2] != (len(rows), len(columns)):
        raise ValueError(f"{len(rows)} row and {len(columns)} column names for images {list(images.shape)}")
    height = inch * len(rows) + 0.75
    figure, axes = plt.subplots(
        len(rows), len(columns), squeeze=False, figsize=(inch * len(columns) + 1.5, height), layout="constrained"
    )
    for r, c in np.ndindex(axes.shape):
        axis = axes[r, c]
        axis.imshow(images[r, c], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        if r == 0:
            axis.set_title(columns[c], fontsize=8)
        if c == 0:
            axis.set_ylabel(rows[r], rotation=0, ha="right", va="center", fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure


def copies(generated: np.ndarray, training: np.ndarray, names: Sequence[str], what: str) -> Figure:
    """Pairs of uint8 images [n, S, S], one below the other: generated, nearest training image, and their difference,
    mid-grey where they are equal.

    names: one per pair. `what` says what the training images are, "phantom". ValueError: anything else, because a
    training image that shows a patient is not to be drawn.
    """
    if what != "phantom":
        raise ValueError(f"training images are drawn when they are phantoms, these are {what!r}")
    difference = (generated.astype(np.int16) - training) // 2 + 128
    images = np.stack([generated, training, difference.astype(np.uint8)])
    return grid(images, ("generated", f"training\n{what}", "difference"), names, f"Nearest training {what}s", inch=0.8)


def spread(rows: pd.DataFrame, n: int) -> pd.DataFrame:
    """One row for each of at most `n` cells, evenly over all cells in `rows` (column `cell`), the first and the last among them.

    Where `rows` says which cells are `held_out`, one of those is among the chosen: it replaces the nearest other cell.
    """
    first = rows.drop_duplicates("cell").sort_values("cell")
    at = np.linspace(0, len(first) - 1, min(n, len(first))).round().astype(int)
    held = np.flatnonzero(first["held_out"].astype(bool)) if "held_out" in first else np.array([], dtype=int)
    if len(held) and not np.isin(at, held).any():
        replaced, by = np.unravel_index(np.abs(at[:, None] - held).argmin(), (len(at), len(held)))
        at[replaced] = held[by]
    return first.iloc[at]
