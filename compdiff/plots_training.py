"""What a training wrote down: FairDiffusion's sigma over its steps, HCN's uncertainty per cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from compdiff.attributes import Schema
from compdiff.frames import TITLES
from compdiff.plots import COLUMN, GREY, PAGE, PALETTE, absent, figure, styled


@styled
def sigma_history(history: Mapping[str, pd.DataFrame], schema: Schema, seed: int) -> Figure:
    """Sigma of every category (columns "age=0-18" ...) over the steps, one panel per attribute; the loss gap below.

    history: {method: sigma.csv} of one training seed.
    """
    if not history:
        return absent("FairDiffusion's sigma: not available")
    grouped = [a for a in schema.attributes if any(f"{a.name}={a.categories[0]}" in frame for frame in history.values())]
    rows = len(grouped) + 1
    fig = figure(COLUMN if len(history) == 1 else PAGE, 0.75 + 1.15 * rows)
    axes = fig.subplots(rows, len(history), sharex="col", sharey="row", squeeze=False)
    for column, (method, frame) in enumerate(history.items()):
        for k, attribute in enumerate(grouped):
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
    fig.suptitle(f"FairDiffusion's sigma, seed {seed}", fontsize=8)
    return fig


@styled
def uncertainty(frame: pd.DataFrame | None, held_out: Sequence[str], kind: str, seed: int) -> Figure:
    """HCN's sigma per cell against its training images (columns name, sigma, train_n); held-out cells: open, at 0.

    frame: uncertainty.csv of one training seed.
    """
    if frame is None or frame.empty:
        return absent("HCN uncertainty per cell: not available\n(train/hcn/uncertainty.csv is missing)")
    fig = figure(COLUMN, 2.4)
    ax = fig.subplots()
    out = frame["name"].isin(held_out)
    ax.scatter(frame["train_n"][~out], frame["sigma"][~out], s=14, color=PALETTE[0], label="not held out", lw=0)
    ax.scatter(frame["train_n"][out], frame["sigma"][out], s=18, fc="none", ec=PALETTE[3], label="held out", lw=1)
    ax.set_xscale("symlog", linthresh=1)
    top = max(10, int(frame["train_n"].max()))
    ticks = [0, *(10**p for p in range(int(np.log10(top)) + 1))]
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.set(
        xlim=(-0.3, 1.6 * top),
        xlabel=f"training images of the cell ({kind})",
        ylabel="mean σ of z",
        title=f"HCN's uncertainty, n = {len(frame)} cells, seed {seed}",
    )
    ax.minorticks_off()
    ax.legend(loc="best", handletextpad=0.2)
    return fig
