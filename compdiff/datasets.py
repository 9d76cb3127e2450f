"""01. Prepare a dataset once (`prepare`), read it everywhere (`load` -> `Data`).

A prepared folder holds samples.csv (one row per image), shards/, index.json (counts and sha256 of everything) and a
copy of its manifest; of real data also rejects.csv (images left out: new name, row of the source's table, reason) and
datasheet.md. It is built aside and moved into place when complete, under a lock: whole or absent.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import importlib.metadata
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from compdiff import attributes, datasheet, parts, record, shards, sources
from compdiff.attributes import Schema
from compdiff.cohorts import Cohort, cohort
from compdiff.config import ALL, DataConfig
from compdiff.manifests import Manifest, load_manifest, parse_manifest
from compdiff.problems import DataError

FORMAT = 1  # of index.json
SPLITS = ("train", "val", "test", "zero_shot")
MIN_SALT = 16  # characters


def prepare(
    manifest: str | Path, out: Path, config: DataConfig, data_root: str = "", salt: str = "", workers: int = 0
) -> dict:
    """Build the folder `out` from a manifest's name or path; returns its index. Same inputs, same bytes.

    data_root: folder of real data, absolute or relative to the repository's root. salt: key of the new names of
    credentialed data; "" = the one of the file `.<name>.salt` beside `out`, made at random where there is none (see
    `adapters`). workers: threads, 0 = one per core; they change no byte. Killed, the next call goes on.
    ManifestError, DataError: one report of all problems, and `out` stays as it was.
    """
    declared = load_manifest(manifest)
    out = Path(out).resolve()
    if out.exists() and not (out / "index.json").is_file() and (out.is_file() or any(out.iterdir())):
        problem = f"{out}: is there and is no prepared data folder -> remove it or name another folder"
        raise DataError(declared.title, [problem])
    if 0 < len(salt) < MIN_SALT:
        problem = f"salt: shorter than {MIN_SALT} characters -> take random ones, and keep them"
        raise DataError(declared.title, [problem])
    wanted = cohort(declared, config, data_root, lambda: salt.encode() or _salt(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    with _lock(out):
        aside = out.parent / f".{out.name}.new"
        for stale in out.parent.glob(f".{glob.escape(out.name)}.new-*"):
            shutil.rmtree(stale)  # the lock is ours, so nobody writes there
        try:
            aside.mkdir(exist_ok=True)
            for stale in [path for path in aside.iterdir() if path.is_file()]:
                stale.unlink()  # of a killed run, maybe of other data; its shards are judged by their notes
            index = _build(declared, wanted, config.size, aside, workers)
            _swap(aside, out, index)
        except DataError:
            shutil.rmtree(aside)
            raise
        finally:
            if aside.exists() and not parts.finished(aside):  # else what is finished serves the next call
                shutil.rmtree(aside)
    return index


def _salt(out: Path) -> bytes:
    """The secret beside `out`, readable by its owner alone; made on first use. Two processes get the same."""
    path = out.parent / f".{out.name}.salt"
    out.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        fresh = path.with_name(f"{path.name}-{os.getpid()}")
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)
        fresh.unlink()
    return path.read_bytes()


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[None]:
    """One process at a time builds `out`; the kernel frees the lock of a killed process."""
    with open(out.parent / f".{out.name}.lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process is preparing {out}; waiting for it", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _swap(aside: Path, out: Path, index: dict) -> None:
    """Move the complete folder into place; an equal one that is already there stays untouched, for its readers."""
    if _same(out, index):
        shutil.rmtree(aside)
        return
    parts.clear_notes(aside, index["shards"])  # not before: until now a full disk or a kill costs no finished shard
    os.chmod(aside, 0o755)
    if out.exists():
        os.replace(out, aside.with_name(aside.name + "-old"))
    os.replace(aside, out)
    shutil.rmtree(aside.with_name(aside.name + "-old"), ignore_errors=True)


def _same(folder: Path, index: dict) -> bool:
    """Does `folder` hold exactly what `index` says?"""
    files = {"samples.csv": index["samples_sha256"]} | {entry["file"]: entry["sha256"] for entry in index["shards"]}
    try:
        return json.loads((folder / "index.json").read_text()) == index and all(
            record.sha256_file(folder / name) == sha256 for name, sha256 in files.items()
        )
    except (OSError, ValueError):
        return False


def _build(manifest: Manifest, wanted: Cohort, size: int, folder: Path, workers: int) -> dict:
    """Make the shards, then samples.csv, the manifest's copy and, last, index.json."""
    code = sources.closure({"compdiff.cohorts", "compdiff.shards"}, Path(__file__).parent)
    packages = {name: importlib.metadata.version(name) for name in ("numpy", "pillow", "scipy")}
    common = [manifest.sha256, wanted.settings, code, packages]
    rows, entries, rejects = parts.write(folder, wanted.tasks, size, common, workers)
    excluded = sorted(wanted.excluded + rejects, key=lambda entry: entry["id"])
    table = pd.DataFrame(rows)
    assert table["id"].is_unique, "two images got one id"
    record.write_text(folder / "samples.csv", table.to_csv(index=False, lineterminator="\n"))
    record.write_text(folder / "manifest.yaml", manifest.text)
    names = [manifest.schema.cell_name(c) for c in manifest.schema.cells()]
    splits = [s for s in SPLITS if (table["split"] == s).any()]
    cells = {s: np.bincount(table["cell"][table["split"] == s], minlength=len(names)).tolist() for s in splits}
    index = {
        "format": FORMAT,
        "dataset": manifest.name,
        "title": manifest.title,
        "layout": manifest.layout,
        "schema": {a.name: list(a.categories) for a in manifest.schema.attributes},
        "size": size,
        "settings": wanted.settings,
        "images": {s: int((table["split"] == s).sum()) for s in splits},
        "patients": {s: int(table["patient"][table["split"] == s].nunique()) for s in splits},
        "cells": {s: dict(zip(names, counts, strict=True)) for s, counts in cells.items()},
        "held_out": [manifest.schema.cell_name(c) for c in manifest.held_out],
        "excluded": [{"id": entry["id"], "reason": entry["reason"]} for entry in excluded],
        "source_sha256": wanted.source,
        "manifest_sha256": manifest.sha256,
        "samples_sha256": record.sha256_file(folder / "samples.csv"),
        "shards": entries,
    }
    index["sha256"] = record.sha256_json(index)
    if manifest.access != "generated":
        text = pd.DataFrame(excluded, columns=["id", "row", "reason"]).to_csv(index=False, lineterminator="\n")
        record.write_text(folder / "rejects.csv", text)
        record.write_text(folder / "datasheet.md", datasheet.text(manifest, index, table))
    record.write_json(folder / "index.json", index)
    return index


