"""A source's table, read and checked: one `Record` per image. The one path that all layouts of real data share.

All problems come in one report, which names rows and columns and never repeats a value: a shifted column may hold an
identifier. What the manifest lets go (`age_errors`, `category_errors`, `image_errors`: exclude) gets a reason instead.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from compdiff import paths
from compdiff.attributes import MAX_AGE, age_bin
from compdiff.columns import OTHERS_ZERO, Column
from compdiff.manifests import LAYOUT_KEYS, Manifest
from compdiff.pictures import image_problem
from compdiff.problems import Problems
from compdiff.progress import interactive

NO_CATEGORY = "missing, or none of the categories"
UNLINK = "put the files themselves there, or a bind mount (mount --bind, or -v of a container), which is no link"
MIN_DIGITS = 5  # of a number that counts as an identifier in a text


def _repeats(text: str, name: str) -> bool:
    """Does the text hold this identifier as a word of its own? With or without the p or s before a number.

    A number of fewer than five digits is no identifier that a text could give away: "12 mm" would be one.
    """
    core = re.sub(r"^[ps](?=\d+$)", "", name, flags=re.IGNORECASE)
    if not core or core not in text or (core.isdigit() and len(core) < MIN_DIGITS):
        return False
    return bool(re.search(rf"(?<![0-9A-Za-z])[psPS]?{re.escape(core)}(?![0-9A-Za-z])", text))


@dataclass
class Record:
    """One line of the table, as far as it could be understood."""

    line: int  # in the file; the header is line 1
    image: str
    patient: str
    age_years: int | None
    attributes: dict[str, str | None]
    labels: dict[str, int]
    study: str = ""
    findings: str = ""  # the table's own sentence; "" = worded from the labels
    file: str = ""  # relative to the root
    slo: bool = False  # FairGenMed's JPG: turned and scaled when read
    splits: set[str] = field(default_factory=set)  # where the source puts it
    carried: dict[str, str] = field(default_factory=dict)  # further columns of samples.csv
    reason: str = ""  # why it is left out


class Sheet:
    """The table and the folders of one copy, read into `rows`; `problems` collects what is wrong."""

    def __init__(self, manifest: Manifest, root: Path, table: str, seed: int = 0):
        self.manifest, self.root, self.table, self.seed = manifest, root, table, seed
        self.problems = Problems(f"{manifest.title} in {root}")
        self.columns = dict(manifest.columns)
        self.columns |= {f"{name}, first": c.first for name, c in manifest.columns.items() if c.first}
        self.columns |= {f"label {k}": c for k, c in manifest.label_columns.items() if isinstance(c, Column)}
        self.header = {name: " or ".join(column.header) for name, column in self.columns.items()}
        self.rows: list[Record] = []
        self.tops: dict[str, bool] = {}  # top folder of images -> does it stay below the root?
        self.missing = 0  # rows whose image is not there
        self.unclear: dict[str, str] = {}  # patient -> which attribute differs between that patient's rows

    def where(self, row: Record) -> str:
        """How a report names a row: by its place, never by what it holds."""
        return f"{self.table}, row {row.line}"

    def bad(self, line: int, column: str, problem: str, remedy: str) -> None:
        self.problems.add(f"{self.table}, row {line}, column {self.header[column]}", problem, remedy)

    def leave_out(self, row: Record, mode: str, column: str, problem: str, remedy: str, reason: str) -> None:
        """What the manifest decides by `mode` (age_errors, ...): a problem, or a record with a reason."""
        if getattr(self.manifest, mode) == "report":
            more = f", or set {mode}: exclude in the manifest" if mode in LAYOUT_KEYS[self.manifest.layout] else ""
            self.bad(row.line, column, problem, remedy + more)
        else:
            row.reason = row.reason or reason

    # --- the table --------------------------------------------------------------------------------------------------
    def read(self, text: bytes) -> None:
        """Sets `rows`: one per image."""
        try:
            table = list(csv.reader(io.StringIO(text.decode("utf-8-sig"), newline=""), strict=True))
        except (UnicodeDecodeError, csv.Error):
            self.problems.add(self.table, "is not a UTF-8 CSV table", "use the file of the release, unchanged")
            return
        names = [cell.strip() for cell in table[0]] if table else []
        where = self._locate(names)
        images: dict[str, Record] = {}
        patients: dict[str, dict[str, Record]] = {}
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
                self._compare(row, patients.setdefault(row.patient, {}))
        for row in self.rows:
            row.reason = row.reason or self.unclear.get(row.patient, "")
        if not self.rows:
            self.problems.add(self.table, "holds no usable rows", "use the file of the release, unchanged")

    def _locate(self, names: list[str]) -> dict[str, int]:
        """{what: position of its column}; columns that are not there once are reported."""
        where = {}
        for name, column in self.columns.items():
            found = [i for i, cell in enumerate(names) if cell in column.header]
            if len(found) == 1:
                where[name], self.header[name] = found[0], names[found[0]]
            elif found or not column.optional:
                self.bad(1, name, f"{len(found)} such columns", "give the table exactly one")
        return where

    def _row(self, line: int, entry: dict[str, str]) -> Record:
        """One line's texts -> what they mean; columns that the table lacks are not reported again."""
        for name in ("patient", "image", "study"):
            if entry.get(name) == "":
                self.bad(line, name, "missing", "every row needs one")
        given = {name: entry.get(name, "") for name in ("image", "study")}
        row = Record(line, given["image"], self._patient(entry), None, {}, {}, given["study"])
        row.age_years = self._age(row, entry["age"]) if "age" in entry else None
        row.attributes["age"] = None if row.age_years is None else age_bin(row.age_years)
        for name in [n for n in self.manifest.schema.names if n != "age" and n in entry]:
            row.attributes[name] = self._category(row, name, entry)
        row.labels = self._labels(row, entry)
        row.findings = self._findings(row, entry.get("findings", ""))
        if "split" in entry:
            split = self.columns["split"].meaning(entry["split"])
            row.splits = {split} if split else set()
            if not split:
                self.bad(line, "split", "unknown split", f"use one of: {', '.join(self.columns['split'].values)}")
        if entry.get("frontal") and self.columns["frontal"].meaning(entry["frontal"]) is None:
            row.reason = row.reason or "not a frontal view"
        return row

    def _patient(self, entry: dict[str, str]) -> str:
        """The table's own column, or what the layout tells from the image's name."""
        if self.manifest.layout == "chexpert":  # [CheXpert-v1.0/]train/patient00001/study1/view1_frontal.jpg
            return next((part for part in entry.get("image", "").split("/") if part.startswith("patient")), "")
        return entry.get("image" if self.manifest.layout == "fairgenmed" else "patient", "")

    def _age(self, row: Record, text: str) -> int | None:
        whole = r"-?\d{1,6}(\.\d+)?" if self.columns["age"].decimals else r"-?\d{1,6}(\.0+)?"
        if not text and self.manifest.category_errors == "exclude":
            row.reason = row.reason or "age missing"
            return None
        if not re.fullmatch(whole, text):
            problem = "is not a whole number of years" if text else "missing"
            self.bad(row.line, "age", problem, "enter whole years")
            return None
        years = float(text)
        if 0 <= years < MAX_AGE + 1:
            return int(years)
        problem = f"outside 0-{MAX_AGE} years"
        self.leave_out(row, "age_errors", "age", problem, "correct it", f"age {problem}")
        return None

    def _category(self, row: Record, name: str, entry: dict[str, str]) -> str | None:
        """The category that the text stands for. A text that the manifest does not list is never guessed."""
        column = self.columns[name]
        if (first := f"{name}, first") in entry:
            value = self.columns[first].meaning(entry[first])
            if value != "":  # "" sends on to the column itself
                return value if value else self._no_category(row, name, first, entry[first])
        return column.meaning(entry[name]) or self._no_category(row, name, name, entry[name])

    def _no_category(self, row: Record, name: str, column: str, text: str) -> None:
        if self.columns[column].is_none(text):
            remedy = f"use one of: {', '.join(self.columns[column].values)}"
            problem = NO_CATEGORY if text else "missing"
            self.leave_out(row, "category_errors", column, problem, remedy, f"{name} {NO_CATEGORY}")
        else:
            known = ", ".join(self.columns[column].values)
            self.bad(row.line, column, "unknown category", f"use one of: {known}; or list the text in the manifest")

    def _labels(self, row: Record, entry: dict[str, str]) -> dict[str, int]:
        if not self.manifest.label_columns:  # one field that lists the findings
            found = self._listed(row.line, entry["labels"]) if "labels" in entry else set()
            return {label: int(label in found) for label in self.manifest.labels}
        labels = {}
        for label, column in self.manifest.label_columns.items():
            if (name := f"label {label}") not in entry:
                continue
            if (value := column.meaning(entry[name])) is not None:
                labels[label] = value
            elif entry[name]:
                known = ", ".join(text or "empty" for text in column.values)
                self.bad(row.line, name, "unknown value", f"use one of: {known}")
            else:
                self.leave_out(row, "category_errors", name, "missing", "fill it in", f"label {label} missing")
        for label in [k for k, rule in self.manifest.label_columns.items() if rule == OTHERS_ZERO]:
            labels[label] = int(not any(labels.values()))
        return {label: labels.get(label, 0) for label in self.manifest.labels}

    def _listed(self, line: int, text: str) -> set[str]:
        separator, known = self.columns["labels"].separator, self.manifest.labels
        found = {label.strip() for label in text.split(separator)}
        if not found <= set(known):
            remedy = f"use, joined by {separator}: {', '.join(known)}"
            self.bad(line, "labels", "unknown label" if text else "missing", remedy)
        elif "No Finding" in found and len(found) > 1:
            self.bad(line, "labels", "No Finding beside a finding", "keep one of them")
        return found & set(known)

    def _findings(self, row: Record, text: str) -> str:
        """The report's sentence for the prompt, on one line. One that repeats an identifier is refused."""
        if any(_repeats(text, name) for name in (row.patient, row.study, row.image, Path(row.image).stem)):
            self.bad(row.line, "findings", "repeats an identifier of its row", "remove it from the text")
        return " ".join(text.split())

    def _compare(self, row: Record, known: dict[str, Record]) -> None:
        """What belongs to a patient is the same in all rows. known: attribute -> the patient's first row that names it.

        Two sexes under one id are always a problem: one of the rows is somebody else's. Any other attribute may be let
        go (a hospital asks at every admission), and then all rows of the patient go: none is known to be right.
        """
        for name, value in row.attributes.items():
            first = known.setdefault(name, row) if value and self.columns[name].per_patient else row
            if first.attributes.get(name) == value:
                continue
            problem = f"differs from row {first.line}, the same patient"
            if name == "sex":
                self.bad(row.line, name, problem, "correct one of them")
                continue
            remedy = "correct one of them, or set per_patient: false for it in the manifest, if it may change"
            reason = f"{name} differs between rows of the patient"
            self.leave_out(row, "category_errors", name, problem, remedy, reason)
            self.unclear[row.patient] = reason

    # --- splits and files -------------------------------------------------------------------------------------------
    def one_split_per_patient(self) -> None:
        sides: dict[str, Record] = {}
        for row in self.rows:
            first = sides.setdefault(row.patient, row)
            if row.patient and len(row.splits) == len(first.splits) == 1 and first.splits != row.splits:
                where = "patient" if "patient" in self.columns else "image"
                self.bad(row.line, where, f"patient in two splits; see row {first.line}", "split by patient")

    def find(self, row: Record, candidates: Iterable[str]) -> str | None:
        """The first candidate (path below the root) that is a file and stays there; "" = refused, None = not there."""
        for name in candidates:
            if ".." in Path(name).parts or Path(name).is_absolute() or "\\" in name or "\0" in name:
                self.bad(row.line, "image", "path leaves the data folder", "give a path below it")
                return ""
            if os.path.isfile(self.root / name):  # unlike Path.is_file, False for a name that is too long
                top = Path(name).parts[0]
                if top != name and top not in self.tops:  # reported at its first row, not at each
                    self.tops[top] = self._stays(row, top, "the top folder of this and further images")
                return name if self.tops.get(top, True) and self._stays(row, name, "image") else ""
        return None

    def _stays(self, row: Record, name: str, what: str) -> bool:
        """Is a path below the root after links? A problem of the row where it is not."""
        try:
            paths.inside(self.root, name)
        except ValueError:
            self.bad(row.line, "image", f"{what} is a link that leaves the data folder", UNLINK)
            return False
        return True

    def place(self, row: Record, candidates: Iterable[str]) -> None:
        """Sets `row.file` to the first candidate that is there; one that is nowhere is a problem, or a reason."""
        found = self.find(row, candidates)
        row.file = found or ""
        if found is not None:
            return
        self.missing += 1
        if not row.reason:
            remedy = "get its archive, or remove the row"
            self.leave_out(row, "image_errors", "image", "image missing", remedy, "image missing")

    def check_images(self) -> None:
        """Decode every image once, in threads."""
        found = [row for row in self.rows if row.file and not row.reason]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            problems = pool.map(lambda row: image_problem(self.root / row.file, row.slo), found)
            bar = tqdm(problems, "checking images", len(found), unit="image", disable=not interactive())
            for row, problem in zip(found, bar, strict=True):
                if problem:
                    self.bad(row.line, "image", *problem)
