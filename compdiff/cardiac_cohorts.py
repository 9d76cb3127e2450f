"""The patients of a cardiac experiment by the dataset's name, and its folds: who trains, who validates, who tests.

Phantoms have a test cohort of their own; a fold holds a part of the training cohort back for validation. A source
without one (Sunnybrook) is tested on everybody in turn, so that predictions can be pooled; then a generator belongs to
a fold, because it must not have seen whom its images are to help to judge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from compdiff import record
from compdiff.cardiac import Studies, phantom_studies
from compdiff.cardiac_files import read
from compdiff.cardiac_manifest import FOLDER, load
from compdiff.config import Config

COHORTS = ("train", "test")
TEST_PREVALENCE = 0.4  # of heart failure among test phantoms: enough positives in every group
VALIDATION = 6  # without a test cohort: one of so many parts of the patients outside the fold validates
EVERYBODY = "all"  # the generator that serves every fold, where a test cohort exists


def access(dataset: str) -> str:
    """generated (drawn, no files needed) | open | credentialed (nothing of a patient may leave the run folder)."""
    path = FOLDER / f"{dataset}.yaml"
    return yaml.safe_load(path.read_text())["access"] if path.is_file() else "credentialed"


def generated(dataset: str) -> bool:
    """Are the patients drawn?"""
    return access(dataset) == "generated"


def studies(dataset: str, data_root: str, config: Config) -> Studies:
    """All patients of `dataset` (a manifest of data_manifests/cardiac); the disease asked for is the first label.

    DataError: see `cardiac_files.read`. ValueError for a disease that the source does not know.
    """
    found = _studies(dataset, data_root, config)
    disease = config.heart.disease or found.labels[0]
    if disease not in found.labels:
        raise ValueError(f"unknown disease {disease!r}; {found.title} knows: {', '.join(found.labels)}")
    return replace(found, labels=(disease, *(name for name in found.labels if name != disease)))


def _studies(dataset: str, data_root: str, config: Config) -> Studies:
    if not generated(dataset):
        return read(load(dataset), data_root)
    c, d = config.heart, config.data
    train = phantom_studies(c.hearts, "train", seed=d.data_seed, prevalence=c.prevalence, interaction=d.interaction)
    test = phantom_studies(
        c.test_hearts, "test", seed=d.data_seed, prevalence=TEST_PREVALENCE, interaction=d.interaction, balanced=True
    )
    return joined({"train": train, "test": test})


def joined(cohorts: Mapping[str, Studies]) -> Studies:
    """Several studies of one source as one, with a column `cohort`. ValueError when their schemas or labels differ."""
    parts = list(cohorts.values())
    first = parts[0]
    if any((p.schema, p.labels) != (first.schema, first.labels) for p in parts):
        raise ValueError("cohorts of one study need the same attributes and labels")
    table = pd.concat([p.table.assign(cohort=name) for name, p in cohorts.items()], ignore_index=True)
    where = [(p, row) for p in parts for row in range(len(p.table))]
    missing = {name: why for p in parts for name, why in p.missing.items()}
    return Studies(
        first.title, first.schema, first.labels, table, missing,
        lambda row, name, size: where[row][0].read(where[row][1], name, size), first.source,
    )  # fmt: skip


@dataclass(frozen=True)
class Fold:
    """Row numbers of `Studies.table`; the parts share no patient, because a patient is one row."""

    number: int
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    generator: str  # name of the generator whose images may train this fold's classifiers; the first fold that names
    # it says who trains (`train`) and validates (`val`) it


def generators(found: Sequence[Fold]) -> list[Fold]:
    """The first fold of every generator: whose patients train and validate it."""
    return list({f.generator: f for f in reversed(found)}.values())[::-1]


def strata(table: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
    """The group of every row, several columns together, as text [n]."""
    return table[list(columns)].astype(str).agg(" ".join, axis=1).to_numpy()


def folds(table: pd.DataFrame, label: str, k: int, by: Sequence[str], seed: int) -> list[Fold]:
    """`k` folds by patient, each with about the same share of every stratum. ValueError: k below 3, or too few rows."""
    has_test = "cohort" in table
    pool = np.flatnonzero(table["cohort"] == "train") if has_test else np.arange(len(table))
    if not 3 <= k <= len(pool):
        raise ValueError(f"folds={k} must lie between 3 and the number of patients, {len(pool)}")
    parts = dealt(strata(table.iloc[pool], [f"y_{label}", *by]), k, seed)
    if has_test:
        test = np.flatnonzero(table["cohort"] == "test")
        return [Fold(i, pool[parts != i], pool[parts == i], test, EVERYBODY) for i in range(k)]
    out = []
    for i in range(k):
        rest = pool[parts != i]
        held = dealt(strata(table.iloc[rest], [f"y_{label}", *by]), VALIDATION, seed) == 0
        out.append(Fold(i, rest[~held], rest[held], pool[parts == i], f"fold{i}"))
    return out


def dealt(groups: np.ndarray, k: int, seed: int) -> np.ndarray:
    """A number 0..k-1 for every row: the rows of a group are shuffled and dealt in turn, on from where the last group
    ended, so that sizes of parts differ by one at most."""
    rng, out, at = np.random.default_rng(seed), np.empty(len(groups), dtype=np.int64), 0
    for name in np.unique(groups):
        rows = rng.permutation(np.flatnonzero(groups == name))
        out[rows] = (at + np.arange(len(rows))) % k
        at += len(rows)
    return out


def save_folds(table: pd.DataFrame, found: Sequence[Fold], path: Path) -> None:
    """The split of every fold as CSV: fold, id, part, generator."""
    rows = [
        {"fold": f.number, "id": table["id"].iloc[row], "part": part, "generator": f.generator}
        for f in found
        for part in ("train", "val", "test")
        for row in getattr(f, part)
    ]
    record.write_text(path, pd.DataFrame(rows).to_csv(index=False))


def load_folds(table: pd.DataFrame, path: Path) -> list[Fold]:
    """Folds as they were saved. ValueError when the table holds other patients than the file."""
    saved = pd.read_csv(path, dtype={"id": str, "part": str, "generator": str})
    place = {name: row for row, name in enumerate(table["id"])}
    if not set(saved["id"]) <= set(place):
        raise ValueError(f"{path.name} names patients that the data do not hold: remove it, or use the same data")
    out = []
    for number, part in saved.groupby("fold"):
        rows = {name: np.sort(part.loc[part["part"] == name, "id"].map(place).to_numpy(np.int64)) for name in
                ("train", "val", "test")}  # fmt: skip
        out.append(Fold(int(number), **rows, generator=part["generator"].iloc[0]))
    return out
