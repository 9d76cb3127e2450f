"""Heart masks to look at and to paint: the pair ED | ES as one grey picture, and back again.

Value v of a mask is grey 85 v: 0 background, 1 cavity (85), 2 myocardium (170), 3 right ventricle (255). ED is the left
half. A mask from outside is read by `pictures`, so it is never trusted to be what it says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compdiff import cardiac, heart, pictures
from compdiff.controlnet import MAX_MASK
from compdiff.pictures import Unreadable

GREY = 255 // MAX_MASK  # from one mask value to the next
MAX_BYTES, MIN_SIDE, MAX_SIDE = 2 * 2**20, 32, 2048  # of an upload
EXAMPLES = 6


@dataclass(frozen=True)
class Example:
    """A phantom heart's mask, and what is true of it."""

    row: Mapping[str, object]  # age_years, sex, age, bmi, findings
    mask: np.ndarray  # uint8 [S, S, 3], stacked
    truth: Mapping[str, float]  # parameters without individual scatter; ejection fraction of the mask

    @property
    def name(self) -> str:
        return f"{self.row['findings']}, EF {measured(self.mask)['ejection fraction']:.2f}"


def examples(size: int = 64, n: int = EXAMPLES) -> list[Example]:
    """Phantom hearts that no model was trained on, healthy and failing ones in turn."""
    made = cardiac.phantom_studies(n, "studio", seed=0, prevalence=0.5, balanced=True)
    order = np.argsort(made.table["y_heart failure"].to_numpy(), kind="stable").reshape(2, -1).T.ravel()
    masks = made.masks("stacked", size, order)
    rows = made.table.iloc[order].to_dict("records")
    return [Example(row, mask, truth(row)) for row, mask in zip(rows, masks, strict=True)]


def truth(row: Mapping[str, object], interaction: float = 0.5) -> dict[str, float]:
    """The parameters of a phantom heart as asked for: heart.EFFECTS without individual scatter, mm and fractions."""
    no_scatter = np.zeros(len(heart.EFFECTS["base"]))
    failing, female = int(row["y_heart failure"]), int(row["sex"] == "Female")
    return heart.parameters(row["age_years"], female, row["bmi_value"], failing, no_scatter, interaction)


def measured(mask: np.ndarray) -> dict[str, float]:
    """What a stacked mask [S, S, 3] asks for: areas in mm2 and thickness in mm at ED, and the ejection fraction between
    its two halves. ValueError without a cavity at ED."""
    ed, es = cardiac.unstack(mask)
    sizes = {f"{name} at ED": value for name, value in heart.measure(ed).items()}
    return sizes | {"ejection fraction": heart.implied_ejection_fraction(ed, es)}


def to_grey(mask: np.ndarray, times: int = 1) -> np.ndarray:
    """Stacked mask uint8 [S, S, 3] -> ED | ES in grey, uint8 [times S, 2 times S]."""
    ed, es = cardiac.unstack(mask)
    return (np.hstack([ed, es]) * GREY).astype(np.uint8).repeat(times, axis=0).repeat(times, axis=1)


def read(path: Path, size: int) -> np.ndarray:
    """An uploaded PNG -> stacked mask uint8 [size, size, 3]. It holds ED | ES in the four greys, or in values 0 to 3.

    Unreadable, in words: too large, no PNG, of another shape, with other values, or without a cavity.
    """
    path = Path(path)
    if path.stat().st_size > MAX_BYTES:
        raise Unreadable(f"the file is larger than {MAX_BYTES // 2**20} MiB", "send a smaller picture")
    if path.suffix.lower() != ".png":
        raise Unreadable("the file is no .png", "save the mask as PNG: other kinds change its values")
    grey = np.asarray(pictures.read_grey(path))
    if max(grey.shape) > MAX_SIDE:
        raise Unreadable(f"{grey.shape[1]}x{grey.shape[0]} pixels: at most {MAX_SIDE} each way", "shrink the picture")
    values = set(np.unique(grey).tolist())
    if values <= set(range(MAX_MASK + 1)):
        grey = grey * np.uint8(GREY)
    elif odd := sorted(values - {v * GREY for v in range(MAX_MASK + 1)}):
        raise Unreadable(
            f"it holds {len(odd)} unknown values, such as {odd[0]}", "use greys 0, 85, 170, 255, or 0 to 3"
        )
    return from_grey(grey, size)


def from_grey(grey: np.ndarray, size: int) -> np.ndarray:
    """ED | ES in grey, uint8 [h, 2 h] -> stacked mask uint8 [size, size, 3].

    Each pixel takes the value that covers most of it, so that a brush's soft edge leaves no rim of another tissue.
    Unreadable for another shape, and without a cavity at ED.
    """
    height, width = grey.shape
    if width != 2 * height or height < MIN_SIDE:
        raise Unreadable(
            f"{width}x{height} pixels: not two square frames side by side, of {MIN_SIDE} pixels or more",
            "put the two frames side by side, ED on the left",
        )
    times = -(-size // height)  # 1 where the picture is as large as the mask shall be
    nearest = np.rint(grey / GREY).astype(np.uint8).repeat(times, axis=0).repeat(times, axis=1)
    shares = [_shrunk(nearest == value, size) for value in range(MAX_MASK + 1)]
    both = np.argmax(shares, axis=0).astype(np.uint8)  # [size, 2 size]
    if not (both[:, :size] == heart.CAVITY).any():
        raise Unreadable("no left-ventricle cavity (grey 85) in the ED half", "draw one, or take an example")
    return cardiac.stack(both[:, :size], both[:, size:])


def _shrunk(covered: np.ndarray, size: int) -> np.ndarray:
    """Boolean [h, 2 h] -> covered part of each pixel of [size, 2 size], by summed areas; h need not be a multiple."""
    height = covered.shape[0]
    summed = np.zeros((height + 1, 2 * height + 1))
    summed[1:, 1:] = covered.cumsum(axis=0).cumsum(axis=1)
    rows, columns = (np.rint(np.arange(n + 1) * height / size).astype(int) for n in (size, 2 * size))
    corners = summed[np.ix_(rows, columns)]
    area = np.outer(np.diff(rows), np.diff(columns))
    return (corners[1:, 1:] - corners[:-1, 1:] - corners[1:, :-1] + corners[:-1, :-1]) / area
