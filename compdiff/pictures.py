"""Image files of unknown origin: what is wrong with one, and one as a grey square."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from PIL import Image

GREY = ("L", "RGBA", "RGB", "LA", "P")  # 8 bits per channel; the official release has some RGBA
MIN_SIDE, MAX_PIXELS = 16, 64 * 2**20
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)  # from Pillow


def image_problem(path: Path) -> tuple[str, str] | None:
    """What is wrong with one file and what to do, or None."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.mode not in GREY:
                return f"mode {image.mode} is not 8-bit grey or colour", "convert it to 8-bit PNG"
            if min(image.size) < MIN_SIDE or image.width * image.height > MAX_PIXELS:
                return f"{image.width}x{image.height} pixels: a placeholder or not a radiograph", "get the image again"
            image.verify()
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
    except UNREADABLE:
        return "truncated or not a PNG", "get the image again"
    return None


def load_square(path: Path, size: int) -> np.ndarray:
    """PNG file -> uint8 [size, size]: grey, padded with black to a square, Lanczos-resampled."""
    with Image.open(path, formats=["PNG"]) as image:
        grey = image.convert("L")
    side = max(grey.size)
    if grey.size != (side, side):
        square = Image.new("L", (side, side))
        square.paste(grey, ((side - grey.width) // 2, (side - grey.height) // 2))
        grey = square
    return np.asarray(grey if side == size else grey.resize((size, size), Image.Resampling.LANCZOS))
