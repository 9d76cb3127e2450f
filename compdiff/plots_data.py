"""The datasheet drawn: images per cell, ages and findings of every split. Counts only, no image and no identifier."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from compdiff import plots
from compdiff.datasets import SPLITS, Data


@plots.styled
def datasheet(data: Data) -> Figure:
    """Three panels: training images per cell (largest first, held-out cells marked), ages, share of every finding.

    A test set from outside has no training images: there the first panel counts its test images.
    """
    splits = [split for split in SPLITS if split in data.index["images"]]
    fig = plots.figure(plots.PAGE, 2.6)
    cells, ages, findings = fig.subplots(1, 3)
    main = splits[0]  # train; of a test set from outside: test
    called = "training" if main == "train" else main
    counts = data.cell_counts(main).sort_values(ascending=False, kind="stable")
    held = counts.index.isin(data.index["held_out"])
    places = np.arange(len(counts))
    cells.bar(places, counts.to_numpy(), color=plots.PALETTE[0], width=1.0)
    cells.plot(places[held], np.full(held.sum(), 0.6), "x", color=plots.PALETTE[3], markersize=4, label="held out")
    cells.set(yscale="log", ylim=(0.5, None), xlabel=f"{len(counts)} cells, largest first", ylabel=f"{called} images", xticks=[],
              title=f"{(counts == 0).sum()} cells without an image")  # fmt: skip
    if held.any():
        cells.legend()
    rows = {split: data.rows(split) for split in splits}
    names, shares = prevalence(data)
    for split, colour, place in zip(splits, plots.PALETTE, np.linspace(-0.3, 0.3, len(splits)), strict=False):
        years = rows[split]["age_years"]
        weights = np.full(len(years), 1 / len(years))
        ages.hist(years, bins=range(0, 125, 5), weights=weights, histtype="step", color=colour, label=split)
        marker = plots.MARKERS[splits.index(split)]
        findings.plot(shares[split], np.arange(len(names)) + place, marker, color=colour, markersize=3)
    ages.set(xlabel="age in years", ylabel="share of the split", title="ages")
    ages.legend()
    findings.set(yticks=range(len(names)), yticklabels=names, xlim=(0, None), xlabel="share of the split", title="findings")
    findings.invert_yaxis()
    findings.tick_params(axis="y", labelsize=5)
    return fig


def prevalence(data: Data) -> tuple[list[str], dict[str, list[float]]]:
    """Findings (of a label of more than two values one per value), and {split: share of its images that have each}."""
    asked: list[tuple[str, str, int]] = []  # shown name, column, value
    for label, phrases in data.manifest.labels.items():
        many = len(phrases) > 2
        asked += [(f"{label}: {phrases[v]}" if many else label, f"y_{label}", v) for v in (range(len(phrases)) if many else (1,))]
    rows = {split: data.rows(split) for split in SPLITS if split in data.index["images"]}
    shares = {split: [float((table[column] == v).mean()) for _, column, v in asked] for split, table in rows.items()}
    return [name for name, _, _ in asked], shares