def load(folder: Path) -> Data:
    """Open a prepared folder. DataError when it is absent, incomplete or differs from its index."""
    folder = Path(folder).resolve()
    again = "run notebook 01_data_prep (or `make smoke`)"
    try:
        index = json.loads((folder / "index.json").read_text())
        table_text = (folder / "samples.csv").read_bytes()
        manifest_text = (folder / "manifest.yaml").read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"data in {folder}", [f"{Path(error.filename).name}: missing -> {again}"]) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"data in {folder}", [f"index.json: not readable ({error}) -> {again}"]) from None
    rest = {k: v for k, v in index.items() if k != "sha256"} if isinstance(index, dict) else {}
    if not rest or index.get("sha256") != record.sha256_json(rest):
        raise DataError(f"data in {folder}", [f"index.json: changed -> {again}"])
    if index.get("format") != FORMAT:
        raise DataError(f"data in {folder}", [f"index.json: written by another version -> {again}"])
    if hashlib.sha256(table_text).hexdigest() != index["samples_sha256"]:
        raise DataError(f"data in {folder}", [f"samples.csv: differs from index.json -> {again}"])
    manifest = parse_manifest(manifest_text, index["dataset"], str(folder / "manifest.yaml"))
    if manifest.sha256 != index["manifest_sha256"]:
        raise DataError(f"data in {folder}", [f"manifest.yaml: differs from index.json -> {again}"])
    texts = dict.fromkeys(("id", "patient", "split", "findings", *manifest.schema.names), str)
    table = pd.read_csv(folder / "samples.csv", dtype=texts, keep_default_na=False)
    return Data(folder, index, manifest, table)


