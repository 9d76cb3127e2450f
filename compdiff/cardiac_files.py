"""Cardiac studies from files: tables and PNG slices below one root, read by one path whatever the source.

Everything is checked before `read` returns, and all problems come in one report, which names files, rows and columns,
never a value, a patient or a path. Patients get new names: a hash keyed with the content of the source's own tables.
"""

from __future__ import annotations

import csv
import fnmatch
import io
import re
from pathlib import Path

import numpy as np
from PIL import Image

from compdiff import heart, paths
from compdiff.attributes import MAX_AGE
from compdiff.cardiac import UNKNOWN, Studies
from compdiff.cardiac_manifest import NUMBERS, CardiacManifest
from compdiff.cardiac_views import Frame, Patient, studies
from compdiff.pictures import image_problem
from compdiff.problems import DataError, Problems

MASK_VALUES = (heart.BACKGROUND, heart.CAVITY, heart.MYOCARDIUM, heart.RIGHT)
RANGES = {"age": (0, MAX_AGE), "bmi": (8, 100), "townsend": (-10, 15)}  # what a value can be at all
EMPTY = ("", "NA", "NaN", "nan")


def read(manifest: CardiacManifest, data_root: str) -> Studies:
    """The studies of a source below `data_root` (absolute, or relative to the repository).

    DataError: one report of everything that is wrong. Inputs that the source does not hold are in `Studies.missing`.
    """
    root = (paths.ROOT / Path(data_root).expanduser()).resolve()
    get = f"get it from: {manifest.source} (licence: {manifest.licence}); "
    get += f"then DATA_ROOT=<folder that holds {manifest.patients}>"
    if not data_root or not root.is_dir():
        raise DataError(manifest.title, [f"DATA_ROOT: {'no such folder' if data_root else 'not given'} -> {get}"])
    release = _Release(manifest, root)
    texts = {}
    for name in dict.fromkeys((manifest.patients, manifest.images)):
        path = release.inside(name, name)
        if path is not None and not path.is_file():
            release.problems.add(name, "missing", get)
        elif path is not None:
            texts[name] = path.read_bytes()
    release.problems.check()
    release.read_patients(release.table(manifest.patients, texts[manifest.patients]))
    release.read_frames(release.table(manifest.images, texts[manifest.images]))
    release.check_phases()
    release.check_files()
    release.problems.check()
    return studies(manifest, release.patients, texts)


