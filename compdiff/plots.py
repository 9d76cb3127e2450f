"""How every figure looks, and how it is written: style, colours and markers, SVG and PNG. matplotlib only, no torch.

Widths are those of a two-column page: COLUMN (3.4 in) and PAGE (7 in). `save` writes an SVG that is the same byte for
byte for the same numbers, and a PNG of at most MAX_PNG bytes. The figures: plots_results, plots_groups,
plots_downstream, plots_training, plots_pictures.
"""

from __future__ import annotations

import base64
import io
import itertools
import re
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from compdiff import config, record

COLUMN, PAGE = 3.4, 7.0  # inches
MAX_PNG = 150_000  # bytes
STYLE = {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
         "legend.fontsize": 7, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
         "font.family": "DejaVu Sans", "svg.fonttype": "none", "svg.hashsalt": "compdiff", "axes.linewidth": 0.6,
         "lines.linewidth": 1.2}  # fmt: skip
# Okabe and Ito's palette: told apart by colour-blind readers; a method keeps its colour and marker in every figure.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000", "#8A8A8A")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")  # one more than colours: no pair repeats before the 91st method
COLOUR = dict(zip(config.METHODS, itertools.cycle(PALETTE), strict=False))
MARKER = dict(zip(config.METHODS, itertools.cycle(MARKERS), strict=False))
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
    """<name>.svg and <name>.png. The PNG loses resolution, then colours, until it has at most MAX_PNG bytes.

    ValueError if it never does.
    """
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


# --- for every figure of numbers --------------------------------------------------------------------------------------
def error(row: Mapping[str, object]) -> np.ndarray:
    """Distances from a number to the ends of its interval, [2, 1]; 0 where it has none."""
    ends = np.array([[row["value"] - row["lo"]], [row["hi"] - row["value"]]], dtype=float)
    return np.clip(np.nan_to_num(ends), 0, None)


def intervals_of(results: pd.DataFrame) -> str:
    """What the bars of a figure are, in words."""
    seeds = int(results["seeds"].max()) if len(results) else 0
    return "95 % intervals, n = 1 seed" if seeds <= 1 else f"95 % intervals, {seeds} seeds"
