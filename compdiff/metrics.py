"""Image metrics as pure functions of arrays: features float [n, d], or uint8 images [n, H, W]. No models, no files.

Which of them depend on the number of images: FID does (biased up by a term that shrinks like 1 / n), so subgroup FIDs
compare only at a common n (`matched_fid`); KID does not (unbiased); precision, recall, density (little), coverage, the
Inception Score and, through FID, MiFID do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage


def _features(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"features must be [n >= 2, d], got {list(x.shape)}")
    if not np.isfinite(x).all():
        raise ValueError("features hold NaN or infinity")
    return x


# --- Frechet distance -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Moments:
    """Mean [d] and a root R [r, d] of the covariance, R.T @ R = C (n - 1 in the denominator), r = min(n, d)."""

    mean: np.ndarray
    root: np.ndarray
    n: int


def moments(x: np.ndarray) -> Moments:
    """What `fid` needs to know of a set of features [n, d]; compute it once for a reference that is used often."""
    x = _features(x)
    root = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    return Moments(x.mean(0), np.linalg.qr(root, mode="r") if len(x) > x.shape[1] else root, len(x))


def fid(a: np.ndarray | Moments, b: np.ndarray | Moments) -> float:
    """Frechet distance of two Gaussians, |mu_a - mu_b|^2 + tr C_a + tr C_b - 2 tr (C_a C_b)^(1/2)  (Heusel et al.
    2017).

    With C = R.T R the last trace is the sum of the singular values of R_a R_b.T, which needs no matrix square root
    and stays exact for n < d, where the covariances are singular.
    """
    a, b = (m if isinstance(m, Moments) else moments(m) for m in (a, b))
    cross = np.linalg.svd(a.root @ b.root.T, compute_uv=False).sum()
    spread = np.sum(a.root**2) + np.sum(b.root**2) - 2 * cross
    return float(np.sum((a.mean - b.mean) ** 2) + max(spread, 0.0))


def matched_fid(a: np.ndarray, b: np.ndarray, n: int, repeats: int, seed: int, paired: bool = False) -> np.ndarray:
    """FID of `repeats` random subsets of n rows of a and n rows of b, without replacement -> [repeats].

    Groups and the overall set evaluated at the same n share the same sample-size bias. paired: row i of both belongs to
    one request, and the same rows are drawn of both; else the group that has n rows only would keep its pairs, and the
    others lose theirs, which is another bias where an image is like its request's real one. ValueError when a set is
    smaller than n, or when paired sets differ in size.
    """
    a, b = _features(a), _features(b)
    if paired and len(a) != len(b):
        raise ValueError(f"sets of {len(a)} and {len(b)} rows are not paired")
    if n < 2 or n > min(len(a), len(b)):
        raise ValueError(f"common size {n} is not between 2 and the sizes of the sets, {len(a)} and {len(b)}")
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(repeats):
        rows = rng.permutation(len(a))[:n]
        found.append(fid(a[rows], b[rows if paired else rng.permutation(len(b))[:n]]))
    return np.array(found)


def mifid(distance: float, memorised: float, tau: float, epsilon: float = 1e-14) -> float:
    """FID x penalty: 1 / (s + epsilon) where the memorisation distance s is below tau, else 1  (Bai et al. 2021).

    `distance` is the FID, `memorised` = mean `nearest_cosine` of the set to the training images. tau belongs to an
    extractor and to images: the paper's 0.1 is for Inception features of photographs; real images that nobody copied
    tell another one's.
    """
    return float(distance / (memorised + epsilon)) if memorised < tau else float(distance)


def nearest_cosine(a: np.ndarray, b: np.ndarray, chunk: int = 1024) -> np.ndarray:
    """min_j 1 - |cos(a_i, b_j)| of features [n, d] and [m, d] -> [n]; an all-zero vector is at distance 1.

    Its mean over a generated set, against the training set, is the memorisation distance s of MiFID.
    """
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (_features(a), _features(b)))
    best = [1 - np.abs(a[i : i + chunk] @ b.T).max(1) for i in range(0, len(a), chunk)]
    return np.maximum(np.concatenate(best), 0)


# --- kernel distance --------------------------------------------------------------------------------------------------
def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """k(x, y) = (x . y / d + 1)^3 for all pairs: [n, d], [m, d] -> [n, m]."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def kid(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased MMD^2 with the cubic kernel, over all pairs of the full samples (Binkowski et al. 2018, no random
    subsets).

    KID = sum_{i != j} k(a_i, a_j) / n(n-1) + sum_{i != j} k(b_i, b_j) / m(m-1) - 2 mean k(a, b); may be slightly
    negative.
    """
    a, b = _features(a), _features(b)
    within = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (kernel(a, a), kernel(b, b)))
    return float(within - 2 * kernel(a, b).mean())


# --- precision and recall ---------------------------------------------------------------------------------------------
def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances [n, m]; those of a to itself have an exact zero diagonal."""
    out = np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0)
    if a is b:
        np.fill_diagonal(out, 0)
    return out


def _coverage(centres: np.ndarray, points: np.ndarray, k: int) -> float:
    """Share of points that lie within some centre's distance to its k-th nearest other centre."""
    radius = np.partition(_distances(centres, centres), k, axis=1)[:, k]  # position 0 is the centre itself
    return float((_distances(points, centres) <= radius).any(1).mean())


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[float, float]:
    """(share of fake inside the real manifold, share of real inside the fake one), k-NN balls (Kynkaanniemi et al.
    2019)."""
    real, fake = _features(real), _features(fake)
    if not 1 <= k < min(len(real), len(fake)):
        raise ValueError(f"k = {k} neighbours need more than k images, got {len(real)} and {len(fake)}")
    return _coverage(real, fake, k), _coverage(fake, real, k)


