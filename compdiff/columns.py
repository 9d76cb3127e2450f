"""What a manifest says of a source's table: which column holds what, what its texts mean, where the files lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from compdiff.attributes import AGE_THRESHOLDS, Schema
from compdiff.problems import Problems

# layout -> columns besides those of the schema: those that must be declared, those that may be
COLUMNS = {
    "nih": ({"image", "patient", "labels"}, set()),
    "mimic": ({"image", "patient", "study", "split"}, {"findings", "frontal"}),
    "fairgenmed": ({"image", "split"}, set()),
    "chexpert": ({"image"}, {"findings", "frontal"}),
    "folder": ({"image", "patient"}, {"split", "findings", "frontal"}),
}
FILES = {"nih": {"table", "train_val", "test", "images"}}
OTHER_FILES = {"table", "kinds"}
KINDS = ("jpg", "png", "npz", "dcm")
KEYS = {"header", "values", "none", "first", "bins", "separator", "per_patient", "optional", "decimals"}
SPLITS = ("train", "val", "test")
OTHERS_ZERO = "others_zero"  # the rule of No Finding: 1 iff all other labels are 0


def fold(text: str) -> str:
    """Spaces and letter case do not count. Whole texts are compared, so "Non-Hispanic" is never "Hispanic"."""
    return " ".join(text.split()).casefold()


@dataclass(frozen=True)
class Column:
    """Where a source's table holds something: accepted headers, and what its texts mean."""

    header: tuple[str, ...]  # exactly one of them must be in the table
    values: Mapping[str, Any]  # text in the table -> category (labels: index of the phrase); empty = used as it is
    separator: str = ""  # between several values in one field; "" = one value
    per_patient: bool = False  # the same in all rows of a patient
    none: tuple[str, ...] = ()  # texts that are known to be none of the categories (OTHER, UNKNOWN, ...)
    first: Column | None = None  # is read before this one; its value "" sends the reader on to this one
    optional: bool = False  # the table may do without
    decimals: bool = False  # age: a fraction of a year may follow and is cut off

    @cached_property
    def _folded(self) -> dict[str, Any]:
        return {fold(text): value for text, value in self.values.items()}

    @cached_property
    def _none(self) -> set[str]:
        return {"", *map(fold, self.none)}

    def meaning(self, text: str) -> Any:
        """What the text stands for, None where the manifest does not list it."""
        return self._folded.get(fold(text))

    def is_none(self, text: str) -> bool:
        """Is it empty, or listed as none of the categories?"""
        return fold(text) in self._none


def parse_columns(raw: object, layout: str, schema: Schema, problems: Problems) -> dict[str, Column]:
    required, may = COLUMNS[layout]
    wanted = required | set(schema.names)
    if not isinstance(raw, dict) or not wanted <= set(raw) <= wanted | may:
        more = f"; may be added: {', '.join(sorted(may))}" if may else ""
        problems.add("key columns", "does not fit the schema", f"give exactly: {', '.join(sorted(wanted))}{more}")
        return {}
    columns = {}
    for name, entry in raw.items():
        where = f"key columns: {name}"
        if name == "age" and isinstance(entry, dict) and entry.get("bins") != list(AGE_THRESHOLDS):
            remedy = f"write {list(AGE_THRESHOLDS)}; they live in compdiff.attributes"
            problems.add(where, f"bins {entry.get('bins')} are not the project's", remedy)
        categories = schema[name].categories if name in schema.names and name != "age" else ()
        allowed = SPLITS if name == "split" else ("frontal",) if name == "frontal" else categories
        if column := _column(entry, where, allowed, problems):
            columns[name] = column
    return columns


