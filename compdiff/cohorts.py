"""One adapter per source layout: manifest + settings -> `Cohort`, a stream of (row, image), validated before it starts.

A row is one line of samples.csv: id, patient, split, held_out, cell, age_years, the attributes' category names,
findings, y_<label>, and for phantoms true_<parameter>. A new layout is a function in ADAPTERS and its keys in
`manifests`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from compdiff import phantoms
from compdiff.config import DataConfig
from compdiff.manifests import Manifest
from compdiff.nih import read_nih
from compdiff.problems import DataError, ManifestError

Sample = tuple[dict, np.ndarray]  # row, uint8 [size, size]


@dataclass(frozen=True)
class Cohort:
    """What an adapter hands over. The stream is grouped by split and deterministic."""

    samples: Iterator[Sample]
    settings: dict  # the settings that this layout depends on
    excluded: list[dict] = field(default_factory=list)  # {id, reason}
    source: dict = field(default_factory=dict)  # sha256 of the source's text files


def phantom_cohort(manifest: Manifest, config: DataConfig, data_root: str = "") -> Cohort:
    """train and val from the joint distribution without held-out cells, test with `test_per_cell` of every cell."""
    if config.train_n < 1 or config.val_n < 1 or config.test_per_cell < 1:
        raise DataError(manifest.title, ["train_n, val_n, test_per_cell: below 1 -> ask for at least one image each"])
    for label, phrases in manifest.labels.items():
        if len(phrases) != len(phantoms.LABELS[manifest.modality].get(label, ())):
            problem = (
                f"labels: {label}: not a label of these phantoms, or not one phrase per value -> see phantoms.LABELS"
            )
            raise ManifestError(f"manifest of {manifest.title}", [problem])
    plan = {
        "train": draw_cells(manifest, config.train_n, config.data_seed, "train"),
        "val": draw_cells(manifest, config.val_n, config.data_seed, "val"),
        "test": [cell for cell in manifest.schema.cells() for _ in range(config.test_per_cell)],
    }
    samples = (sample for split, cells in plan.items() for sample in draw_phantoms(manifest, config, split, cells))
    names = ("size", "train_n", "val_n", "test_per_cell", "interaction", "data_seed")
    return Cohort(samples, {name: getattr(config, name) for name in names})


def draw_cells(manifest: Manifest, n: int, seed: int, split: str) -> list[tuple[int, ...]]:
    """n cells from the joint distribution without the held-out cells, shuffled by (seed, dataset, split).

    Counts are the expected ones, rounded by largest remainder, so the declared shares hold at every n.
    """
    cells = [c for c in manifest.schema.cells() if c not in manifest.held_out]
    share = np.array([manifest.joint[c] for c in cells])
    expected = n * share / share.sum()
    counts = np.floor(expected).astype(int)
    counts[np.argsort(counts - expected, kind="stable")[: n - counts.sum()]] += 1
    digest = hashlib.sha256(f"{manifest.name}/{split}".encode()).digest()
    order = np.random.default_rng([seed, int.from_bytes(digest[:8], "little")]).permutation(n)
    return [cells[i] for i in np.repeat(np.arange(len(cells)), counts)[order]]


def draw_phantoms(manifest: Manifest, config: DataConfig, split: str, cells: list[tuple[int, ...]]) -> Iterator[Sample]:
    """One phantom patient with one image per entry of `cells`; patient ids are unique to (dataset, split, position)."""
    index = {cell: i for i, cell in enumerate(manifest.schema.cells())}
    values = phantoms.LABELS[manifest.modality]
    for n, cell in enumerate(cells):
        patient = f"{manifest.name}-{split}-{n:06d}"
        who = manifest.schema.decode(cell)
        drawn = phantoms.draw(
            manifest.modality, patient, who, seed=config.data_seed, size=config.size, interaction=config.interaction
        )
        labels = {label: values[label].index(drawn.labels[label]) for label in manifest.labels}
        row = {"id": f"{patient}-0", "patient": patient, "split": split}
        row |= {"held_out": int(cell in manifest.held_out), "cell": index[cell]}
        row |= {"age_years": int(drawn.age_years), **who, "findings": manifest.describe(labels)}
        row |= {f"y_{label}": value for label, value in labels.items()}
        yield row | {f"true_{name}": round(value, 6) for name, value in drawn.truth.items()}, drawn.image


def nih_cohort(manifest: Manifest, config: DataConfig, data_root: str) -> Cohort:
    """The official NIH layout below `data_root`; see `compdiff.nih`."""
    samples, excluded, source = read_nih(manifest, config.size, config.data_seed, data_root)
    return Cohort(samples, {"size": config.size, "data_seed": config.data_seed}, excluded, source)


ADAPTERS: Mapping[str, Callable[[Manifest, DataConfig, str], Cohort]] = {"phantom": phantom_cohort, "nih": nih_cohort}
