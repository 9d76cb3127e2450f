"""Downstream strategies (method section 7): what a classifier trains on, as one table, and predictions that outlive
the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from compdiff.classify import Model


@dataclass(frozen=True)
class Strategy:
    """One row: what a classifier starts from and trains on; it is tested on real images.

    start: imagenet | scratch, for networks with published weights; the small network always starts from scratch.
    real: fraction of the real training patients. synthetic: names of generated sets (train = one image per training
    prompt).
    """

    id: str
    start: str
    real: float
    synthetic: tuple[str, ...]
    title: str


STRATEGIES: dict[str, Strategy] = {
    s.id: s
    for s in (
        Strategy("1a", "imagenet", 1.0, (), "real"),
        Strategy("1b", "imagenet", 1.0, ("train",), "real + 1x synthetic"),
        Strategy("1d", "imagenet", 0.0, ("train",), "1x synthetic only"),
        Strategy("2b", "imagenet", 1.0, ("balanced",), "real + balanced synthetic"),
    )
}

Set = tuple[np.ndarray, Mapping[str, np.ndarray]]  # images uint8 [n, S, S] and targets of classify.encode


def assemble(strategy: Strategy, real: Set, patients: np.ndarray, synthetic: Mapping[str, Set], seed: int) -> Set:
    """The training images and targets of a strategy. A fraction of real data is a fraction of its patients, drawn
    with `seed`.

    ValueError: a generated set is missing.
    """
    missing = [name for name in strategy.synthetic if name not in synthetic]
    if missing:
        raise ValueError(f"strategy {strategy.id} needs the generated sets {missing}; there are {sorted(synthetic)}")
    names = np.unique(np.asarray(patients))
    chosen = np.random.default_rng(seed).permutation(names)[: round(strategy.real * len(names))]
    keep = np.isin(patients, chosen)
    parts = [(real[0][keep], {k: t[keep] for k, t in real[1].items()})] + [
        synthetic[name] for name in strategy.synthetic
    ]
    images = np.concatenate([p[0] for p in parts])
    return images, {k: np.concatenate([p[1][k] for p in parts]) for k in real[1]}


def predictions(model: Model, images: np.ndarray, table: pd.DataFrame) -> pd.DataFrame:
    """`table` with a column p_<label>, p_<head>=<class> or p_<number> per output: a new metric needs no retraining."""
    columns = {}
    for name, values in model.predict(images).items():
        head = model.heads[name]
        stem = f"p_{name}=" if head.kind == "category" else "p_"
        columns |= {f"{stem}{n}": v for n, v in zip(head.names, values.reshape(len(values), -1).T, strict=True)}
    return pd.concat([table.reset_index(drop=True), pd.DataFrame(columns)], axis=1)
