"""Drawing by formulas on a square of pixels: coordinates in [-1, 1], soft masks, bumps, and resampling between sizes."""

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=8)
def grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres x, y in [-1, 1], each float32 [size, size]."""
    c = ((np.arange(size) + .5) * 2 / size - 1).astype(np.float32)
    return tuple(np.ascontiguousarray(a) for a in np.meshgrid(c, c))


@lru_cache(maxsize=16)
def _resampler(source: int, size: int) -> np.ndarray:
    """Matrix [size, source]: linear interpolation between pixel centres, averaging over a pixel when shrinking."""
    fine = max(1, -(-source // size)) * 2 * size
    at = (np.arange(fine) + .5) * source / fine - .5
    weights = np.maximum(0, 1 - abs(np.clip(at, 0, source - 1)[:, None] - np.arange(source)))
    return weights.reshape(size, -1, source).mean(1).astype(np.float32)


def resample(field: np.ndarray, size: int) -> np.ndarray:
    """[n, n] -> [size, size]: one random field looks the same at every size."""
    return field if len(field) == size else _resampler(len(field), size) @ field @ _resampler(len(field), size).T


def edge(distance: np.ndarray, soft: float = .03) -> np.ndarray:
    """Antialiased inside mask: 1 where distance > 0, a ramp at least one pixel wide around 0."""
    width = max(soft, 2 / distance.shape[-1])
    return np.minimum(np.maximum(distance * np.float32(1 / width) + np.float32(.5), 0), 1)


def blob(x: np.ndarray, y: np.ndarray, x0: float, y0: float, sx: float, sy: float) -> np.ndarray:
    """Gaussian bump of height 1."""
    return np.exp(-.5 * (((x - x0) * (1 / sx)) ** 2 + ((y - y0) * (1 / sy)) ** 2))