def density_coverage(real: np.ndarray, fake: np.ndarray, k: int = 5) -> tuple[float, float]:
    """Balls around real images to their k-th real neighbour  (Naeem et al. 2020).

    density = balls that hold a fake image, mean over fake images, over k (may exceed 1; one real outlier adds at most
    1 / k, where it may add 1 to precision). coverage = share of balls that hold a fake image; two samples of one
    distribution, n real and m fake, have 1 and 1 - prod_{i=1..k} (n - i) / (n + m - i) in expectation.
    """
    real, fake = _features(real), _features(fake)
    if not 1 <= k < len(real):
        raise ValueError(f"k = {k} neighbours need more than k real images, got {len(real)}")
    radius = np.partition(_distances(real, real), k, axis=1)[:, k]
    held = _distances(real, fake) <= radius[:, None]  # [n, m]
    return float(held.sum(0).mean() / k), float(held.any(1).mean())


# --- Inception Score --------------------------------------------------------------------------------------------------
def inception_score(probabilities: np.ndarray) -> float:
    """IS = exp(mean_x KL(p(y|x) || p(y)))  (Salimans et al. 2016) of class probabilities [n, C], in one split; 1 to C.

    Computed as exp(H(mean p) - mean H(p)), the same number. No real image enters it: it rewards images that a
    classifier of something else is sure of, in many classes. ValueError: rows that are no probabilities.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim != 2 or not len(p) or (p < 0).any() or not np.allclose(p.sum(1), 1, atol=1e-4):
        raise ValueError(f"class probabilities [n >= 1, C] must be >= 0 and sum to 1, got {list(p.shape)}")
    return float(np.exp(_entropy(p.mean(0)) - _entropy(p).mean()))


def _entropy(p: np.ndarray) -> np.ndarray:
    """-sum p log p over the last axis, 0 log 0 = 0."""
    return -(p * np.log(p, out=np.zeros_like(p), where=p > 0)).sum(-1)


# --- multi-scale structural similarity --------------------------------------------------------------------------------
BETAS = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])  # Wang et al. 2003, finest scale first
WINDOW, SIGMA = 11, 1.5


def ms_ssim_variant(size: int) -> tuple[str, int]:
    """Image size in pixels -> (metric's name, scales): 5 scales from 176 px, "MS-SSIM-3" from 44, "MS-SSIM-2" from
    22."""
    for scales, name in ((5, "MS-SSIM"), (3, "MS-SSIM-3"), (2, "MS-SSIM-2")):
        if size >= WINDOW * 2 ** (scales - 1):
            return name, scales
    raise ValueError(f"MS-SSIM needs images of at least {2 * WINDOW} px, got {size}")


def _blur(x: np.ndarray) -> np.ndarray:
    """Gaussian window, valid part only: [n, H, W] -> [n, H - 10, W - 10]."""
    r = WINDOW // 2
    for axis in (1, 2):
        x = ndimage.gaussian_filter1d(x, SIGMA, axis=axis, radius=r)
    return x[:, r:-r, r:-r]


def _halve(x: np.ndarray) -> np.ndarray:
    x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
    return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4


def ms_ssim(a: np.ndarray, b: np.ndarray, scales: int = 5) -> np.ndarray:
    """Similarity of each pair of uint8 images [n, H, W] -> [n]; 1 = identical  (Wang et al. 2003).

    prod_s contrast_s^beta_s * luminance_last^beta_last, windows inside the image only; the betas in use are divided
    by their sum. ValueError: other dtype, unequal shapes, or too small for the coarsest window (5 scales: 176 px).
    """
    if a.dtype != np.uint8 or b.dtype != np.uint8 or a.ndim != 3 or a.shape != b.shape:
        raise ValueError(
            f"expected two uint8 arrays [n, H, W] of one shape, got {a.dtype} {a.shape} and {b.dtype} {b.shape}"
        )
    if not 1 <= scales <= len(BETAS) or min(a.shape[1:]) < WINDOW * 2 ** (scales - 1):
        raise ValueError(f"{scales} scales need {WINDOW * 2 ** (scales - 1)} px or more, got {a.shape[1:]}")
    betas = BETAS[:scales] / BETAS[:scales].sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    x, y, out = a.astype(np.float64), b.astype(np.float64), np.ones(len(a))
    for s, beta in enumerate(betas):
        mx, my = _blur(x), _blur(y)
        vx, vy, cov = _blur(x * x) - mx * mx, _blur(y * y) - my * my, _blur(x * y) - mx * my
        term = (2 * cov + c2) / (vx + vy + c2)
        if s == scales - 1:
            term = term * (2 * mx * my + c1) / (mx * mx + my * my + c1)
        out *= np.maximum(term.mean((1, 2)), 0) ** beta
        x, y = _halve(x), _halve(y)
    return out


def ms_ssim_intra(images: np.ndarray, prompts: np.ndarray, scales: int = 5) -> np.ndarray:
    """Mean similarity over all pairs of images of one prompt, per prompt with >= 2 images -> [prompts]; lower = more
    diverse."""
    prompts = np.asarray(prompts)
    means = []
    for prompt in np.unique(prompts):
        rows = np.flatnonzero(prompts == prompt)
        if len(rows) > 1:
            i, j = np.triu_indices(len(rows), 1)
            means.append(ms_ssim(images[rows[i]], images[rows[j]], scales).mean())
    return np.array(means)
