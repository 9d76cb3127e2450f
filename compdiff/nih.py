"""The official layout of NIH ChestX-ray14: one table, two lists of image names, folders of PNG files.

Everything is checked before the first image is handed over, and all problems come in one report, which names rows and
columns, never a patient or an image. Both get new names: a hash keyed with the content of the source's own table, so
the same release gives the same names everywhere, and without that table they cannot be turned back.
"""

from __future__ import annotations

import csv
import hashlib
import hmac
import io
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from compdiff import paths
from compdiff.attributes import MAX_AGE, age_bin
from compdiff.manifests import Manifest
from compdiff.pictures import UNREADABLE, image_problem, load_square
from compdiff.problems import DataError, Problems


@dataclass
class _Row:
    """One line of the table, as far as it could be understood."""

    line: int  # in the file; the header is line 1
    image: str
    patient: str
    age_years: int | None
    attributes: dict[str, str | None]
    labels: dict[str, int]
    file: str = ""  # relative to the root
    lists: set[str] = field(default_factory=set)  # train_val, test


def read_nih(manifest: Manifest, size: int, seed: int, data_root: str) -> tuple[Iterator, list[dict], dict]:
    """-> (stream of (row, image uint8 [size, size]), images left out [{id, reason}], sha256 of the text files).

    DataError: one report of everything that is wrong with the release.
    """
    root = _root(manifest, data_root)
    texts = {name: (root / manifest.files[name]).read_bytes() for name in ("table", "train_val", "test")}
    release = _Release(manifest, root)
    release.read_table(texts["table"])
    release.find_images()
    release.read_list("train_val", texts["train_val"])
    release.read_list("test", texts["test"])
    release.check_lists()
    release.check_images()
    release.problems.check()
    names = _Names(texts["table"])
    rows = [row for row in release.rows if row.age_years is not None]  # without one only where age_errors = exclude
    splits, others = _split(rows, manifest, seed)
    aged = [row for row in release.rows if row.age_years is None]
    excluded = [{"id": names.image(r), "reason": f"age outside 0-{MAX_AGE} years"} for r in aged]
    excluded += [{"id": names.image(r), "reason": "other image of a patient in a held-out cell"} for r in others]
    source = {manifest.files[name]: hashlib.sha256(text).hexdigest() for name, text in texts.items()}
    return _stream(splits, manifest, names, root, size), sorted(excluded, key=lambda e: e["id"]), source


class _Names:
    """New names for images and patients: HMAC-SHA-256, keyed with the table's content (64 bits of it)."""

    def __init__(self, table: bytes):
        self.key = hashlib.sha256(b"compdiff names\0" + table).digest()

    def _hash(self, kind: str, text: str) -> str:
        return hmac.new(self.key, f"{kind}\0{text}".encode(), "sha256").hexdigest()[:16]

    def image(self, row: _Row) -> str:
        return "i" + self._hash("image", row.image)

    def patient(self, row: _Row) -> str:
        return "p" + self._hash("patient", row.patient)


def _root(manifest: Manifest, data_root: str) -> Path:
    """The data folder, if it looks like one; else a DataError that says what to get, where, and what it looks like."""
    files = manifest.files
    tree = f"{files['table']}, {files['train_val']}, {files['test']}, PNG files in {' or '.join(files['images'])}"
    get = f"get it from: {manifest.source} (licence: {manifest.licence}); then DATA_ROOT=<folder that holds {tree}>"
    if not data_root:
        raise DataError(manifest.title, [f"DATA_ROOT: not given; this dataset is not in the repository -> {get}"])
    root = (paths.ROOT / Path(data_root).expanduser()).resolve()
    if not root.is_dir():
        raise DataError(manifest.title, [f"DATA_ROOT {root}: no such folder -> {get}"])
    problems = Problems(f"{manifest.title} in {root}")
    for name in (files["table"], files["train_val"], files["test"]):
        try:
            if not paths.inside(root, name).is_file():
                problems.add(name, "missing", get)
        except ValueError:
            problems.add(name, "is a link that leaves the data folder", "put the file itself there")
    if not _folders(manifest, root):
        problems.add(" or ".join(files["images"]), "no such folder", get)
    problems.check()
    return root


def _folders(manifest: Manifest, root: Path) -> list[Path]:
    return sorted({folder for pattern in manifest.files["images"] for folder in root.glob(pattern) if folder.is_dir()})