@dataclass
class Data:
    """A prepared dataset. `rows` arguments are frames with its columns: any part of `.table`, or a generated set."""

    folder: Path
    index: dict
    manifest: Manifest
    table: pd.DataFrame  # one row per image; columns as in `compdiff.cohorts`
    _cache: dict[str, np.ndarray] = field(default_factory=dict, repr=False)  # split -> uint8 [n, S, S]

    @property
    def schema(self) -> Schema:
        return self.manifest.schema

    @property
    def size(self) -> int:
        return self.index["size"]

    @property
    def source(self) -> str | Path:
        """Where the shards lie: the address in the file `shards.url` (shards/... below it), without it this folder."""
        file = self.folder / "shards.url"
        return file.read_text().strip() if file.is_file() else self.folder

    @property
    def label_names(self) -> tuple[str, ...]:
        return tuple(self.manifest.labels)

    def rows(self, split: str | None = None, held_out: bool | None = None) -> pd.DataFrame:
        """The part of the table in one split, and with or without the held-out cells."""
        if split is not None and split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; one of {SPLITS}")
        keep = np.ones(len(self.table), dtype=bool)
        if split is not None:
            keep &= (self.table["split"] == split).to_numpy()
        if held_out is not None:
            keep &= (self.table["held_out"] == int(held_out)).to_numpy()
        return self.table[keep]

    def images(self, rows: pd.DataFrame | None = None) -> np.ndarray:
        """uint8 [n, S, S] in the order of `rows`, found by their ids.

        A split of which at least half is asked for is read whole and kept in memory; else only the shards are read that
        hold the rows, and nothing is kept.
        """
        ids = (self.table if rows is None else rows)["id"]
        at = pd.Index(self.table["id"]).get_indexer(ids)
        if (at < 0).any():
            raise ValueError(f"no image with id {ids.iloc[int((at < 0).argmax())]!r} in {self.folder}")
        out = np.empty((len(at), self.size, self.size), dtype=np.uint8)
        splits = self.table["split"].to_numpy()
        for split in dict.fromkeys(splits[at]):
            here = splits[at] == split
            first = int((splits == split).argmax())  # the rows of a split stand together
            out[here] = self._split_images(split, at[here] - first)
        return out

    def _split_images(self, split: str, positions: np.ndarray) -> np.ndarray:
        """Images at `positions` of a split, in that order."""
        if split not in self._cache:
            wanted, place = np.unique(positions, return_inverse=True)
            n = int((self.table["split"] == split).sum())
            if 2 * len(wanted) < n:
                return self._read(split, wanted)[place]
            self._cache[split] = self._read(split, np.arange(n))
        return self._cache[split][positions]

    def _read(self, split: str, wanted: np.ndarray) -> np.ndarray:
        """uint8 [n, S, S] at the ascending positions `wanted` of a split."""
        ids = self.rows(split)["id"].tolist()
        out = np.empty((len(wanted), self.size, self.size), dtype=np.uint8)
        entries = [entry for entry in self.index["shards"] if entry["split"] == split]
        if sum(entry["n"] for entry in entries) != len(ids):
            raise shards.ShardError(f"{self.folder}: samples.csv and the shards of {split} differ in number")
        for n, (row, image) in enumerate(shards.read_at(self.source, entries, self.size, wanted)):
            if row["id"] != ids[wanted[n]]:
                raise shards.ShardError(f"{self.folder}: the shards of {split} are not in the order of samples.csv")
            out[n] = image
        return out

    def stream(self, split: str, skipped: list[str] | None = None) -> Iterator[tuple[dict, np.ndarray]]:
        """(row, image uint8 [S, S]) pairs of one split, one shard in memory at a time.

        A bad shard raises ShardError; where a list `skipped` is given it is left out, named there and on stderr.
        """
        entries = [entry for entry in self.index["shards"] if entry["split"] == split]
        return shards.read_all(self.source, entries, self.size, skipped)

    def attributes(self, rows: pd.DataFrame | None = None) -> np.ndarray:
        """Category indices, int64 [n, K] in schema order. ValueError for an unknown or missing category."""
        rows = self.table if rows is None else rows
        out = np.empty((len(rows), len(self.schema)), dtype=np.int64)
        for k, attribute in enumerate(self.schema.attributes):
            out[:, k] = [attribute.index(value) for value in rows[attribute.name]]
        return out

    def labels(self, rows: pd.DataFrame | None = None) -> np.ndarray:
        """Label values, int64 [n, L] in the order of `label_names`."""
        rows = self.table if rows is None else rows
        return rows[[f"y_{name}" for name in self.label_names]].to_numpy(dtype=np.int64)

    def prompts(self, rows: pd.DataFrame | None = None, named: Sequence[str] = ALL) -> list[str]:
        """One prompt per row, naming the attributes in `named` ("*" = all of them) and no other."""
        rows = self.table if rows is None else rows
        names = self.schema.names if tuple(named) == ALL else tuple(named)
        columns = [*self.schema.names, "age_years", "findings"]
        return [
            attributes.prompt(self.manifest.prompts, dict(zip(columns, values, strict=True)), names, self.schema)
            for values in zip(*(rows[name] for name in columns), strict=True)
        ]

    def cells(self, rows: pd.DataFrame | None = None) -> np.ndarray:
        """Index of every row's cell in `schema.cells()`, int64 [n]."""
        return np.ravel_multi_index(tuple(self.attributes(rows).T), self.schema.sizes)

    def cell_counts(self, split: str = "train") -> pd.Series:
        """Images per cell, all cells in the order of `schema.cells()`; the index holds cell names."""
        names = [self.schema.cell_name(cell) for cell in self.schema.cells()]
        return pd.Series(np.bincount(self.cells(self.rows(split)), minlength=len(names)), index=names, name=split)

    def group_masks(self, rows: pd.DataFrame | None = None) -> dict[tuple[str, str], np.ndarray]:
        """{(group_kind, group): bool [n]} for overall, every category, held_out (held_out, seen) and every cell.

        The one place where groups are made. All groups of the schema are there, also those without a row.
        """
        values = self.attributes(rows)
        cells = self.cells(rows)
        held = np.isin(cells, [self.schema.cells().index(cell) for cell in self.manifest.held_out])
        masks = {("overall", ""): np.ones(len(values), dtype=bool)}
        for k, attribute in enumerate(self.schema.attributes):
            masks |= {(attribute.name, category): values[:, k] == i for i, category in enumerate(attribute.categories)}
        masks |= {("held_out", "held_out"): held, ("held_out", "seen"): ~held}
        return masks | {("cell", self.schema.cell_name(cell)): cells == i for i, cell in enumerate(self.schema.cells())}
