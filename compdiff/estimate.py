"""Measured truth of chest and fundus phantoms: estimates of the generative parameters from the picture alone."""

from functools import lru_cache

import numpy as np
from scipy import ndimage

from compdiff.painters import GRIDS, grid_waves
from compdiff.phantoms import EFFECTS
from compdiff.raster import grid, resample


def parameters(modality: str, image: np.ndarray) -> dict[str, float]:
    """Estimate truth parameters from one image alone, uint8 or float in [0, 1], [size, size]; a generated one may be imperfect.

    Keys are those of `truth`, units as in EFFECTS. Scales are approximate: compare with those of drawn phantoms, not with
    `truth` itself, when absolute values matter. Never NaN: a structure that is not found gives a finite, unusual value.
    """
    g = np.asarray(image)
    g = resample(np.nan_to_num(g.astype(np.float32)) / (255 if g.dtype == np.uint8 else 1), 64)
    cos, sin = grid_waves(64)
    window = np.hanning(64).astype(np.float32)
    window = np.outer(window, window)
    flat = ((g - ndimage.gaussian_filter(g, 4)) * window).ravel() * np.float32(2 / window.sum())
    a, b = cos @ flat, sin @ flat
    clean = g - (a @ cos + b @ sin).reshape(64, 64)
    grids = {k: v for k, v in zip(GRIDS, np.hypot(a, b).tolist()) if k in EFFECTS[modality]["base"]}
    corners = np.concatenate([g[:4, :4], g[:4, -4:]])                           # air (chest) or the dark mask (fundus)
    own = MEASURES[modality](clean)
    return own | grids | {"border": float(np.median(corners)) - .05}


def _first(ray: np.ndarray, level: float) -> float:
    """Fractional index at which a ray first falls below level; inf if it never does."""
    below = np.flatnonzero(ray < level)
    if len(below) == 0:
        return np.inf
    k = below[0]
    return float(k - (level - ray[k]) / (ray[k - 1] - ray[k])) if k else 0.


def _chest(g: np.ndarray) -> dict[str, float]:
    """Row by row, from the middle outwards: the heart ends where the grey falls half-way to the lung, the lung where it rises."""
    smooth = ndimage.gaussian_filter(g, (1.5, .7))
    sides = {-1: [], 1: []}
    walls = []
    for row in smooth[33:46]:
        top = np.median(row[28:37])
        wall = 0.
        for side in sides:
            ray = row[31::-1] if side < 0 else row[32:]
            dark = 7 + int(np.argmin(ray[7:21]))
            heart = _first(ray[:dark + 1], (ray[dark] + top) / 2)
            far = dark + _first(-ray[dark:], -(ray[dark] + .35 * (top - ray[dark])))
            sides[side].append(heart)
            wall += far + 1
        walls.append(wall)
    left, right, walls = (np.array(v) for v in (*sides.values(), walls))
    found = np.isfinite(left) & np.isfinite(right) & np.isfinite(walls)
    ratio = 0.
    if found.any():
        ratio = (np.percentile(left[found], 90) + np.percentile(right[found], 90) + 2) / np.median(walls[found])
    columns = np.r_[14:23, 41:50]
    bright = max(float(np.median(g[30:46, 29:36])), .05) / .80                  # undoes the exposure
    upper, lower = np.median(g[18:28, columns]) / bright, np.median(g[34:42, columns]) / bright
    ribs = ndimage.gaussian_filter1d(g, 2, axis=1)[14:36, columns]
    ribs = ribs - ndimage.gaussian_filter1d(ribs, 3, axis=0)
    steps = [np.diff(np.median(smooth[36:62, c], axis=1)) for c in (slice(14, 23), slice(41, 50))]
    dome = max(36.5 + np.argmax(step) for step in steps) / 32 - 1       # where the lung without effusion ends: the steepest rise
    return {"diaphragm": float(dome), "heart_thorax_ratio": float(ratio), "lung_darkness": float(.60 - upper),
            "breast_shadow": float(lower - upper - .05), "rib_contrast": float(2.5 * ribs.std() / bright)}


@lru_cache(maxsize=1)
def _disc_models() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Radial profiles of discs with cups, zero mean, unit norm [m, 56]; their radii (pixels of 64) and ratios [m]; weights [56]."""
    r = np.arange(0, 14, .25)
    radius, ratio = (v.ravel() for v in np.meshgrid(np.linspace(4, 10, 31), np.linspace(.1, .95, 35)))
    disc, cup = (np.clip(.5 + (v[:, None] - r) / 1.5, 0, 1) for v in (radius, radius * ratio))
    weight = (r + .5) / (r + .5).sum()
    model = disc + cup
    model = model - (model * weight).sum(1, keepdims=True)
    return model / np.sqrt((model ** 2 * weight).sum(1, keepdims=True)), radius, ratio, weight


def _fundus(g: np.ndarray) -> dict[str, float]:
    """Disc: brightest spot, then the best of a bank of radial profiles (upper quartile over angle looks past the vessels)."""
    spot = ndimage.gaussian_filter(g, 2.5)
    row, col = np.unravel_index(np.argmax(spot), spot.shape)
    r, angle = np.arange(0, 14, .25), np.arange(0, 2 * np.pi, np.pi / 16)[:, None]
    profile = ndimage.map_coordinates(g, np.stack([row + r * np.sin(angle), col + r * np.cos(angle)]), order=1, mode="nearest")
    profile = np.percentile(profile, 70, axis=0)
    models, radius, ratio, weight = _disc_models()
    fit = models @ (profile * weight)
    best = int(np.argmax(fit))
    lines = ndimage.grey_closing(g, (5, 5)) - g
    inner = slice(8, 56)
    slope = np.polyfit(grid(64)[1][inner, 0], np.median(g[inner, inner], axis=1), 1)[0]
    return {"cup_disc_ratio": float(ratio[best]), "disc_radius": float(radius[best] / 32 - .025),
            "vessel_width": float(lines[inner, inner].mean()), "gradient": float(slope)}


MEASURES = {"chest": _chest, "fundus": _fundus}