class _Release:
    """The tables and files of one copy; `problems` collects what is wrong."""

    def __init__(self, manifest: CardiacManifest, root: Path):
        self.manifest, self.root = manifest, root
        self.problems = Problems(manifest.title)
        self.patients: dict[str, Patient] = {}

    def bad(self, file: str, line: int, column: str, problem: str, remedy: str) -> None:
        """Values are never quoted: a shifted column may hold an identifier."""
        self.problems.add(f"{file}, row {line}, column {column}", problem, remedy)

    def inside(self, relative: str, where: str) -> Path | None:
        try:
            return paths.inside(self.root, relative)
        except ValueError:
            self.problems.add(
                where, "path leaves the data folder", "put the file itself there and name it relative to the folder"
            )
            return None

    def table(self, file: str, text: bytes) -> list[tuple[int, dict[str, str]]]:
        """CSV -> [(line, {header: text})]; short or long rows are problems."""
        try:
            rows = list(csv.reader(io.StringIO(text.decode("utf-8-sig"), newline=""), strict=True))
        except (UnicodeDecodeError, csv.Error):
            self.problems.add(file, "is not a UTF-8 CSV table", "save it as comma-separated UTF-8 text")
            return []
        names = [cell.strip() for cell in rows[0]] if rows else []
        m, before = self.manifest, len(self.problems.lines)
        needed = [m.columns["patient"]]
        needed += [c for k, c in m.columns.items() if k != "patient"] if file == m.images else []
        patterns = [a.header for a in m.attributes.values()] + [h for c in m.labels.values() for h in c.headers]
        needed += patterns if file == m.patients else []
        for header in dict.fromkeys(needed):
            found = len(fnmatch.filter(names, header)) if header in patterns else names.count(header)
            if found == 0 or (found > 1 and "*" not in header):
                self.bad(
                    file,
                    1,
                    header,
                    f"{found} such columns",
                    "give the table exactly one, or name yours in the manifest",
                )
        if len(self.problems.lines) > before:
            self.problems.check()  # without its columns nothing else can be said about a table
        out = []
        for line, cells in enumerate(rows[1:], 2):
            if len(cells) == len(names):
                out.append((line, dict(zip(names, (cell.strip() for cell in cells), strict=True))))
            elif any(cells):
                self.problems.add(
                    f"{file}, row {line}",
                    f"{len(cells)} fields, the header has {len(names)}",
                    "quote or repair this row",
                )
        if not out:
            self.problems.add(file, "holds no usable rows", "use the file of the release, unchanged")
        return out

    # --- patients ---------------------------------------------------------------------------------------------------
    def read_patients(self, rows: list[tuple[int, dict[str, str]]]) -> None:
        """Sets `patients`. One row each; where the table lists pictures, all rows of a patient must agree."""
        m, file = self.manifest, self.manifest.patients
        for line, row in rows:
            if not row[m.columns["patient"]]:
                self.bad(file, line, m.columns["patient"], "missing", "every row needs one")
                continue
            before = self.patients.get(row[m.columns["patient"]])
            if before is not None and m.patients != m.images:
                self.bad(
                    file,
                    line,
                    m.columns["patient"],
                    f"same patient as row {before.line}",
                    "one row per patient, one id per person",
                )
                continue
            patient = self._patient(line, row)
            if before is None:
                self.patients[row[m.columns["patient"]]] = patient
                continue
            now, then = (p.numbers | p.categories | p.labels for p in (patient, before))
            headers = {n: a.header for n, a in m.attributes.items()} | {n: c.headers[0] for n, c in m.labels.items()}
            for name in [n for n in headers if now.get(n) != then.get(n)]:
                problem = f"differs from row {before.line}, which has the same patient id"
                self.bad(file, line, headers[name], problem, "two patients need two ids; else correct one of the rows")

    def _patient(self, line: int, row: dict[str, str]) -> Patient:
        patient, file = Patient(line), self.manifest.patients
        for name, column in self.manifest.attributes.items():
            text = row[column.header]
            if text in EMPTY and column.missing == UNKNOWN:
                patient.categories[name] = UNKNOWN
            elif text in EMPTY:
                self.bad(
                    file,
                    line,
                    column.header,
                    "missing",
                    "enter it, remove the patient, or set missing: unknown in the manifest",
                )
            elif name in NUMBERS:
                self._number(patient, name, text, line)
            elif text in column.values:
                patient.categories[name] = column.values[text]
            else:
                self.bad(file, line, column.header, "unknown category", f"use one of: {', '.join(column.values)}")
        for name, columns in self.manifest.labels.items():
            found = {h: row[h] for pattern in columns.headers for h in fnmatch.filter(row, pattern)}
            patient.labels[name] = max(
                (self._present(columns, text, line, header) for header, text in found.items()), default=0
            )
        return patient

    def _number(self, patient: Patient, name: str, text: str, line: int) -> None:
        low, high = RANGES[name]
        if not re.fullmatch(r"-?\d{1,4}(\.\d+)?", text) or not low <= float(text) <= high:
            header = self.manifest.attributes[name].header
            self.bad(self.manifest.patients, line, header, f"is not a number from {low} to {high}", "correct it")
        else:
            patient.numbers[name] = float(text)

    def _present(self, columns, text: str, line: int, header: str) -> int:
        """1 where a text says that the disease is there, else 0."""
        if columns.codes:
            code = text.replace(".", "").upper()
            if text not in EMPTY and not re.fullmatch(r"[A-Z]\d[0-9A-Z]{1,4}", code):
                self.bad(
                    self.manifest.patients, line, header, "is not an ICD-10 code", "one code per field, such as I50.0"
                )
            return int(code.startswith(columns.codes))
        if text not in columns.positive + columns.negative:
            known = ", ".join(columns.positive + columns.negative)
            self.bad(
                self.manifest.patients, line, header, "unknown label" if text else "missing", f"use one of: {known}"
            )
        return int(text in columns.positive)

    # --- pictures ---------------------------------------------------------------------------------------------------
    def read_frames(self, rows: list[tuple[int, dict[str, str]]]) -> None:
        """Sets every patient's `frames`."""
        m, file, seen = self.manifest, self.manifest.images, {}
        for line, row in rows:
            entry = {name: row[header] for name, header in m.columns.items()}
            patient = self.patients.get(entry["patient"])
            if patient is None:
                if entry["patient"] or m.patients != m.images:
                    self.bad(
                        file, line, m.columns["patient"], f"not in {m.patients}", "add the patient, or remove the row"
                    )
                continue
            frame = self._frame(line, entry)
            if frame is None:
                continue
            key = (entry["patient"], frame.view, frame.slice, frame.phase, frame.frame)
            if (first := seen.setdefault(key, line)) != line:
                self.bad(
                    file,
                    line,
                    m.columns["phase"],
                    f"same patient, slice and phase as row {first}",
                    "keep one; two patients need two ids",
                )
            else:
                patient.frames.append(frame)

    def _frame(self, line: int, entry: dict[str, str]) -> Frame | None:
        """One row's picture, or None where something is wrong with it."""
        m, file, before = self.manifest, self.manifest.images, len(self.problems.lines)
        view, phase = entry.get("view") or "short_axis", entry["phase"]
        for name, text, known in (("view", view, heart.VIEWS), ("phase", phase, ("ED", "ES", ""))):
            if text not in known:
                self.bad(file, line, m.columns[name], "unknown", f"use one of: {', '.join(known)}")
        for name in ("slice", "frame"):
            if not re.fullmatch(r"\d{1,5}", entry.get(name) or "0"):
                self.bad(
                    file, line, m.columns[name], "is not a whole number", "number slices from the base, frames from ED"
                )
        if "mid" in entry and entry["mid"] not in ("0", "1"):
            self.bad(file, line, m.columns["mid"], "is not 0 or 1", "1 for one ED and one ES slice per patient")
        files = {}
        for name in ("image", "mask"):
            if entry[name]:
                files[name] = self.inside(entry[name], f"{file}, row {line}, column {m.columns[name]}")
            elif name == "image" or m.masks == "required":
                self.bad(file, line, m.columns[name], "missing", "every row needs one")
        if len(self.problems.lines) > before:
            return None
        mid = entry["mid"] == "1" if "mid" in entry else None
        return Frame(
            line,
            view,
            phase,
            int(entry["slice"] or 0),
            int(entry.get("frame") or 0),
            mid,
            files["image"],
            files.get("mask"),
        )

    def check_phases(self) -> None:
        """Every patient has one mid short-axis slice at ED and at ES; sets `mid` where the table does not say."""
        for patient in self.patients.values():
            ends = [f for f in patient.frames if f.view == "short_axis" and f.phase]
            at = {phase: {f.slice for f in ends if f.phase == phase} for phase in heart.TIMES}
            both = sorted(set.intersection(*at.values()))
            for frame in ends:
                frame.mid = frame.slice == both[len(both) // 2] if frame.mid is None and both else bool(frame.mid)
            for phase in heart.TIMES:
                n = sum(f.mid for f in ends if f.phase == phase)
                if n != 1:
                    where = f"{self.manifest.patients}, row {patient.line}"
                    self.problems.add(
                        where,
                        f"this patient has {n} mid slices at {phase}",
                        "give each patient one at ED and one at ES",
                    )

    def check_files(self) -> None:
        """Decode every image and mask once: PNG, equal sizes within a patient's view, known mask values."""
        for patient in self.patients.values():
            sizes: dict[str, tuple[int, tuple[int, int]]] = {}
            for frame in patient.frames:
                size = self._check_file(frame, "image", frame.image)
                if size is None:
                    continue
                line, first = sizes.setdefault(frame.view, (frame.line, size))
                if size != first:
                    where = (self.manifest.images, frame.line, self.manifest.columns["image"])
                    self.bad(*where, f"size differs from row {line}, the same patient", "export all frames alike")
                if frame.mask is not None and self._check_file(frame, "mask", frame.mask) not in (size, None):
                    where = (self.manifest.images, frame.line, self.manifest.columns["mask"])
                    self.bad(*where, "image and mask differ in size", "export both with the same matrix")

    def _check_file(self, frame: Frame, name: str, path: Path) -> tuple[int, int] | None:
        """Size in pixels, or None where the file cannot be used."""
        where = (self.manifest.images, frame.line, self.manifest.columns[name])
        if not path.is_file():
            self.bad(*where, "file missing", "put it there, or remove the row")
            return None
        if problem := image_problem(path):
            self.bad(*where, *problem)
            return None
        with Image.open(path, formats=["PNG"]) as image:
            if name == "mask" and (image.mode != "L" or not np.isin(np.asarray(image), MASK_VALUES).all()):
                known = "0 background, 1 cavity, 2 myocardium, 3 right ventricle, as 8-bit grey"
                self.bad(*where, "mask with unknown values", f"use {known}")
            return image.size
