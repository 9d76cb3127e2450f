"""07. From a row of the strategies' table to predictions on disk, which outlive the model: a new metric needs no
retraining.

`<run>/seed<k>/downstream/<first strategy that trains so>_<method>/` holds model/, predictions.csv (real rows) and one
folder per further test set. Everything is made once for the same images, recipe, start and seed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from compdiff import classify, datasets, networks, record, sample
from compdiff.classify import Head, Model, Training
from compdiff.config import EvalConfig
from compdiff.datasets import Data
from compdiff.evaluate import read_rows
from compdiff.paths import RunFolder
from compdiff.strategies import QUARTERS, STRATEGIES, TEST_SETS, Strategy, chosen, methods_of

REAL = "real_train"  # the `method` of a classifier that learned from no synthetic image
REMEDY = 'remedy: STRATEGIES="{}" for notebook 05_generation'

Set = tuple[np.ndarray, Mapping[str, np.ndarray]]  # images uint8 [n, S, S] and targets of classify.encode


@dataclass(frozen=True)
class Bench:
    """What all classifiers of one run share. methods: the generators; config: epochs, ImageNet file, external set."""

    data: Data
    folder: RunFolder
    methods: tuple[str, ...]
    config: EvalConfig
    profile: str
    seed: int

    def recipe(self, strategy: Strategy) -> Training:
        """The recipe of a row: the papers' networks at paper scale, small ones with their own names else. Its epochs
        are those of a classifier that sees real images only, see `phases`.
        """
        paper = self.profile == "paper"
        recipe = classify.RECIPES[f"{strategy.recipe}_paper" if paper else strategy.recipe]
        own = paper and strategy.recipe != "downstream"
        return recipe if own else replace(recipe, epochs=self.config.downstream_epochs)

    def phases(self, strategy: Strategy) -> tuple[Training, Training]:
        """(recipe of the pre-training, recipe of the last phase): at most as many optimiser steps in all as 1a.

        An epoch is as many steps as the real training set has batches, whatever the row trains on; two phases share
        the epochs. Else rows with synthetic images would be trained for longer, and that alone may decide.
        """
        recipe = self.recipe(strategy)
        n = int((self.data.table["split"] == "train").sum())
        recipe = replace(recipe, epoch_steps=max(1, n // recipe.batch))
        first = max(1, recipe.epochs // 2) if strategy.pretrain else 0
        last = max(1, recipe.epochs - first)  # a single epoch cannot be shared: one each
        return replace(recipe, epochs=first), replace(recipe, epochs=last, lr=recipe.lr * strategy.lr)

    def heads(self, label: str = "") -> dict[str, Head]:
        """One head of all labels as 0/1, or the head of one task: its classes, 0/1 where it has two."""
        if not label:
            return {"labels": Head("binary", self.data.label_names)}
        n = len(self.data.manifest.labels[label])
        return {"labels": Head("binary", (label,))} if n == 2 else {label: Head("category", tuple(map(str, range(n))))}

    @cached_property
    def external(self) -> Data | None:
        """The prepared data of the external test set. FileNotFoundError where it was not prepared."""
        if not (name := self.config.external):
            return None
        where = self.folder.root.parent / name / "data"
        if not (where / "index.json").is_file():
            remedy = f"make paper PROFILE={self.profile} DATASETS={name} STAGES=01_data_prep DATA_ROOT=<folder>"
            raise FileNotFoundError(f"the external test set {name} is not prepared; remedy: {remedy}")
        return datasets.load(where)


@dataclass(frozen=True)
class Judged:
    """One classifier on one test set. table, val: rows with y_<label> and p_<label>; thresholds come from val."""

    setting: str  # strategy, and "on <test set>" where that is not the real test set
    method: str
    data: Data  # whose groups the rows belong to
    table: pd.DataFrame
    val: pd.DataFrame
    task: str = ""  # FairDiffusion's classifiers: the label
    network: str = ""
    start: str = ""  # what the network really started from
    epochs: int = 0


# --- who trains on what -----------------------------------------------------------------------------------------------
def fits(names: Sequence[str], methods: Sequence[str]) -> Iterator[tuple[Strategy, str]]:
    """(strategy, method) of every classifier: one per generator, one in all where nothing synthetic is learned."""
    for strategy in chosen(names):
        yield from ((strategy, m) for m in (methods_of(strategy, methods) if strategy.trains_on else [REAL]))


def binary(table: pd.DataFrame, labels: Sequence[str]) -> pd.DataFrame:
    """The table with every label as 0/1: a graded label becomes "any grade above its first"."""
    return table.assign(**{f"y_{name}": (table[f"y_{name}"].astype(float) > 0).astype(int) for name in labels})


def real_rows(data: Data, strategy: Strategy, seed: int) -> dict[str, pd.DataFrame]:
    """Real rows by part: train (a fraction of the training patients, drawn with `seed`), val, test and, where the
    strategy splits in four, seen: the last quarter; then val is the third.
    """
    table = data.table if strategy.recipe != "downstream" else binary(data.table, data.label_names)
    split = table["split"].to_numpy()
    patients = table["patient"].to_numpy()
    names = np.random.default_rng(seed).permutation(np.unique(patients[split == "train"]))
    n = len(names)
    share = max(1, round(strategy.real * n)) if strategy.real else 0
    rows = {"train": (split == "train") & np.isin(patients, names[:share]), "val": split == "val",
            "test": np.isin(split, ("test", "zero_shot"))}  # fmt: skip
    if strategy.tests == QUARTERS:
        rows["val"] = (split == "train") & np.isin(patients, names[share : share + n // 4])
        rows["seen"] = (split == "train") & np.isin(patients, names[share + n // 4 :])
    return {part: table[mask].reset_index(drop=True) for part, mask in rows.items()}


def read_set(bench: Bench, method: str, name: str, strategy: Strategy) -> tuple[pd.DataFrame, np.ndarray]:
    """Rows and images of a generated set: the labels are those that its prompts asked for. FileNotFoundError."""
    folder = bench.folder.generated(method, name)
    rows = read_rows(folder)
    rows = rows if strategy.recipe != "downstream" else binary(rows, bench.data.label_names)
    return rows, sample.read_images(folder, rows["id"].tolist())


def assemble(parts: Sequence[tuple[pd.DataFrame, np.ndarray]], heads: Mapping[str, Head]) -> Set:
    """Rows and images, part after part, as one training set."""
    targets = [classify.encode(rows, heads) for rows, _ in parts if len(rows)]
    images = np.concatenate([images for rows, images in parts if len(rows)])
    return images, {k: np.concatenate([t[k] for t in targets]) for k in heads}


def folder_name(strategy: Strategy, method: str, started: bool, label: str = "") -> str:
    """The folder of a classifier: that of the table's first row which trains in the same way. `started`: there are
    ImageNet weights; without them an ImageNet row is its from-scratch row.
    """

    def training(s: Strategy) -> tuple:
        own = (s.pretrain, s.real, s.synthetic, s.lr, s.recipe, s.seed, s.tests == QUARTERS)
        return ((s.start == "imagenet") and started, *own)

    first = next(s for s in STRATEGIES.values() if training(s) == training(strategy))
    return "_".join([first.id, method, *([label] if label else [])])


# --- fit and predict, once --------------------------------------------------------------------------------------------
def array_sha256(images: np.ndarray, targets: Mapping[str, np.ndarray]) -> str:
    """Hash of a set's images and targets."""
    parts = [("images", images), *sorted(targets.items())]
    hashes = [[n, a.shape, str(a.dtype), hashlib.sha256(np.ascontiguousarray(a)).hexdigest()] for n, a in parts]
    return record.sha256_json(hashes)