class _Release:
    """The table, the lists and the folders of one copy, read into `rows`; `problems` collects what is wrong."""

    def __init__(self, manifest: Manifest, root: Path):
        self.manifest, self.root = manifest, root
        self.problems = Problems(f"{manifest.title} in {root}")
        self.table = manifest.files["table"]
        self.header = {name: " or ".join(column.header) for name, column in manifest.columns.items()}
        self.rows: list[_Row] = []

    def bad(self, line: int, column: str, problem: str, remedy: str) -> None:
        """Values are never quoted: a shifted column may hold an identifier."""
        self.problems.add(f"{self.table}, row {line}, column {self.header[column]}", problem, remedy)

    def read_table(self, text: bytes) -> None:
        """Sets `rows`. One row per image; what belongs to a patient is the same in all of that patient's rows."""
        try:
            table = list(csv.reader(io.StringIO(text.decode("utf-8-sig"), newline=""), strict=True))
        except (UnicodeDecodeError, csv.Error):
            self.problems.add(self.table, "is not a UTF-8 CSV table", "use the file of the release, unchanged")
            return
        names = [cell.strip() for cell in table[0]] if table else []
        where = {}
        for name, column in self.manifest.columns.items():
            found = [i for i, cell in enumerate(names) if cell in column.header]
            if len(found) == 1:
                where[name], self.header[name] = found[0], names[found[0]]
            else:
                self.bad(1, name, f"{len(found)} such columns", "give the table exactly one")
        images: dict[str, _Row] = {}
        patients: dict[str, _Row] = {}
        for line, cells in enumerate(table[1:], 2):
            if len(cells) < len(names) or any(cells[len(names) :]):
                if any(cells):
                    counts = f"{len(cells)} fields, the header has {len(names)}"
                    self.problems.add(f"{self.table}, row {line}", counts, "quote or repair this row")
                continue
            row = self._row(line, {name: cells[i].strip() for name, i in where.items()})
            self.rows.append(row)
            if row.image and (first := images.setdefault(row.image, row)) is not row:
                self.bad(line, "image", f"same image as row {first.line}", "keep one of the rows")
            if row.patient:
                self._compare(row, patients.setdefault(row.patient, row))
        if not self.rows:
            self.problems.add(self.table, "holds no usable rows", "use the file of the release, unchanged")

    def _row(self, line: int, entry: dict[str, str]) -> _Row:
        """One line's texts -> what they mean; columns that the table lacks are not reported again."""
        for name in ("patient", "image"):
            if entry.get(name) == "":
                self.bad(line, name, "missing", "every row needs one")
        years = self._age(line, entry["age"]) if "age" in entry else None
        values: dict[str, str | None] = {"age": None if years is None else age_bin(years)}
        for name in [n for n in self.manifest.schema.names if n != "age" and n in entry]:
            known = self.manifest.columns[name].values
            values[name] = known.get(entry[name])
            if values[name] is None:
                self.bad(
                    line, name, "unknown category" if entry[name] else "missing", f"use one of: {', '.join(known)}"
                )
        found = self._labels(line, entry["labels"]) if "labels" in entry else set()
        labels = {label: int(label in found) for label in self.manifest.labels}
        return _Row(line, entry.get("image", ""), entry.get("patient", ""), years, values, labels)

    def _age(self, line: int, text: str) -> int | None:
        if not re.fullmatch(r"-?\d{1,6}(\.0+)?", text):
            self.bad(line, "age", "is not a whole number of years" if text else "missing", "enter whole years")
            return None
        years = int(float(text))
        if 0 <= years <= MAX_AGE:
            return years
        if self.manifest.age_errors == "report":
            remedy = "correct it, or set age_errors: exclude in the manifest"
            self.bad(line, "age", f"outside 0-{MAX_AGE} years", remedy)
        return None

    def _labels(self, line: int, text: str) -> set[str]:
        separator, known = self.manifest.columns["labels"].separator, self.manifest.labels
        found = {label.strip() for label in text.split(separator)}
        if not found <= set(known):
            remedy = f"use, joined by {separator}: {', '.join(known)}"
            self.bad(line, "labels", "unknown label" if text else "missing", remedy)
        elif "No Finding" in found and len(found) > 1:
            self.bad(line, "labels", "No Finding beside a finding", "keep one of them")
        return found & set(known)

    def _compare(self, row: _Row, first: _Row) -> None:
        for name, value in row.attributes.items():
            before = first.attributes.get(name)
            if self.manifest.columns[name].per_patient and value and before and value != before:
                self.bad(row.line, name, f"differs from row {first.line}, the same patient", "correct one of them")

    def find_images(self) -> None:
        """Sets `row.file`: the one file of that name in the image folders, inside the root."""
        where: dict[str, list[str]] = {}
        for folder in _folders(self.manifest, self.root):
            if not folder.resolve().is_relative_to(self.root):
                remedy = "put the folder itself there, or set DATA_ROOT to where it is"
                name = folder.relative_to(self.root)
                self.problems.add(f"{name}/", "is a link that leaves the data folder", remedy)
                continue
            for item in os.scandir(folder):
                where.setdefault(item.name, []).append(str((folder / item.name).relative_to(self.root)))
        for row in self.rows:
            found = where.get(row.image, [])
            if not row.image:
                continue
            if Path(row.image).name != row.image or "\\" in row.image:
                self.bad(row.line, "image", "path leaves the image folders", "give the bare file name")
            elif not found:
                self.bad(row.line, "image", "image missing", "get its archive, or remove the row")
            elif len(found) > 1:
                self.bad(row.line, "image", "image in several folders", "keep one copy")
            elif not (self.root / found[0]).resolve().is_relative_to(self.root):
                self.bad(row.line, "image", "image is a link that leaves the data folder", "put the file itself there")
            else:
                row.file = found[0]

    def read_list(self, name: str, text: bytes) -> None:
        """Sets `row.lists` from one list of image names."""
        file, by_name = self.manifest.files[name], {row.image: row for row in self.rows if row.image}
        if not by_name:  # already reported
            return
        first: dict[str, int] = {}
        for line, entry in enumerate(text.decode("utf-8", errors="replace").splitlines(), 1):
            image = entry.strip()
            if image and image not in by_name:
                problem, remedy = (
                    f"names an image that {self.table} does not have",
                    "use table and lists of one release",
                )
                self.problems.add(f"{file}, line {line}", problem, remedy)
            elif image and first.setdefault(image, line) != line:
                self.problems.add(f"{file}, line {line}", f"same image as line {first[image]}", "keep one of them")
            elif image:
                by_name[image].lists.add(name)

    def check_lists(self) -> None:
        """Every image in exactly one list, every patient in one of them."""
        lists = f"{self.manifest.files['train_val']} and {self.manifest.files['test']}"
        sides: dict[str, _Row] = {}
        for row in self.rows:
            first = sides.setdefault(row.patient, row)
            if row.image and len(row.lists) != 1:
                problem = "image is in both lists" if row.lists else "image is in neither list"
                self.bad(row.line, "image", problem, f"name it in exactly one of {lists}")
            elif row.patient and len(first.lists) == 1 and first.lists != row.lists:
                self.bad(row.line, "patient", f"patient in two splits; see row {first.line}", "split by patient")

    def check_images(self) -> None:
        """Decode every image once, in threads."""
        found = [row for row in self.rows if row.file]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for row, problem in zip(found, pool.map(lambda r: image_problem(self.root / r.file), found), strict=True):
                if problem:
                    self.bad(row.line, "image", *problem)


