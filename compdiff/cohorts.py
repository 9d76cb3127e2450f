"""Manifest + settings -> `Cohort`: the tasks that make its (row, image) pairs, validated before the first is made.

A row is one line of samples.csv: id, patient, split, held_out, cell, age_years, the attributes' category names,
findings, y_<label>, and for phantoms true_<parameter>. Phantoms are drawn here; real data comes from `adapters`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from compdiff import adapters, phantoms
from compdiff.config import DataConfig
from compdiff.manifests import Manifest
from compdiff.parts import Task
from compdiff.problems import DataError, ManifestError

Sample = tuple[dict, np.ndarray]  # row, uint8 [size, size]


@dataclass(frozen=True)
class Cohort:
    """What is to be written. The tasks are grouped by split and deterministic."""

    tasks: list[Task]
    settings: dict  # the settings that this layout depends on
    excluded: list[dict] = field(default_factory=list)  # {id, row, reason}
    source: dict = field(default_factory=dict)  # sha256 of the source's text files

    @property
    def samples(self) -> Iterator[Sample]:
        """All (row, image) pairs, one after the other."""
        return (task.make() for task in self.tasks)


def cohort(manifest: Manifest, config: DataConfig, data_root: str, salt: Callable[[], bytes]) -> Cohort:
    """The manifest's cohort. salt: gives the key of the new names where the data is credentialed (see `adapters`)."""
    if manifest.layout == "phantom":
        return phantom_cohort(manifest, config)
    tasks, excluded, source = adapters.read(manifest, config.size, config.data_seed, data_root, salt)
    return Cohort(tasks, {"size": config.size, "data_seed": config.data_seed}, excluded, source)


def phantom_cohort(manifest: Manifest, config: DataConfig) -> Cohort:
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
    tasks = [
        Task(split, [n, cell], partial(draw_phantom, manifest, config, split, n, cell))
        for split, cells in plan.items()
        for n, cell in enumerate(cells)
    ]
    names = ("size", "train_n", "val_n", "test_per_cell", "interaction", "data_seed")
    return Cohort(tasks, {name: getattr(config, name) for name in names})


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
    """One phantom patient with one image per entry of `cells`."""
    return (draw_phantom(manifest, config, split, n, cell) for n, cell in enumerate(cells))


def draw_phantom(manifest: Manifest, config: DataConfig, split: str, n: int, cell: tuple[int, ...]) -> Sample:
    """The phantom patient number `n` of a split; patient ids are unique to (dataset, split, n)."""
    values = phantoms.LABELS[manifest.modality]
    patient = f"{manifest.name}-{split}-{n:06d}"
    who = manifest.schema.decode(cell)
    drawn = phantoms.draw(
        manifest.modality, patient, who, seed=config.data_seed, size=config.size, interaction=config.interaction
    )
    labels = {label: values[label].index(drawn.labels[label]) for label in manifest.labels}
    row = {"id": f"{patient}-0", "patient": patient, "split": split}
    row |= {"held_out": int(cell in manifest.held_out), "cell": manifest.schema.cells().index(cell)}
    row |= {"age_years": int(drawn.age_years), **who, "findings": manifest.describe(labels)}
    row |= {f"y_{label}": value for label, value in labels.items()}
    return row | {f"true_{name}": round(value, 6) for name, value in drawn.truth.items()}, drawn.image
