"""A generated image as a picture to show: enlarged, with "synthetic, not a patient" in its margin and its metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from compdiff import record

MARK = "synthetic, not a patient"
WIDTH = 256  # pixels: room for the mark
LINE, TEXT = 18, 13  # height of a line and of its letters, pixels


def stamped(image: np.ndarray, lines: Sequence[str] = ()) -> Image.Image:
    """uint8 [H, W] or [H, W, 3] -> the image, enlarged by a whole number to at least WIDTH, above MARK and `lines`."""
    times = max(1, -(-WIDTH // image.shape[1]))
    large = image.repeat(times, axis=0).repeat(times, axis=1)
    height, width = large.shape[:2]
    page = Image.new("RGB", (width, height + LINE * (1 + len(lines)) + 4), "black")
    page.paste(Image.fromarray(large))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(TEXT)
    for k, line in enumerate((MARK, *lines)):
        draw.text((4, height + 2 + k * LINE), line, fill="#ffcc66" if k == 0 else "white", font=font)
    return page


def save(path: Path, image: np.ndarray, lines: Sequence[str], about: Mapping[str, object]) -> Path:
    """`stamped` as a PNG whose metadata says MARK and, by name, everything in `about`; returns its path."""
    info = PngImagePlugin.PngInfo()
    for name, value in {"Description": MARK, **about}.items():
        info.add_itxt(name, str(value))
    with record.atomic(path, durable=False) as temporary:
        stamped(image, lines).save(temporary, format="PNG", pnginfo=info)
    return Path(path)
