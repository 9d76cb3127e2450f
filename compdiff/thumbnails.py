"""06. What stands in for the main extractor while its weights are not here: thumbnails, under their own name.

They let every cell of the lesson show something. None of their numbers enters the results: `withheld`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from compdiff import weights

NAME = "thumbnails"  # the extractor column of their rows
SIDE = 16


def lacking(extractor: str, folder: str = "") -> str:
    """"" where the extractor's weights are here; else "not available" and the remedy. ValueError: a wrong file."""
    try:
        weights.weight_file(extractor, folder)
    except weights.NotAvailable as error:
        return error.note
    return ""


def describe(images: np.ndarray) -> np.ndarray:
    """uint8 [n, S, S], S >= 16 -> float32 [n, 256]: mean grey values, 0 to 1, of 16 x 16 blocks of whole pixels."""
    step = images.shape[-1] // SIDE
    if images.ndim != 3 or not step:
        raise ValueError(f"thumbnails are made of images [n, S, S] of {SIDE} px or more, got {list(images.shape)}")
    x = images[:, : SIDE * step, : SIDE * step].reshape(len(images), SIDE, step, SIDE, step)
    return (x.mean((2, 4)) / 255).reshape(len(images), -1).astype(np.float32)


def withheld(rows: Sequence[dict], extractor: str, note: str) -> list[dict]:
    """The rows, those of the thumbnails as the extractor's whose place they took: without a value, the note says why."""
    empty = {"value": np.nan, "lo": np.nan, "hi": np.nan, "extractor": extractor, "note": note}
    return [r | empty if r["extractor"] == NAME else r for r in rows]