def _column(entry: object, where: str, allowed: tuple[str, ...], problems: Problems) -> Column | None:
    """One entry; `allowed`: what its values must be, () = any text and none needed."""
    if not isinstance(entry, dict) or not isinstance(entry.get("header"), list) or set(entry) - KEYS:
        problems.add(where, "is not a mapping with a list of headers", f"keys: {', '.join(sorted(KEYS))}")
        return None
    values, none, first = entry.get("values", {}), entry.get("none", []), entry.get("first")
    texts = isinstance(values, dict) and all(isinstance(k, str) and isinstance(v, str) for k, v in values.items())
    known = texts and (not allowed or (bool(values) and set(values.values()) <= set(allowed)))
    if not known:
        remedy = f"map texts of the table to: {', '.join(allowed or ['texts'])}"
        problems.add(where, "values are not known categories", remedy)
        return None
    if not isinstance(none, list) or not all(isinstance(text, str) for text in none):
        problems.add(f"{where}: none", "is not a list of texts", "quote each of them")
        return None
    listed = [fold(text) for text in (*values, *none)]
    if twice := sorted({text for text in listed if listed.count(text) > 1}):
        problems.add(where, f"lists {twice} twice (letter case does not count)", "keep one of them")
    return Column(
        header=tuple(map(str, entry["header"])),
        values=dict(values),
        separator=str(entry.get("separator", "")),
        per_patient=bool(entry.get("per_patient", False)),
        none=tuple(none),
        first=_column(first, f"{where}: first", ("", *allowed), problems) if first is not None else None,
        optional=bool(entry.get("optional", False)),
        decimals=bool(entry.get("decimals", False)),
    )


def parse_labels(raw: object, labels: Mapping[str, tuple[str, ...]], problems: Problems) -> dict[str, Column | str]:
    """{label: {header (default: its name), values: text -> index of its phrase} or the rule of No Finding}."""
    if not isinstance(raw, dict) or set(raw) != set(labels):
        problems.add("key label_columns", "does not fit the labels", f"give exactly: {', '.join(labels)}")
        return {}
    columns: dict[str, Column | str] = {}
    for label, entry in raw.items():
        where = f"key label_columns: {label}"
        if entry == OTHERS_ZERO:
            columns[label] = OTHERS_ZERO
            continue
        values = entry.get("values") if isinstance(entry, dict) else None
        header = entry.get("header", [label]) if isinstance(entry, dict) else None
        positions = range(len(labels[label]))
        good = isinstance(values, dict) and all(isinstance(k, str) and v in positions for k, v in values.items())
        if not (good and values and isinstance(header, list) and set(entry) <= {"header", "values"}):
            remedy = f"map quoted texts of the table to 0-{len(positions) - 1}, or write {OTHERS_ZERO}"
            problems.add(where, "is not header and values", remedy)
            continue
        columns[label] = Column(tuple(map(str, header)), {k: int(v) for k, v in values.items()})
    return columns


def parse_codes(raw: object, schema: Schema, problems: Problems) -> dict[str, tuple[str, dict[int, str]]]:
    """Numbers in an NPZ, by name: {field: (attribute or column of samples.csv, {number: category})}."""
    codes = {}
    for field, entry in raw.items() if isinstance(raw, dict) else [("?", None)]:
        name = entry.get("attribute") if isinstance(entry, dict) else None
        values = entry.get("values") if isinstance(entry, dict) else None
        good = isinstance(name, str) and isinstance(values, dict) and all(isinstance(k, int) for k in values)
        if good and name in schema.names:
            good = set(values.values()) <= set(schema[name].categories)
        if not good:
            problems.add(f"key npz: {field}", "is not attribute and values", "map its numbers to category names")
            continue
        codes[str(field)] = (name, {k: str(v) for k, v in values.items()})
    return codes


def parse_files(raw: object, layout: str, problems: Problems) -> dict[str, Any]:
    wanted = FILES.get(layout, OTHER_FILES)
    lists = ("images",) if layout == "nih" else ("table", "kinds")
    if not isinstance(raw, dict) or set(raw) != wanted or not all(isinstance(raw[k], list) for k in lists):
        remedy = f"give exactly {', '.join(sorted(wanted))}; {' and '.join(lists)}: a list"
        problems.add("key files", "does not fit the layout", remedy)
        return {}
    places = [value if isinstance(value, list) else [value] for key, value in raw.items() if key != "kinds"]
    for name in [name for each in places for name in each]:
        if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
            problems.add("key files", f"{name!r} is not a path below the data folder", "give it relative, without ..")
    if unknown := [kind for kind in raw.get("kinds", []) if kind not in KINDS]:
        problems.add("key files: kinds", f"{unknown} are not known", f"use: {', '.join(KINDS)}")
    return raw
