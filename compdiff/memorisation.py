"""06. Is it new? Nearest training image of every image, in pixels and in features, against that of real test images.

A suspected copy is nearer to the training set than real images, which nobody copied, usually are: the threshold is an
order statistic of the real validation images' distances, so that 1 % of such images alarm whatever the distribution.
The real test images take no part in it: their share of suspected copies is a control, which may be higher or lower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from compdiff import metrics, stats
from compdiff.evaluate import ImageSet, Reference, draws, result
from compdiff.stats import Interval

ALARM = 0.01  # share of real validation images that may alarm
SHIFT = 3  # pixels, of images reduced to SIDE
SIDE = 64
CHUNK = 512  # images compared with the whole training set at once
EPSILON = 1e-3  # of MiFID: an exact copy's penalty is then 1,000, not the rounding of a cosine
PAIR_COLUMNS = ["method", "space", "generated", "training", "distance", "threshold"]


@dataclass(frozen=True)
class Nearest:
    """For each of n images the nearest training image."""

    distance: np.ndarray  # [n]
    index: np.ndarray  # int64 [n], row of the training images


Finder = Callable[[np.ndarray, np.ndarray], np.ndarray]  # a [n, ...], b [m, ...] -> distances [n, m]


# --- distances --------------------------------------------------------------------------------------------------------
def feature_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distances [n, m] of features [n, d] and [m, d]."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return np.sqrt(np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0))


def pixel_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """min over shifts of sqrt(2 - 2 r), r the correlation of two uint8 pictures [n, S, S], [m, S, S] -> [n, m].

    Blind to brightness and contrast (r is) and to shifts of up to 3 px: the middle of a is compared with windows of b,
    so that no border is invented. Larger pictures are first reduced to 64 px. 0 = the same picture, 2 = its negative.
    """
    a, b = (_reduced(x) for x in (a, b))
    if a.shape[1:] != b.shape[1:] or min(a.shape[1:]) <= 4 * SHIFT:
        raise ValueError(f"pictures of one shape above {4 * SHIFT} px are compared; got {a.shape} and {b.shape}")
    height, width = (n - 2 * SHIFT for n in a.shape[1:])
    middle = _standard(a[:, SHIFT : SHIFT + height, SHIFT : SHIFT + width])
    best = np.full((len(a), len(b)), -1, dtype=np.float32)
    for y, x in np.ndindex(2 * SHIFT + 1, 2 * SHIFT + 1):
        np.maximum(best, middle @ _standard(b[:, y : y + height, x : x + width]).T, out=best)
    return np.sqrt(np.maximum(2 - 2 * best, 0))


def _standard(x: np.ndarray) -> np.ndarray:
    """[n, h, w] -> [n, h * w], mean 0 and norm 1 (a flat picture: 0)."""
    x = x.reshape(len(x), -1) - x.mean((1, 2))[:, None]
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6)


def _reduced(x: np.ndarray) -> np.ndarray:
    """[n, S, S] -> float32, means of whole blocks so that the side is below 2 * 64 px."""
    step = max(1, x.shape[1] // SIDE)
    side = x.shape[1] // step
    x = x[:, : side * step, : side * step].astype(np.float32)
    return x.reshape(len(x), side, step, side, step).mean((2, 4))


def nearest(
    finder: Finder, a: np.ndarray, b: np.ndarray, patients: tuple[np.ndarray, np.ndarray] | None = None
) -> Nearest:
    """The nearest of b [m, ...] for each of a [n, ...], in chunks.

    patients: of a [n] and b [m]; images of one patient are no pair then. Needed where a are real images whose patients
    may be among b (leave one patient out); never for generated ones. ValueError: b is empty, or all of one patient.
    """
    if not len(b):
        raise ValueError("no training images to compare with")
    distance, index = np.empty(len(a)), np.empty(len(a), dtype=np.int64)
    for i in range(0, len(a), CHUNK):
        here = slice(i, i + CHUNK)
        found = finder(a[here], b)
        if patients is not None:
            found = np.where(patients[0][here, None] == patients[1], np.inf, found)
        index[here] = found.argmin(1)
        distance[here] = found.min(1)
    if not np.isfinite(distance).all():
        raise ValueError("some image has no training image of another patient")
    return Nearest(distance, index)


# --- threshold, rows, pairs -------------------------------------------------------------------------------------------
def threshold(real: np.ndarray, rate: float = ALARM) -> tuple[float, float]:
    """Distances of real validation images [n] -> (t, rate): another one is below t with probability `rate` at most.

    t = the r-th smallest, r = floor(rate (n + 1)): probability r / (n + 1) for any continuous distribution. With fewer
    than 1 / rate - 1 images r = 1, and the rate that comes back is 1 / (n + 1).
    """
    if not len(real):
        raise ValueError("a threshold needs real validation images")
    r = max(1, int(rate * (len(real) + 1) + 1e-9))
    return float(np.sort(real)[r - 1]), r / (len(real) + 1)


def audit(s: ImageSet, ref: Reference, found: Nearest, real: Nearest, n_train: int, space: str, resamples: int,
          seed: int) -> list[dict]:  # fmt: skip
    """Median "nearest training distance" and share of "suspected copies" of one set; " (pixels)" in pixel space.

    found, real: of the set and of the real validation images, in the space named ("pixels", or a features' extractor).
    Intervals by patient; a share of 0 or 1, which resampling cannot vary, gets the Jeffreys interval of its patients.
    """
    limit, rate = threshold(real.distance)
    copied = (found.distance < limit).astype(float)
    share = stats.share_interval(copied, draws(s, ref, resamples, seed)[0])
    ending = " (pixels)" if space == "pixels" else ""
    who = ("memorisation", s.method, ("overall", ""))
    here = {"n": len(copied), "n_ref": n_train, "extractor": space}
    note = f"threshold {limit:.4g}: {rate:.1%} of real validation images alarm"
    return [result(*who, f"nearest training distance{ending}", float(np.median(found.distance)), **here),
            result(*who, f"suspected copies{ending}", share, note=note, **here)]  # fmt: skip


def names(rows: pd.DataFrame, access: str) -> np.ndarray:
    """What a pair may be called: the ids of generated data; row numbers of any other, whose ids stay where they are."""
    return rows["id"].to_numpy(str) if access == "generated" else np.arange(len(rows)).astype(str)


def closest(found: Nearest, n: int = 10) -> np.ndarray:
    """Rows of the n closest pairs, nearest first (ties by row) -> int64 [<= n]."""
    return np.argsort(found.distance, kind="stable")[:n]


def pairs(
    s: ImageSet, found: Nearest, limit: float, generated: Sequence[str], training: Sequence[str], space: str
) -> pd.DataFrame:
    """The ten closest pairs of one set, columns PAIR_COLUMNS. generated, training: `names` [n] and [m]."""
    rows = closest(found)
    return pd.DataFrame({"method": s.method, "space": space, "generated": np.asarray(generated)[rows],
                         "training": np.asarray(training)[found.index[rows]], "distance": found.distance[rows],
                         "threshold": limit}, columns=PAIR_COLUMNS)  # fmt: skip


# --- MiFID ------------------------------------------------------------------------------------------------------------
def tau(ref: Reference, train: np.ndarray, resamples: int, seed: int) -> float:
    """Threshold of MiFID: only 1 % of resamples of the real test patients, whom nobody copied, have a smaller s."""
    counts = stats.resample_patients(ref.patients, resamples, seed).counts()
    return float(np.quantile(stats.mean(metrics.nearest_cosine(ref.features, train), counts), ALARM))


def informed_fid(quality: Sequence[dict], s: ImageSet, ref: Reference, train: np.ndarray, limit: float) -> list[dict]:
    """"MiFID" of one set: its overall FID among the rows `quality`, interval included, times the penalty of its copies.

    train: features [m, d] of the training images; limit: `tau`.
    """
    key = (s.method, "FID", "overall")
    (fid,) = [r for r in quality if (r["method"], r["metric"], r["group_kind"]) == key]
    near = float(metrics.nearest_cosine(s.features, train).mean())
    value = Interval(*(metrics.mifid(fid[k], near, limit, EPSILON) for k in ("value", "lo", "hi")))
    note = "; ".join(filter(None, (fid["note"], f"s = {near:.3g}, tau = {limit:.3g}")))
    return [result("quality", s.method, ("overall", ""), "MiFID", value, fid["n"], len(train), ref.extractor, note)]