def code() -> list[str]:
    """What trains and predicts: an edit of it, beyond comments, makes both again."""
    return [record.source_sha256(Path(m.__file__)) for m in (classify, networks)]


def fit_once(folder: Path, train: Set, val: Set, heads: Mapping[str, Head], training: Training, seed: int,
             init: Path | None = None, weights: Mapping | None = None, start: str = "") -> Path:  # fmt: skip
    """`folder` with a trained model; an existing one stays when it was made of the same arrays, recipe and start.

    init: folder of a model to fine-tune; weights, start: of `networks.imagenet_start`.
    """
    inputs = {"train": array_sha256(*train), "val": array_sha256(*val), "seed": seed, "start": start,
              "init": record.sha256_file(init / "weights.safetensors") if init else "",
              "recipe": record.sha256_json([str(training), [str(h) for h in heads.values()]]),
              "code": code()}  # fmt: skip
    if not record.is_current(folder, inputs):
        with record.run_json(folder, inputs, seeds=[seed]) as run:
            before = classify.load(init) if init else None
            classify.fit(*train, *val, heads, training, seed, before, weights).save(folder)
            run.outputs += [folder / "weights.safetensors", folder / "model.json"]
    return folder


def predictions(model: Model, images: np.ndarray, table: pd.DataFrame) -> pd.DataFrame:
    """`table` with a column p_<label>, p_<head>=<class> or p_<number> per output."""
    columns = {}
    for name, values in model.predict(images).items():
        head = model.heads[name]
        stem = f"p_{name}=" if head.kind == "category" else "p_"
        columns |= {f"{stem}{n}": v for n, v in zip(head.names, values.reshape(len(values), -1).T, strict=True)}
    return pd.concat([table.reset_index(drop=True), pd.DataFrame(columns)], axis=1)