def _split(rows: list[_Row], manifest: Manifest, seed: int) -> tuple[dict[str, list[_Row]], list[_Row]]:
    """{split: rows} and the rows left out: other train_val images of patients with an image in a held-out cell."""
    held = {row.line for row in rows if manifest.schema.encode(row.attributes) in manifest.held_out}
    gone = {row.patient for row in rows if row.line in held}
    seen = [row for row in rows if row.line not in held and row.lists == {"train_val"}]
    left_out = [row for row in seen if row.patient in gone]
    seen = [row for row in seen if row.patient not in gone]
    order = sorted({row.patient for row in seen}, key=lambda p: hashlib.sha256(f"{seed}/{p}".encode()).digest())
    val = set(order[: round(manifest.split["val_share"] * len(order))])
    splits = {
        "train": [row for row in seen if row.patient not in val],
        "val": [row for row in seen if row.patient in val],
        "test": [row for row in rows if row.lists == {"test"} and row.line not in held],
        "zero_shot": [row for row in rows if row.line in held],
    }
    empty = [split for split in ("train", "val", "test") if not splits[split]]
    if empty:
        raise DataError(
            manifest.title, [f"split {split}: no images left -> use a larger part of the release" for split in empty]
        )
    return splits, left_out


def _stream(
    splits: dict[str, list[_Row]], manifest: Manifest, names: _Names, root: Path, size: int
) -> Iterator[tuple[dict, np.ndarray]]:
    """Rows of each split in the order of their new names, which says nothing about the source's order."""
    index = {cell: i for i, cell in enumerate(manifest.schema.cells())}
    for split, rows in splits.items():
        for row in sorted(rows, key=names.image):
            cell = manifest.schema.encode(row.attributes)
            sample = {"id": names.image(row), "patient": names.patient(row), "split": split}
            sample |= {"held_out": int(cell in manifest.held_out), "cell": index[cell], "age_years": row.age_years}
            sample |= manifest.schema.decode(cell) | {"findings": manifest.describe(row.labels)}
            sample |= {f"y_{label}": value for label, value in row.labels.items()}
            try:
                image = load_square(root / row.file, size)
            except UNREADABLE:
                where = f"{manifest.files['table']}, row {row.line}, image file"
                raise DataError(manifest.title, [f"{where}: changed while it was read -> run again"]) from None
            yield sample, image
