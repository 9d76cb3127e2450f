"""06. Control sets: images whose right answer is known, judged beside the methods (their titles: frames.CONTROLS)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd

from compdiff.evaluate import Features, ImageSet, Reference


def real_test(ref: Reference) -> ImageSet:
    """The reference beside itself: the judges' own score, and the share of suspected copies that chance gives."""
    return ImageSet("real_test", ref.images, ref.features, ref.patients, np.arange(len(ref.rows)))


def reconstructed(ref: Reference, decode: Callable[[np.ndarray], np.ndarray], features: Features) -> ImageSet:
    """Control vae: the reference through `decode` (encode and decode again)."""
    images = decode(ref.images)
    return ImageSet("vae", images, features("vae", images), ref.patients, np.arange(len(ref.rows)))


def shuffled(source: ImageSet, seed: int) -> ImageSet:
    """Control shuffled: the same images, handed to requests in random order: no attribute follows its request.

    Each image keeps its patient, so that every overall distance is the source's, interval included.
    """
    order = np.random.default_rng(seed).permutation(len(source.at))
    images, features, patients = source.images[order], source.features[order], source.patients[order]
    return replace(source, method="shuffled", images=images, features=features, patients=patients)


def copies(ref: Reference, train: pd.DataFrame, images: np.ndarray, features: np.ndarray, seed: int) -> ImageSet:
    """Control copy: for each request a random training image of its cell, or of the nearest cell that has any.

    Nearest: most attributes in common, then the smallest difference of the first attribute's (age) position.
    """
    rng = np.random.default_rng(seed)
    requests = (t[list(ref.schema.names)].to_dict("records") for t in (train, ref.rows))
    have, want = (np.array([ref.schema.encode(r) for r in records]) for records in requests)
    chosen = np.empty(len(want), dtype=np.int64)
    for i, cell in enumerate(want):
        unlike = (have != cell).sum(1) + np.abs(have[:, 0] - cell[0]) / (10 * len(ref.schema.attributes[0]))
        chosen[i] = rng.choice(np.flatnonzero(unlike == unlike.min()))
    patients = train["patient"].to_numpy()[chosen]
    return ImageSet("copy", images[chosen], features[chosen], patients, np.arange(len(want)))


def real_train(ref: Reference, train: pd.DataFrame, images: np.ndarray, features: np.ndarray, seed: int) -> ImageSet:
    """Control real_train: each training image beside one test image of its cell, none used twice, none of held-out
    cells.

    The training set is long-tailed and a phantom test set balanced: unmatched, their distance would be the cells'.
    """
    rng = np.random.default_rng(seed)
    chosen, at = [], []
    for (kind, _), mask in ref.masks.items():
        if kind == "cell" and mask.any():
            here = np.flatnonzero((train["cell"] == ref.rows["cell"][mask].iloc[0]).to_numpy())
            there = np.flatnonzero(mask)
            n = min(len(here), len(there))
            chosen.append(rng.permutation(here)[:n])
            at.append(rng.permutation(there)[:n])
    chosen, at = np.concatenate(chosen), np.concatenate(at)
    return ImageSet("real_train", images[chosen], features[chosen], train["patient"].to_numpy()[chosen], at)