def predict_once(folder: Path, model: Path, table: pd.DataFrame, images: np.ndarray) -> pd.DataFrame:
    """`folder`/predictions.csv: the rows of `table` with what the model in folder `model` says about `images`."""
    inputs = {"model": record.sha256_file(model / "weights.safetensors"), "images": array_sha256(images, {}),
              "rows": record.sha256_json(table.astype(str).to_numpy().tolist()), "code": code()}  # fmt: skip
    file = Path(folder) / "predictions.csv"
    if not record.is_current(folder, inputs):
        with record.run_json(folder, inputs) as run:
            with record.atomic(file) as temporary:
                found = predictions(classify.load(model), images, table)
                found.to_csv(temporary, index=False, float_format="%.6g")
            run.outputs.append(file)
    return read_predictions(file)


def read_predictions(file: Path) -> pd.DataFrame:
    """A predictions file: all that a metric needs."""
    return pd.read_csv(file, dtype={"id": str, "patient": str}, keep_default_na=False)


# --- one row of the table ---------------------------------------------------------------------------------------------
def train(bench: Bench, strategy: Strategy, method: str, label: str = "") -> tuple[Path, str]:
    """Train one classifier (both phases); returns its folder and the start that it really had. FileNotFoundError for
    a generated set that is not there.
    """
    (before, recipe), heads, seed = bench.phases(strategy), bench.heads(label), bench.seed + strategy.seed
    wanted = bench.config.imagenet if strategy.start == "imagenet" else ""
    weights, start = networks.imagenet_start(recipe.network, wanted)
    if strategy.start == "scratch":
        start = f"{networks.TITLES[recipe.network]}, from scratch"
    home = bench.folder.seed / "downstream" / folder_name(strategy, method, weights is not None, label)
    rows = real_rows(bench.data, strategy, bench.seed)
    val = assemble([(rows["val"], bench.data.images(rows["val"]))], heads)
    init = None
    if strategy.pretrain:
        first = assemble([read_set(bench, method, name, strategy) for name in strategy.pretrain], heads)
        init = fit_once(home / "pretrained", first, val, heads, before, seed, None, weights, start)
        weights = None
    sets = [(rows["train"], bench.data.images(rows["train"]))]
    last = assemble(sets + [read_set(bench, method, name, strategy) for name in strategy.synthetic], heads)
    fit_once(home / "model", last, val, heads, recipe, seed, init, weights, start)
    return home, start


