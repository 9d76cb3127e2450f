"""Synthetic sets that shall make a classifier fairer: whose mask, whose attributes, how many of each group.

Method section 5. copy: a real training patient's mask and prompt; random: the mask of a random training patient with
the same label, attributes drawn at random, each category alike. Both sets hold as many images of every sensitive group
with and without the disease, so that what is rare among the patients is not rare here. `test`: one image per test
patient, its own mask and prompt; for measuring, never for training.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from compdiff import cardiac, sample
from compdiff.cardiac import Studies
from compdiff.cardiac_cohorts import Fold, strata
from compdiff.cardiac_models import mask_classes, named, restore
from compdiff.config import Config
from compdiff.controlnet import to_picture

MODES = ("copy", "random")
SETS = (*MODES, "test")


def set_rows(studies: Studies, fold: Fold, name: str, config: Config, seed: int) -> pd.DataFrame:
    """The rows of set `name`: id, donor (row number of the mask's patient), age_years, attributes, findings, y_<label>.

    ValueError for an unknown set, and where a label has no training patient.
    """
    if name not in SETS:
        raise ValueError(f"unknown set {name!r}; known: {', '.join(SETS)}")
    keep = ["age_years", *studies.schema.names, "findings", *(f"y_{label}" for label in studies.labels)]
    table = studies.table[keep]
    if name == "test":
        own = {"id": [f"test-{row}" for row in fold.test], "donor": fold.test}
        return table.iloc[fold.test].assign(**own).reset_index(drop=True)
    rng = np.random.default_rng(np.random.SeedSequence([seed, *f"{name}/{fold.generator}".encode()]))
    train = table.iloc[fold.train]
    chosen = (_copied if name == "copy" else _drawn)(studies, train, config, rng)
    chosen["id"] = [f"{name}-{fold.generator}-{n}" for n in range(len(chosen))]
    return chosen


def _copied(studies: Studies, train: pd.DataFrame, config: Config, rng: np.random.Generator) -> pd.DataFrame:
    """Training rows, as many of every occurring sensitive group x label, drawn evenly within each."""
    groups = strata(train, [*config.heart.sensitive, f"y_{studies.labels[0]}"])
    names = np.unique(groups)
    counts = [config.heart.set_size // len(names) + (i < config.heart.set_size % len(names)) for i in range(len(names))]
    rows = [_repeated(train.index.to_numpy()[groups == g], n, rng) for g, n in zip(names, counts, strict=True)]
    donors = np.concatenate(rows)
    return train.loc[donors].assign(donor=donors).reset_index(drop=True)


def _repeated(rows: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """n of `rows`: everyone equally often, up to one."""
    return np.concatenate([rng.permutation(rows) for _ in range(-(-n // len(rows)))])[:n]


def _drawn(studies: Studies, train: pd.DataFrame, config: Config, rng: np.random.Generator) -> pd.DataFrame:
    """Every attribute uniform over the categories that occur in training; donors with the row's label."""
    label, rows = f"y_{studies.labels[0]}", []
    if train[label].nunique() < 2:
        raise ValueError(f"every training patient has the same {label}: no mask for the other")
    n = config.heart.set_size
    donors = {value: _repeated(part.index.to_numpy(), n, rng) for value, part in train.groupby(label)}
    for i in range(n):
        value = i % 2
        donor = int(donors[value][i // 2])
        row = {a.name: str(rng.choice([c for c in a.categories if (train[a.name] == c).any()]))
               for a in studies.schema.attributes if a.name != "pathology"}  # fmt: skip
        age = int(rng.choice(train.loc[train["age"] == row["age"], "age_years"]))
        rows.append({**train.loc[donor], **row, "age_years": age, "donor": donor})
    return pd.DataFrame(rows)


def opposite(studies: Studies, value: int) -> str:
    """What the prompt of the other label says: the negative prompt of guidance."""
    other = studies.table[studies.table[f"y_{studies.labels[0]}"] != value]
    return str(other["findings"].iloc[0]) if len(other) else ""


def generate(studies: Studies, fold: Fold, method: str, name: str, base_folder: Path, model_folder: Path, folder: Path,
             config: Config, seed: int) -> pd.DataFrame:  # fmt: skip
    """One set of one generator below `folder`, label by label (a negative prompt belongs to a label). Restarts where it
    stopped; what is there for the same weights, prompts, masks and settings stays. Returns the sets' rows."""
    model, base, checkpoint = restore(method, studies, base_folder, model_folder, config)
    rows, tables = set_rows(studies, fold, name, config, seed), []
    guidance = config.heart.random_guidance if name == "random" else config.heart.copy_guidance
    away = name == "random" and config.heart.negative_prompt
    for value, part in rows.groupby(f"y_{studies.labels[0]}"):
        part = part.reset_index(drop=True)
        base.negative = opposite(studies, value) if away else ""
        extra = {}
        if method == "control":
            masks = studies.masks("stacked", config.data.size, part["donor"])
            extra["picture"] = to_picture(masks, mask_classes(studies))
        said = named(method, config)
        names = studies.schema.names if said is None else said
        prompts = [cardiac.prompt(row, names, studies.schema) for row in part.to_dict("records")]
        attributes = np.array([studies.schema.encode(row) for row in part.to_dict("records")], dtype=np.int64)
        made_of = hashlib.sha256(f"{checkpoint} {base.negative}".encode()).hexdigest()
        tables.append(sample.generate(
            folder / str(value), part, prompts, attributes, model, base, replace(config.sample, guidance=guidance),
            method, made_of, seed, **extra,
        ))  # fmt: skip
    return pd.concat(tables, ignore_index=True)


def read(folder: Path, label: str) -> tuple[pd.DataFrame, np.ndarray]:
    """A set from disk: its rows and stacked images uint8 [n, S, S, 3]. FileNotFoundError names what is missing."""
    parts = sorted(folder.glob("*/samples.csv"))
    if not parts:
        raise FileNotFoundError(f"{folder} holds no synthetic set: run notebook 09_cardiac_generation")
    tables = [pd.read_csv(p, keep_default_na=False).assign(**{"set": p.parent.name}) for p in parts]
    table = pd.concat(tables, ignore_index=True)
    files = [folder / row["set"] / "images" / f"{row['id']}.png" for row in table.to_dict("records")]
    images = []
    for file in files:
        with Image.open(file, formats=["PNG"]) as image:
            images.append(np.asarray(image.convert("RGB")))
    return table.drop(columns="set").astype({f"y_{label}": int}), np.stack(images)


def requested(studies: Studies, rows: pd.DataFrame, size: int) -> np.ndarray:
    """Masks that the rows of a set asked for, uint8 [n, S, S, 3]."""
    return studies.masks("stacked", size, rows["donor"])