def judged_sets(bench: Bench, strategy: Strategy, method: str) -> list[tuple[str, str, str]]:
    """(test, the generator whose images it shows or `method`, folder below the classifier's) of a row's test sets."""
    shown = methods_of(strategy, bench.methods) if method == REAL else [method]
    out = [("real", method, ""), *([("seen", method, "seen")] if "seen" in strategy.tests else [])]
    out += [(t, m, f"{TEST_SETS[t]}_{m}") for t in strategy.tests if t in TEST_SETS for m in shown]
    if bench.config.external and strategy.recipe == "downstream":
        out.append((bench.config.external, method, bench.config.external))
    return out


def rows_shown(bench: Bench, strategy: Strategy, test: str, of: str) -> tuple[Data, pd.DataFrame, np.ndarray]:
    """Data (whose groups), rows and images of a test set. FileNotFoundError where it is not there."""
    if test in TEST_SETS:
        rows, images = read_set(bench, of, TEST_SETS[test], strategy)
        if test == "seen prompts":
            asked = rows["id"].isin(real_rows(bench.data, strategy, bench.seed)["seen"]["id"]).to_numpy()
            rows, images = rows[asked].reset_index(drop=True), images[asked]
        return bench.data, rows, images
    if test in ("real", "seen"):
        rows = real_rows(bench.data, strategy, bench.seed)["test" if test == "real" else "seen"]
        return bench.data, rows, bench.data.images(rows)
    data = bench.external
    rows = binary(data.table[data.table["split"].isin(["test", "zero_shot"])], data.label_names).reset_index(drop=True)
    return data, rows, data.images(rows)


def run_row(bench: Bench, strategy: Strategy, method: str, label: str = "") -> Iterator[Judged | dict]:
    """Train one classifier and predict its test sets: a `Judged` for each, or {setting, method, note} where something
    is not available; the others stand.
    """
    try:
        home, start = train(bench, strategy, method, label)
    except FileNotFoundError as error:
        yield {"setting": strategy.id, "method": method, "note": said(error, strategy)}
        return
    val = real_rows(bench.data, strategy, bench.seed)["val"]
    val = predict_once(home / "val", home / "model", val, bench.data.images(val))
    known = json.loads((home / "model" / "model.json").read_text())
    about = {"network": networks.TITLES[known["training"]["network"]], "start": start, "epochs": len(known["history"])}
    for test, of, where in judged_sets(bench, strategy, method):
        setting = strategy.id if test == "real" else f"{strategy.id} on {test}"
        try:
            data, rows, images = rows_shown(bench, strategy, test, of)
        except FileNotFoundError as error:
            yield {"setting": setting, "method": of, "note": said(error, strategy)}
            continue
        yield Judged(setting, of, data, predict_once(home / where, home / "model", rows, images), val, label, **about)


def said(error: FileNotFoundError, strategy: Strategy) -> str:
    """A missing file as the note of a row: no folder of this machine in it, and no image's id."""
    if error.filename:
        lost = Path(error.filename)
        where = "/".join(lost.parts[-5:-1]) + "/an image" if lost.suffix == ".png" else "/".join(lost.parts[-5:])
        return f"not available: {where}; {REMEDY.format(strategy.id)}"
    return f"not available: {error}" + ("" if "remedy" in str(error) else f"; {REMEDY.format(strategy.id)}")


def run_all(bench: Bench, names: Sequence[str]) -> tuple[list[Judged], list[dict]]:
    """Every classifier of the chosen rows: what was judged, and what is not available."""
    found: list[Judged | dict] = []
    for strategy, method in fits(names, bench.methods):
        labels = bench.data.label_names if strategy.recipe != "downstream" else ("",)
        if strategy.recipe != "downstream" and bench.data.manifest.modality != "fundus":
            note = "not available: FairDiffusion's tasks are those of fundus images"
            found.append({"setting": strategy.id, "method": method, "note": note})
            continue
        for label in labels:
            found += run_row(bench, strategy, method, label)
    return [f for f in found if isinstance(f, Judged)], [f for f in found if isinstance(f, dict)]
